"""The page of comparison.py: tables, a plot and the answer at equal reach, all from its JSON."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmtp_factory.decoding.tree_config import KINDS


COMMAND = "make results"
# The times of an arm are measured once. Run again on a machine of two cores, they differed by up to this share.
TIMING_NOISE = 0.15
STAGES = {"frozen": "Stage 1: heads on the frozen backbone", "joint": "Stage 2: backbone and heads tuned together"}


def write_page(found: dict, path: Path, findings: Path | None = None) -> None:
    """Write the page and its plot.

    Args:
        found: Contents of comparison.json.
        path: Markdown file; the plot gets the same name with `_tau.png`.
        findings: Markdown that ends the page.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plot = path.with_name(f"{path.stem}_tau.png")
    draw(found, plot)
    parts = [*_introduction(found), *_quality(found)]
    for stage, title in STAGES.items():
        parts += [f"## {title}", ""]
        for label in found["settings"]["test"]:
            parts += _table(found, stage, label)
    parts += [f"![tau of dynamic trees by number of nodes]({plot.name})", "", *_speed(found), *_compared(found)]
    if findings:
        parts += [findings.read_text(encoding="utf-8")]
    path.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format the mean of the seeds, with the smallest and largest value if there are several."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def verdict(
    name: str, ours: Sequence[float], other: str, theirs: Sequence[float], unit: str, noise: float = 0.0
) -> str:
    """Say which of two arms is better, or that their seeds overlap or differ by less than the share `noise`."""
    ratio = statistics.fmean(ours) / statistics.fmean(theirs)
    if len(ours) < 2 or len(theirs) < 2:
        return f"{name} has {ratio:.2f} times the {unit} of {other}, with one seed, which says nothing about noise"
    if max(min(ours), min(theirs)) <= min(max(ours), max(theirs)):
        return f"{name} and {other} do not differ in {unit} beyond the spread of the seeds (ratio {ratio:.2f})"
    if 1 / (1 + noise) < ratio < 1 + noise:
        return f"{name} and {other} do not differ in {unit} beyond what timing varies by (ratio {ratio:.2f})"
    return f"{name} has {ratio:.2f} times the {unit} of {other}, beyond the spread of the seeds"


def _seeds(arm: dict, value: Callable[[dict], float]) -> list[float]:
    return [value(seed) for seed in arm["seeds"].values()]


def _introduction(found: dict) -> list[str]:
    settings, seeds = found["settings"], found["settings"]["seeds"]
    return [
        f"# {settings['title']}",
        "",
        f"Written by `{COMMAND}` for {found['model']} on {found['machine']}. Settings: "
        f"[{found['settings file']}](../experiments/{found['settings file']}).",
        "",
        *_own_settings(found),
        f"- {'Every other arm has' if _own_settings(found) else 'All arms have'} the same "
        f"{settings['max_train_rows']} rows: {settings['stage1']['max_steps']} steps of 4 rows in stage 1, "
        f"{settings['stage2']['max_steps']} in stage 2 (LoRA). One stage 1 trains heads at "
        f"{', '.join(f'+{offset}' for offset in settings['superset'])}, of which each arm takes its own.",
        *_environment(settings["training_environment"]),
        f"- Heads draft the {settings['draft_vocab_size']:,} most frequent tokens of the training text.",
        f"- Mean of {len(seeds)} seed{'s' * (len(seeds) > 1)}, in brackets the smallest and largest value.",
        "- tau (tokens per forward) is replayed on the model's own greedy answers. Tokens per second with a tree follow "
        "from tau, the time of a forward of so many tokens and the time of a draft on this machine. These are measured "
        "when everything is trained, with the heads of stage 1: a tuned model has the same shape when its adapter is "
        "merged. The spread is that of the seeds; the times of an arm are measured once and vary on their own, by up to "
        f"{TIMING_NOISE:.0%} from run to run on a machine of two cores. Static trees are built from the first half of the "
        "answers; tau is that of the second half.",
        *(
            f"- Text *{label}*: the first {settings['test_prompts']} prompts of [{file}](../{file})."
            for label, file in settings["test"].items()
        ),
        "- Training tokens per second and memory are those of stage 2, which other work on the machine may have disturbed.",
        "",
    ]


def _environment(variables: dict[str, str]) -> list[str]:
    """Name the environment variables that were set for training."""
    written = ", ".join(f"`{name}={value}`" for name, value in variables.items())
    return [f"- Trained, not measured, with {written}."] if written else []


def _own_settings(found: dict) -> list[str]:
    """Name the arms that train otherwise than the rest."""
    own = {
        name: {key: arm[key] for key in ("stage1", "stage2", "seeds") if key in arm}
        for name, arm in found["settings"]["arms"].items()
    }
    written = "; ".join(f"{name}: {json.dumps(keys)}" for name, keys in own.items() if keys)
    return (
        [f"- These arms have settings of their own, compare them with each other only: {written}."] if written else []
    )


def _differing(found: dict) -> str:
    """Say whether decoding with heads gave stock decoding's answers."""
    runs = [arm["times"]["decoded"] for arm in found["arms"].values()]
    count = sum(way["other answers"] for run in runs for text in run.values() for way in text.values())
    if not count:
        return "All answers are stock decoding's."
    return (
        f"{count} answers differ from stock decoding's: below fp32, rounding decides where two logits are nearly equal."
    )


