"""Whether a model keeps documents apart that share a row and differ by their positions alone."""

import torch
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from .model import LeapModel
from .trial import other_words, trial, trial_tokens


# Attention that is told by a mask where a document ends, in any number of rows; flash kernels see it in a single row only.
WITH_MASK = ("sdpa", "eager", "flex_attention")

# First documents of the two rows that are tried, and the length of both.
_FIRST, _LENGTH = (17, 9), 40

# A leak beside what a batch's other rows change, where no token can leak: both are the largest of as many tokens' rounding
# errors, which differ by less than this.
_NOISE_MARGIN = 4


def keeps_documents_apart(base: LeapModel) -> bool:
    """Tried on the model itself: does any token of a row's second document change with the tokens of the first?

    transformers' own models take borders from positions; code that comes with a checkpoint, layers with a running state and
    models with several axes of positions may not. Both batches have the same shape, and attention gives masked tokens a
    weight of exactly 0, so a model that keeps documents apart changes by exactly 0. Mixtures of experts are the exception:
    how many tokens an expert computes at once depends on the others, and with it the order of its sums.

    Args:
        base: a causal LM with leap heads. Under ZeRO-3 every rank has to call this.
    """
    rows = 2 if base.config._attn_implementation in WITH_MASK else 1  # as packed batches will have
    firsts = _FIRST[:rows]
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(_LENGTH - n)]) for n in firsts])
    ids = trial_tokens(base, rows, _LENGTH)
    swapped = torch.stack([torch.arange(_LENGTH) < n for n in firsts]).to(ids.device)
    with trial(base):
        leak = _largest_change(base, ids, swapped, positions)
        # Under ZeRO-3 every rank runs the same forwards, whatever it has measured.
        noise = _noise(base) if leak or is_deepspeed_zero3_enabled() else 0.0
        return bool(leak <= _NOISE_MARGIN * noise)


def _noise(base: LeapModel) -> Tensor:
    """How much a row of one document changes with the other row of its batch: 0 but for mixtures of experts."""
    ids, positions = trial_tokens(base, 2, _LENGTH), torch.arange(_LENGTH).expand(2, -1)
    swapped = torch.tensor([[True], [False]], device=ids.device).expand(2, _LENGTH)
    return _largest_change(base, ids, swapped, positions)


def _largest_change(base: LeapModel, ids: Tensor, swapped: Tensor, positions: Tensor) -> Tensor:
    """Largest relative change of a final hidden state where ``swapped`` is False, with other tokens where it is True."""
    positions = positions.to(ids.device)
    states, others = (
        base.final_hidden_states(input_ids=tokens, position_ids=positions).float()
        for tokens in (ids, torch.where(swapped, other_words(base, ids), ids))
    )
    change = (states - others).norm(dim=-1) / states.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return change[~swapped.to(change.device)].max()
