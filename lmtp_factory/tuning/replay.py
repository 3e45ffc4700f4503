"""Replay: the number of tokens per forward (tau) that any tree would reach on text that the model has written greedily.

Greedy decoding accepts a node if and only if the text continues with the node's path. One forward over the text gives
the candidates of every step, and the ranks of the text's tokens among them give tau for each tree without decoding
again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import geometry
from ..decoding.cpu_prepacked import prepacked_if_possible
from ..decoding.draft import Window, candidates_of, unembeddings_kept
from ..decoding.tree import grow
from ..decoding.tree_config import AcceptanceCalibration, TreeConfig
from ..errors import LMTPError
from ..evaluation.scoring import Row
from ..modeling.layer_states import recorded


# Number of rows of logits that are computed at once, which limits memory: each level of a step has one.
_ROWS_AT_ONCE = 384


@dataclass(frozen=True)
class Observed:
    """Candidates and ranks at every position of one answer from which a step could start.

    Attributes:
        probabilities: (steps, levels, width) probabilities of the candidates.
        ranks: (steps, levels) int64 rank of the text's token among the candidates; `width` if it is not among them.
    """

    probabilities: Tensor
    ranks: Tensor

    def __len__(self) -> int:
        return len(self.ranks)

    def columns(self, levels: Sequence[int]) -> "Observed":
        """Return the levels at these indices, in this order."""
        return Observed(self.probabilities[:, levels], self.ranks[:, levels])


def observe_answers(
    model: nn.Module, rows: Iterable[Row], width: int, pairs: Sequence[tuple[int, int]] | None = None
) -> list[Observed]:
    """Observe every answer that has a step.

    The backbone may use prepacked weights. The heads compute in full precision: int8 rounds all rows of a call alike, and
    a call here has more rows than a draft.

    Args:
        model: A model with leap heads.
        rows: Token ids of prompts and of the model's greedy answers.
        width: Number of candidates per level.
        pairs: See `observe_pairs`. Default: the levels of the model's own heads.

    Raises:
        LMTPError: No answer has a step.
    """
    pairs = geometry.lookback_pairs(model.leap_heads.config.offsets) if pairs is None else pairs
    with prepacked_if_possible(model.base_model), unembeddings_kept():
        return with_steps([observe_pairs(model, row, pairs, width) for row in rows])


def observe(model: nn.Module, row: Row, width: int) -> Observed:
    """Compute the candidates of every step of one answer, as decoding does, and their ranks.

    Args:
        model: A model with leap heads.
        row: Token ids of a prompt and of the model's greedy answer.
        width: Number of candidates per level.
    """
    return observe_pairs(model, row, geometry.lookback_pairs(model.leap_heads.config.offsets), width)


@torch.no_grad()
def observe_pairs(model: nn.Module, row: Row, pairs: Sequence[tuple[int, int]], width: int) -> Observed:
    """Compute the candidates of `(head, back)` pairs at every step of one answer with `candidates_of`, and their ranks.

    Args:
        model: A model with leap heads.
        row: Token ids of a prompt and of the model's greedy answer.
        pairs: Pairs in the order that `candidates_of` asks for.
        width: Number of candidates per pair.

    Returns:
        Observations whose levels are the pairs.
    """
    prompt, answer = row
    ids = torch.tensor(prompt + answer, device=model.device)  # (length,)
    with recorded(model) as layers:
        hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state  # (1, length, hidden)
    states = model.leap_heads.inputs(hidden, layers)[0]  # (length, ...)
    return observe_states(model, ids, states, range(len(prompt), len(ids)), pairs, width)


@torch.no_grad()
def observe_states(
    model: nn.Module, ids: Tensor, states: Tensor, answer: range, pairs: Sequence[tuple[int, int]], width: int
) -> Observed:
    """Compute what `observe_pairs` does from the states that the heads read.

    Args:
        model: A model with leap heads.
        ids: (length,) token ids of a text.
        states: (length, hidden) or (length, heads, hidden) its states, see `LeapHeads.inputs`.
        answer: Places of the answer in the text. A step's root and its drafts lie in the answer.
        pairs: See `observe_pairs`.
        width: Number of candidates per pair.
    """
    offsets = model.leap_heads.config.offsets
    size = max(back for _, back in pairs) + 1
    # The step at state t drafts token t + depth. Its root is token t + 1. The last token has no successor.
    depths = torch.tensor([offsets[head] - back for head, back in pairs], device=ids.device)  # (levels,)
    steps = torch.arange(max(answer.start - 1, 0), answer.stop - 2, device=ids.device)
    probabilities, ranks = [], []
    for part in steps.split(max(1, _ROWS_AT_ONCE // len(pairs))):
        # (steps, window) indices of the states, oldest first. Indices before the text are marked as missing.
        places = part[:, None] - torch.arange(size - 1, -1, -1, device=ids.device)
        window = Window.of_states(states[places.clamp(min=0)], is_real=places >= 0, roots=ids[part + 1])
        candidates = candidates_of(model, window, pairs, width)  # (steps, levels, width)
        ahead = part[:, None] + depths  # (steps, levels) indices of the drafted tokens
        truth = ids[ahead.clamp(max=len(ids) - 1)].to(candidates.tokens.device)  # (steps, levels)
        is_truth = candidates.tokens == truth[:, :, None]  # (steps, levels, width)
        # Candidates of missing states have probability 0, and tokens beyond the answer do not exist.
        is_truth &= (candidates.probabilities > 0) & (ahead < answer.stop)[:, :, None].to(is_truth.device)
        ranks.append(torch.where(is_truth.any(-1), is_truth.float().argmax(-1), candidates.tokens.shape[-1]).cpu())
        probabilities.append(candidates.probabilities.cpu())
    if not len(steps):
        return Observed(torch.zeros(0, len(pairs), width), torch.zeros(0, len(pairs), dtype=torch.long))
    return Observed(torch.cat(probabilities), torch.cat(ranks))


def with_steps(observed: Sequence[Observed]) -> list[Observed]:
    """Return the answers that have a step. An answer of one token has none: nothing could be drafted for it.

    Raises:
        LMTPError: No answer has a step.
    """
    kept = [answer for answer in observed if len(answer)]
    if not kept:
        raise LMTPError(
            "No answer has more than one token, so no draft can be measured: give other prompts or a larger "
            "--max-new-tokens."
        )
    return kept


def accuracies(observed: Sequence[Observed]) -> list[list[float]]:
    """Return, for each level, the share of steps in which the candidate of each rank is the text's token."""
    ranks = torch.cat([answer.ranks for answer in observed])  # (steps of all answers, levels)
    width = observed[0].probabilities.shape[2]
    return [
        [float((ranks[:, level] == rank).double().mean()) for rank in range(width)] for level in range(ranks.shape[1])
    ]


