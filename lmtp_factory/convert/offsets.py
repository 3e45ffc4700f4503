"""Which token each imported head predicts, where the user or the checkpoint's format says so."""

from collections.abc import Sequence

from .. import geometry
from ..errors import LMTPError


def parse_offsets(text: str) -> tuple[int, ...]:
    """Offsets as they stand on the command line, e.g. `3,5,7`.

    Raises:
        ValueError: anything but whole numbers with commas between.
    """
    return tuple(int(word) for word in text.split(","))


def check_asked(stride: int | None, offsets: Sequence[int] | None) -> None:
    """Refuse a geometry that no heads can have.

    Raises:
        LMTPError: naming the option and what to write instead.
    """
    if stride is not None and stride < 1:
        raise LMTPError(f"--stride is {stride}, but heads leap by 1 token or more: write for instance --stride 2.")
    if offsets is not None and any(near >= far for near, far in zip((1, *offsets), offsets)):
        raise LMTPError(
            f"--offsets is {_written(offsets)}, but the heads' offsets have to rise and to be above 1 (the LM head's own): "
            "write for instance --offsets 3,5,7."
        )


def asked_heads(
    name: str, num_heads: int, adjacent: bool, stride: int | None, offsets: Sequence[int] | None
) -> dict[int, int]:
    """Rising offsets, each with the checkpoint's head (counted from 0) that predicts it.

    Args:
        name: of the checkpoint.
        num_heads: how many heads it has.
        adjacent: they are known to predict 2, 3, 4, ... tokens ahead, so the geometry asked for selects some of them;
            otherwise it says what all of them predict.
        stride, offsets: what the user asked for; at most one is given.

    Raises:
        LMTPError: heads are asked for that the checkpoint does not have, or nothing is known of their leaps.
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
