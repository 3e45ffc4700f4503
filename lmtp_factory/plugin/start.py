"""Where leap heads are looked for, for training and for export: one place for each order."""

from collections.abc import Iterable
from pathlib import Path

from ..errors import LMTPError
from ..modeling.checkpoint import find_heads


def starting_heads(model_args, finetuning_args) -> Path | None:
    """The ``lmtp/`` folder that a stage starts from, or None for fresh heads.

    ``stage1_pretrained_path`` comes first because it was written for this; then the adapter or the model that is tuned
    further. The release's stage-1 files name their own output there, so in stage 1 it may still be empty.

    Raises:
        LMTPError: stage 2 names a ``stage1_pretrained_path`` without heads.
    """
    named = finetuning_args.stage1_pretrained_path
    if named is not None:
        found = find_heads(named)
        if found is None and finetuning_args.lmtp_stage == 2:
            raise LMTPError(
                f"stage1_pretrained_path {named} has no lmtp/ folder: name the output_dir of a finished stage 1, or leave "
                "the key out to start from fresh heads."
            )
        if found is not None:
            return found
    return _first([*reversed(model_args.adapter_name_or_path or []), model_args.model_name_or_path])


def locate_exported_heads(model_args, finetuning_args) -> Path | None:
    """The ``lmtp/`` folder that goes with a model at inference: the last adapter's, the model's, stage 1's."""
    last_adapter = (model_args.adapter_name_or_path or [])[-1:]
    return _first([*last_adapter, model_args.model_name_or_path, finetuning_args.stage1_pretrained_path])


def _first(paths: Iterable[str | None]) -> Path | None:
    return next((found for path in paths if path is not None and (found := find_heads(path))), None)
