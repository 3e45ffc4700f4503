"""Loading `LeapHeads` from third-party checkpoints: tensors are found by name, checked by shape and then read."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from transformers import AutoConfig, PretrainedConfig

from ..config import LMTPConfig
from ..errors import LMTPError, first_line
from ..modeling.checkpoint import base_difference, base_fingerprint
from ..modeling.heads import LeapHeads
from . import medusa, release
from .source import Checkpoint


# Each module has TITLE, EXAMPLE (a tensor's name), ADJACENT, locate(tensors), layers(config) and base_model(config).
FORMATS = {"release": release, "medusa": medusa}


@dataclass(frozen=True)
class ThirdPartyHeads:
    """Heads found in a checkpoint. Their weights have not been read.

    Attributes:
        checkpoint: The checkpoint.
        format: Module of the checkpoint's format, a value of `FORMATS`.
        tensors: Maps tensor names in `LeapHeads` to names in the checkpoint. Biases may be missing.
        num_heads: Number of heads.
        layers: Number of residual blocks in each head.
        kind: `own` or `shared` unembeddings.
    """

    checkpoint: Checkpoint
    format: ModuleType
    tensors: dict[str, str]
    num_heads: int
    layers: int
    kind: str


def find_heads(checkpoint: Checkpoint, format_name: str | None = None) -> ThirdPartyHeads:
    """Find the heads in a checkpoint by the names of its tensors.

    Args:
        checkpoint: The checkpoint.
        format_name: A key of `FORMATS`; None uses the first format that matches.

    Raises:
        LMTPError: There are no heads, or a tensor is missing or duplicated.
    """
    formats = [FORMATS[format_name]] if format_name else list(FORMATS.values())
    for format_ in formats:
        tensors: dict[str, str] = {}
        for ours, theirs in format_.locate(checkpoint.files):
            if ours in tensors:
                raise LMTPError(
                    f"{checkpoint.name} holds one part of a head twice ({tensors[ours]} and {theirs}): keep one of them."
                )
            tensors[ours] = theirs
        if tensors:
            return _complete(checkpoint, format_, tensors)
    examples = " or ".join(f"{format_.EXAMPLE} ({format_.TITLE})" for format_ in formats)
    raise LMTPError(f"{checkpoint.name} holds no heads, no tensor like {examples}: name a checkpoint with heads.")


def load_base_config(base: str) -> PretrainedConfig:
    """Load the configuration of the base model.

    Raises:
        LMTPError: It cannot be loaded.
    """
    try:
        return AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise LMTPError(
            f"The base model {base} cannot be loaded ({first_line(error)}): write --base with its directory or hub id."
        ) from None


def check_shapes(found: ThirdPartyHeads, base: PretrainedConfig) -> LMTPConfig:
    """Check the heads' shapes against the base model and return their configuration, with offsets 2, 3, 4, ... for now.

    Args:
        found: The heads.
        base: Configuration of the base model.

    Raises:
        LMTPError: The heads belong to another model, or their tensors have inconsistent shapes.
    """
    checkpoint = found.checkpoint
    shapes = {ours: checkpoint.shape(theirs) for ours, theirs in found.tensors.items()}
    own = found.kind == "own"
    config = LMTPConfig(
        offsets=range(2, found.num_heads + 2),
        head_layers=found.layers,
        head_kind=found.kind,
        hidden_size=shapes["heads.0.blocks.0.leap_proj.weight"][-1],
        vocab_size=shapes["heads.0.unembed.weight"][0] if own else base.get_text_config().vocab_size,
    )
    if difference := base_difference(config, base):
        what, theirs, ours = difference
        raise LMTPError(
            f"The heads in {checkpoint.name} have {what} {theirs}, but {base.name_or_path} has {ours}: write --base with "
            "the model that they were trained on."
        )
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in LeapHeads(config).state_dict().items()}
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise LMTPError(
                f"{found.tensors[name]} of {checkpoint.name} has shape {list(shape)} instead of {list(expected[name])}"
                ": copy the checkpoint again."
            )
    config.base_model = base.name_or_path
    config.tokenizer_fingerprint = base_fingerprint(base.name_or_path)
    return config


def read_heads(found: ThirdPartyHeads, config: LMTPConfig, chosen: Sequence[int]) -> LeapHeads:
    """Read the chosen heads in the dtype of the checkpoint.

    Args:
        found: The heads.
        config: Result of `check_shapes`, with one offset per chosen head.
        chosen: Indices of the heads in the checkpoint, from 0.
    """
    with torch.device("meta"):
        heads = LeapHeads(config)
    tensors = {}
    for name in heads.state_dict():
        _, head, part = name.split(".", 2)
        theirs = f"heads.{chosen[int(head)]}.{part}"
        if theirs in found.tensors:
            tensors[name] = found.checkpoint.read(found.tensors[theirs])
        else:  # a block without a bias
            tensors[name] = torch.zeros_like(tensors[f"{name.removesuffix('bias')}weight"][0])
    heads.load_state_dict(tensors, assign=True)
    return heads


def _complete(checkpoint: Checkpoint, format_: ModuleType, tensors: dict[str, str]) -> ThirdPartyHeads:
    """Count heads and blocks, and check that no tensor is missing."""
    num_heads = 1 + max(int(name.split(".")[1]) for name in tensors)
    held = sorted({int(name.split(".")[3]) for name in tensors if ".blocks." in name})
    layers = max(len(held), format_.layers(checkpoint.config) or 1)
    if len(held) == 1 and layers > 1:
        # Both programs build a head's blocks as [block] * layers, which is one block applied several times. safetensors
        # stores such a shared tensor under one of its names only.
        tensors |= {
            name.replace(f".blocks.{held[0]}.", f".blocks.{block}."): theirs
            for name, theirs in list(tensors.items())
            for block in range(layers)
        }
    kind = "own" if any(name.endswith("unembed.weight") for name in tensors) else "shared"
    parts = [f"blocks.{block}.leap_proj.{leaf}" for block in range(layers) for leaf in ("weight", "bias")]
    if not any(name.endswith(".bias") for name in tensors):
        parts = [part for part in parts if not part.endswith(".bias")]
    if kind == "own":
        parts.append("unembed.weight")
    missing = [name for head in range(num_heads) for part in parts if (name := f"heads.{head}.{part}") not in tensors]
    if missing:
        raise LMTPError(
            f"{checkpoint.name} ({format_.TITLE}) lacks a part of its heads, in our names {missing[0]}: copy the whole "
            "checkpoint again."
        )
    return ThirdPartyHeads(checkpoint, format_, tensors, num_heads, layers, kind)
