"""Where leap heads are looked for, for training, export and decoding: one place for each order."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .. import geometry
from ..config import LMTPConfig
from ..errors import LMTPError
from ..modeling.checkpoint import base_fingerprint, find_heads, read_config
from . import log


def starting_heads(model_args, finetuning_args, do_train: bool = True) -> Path | None:
    """The ``lmtp/`` folder that a stage starts from, or None for fresh heads.

    An adapter that is tuned further has heads of its own; else ``stage1_pretrained_path`` was written for this; else the
    model directory may have some. Which path stage 1 may name although nothing is there: :func:`check_named_heads`.

    Args:
        do_train: False where the stage only evaluates: then the heads are those that inference would take.

    Raises:
        LMTPError: stage 2 names a ``stage1_pretrained_path`` without heads; an evaluation finds none at all.
    """
    if not do_train:
        heads = locate_exported_heads(model_args, finetuning_args)
        if heads is None:
            raise LMTPError(
                "There are no leap heads to evaluate: name the output of a finished stage in stage1_pretrained_path or "
                "adapter_name_or_path."
            )
        return heads
    if (heads := _first(reversed(model_args.adapter_name_or_path or []))) is not None:
        return heads
    named = finetuning_args.stage1_pretrained_path
    if named is not None:
        found = find_heads(named)
        if found is None and finetuning_args.lmtp_stage == 2:
            raise _without_heads(named)
        if found is not None:
            return found
    return _first([model_args.model_name_or_path])


def check_named_heads(finetuning_args, output_dir: str) -> bool:
    """Whether ``stage1_pretrained_path``, if written for stage 1, has heads by now.

    The release's stage-1 files name their own output there, which is empty before the first run.

    Raises:
        LMTPError: another path without heads is named, which is a slip of the pen.
    """
    named = finetuning_args.stage1_pretrained_path
    if named is None or find_heads(named) is not None:
        return True
    if os.path.realpath(named) != os.path.realpath(output_dir):
        raise _without_heads(named)
    return False


def _without_heads(named: str) -> LMTPError:
    return LMTPError(
        f"stage1_pretrained_path {named} has no lmtp/ folder: name the output_dir of a finished stage 1, or leave the key "
        "out to start from fresh heads."
    )


def farthest_offset(model_args, finetuning_args, do_train: bool = True) -> int:
    """Offset of the stage's last head, whether its heads are fresh or trained."""
    heads = starting_heads(model_args, finetuning_args, do_train)
    config = finetuning_args.heads_config() if heads is None else read_config(heads)
    return geometry.reach(config.offsets)


def config_of_run(heads: Path | None, model_args, finetuning_args) -> LMTPConfig:
    """Configuration of the heads that training starts from; of fresh ones (None) as they will be on this base model."""
    if heads is not None:
        config = read_config(heads)
    else:
        base, options = model_args.model_name_or_path, hub_options(model_args)
        sizes = AutoConfig.from_pretrained(base, **options).get_text_config()
        config = finetuning_args.heads_config(
            hidden_size=sizes.hidden_size,
            vocab_size=sizes.vocab_size,
            tokenizer_fingerprint=base_fingerprint(base, **options),
        )
    if model_args.resize_vocab or model_args.add_tokens or model_args.add_special_tokens:
        config.vocab_size = config.tokenizer_fingerprint = None  # known when the tokens have been added
    return config


def locate_exported_heads(model_args, finetuning_args) -> Path | None:
    """The ``lmtp/`` folder that goes with a model at inference: the last adapter's, the model's, stage 1's."""
    last_adapter = (model_args.adapter_name_or_path or [])[-1:]
    return _first([*last_adapter, model_args.model_name_or_path, finetuning_args.stage1_pretrained_path])


def no_decoding(model_args, finetuning_args) -> str | None:
    """What keeps upstream's own generation from using heads, as YAML spells it; None where nothing does."""
    keys = {
        f"infer_backend: {getattr(model_args.infer_backend, 'value', model_args.infer_backend)}": (
            model_args.infer_backend != "huggingface"
        ),
        f"stage: {finetuning_args.stage}": finetuning_args.stage != "sft",
        "use_unsloth": model_args.use_unsloth,
        "use_kt": model_args.use_kt,
        "mixture_of_depths": model_args.mixture_of_depths is not None,
    }
    return next((key for key, holds in keys.items() if holds), None)


def decoding_heads(model_args, finetuning_args) -> Path | None:
    """The ``lmtp/`` folder that ``generate`` decodes with; None where there is none or they are not to be used."""
    decode = finetuning_args.lmtp_decode
    if decode == "off" or no_decoding(model_args, finetuning_args) is not None:
        return None
    hub_options(model_args)  # ids of other hubs become directories
    try:
        return locate_exported_heads(model_args, finetuning_args)
    except LMTPError as error:
        if decode != "auto":
            raise
        log.warning(f"{error} Decoding without leap heads.")
        return None


def hub_options(model_args) -> dict[str, Any]:
    """What upstream passes to ``from_pretrained`` for this model, after resolving ids of other hubs than Hugging Face's."""
    from llamafactory.extras.misc import try_download_model_from_other_hub

    model_args.model_name_or_path = try_download_model_from_other_hub(model_args)
    return {
        "trust_remote_code": model_args.trust_remote_code,
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.hf_hub_token,
    }


def _first(paths: Iterable[str | None]) -> Path | None:
    return next((found for path in paths if path is not None and (found := find_heads(path))), None)
