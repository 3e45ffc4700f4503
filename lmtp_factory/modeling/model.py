"""A causal LM with leap heads: the class of a loaded model is replaced by a subclass that computes the leap-MTP loss.

The subclass keeps the name of the base class and `config.model_type`. Code that looks these up (Liger, gradient
checkpointing, LLaMA-Factory's tables, `architectures` in `save_pretrained`) therefore works unchanged.
"""

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import LMTPError
from ..files import HEADS_FOLDER, TREE_FILE
from .checkpoint import save_heads
from .heads import LeapHeads, softcap_of
from .layer_states import recorded
from .losses.implementation import AUTO, resolve_implementation
from .losses.targets import IGNORE_INDEX, count_targets, leap_targets
from .objective import Objective
from .router import router_coefficient, states_and_router_loss
from .zero3 import ensure_backward_hook


HEADS_PREFIX = "leap_heads."
# Arguments of `*ForCausalLM.forward` that the backbone does not accept.
_WRAPPER_ONLY = ("labels", "num_items_in_batch", "logits_to_keep", "use_cache", "output_hidden_states", "return_dict")


@dataclass
class LeapOutput(CausalLMOutputWithPast):
    """Output of a forward with labels. Heads are in the order of the objective: head 0 comes first in stage 2.

    Attributes:
        loss: Scalar, the objective's weighted loss.
        losses: (heads,) unweighted mean losses.
        loss_sums: (heads,) unweighted loss sums. With `counts` they give exact averages over batches and ranks.
        hits: (heads,) numbers of top-1 hits.
        counts: (heads,) numbers of valid targets.
        outside: (heads,) numbers of further targets that are not in the draft vocabulary: they have no loss and are misses.
    """

    losses: Tensor | None = None
    loss_sums: Tensor | None = None
    hits: Tensor | None = None
    counts: Tensor | None = None
    outside: Tensor | None = None


