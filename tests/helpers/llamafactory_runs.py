"""Upstream's own entry points, called on tiny models: in this process where possible, by the CLI where it matters."""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers import tiny_data
from lmtp_factory import LMTPConfig


BIN = Path(sys.executable).parent


def arguments(model: Path, data: Path, output: Path, **overrides) -> dict:
    """A training YAML as a dict: stage 1 of L-MTP on the tiny dataset unless ``overrides`` say otherwise."""
    defaults = {
        "model_name_or_path": str(model),
        "stage": "lmtp1",
        "finetuning_type": "full",
        "do_train": True,
        "dataset": tiny_data.DATASET,
        "dataset_dir": str(data),
        "template": "qwen",
        "cutoff_len": 64,
        "preprocessing_num_workers": 1,
        "output_dir": str(output),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    merged = defaults | overrides
    return {key: value for key, value in merged.items() if value is not None}


def train(model: Path, data: Path, output: Path, **overrides) -> list[dict]:
    """Train in this process; the Trainer's log entries."""
    from llamafactory.train.tuner import run_exp

    run_exp(arguments(model, data, output, **overrides))
    return history(output)


def train_only_evaluates(model: Path, data: Path, output: Path, **overrides) -> None:
    """The same without training; upstream writes ``eval_results.json``."""
    from llamafactory.train.tuner import run_exp

    run_exp(arguments(model, data, output, **overrides) | {"do_train": False, "do_eval": True})


def export(**args) -> None:
    """Export in this process."""
    from llamafactory.train.tuner import export_model

    args = {"template": "qwen", "export_size": 1, "export_device": "cpu"} | args
    export_model({key: str(value) if isinstance(value, Path) else value for key, value in args.items()})


def history(output: Path) -> list[dict]:
    """Entries of ``trainer_state.json``."""
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def step_losses(entries: list[dict]) -> list[float]:
    """Training losses, one a logged step."""
    return [entry["loss"] for entry in entries if "loss" in entry]


def cli(*args: str, timeout: int = 240, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """``llamafactory-cli`` (or, with a path as first argument, another program) in a process of its own."""
    program = args[0] if args[0].startswith("/") else str(BIN / "llamafactory-cli")
    rest = args[1:] if args[0].startswith("/") else args
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run([program, *rest], env=env | environment, capture_output=True, text=True, timeout=timeout)
    if check and result.returncode:
        raise AssertionError(f"{args} ended with {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}")
    return result


def write_yaml(path: Path, args: dict) -> str:
    """The arguments as a YAML file (JSON is YAML)."""
    path.write_text(json.dumps(args, indent=1))
    return str(path)


def write_finished_stage1(folder: Path, base: str = "some/model", name: str = "run", model: str = "Custom") -> Path:
    """A directory under ``saves/`` as a finished stage 1 leaves it for the Board; its weights are empty."""
    heads = folder / "saves" / model / "full" / name / "lmtp"
    heads.mkdir(parents=True)
    LMTPConfig(num_heads=2, stride=3, base_model=base, hidden_size=32, vocab_size=400).save_pretrained(heads)
    (heads / "model.safetensors").touch()
    return heads.parent
