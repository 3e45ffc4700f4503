"""Top-1 accuracy of numerical marginalisation and of leap heads at the same positions of held-out answers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..decoding.continuations import CachedText
from ..decoding.cpu_prepacked import prepacked_if_possible
from ..decoding.support import no_tree_forward_reason
from ..errors import LMTPError
from ..modeling.blocks import KnownToken
from ..modeling.heads import lm_logits, unembed
from ..modeling.model import base_of
from .marginal import MARGINAL_OFFSETS, marginals
from .scoring import Row


# Limits of one forward: its nodes, whose mask has nodes x columns elements, and the elements of its fp32 logits (256 MB).
_NODES, _LOGITS = 512, 1 << 26


@dataclass(frozen=True)
class MarginalScore:
    """Scores of the sums cut to K paths. Index 0 is +2, index 1 is +3.

    Attributes:
        k: K.
        accuracies: Top-1 accuracy.
        masses: Mean probability of the paths that the sum is over.
        forwards: Forwards beyond the text's own.
        rows: Token rows of these forwards for each position.
    """

    k: int
    accuracies: tuple[float, float]
    masses: tuple[float, float]
    forwards: tuple[int, int]
    rows: tuple[int, int]

    def to_dict(self) -> dict:
        """Return the scores by offset, for JSON."""
        columns = {"accuracy": self.accuracies, "mass": self.masses, "forwards": self.forwards, "rows": self.rows}
        by_offset = {
            f"+{offset}": {name: column[index] for name, column in columns.items()}
            for index, offset in enumerate(MARGINAL_OFFSETS)
        }
        return {"k": self.k} | by_offset


@dataclass(frozen=True)
class MarginalReport:
    """Scores of one model, all of them at the same positions.

    Attributes:
        positions: Number of positions.
        next_token: Top-1 accuracy of the LM head at +1.
        marginal: Scores for each K.
        heads: Top-1 accuracy of the leap heads, by offset: those at +2 and +3 that the model has.
        reads_token: Whether the heads also read the next token.
        forwards: Number of forwards that were run, those of the texts included.
        rows: Number of token rows of these forwards. Several K share rows.
        seconds: Duration.
    """

    positions: int
    next_token: float
    marginal: tuple[MarginalScore, ...]
    heads: dict[int, float]
    reads_token: bool
    forwards: int
    rows: int
    seconds: float

    def to_dict(self) -> dict:
        """Return the scores as plain values, for JSON."""
        return {
            "positions": self.positions,
            "next_token_accuracy": self.next_token,
            "by_k": [score.to_dict() for score in self.marginal],
            "heads": {f"+{offset}": accuracy for offset, accuracy in self.heads.items()},
            "heads_read_next_token": self.reads_token,
            "forwards": self.forwards,
            "rows": self.rows,
            "seconds": self.seconds,
        }


def scorable_positions(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Return pairs (row, position t) from which the tokens at +1 to +3 all belong to the output.

    Raises:
        LMTPError: There is none.
    """
    found = [
        (index, position)
        for index, (prompt, output) in enumerate(rows)
        for position in range(max(len(prompt) - 1, 0), len(prompt) + len(output) - max(MARGINAL_OFFSETS))
    ]
    if not found:
        raise LMTPError(
            f"No output of --rows has {max(MARGINAL_OFFSETS)} tokens, which --marginal needs: name rows with longer outputs."
        )
    return found


