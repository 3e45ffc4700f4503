"""The L-MTP keys of YAML files, command line and web UI."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import geometry
from ..errors import LMTPError
from ..options import EXPORTS, HEAD_BLOCKS, HEAD_DECAY, HEAD_INPUTS, HEAD_KINDS, HEAD_LAYERS, HEAD_WEIGHT, STRATEGIES
from . import hooks
from .stages import STAGES
from .values import check_values, read_offsets


if TYPE_CHECKING:
    from ..config import LMTPConfig


# Keys that LMTPConfig has under the same name.
_SHAPE = ("head_kind", "head_layers", "head_block", "head_inputs", "head_backs", "draft_vocab_size")


@dataclass
class LMTPArguments:
    """Arguments pertaining to leap multi-token prediction (L-MTP).

    A key that is left out takes its default, or in stage 2 the value that the stage-1 heads were trained with.
    """

    mtp_type: str | None = field(
        default=None,
        metadata={"help": "The stage in the spelling of the authors' release: `lmtp1` or `lmtp2` beside `stage: sft`."},
    )
    num_heads: int | None = field(
        default=None,
        metadata={
            "help": f"The number of extra heads, the LM head not counted (default: {geometry.DEFAULT_NUM_HEADS})."
        },
    )
    leap_stride: int | None = field(
        default=None,
        metadata={
            "help": "The number of tokens that each head leaps; 1 is ordinary multi-token prediction "
            f"(default: {geometry.DEFAULT_STRIDE})."
        },
    )
    leap_offsets: str | None = field(
        default=None,
        metadata={"help": "Instead of num_heads and leap_stride: the extra heads' rising offsets, e.g. `2,3,6`."},
    )
    head_layers: int | None = field(
        default=None,
        metadata={"help": f"The number of residual blocks in each head (default: {HEAD_LAYERS})."},
    )
    head_kind: str | None = field(
        default=None,
        metadata={"help": f"`own`: an unembedding for each head; `shared`: the LM head's (default: {HEAD_KINDS[0]})."},
    )
    head_block: str | None = field(
        default=None,
        metadata={
            "help": f"`linear`: the paper's residual block; `mlp`: a gated MLP, 4 times as wide (default: {HEAD_BLOCKS[0]})."
        },
    )
    head_inputs: str | None = field(
        default=None,
        metadata={
            "help": "`state`: heads read the final hidden state; `state_token`: also the newest known token; `layers`: a "
            f"learnt weighted sum of all layers' states (default: {HEAD_INPUTS[0]})."
        },
    )
    head_backs: int | None = field(
        default=None,
        metadata={
            "help": "With `head_inputs: state_token` and many heads: the largest leap of the heads that `lmtp-cli select` "
            "may choose among them, e.g. 3 (default: the leaps of these heads)."
        },
    )
    draft_vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "The number of tokens that the heads can draft, the most frequent ones of the training answers, e.g. "
            "8192 (default: all)."
        },
    )
    head_weight: float = field(
        default=HEAD_WEIGHT,
        metadata={"help": "The weight of the extra heads' losses beside the next-token loss in stage 2."},
    )
    head_decay: float = field(
        default=HEAD_DECAY,
        metadata={"help": "The factor by which each extra head's loss weighs less than the one before."},
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Stage 2: the learning rate of the leap heads; the rest keeps `learning_rate` (default: the same)."
        },
    )
    stage1_pretrained_path: str | None = field(
        default=None,
        metadata={"help": "The directory or hub id whose `lmtp/` folder holds the heads to start from."},
    )
    train_lm_head: bool = field(
        default=False,
        metadata={"help": "Whether or not to tune the backbone's LM head too in stage 2 with LoRA."},
    )
    hidden_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Stage 1: a directory for the backbone's final hidden states, computed once and read in every epoch."
        },
    )
    lmtp_loss: str = field(
        default="auto",
        metadata={
            "help": "What computes the leap loss: `auto`, `triton` (CUDA), `torch`, or `eager` (all logits at once)."
        },
    )
    lmtp_export: str = field(
        default=EXPORTS[0],
        metadata={
            "help": "What `export` writes: `ntp` leaves the heads out, `heads` keeps them in `lmtp/`, `custom_generate` "
            "adds a loader for plain transformers to that."
        },
    )
    keep_native_mtp: bool = field(
        default=True,
        metadata={
            "help": "Whether or not to copy the model's own multi-token prediction layers (`mtp.*`, `nextn`), which "
            "transformers does not load, into exports and fully tuned models."
        },
    )
    lmtp_decode: str = field(
        default=STRATEGIES[0],
        metadata={
            "help": "How chat, api and webchat decode: `auto` with the heads if there are some, `backward` (look-back), "
            "`forward` (the paper's F-MTP), `off` (without)."
        },
    )

    # The instance gets a HeadsSource (or None) when LLaMA-Factory has parsed all arguments. It is no field, because it is no
    # key: arguments are written out and parsed again.
    heads_source = None

    @property
    def lmtp_stage(self) -> int | None:
        """1 or 2; None if the stage is not an L-MTP stage."""
        return next((stage for stage, name in STAGES.items() if self.mtp_type == name), None)

    def __post_init__(self):
        hooks.apply_pending()
        # Upstream then sees an ordinary SFT stage: packing, prediction, chat and Liger apply, and the arguments can be
        # written out and parsed again.
        if self.stage in STAGES.values():
            if self.mtp_type not in (None, self.stage):
                raise LMTPError(f"stage says {self.stage} but mtp_type says {self.mtp_type}: leave one of them out.")
            self.stage, self.mtp_type = "sft", self.stage
        check_values(vars(self))
        self.offsets_given()
        if self.mtp_type == "vanilla":  # the release's word for plain training
            self.mtp_type = None
        if self.mtp_type not in (None, *STAGES.values()):
            raise LMTPError(f"mtp_type is {self.mtp_type!r}, but it has to be one of {', '.join(STAGES.values())}.")
        if self.lmtp_export not in EXPORTS:
            raise LMTPError(f"lmtp_export is {self.lmtp_export!r}, but it has to be one of {', '.join(EXPORTS)}.")
        if self.lmtp_decode is False:  # YAML reads an unquoted off as False
            self.lmtp_decode = "off"
        if self.lmtp_decode not in STRATEGIES:
            raise LMTPError(f"lmtp_decode is {self.lmtp_decode!r}, but it has to be one of {', '.join(STRATEGIES)}.")
        if self.lmtp_stage is not None:
            if self.stage != "sft":
                raise LMTPError(f"mtp_type {self.mtp_type} goes with stage: sft, not with stage: {self.stage}.")
            self.heads_config()  # raises if there are no such heads
        if self.lmtp_stage is not None or self.lmtp_decode in ("backward", "forward") or self.lmtp_export != EXPORTS[0]:
            hooks.require_all()
        super().__post_init__()

    def offsets_given(self) -> tuple[int, ...] | None:
        """Full offsets that `leap_offsets` gives; None if the key is left out."""
        return None if self.leap_offsets is None else geometry.check_offsets(read_offsets(self.leap_offsets))

    def heads_config(self, **base: Any) -> "LMTPConfig":
        """Configuration of fresh heads.

        Args:
            base: Facts about the base model, under the names of `LMTPConfig`.

        Raises:
            LMTPError: The keys contradict each other or describe impossible heads.
        """
        # Not at the top: this module may be imported while transformers is still importing torch.
        from ..config import LMTPConfig

        offsets = geometry.resolve(self.num_heads, self.leap_stride, self.offsets_given())
        shape = {key: value for key in _SHAPE if (value := getattr(self, key)) is not None}
        return LMTPConfig(offsets=offsets, **shape, **base)

    def first_difference(self, config: "LMTPConfig") -> str | None:
        """The first difference between the written keys and trained heads, in words; None if they agree."""
        if self.offsets_given() not in (None, config.offsets):
            return f"leap_offsets {self.leap_offsets}, the heads have {','.join(map(str, config.offsets[1:]))}"
        written = {
            "leap_stride": (self.leap_stride, config.stride),
            "num_heads": (self.num_heads, config.num_heads),
            **{key: (getattr(self, key), getattr(config, key)) for key in _SHAPE},
        }
        for key, (ours, theirs) in written.items():
            if ours is not None and ours != theirs:
                return f"{key} {ours}, the heads have {'no such limit' if theirs is None else theirs}"
        return None
