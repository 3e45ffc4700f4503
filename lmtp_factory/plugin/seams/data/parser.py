"""Makes the package's dataset names known, whatever `dataset_dir` is."""

import functools
from types import ModuleType

from ... import hooks
from ...dataset_names import find_datasets


def extend(parser: ModuleType) -> None:
    """Wrap `get_dataset_list`."""
    upstream = hooks.expect(parser, "get_dataset_list", "dataset_names", "dataset_dir")

    @functools.wraps(upstream)
    def get_dataset_list(dataset_names, dataset_dir):
        return find_datasets(dataset_names, dataset_dir, upstream)

    parser.get_dataset_list = get_dataset_list