def accepted_of_paths(answer: Observed, paths: Sequence[Sequence[int]]) -> list[int]:
    """Return, for each step of an answer, how many levels a static tree would accept.

    Args:
        answer: The observed answer.
        paths: Paths of the tree's nodes, see `decoding.tree.fixed`.
    """
    known, accepted = {tuple(path) for path in paths}, []
    for ranks in answer.ranks.tolist():
        path = ()
        while len(path) < len(ranks) and (*path, ranks[len(path)]) in known:
            path = (*path, ranks[len(path)])
        accepted.append(len(path))
    return accepted


def tau_of_paths(observed: Sequence[Observed], paths: Sequence[Sequence[int]]) -> float:
    """Return tau with a static tree, given by its paths (`decoding.tree.fixed`)."""
    return _tau(accepted_of_paths(answer, paths) for answer in observed)


def accepted_levels(answer: Observed, nodes: int) -> tuple[Tensor, Tensor]:
    """Return how many levels dynamic trees would accept in each step of an answer.

    Args:
        answer: The observed answer.
        nodes: Number of nodes of the largest tree.

    Returns:
        (steps, nodes) number of levels that the tree of the first n nodes accepts, at index n - 1; (steps, nodes)
        values of the nodes.
    """
    tree = grow(answer.probabilities, nodes)  # tensors of (steps, nodes): steps take the place of the batch
    # (steps, 1 + levels): the root, at level 0, has rank 0.
    true_ranks = torch.cat([torch.zeros(len(answer), 1, dtype=torch.long), answer.ranks], dim=1)
    is_candidate = tree.ranks == true_ranks.gather(1, tree.levels)  # (steps, nodes)
    # A node is accepted if it is the text's token and its parent is accepted. Parents precede their children.
    on_path = torch.zeros_like(is_candidate)
    on_path[:, 0] = True
    for node in range(1, tree.nodes):
        above = on_path.gather(1, tree.parents[:, node : node + 1])[:, 0]  # (steps,)
        on_path[:, node] = above & is_candidate[:, node]
    return (tree.levels * on_path).cummax(dim=1).values, tree.values


def tau_of_dynamic(observed: Sequence[Observed], sizes: Sequence[int]) -> dict[int, float]:
    """Return tau with dynamic trees of each size."""
    levels = [accepted_levels(answer, max(sizes))[0] for answer in observed]
    return {size: _tau(of[:, min(size, of.shape[1]) - 1].tolist() for of in levels) for size in sizes}


def rate_of_cut_trees(
    observed: Sequence[Observed],
    config: TreeConfig,
    draft_cost: float,
    calibration_class: type[AcceptanceCalibration] = AcceptanceCalibration,
) -> tuple[float, float]:
    """Return tau and tokens per unit of cost with dynamic trees that `TreeConfig.best_size` cuts in each step.

    Args:
        observed: The observed answers.
        config: A dynamic tree with a cost curve.
        draft_cost: Cost of one draft, in the unit of the cost curve.
        calibration_class: Calibration of the heads' probabilities. Each answer gets a new instance.
    """
    tokens = steps = 0
    cost = 0.0
    for answer in observed:
        levels, values = accepted_levels(answer, config.nodes)
        calibration, step = calibration_class(), 0
        while step < len(answer):
            row = values[step].tolist()
            nodes = config.best_size([row], calibration.ratio)
            accepted = int(levels[step, nodes - 1])
            calibration.learn(sum(row[1:nodes]), accepted)
            reached = min(accepted + 1, len(answer) - step)
            steps, tokens, step = steps + 1, tokens + reached, step + reached
            cost += config.cost.at(nodes) + draft_cost
    return tokens / steps, tokens / cost


def steps_of(accepted: Sequence[int]) -> list[int]:
    """Return the number of tokens of each step that decodes an answer.

    Args:
        accepted: For each place of the answer, the number of levels that a step which starts there accepts.
    """
    steps, place = [], 0
    while place < len(accepted):
        steps.append(min(accepted[place] + 1, len(accepted) - place))
        place += steps[-1]
    return steps


def _tau(accepted: Iterable[Sequence[int]]) -> float:
    """Return tau over answers, each given as `steps_of` takes it."""
    steps = [tokens for answer in accepted for tokens in steps_of(answer)]
    return sum(steps) / max(len(steps), 1)
