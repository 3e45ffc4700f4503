"""Tokens per second and peak memory of the training stages, as `stage_throughput.py` measures them."""

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial

from stage_arms import ARMS, Setting
from stage_throughput import compare

from gpu_parts.settings import Settings


ATTENTION = {"sdpa": None, "flash_attention_2": "flash_attn"}  # and the package that it needs


def parts(settings: Settings) -> dict[str, Callable[[], dict]]:
    """Return a part for each attention implementation and number of documents a step."""
    batches = (2,) if settings.toy else (8, 32)
    return {f"{name}-{batch}": partial(results, settings, name, batch) for name in ATTENTION for batch in batches}


def results(settings: Settings, attention: str, batch: int) -> dict:
    """Return the medians of every arm, or why the part cannot run."""
    package = ATTENTION[attention]
    if package and importlib.util.find_spec(package) is None:
        return {"open": f"needs the package {package}"}
    tuning = "lora" if importlib.util.find_spec("peft") else "full"
    setting = Setting(
        model=settings.model, batch=batch, dtype="fp32" if settings.device.type == "cpu" else "bf16",
        device=settings.device.type, heads=3, kind="own", checkpointing=False, draft_vocab_size=64 if settings.toy else 8192,
        tuning=tuning, attention=attention,
    )  # fmt: skip
    arms = ["stage 1", "stage 1, cached", "stage 2"] if settings.toy else list(ARMS)
    options = argparse.Namespace(
        arms=arms, rounds=1, steps=1 if settings.toy else 10, rows=str(settings.rows),
        cutoff=32 if settings.toy else 1024,
    )  # fmt: skip
    rows = compare(setting, options)
    for row in rows.values():
        row.pop("rounds")
    return {"tuning of stage 2": tuning, "documents a step": batch, "attention": attention, "arms": rows}
