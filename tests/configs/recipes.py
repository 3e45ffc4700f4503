"""The YAML files under ``configs/`` as LLaMA-Factory reads them, and tiny stand-ins for the models they name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
from omegaconf import OmegaConf


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
    "qwen2.5-3b": StandIn(lambda d: tiny.tiny_qwen2(d, tie=True, vocab_size=384), "Qwen2ForCausalLM"),
    "qwen2.5-7b": StandIn(lambda d: tiny.tiny_qwen2(d, tie=False, vocab_size=384), "Qwen2ForCausalLM"),
    "llama3.2-3b": StandIn(lambda d: tiny.tiny_llama(d, tie=True), "LlamaForCausalLM"),
    "llama3.1-8b": StandIn(lambda d: tiny.tiny_llama(d, tie=False), "LlamaForCausalLM"),
    "gemma3-4b": StandIn(tiny.tiny_gemma3, "Gemma3ForConditionalGeneration"),
    "gemma3-12b": StandIn(lambda d: tiny.tiny_gemma3(d, hidden_size=48), "Gemma3ForConditionalGeneration"),
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
        replaced |= {"dataset": tiny.DATASET, "dataset_dir": str(data)}
    return keys | replaced
