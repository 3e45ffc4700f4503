"""The two stages, run by upstream's own SFT workflow with our Trainer in it (``llamafactory.train.sft.workflow``)."""

import functools
from itertools import islice
from types import ModuleType

import torch

from ..errors import LMTPError
from ..modeling.loss.targets import count_targets
from . import hooks
from .loading import replaced, with_heads
from .start import farthest_offset


def extend_workflow(workflow: ModuleType) -> None:
    """Replace ``run_sft`` by one that puts our parts into upstream's while an L-MTP stage runs."""
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
        if finetuning_args.lmtp_stage is None:
            only_predicts = training_args.predict_with_generate and not training_args.do_train
            ours = {"load_model": with_heads(workflow.load_model)} if only_predicts else {}
            with replaced(workflow, **ours):
                return upstream(model_args, data_args, training_args, finetuning_args, *args, **kwargs)
        from .collator import CachedStatesCollator, packing_collator
        from .plots import plot_head_metrics
        from .state_cache import with_cached_states
        from .trainer import LeapTrainer

        cache_dir, caches = finetuning_args.hidden_cache_dir, []

        def get_dataset(*dataset_args, **dataset_kwargs):
            module = workflow_get_dataset(*dataset_args, **dataset_kwargs)
            check_targets(module, farthest_offset(model_args, finetuning_args, training_args.do_train))
            if cache_dir is not None:
                module["train_dataset"] = with_cached_states(module["train_dataset"], model_args, data_args, cache_dir)
                caches.append(module["train_dataset"].cache)
            return module

        def collator(*, model, tokenizer, **collator_kwargs):
            collate = workflow_collator(model=model, tokenizer=tokenizer, **collator_kwargs)
            if finetuning_args.packs_batches:
                collate = packing_collator(collate, model, tokenizer, data_args, training_args)
            return CachedStatesCollator(collate, *caches, tokenizer.pad_token_id) if caches else collate

        def plot_loss(save_dictionary, keys=("loss",)):
            workflow_plot_loss(save_dictionary, keys=list(keys))
            plot_head_metrics(save_dictionary)

        workflow_get_dataset, workflow_plot_loss = workflow.get_dataset, workflow.plot_loss
        workflow_collator = workflow.SFTDataCollatorWith4DAttentionMask
        ours = {
            "CustomSeq2SeqTrainer": LeapTrainer,
            "SFTDataCollatorWith4DAttentionMask": collator,
            "get_dataset": get_dataset,
            "plot_loss": plot_loss,
        }
        with replaced(workflow, **ours):
            return upstream(model_args, data_args, training_args, finetuning_args, *args, **kwargs)

    workflow.run_sft = run_sft


def check_targets(dataset_module: dict, offset: int, limit: int = 10_000) -> None:
    """Refuse a training set whose first ``limit`` examples hold no valid target for the last head.

    Raises:
        LMTPError: every answer is masked, or every example is shorter than the head's reach.
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
