"""Runs the two stages in upstream's SFT workflow, with parts of the plugin in the place of upstream's."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import torch

from .....errors import LMTPError
from .....modeling.losses.targets import count_targets
from .... import hooks
from ....inference import with_heads


if TYPE_CHECKING:
    from ....training.hidden_cache import HiddenCache


def extend(workflow: ModuleType) -> None:
    """Wrap `run_sft`: during an L-MTP stage the workflow's parts are those of `_Parts`."""
    upstream = hooks.expect(workflow, "run_sft", "model_args", "data_args", "training_args", "finetuning_args")
    for name in (
        "CustomSeq2SeqTrainer",
        "SFTDataCollatorWith4DAttentionMask",
        "get_dataset",
        "load_model",
        "plot_loss",
    ):
        hooks.expect(workflow, name)

    @functools.wraps(upstream)
    def run_sft(model_args, data_args, training_args, finetuning_args, *args, **kwargs):
        if finetuning_args.lmtp_stage is not None:
            parts = _Parts(workflow, model_args, data_args, training_args, finetuning_args).by_name()
        elif training_args.predict_with_generate and not training_args.do_train:
            parts = {"load_model": with_heads(workflow.load_model)}
        else:
            parts = {}
        with hooks.replaced(workflow, **parts):
            return upstream(model_args, data_args, training_args, finetuning_args, *args, **kwargs)

    workflow.run_sft = run_sft


class _Parts:
    """Replacements for parts of upstream's workflow during an L-MTP stage. Each wraps the original."""

    def __init__(self, workflow: ModuleType, model_args, data_args, training_args, finetuning_args):
        self.upstream = SimpleNamespace(**vars(workflow))
        self.model_args, self.data_args = model_args, data_args
        self.training_args, self.finetuning_args = training_args, finetuning_args
        self.cache: HiddenCache | None = None  # opened with the training set, read by the collator

    def by_name(self) -> dict[str, Callable]:
        """Name of a part in upstream's workflow to its replacement."""
        from ....training.trainer import LeapTrainer

        return {
            "CustomSeq2SeqTrainer": LeapTrainer,
            "SFTDataCollatorWith4DAttentionMask": self.collator,
            "get_dataset": self.get_dataset,
            "plot_loss": self.plot_loss,
        }

    def get_dataset(self, *args, **kwargs) -> dict:
        from ....training.cached_states import with_cached_states
        from ....training.draft_tokens import count_draft_tokens

        module = self.upstream.get_dataset(*args, **kwargs)
        source, folder = self.finetuning_args.heads_source, self.finetuning_args.hidden_cache_dir
        check_targets(module, source.reach)
        if source.folder is None and source.config.draft_vocab_size is not None:
            vocab_size = source.base.config().get_text_config().vocab_size
            tokens = count_draft_tokens(module, source.config, vocab_size)
            source = self.finetuning_args.heads_source = replace(source, draft_tokens=tokens)
        if folder is not None:
            documents = with_cached_states(
                module["train_dataset"], source.base, self.model_args, self.data_args, folder
            )
            module["train_dataset"], self.cache = documents, documents.cache
        return module

    def collator(self, *, model, tokenizer, **kwargs) -> Callable:
        from ....training.collator import CachedStatesCollator, packing_collator

        collate = self.upstream.SFTDataCollatorWith4DAttentionMask(model=model, tokenizer=tokenizer, **kwargs)
        if self.finetuning_args.heads_source.packs_batches:
            collate = packing_collator(collate, model, tokenizer, self.data_args, self.training_args)
        return collate if self.cache is None else CachedStatesCollator(collate, self.cache, tokenizer.pad_token_id)

    def plot_loss(self, save_dictionary: str, keys: Sequence[str] = ("loss",)) -> None:
        from ....training.plots import plot_head_metrics

        self.upstream.plot_loss(save_dictionary, keys=list(keys))
        plot_head_metrics(save_dictionary)


def check_targets(dataset_module: dict, offset: int, limit: int = 10_000) -> None:
    """Check that the first `limit` training examples hold a valid target for the last head.

    Args:
        dataset_module: What upstream's `get_dataset` returns.
        offset: Offset of the last head.
        limit: Number of examples to look at.

    Raises:
        LMTPError: Every answer is masked, or every example is shorter than the last head's reach.
    """
    dataset = dataset_module.get("train_dataset")
    if dataset is None:
        return
    for example in islice(dataset, limit):
        labels, position_ids = torch.tensor([example["labels"]]), example.get("position_ids")
        positions = None if position_ids is None else torch.tensor([position_ids])
        if count_targets(labels, [offset], positions).any():
            return
    raise LMTPError(
        f"No training example has a valid target {offset} tokens ahead, so the last head cannot learn: use longer examples "
        "or fewer or nearer heads (num_heads, leap_stride)."
    )
