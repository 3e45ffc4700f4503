"""Configuration of a set of leap heads, saved as ``lmtp/config.json``."""

from collections.abc import Sequence

from transformers import PretrainedConfig

from . import geometry
from .errors import LMTPError


HEAD_KINDS = ("own", "shared")


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
        LMTPError: impossible geometry, contradicting geometry, unknown head kind or no head layer.
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
        self.offsets = geometry.resolve(num_heads, stride, offsets)
        if head_layers < 1:
            raise LMTPError(f"head_layers is {head_layers}, but a head has at least one block: write head_layers: 1.")
        if head_kind not in HEAD_KINDS:
            raise LMTPError(f"head_kind is {head_kind!r}, but it has to be one of {', '.join(HEAD_KINDS)}.")
        self.head_layers = head_layers
        self.head_kind = head_kind
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
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
