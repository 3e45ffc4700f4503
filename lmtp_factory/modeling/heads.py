"""Leap heads: residual blocks on the final hidden state, then an unembedding (L-MTP, section 3.2; Medusa, section 2.1)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import LMTPConfig
from .loss import chunk_rows, chunked_cross_entropy


def like(hidden: Tensor, layer: nn.Module) -> Tensor:
    """``hidden`` in the layer's dtype: trained heads are fp32 on a backbone that may be bf16, with or without autocast."""
    dtype = layer.weight.dtype
    return hidden.to(dtype) if dtype.is_floating_point and not torch.is_autocast_enabled(hidden.device.type) else hidden


class ResidualBlock(nn.Module):
    """``z + SiLU(W z + b)``; with W and b zero it starts as the identity."""

    def __init__(self, hidden_size: int):
        super().__init__()
        # The leaf name is our own: upstream's rules for LoRA targets and multimodal freezing match on names.
        self.leap_proj = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.leap_proj.weight)
        nn.init.zeros_(self.leap_proj.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = like(hidden, self.leap_proj)
        return hidden + F.silu(self.leap_proj(hidden))


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits squeezed into -softcap .. softcap, as the base model's own are; as they come where it has no such cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def unembed(features: Tensor, unembedding: nn.Module, softcap: float | None = None) -> Tensor:
    """(..., hidden) -> (..., vocabulary) logits."""
    return softcapped(unembedding(like(features, unembedding)), softcap)


class LeapHead(nn.Module):
    """One head. Without blocks and with a shared unembedding it is the LM head itself.

    ``forward`` is the training loss, not the logits: under ZeRO-3 a module's weights exist only while its ``forward``
    runs, so the chunks have to be computed in here.
    """

    def __init__(self, hidden_size: int, vocab_size: int, layers: int, own_unembedding: bool):
        super().__init__()
        self.vocab_size = vocab_size
        self.blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(layers))
        self.unembed = nn.Linear(hidden_size, vocab_size, bias=False) if own_unembedding else None

    def features(self, hidden: Tensor) -> Tensor:
        """(..., hidden) final hidden states -> (..., hidden) what the unembedding reads."""
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def logits(self, hidden: Tensor, lm_head: nn.Module, softcap: float | None = None) -> Tensor:
        """(..., hidden) final hidden states -> (..., vocabulary) logits."""
        return unembed(self.features(hidden), self.unembed or lm_head, softcap)

    def forward(
        self, hidden: Tensor, targets: Tensor, lm_head: nn.Module, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy (scalar fp32) and top-1 hits (scalar int64) over the valid targets.

        Args:
            hidden: (rows, hidden) final hidden states.
            targets: (rows,) token ids, -100 where masked.
            lm_head: the backbone's LM head, read where this head has no unembedding of its own.
            softcap: the base model's ``final_logit_softcapping``.
        """
        modules = [self] if self.unembed is not None else [self, lm_head]
        return chunked_cross_entropy(
            hidden,
            targets,
            lambda rows: self.logits(rows, lm_head, softcap),
            parameters=[parameter for module in modules for parameter in module.parameters()],
            rows_per_chunk=chunk_rows(self.vocab_size),
        )


class LeapHeads(PreTrainedModel):
    """The extra heads of one base model: what ``lmtp/`` holds.

    ``heads[i - 1]`` is head ``i`` of the geometry; head 0 is the base model's LM head and is not stored here.
    """

    config_class = LMTPConfig
    base_model_prefix = "leap_heads"
    main_input_name = "hidden_states"

    def __init__(self, config: LMTPConfig):
        super().__init__(config)
        self.folder: Path | None = None  # that they were read from
        self.heads = nn.ModuleList(
            LeapHead(config.hidden_size, config.vocab_size, config.head_layers, config.head_kind == "own")
            for _ in range(config.num_heads)
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: blocks start as the identity, and unembeddings as copies of the LM head or from a checkpoint."""

    def forward(self, hidden_states: Tensor, lm_head: nn.Module, softcap: float | None = None) -> Tensor:
        """(..., hidden) final hidden states -> (heads, ..., vocabulary) logits of the extra heads."""
        return torch.stack([head.logits(hidden_states, lm_head, softcap) for head in self.heads])
