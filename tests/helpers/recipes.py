"""The YAML files under ``configs/`` as LLaMA-Factory reads them, and tiny stand-ins for the models they name."""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from helpers import tiny_data, tiny_models


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
KINDS = ("s1", "s2", "merge")


@dataclass(frozen=True)
class StandIn:
    """A tiny random model of the class, and with the tying, of the real one.

    Attributes:
        save: writes the model to a directory.
        architecture: the class that LLaMA-Factory loads.
    """

    save: Callable[[Path], Path]
    architecture: str


# Qwen's embeddings have more rows than its tokenizer has tokens; the others' are as large as theirs.
STAND_INS = {
    "qwen2.5-3b": StandIn(lambda d: tiny_models.save_qwen2(d, tie=True, vocab_size=384), "Qwen2ForCausalLM"),
    "qwen2.5-7b": StandIn(lambda d: tiny_models.save_qwen2(d, tie=False, vocab_size=384), "Qwen2ForCausalLM"),
    "llama3.2-3b": StandIn(lambda d: tiny_models.save_llama(d, tie=True), "LlamaForCausalLM"),
    "llama3.1-8b": StandIn(lambda d: tiny_models.save_llama(d, tie=False), "LlamaForCausalLM"),
    "gemma3-4b": StandIn(tiny_models.save_gemma3, "Gemma3ForConditionalGeneration"),
    "gemma3-12b": StandIn(lambda d: tiny_models.save_gemma3(d, hidden_size=48), "Gemma3ForConditionalGeneration"),
}
MODELS = tuple(STAND_INS)

# What a machine without GPU, network and patience forces; everything else is the file's own.
SMALL = {
    "use_cpu": True,
    "max_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "preprocessing_num_workers": 1,
    "dataloader_num_workers": 0,
}


def read(kind: str, model: str) -> dict[str, Any]:
    """A file's keys, read as ``llamafactory-cli`` reads them."""
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / kind / f"{model}.yaml"))


def stand_in(keys: dict[str, Any], base: Path, data: Path | None = None) -> dict[str, Any]:
    """``keys`` with the model and, given ``data``, the dataset replaced by what is on this disk."""
    replaced: dict[str, Any] = {"model_name_or_path": str(base)}
    if data is not None:
        replaced |= {"dataset": tiny_data.DATASET, "dataset_dir": str(data)}
    return keys | replaced


WEIGHTS = ("*.safetensors", "*model*.bin")


@dataclass(frozen=True)
class Trained:
    """What the three files of a model left on disk."""

    base: Path
    stage1: Path
    stage2: Path
    export: Path


def train_and_export(
    directory: Path, base: Path, s1: dict[str, Any], s2: dict[str, Any], merge: dict[str, Any]
) -> Trained:
    """Run both stages and the export in ``directory``, which the files' relative paths start from."""
    from llamafactory.train.tuner import export_model, run_exp

    data = directory / "data"
    tiny_data.save_dataset(data)
    with contextlib.chdir(directory):
        for keys in (s1, s2):
            run_exp(stand_in(keys, base, data) | SMALL)
        export_model(stand_in(merge, base))
    written = (s1["output_dir"], s2["output_dir"], merge["export_dir"])
    return Trained(base, *(directory / path for path in written))


def steps(output_dir: Path) -> list[dict[str, float]]:
    """The training steps in ``trainer_log.jsonl``."""
    lines = (output_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def weights_in(folder: Path) -> set[str]:
    """Model weights below ``folder``."""
    return {path.relative_to(folder).as_posix() for pattern in WEIGHTS for path in folder.rglob(pattern)}


def heads_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "lmtp" / "model.safetensors")


def check_losses(stage1: Path, stage2: Path) -> None:
    """Every head's loss of both steps is finite and near that of a model that knows nothing."""
    for folder, heads in ((stage1, range(1, 4)), (stage2, range(4))):
        entries = steps(folder)
        assert len(entries) == 2
        for entry in entries:
            assert {key for key in entry if "_head_" in key} == {
                f"{m}_head_{i}" for m in ("loss", "acc") for i in heads
            }
            values = [entry["loss"], *(entry[f"loss_head_{i}"] for i in heads)]
            assert all(math.isfinite(value) for value in values)
            assert all(abs(value - math.log(tiny_data.MAX_VOCAB_SIZE)) < 1.5 for value in values[1:])
