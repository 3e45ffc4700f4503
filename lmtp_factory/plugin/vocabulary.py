"""Heads and the vocabulary of a run: the model's own, or with `add_tokens`, `add_special_tokens`, `resize_vocab` more."""

import copy
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config import LMTPConfig
from ..errors import LMTPError
from ..modeling.checkpoint import (
    base_fingerprint,
    check_base,
    check_base_files,
    tokenizer_fingerprint,
    validate_checkpoint,
)
from ..modeling.heads import LeapHeads
from ..modeling.vocabulary import Vocabulary, grow_heads, new_tokens
from .start import hub_options


# Upstream pads embeddings that it resizes to a multiple of this.
_MULTIPLE = 64


def check_heads(heads: Path, model_args, data_args, may_grow: bool = False) -> LMTPConfig:
    """The configuration of an `lmtp/` folder, if its heads are whole and this run's model's.

    Args:
        may_grow: whether heads of the model as it is on disk get the run's new tokens.

    Raises:
        LMTPError: damaged heads, another model's, or heads that know tokens which this run does not add.
    """
    config, options, base = validate_checkpoint(heads), hub_options(model_args), model_args.model_name_or_path
    run = _with_new_tokens(model_args, data_args)
    if run is not None:
        files = Vocabulary.of_files(base, **options)
        if run.fits(config) or ((may_grow or files.size == run.size) and files.fits(config)):
            return config
    try:
        check_base_files(config, base, **options)
    except LMTPError:
        tokens = new_tokens(heads.parent, config, base, **options)
        if not tokens:
            raise
        raise LMTPError(
            f"The leap heads in {heads} were trained with {_listed(tokens)}, which {base} lacks: write add_tokens, "
            "add_special_tokens, resize_vocab and template as in that training."
        ) from None
    if run is not None:
        raise LMTPError(
            f"The leap heads in {heads} know nothing of the tokens that add_tokens, add_special_tokens or resize_vocab add: "
            "leave these keys out, or train stage 2 with them."
        )
    return config


def fit_heads(heads: LeapHeads, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model_args) -> None:
    """Check loaded heads against the loaded model, and grow them where it has new tokens.

    Raises:
        LMTPError: heads of another model.
    """
    options, files = hub_options(model_args), model_args.model_name_or_path
    if not model_args.resize_vocab:
        check_base(heads.config, base.config, base_fingerprint(files, **options))
        return
    run = Vocabulary(base.config.get_text_config().vocab_size, tokenizer_fingerprint(tokenizer))
    if not run.fits(heads.config):
        check_base_files(heads.config, files, **options)
        grow_heads(heads, base)


def saved_fingerprint(tokenizer: PreTrainedTokenizerBase, model_args, finetuning_args) -> str | None:
    """Of the tokenizer that belongs to what a stage writes.

    Full and freeze tuning of stage 2 write a model with the run's tokenizer, to which the template may have added tokens
    too. Stage 1 and adapters belong to the model on disk, unless an adapter brings embeddings of new tokens.
    """
    writes_model = finetuning_args.lmtp_stage == 2 and finetuning_args.finetuning_type != "lora"
    if writes_model or model_args.resize_vocab:
        return tokenizer_fingerprint(tokenizer)
    return base_fingerprint(model_args.model_name_or_path, **hub_options(model_args))


def _with_new_tokens(model_args, data_args) -> Vocabulary | None:
    """The run's vocabulary once upstream has added tokens; None where nothing was written that adds any."""
    if not (model_args.resize_vocab or model_args.add_tokens or model_args.add_special_tokens):
        return None
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer

    model_args = copy.copy(model_args)  # upstream writes resize_vocab into it
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    if not model_args.resize_vocab:  # the model knows them already
        return None
    get_template_and_fix_tokenizer(tokenizer, data_args)
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **hub_options(model_args))
    size = config.get_text_config().vocab_size
    if len(tokenizer) > size:
        size = -(-len(tokenizer) // _MULTIPLE) * _MULTIPLE
    return Vocabulary(size, tokenizer_fingerprint(tokenizer))


def _listed(tokens: list[str], most: int = 5) -> str:
    more = f" and {len(tokens) - most} more" if len(tokens) > most else ""
    return f"{len(tokens)} new token{'' if len(tokens) == 1 else 's'} ({', '.join(tokens[:most])}{more})"
