"""Where a command writes: checked before a model loads, and failures in one sentence."""

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
        LMTPError: The disk is full or failing.
    """
    try:
        yield
    except OSError as error:
        raise LMTPError(
            f"The results cannot be written to {directory} ({_reason(error)}): make room and run the same command again."
        ) from error


def _reason(error: OSError) -> str:
    return error.strerror or first_line(error)
