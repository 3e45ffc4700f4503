"""Tables of a folder that `gpu.py` filled, as Markdown. Parts that are missing are said to be missing.

python benchmarks/gpu_report.py gpu_run --page docs/gpu.md
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


MIB = 2**20
COMMAND = "make gpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page", type=Path, help="write the page there instead of printing it")
    args = parser.parse_args()
    text = page(args.folder)
    if args.page:
        args.page.write_text(text, encoding="utf-8")
    else:
        print(text)


def page(folder: Path) -> str:
    """Return the whole page."""
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-*.json"))}
    lines = ["# On a GPU", "", f"Written by `{COMMAND}` on {facts['machine']}.", ""]
    if facts["toy"]:
        lines += ["Every part ran at toy size: the numbers show that the command works, and nothing else.", ""]
    for title, prefix, section in (
        ("The leap loss", "loss-", _loss),
        ("Training steps", "stages-", _stages),
        ("Heads trained on self-distilled rows", "heads-", _heads),
        ("Times of a forward and of a draft", "decoding-costs", _costs),
        ("Decoding one sequence", "decoding-trees-", _trees),
        ("Phases of a step", "decoding-phases-", _phases),
        ("Decoding a batch", "decoding-batch-", _batches),
    ):
        parts = [part for name, part in found.items() if name.startswith(prefix)]
        lines += [f"## {title}", ""]
        lines += [f"- Left out: {part['open']}." for part in parts if "open" in part]
        measured = [part for part in parts if "open" not in part]
        lines += [*(section(measured) if measured else ["Not measured."]), ""]
    return "\n".join(lines).rstrip() + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Format a Markdown table; floats get three significant digits, None an empty cell."""
    return [
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
        *(f"| {' | '.join(map(_cell, row))} |" for row in rows),
    ]


def _cell(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _loss(parts: list[dict]) -> list[str]:
    lines = [
        "`loss` and `gradients`: relative difference from the eager loss in fp32. Baseline of the ratios: `eager`.",
        "",
    ]
    for part in parts:
        rows = []
        for arm, row in part["arms"].items():
            values = part["values"].get(arm, {})
            note = row.get("open") or row.get("skipped") or ""
            peak = row.get("peak_bytes")
            rows.append(
                [arm, row.get("seconds") and 1e3 * row["seconds"], row.get("time_over_eager"), peak and peak / MIB,
                 row.get("memory_over_eager"), values.get("loss"), values.get("gradients"), note]
            )  # fmt: skip
        header = ["arm", "ms", "of eager", "MiB", "of eager", "loss", "gradients", ""]
        lines += [f"### {part['point']}", "", *table(header, rows), ""]
    return lines


def _stages(parts: list[dict]) -> list[str]:
    lines = []
    for part in parts:
        rows = [
            [arm, row["tokens_per_second"], row["peak_bytes"] and row["peak_bytes"] / MIB, row.get("speed over SFT")]
            for arm, row in part["arms"].items()
        ]
        title = f"### {part['documents a step']} documents a step, {part['attention']}, stage 2: {part['tuning of stage 2']}"
        lines += [title, "", *table(["arm", "tokens/s", "MiB beyond the model", "x SFT"], rows), ""]
    return lines


def _heads(parts: list[dict]) -> list[str]:
    sizes = list(parts[0]["dynamic"])
    rows = [
        [
            part["passes"],
            f"{part['training tokens']:,}",
            part["training seconds"],
            part["chain"],
            *part["dynamic"].values(),
        ]
        for part in parts
    ]
    return [
        "tau on held-out rows, by replay, chain and dynamic trees.",
        "",
        *table(["passes", "answer tokens", "seconds", "chain", *(f"dynamic {size}" for size in sizes)], rows),
    ]


def _costs(parts: list[dict]) -> list[str]:
    (part,) = parts
    rows = [[size, 1e3 * seconds] for size, seconds in part["verify"].items()] + [["draft", 1e3 * part["draft"]]]
    return table(["tokens", "ms"], rows)


def _trees(parts: list[dict]) -> list[str]:
    lines = []
    for part in sorted(parts, key=lambda part: part["nodes"]):
        gaps = part["margins where answers part"]
        rows = [
            [row["name"], row["tokens_per_second"], row["over_stock"], row["over_own_loop"], row["tau"], row["differing"],
             max(gaps.get(row["name"], []), default=None), row["stock_reason"] or ""]
            for row in part["rows"]
        ]  # fmt: skip
        header = ["way", "tokens/s", "x stock", "x own loop", "tau", "other answers", "largest gap of logits", ""]
        lines += [f"### {part['nodes']} nodes", "", *table(header, rows), ""]
    return lines


def _phases(parts: list[dict]) -> list[str]:
    rows = [
        [part["nodes"], way, *part[way]["ms a step"].values(), part[way]["synchronisations a step"]]
        for part in sorted(parts, key=lambda part: part["nodes"])
        for way in ("eager", "compiled")
    ]
    names = list(parts[0]["eager"]["ms a step"])
    return table(["nodes", "", *(f"{name}, ms" for name in names), "waits a step"], rows)


def _batches(parts: list[dict]) -> list[str]:
    rows = [
        [part["batch"], way, row["tokens per second"], row["x stock"], row["x own loop"], row["tau"]]
        for part in sorted(parts, key=lambda part: part["batch"])
        for way, row in part["rows"].items()
    ]
    return table(["batch", "way", "tokens/s", "x stock", "x own loop", "tau"], rows)


if __name__ == "__main__":
    main()
