"""Decoding options of one `generate` call, passed to `_sample` in a context variable."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from transformers.generation.streamers import BaseStreamer

from ..errors import LMTPError
from ..options import STRATEGIES
from .stats import DecodeStats
from .support import fall_back
from .tree_config import TreeConfig


@dataclass
class DecodeRequest:
    """Options and statistics of one call.

    Attributes:
        strategy: `backward` looks back. `forward` fills the window with plain steps before each draft (the paper's
            F-MTP). `off` is transformers' own `generate`. `auto` means `backward`.
        tree: Draft tree. None uses `model.tree_config()`.
        stats: Statistics, updated in place.
        arrived: Whether the call has reached `_sample`.
    """

    strategy: str = "auto"
    tree: TreeConfig | None = None
    stats: DecodeStats = field(default_factory=DecodeStats)
    arrived: bool = False


_current: ContextVar[DecodeRequest | None] = ContextVar("lmtp_request", default=None)


def current_request() -> DecodeRequest:
    """Return the request of the innermost `generate` call of this thread."""
    return _current.get() or DecodeRequest()


@contextmanager
def requested(request: DecodeRequest, streamer: BaseStreamer | None) -> Iterator[None]:
    """Make `request` the current request inside the context; end `streamer` if an exception is raised.

    Statistics that are used again keep their counts, but not the strategy of the call before.

    Raises:
        LMTPError: The strategy is unknown.
    """
    token = _current.set(request)
    try:
        if request.strategy not in STRATEGIES:
            raise LMTPError(f"lmtp_decode is {request.strategy!r}, but it has to be one of {', '.join(STRATEGIES)}.")
        request.stats.strategy, request.stats.stock_reason = "off", None
        yield
        if not request.arrived and request.strategy != "off":
            fall_back(request.stats, "beam search, assisted and other special generation has no look-back")
    except BaseException:
        if streamer is not None:
            streamer.end()  # otherwise its reader waits forever
        raise
    finally:
        _current.reset(token)
