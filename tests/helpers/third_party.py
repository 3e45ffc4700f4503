"""Checkpoints as other programs write them, and what their heads compute by the formula."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lmtp_factory import LeapHeads


def third_party_logits(
    tensors: dict[str, Tensor], states: Tensor, blocks: Sequence[tuple[str, str]], unembed: str
) -> Tensor:
    """Logits of one head by the formula, from its own tensors: blocks are names of (weight, bias)."""
    for weight, bias in blocks:
        states = states + torch.nn.functional.silu(states @ tensors[weight].T + tensors[bias])
    return states @ tensors[unembed].T


def write_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    config: dict | None = None,
    file: str = "model.safetensors",
    shards: int = 1,
) -> Path:
    """A checkpoint directory with these tensors, in one file or in shards with an index."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / file)
        return folder
    files = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    names = sorted(tensors)
    for shard, name in enumerate(files):
        save_file({tensor: tensors[tensor] for tensor in names[shard::shards]}, folder / name)
    weight_map = {tensor: files[i % shards] for i, tensor in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def release_tensors(heads: LeapHeads, prefix: str = "") -> dict[str, Tensor]:
    """As the L-MTP release names them, with something of the backbone beside."""
    tensors = {
        f"{prefix}model.layers.0.mlp.up_proj.weight": torch.ones(4, 4),
        f"{prefix}lm_head.weight": torch.ones(4, 4),
    }
    for i, head in enumerate(heads.heads):
        for j, block in enumerate(head.blocks):
            for leaf in ("weight", "bias"):
                name = f"{prefix}heads.heads.{i}.resblock.{j}.l_proj.{leaf}"
                tensors[name] = getattr(block.leap_proj, leaf).detach().clone()
        tensors[f"{prefix}heads.heads.{i}.lm_head.weight"] = head.unembed.weight.detach().clone()
    return tensors


def medusa_tensors(heads: LeapHeads, prefix: str = "") -> dict[str, Tensor]:
    """As Medusa names them."""
    tensors = {}
    for i, head in enumerate(heads.heads):
        for j, block in enumerate(head.blocks):
            for leaf in ("weight", "bias"):
                tensors[f"{prefix}{i}.{j}.linear.{leaf}"] = getattr(block.leap_proj, leaf).detach().clone()
        tensors[f"{prefix}{i}.{len(head.blocks)}.weight"] = head.unembed.weight.detach().clone()
    return tensors
