"""A causal LM with leap heads: the loaded model's instance gets a subclass that knows the leap-MTP loss.

The subclass keeps the base's name and ``config.model_type``, so that everything that keys on them (Liger, gradient
checkpointing, LLaMA-Factory's tables, ``save_pretrained``'s ``architectures``) goes on as before.
"""

import functools
import inspect
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..files import HEADS_FOLDER, TREE_FILE
from .checkpoint import save_heads
from .heads import LeapHeads, softcap_of
from .losses.implementation import AUTO, resolve_implementation
from .losses.targets import IGNORE_INDEX, leap_targets
from .objective import Objective
from .router import router_coefficient, states_and_router_loss
from .zero3 import ensure_backward_hook


HEADS_PREFIX = "leap_heads."
# Arguments of the language-model wrapper that its backbone does not take.
_WRAPPER_ONLY = ("labels", "num_items_in_batch", "logits_to_keep", "use_cache", "output_hidden_states", "return_dict")


@dataclass
class LeapOutput(CausalLMOutputWithPast):
    """Output of a training or evaluation forward; every tensor is (heads,), head 0 first in stage 2.

    Attributes:
        loss: scalar, the stage's weighted loss.
        losses: unweighted mean loss of every head trained.
        loss_sums, hits, counts: summed loss, top-1 hits and valid targets, for exact averages over batches and ranks.
    """

    losses: Tensor | None = None
    loss_sums: Tensor | None = None
    hits: Tensor | None = None
    counts: Tensor | None = None


