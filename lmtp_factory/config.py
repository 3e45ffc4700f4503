"""Configuration of a set of leap heads, saved as `lmtp/config.json`."""

import copy
from collections.abc import Sequence

from transformers import PretrainedConfig

from . import geometry
from .errors import LMTPError
from .options import HEAD_BLOCKS, HEAD_INPUTS, HEAD_KINDS, HEAD_LAYERS


# Keys that transformers' own configurations write or that `from_dict` adds; they are accepted and passed on.
_OF_TRANSFORMERS = {
    *PretrainedConfig().to_dict(),
    *("name_or_path", "_commit_hash", "torch_dtype", "num_labels", "attn_implementation", "experts_implementation"),
}


class LMTPConfig(PretrainedConfig):
    """Geometry and shape of leap heads, and the base model that they belong to.

    Args:
        num_heads: Number of extra heads, not counting the LM head (the paper's n - 1). Default 3.
        stride: Number of tokens between the targets of neighbouring heads (the paper's k). Default 2.
        offsets: Offsets of the extra heads, increasing and above 1, e.g. `(2, 3, 6)`. Replaces `num_heads` and
            `stride`.
        head_layers: Number of residual blocks in each head. Blocks do not share weights.
        head_kind: `own` gives each head its own unembedding matrix; `shared` uses the backbone's LM head.
        head_block: `linear`, the paper's residual block, or `mlp`, a gated one.
        head_inputs: `state`, the final hidden state; `state_token`, also the embedding of the newest known token; or
            `layers`, a learnt weighted sum of all layers' states.
        head_backs: With `state_token`, the least number of positions at which each head can read its state, see `backs`.
            More than 1 lets `lmtp-cli select` leave out heads between others.
        draft_vocab_size: Number of tokens that the heads can draft, the most frequent ones of the training answers. None
            for the whole vocabulary.
        hidden_size: Hidden size of the base model, set by `attach_heads`.
        vocab_size: Vocabulary size of the base model, set by `attach_heads`.
        base_layers: Number of decoder layers of the base model, set by `attach_heads` for heads that read them.
        base_model: Name or path of the base model.
        tokenizer_fingerprint: Hash of the base model's tokenizer, see `modeling.checkpoint.tokenizer_fingerprint`.

    Raises:
        LMTPError: The geometry is impossible or contradictory, a choice is unknown, there is no head layer, a value has
            the wrong type, or an argument is unknown here and to transformers.
    """

    model_type = "lmtp"

    def __init__(
        self,
        num_heads: int | None = None,
        stride: int | None = None,
        offsets: Sequence[int] | None = None,
        head_layers: int = HEAD_LAYERS,
        head_kind: str = HEAD_KINDS[0],
        head_block: str = HEAD_BLOCKS[0],
        head_inputs: str = HEAD_INPUTS[0],
        head_backs: int = 1,
        draft_vocab_size: int | None = None,
        hidden_size: int | None = None,
        vocab_size: int | None = None,
        base_layers: int | None = None,
        base_model: str | None = None,
        tokenizer_fingerprint: str | None = None,
        **kwargs,
    ):
        unknown = sorted(kwargs.keys() - _OF_TRANSFORMERS)
        if unknown:
            raise LMTPError(
                f"A configuration of leap heads has no {unknown[0]}: leave it out, or update lmtp_factory if a newer "
                "version wrote it."
            )
        self.offsets = geometry.resolve(num_heads, stride, offsets)
        self.head_layers = geometry.whole("head_layers", head_layers)
        if self.head_layers < 1:
            raise LMTPError(f"head_layers is {head_layers}, but a head has at least one block: write head_layers: 1.")
        self.head_kind = _choice("head_kind", head_kind, HEAD_KINDS)
        self.head_block = _choice("head_block", head_block, HEAD_BLOCKS)
        self.head_inputs = _choice("head_inputs", head_inputs, HEAD_INPUTS)
        self.head_backs = geometry.whole("head_backs", head_backs)
        if self.head_backs < 1:
            raise LMTPError(f"head_backs is {head_backs}, but every head reads the newest state: write 1 or more.")
        if self.head_backs > 1 and not self.reads_token:
            raise LMTPError(
                f"head_backs is {head_backs}, but heads that read the state alone fit any place: leave it out or write "
                "head_inputs: state_token."
            )
        self.hidden_size = _size("hidden_size", hidden_size)
        self.vocab_size = _size("vocab_size", vocab_size)
        self.base_layers = _size("base_layers", base_layers)
        self.draft_vocab_size = _size("draft_vocab_size", draft_vocab_size)
        if None not in (vocab_size, draft_vocab_size) and draft_vocab_size > vocab_size:
            raise LMTPError(
                f"draft_vocab_size is {draft_vocab_size}, but the model has {vocab_size} tokens: write fewer."
            )
        for name, value in (("base_model", base_model), ("tokenizer_fingerprint", tokenizer_fingerprint)):
            if value is not None and not isinstance(value, str):
                raise LMTPError(f"{name} is {value!r}, but it has to be text: write it in quotes.")
        self.base_model = base_model
        self.tokenizer_fingerprint = tokenizer_fingerprint
        super().__init__(**kwargs)

    @property
    def num_heads(self) -> int:
        """Number of extra heads, not counting the LM head."""
        return len(self.offsets) - 1

    @property
    def stride(self) -> int | None:
        """The constant stride, or None if the offsets are not evenly spaced."""
        return geometry.stride(self.offsets)

    @property
    def reads_token(self) -> bool:
        """Whether heads also read the embedding of the newest known token."""
        return self.head_inputs == "state_token"

    @property
    def reads_layers(self) -> bool:
        """Whether heads read the states of all layers."""
        return self.head_inputs == "layers"

    @property
    def backs(self) -> tuple[int, ...]:
        """For each extra head the number of positions at which it can read its state; 0 if it reads the state alone.

        The newest state is the first of them. A head of offset `o` behind one of offset `p` needs `o - p` of them, and
        never more than `o - 1`.
        """
        if not self.reads_token:
            return (0,) * self.num_heads
        return tuple(
            min(far - 1, max(far - near, self.head_backs)) for near, far in zip(self.offsets, self.offsets[1:])
        )

    def subset(self, offsets: Sequence[int]) -> "LMTPConfig":
        """Return the configuration of the heads at `offsets`, with the LM head's 1 first.

        Raises:
            LMTPError: The heads leap further than they were trained for.
        """
        config = copy.deepcopy(self)
        config.offsets = tuple(offsets)
        if config.backs != tuple(self.backs[self.offsets.index(offset) - 1] for offset in offsets[1:]):
            raise LMTPError(
                f"Heads at {','.join(map(str, offsets[1:]))} leap further than they were trained for (head_backs: "
                f"{self.head_backs}): keep more heads, or train them with a larger head_backs."
            )
        return config


def _choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise LMTPError(f"{name} is {value!r}, but it has to be one of {', '.join(choices)}.")
    return value


def _size(name: str, value: int | None) -> int | None:
    if value is not None and geometry.whole(name, value) < 1:
        raise LMTPError(f"{name} is {value}, but it has to be 1 or more.")
    return value
