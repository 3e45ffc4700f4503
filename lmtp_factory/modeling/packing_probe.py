"""Test whether a model isolates packed documents when only `position_ids` mark their boundaries."""

import torch
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from .model import LeapModel
from .trial import other_tokens, trial, trial_tokens


# Attention implementations that build a mask from positions for any batch size. Flash kernels do so for one row only.
WITH_MASK = ("sdpa", "eager", "flex_attention")

# Lengths of the first document in each of the two test rows, and the length of the rows.
_FIRST, _LENGTH = (17, 9), 40

# A change counts as a leak if it exceeds this multiple of the rounding noise. Noise is the change caused by another row of
# the batch, which cannot leak. Both are maxima of equally many rounding errors and differ by less than this factor.
_NOISE_MARGIN = 4


def keeps_documents_apart(base: LeapModel) -> bool:
    """Return whether the second document of a row is unaffected by the tokens of the first.

    The model is run on two batches of the same shape that differ in the first documents. Models of transformers derive
    boundaries from positions; remote code, recurrent layers and models with several position axes may not. Attention gives
    masked tokens a weight of exactly 0, so the states of an isolated document do not change at all. Mixtures of experts are
    the exception: the number of tokens in an expert's matmul, and with it the order of summation, depends on other tokens.

    Args:
        base: A causal LM with leap heads. Under ZeRO-3 every rank must call this.
    """
    rows = 2 if base.config._attn_implementation in WITH_MASK else 1  # as in packed batches
    firsts = _FIRST[:rows]
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(_LENGTH - n)]) for n in firsts])
    ids = trial_tokens(base, rows, _LENGTH)
    swapped = torch.stack([torch.arange(_LENGTH) < n for n in firsts]).to(ids.device)
    with trial(base):
        leak = _largest_change(base, ids, swapped, positions)
        # Under ZeRO-3 every rank must run the same forwards, whatever it has measured.
        noise = _noise(base) if leak or is_deepspeed_zero3_enabled() else 0.0
        return bool(leak <= _NOISE_MARGIN * noise)


def _noise(base: LeapModel) -> Tensor:
    """Return the change in a row caused by the other row of the batch: 0 except for mixtures of experts."""
    ids, positions = trial_tokens(base, 2, _LENGTH), torch.arange(_LENGTH).expand(2, -1)
    swapped = torch.tensor([[True], [False]], device=ids.device).expand(2, _LENGTH)
    return _largest_change(base, ids, swapped, positions)


def _largest_change(base: LeapModel, ids: Tensor, swapped: Tensor, positions: Tensor) -> Tensor:
    """Return the largest relative change of a final hidden state when the `swapped` tokens are replaced.

    Args:
        base: The model.
        ids: (rows, length) token ids.
        swapped: (rows, length) bool, the tokens to replace. States are compared where it is False.
        positions: (rows, length) position ids.
    """
    positions = positions.to(ids.device)
    states, others = (
        base.final_hidden_states(input_ids=tokens, position_ids=positions).float()
        for tokens in (ids, torch.where(swapped, other_tokens(base, ids), ids))
    )
    change = (states - others).norm(dim=-1) / states.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return change[~swapped.to(change.device)].max()
