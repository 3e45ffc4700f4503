"""Which head predicts which token: the geometry of leap heads, written once (L-MTP, arXiv 2505.17505, section 3).

Head `i` (0 is the LM head) reads the hidden state at position `s` and predicts token `s + offsets[i]`, where
`1 = offsets[0] < offsets[1] < ...`. A constant stride `k` is the special case `offsets[i] = k * i + 1`.

Look-back decoding drafts token `t + d` at depth `d`, where `t` is the last position with a hidden state. The draft
comes from the first head whose offset is at least `d`, applied to the state `back = offset - d` positions before `t`:

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

from collections.abc import Iterable, Sequence
from operator import index

from .errors import LMTPError


DEFAULT_NUM_HEADS = 3
DEFAULT_STRIDE = 2


def whole(name: str, value: object) -> int:
    """Return `value` as an `int`; the error message calls it `name`.

    Raises:
        LMTPError: `value` is not an integer. Strings, floats and booleans are refused too.
    """
    if not _is_whole(value):
        raise LMTPError(f"{name} is {value!r}, but it has to be a whole number: write for instance {name}: 2.")
    return index(value)


def offsets(n: int, stride: int) -> tuple[int, ...]:
    """Return the offsets of `n` heads with a constant stride; `n` counts the LM head.

    >>> offsets(4, 2)
    (1, 3, 5, 7)

    Raises:
        LMTPError: `n` is below 2 or `stride` is below 1.
    """
    if n < 2:
        raise LMTPError(f"num_heads is {n - 1}, but L-MTP needs at least one extra head: write num_heads: 1 or more.")
    if stride < 1:
        raise LMTPError(
            f"leap_stride is {stride}, but it has to be 1 (ordinary multi-token prediction) or more: write leap_stride: 2."
        )
    return tuple(stride * i + 1 for i in range(n))


def check_offsets(extra: Sequence[int], name: str = "leap_offsets") -> tuple[int, ...]:
    """Return the offsets of all heads, with the LM head's 1 first, from the offsets of the extra heads.

    >>> check_offsets([2, 3, 6])
    (1, 2, 3, 6)

    Args:
        extra: Offsets of the extra heads.
        name: What the error message calls them.

    Raises:
        LMTPError: `extra` is empty, does not increase, or contains an offset of 1 or less.
    """
    full = (1, *extra)
    if len(full) < 2 or any(near >= far for near, far in zip(full, full[1:])):
        raise LMTPError(
            f"{name} is {','.join(map(str, extra)) or 'empty'}, but the extra heads' offsets have to rise and to be above 1 "
            "(the LM head's own): write for instance 2,3,6."
        )
    return full


def stride(offsets: Sequence[int]) -> int | None:
    """Return the constant stride between neighbouring heads, or None if the offsets are not evenly spaced."""
    leaps = {far - near for near, far in zip(offsets, offsets[1:])}
    return leaps.pop() if len(leaps) == 1 else None


def lookback(depth: int, offsets: Sequence[int]) -> tuple[int, int]:
    """Return `(head, back)` for the draft of token `t + depth`: `head` reads the state at position `t - back`.

    Raises:
        ValueError: `depth` is outside `1 .. reach(offsets)`.
    """
    if not 1 <= depth <= reach(offsets):
        raise ValueError(
            f"The depth is {depth}, but it is outside 1..{reach(offsets)}: draft no deeper than the last head."
        )
    # Not by bisection, which torch.compile cannot trace.
    head = next(number for number, offset in enumerate(offsets) if offset >= depth)
    return head, offsets[head] - depth


def lookback_pairs(offsets: Sequence[int], levels: int | None = None) -> list[tuple[int, int]]:
    """Return `lookback` of levels 1 to `levels`: level `l` of a draft, after the root, has depth `l + 1`.

    >>> lookback_pairs((1, 3, 5))
    [(1, 1), (1, 0), (2, 1), (2, 0)]

    Args:
        offsets: Offsets of all heads, with the LM head's 1 first.
        levels: Number of levels. Default: as many as the heads can draft.

    Raises:
        ValueError: `levels` is beyond the reach.
    """
    levels = reach(offsets) - 1 if levels is None else levels
    return [lookback(level + 1, offsets) for level in range(1, levels + 1)]


def window(offsets: Sequence[int]) -> int:
    """Return the number of latest hidden states that look-back decoding reads: the largest gap between offsets."""
    return max(far - near for near, far in zip(offsets, offsets[1:]))


def reach(offsets: Sequence[int]) -> int:
    """Return the largest depth that the heads can draft."""
    return offsets[-1]


def resolve(
    num_heads: int | None = None, leap_stride: int | None = None, leap_offsets: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the offsets of all heads, with the LM head's 1 first, from the user's or a saved configuration's values.

    Args:
        num_heads: Number of extra heads. Default `DEFAULT_NUM_HEADS`.
        leap_stride: Constant stride. Default `DEFAULT_STRIDE`.
        leap_offsets: Offsets of the extra heads, with or without the LM head's leading 1.

    Raises:
        LMTPError: The geometry is impossible or not made of integers, or `leap_offsets` contradicts `num_heads` or
            `leap_stride`.
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
