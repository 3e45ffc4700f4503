"""Where a command writes: checked before a model loads, and failures in one sentence."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LMTPError, first_line
from ..files import check_writable


def check_output_dir(directory: str | Path, option: str = "--output-dir") -> None:
    """Check that files can be written to a directory, which need not exist and is not created.

    Args:
        directory: The directory.
        option: The option that names it.

    Raises:
        LMTPError: They cannot.
    """
    try:
        check_writable(directory)
    except OSError as error:
        raise LMTPError(
            f"{option} {directory} cannot be written ({_reason(error)}): name another directory."
        ) from error


@contextmanager
def writing(directory: str | Path) -> Iterator[None]:
    """Write files inside the context.

    Raises:
        LMTPError: The disk is full or failing, or the files may not be written.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room and run the same command again" if is_full else "name another directory that can be written"
        raise LMTPError(f"The results cannot be written to {directory} ({_reason(error)}): {advice}.") from error


def _reason(error: OSError) -> str:
    return error.strerror or first_line(error)
