"""Leap heads: residual blocks on the final hidden state, an unembedding (L-MTP, section 3.2; Medusa, section 2.1)."""

import copy
from collections.abc import Sequence
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
    """`z + SiLU(W z + b)`. W and b are initialised to zero, so the block starts as the identity."""

    def __init__(self, hidden_size: int):
        super().__init__()
        # The name must be unique to this package: LLaMA-Factory chooses LoRA targets and frozen modules by leaf name.
        self.leap_proj = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.leap_proj.weight)
        nn.init.zeros_(self.leap_proj.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = cast_like(hidden, self.leap_proj)
        return hidden + F.silu(self.leap_proj(hidden))


def unembed(features: Tensor, unembedding: nn.Module, softcap: float | None = None) -> Tensor:
    """Map (..., hidden) features to (..., vocabulary) logits."""
    return softcapped(unembedding(cast_like(features, unembedding)), softcap)


def softcap_of(base: PreTrainedModel) -> float | None:
    """Return the base model's `final_logit_softcapping` or None. It applies to the leap heads' logits too."""
    return getattr(base.config.get_text_config(), "final_logit_softcapping", None)


def lm_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Map (..., hidden) final hidden states to the LM head's (..., vocabulary) logits."""
    return unembed(hidden, model.get_output_embeddings(), softcap_of(model))


class LeapHead(nn.Module):
    """One leap head: residual blocks, then its own unembedding or the LM head."""

    def __init__(self, hidden_size: int, vocab_size: int, layers: int, own_unembedding: bool):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(layers))
        self.unembed = nn.Linear(hidden_size, vocab_size, bias=False) if own_unembedding else None

    def features(self, hidden: Tensor) -> Tensor:
        """Map (..., hidden) final hidden states to the unembedding's (..., hidden) inputs."""
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def logits(self, hidden: Tensor, lm_head: nn.Module, softcap: float | None = None) -> Tensor:
        """Map (..., hidden) final hidden states to (..., vocabulary) logits."""
        return unembed(self.features(hidden), self.unembedding(lm_head), softcap)

    def unembedding(self, lm_head: nn.Module) -> nn.Module:
        """Return the head's own unembedding layer, or `lm_head` if the head has none."""
        return lm_head if self.unembed is None else self.unembed

    def spec(self, lm_head: nn.Module, vocab_size: int) -> HeadSpec:
        """Return what the loss needs to know about this head."""
        return HeadSpec(self.features, self.unembedding(lm_head), vocab_size, tuple(self.blocks.parameters()))


class LeapHeads(PreTrainedModel):
    """The leap heads of one base model, saved as `lmtp/`.

    `heads[i - 1]` is head `i` of the geometry. Head 0 is the base model's LM head and is not stored here.
    """

    config_class = LMTPConfig
    base_model_prefix = "leap_heads"
    main_input_name = "hidden_states"

    def __init__(self, config: LMTPConfig):
        super().__init__(config)
        self.folder: Path | None = None  # directory that the heads were loaded from
        self.heads = nn.ModuleList(
            LeapHead(config.hidden_size, config.vocab_size, config.head_layers, config.head_kind == "own")
            for _ in range(config.num_heads)
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: blocks start as the identity, and `attach_heads` or a checkpoint sets the unembeddings."""

    def subset(self, offsets: Sequence[int]) -> "LeapHeads":
        """Return the heads at `offsets`, with the LM head's 1 first. Their weights are shared with these heads."""
        config = copy.deepcopy(self.config)
        config.offsets = tuple(offsets)
        tensors = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("heads.")}
        for number, offset in enumerate(offsets[1:]):
            head = self.heads[self.config.offsets.index(offset) - 1]
            tensors |= {f"heads.{number}.{name}": tensor for name, tensor in head.state_dict().items()}
        with torch.device("meta"):  # skips the initialisation of weights that are replaced below
            chosen = type(self)(config)
        chosen.load_state_dict(tensors, assign=True)
        return chosen

    def logits(self, hidden: Tensor, lm_head: nn.Module, softcap: float | None = None) -> Tensor:
        """Map (..., hidden) final hidden states to (heads, ..., vocabulary) logits of the leap heads."""
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
        """Compute the training loss.

        The loss is computed here because ZeRO-3 gathers a module's weights only while its `forward` runs.

        Args:
            hidden: (rows, hidden) final hidden states.
            targets: (heads, rows) token ids, -100 where masked. If there is one more row than leap heads, the first row
                belongs to the LM head.
            scales: (heads,) factors of the heads' loss sums.
            lm_head: The backbone's LM head. Heads of kind `shared` use it as their unembedding.
            softcap: The base model's `final_logit_softcapping`.
            implementation: `torch`, `triton` or `eager`, see `losses/`.

        Returns:
            Scalar loss; (heads,) unscaled loss sums; (heads,) top-1 hits.
        """
        vocab_size = self.config.vocab_size
        specs = [head.spec(lm_head, vocab_size) for head in self.heads]
        if len(targets) > len(specs):
            specs.insert(0, HeadSpec(_identity, lm_head, vocab_size))
        return leap_loss(hidden, targets, scales, specs, softcap=softcap, implementation=implementation)


def _identity(hidden: Tensor) -> Tensor:
    """Return `hidden`: the LM head has no residual blocks."""
    return hidden
