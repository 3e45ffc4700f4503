"""Template and dataset names, registered with ``llamafactory.data``."""

import functools
from types import ModuleType

from ..data.registry import find_datasets
from . import hooks


def extend_template(template: ModuleType) -> None:
    """Register the template of self-distilled data."""
    from ..data.template import register_self_distilled_template

    hooks.expect(template, "register_template", "name", "template_class")
    register_self_distilled_template()


def extend_parser(parser: ModuleType) -> None:
    """Let the project's dataset names resolve whatever ``dataset_dir`` is."""
    upstream = hooks.expect(parser, "get_dataset_list", "dataset_names", "dataset_dir")

    @functools.wraps(upstream)
    def get_dataset_list(dataset_names, dataset_dir):
        return find_datasets(dataset_names, dataset_dir, upstream)

    parser.get_dataset_list = get_dataset_list
