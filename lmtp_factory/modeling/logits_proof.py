"""Proof that a base model's logits are its LM head on its final hidden states, soft-capped, and nothing else.

Leap heads read those states and predict through that LM head or a copy of it. A model that scales its logits (Cohere,
Granite, Falcon-H1) or projects its states on the way would train them on another scale than its own logits have. Names of
such options differ from model to model, so the model is run instead.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import LMTPError, first_line
from .heads import softcap_of, softcapped
from .trial import trial, trial_tokens


_TOKENS = 7
# Logits that the LM head is made to say. Beyond every soft cap in use, so that one of which the configuration says nothing
# shows; real logits of an untrained model are so small that no cap would.
_LARGEST_LOGIT = 64.0
# Both sides run the same kernels on the same shapes and agree to the last bit. Left to rounding are kernels that add up in
# no fixed order and a soft cap computed in another dtype: two units in the last place, and never less than TF32's.
_ULPS, _LEAST_TOLERANCE = 2, 1e-3


@dataclass(frozen=True)
class BackboneFacts:
    """What the proof sees beside the logits.

    Attributes:
        device: of the final hidden states.
        token_types: arguments of which the backbone wants zeros to train on text, e.g. Gemma 3's ``token_type_ids``.
    """

    device: torch.device
    token_types: tuple[str, ...]


def prove_logits(base: PreTrainedModel) -> BackboneFacts:
    """Run ``base`` on seven tokens: do its logits come from its final hidden states by the LM head and the soft cap?

    The model is afterwards as it was, and no random number is drawn. Under ZeRO-3 every rank has to call it.

    Raises:
        LMTPError: they do not, or the model cannot run.
    """
    name, lm_head = type(base).__name__, base.get_output_embeddings()
    if lm_head is None:
        raise LMTPError(f"{name} has no LM head to predict tokens with: load a *ForCausalLM class.")
    if base.base_model is base:
        raise LMTPError(
            f"{name} has no backbone under the name that its base_model_prefix gives ({base.base_model_prefix!r}), and leap "
            "heads read the backbone's last_hidden_state: use another base model."
        )
    # accelerate's hooks bring weights that it keeps elsewhere.
    if base.device.type == "meta" and not any(hasattr(module, "_hf_hook") for module in base.modules()):
        raise LMTPError(
            f"{name} has no weights yet, they are on the meta device: load them before attaching leap heads."
        )
    ids = trial_tokens(base, 1, _TOKENS)
    read: list[Tensor] = []
    said: list[Tensor] = []

    def replace(module, args, output):
        read.append(args[0])
        said.append(torch.linspace(-_LARGEST_LOGIT, _LARGEST_LOGIT, output.numel()).view(output.shape).to(output))
        return said[-1].clone()  # some models scale in place

    try:
        with trial(base):
            states = getattr(base.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
            hook = lm_head.register_forward_hook(replace)
            try:
                logits = base(input_ids=ids, use_cache=False).logits
            finally:
                hook.remove()
            token_types = _needed_token_types(base, ids)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise LMTPError(
            f"{name} cannot run on {_TOKENS} tokens of text, which has to work before it gets leap heads "
            f"({first_line(error)}): use another base model."
        ) from error
    if states is None:
        raise LMTPError(
            f"The backbone of {name} gives no last_hidden_state, which leap heads read: use another base model."
        )
    if not read or not _same(read[-1], states):
        raise LMTPError(
            f"What the LM head of {name} reads is not its backbone's last_hidden_state, which leap heads read: use another "
            "base model."
        )
    if not _same(logits, softcapped(said[-1], softcap_of(base))):
        raise LMTPError(
            f"{name} changes its LM head's logits (by a multiplier, say), which leap heads do not support: use another base "
            "model."
        )
    return BackboneFacts(states.device, token_types)


def _same(mine: Tensor, theirs: Tensor) -> bool:
    """Equal up to rounding, judged by the largest number; NaN, in a model whose weights are yet to come, equals NaN."""
    if mine.numel() != theirs.numel():
        return False
    tolerance = max(_LEAST_TOLERANCE, *(_ULPS * torch.finfo(side.dtype).eps for side in (mine, theirs)))
    mine, theirs = (side.flatten().float().cpu().nan_to_num() for side in (mine, theirs))
    return bool((mine - theirs).abs().max() <= tolerance * theirs.abs().max())


def _needed_token_types(base: PreTrainedModel, ids: Tensor) -> tuple[str, ...]:
    """Arguments for kinds of tokens without which the backbone refuses to train, and with zeros in which it does not.

    Others do not get them: GPT-2 would add an embedding to every token.
    """
    backbone, zeros = base.base_model, torch.zeros_like(ids)
    names = [name for name in inspect.signature(type(backbone).forward).parameters if name.endswith("token_type_ids")]
    if not names:
        return ()
    # The topmost module alone, which is where models look: nothing drops out.
    backbone.training = True
    with torch.random.fork_rng([ids.device] if ids.device.type == "cuda" else []):
        for given in ((), tuple(names)):
            try:
                backbone(input_ids=ids, use_cache=False, **{name: zeros for name in given})
            except ValueError:
                continue
            return given
    return ()
