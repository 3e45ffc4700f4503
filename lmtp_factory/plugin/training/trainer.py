"""Trainer of both stages: upstream's SFT Trainer with per-head averages, metrics and checkpoints."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from datasets import Dataset
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils.quantization_config import QuantizationMethod

from ...errors import LMTPError
from ...files import HEADS_FOLDER
from ...modeling import heads_of, load_heads, onednn, save_heads
from ...modeling.checkpoint import validate_checkpoint
from ...modeling.layer_states import recorded
from ...modeling.losses.targets import IGNORE_INDEX
from ...modeling.model import HEADS_PREFIX, base_of
from ...modeling.zero3 import gathered
from .. import log
from ..resume import differences, in_words, write_stage
from .cached_states import CachedDocuments, FillCache
from .head_metrics import HeadMetrics
from .optimizer import HeadRate, check_rates, parameter_groups, with_groups
from .replayed_tau import ReplayedTau
from .whole_batches import pad_with_unlabelled


# Folder that upstream writes beside a PiSSA adapter: the same adapter as an ordinary LoRA adapter of the base model.
PISSA_CONVERTED = "pissa_converted"


@contextmanager
def _frozen_may_be_quantised(model: nn.Module) -> Iterator[None]:
    """Hide from the Trainer's own check that bitsandbytes has quantised a frozen backbone: the trained heads are not."""
    base = base_of(model)
    is_quantised = getattr(base, "quantization_method", None) == QuantizationMethod.BITS_AND_BYTES
    hides = is_quantised and getattr(base, "is_quantized", False) and getattr(base, "trains_heads_only", False)
    if hides:
        base.is_quantized = False
    try:
        yield
    finally:
        if hides:
            base.is_quantized = True


