"""Check that a base model's logits are its LM head applied to its final hidden states, with a soft cap at most.

Leap heads read these states and use the LM head or a copy of it. On a model that also scales its logits (Cohere, Granite,
Falcon-H1) or projects its states, leap heads would be trained at another scale than the model's logits. The options for
this have a different name in every model, so the check runs the model.
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
# The check replaces the LM head's output by logits up to this size. They exceed every soft cap in use, so a cap that the
# configuration does not declare changes them. The small logits of an untrained model would not reveal it.
_LARGEST_LOGIT = 64.0
# Both sides run the same kernels on the same shapes, so they usually agree to the last bit. Kernels with a varying order of
# summation and a soft cap in another dtype cause rounding errors: allow two ulps, and at least the precision of TF32.
_ULPS, _LEAST_TOLERANCE = 2, 1e-3


@dataclass(frozen=True)
class BackboneFacts:
    """Facts about the backbone that the check finds.

    Attributes:
        device: Device of the final hidden states.
        token_types: Names of arguments that must be zeros when the backbone is trained on text, e.g. Gemma 3's
            `token_type_ids`.
    """

    device: torch.device
    token_types: tuple[str, ...]


def prove_logits(base: PreTrainedModel) -> BackboneFacts:
    """Run `base` on seven tokens and check that its logits are the LM head's output, soft-capped at most.

    The model's state and the random number generators are unchanged. Under ZeRO-3 every rank must call this.

    Raises:
        LMTPError: The logits differ, or the model cannot run.
    """
    name, lm_head = type(base).__name__, base.get_output_embeddings()
    if lm_head is None:
        raise LMTPError(f"{name} has no LM head to predict tokens with: load a *ForCausalLM class.")
    if base.base_model is base:
        raise LMTPError(
            f"{name} has no backbone under the name that its base_model_prefix gives ({base.base_model_prefix!r}), and leap "
            "heads read the backbone's last_hidden_state: use another base model."
        )
    # accelerate's hooks load offloaded weights when a module runs.
    if base.device.type == "meta" and not any(hasattr(module, "_hf_hook") for module in base.modules()):
        raise LMTPError(
            f"{name} has no weights yet (they are on the meta device): load them before attaching leap heads."
        )
    ids = trial_tokens(base, 1, _TOKENS)
    inputs: list[Tensor] = []  # of the LM head
    replaced: list[Tensor] = []  # its output, as the rest of the model sees it

    def replace(module, args, output):
        inputs.append(args[0])
        replaced.append(torch.linspace(-_LARGEST_LOGIT, _LARGEST_LOGIT, output.numel()).view(output.shape).to(output))
        return replaced[-1].clone()  # some models scale in place

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
    if not inputs or not _same(inputs[-1], states):
        raise LMTPError(
            f"What the LM head of {name} reads is not its backbone's last_hidden_state, which leap heads read: use another "
            "base model."
        )
    if not _same(logits, softcapped(replaced[-1], softcap_of(base))):
        raise LMTPError(
            f"{name} changes its LM head's logits (for example by a multiplier), which leap heads do not support: use "
            "another base model."
        )
    return BackboneFacts(states.device, token_types)


def _same(mine: Tensor, theirs: Tensor) -> bool:
    """Return whether tensors agree up to rounding relative to the largest element; NaN equals NaN.

    A model whose weights are not loaded yet may compute NaN.
    """
    if mine.numel() != theirs.numel():
        return False
    tolerance = max(_LEAST_TOLERANCE, *(_ULPS * torch.finfo(side.dtype).eps for side in (mine, theirs)))
    mine, theirs = (side.flatten().float().cpu().nan_to_num() for side in (mine, theirs))
    return bool((mine - theirs).abs().max() <= tolerance * theirs.abs().max())


def _needed_token_types(base: PreTrainedModel, ids: Tensor) -> tuple[str, ...]:
    """Return the names of token-type arguments without which the backbone raises an error in train mode.

    Models that run without them do not get them, because GPT-2 would add an embedding to every token.
    """
    backbone, zeros = base.base_model, torch.zeros_like(ids)
    names = [name for name in inspect.signature(type(backbone).forward).parameters if name.endswith("token_type_ids")]
    if not names:
        return ()
    # Set train mode on the outermost module only, which is where models check it, so that dropout stays off.
    backbone.training = True
    with torch.random.fork_rng([ids.device] if ids.device.type == "cuda" else []):
        for given in ((), tuple(names)):
            try:
                backbone(input_ids=ids, use_cache=False, **{name: zeros for name in given})
            except ValueError:
                continue
            return given
    return ()
