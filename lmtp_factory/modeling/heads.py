"""Leap heads: residual blocks on the final hidden state, then an unembedding (L-MTP, section 3.2; Medusa, section 2.1)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import LMTPConfig
from .dtypes import cast_like
from .losses import HeadSpec, leap_loss
from .losses.softmax import softcapped


class ResidualBlock(nn.Module):
    """``z + SiLU(W z + b)``; with W and b zero it starts as the identity."""

    def __init__(self, hidden_size: int):
        super().__init__()
        # The leaf name is our own: upstream's rules for LoRA targets and multimodal freezing match on names.
        self.leap_proj = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.leap_proj.weight)
        nn.init.zeros_(self.leap_proj.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = cast_like(hidden, self.leap_proj)
        return hidden + F.silu(self.leap_proj(hidden))


def unembed(features: Tensor, unembedding: nn.Module, softcap: float | None = None) -> Tensor:
    """(..., hidden) -> (..., vocabulary) logits."""
    return softcapped(unembedding(cast_like(features, unembedding)), softcap)


def softcap_of(base: PreTrainedModel) -> float | None:
    """The base model's ``final_logit_softcapping``, which applies to every head that predicts tokens."""
    return getattr(base.config.get_text_config(), "final_logit_softcapping", None)


def lm_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(..., hidden) final hidden states -> (..., vocabulary), the LM head's logits."""
    return unembed(hidden, model.get_output_embeddings(), softcap_of(model))


class LeapHead(nn.Module):
    """One head: residual blocks, then its own unembedding or the LM head's."""

    def __init__(self, hidden_size: int, vocab_size: int, layers: int, own_unembedding: bool):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(layers))
        self.unembed = nn.Linear(hidden_size, vocab_size, bias=False) if own_unembedding else None

    def features(self, hidden: Tensor) -> Tensor:
        """(..., hidden) final hidden states -> (..., hidden) what the unembedding reads."""
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def logits(self, hidden: Tensor, lm_head: nn.Module, softcap: float | None = None) -> Tensor:
        """(..., hidden) final hidden states -> (..., vocabulary) logits."""
        return unembed(self.features(hidden), self.unembedding(lm_head), softcap)

    def unembedding(self, lm_head: nn.Module) -> nn.Module:
        """The layer that this head's features go to: its own, or the backbone's LM head."""
        return lm_head if self.unembed is None else self.unembed

    def spec(self, lm_head: nn.Module, vocab_size: int) -> HeadSpec:
        """This head as a loss sees it."""
        return HeadSpec(self.features, self.unembedding(lm_head), vocab_size, tuple(self.blocks.parameters()))


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

    def logits(self, hidden: Tensor, lm_head: nn.Module, softcap: float | None = None) -> Tensor:
        """(..., hidden) final hidden states -> (heads, ..., vocabulary) logits of the extra heads."""
        return torch.stack([head.logits(hidden, lm_head, softcap) for head in self.heads])

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        scales: Tensor,
        lm_head: nn.Module,
        *,
        softcap: float | None = None,
        implementation: str = "torch",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The training loss, not the logits: under ZeRO-3 a module's weights exist only while its ``forward`` runs.

        Args:
            hidden: (rows, hidden) final hidden states.
            targets: (heads, rows) token ids, -100 where masked; with one row more than there are extra heads the first
                is the LM head's.
            scales: (heads,) what each head's loss sum is multiplied by.
            lm_head: the backbone's LM head, read by heads without an unembedding of their own.
            softcap: the base model's ``final_logit_softcapping``.
            implementation: ``torch``, ``triton`` or ``eager``, see :mod:`.losses`.

        Returns:
            Scalar loss; (heads,) loss sums, not scaled; (heads,) top-1 hits.
        """
        vocab_size = self.config.vocab_size
        specs = [head.spec(lm_head, vocab_size) for head in self.heads]
        if len(targets) > len(specs):
            specs.insert(0, HeadSpec(_identity, lm_head, vocab_size))
        return leap_loss(hidden, targets, scales, specs, softcap=softcap, implementation=implementation)


def _identity(hidden: Tensor) -> Tensor:
    """What the LM head reads."""
    return hidden
