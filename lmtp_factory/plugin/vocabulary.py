"""Heads and the vocabulary of a run, which `add_tokens`, `add_special_tokens` and `resize_vocab` extend."""

import copy

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LMTPError
from ..modeling.checkpoint import check_base, check_base_files, tokenizer_fingerprint, validate_checkpoint
from ..modeling.heads import LeapHeads
from ..modeling.vocabulary import Vocabulary, grow_heads, new_tokens
from .heads_source import BaseModel, HeadsSource


# Upstream pads embeddings that it resizes to a multiple of this.
_MULTIPLE = 64


def check_heads(source: HeadsSource, model_args, data_args, may_grow: bool = False) -> None:
    """Check that trained heads are complete and belong to this run's model and vocabulary.

    Args:
        source: Where the heads come from; not fresh ones.
        may_grow: Whether heads of the model as it is on disk get the run's new tokens.

    Raises:
        LMTPError: The heads are damaged, belong to another model, or know tokens that this run does not add.
    """
    heads, base, options = source.folder, source.base.path, source.base.options
    config = validate_checkpoint(heads)
    run = _with_new_tokens(source.base, model_args, data_args)
    if run is not None:
        files = Vocabulary.of_files(base, **options)
        if run.fits(config) or ((may_grow or files.size == run.size) and files.fits(config)):
            return
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


def fit_heads(
    heads: LeapHeads, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: BaseModel, resizes: bool
) -> None:
    """Check loaded heads against the loaded model, and grow them by the model's new tokens.

    Args:
        base: Files of the model.
        resizes: Whether the run has added tokens (`resize_vocab`).

    Raises:
        LMTPError: The heads belong to another model.
    """
    if not resizes:
        check_base(heads.config, model.config, base.fingerprint())
        return
    run = Vocabulary(model.config.get_text_config().vocab_size, tokenizer_fingerprint(tokenizer))
    if not run.fits(heads.config):
        check_base_files(heads.config, base.path, **base.options)
        grow_heads(heads, model)


def saved_fingerprint(
    tokenizer: PreTrainedTokenizerBase, base: BaseModel, resizes: bool, finetuning_args
) -> str | None:
    """Fingerprint of the tokenizer that belongs to the output of a stage.

    Full and freeze tuning of stage 2 write a model with the run's tokenizer, to which the template may have added tokens.
    Stage 1 and adapters belong to the model on disk, unless an adapter brings embeddings of new tokens (`resizes`).
    """
    writes_model = finetuning_args.lmtp_stage == 2 and finetuning_args.finetuning_type != "lora"
    return tokenizer_fingerprint(tokenizer) if writes_model or resizes else base.fingerprint()


def _with_new_tokens(base: BaseModel, model_args, data_args) -> Vocabulary | None:
    """The run's vocabulary after upstream has added tokens; None if no key adds tokens."""
    if not (model_args.resize_vocab or model_args.add_tokens or model_args.add_special_tokens):
        return None
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer

    model_args = copy.copy(model_args)  # upstream writes resize_vocab into its argument
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    if not model_args.resize_vocab:  # the model has these tokens already
        return None
    get_template_and_fix_tokenizer(tokenizer, data_args)
    size = base.config().get_text_config().vocab_size
    if len(tokenizer) > size:
        size = -(-len(tokenizer) // _MULTIPLE) * _MULTIPLE
    return Vocabulary(size, tokenizer_fingerprint(tokenizer))


def _listed(tokens: list[str], most: int = 5) -> str:
    more = f" and {len(tokens) - most} more" if len(tokens) > most else ""
    return f"{len(tokens)} new token{'' if len(tokens) == 1 else 's'} ({', '.join(tokens[:most])}{more})"