def spread_evenly(positions: Sequence[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Return at most `limit` positions at equal distances, the same ones in every run."""
    count = min(limit, len(positions))
    return [positions[(2 * number + 1) * len(positions) // (2 * count)] for number in range(count)]


def check_marginal(model: nn.Module, rows: Sequence[Row]) -> None:
    """Check that the model can run the forwards.

    Raises:
        LMTPError: It cannot.
    """
    base = base_of(model)
    reason = no_tree_forward_reason(base, max(len(prompt) + len(output) for prompt, output in rows))
    if reason is not None:
        raise LMTPError(f"--marginal needs tree-masked forwards ({reason}): leave it out for {type(base).__name__}.")


@torch.no_grad()
def score_marginal(
    model: nn.Module,
    rows: Sequence[Row],
    positions: Sequence[tuple[int, int]],
    ks: Sequence[int],
    *,
    with_heads: bool = True,
    label: str = "marginalising",
) -> MarginalReport:
    """Compute the accuracies of marginalisation for every K, and of the heads.

    Args:
        model: A model with leap heads.
        rows: Token ids of prompts and outputs.
        positions: Pairs (row, position), rising, see `scorable_positions`.
        ks: Every K.
        with_heads: Whether the heads are scored. Untrained ones say nothing.
        label: Title of the progress bar.

    Raises:
        LMTPError: The model cannot run the forwards.
    """
    check_marginal(model, rows)
    base, was_training, started = base_of(model), model.training, time.perf_counter()
    model.eval()
    try:
        with prepacked_if_possible(base):
            sums = _sum_up(base, rows, positions, ks, _Heads(base) if with_heads else None, label)
    finally:
        model.train(was_training)
    count = len(positions)
    accuracies, masses = (sums.hits / count).tolist(), (sums.masses / count).tolist()  # (ks, 2) each
    scores = [
        MarginalScore(k, tuple(accuracies[number]), tuple(masses[number]), (1, 2), (at_2, at_2 + at_3))
        for number, (k, at_2, at_3) in enumerate(zip(ks, *sums.paths))
    ]
    return MarginalReport(
        positions=count,
        next_token=sums.next_hits / count,
        marginal=tuple(scores),
        heads={offset: hits / count for offset, hits in sums.head_hits.items()},
        reads_token=with_heads and base.leap_heads.config.reads_token,
        forwards=sums.forwards,
        rows=sums.rows,
        seconds=time.perf_counter() - started,
    )


@dataclass
class _Sums:
    """Sums over positions, as in `MarginalReport`. `hits` and `masses` are (ks, 2) fp64, `paths` those of each offset."""

    hits: Tensor
    masses: Tensor
    head_hits: dict[int, int]
    paths: tuple[tuple[int, ...], ...] = ()
    next_hits: int = 0
    forwards: int = 0
    rows: int = 0


def _sum_up(
    base: nn.Module,
    rows: Sequence[Row],
    positions: Sequence[tuple[int, int]],
    ks: Sequence[int],
    heads: "_Heads | None",
    label: str,
) -> _Sums:
    """Run the forwards, text by text and some positions at a time."""
    zeros = torch.zeros(len(ks), len(MARGINAL_OFFSETS), dtype=torch.float64)
    sums = _Sums(zeros, zeros.clone(), dict.fromkeys(heads.offsets if heads else (), 0))
    # A position has at most as many nodes in one forward as all K together.
    at_once = max(1, min(_NODES, _LOGITS // base.config.get_text_config().vocab_size) // sum(ks))
    with tqdm(total=len(positions), desc=label, unit="position", leave=False) as bar:
        for index, group in groupby(positions, key=itemgetter(0)):
            ids = torch.tensor([*rows[index][0], *rows[index][1]], device=base.device)  # (length,)
            chosen = torch.tensor([position for _, position in group], device=base.device)
            text = CachedText(base, ids[: int(chosen[-1]) + 1])
            for part in chosen.split(at_once):  # (positions,)
                at_offsets = marginals(base, text, part, ks)
                for number, (offset, marginal) in enumerate(zip(MARGINAL_OFFSETS, at_offsets)):
                    is_hit = marginal.probabilities.argmax(-1) == ids[part + offset, None].to(marginal.masses.device)
                    sums.hits[:, number] += is_hit.sum(0).cpu()
                    sums.masses[:, number] += marginal.masses.sum(0).cpu()
                sums.paths = tuple(marginal.paths for marginal in at_offsets)
                sums.next_hits += _count_equal(lm_logits(base, text.hidden[part]).argmax(-1), ids[part + 1])
                for offset in sums.head_hits:
                    drafted = heads.predict(offset, text.states[part], ids[part + 1])
                    sums.head_hits[offset] += _count_equal(drafted, ids[part + offset])
                bar.update(len(part))
            sums.forwards, sums.rows = sums.forwards + text.forwards, sums.rows + text.rows
    return sums


def _count_equal(predicted: Tensor, truth: Tensor) -> int:
    """Return at how many positions two (positions,) tensors of token ids are equal."""
    return int((predicted == truth.to(predicted.device)).sum())


class _Heads:
    """Predictions of those leap heads that are at `MARGINAL_OFFSETS`, from the newest state.

    Args:
        base: A model with leap heads.
    """

    def __init__(self, base: nn.Module):
        self.base, self.heads = base, base.leap_heads
        self.offsets = tuple(offset for offset in MARGINAL_OFFSETS if offset in self.heads.config.offsets)
        self.unembeddings = self.heads.unembeddings(base.get_output_embeddings())

    def predict(self, offset: int, states: Tensor, next_tokens: Tensor) -> Tensor:
        """Return the (positions,) most probable token ids.

        Args:
            offset: Offset of the head.
            states: (positions, hidden) or (positions, heads, hidden) states, see `LeapHeads.inputs`.
            next_tokens: (positions,) tokens after these states, which heads of `head_inputs: state_token` read.
        """
        number, known = self.heads.config.offsets.index(offset) - 1, None
        if self.heads.config.reads_token:
            known = KnownToken(self.base.get_input_embeddings()(next_tokens), torch.zeros_like(next_tokens))
        hidden = states[:, number] if self.heads.config.reads_layers else states  # (positions, hidden)
        features = self.heads.heads[number].features(hidden, known)
        best = unembed(features, self.unembeddings[number]).argmax(-1)  # a soft cap would not change the order
        tokens = self.heads.draft_tokens
        return best if tokens is None else tokens.to(best.device)[best]
