"""Finished warm-ups among the Board's output directories."""

import os
from pathlib import Path

from ...errors import LMTPError
from ...files import HEADS_FOLDER, WEIGHTS_FILE
from ...modeling.checkpoint import read_config


# Upstream's name for models that are given by their path only. All of them share one directory of runs.
CUSTOM = "Custom"


def holds_only_heads(path: str | os.PathLike) -> bool:
    """Whether `path` is the output of a finished stage 1: heads, and neither a model nor an adapter."""
    has_model = any(Path(path, name).exists() for name in ("config.json", "adapter_config.json"))
    return Path(path, HEADS_FOLDER, WEIGHTS_FILE).is_file() and not has_model


def finished_stage1_runs(model_name: str | None, model_path: str | None) -> list[str]:
    """Output directories of the model's finished stage-1 runs, newest first."""
    if not model_name:
        return []
    from llamafactory.webui.common import get_save_dir

    root = Path(get_save_dir(model_name, "full"))  # the finetuning_type of stage 1
    runs = [path for path in root.iterdir() if holds_only_heads(path)] if root.is_dir() else []
    if model_name == CUSTOM:
        runs = [path for path in runs if _base_model(path) == model_path]
    return [str(path) for path in sorted(runs, key=os.path.getmtime, reverse=True)]


def _base_model(run: Path) -> str | None:
    try:
        return read_config(run / HEADS_FOLDER).base_model
    except LMTPError:
        return None
