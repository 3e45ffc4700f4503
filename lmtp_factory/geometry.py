"""Which head predicts which token: the geometry of leap heads, written once (L-MTP, arXiv 2505.17505, section 3).

Head ``i`` (0 is the LM head) reads the hidden state at position ``s`` and predicts token ``s + offsets[i]``, where
``1 = offsets[0] < offsets[1] < ...``. A constant stride ``k`` is the special case ``offsets[i] = k * i + 1``.

Looking backward, the draft of depth ``d`` (token ``t + d``; ``t`` is the last position with a hidden state) comes from
the first head that reaches so far, on the state ``back`` positions before ``t``:

====== =========================== ===========================
depth  stride 2: head @ state      stride 3: head @ state
====== =========================== ===========================
1      0 @ t                       0 @ t
2      1 @ t-1                     1 @ t-2
3      1 @ t                       1 @ t-1
4      2 @ t-1                     1 @ t
5      2 @ t                       2 @ t-2
====== =========================== ===========================
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from operator import index

from .errors import LMTPError


DEFAULT_NUM_HEADS = 3
DEFAULT_STRIDE = 2


def whole(name: str, value: object) -> int:
    """``value``, refused under ``name`` unless it is a whole number.

    Raises:
        LMTPError: it is text, a fraction, a truth value or anything else.
    """
    if not _is_whole(value):
        raise LMTPError(f"{name} is {value!r}, but it has to be a whole number: write for instance {name}: 2.")
    return index(value)


def offsets(n: int, stride: int) -> tuple[int, ...]:
    """Offsets of ``n`` heads, the LM head counted, that leap by ``stride`` tokens.

    >>> offsets(4, 2)
    (1, 3, 5, 7)

    Raises:
        LMTPError: ``n`` below 2 or ``stride`` below 1.
    """
    if n < 2:
        raise LMTPError(f"num_heads is {n - 1}, but L-MTP needs at least one extra head: write num_heads: 1 or more.")
    if stride < 1:
        raise LMTPError(
            f"leap_stride is {stride}, but it has to be 1 (ordinary multi-token prediction) or more: write leap_stride: 2."
        )
    return tuple(stride * i + 1 for i in range(n))


def check_offsets(extra: Sequence[int]) -> tuple[int, ...]:
    """Full offsets, the LM head's 1 first, from those of the extra heads.

    >>> check_offsets([2, 3, 6])
    (1, 2, 3, 6)

    Raises:
        LMTPError: ``extra`` is empty, does not rise, or holds an offset of 1 or less.
    """
    full = (1, *extra)
    if len(full) < 2 or any(near >= far for near, far in zip(full, full[1:])):
        raise LMTPError(
            f"leap_offsets is {','.join(map(str, extra)) or 'empty'}, but the extra heads' offsets have to rise and to be "
            "above 1 (the LM head's own): write for instance leap_offsets: 2,3,6."
        )
    return full


def stride(offsets: Sequence[int]) -> int | None:
    """The constant leap between neighbouring heads, or None where the leaps differ."""
    leaps = {far - near for near, far in zip(offsets, offsets[1:])}
    return leaps.pop() if len(leaps) == 1 else None


def lookback(depth: int, offsets: Sequence[int]) -> tuple[int, int]:
    """``(head, back)``: the head that drafts token ``t + depth`` and how many states before ``t`` it reads.

    Raises:
        ValueError: ``depth`` lies outside ``1 .. reach(offsets)``.
    """
    if not 1 <= depth <= reach(offsets):
        raise ValueError(f"depth {depth} lies outside 1..{reach(offsets)}")
    head = bisect_left(offsets, depth)
    return head, offsets[head] - depth


def window(offsets: Sequence[int]) -> int:
    """How many of the last hidden states looking backward needs: the largest leap."""
    return max(far - near for near, far in zip(offsets, offsets[1:]))


def reach(offsets: Sequence[int]) -> int:
    """The farthest depth that the heads draft."""
    return offsets[-1]


def resolve(
    num_heads: int | None = None, leap_stride: int | None = None, leap_offsets: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Full offsets, the LM head's 1 first, from whichever way the geometry was written.

    ``leap_offsets`` may carry the LM head's leading 1 (as in a saved config) or leave it out (as users write it).

    Raises:
        LMTPError: the geometry is impossible or not of whole numbers, or ``leap_offsets`` contradicts ``num_heads`` or
            ``leap_stride``.
    """
    num_heads = num_heads if num_heads is None else whole("num_heads", num_heads)
    leap_stride = leap_stride if leap_stride is None else whole("leap_stride", leap_stride)
    if leap_offsets is None:
        extra_heads = DEFAULT_NUM_HEADS if num_heads is None else num_heads
        return offsets(extra_heads + 1, DEFAULT_STRIDE if leap_stride is None else leap_stride)
    if isinstance(leap_offsets, str) or not isinstance(leap_offsets, Iterable) or not all(map(_is_whole, leap_offsets)):
        raise LMTPError(
            f"leap_offsets is {leap_offsets!r}, but it has to be a list of whole numbers such as [2, 3, 6]."
        )
    leap_offsets = tuple(map(index, leap_offsets))
    extra = leap_offsets[1:] if leap_offsets[:1] == (1,) else leap_offsets
    full = check_offsets(extra)
    written = ",".join(map(str, extra))
    if num_heads is not None and num_heads != len(extra):
        raise LMTPError(
            f"leap_offsets {written} names {len(extra)} heads but num_heads says {num_heads}: leave one of them out."
        )
    if leap_stride is not None and leap_stride != stride(full):
        raise LMTPError(f"leap_offsets {written} does not leap by leap_stride {leap_stride}: leave one of them out.")
    return full


def _is_whole(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
