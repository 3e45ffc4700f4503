"""The directory that a command writes heads to."""

import os
from pathlib import Path

from ..errors import LMTPError
from ..files import CONFIG_FILE, HEADS_FOLDER
from .output import check_output_dir


def holds_model(folder: Path) -> bool:
    """Return whether a directory holds a model or an adapter, which `load_model` would load with heads in there."""
    return any((folder / name).exists() for name in (CONFIG_FILE, "adapter_config.json"))


def check_output(output: Path, base: str | None = None) -> None:
    """Check that a directory for heads can be written and has no heads and no model other than `base`.

    Args:
        output: The directory. It need not exist.
        base: Directory or hub id of the model that may be there; None for no model.

    Raises:
        LMTPError: The output cannot be used.
    """
    if output.exists() and not output.is_dir():
        raise LMTPError(f"--output {output} is a file: name a directory.")
    if (output / HEADS_FOLDER).exists():
        raise LMTPError(f"{output} has an {HEADS_FOLDER}/ already: name another --output or move that folder away.")
    is_base = base is not None and output.is_dir() and os.path.isdir(base) and output.samefile(base)
    if not is_base and holds_model(output):
        what = "a model" if base is None else f"a model that is not the heads' base {base}"
        raise LMTPError(f"{output} holds {what}: name another --output.")
    check_output_dir(output, "--output")
