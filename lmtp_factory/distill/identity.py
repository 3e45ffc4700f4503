"""The settings that determine the rows of a journal: a run is resumed only if all of them are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LMTPError, first_line
from .engine import Sampling


if TYPE_CHECKING:
    from .pipeline import Settings


def run_identity(settings: Settings, sampling: Sampling, weights: dict[str, str]) -> dict[str, Any]:
    """Return the settings that determine the rows of a journal.

    Server addresses and batch size are not included, because they may change when a run is resumed. What the engine knows
    only when it runs follows later (`Engine.facts`).

    Args:
        settings: Settings of the run.
        sampling: Sampling parameters of the rows.
        weights: See `weight_facts`.
    """
    model = settings.model
    return {
        "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "engine": settings.engine,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "stop_ids": list(sampling.stop_ids),
        **weights,
    }


def weight_facts(settings: Settings) -> dict[str, str]:
    """Return facts that change if the model is trained again into the same directory; see `modeling.model_facts`.

    Nothing is loaded, so a finished run stays quick. A server's weights are not known here.

    Raises:
        LMTPError: There is no such model.
    """
    if settings.engine == "server":
        return {}
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    from ..modeling.model_facts import model_facts

    model = settings.model
    try:
        adapter = find_adapter_config_file(model)
        base = _base_of(model, adapter)
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        facts = {
            name: fact for path in dict.fromkeys((base, model)) for name, fact in model_facts(path, config).items()
        }
        if base != model and not Path(model).is_dir():
            facts["adapter commit"] = Path(adapter).parent.name  # of the hub's snapshot
        return facts
    except (OSError, ValueError, KeyError) as error:
        raise LMTPError(
            f"No causal language model can be loaded from {model} ({first_line(error)}): name a Hugging Face model "
            "directory or hub id."
        ) from error


def _base_of(model: str, adapter: str | None) -> str:
    """Return the model that transformers loads: that of the adapter, if a path or hub id holds an adapter alone."""
    if adapter is None or Path(model, "config.json").is_file():
        return model
    return json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