class LeapModel:
    """Mixin in front of a ``*ForCausalLM`` class; see :func:`~.attach.attach_heads`."""

    plain_class: type[PreTrainedModel]  # without heads
    mixins: tuple[type, ...]  # in front of this one
    leap_heads: LeapHeads
    objective: Objective | None = None  # of training; None for inference
    token_types: tuple[str, ...] = ()  # see BackboneFacts
    loss_implementation: str = AUTO  # see losses/implementation.py
    after_export: Callable[[str], None] | None = None  # called with the directory of a model saved for inference

    def train(self, mode: bool = True) -> "LeapModel":
        """Like `nn.Module.train`, but a frozen backbone neither drops out nor checkpoints what needs no gradient."""
        super().train(mode)
        if self.trains_heads_only:
            self.base_model.eval()
        return self

    @property
    def trains_heads_only(self) -> bool:
        """Whether the backbone is frozen by the objective."""
        return self.objective is not None and not self.objective.trains_backbone

    def final_hidden_states(self, **inputs) -> Tensor:
        """(batch, length, hidden) what the LM head reads, from the backbone alone; without a graph where it is frozen."""
        for name in self.token_types:
            if name not in inputs and "input_ids" in inputs:
                inputs[name] = torch.zeros_like(inputs["input_ids"])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.trains_heads_only):
            return self.base_model(**inputs, use_cache=False).last_hidden_state

    def leap_loss(
        self,
        labels: Tensor,
        num_items_in_batch: Tensor | None = None,
        hidden_states: Tensor | None = None,
        objective: Objective | None = None,
        **inputs,
    ) -> LeapOutput:
        """Losses of the objective's heads; a mixture-of-experts backbone that is trained adds its own auxiliary loss.

        Args:
            labels: (batch, length), -100 where masked.
            num_items_in_batch: what each head's loss sum is divided by: (heads,) valid targets of the whole
                accumulated and distributed batch, or one number for all heads. None: this batch's own counts.
            hidden_states: (batch, length, hidden) final hidden states, where they are known; the backbone does not run.
            objective: default the model's own.
            inputs: the backbone's arguments; ``position_ids`` that restart mark packed documents.
        """
        objective, offsets = objective or self.objective, self.leap_heads.config.offsets
        auxiliary, coefficient = None, router_coefficient(self) if self.training and objective.trains_backbone else 0.0
        if hidden_states is None and coefficient:
            hidden_states, auxiliary = states_and_router_loss(self, super().forward, inputs)
        elif hidden_states is None:
            hidden_states = self.final_hidden_states(**inputs)
        hidden = ensure_backward_hook(hidden_states.flatten(0, 1))

        positions = inputs.get("position_ids")
        targets = torch.stack(
            [leap_targets(labels, offset, positions).flatten() for offset in objective.offsets(offsets)]
        )
        counts = (targets != IGNORE_INDEX).sum(-1)
        items = torch.as_tensor(counts if num_items_in_batch is None else num_items_in_batch, device=counts.device)
        loss, sums, hits = self.leap_heads(
            hidden,
            targets,
            torch.tensor(objective.weights, device=counts.device) / items.clamp(min=1),
            self.get_output_embeddings(),
            softcap=softcap_of(self),
            implementation=resolve_implementation(self.loss_implementation, hidden.device),
        )
        if auxiliary is not None:
            loss = loss + coefficient * auxiliary.to(loss.device)
        return LeapOutput(loss=loss, losses=sums / counts.clamp(min=1), loss_sums=sums, hits=hits, counts=counts)

    def save_pretrained(self, save_directory, state_dict: dict | None = None, **kwargs) -> None:
        """The base model as it always is saved (none of it in stage 1: it is frozen), and the heads in ``lmtp/``.

        With a ``state_dict`` only what it holds is written: no heads in it, no ``lmtp/``.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        heads = {k.removeprefix(HEADS_PREFIX): v for k, v in state_dict.items() if k.startswith(HEADS_PREFIX)}
        if not self.trains_heads_only:
            base = {k: v for k, v in state_dict.items() if not k.startswith(HEADS_PREFIX)}
            super().save_pretrained(save_directory, state_dict=base, **kwargs)
        if heads and kwargs.get("is_main_process", True):
            save_heads(self.leap_heads, os.path.join(save_directory, HEADS_FOLDER), heads)
            if self.objective is None:
                self._copy_tree(save_directory)
                if self.after_export is not None:
                    self.after_export(save_directory)

    def __reduce_ex__(self, protocol):
        """For pickle and copy, which look a class up by its name and would find the base's."""
        if type(self) is not leap_class(
            self.plain_class, self.mixins
        ):  # something else has made a class of its own of it
            return super().__reduce_ex__(protocol)
        return _new_leap_model, (self.plain_class, self.mixins), self.__getstate__()

    def _copy_tree(self, directory) -> None:
        """The measured tree goes with the heads."""
        tree = self.leap_heads.folder and Path(self.leap_heads.folder, TREE_FILE)
        if tree and tree.is_file():
            shutil.copy(tree, Path(directory, HEADS_FOLDER, TREE_FILE))

    def load_state_dict(self, state_dict, strict: bool = True, **kwargs):
        """As always, but a checkpoint of stage 1 holds no backbone, and that is no error."""
        if self.trains_heads_only and any(key.startswith(HEADS_PREFIX) for key in state_dict):
            strict = False
        return super().load_state_dict(state_dict, strict=strict, **kwargs)


@functools.cache
def leap_class(base: type[PreTrainedModel], mixins: tuple[type, ...] = ()) -> type:
    """``base`` with ``mixins`` and :class:`LeapModel` in front, under its own name."""
    parameters = list(inspect.signature(base.forward).parameters)[1:]

    @functools.wraps(base.forward)  # generate() reads the signature to see what the model takes
    def forward(self, *args, **kwargs):
        kwargs.update(zip(parameters, args))
        if self.objective is None or kwargs.get("labels") is None:
            return base.forward(self, **kwargs)
        labels, items = kwargs["labels"], kwargs.get("num_items_in_batch")
        inputs = {name: value for name, value in kwargs.items() if name not in _WRAPPER_ONLY and value is not None}
        return self.leap_loss(labels, items, **inputs)

    namespace = {
        "forward": forward,
        "plain_class": base,
        "mixins": mixins,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    return type(base.__name__, (*mixins, LeapModel, base), namespace)


def _new_leap_model(base: type[PreTrainedModel], mixins: tuple[type, ...]) -> LeapModel:
    """An empty instance for pickle to fill in."""
    leap = leap_class(base, mixins)
    return leap.__new__(leap)


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT wrappers, or ``model`` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def heads_of(model: nn.Module) -> LeapHeads | None:
    """The leap heads of ``model``, or None where it has none."""
    return getattr(base_of(model), "leap_heads", None)
