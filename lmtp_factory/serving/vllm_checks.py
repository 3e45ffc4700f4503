"""What has to hold for leap heads to draft in vLLM. Everything else is refused."""

import logging
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import geometry
from ..config import LMTPConfig
from ..errors import LMTPError


if TYPE_CHECKING:
    from vllm.config import VllmConfig


logger = logging.getLogger(__name__)

# Releases whose V1 model runner is known. vLLM 0.33 has a V2 runner too, but runs custom classes on V1.
VERSIONS = ("0.32", "0.33")
# Those that have served with these heads. Of the others only the code was read.
SERVED = ("0.32",)


def check_version(version: str | None) -> None:
    """Check vLLM's version; None if it is not installed.

    Raises:
        LMTPError: The model runner of this version was not tried.
    """
    if version is None:
        raise LMTPError(
            f"vLLM is not installed: install vllm=={SERVED[-1]}.* in an environment of its own, and there this package with "
            "pip install --no-deps."
        )
    release = re.match(r"\d+\.\d+", version)
    if release is None or release[0] not in VERSIONS:
        raise LMTPError(
            f"vLLM {version} is installed, but leap heads know vLLM {' and '.join(VERSIONS)} only: install one of them, or "
            "serve without --speculative-config."
        )
    if release[0] not in SERVED:
        logger.warning("Leap heads have not been run with vLLM %s, only with vLLM %s.", version, ", ".join(SERVED))


def check_heads(heads: LMTPConfig, length: int) -> None:
    """Check that vLLM can draft with these heads.

    Args:
        heads: Configuration of the heads.
        length: Number of tokens to draft.

    Raises:
        LMTPError: They read what vLLM does not hand out, or reach less.
    """
    if heads.reads_layers:
        raise LMTPError(
            "These heads read all layers (head_inputs: layers), which vLLM does not hand out: serve heads of head_inputs: "
            "state or state_token."
        )
    longest = longest_draft(heads)
    if length > longest:
        raise LMTPError(
            f"num_speculative_tokens is {length}, but these heads reach {longest} tokens beyond the next one: write "
            f"{longest} or less."
        )


def longest_draft(heads: LMTPConfig) -> int:
    """Return how many tokens the heads can draft beyond the next one."""
    return geometry.reach(heads.offsets) - 1


def check_settings(heads: LMTPConfig, config: "VllmConfig") -> None:
    """Check settings of vLLM.

    Raises:
        LMTPError: Drafts would read something else than in training, or vLLM fails with a class like this.
    """
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise LMTPError(
            "vLLM drafts on the last pipeline stage only and fails on the others: write --pipeline-parallel-size 1."
        )
    if parallel.tensor_parallel_size > 1 and heads.head_kind == "shared":
        raise LMTPError(
            f"These heads share the LM head, which tensor parallelism cuts into {parallel.tensor_parallel_size} parts: "
            "write --tensor-parallel-size 1 or train heads of head_kind: own."
        )
    if config.lora_config is not None and heads.reads_token:
        raise LMTPError(
            "With --enable-lora vLLM embeds the tokens of a step only, and these heads read other ones (head_inputs: "
            "state_token): leave --enable-lora out or train heads of head_inputs: state."
        )
    if config.model_config.enable_sleep_mode:
        raise LMTPError("A server that has slept has lost its leap heads: leave --enable-sleep-mode out.")


def lm_head_of(target: nn.Module, heads: LMTPConfig) -> Tensor:
    """Return the (vocabulary, hidden) weight of the LM head of vLLM's model, without its padding.

    Raises:
        LMTPError: There is none that leap heads could share.
    """
    lm_head = getattr(target, "lm_head", None)
    weight = getattr(lm_head, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape[1:] != (heads.hidden_size,):
        raise LMTPError(
            f"{type(target).__name__} has no lm_head.weight of floating-point numbers, which these heads share: train heads "
            "of head_kind: own."
        )
    if getattr(lm_head, "bias", None) is not None:
        raise LMTPError("The LM head has a bias, which these heads would leave out: train heads of head_kind: own.")
    return weight.detach()[: heads.vocab_size]


@torch.inference_mode()
def prove_final_states(target: nn.Module, hidden_size: int, softcap: float | None) -> None:
    """Prove that twice the state gives twice the logits: some models normalise states on the way to their LM head.

    Heads read the states that vLLM hands out, which then are not those of the training.

    Raises:
        LMTPError: The logits are not proportional to the states.
    """
    weight = next(target.parameters())
    states = torch.arange(hidden_size, device=weight.device).cos().to(weight.dtype)[None]  # (1, hidden)
    once, twice = (target.compute_logits(scale * states) for scale in (1, 2))
    if once is None:  # with tensor parallelism the first rank alone may have logits
        return
    once, twice = once.float(), twice.float()
    if softcap is not None:
        once, twice = (softcap * torch.atanh(logits / softcap) for logits in (once, twice))
    finite = once.isfinite() & twice.isfinite()  # a soft cap saturates
    if not torch.allclose(2 * once[finite], twice[finite], rtol=0.05, atol=0.05 * float(once[finite].abs().mean())):
        raise LMTPError(
            f"{type(target).__name__} computes its logits from other states than those that vLLM hands out: serve without "
            "--speculative-config."
        )
