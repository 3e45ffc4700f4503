"""Leap heads: residual blocks on the final hidden state, an unembedding (L-MTP, section 3.2; Medusa, section 2.1)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import LMTPConfig
from . import draft_vocabulary, onednn
from .blocks import BLOCKS, KnownToken, Linear, unchanged
from .dtypes import cast_like
from .layer_states import mix
from .losses import HeadSpec, leap_loss
from .losses.softmax import softcapped


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
    """One leap head: residual blocks, then its own unembedding or the LM head.

    Args:
        config: Shape of the heads.
        index: Index of the head among the extra heads, from 0.
    """

    def __init__(self, config: LMTPConfig, index: int):
        super().__init__()
        block, size, backs = BLOCKS[config.head_block], config.hidden_size, config.backs[index]
        # Only the first block reads the newest known token.
        self.blocks = nn.ModuleList(block(size, 0 if layer else backs) for layer in range(config.head_layers))
        vocab_size = config.draft_vocab_size or config.vocab_size
        self.unembed = nn.Linear(size, vocab_size, bias=False) if config.head_kind == "own" else None
        self.backs = backs
        # Weights of the layers, see `layer_states`. The name is unique to this package, as the blocks' are.
        self.leap_mix = nn.Parameter(torch.zeros(config.base_layers)) if config.reads_layers else None

    def features(self, hidden: Tensor, known: KnownToken | None = None, linear: Linear = unchanged) -> Tensor:
        """Map (..., hidden) hidden states, as the head reads them, to the unembedding's (..., hidden) inputs.

        Args:
            hidden: (..., hidden) states, see `LeapHeads.inputs`.
            known: The newest known token of each, for heads that read it.
            linear: How linear layers are computed.
        """
        for block in self.blocks:
            hidden = block(hidden, known, linear)
        return hidden


class LeapHeads(PreTrainedModel):
    """The leap heads of one base model, saved as `lmtp/`.

    `heads[i - 1]` is head `i` of the geometry. Head 0 is the base model's LM head and is not stored here.

    Attributes:
        d2t: (draft vocabulary,) int64, see `draft_vocabulary.py`; None if the heads draft every token.
        t2d: (vocabulary,) bool, or None.
        folder: Directory that the heads were loaded from.
    """

    config_class = LMTPConfig
    base_model_prefix = "leap_heads"
    main_input_name = "hidden_states"

    def __init__(self, config: LMTPConfig):
        super().__init__(config)
        self.folder: Path | None = None
        size = config.draft_vocab_size
        self.register_buffer("d2t", None if size is None else torch.zeros(size, dtype=torch.long))
        self.register_buffer("t2d", None if size is None else torch.zeros(config.vocab_size, dtype=torch.bool))
        self.heads = nn.ModuleList(LeapHead(config, index) for index in range(config.num_heads))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: `reset`, `attach_heads` or a checkpoint sets the weights."""

    def reset(self, seed: int) -> None:
        """Initialise the blocks. Each head's random numbers depend on the seed and its offset, not on other heads."""
        for offset, head in zip(self.config.offsets[1:], self.heads):
            generator = torch.Generator().manual_seed(seed + offset)
            for block in head.blocks:
                block.reset(generator)
            if head.leap_mix is not None:
                nn.init.zeros_(head.leap_mix)

    @property
    def draft_tokens(self) -> Tensor | None:
        """The (draft vocabulary,) token ids that the heads can draft; None for all."""
        return None if self.d2t is None else draft_vocabulary.tokens_of(self.d2t)

    def draft_labels(self, labels: Tensor) -> Tensor:
        """Map token ids to the heads' output indices; -100 where masked or outside the draft vocabulary."""
        return labels if self.t2d is None else draft_vocabulary.to_draft(labels, self.t2d)

    def unembeddings(self, lm_head: nn.Module) -> list[nn.Module]:
        """Return the unembedding layer of each head. Heads of kind `shared` have the same one."""
        if self.config.head_kind == "own":
            return [head.unembed for head in self.heads]
        tokens = self.draft_tokens
        shared = lm_head if tokens is None else draft_vocabulary.rows_of(lm_head, tokens)
        return [shared] * len(self.heads)

    def inputs(self, hidden: Tensor, layers: Sequence[Tensor] | None = None) -> Tensor:
        """Return what the heads read of each position.

        Args:
            hidden: (..., hidden) final hidden states.
            layers: (..., hidden) states of the inner layers, see `layer_states.recorded`.

        Returns:
            `hidden` itself; for heads that read the layers (..., heads, hidden).
        """
        if not self.config.reads_layers:
            return hidden
        return mix([head.leap_mix for head in self.heads], hidden, layers).movedim(0, -2)

    def logits(
        self,
        hidden: Tensor,
        lm_head: nn.Module,
        softcap: float | None = None,
        known: KnownToken | None = None,
        layers: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Map (..., hidden) final hidden states to (heads, ..., draft vocabulary) logits; for `layers` see `inputs`."""
        inputs, unembeddings = self.inputs(hidden, layers), self.unembeddings(lm_head)
        inputs = inputs.unbind(-2) if self.config.reads_layers else [inputs] * len(self.heads)
        return torch.stack(
            [
                unembed(head.features(states, known), layer, softcap)
                for head, states, layer in zip(self.heads, inputs, unembeddings)
            ]
        )

    def subset(self, offsets: Sequence[int]) -> "LeapHeads":
        """Return the heads at `offsets`, with the LM head's 1 first. Their weights are shared with these heads.

        Raises:
            LMTPError: See `LMTPConfig.subset`.
        """
        config = self.config.subset(offsets)
        tensors = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("heads.")}
        for number, offset in enumerate(offsets[1:]):
            head = self.heads[self.config.offsets.index(offset) - 1]
            tensors |= {f"heads.{number}.{name}": tensor for name, tensor in head.state_dict().items()}
        with torch.device("meta"):  # skips the initialisation of weights that are replaced below
            chosen = type(self)(config)
        chosen.load_state_dict(tensors, assign=True)
        return chosen

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        scales: Tensor,
        lm_head: nn.Module,
        *,
        embeddings: Tensor | None = None,
        turns: Tensor | None = None,
        layers: Sequence[Tensor] | None = None,
        softcap: float | None = None,
        implementation: str = "torch",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the training loss.

        The loss is computed here because ZeRO-3 gathers a module's weights only while its `forward` runs.

        Args:
            hidden: (rows, hidden) final hidden states. Rows of one sequence follow each other.
            targets: (heads, rows) indices of the heads' logits, -100 where masked. If there is one more row than leap
                heads, the first row belongs to the LM head.
            scales: (heads,) factors of the heads' loss sums.
            lm_head: The backbone's LM head. Heads of kind `shared` use it as their unembedding.
            embeddings: (rows, hidden) embeddings of the rows' tokens, for heads that read the newest known token.
            turns: (rows,) int64; modulo a head's `backs` the number of positions that the head looks back at the row.
            layers: (rows, hidden) states of each inner layer, for heads that read them.
            softcap: The base model's `final_logit_softcapping`.
            implementation: `torch`, `triton` or `eager`, see `losses/`.

        Returns:
            Scalar loss; (heads,) unscaled loss sums; (heads,) top-1 hits.
        """
        linear = unchanged if implementation == "eager" else onednn.trainable_linear
        specs, rows, has_lm_head = [], len(hidden), len(targets) > len(self.heads)
        first_rows = [0] * len(self.heads)
        if self.config.reads_layers:
            mixed = mix([head.leap_mix for head in self.heads], hidden, layers)  # (heads, rows, hidden)
            hidden = torch.cat([hidden[None], mixed] if has_lm_head else [mixed]).flatten(0, 1)
            first_rows = [(has_lm_head + index) * rows for index in range(len(self.heads))]
        for head, layer, first_row in zip(self.heads, self.unembeddings(lm_head), first_rows):
            computes_all = self.config.draft_vocab_size is None or isinstance(layer, draft_vocabulary.LMHeadRows)
            size = self.config.vocab_size if computes_all else self.config.draft_vocab_size
            features = _Features(head, embeddings, turns, linear)
            specs.append(HeadSpec(features, layer, size, tuple(head.blocks.parameters()), first_row))
        if has_lm_head:
            specs.insert(0, HeadSpec(_identity, lm_head, self.config.vocab_size))
        return leap_loss(hidden, targets, scales, specs, softcap=softcap, implementation=implementation)


class _Features:
    """Features of one head for the rows of a training batch."""

    def __init__(self, head: LeapHead, embeddings: Tensor | None, turns: Tensor | None, linear: Linear):
        self.head, self.embeddings, self.turns, self.linear = head, embeddings, turns, linear

    def __call__(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Map (rows, hidden) hidden states to features; `rows` are their (rows,) numbers in the batch."""
        if not self.head.backs:
            return self.head.features(hidden, linear=self.linear)
        back = self.turns[rows] % self.head.backs  # (rows,)
        # Beyond the last row there is no target, so that any token will do.
        token = (rows + 1 + back).clamp(max=len(self.embeddings) - 1)
        return self.head.features(hidden, KnownToken(self.embeddings[token], back), self.linear)


def _identity(hidden: Tensor, rows: Tensor) -> Tensor:
    """Return `hidden`: the LM head has no residual blocks."""
    return hidden