def _quality(found: dict) -> list[str]:
    lines = [
        "## Training and next-token quality",
        "",
        "Perplexity is that of the next-token model after stage 2, which an NTP export holds.",
        "",
        "| arm | head parameters | tokens/s of stage 2 | peak host memory, MiB | perplexity |",
        "|---|---|---|---|---|",
        f"| before training | | | | {found['plain']['base perplexity']:.3f} |",
    ]
    for name, arm in {"NTP (plain SFT)": found["plain"], **found["arms"]}.items():
        first = next(iter(arm["seeds"].values()))
        parameters = f"{first['joint']['parameters'] / 1e6:.1f} M" if "joint" in first else "0"
        perplexity = _seeds(arm, lambda seed: seed.get("joint", seed)["perplexity"])
        speed = spread(_seeds(arm, lambda seed: seed["training"]["steps per second"] * found["tokens a step"]), 0)
        memory = spread(_seeds(arm, lambda seed: seed["training"]["peak MiB"]), 0)
        lines.append(f"| {name} | {parameters} | {speed} | {memory} | {spread(perplexity, 3)} |")
    return [*lines, ""]


def _table(found: dict, stage: str, label: str) -> list[str]:
    nodes = [size for size in found["settings"]["nodes"] if size > 1]
    trees = " | ".join(f"{kind} {size}" for kind in KINDS for size in nodes)
    lines = [
        f"### On {label}",
        "",
        "tau and, after the slash, tokens per second by tree and number of nodes. `none`: tokens per second without drafts.",
        "",
        f"| arm | offsets | top-1 at +2, +3, ... | none | {trees} |",
        f"|---|---|---|---|{'---|' * (len(nodes) * len(KINDS))}",
    ]
    for name, arm in found["arms"].items():
        texts, seconds = _texts(arm, stage, label), arm["times"]["seconds"]
        top1 = " ".join(
            f".{round(1000 * statistics.fmean(level)):03d}" for level in zip(*(text["top-1"] for text in texts))
        )
        cells = []
        for kind in KINDS:
            for size in nodes:
                tau = statistics.fmean(text["tau"][kind][str(size)] for text in texts)
                cells.append(f"{tau:.2f} / {tau / seconds[str(size)]:.1f}")
        offsets = ",".join(map(str, arm["offsets"]))
        lines.append(f"| {name} | {offsets} | {top1} | {1 / seconds['1']:.1f} | {' | '.join(cells)} |")
    return [*lines, ""]


def _speed(found: dict) -> list[str]:
    lines = [
        "## Decoding",
        "",
        "Heads of stage 1, with the kind and size of tree that replay found fastest, drafting in every step, against our "
        f"own loop without heads on the same {found['settings']['bench_prompts']} prompts: differences of .1 are noise."
        f" {_differing(found)}",
        "",
        "| arm | text | tree | tau | tokens/s | x own loop |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in found["arms"].items():
        for label in found["settings"]["decoded"]:
            run = arm["times"]["decoded"][label]
            for way in ("backward", "forward"):
                if way in run:
                    cells = [f"{run[way][key]:.2f}" for key in ("tau", "tokens per second", "x own loop")]
                    arm_name = name if way == "backward" else f"{name}, looking forward"
                    lines.append(f"| {arm_name} | {label} | {run[way]['tree']} | {' | '.join(cells)} |")
    return [*lines, ""]


def _compared(found: dict) -> list[str]:
    """Answer each question of the settings in sentences that follow from the tables."""
    lines = []
    for heading, (ours, theirs) in found["settings"]["compared"].items():
        lines += [f"## {heading}", ""]
        for label in found["settings"]["test"]:
            for stage in STAGES:
                said = []
                for key, noise in (("tau", 0.0), ("tokens per second", TIMING_NOISE)):
                    values = [_bests(found["arms"][arm], stage, label, key) for arm in (ours, theirs)]
                    said.append(verdict(ours, values[0], theirs, values[1], f"best {key}", noise))
                lines.append(f"- {label}, {stage}: {'; '.join(said)}.")
        sizes = [next(iter(found["arms"][name]["seeds"].values()))["joint"]["parameters"] for name in (ours, theirs)]
        lines += [f"- {ours} has {sizes[0] / sizes[1]:.2f} times the head parameters of {theirs}.", ""]
    return lines


def _texts(arm: dict, stage: str, label: str) -> list[dict]:
    """Return what was replayed on a kind of text, for each seed."""
    return [seed[stage]["text"][label] for seed in arm["seeds"].values()]


def _bests(arm: dict, stage: str, label: str, key: str) -> list[float]:
    """Return the largest tau, or the most tokens per second with drafts, of each seed."""
    seconds = arm["times"]["seconds"] if key == "tokens per second" else None
    return [
        max(
            tau / seconds[size] if seconds else tau
            for taus in text["tau"].values()
            for size, tau in taus.items()
            if int(size) > 1
        )
        for text in _texts(arm, stage, label)
    ]


def draw(found: dict, path: Path) -> None:
    """Draw tau of dynamic trees by number of nodes, a panel a kind of text; solid frozen, dashed joint."""
    labels = list(found["settings"]["test"])
    figure = Figure(figsize=(5.5 * len(labels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, label in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels):
        for number, (name, arm) in enumerate(found["arms"].items()):
            for stage, style in (("frozen", "-"), ("joint", "--")):
                texts = [text["tau"]["dynamic"] for text in _texts(arm, stage, label)]
                nodes = sorted(map(int, texts[0]))
                taus = [statistics.fmean(text[str(size)] for text in texts) for size in nodes]
                panel.plot(
                    nodes, taus, style, color=f"C{number}", marker=".", label=name if stage == "frozen" else None
                )
        panel.set(xscale="log", xlabel="nodes of a dynamic tree", ylabel="tau (tokens per forward)", title=label)
        panel.set_xticks(nodes, [str(size) for size in nodes])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=100)
