"""What one call of `generate` asks of the heads, carried to `_sample`, which takes no such argument."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from transformers.generation.streamers import BaseStreamer

from ..errors import LMTPError
from ..options import STRATEGIES
from .stats import DecodeStats
from .support import leave_to_stock
from .tree_config import TreeConfig


@dataclass
class DecodeRequest:
    """How to decode.

    Attributes:
        strategy: `backward` looks back, `forward` fills the window with plain steps first (the paper's F-MTP), `off`
            is stock; `auto` is `backward`.
        tree: to draft with; None takes the model's own, `lmtp/tree.json` or the device's default.
        stats: to add to.
        arrived: whether the call came to `_sample`.
    """

    strategy: str = "auto"
    tree: TreeConfig | None = None
    stats: DecodeStats = field(default_factory=DecodeStats)
    arrived: bool = False


_current: ContextVar[DecodeRequest | None] = ContextVar("lmtp_request", default=None)


def current_request() -> DecodeRequest:
    """The request of the innermost `generate` of this thread."""
    return _current.get() or DecodeRequest()


@contextmanager
def requested(request: DecodeRequest, streamer: BaseStreamer | None) -> Iterator[None]:
    """`_sample` inside this context (and thread) sees `request`; an error still ends the stream.

    Raises:
        LMTPError: an unknown strategy.
    """
    token = _current.set(request)
    try:
        if request.strategy not in STRATEGIES:
            raise LMTPError(f"lmtp_decode is {request.strategy!r}, but it has to be one of {', '.join(STRATEGIES)}.")
        yield
        if not request.arrived and request.strategy != "off":
            leave_to_stock(request.stats, "beam search, assisted and other special generation has no look-back")
    except BaseException:
        if streamer is not None:
            streamer.end()  # whoever reads it would wait for ever
        raise
    finally:
        _current.reset(token)
