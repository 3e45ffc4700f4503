"""Offsets of imported heads, from the user's options or the checkpoint's format."""

from collections.abc import Sequence

from .. import geometry
from ..errors import LMTPError


def parse_offsets(text: str) -> tuple[int, ...]:
    """Parse comma-separated offsets from the command line, e.g. `3,5,7`.

    Raises:
        ValueError: The text is not a comma-separated list of integers.
    """
    return tuple(int(word) for word in text.split(","))


def check_asked(stride: int | None, offsets: Sequence[int] | None) -> None:
    """Check the options `--stride` and `--offsets`.

    Raises:
        LMTPError: The stride is below 1, or the offsets do not increase from 2 on.
    """
    if stride is not None and stride < 1:
        raise LMTPError(f"--stride is {stride}, but heads leap by 1 token or more: write for instance --stride 2.")
    if offsets is not None:
        geometry.check_offsets(offsets, "--offsets")


def asked_heads(
    name: str, num_heads: int, adjacent: bool, stride: int | None, offsets: Sequence[int] | None
) -> dict[int, int]:
    """Map increasing offsets to the indices of the checkpoint's heads.

    Args:
        name: Name of the checkpoint.
        num_heads: Number of heads in it.
        adjacent: Whether the heads are known to have offsets 2, 3, 4, ... If so, the user's geometry selects some of
            them. If not, it defines the offsets of all of them.
        stride: The user's stride, or None.
        offsets: The user's offsets, or None. At most one of `stride` and `offsets` is given.

    Raises:
        LMTPError: The checkpoint does not have the requested heads, or their offsets are unknown.
    """
    if adjacent:
        held = {head + 2: head for head in range(num_heads)}
        if stride is not None:
            offsets = [offset for offset in held if (offset - 1) % stride == 0]
            if not offsets:
                raise LMTPError(
                    f"--stride {stride} asks for +{stride + 1}, but {name} ends at +{num_heads + 1}: ask for a shorter one."
                )
        if absent := [offset for offset in offsets or () if offset not in held]:
            raise LMTPError(
                f"--offsets asks for +{absent[0]}, but the heads of {name} predict {_written(held)} tokens ahead: "
                "choose from these."
            )
        return {offset: held[offset] for offset in offsets or held}
    if stride is not None:
        offsets = geometry.offsets(num_heads + 1, stride)[1:]
    if offsets is None:
        raise LMTPError(
            f"{name} does not say how far its heads leap (the release's code overwrites skip_token): write --stride 2 or "
            "--offsets 3,5,7 if you know it, or --text FILE to measure it."
        )
    if len(offsets) != num_heads:
        raise LMTPError(
            f"--offsets {_written(offsets)} is for {len(offsets)} heads, but {name} has {num_heads}: write one for each."
        )
    return {offset: head for head, offset in enumerate(offsets)}


def _written(offsets) -> str:
    return ",".join(map(str, offsets))
