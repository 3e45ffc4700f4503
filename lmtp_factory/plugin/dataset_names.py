"""Dataset names that work without `dataset_dir`: the demo's rows and those of the authors' release."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .. import resources
from ..errors import LMTPError


# LLaMA-Factory's description of a dataset.
DatasetAttr = TypeVar("DatasetAttr")

# Environment variable that names a directory of downloaded release files.
DATA_DIR_VARIABLE = "LMTP_DATA_DIR"

RELEASE_REPOSITORY = "xiao-hao/self-distillation-LLMs"
_INFO = "dataset_info.json"


def dataset_info() -> dict[str, dict[str, Any]]:
    """Name to LLaMA-Factory's entry of every dataset that this package knows; `file_name` is relative."""
    return json.loads((resources.folder("datasets") / _INFO).read_text(encoding="utf-8"))


def find_datasets(
    names: Sequence[str] | None,
    dataset_dir: str | dict[str, Any],
    upstream_get_dataset_list: Callable[[Sequence[str] | None, str | dict[str, Any]], list[DatasetAttr]],
) -> list[DatasetAttr]:
    """Call LLaMA-Factory's `get_dataset_list` with this package's names known everywhere.

    A name in the user's own dataset_info.json has priority. The order is kept. With `dataset_dir: ONLINE` every name is a
    hub dataset, as upstream reads it.

    Args:
        names: Dataset names.
        dataset_dir: A directory, `ONLINE`, `REMOTE:<hub id>`, or the content of a dataset_info.json.
        upstream_get_dataset_list: LLaMA-Factory's function.

    Raises:
        LMTPError: The package knows a name, but its file has not been downloaded.
        ValueError: Nobody knows a name (upstream's own error).
    """
    known = dataset_info()
    if not names or dataset_dir == "ONLINE" or not any(name in known for name in names):
        return upstream_get_dataset_list(names, dataset_dir)

    found: list[DatasetAttr] = []
    for name in names:
        if name in known and not _user_has(name, dataset_dir, upstream_get_dataset_list):
            entry = known[name] | {"file_name": str(_locate(name, known[name]["file_name"], dataset_dir))}
            found += upstream_get_dataset_list([name], {name: entry})
        else:
            found += upstream_get_dataset_list([name], dataset_dir)
    return found


def _user_has(name: str, dataset_dir: str | dict[str, Any], upstream_get_dataset_list: Callable) -> bool:
    if isinstance(dataset_dir, dict):
        return name in dataset_dir
    if not dataset_dir.startswith("REMOTE:") and not os.path.exists(os.path.join(dataset_dir, _INFO)):
        return False
    try:
        upstream_get_dataset_list([name], dataset_dir)
    except ValueError as error:
        if "Undefined dataset" in str(error):
            return False
        raise
    return True


def _locate(name: str, file_name: str, dataset_dir: str | dict[str, Any]) -> Path:
    directories = [resources.folder("datasets")]
    if variable := os.environ.get(DATA_DIR_VARIABLE):
        directories.insert(0, Path(variable))
    if isinstance(dataset_dir, str) and not dataset_dir.startswith("REMOTE:"):
        directories.insert(0, Path(dataset_dir))
    for directory in directories:
        if (directory / file_name).is_file():
            return (directory / file_name).resolve()
    raise LMTPError(
        f"Dataset {name} is known, but its file is not here: get it with `hf download {RELEASE_REPOSITORY} "
        f"{file_name} --repo-type dataset --local-dir DIR` and set `dataset_dir: DIR` (or {DATA_DIR_VARIABLE}=DIR), "
        "or make rows of your own with `lmtp-cli distill MODEL --name NAME`."
    )