class LeapTrainer(CustomSeq2SeqTrainer):
    """Trains a model with leap heads.

    Raises:
        LMTPError: The model has no leap heads; an L-MTP stage never trains plain SFT.
    """

    def __init__(self, *args, model: nn.Module, **kwargs):
        with _frozen_may_be_quantised(model):
            super().__init__(*args, model=model, **kwargs)
        if heads_of(self.model) is None:
            raise LMTPError("The model has no leap heads although an L-MTP stage trains it: run lmtp-cli doctor.")
        # Upstream clears this for models with a processor. The leap loss divides by each head's own count, never by steps.
        self.model_accepts_loss_kwargs = True
        self.leap_model = base_of(self.model)
        if isinstance(self.train_dataset, CachedDocuments):
            self.add_callback(FillCache(self, self.train_dataset))
        self.head_rate = HeadRate()
        if self.finetuning_args.head_learning_rate is not None:
            self.add_callback(self.head_rate)
        self.objective = self.leap_model.objective
        first, heads = self.objective.first_head, len(self.objective.weights)
        self._pad_evaluation_sets()
        self.train_metrics, self.eval_metrics = HeadMetrics(first, heads), HeadMetrics(first, heads)
        # Drafting reads the heads' weights outside their forward, where ZeRO-3 has not gathered them.
        self.eval_tau = None if is_deepspeed_zero3_enabled() else ReplayedTau(self.leap_model)
        if self.eval_tau is None and self.eval_dataset is not None:
            log.info("eval_tau is left out under ZeRO-3: run lmtp-cli tree on a checkpoint for tau.")

    # Loss -------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Number of valid targets of every head over the accumulated batches of all ranks, (heads,)."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        counts = 0
        for batch in batch_samples:
            positions = batch.get("position_ids")
            positions = positions if positions is None else positions.to(device)
            targets = self.leap_model.head_targets(batch["labels"].to(device), positions)
            counts = counts + (targets != IGNORE_INDEX).sum(-1)
        return self.accelerator.reduce(counts, reduction="sum")

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch: Tensor | None = None):
        """Loss of the stage. Its gradient, averaged over ranks, is the gradient of the whole batch's per-head means."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        self.train_metrics.add(outputs)
        loss = outputs.loss * (1 if num_items_in_batch is None else self.accelerator.num_processes)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Create the optimizer; with `head_learning_rate` the heads get groups of their own.

        Raises:
            LMTPError: The optimizer takes no parameter groups.
        """
        rate, heads = self.finetuning_args.head_learning_rate, self.leap_model.leap_heads
        if rate is None or self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        decayed = self.get_decay_parameter_names(self.model)
        groups = parameter_groups(self.model.named_parameters(), heads, rate, self.args.weight_decay, decayed)
        chosen = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer_cls_and_kwargs = with_groups(*chosen, groups)
        optimizer = super().create_optimizer(*args, **kwargs)
        check_rates(optimizer, heads, rate)
        log.info(f"Leap heads train with learning rate {rate:g}, the rest with {self.args.learning_rate:g}.")
        return optimizer

    def _clip_grad_norm(self, model) -> Tensor:
        """Clip the gradients to `max_grad_norm`, in stage 1 those of each head by their own norm.

        Stage 1 trains heads that share no parameter. A norm over all heads would make each depend on the others.
        DeepSpeed clips by itself and knows one norm only.

        Returns:
            Scalar norm of all gradients before clipping.
        """
        if self.objective.trains_backbone or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()  # once for all heads: a second call in the same step is an error in fp16
        heads = self.leap_model.leap_heads.heads
        norms = [clip_grad_norm_(head.parameters(), self.args.max_grad_norm) for head in heads]
        return torch.stack(norms).norm()

    # Evaluation -------------------------------------------------------------------------------------------------

    def _pad_evaluation_sets(self) -> None:
        """Let each document count once in evaluations on several ranks."""

        def padded(documents):
            at_once = self.args.eval_batch_size * self.args.world_size
            return pad_with_unlabelled(documents, at_once) if isinstance(documents, Dataset) else documents

        # Upstream cuts generated answers to the length of the set.
        if self.args.world_size > 1 and not self.args.predict_with_generate:
            sets = self.eval_dataset
            named = {name: padded(one) for name, one in sets.items()} if isinstance(sets, dict) else None
            self.eval_dataset = padded(sets) if named is None else named

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        if self.args.predict_with_generate:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.accelerator.autocast():  # accelerate wraps `model` alone, not its backbone
            if self.eval_tau is not None:
                inputs |= self._replay(inputs)
            self.eval_metrics.add(model(**inputs))
        return None, None, None  # evaluation_loop takes its means from eval_metrics

    def _replay(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the batch to `eval_tau`. Returns the final hidden states, unless the loss needs more than these."""
        heads, backbone_inputs = self.leap_model.leap_heads, {key: inputs[key] for key in inputs if key != "labels"}
        with recorded(self.leap_model) as layers:
            hidden = self.leap_model.final_hidden_states(**backbone_inputs)
        self.eval_tau.add(inputs, heads.inputs(hidden, layers))
        return {} if heads.config.reads_layers else {"hidden_states": hidden}

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        losses = self.eval_metrics.losses(self.accelerator)
        if losses is not None:
            # Upstream averages batch means, but batches differ in their number of targets.
            output.metrics[f"{metric_key_prefix}_loss"] = sum(
                weight * loss for weight, loss in zip(self.objective.weights, losses, strict=True)
            )
            output.metrics.update(self.eval_metrics.pop(self.accelerator, f"{metric_key_prefix}_"))
        if self.eval_tau is not None:
            output.metrics.update(self.eval_tau.pop(self.accelerator, f"{metric_key_prefix}_"))
        return output

    # Logging ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:  # the entry of a training step, not of evaluation or the final summary
            logs |= self.train_metrics.pop(self.accelerator)
            logs |= self.head_rate.logs
        super().log(logs, *args, **kwargs)

    # Checkpoints ------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the heads in `lmtp/`, and in stage 2 the adapter or model as upstream does."""
        output_dir = output_dir or self.args.output_dir
        if self.objective.trains_backbone:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._save(output_dir, state_dict={})  # tokenizer and arguments; the frozen backbone is not written again
        folders = [output_dir]
        if self.finetuning_args.pissa_convert and isinstance(self.model, PeftModel) and not _internal_call:
            folders.append(os.path.join(output_dir, PISSA_CONVERTED))  # upstream has just written it
        heads = self.leap_model.leap_heads
        with gathered(heads.parameters()):
            if self.args.should_save:
                for folder in folders:
                    save_heads(heads, os.path.join(folder, HEADS_FOLDER))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is None and not isinstance(self.model, PeftModel):
            state_dict = self.model.state_dict()
        if state_dict is not None:
            state_dict = {name: tensor for name, tensor in state_dict.items() if HEADS_PREFIX not in name}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial) -> None:
        if self.args.should_save:
            # The state is written last and marks a complete checkpoint. A new run in an old folder must not leave an old
            # state beside new weights.
            checkpoint = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
            checkpoint.mkdir(parents=True, exist_ok=True)
            write_stage(checkpoint, self.finetuning_args.lmtp_stage, self.finetuning_args.head_learning_rate)
        super()._save_checkpoint(model, trial)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train as upstream does, after checking that a checkpoint holds the heads that are trained.

        Raises:
            LMTPError: The checkpoint holds other heads.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if isinstance(
            resume_from_checkpoint, str
        ):  # here, because DeepSpeed restores its own checkpoint without _load_from_checkpoint
            self._check_heads(resume_from_checkpoint)
        with self._fast_backbone():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _fast_backbone(self) -> AbstractContextManager[None]:
        """Return a context in which oneDNN multiplies for a frozen fp32 backbone on a CPU."""
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.objective.trains_backbone or is_sharded or self.args.torch_compile:
            return nullcontext()
        return onednn.multiplying(self.leap_model.base_model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.objective.trains_backbone:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_heads(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        try:
            self._check_heads(best)
        except LMTPError as error:  # training is complete: keep its result
            log.warning(f"The best checkpoint cannot be loaded: {error} The heads of the last step are kept.")
            return
        if self.is_deepspeed_enabled or self.objective.trains_backbone:
            super()._load_best_model()
        if not self.is_deepspeed_enabled:  # DeepSpeed's own checkpoint holds the heads
            self._load_heads(best)

    def _check_heads(self, checkpoint: str) -> None:
        differing = differences(self.leap_model.leap_heads.config, validate_checkpoint(Path(checkpoint, HEADS_FOLDER)))
        if differing:
            raise LMTPError(
                f"The heads in {checkpoint} are not those that are trained ({in_words(differing)}): name another "
                "checkpoint or another output_dir."
            )

    def _load_heads(self, checkpoint: str) -> None:
        self.leap_model.leap_heads.load_state_dict(load_heads(checkpoint).state_dict())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled and not self.objective.trains_backbone:
            # Upstream leaves frozen parameters out for PEFT models only. The frozen backbone has its own directory.
            engine, save = self.model_wrapped, self.model_wrapped.save_checkpoint
            engine.save_checkpoint = lambda folder, **kwargs: save(folder, exclude_frozen_parameters=True, **kwargs)
            try:
                super()._save_optimizer_and_scheduler(output_dir)
            finally:
                del engine.save_checkpoint
        else:
            super()._save_optimizer_and_scheduler(output_dir)
