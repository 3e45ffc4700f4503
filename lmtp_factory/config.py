"""Configuration of a set of leap heads, saved as ``lmtp/config.json``."""

from collections.abc import Sequence

from transformers import PretrainedConfig

from . import geometry
from .errors import LMTPError


HEAD_KINDS = ("own", "shared")

# What transformers' own configurations write, and what from_dict adds to it.
_OF_TRANSFORMERS = {
    *PretrainedConfig().to_dict(),
    *("name_or_path", "_commit_hash", "torch_dtype", "num_labels", "attn_implementation", "experts_implementation"),
}


class LMTPConfig(PretrainedConfig):
    """Geometry and shape of leap heads, and which base model they belong to.

    Args:
        num_heads: extra heads, the LM head not counted (the paper's n - 1). Default 3.
        stride: tokens that one head leaps beyond the one before (the paper's k). Default 2.
        offsets: instead of the two above, the extra heads' offsets, rising and above 1, e.g. ``(2, 3, 6)``.
        head_layers: residual blocks in each head, with separate weights.
        head_kind: ``own`` gives each head an unembedding matrix, ``shared`` reads the backbone's LM head.
        hidden_size, vocab_size: of the base model; filled in when heads are attached.
        base_model: name or path of the base model.
        tokenizer_fingerprint: see :func:`lmtp_factory.modeling.checkpoint.tokenizer_fingerprint`.

    Raises:
        LMTPError: impossible geometry, contradicting geometry, unknown head kind, no head layer, a value of another type,
            or an argument that is neither here nor one of transformers' own.
    """

    model_type = "lmtp"

    def __init__(
        self,
        num_heads: int | None = None,
        stride: int | None = None,
        offsets: Sequence[int] | None = None,
        head_layers: int = 1,
        head_kind: str = "own",
        hidden_size: int | None = None,
        vocab_size: int | None = None,
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
        head_layers = geometry.whole("head_layers", head_layers)
        if head_layers < 1:
            raise LMTPError(f"head_layers is {head_layers}, but a head has at least one block: write head_layers: 1.")
        if head_kind not in HEAD_KINDS:
            raise LMTPError(f"head_kind is {head_kind!r}, but it has to be one of {', '.join(HEAD_KINDS)}.")
        self.head_layers = head_layers
        self.head_kind = head_kind
        self.hidden_size = _size("hidden_size", hidden_size)
        self.vocab_size = _size("vocab_size", vocab_size)
        for name, value in (("base_model", base_model), ("tokenizer_fingerprint", tokenizer_fingerprint)):
            if value is not None and not isinstance(value, str):
                raise LMTPError(f"{name} is {value!r}, but it has to be text: write it in quotes.")
        self.base_model = base_model
        self.tokenizer_fingerprint = tokenizer_fingerprint
        super().__init__(**kwargs)

    @property
    def num_heads(self) -> int:
        """Extra heads, the LM head not counted."""
        return len(self.offsets) - 1

    @property
    def stride(self) -> int | None:
        """The constant leap, or None where the leaps differ."""
        return geometry.stride(self.offsets)


def _size(name: str, value: int | None) -> int | None:
    if value is not None and geometry.whole(name, value) < 1:
        raise LMTPError(f"{name} is {value}, but it has to be 1 or more: write the base model's.")
    return value