class LeapModel:
    """Mixin placed before a `*ForCausalLM` class by `attach_heads`.

    Attributes:
        plain_class: The model's class without heads.
        mixins: Further mixins placed before this one.
        leap_heads: The heads.
        objective: The training objective; None for inference.
        token_types: Names of arguments that the backbone needs as zeros, see `BackboneFacts`.
        loss_implementation: One of `losses.implementation.IMPLEMENTATIONS`.
        after_export: Called with the directory of a model that was saved for inference.
    """

    plain_class: type[PreTrainedModel]
    mixins: tuple[type, ...]
    leap_heads: LeapHeads
    objective: Objective | None = None
    token_types: tuple[str, ...] = ()
    loss_implementation: str = AUTO
    after_export: Callable[[str], None] | None = None

    def train(self, mode: bool = True) -> "LeapModel":
        """Set the mode as `nn.Module.train` does, but keep a frozen backbone in eval mode.

        Eval mode disables dropout and gradient checkpointing, which a backbone without gradients does not need.
        """
        super().train(mode)
        if self.trains_heads_only:
            self.base_model.eval()
        return self

    @property
    def trains_heads_only(self) -> bool:
        """Whether the objective freezes the backbone."""
        return self.objective is not None and not self.objective.trains_backbone

    def final_hidden_states(self, **inputs) -> Tensor:
        """Run the backbone and return the (batch, length, hidden) inputs of the LM head; no graph if it is frozen."""
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
        """Compute the losses of the objective's heads.

        A trained mixture-of-experts backbone adds its auxiliary router loss.

        Args:
            labels: (batch, length), -100 where masked.
            num_items_in_batch: Divisors of the loss sums: the (heads,) valid targets of the whole accumulated and
                distributed batch, or one number for all heads. None uses the counts of this batch.
            hidden_states: (batch, length, hidden) precomputed final hidden states. The backbone is then not run.
            objective: Heads and weights. Default `self.objective`.
            inputs: The backbone's arguments. `position_ids` that restart at 0 mark packed documents.

        Raises:
            LMTPError: The heads read token ids or inner layers that are not there.
        """
        objective, offsets = objective or self.objective, self.leap_heads.config.offsets
        auxiliary, coefficient = None, router_coefficient(self) if self.training and objective.trains_backbone else 0.0
        layers = None
        if hidden_states is None:
            with recorded(self) as layers:
                if coefficient:
                    hidden_states, auxiliary = states_and_router_loss(self, super().forward, inputs)
                else:
                    hidden_states = self.final_hidden_states(**inputs)
        elif self.leap_heads.config.reads_layers:
            raise LMTPError("Heads of head_inputs: layers read more than final hidden states: leave hidden_states out.")
        hidden = ensure_backward_hook(hidden_states.flatten(0, 1))  # (rows, hidden), rows = batch * length

        positions = inputs.get("position_ids")
        targets = self.head_targets(labels, positions, objective)  # (heads, rows)
        counts = (targets != IGNORE_INDEX).sum(-1)  # (heads,)
        all_counts = count_targets(labels, objective.offsets(offsets), positions)  # (heads,)
        items = torch.as_tensor(counts if num_items_in_batch is None else num_items_in_batch, device=counts.device)
        loss, sums, hits = self.leap_heads(
            hidden,
            targets,
            torch.tensor(objective.weights, device=counts.device) / items.clamp(min=1),
            self.get_output_embeddings(),
            **self._known_tokens(inputs.get("input_ids"), positions),
            layers=layers and [state.flatten(0, 1) for state in layers],
            softcap=softcap_of(self),
            implementation=resolve_implementation(self.loss_implementation, hidden.device),
        )
        if auxiliary is not None:
            loss = loss + coefficient * auxiliary.to(loss.device)
        return LeapOutput(
            loss=loss,
            losses=sums / counts.clamp(min=1),
            loss_sums=sums,
            hits=hits,
            counts=counts,
            outside=all_counts - counts,
        )

    def head_targets(
        self, labels: Tensor, position_ids: Tensor | None = None, objective: Objective | None = None
    ) -> Tensor:
        """Return the (heads, batch * length) targets of the objective's heads, -100 where masked.

        Targets are indices of a head's logits: token ids, or for leap heads with a draft vocabulary indices into it.

        Args:
            labels: (batch, length), -100 where masked.
            position_ids: See `leap_targets`.
            objective: Default `self.objective`.
        """
        objective, drafted = objective or self.objective, self.leap_heads.draft_labels(labels)
        offsets = self.leap_heads.config.offsets
        rows = [
            leap_targets(drafted if head else labels, offset, position_ids).flatten()
            for head, offset in enumerate(objective.offsets(offsets), objective.first_head)
        ]
        return torch.stack(rows)

    def _known_tokens(self, input_ids: Tensor | None, position_ids: Tensor | None) -> dict:
        """Return the arguments of `LeapHeads.forward` by which heads read the newest known token.

        Heads look back 0, 1, 2, ... positions in turn along a document, from a random turn on. So each is trained equally
        often, and packed documents train as padded ones do.

        Raises:
            LMTPError: The heads read it, and there are no token ids.
        """
        if not self.leap_heads.config.reads_token:
            return {}
        if input_ids is None:
            raise LMTPError(
                "Heads of head_inputs: state_token read token ids, and this batch has none: train head_inputs: state."
            )
        embed = self.get_input_embeddings()
        was_training = embed.training
        embed.eval()  # without the noise of NEFTune, which decoding never adds
        with torch.no_grad():
            embeddings = embed(input_ids).flatten(0, 1)  # (rows, hidden)
        embed.train(was_training)
        if position_ids is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        else:
            positions = position_ids[0] if position_ids.dim() == 3 else position_ids
        # One random number whatever the heads are, so that a head does not depend on the others.
        first = int(torch.randint(1 << 30, ())) if self.leap_heads.training else 0
        return {"embeddings": embeddings, "turns": positions.expand_as(input_ids).flatten() + first}

    def save_pretrained(self, save_directory, state_dict: dict | None = None, **kwargs) -> None:
        """Save the base model as `PreTrainedModel.save_pretrained` does, and the heads in `lmtp/`.

        In stage 1 the base model is frozen and only the heads are saved.

        Args:
            save_directory: Directory to write to.
            state_dict: Tensors to save instead of `self.state_dict()`. Without head tensors, no `lmtp/` is written.
            kwargs: Passed on to `PreTrainedModel.save_pretrained`.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        heads = {k.removeprefix(HEADS_PREFIX): v for k, v in state_dict.items() if k.startswith(HEADS_PREFIX)}
        if not self.trains_heads_only:
            base = {k: v for k, v in state_dict.items() if not k.startswith(HEADS_PREFIX)}
            super().save_pretrained(save_directory, state_dict=base, **kwargs)
        if heads and kwargs.get("is_main_process", True):
            tree = self._measured_tree() if self.objective is None else None  # training changes the heads
            save_heads(self.leap_heads, os.path.join(save_directory, HEADS_FOLDER), heads, tree)
            if self.objective is None and self.after_export is not None:
                self.after_export(save_directory)

    def __reduce_ex__(self, protocol):
        """For pickle and copy, which look a class up by its name and would find the base's."""
        if type(self) is not leap_class(
            self.plain_class, self.mixins
        ):  # something else has made a class of its own of it
            return super().__reduce_ex__(protocol)
        return _new_leap_model, (self.plain_class, self.mixins), self.__getstate__()

    def _measured_tree(self) -> bytes | None:
        """Return the contents of `tree.json` in the folder that the heads were loaded from, or None."""
        tree = self.leap_heads.folder and Path(self.leap_heads.folder, TREE_FILE)
        return tree.read_bytes() if tree and tree.is_file() else None

    def load_state_dict(self, state_dict, strict: bool = True, **kwargs):
        """Load as `nn.Module.load_state_dict` does, but accept that a stage-1 checkpoint has no backbone weights."""
        if self.trains_heads_only and any(key.startswith(HEADS_PREFIX) for key in state_dict):
            strict = False
        return super().load_state_dict(state_dict, strict=strict, **kwargs)


@functools.cache
def leap_class(base: type[PreTrainedModel], mixins: tuple[type, ...] = ()) -> type:
    """Return a subclass of `mixins`, `LeapModel` and `base`, in this order, with the name of `base`."""
    parameters = list(inspect.signature(base.forward).parameters)[1:]

    @functools.wraps(base.forward)  # generate() inspects the signature for accepted arguments
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
    """Return an uninitialised instance, whose state pickle then restores."""
    leap = leap_class(base, mixins)
    return leap.__new__(leap)


def base_of(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT wrapper, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def heads_of(model: nn.Module) -> LeapHeads | None:
    """Return the leap heads of `model`, or None if it has none."""
    return getattr(base_of(model), "leap_heads", None)
