"""Tau of the evaluation text, replayed: what decoding with a chain of drafts would reach on it.

Tau is exact if the model wrote the text greedily, as it writes the rows of `lmtp-cli distill`. On other text it shows how
well the heads follow that text.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ... import geometry
from ...decoding.draft import unembeddings_kept
from ...decoding.tree import chain_paths
from ...modeling.losses.targets import IGNORE_INDEX
from ...tuning.replay import accepted_of_paths, observe_states, steps_of
from .head_metrics import TAU, HeadMetric


ACCEPTANCE = "acceptance"


class ReplayedTau:
    """Sums of the steps and tokens of replayed answers, over the batches of one evaluation.

    Args:
        model: The model with leap heads, whose weights are not sharded.
    """

    def __init__(self, model: nn.Module):
        self._model, offsets = model, model.leap_heads.config.offsets
        self._pairs, self._chain = geometry.lookback_pairs(offsets), chain_paths(geometry.reach(offsets))
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, inputs: dict[str, Tensor], states: Tensor) -> None:
        """Replay the answers of a batch.

        Args:
            inputs: The batch: `input_ids`, `labels` (-100 outside answers) and, for packed documents, `position_ids`.
            states: (batch, length, ...) its states as the heads read them, see `LeapHeads.inputs`.
        """
        model, sums = self._model, [0] * (1 + len(self._chain))  # steps, steps that reach each number of tokens
        with unembeddings_kept():
            for row, document, answer in answers_in(inputs):
                ids = inputs["input_ids"][row, document]
                observed = observe_states(model, ids, states[row, document], answer, self._pairs, width=1)
                for tokens in steps_of(accepted_of_paths(observed, self._chain)):
                    for reached in range(tokens):
                        sums[1 + reached] += 1
                    sums[0] += 1
        added = torch.tensor(sums, device=states.device)
        self._sums = added if self._sums is None else self._sums + added

    def pop(self, accelerator, prefix: str = "") -> dict[str, float]:
        """Tau and the acceptance rate of each position over all ranks, by name; a collective operation.

        Empty if there was no answer of two tokens or more.
        """
        if self._sums is None:
            return {}
        steps, _, *accepted = accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums = None
        if not steps:
            return {}
        rates = [count / steps for count in accepted]
        named = {f"{prefix}{ACCEPTANCE}_{position}": rate for position, rate in enumerate(rates, 1)}
        return {str(HeadMetric(TAU, None, prefix)): 1.0 + sum(rates), **named}


def answers_in(inputs: dict[str, Tensor]) -> Iterator[tuple[int, slice, range]]:
    """Find the answers of a batch: runs of labelled tokens inside a document.

    Args:
        inputs: See `ReplayedTau.add`.

    Yields:
        Row, columns of the answer's document, places of the answer in the document.
    """
    labels = inputs["labels"]
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    for row, is_answer in enumerate((labels != IGNORE_INDEX).tolist()):
        starts = [0]
        if positions is not None:
            at = positions[0, row] if positions.dim() == 3 else positions[row]
            starts = sorted({0, *(at == 0).nonzero()[:, 0].tolist()})
        elif mask is not None and mask.dim() == 2:  # padding on the left
            starts = [int(mask[row].to(torch.uint8).argmax())]
        for start, end in zip(starts, [*starts[1:], len(is_answer)]):
            for first, last in _runs(is_answer[start:end]):
                yield row, slice(start, end), range(first, last)


def _runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """Yield first and last place, exclusive, of each run of True."""
    first = None
    for place, flag in enumerate([*flags, False]):
        if flag and first is None:
            first = place
        elif not flag and first is not None:
            yield first, place
            first = None
