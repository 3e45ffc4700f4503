"""Adds the L-MTP keys to the arguments of YAML files, command line and web UI."""

from dataclasses import field, fields, make_dataclass
from types import ModuleType
from typing import Literal, get_args, get_type_hints

from ... import hooks
from ...arguments import LMTPArguments
from ...stages import STAGES


def extend(module: ModuleType) -> None:
    """Replace `FinetuningArguments` by a subclass with the L-MTP keys, under the same name (it gets pickled)."""
    upstream = hooks.expect(module, "FinetuningArguments")
    inherited = next(f for f in fields(upstream) if f.name == "stage")
    stage = Literal[(*get_args(get_type_hints(upstream)["stage"]), *STAGES.values())]
    redeclared = field(default=inherited.default, metadata=dict(inherited.metadata))
    module.FinetuningArguments = make_dataclass(
        upstream.__name__,
        [("stage", stage, redeclared)],
        bases=(LMTPArguments, upstream),
        namespace={"__module__": upstream.__module__, "__doc__": upstream.__doc__},
    )
