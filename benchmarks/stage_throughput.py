"""Tokens per second and peak memory of training steps of both stages.

Baselines in the same run: a naive implementation of each stage, and plain SFT of the same model. Padding tokens do not
count. Memory is the peak beyond the base model's weights: heads or LoRA, their gradients, AdamW's states, activations
and logits. The column `with model` includes the weights.

    python benchmarks/stage_throughput.py demo_run/model --batch 4 8 16 --json stages.json --plot stages.png

Each arm and round runs in a new process. Rounds of all arms are interleaved.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from loss_arms import DTYPES
from loss_memory import GIVES_BACK, cell
from peak_memory import MIB, PeakMemory
from stage_arms import ARMS, Setting, make_step

from lmtp_factory import resources
from lmtp_factory.distill.rows import PROMPT_COLUMN, RESPONSE_COLUMN, parse_ids
from lmtp_factory.evaluation.machine import describe
from lmtp_factory.modeling.losses.targets import IGNORE_INDEX
from lmtp_factory.options import HEAD_KINDS


# The baseline of each group of arms.
BASELINES = {"stage 1": "stage 1, naive", "stage 2": "stage 2, naive", "SFT": "SFT"}


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    if args.worker:
        print(json.dumps(in_worker(Setting(**json.loads(args.worker)), args)))
        return
    print(describe(device))
    report = {"machine": describe(device), "steps": args.steps, "batches": []}
    for batch in args.batch:
        setting = Setting(
            args.model,
            batch,
            args.dtype,
            args.device,
            args.heads,
            args.kind,
            args.gradient_checkpointing,
            args.draft_vocab,
            args.tuning,
        )
        rows = compare(setting, args)
        print_table(setting, rows)
        report["batches"].append({"setting": asdict(setting) | {"model": Path(args.model).name}, "arms": rows})
        if args.json:  # after every size: each takes minutes
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw(report, args.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_rows = str(resources.folder("datasets") / "self_distilled_smollm2_train.jsonl")
    parser.add_argument("model", help="directory of the base model")
    parser.add_argument("--rows", default=default_rows, help="rows that lmtp-cli distill wrote with this model")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="documents per step")
    parser.add_argument("--cutoff", type=int, default=1024, help="largest number of tokens per document")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--kind", choices=HEAD_KINDS, default="own")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora", help="of stage 2 and SFT")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in stage 2 and SFT")
    parser.add_argument("--draft-vocab", type=int, default=8192, help="words of the draft vocabulary (default: 8192)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one warm-up step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    parser.add_argument("--plot", metavar="FILE", help="also draw them, as PNG")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(setting: Setting, args: argparse.Namespace) -> dict[str, dict]:
    """Return medians of each arm and of its ratios within a round."""
    results = {arm: [] for arm in args.arms}
    for _ in range(args.rounds):
        for arm, done in results.items():
            done.append(in_fresh_process(setting, arm, args))
    rows = {}
    for arm, done in results.items():
        memory = in_fresh_process(setting, arm, args, **GIVES_BACK) if setting.device == "cpu" else done[0]
        rows[arm] = {
            "tokens_per_second": statistics.median(result["tokens_per_second"] for result in done),
            "peak_bytes": memory["peak_bytes"],
            "model_bytes": memory["model_bytes"],
            "rounds": done,
        }
    for arm, row in rows.items():
        for base in {BASELINES[arm.split(",")[0]], "SFT"} & rows.keys():
            pairs = zip(row["rounds"], rows[base]["rounds"], strict=True)
            row[f"speed over {base}"] = statistics.median(
                a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs
            )
            if row["peak_bytes"] is not None:
                totals = [r["peak_bytes"] + r["model_bytes"] for r in (row, rows[base])]
                row[f"memory over {base}"] = row["peak_bytes"] / rows[base]["peak_bytes"]
                row[f"memory with model over {base}"] = totals[0] / totals[1]
    return rows


def in_fresh_process(setting: Setting, arm: str, args: argparse.Namespace, **environment: str) -> dict:
    options = ["--worker", json.dumps(asdict(setting)), "--arms", arm, "--device", setting.device]
    options += ["--rows", args.rows, "--cutoff", str(args.cutoff), "--steps", str(args.steps)]
    command = [sys.executable, os.path.abspath(__file__), setting.model, *options]
    worker = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment)
    return json.loads(worker.stdout.splitlines()[-1])


def in_worker(setting: Setting, args: argparse.Namespace) -> dict:
    """Run the steps of one arm. The first also creates AdamW's states, so it counts for memory but not for time."""
    documents = read_documents(args.rows, args.cutoff, setting.batch * (args.steps + 1))
    batches = [documents[i : i + setting.batch] for i in range(0, len(documents), setting.batch)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        step, base_bytes, added_bytes = make_step(args.arms[0], setting, documents, folder, stack)
        peak, seconds = run(step, batches, setting.device)
    tokens = sum(len(document["input_ids"]) for batch in batches[1:] for document in batch)
    return {
        "tokens_per_second": tokens / seconds,
        "peak_bytes": peak and peak + added_bytes,
        "model_bytes": base_bytes,
    }


def run(step: Callable, batches: list[list[dict]], device: str) -> tuple[int | None, float]:
    """Return the peak bytes of all steps and the seconds of all but the first."""

    def wait() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    with PeakMemory(device) as peak:
        step(batches[0])
        wait()
        started = time.perf_counter()
        for batch in batches[1:]:
            step(batch)
        wait()
        seconds = time.perf_counter() - started
    return peak.bytes, seconds


def read_documents(path: str, cutoff: int, count: int) -> list[dict]:
    """Read `count` rows with masked prompts, starting over at the end of the file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    documents = []
    for i in range(count):
        row = json.loads(lines[i % len(lines)])
        prompt, output = parse_ids(row[PROMPT_COLUMN]), parse_ids(row[RESPONSE_COLUMN])
        labels = [IGNORE_INDEX] * len(prompt) + output
        documents.append({"input_ids": (prompt + output)[:cutoff], "labels": labels[:cutoff]})
    return documents


def print_table(setting: Setting, rows: dict[str, dict]) -> None:
    print(
        f"\n{setting.batch} documents a step, {setting.heads} {setting.kind} heads, {setting.dtype}, {setting.tuning}"
    )
    print(
        f"{'':<34}{'tokens/s':>10}{'x naive':>9}{'x SFT':>8}{'memory':>13}{'of naive':>10}{'with model':>12}{'of SFT':>8}"
    )
    for arm, row in rows.items():
        naive = BASELINES[arm.split(",")[0]]
        print(
            f"{arm:<34}{row['tokens_per_second']:>10.1f}{cell(row.get(f'speed over {naive}'), '.2f'):>9}"
            f"{cell(row.get('speed over SFT'), '.2f'):>8}{cell(row['peak_bytes'], ',.0f', MIB, ' MiB'):>13}"
            f"{cell(row.get(f'memory over {naive}'), '.2f'):>10}"
            f"{cell(row.get(f'memory with model over {naive}'), '.2f'):>12}"
            f"{cell(row.get('memory over SFT'), '.2f'):>8}",
            flush=True,
        )


def draw(report: dict, path: str) -> None:
    """Draw tokens per second and peak memory by documents per step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    speed, memory = figure.subplots(1, 2)
    sizes = [entry["setting"]["batch"] for entry in report["batches"]]
    for i, arm in enumerate(report["batches"][0]["arms"]):
        rows = [entry["arms"][arm] for entry in report["batches"]]
        style = {"color": f"C{i}", "marker": "o", "label": arm}
        speed.plot(sizes, [row["tokens_per_second"] for row in rows], **style)
        if all(row["peak_bytes"] is not None for row in rows):
            memory.plot(sizes, [row["peak_bytes"] / MIB for row in rows], **style)
    for panel, what in ((speed, "tokens per second"), (memory, "peak memory beyond the model (MiB)")):
        panel.set(xscale="log", yscale="log", xlabel="documents a step", ylabel=what)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    speed.legend(fontsize=8)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
