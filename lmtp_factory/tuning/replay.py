"""What look-back decoding would accept on text that the model has already written, for any tree, without decoding again.

Greedy decoding accepts a node exactly when its path is how the text goes on. So one forward over the text gives every
step's candidates, and from their ranks follows each tree's number of tokens a forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import geometry
from ..decoding.draft import Window, propose_candidates
from ..decoding.tree import grow
from ..decoding.tree_config import AcceptanceCalibration, TreeConfig
from ..evaluation.scoring import Row


_STEPS_AT_ONCE = 64  # so many steps' candidates exist at a time, each level's logits over the whole vocabulary


@dataclass(frozen=True)
class Observed:
    """One answer, seen from every state that a step could start from.

    Attributes:
        probabilities: (steps, levels, width) of each level's candidates.
        ranks: (steps, levels) int64: which candidate the text goes on with; `width` where none does.
    """

    probabilities: Tensor
    ranks: Tensor

    def __len__(self) -> int:
        return len(self.ranks)


@torch.no_grad()
def observe(model: nn.Module, row: Row, width: int) -> Observed:
    """Candidates and truth for every step of one answer.

    Candidates are those that decoding would propose: `propose_candidates` on each step's window of states.
    """
    prompt, answer = row
    ids = torch.tensor([prompt + answer], device=model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]  # (length, hidden)
    offsets = model.leap_heads.config.offsets
    size, levels = geometry.window(offsets), geometry.reach(offsets) - 1

    # A step starts at state t: its root is token t + 1 and level l drafts token t + 1 + l. Nothing follows the last token.
    steps = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 2)
    probabilities, ranks = [], []
    for part in steps.split(_STEPS_AT_ONCE):
        places = part[:, None] - torch.arange(size - 1, -1, -1)  # (steps, window) of the states, oldest first
        window = Window.of_states(hidden[places.clamp(min=0)], is_real=places >= 0)
        candidates = propose_candidates(model, window, levels, width)  # (steps, levels, width)
        ahead = part[:, None] + 1 + torch.arange(1, levels + 1)  # (steps, levels) of the drafted tokens
        truth = ids[0, ahead.clamp(max=ids.shape[1] - 1)].to(candidates.tokens.device)
        is_truth = candidates.tokens == truth[:, :, None]
        is_truth &= (candidates.probabilities > 0) & (ahead < ids.shape[1])[:, :, None].to(is_truth.device)
        ranks.append(torch.where(is_truth.any(-1), is_truth.float().argmax(-1), candidates.tokens.shape[-1]).cpu())
        probabilities.append(candidates.probabilities.cpu())
    if not len(steps):
        return Observed(torch.zeros(0, levels, width), torch.zeros(0, levels, dtype=torch.long))
    return Observed(torch.cat(probabilities), torch.cat(ranks))


def accuracies(observed: Sequence[Observed]) -> list[list[float]]:
    """For each level, how often the candidate of each rank is how the text goes on."""
    ranks = torch.cat([answer.ranks for answer in observed])
    width = observed[0].probabilities.shape[2]
    return [
        [float((ranks[:, level] == rank).double().mean()) for rank in range(width)] for level in range(ranks.shape[1])
    ]


def tau_of_paths(observed: Sequence[Observed], paths: Sequence[Sequence[int]]) -> float:
    """Tokens a forward with a fixed tree (`lmtp_factory.decoding.tree.fixed`)."""
    known = {tuple(path) for path in paths}

    def accepted(answer: Observed, step: int) -> int:
        path, ranks = (), answer.ranks[step].tolist()
        while len(path) < len(ranks) and (*path, ranks[len(path)]) in known:
            path = (*path, ranks[len(path)])
        return len(path)

    return _tau(observed, accepted)


def accepted_levels(answer: Observed, nodes: int) -> tuple[Tensor, Tensor]:
    """Of dynamic trees, for every step of an answer.

    Returns:
        (steps, nodes) how many levels the tree of the first n nodes would have accepted, at index n - 1; and the nodes'
        (steps, nodes) values.
    """
    tree = grow(answer.probabilities, nodes)
    true_ranks = torch.cat([torch.zeros(len(answer), 1, dtype=torch.long), answer.ranks], dim=1)
    is_candidate = tree.ranks == true_ranks.gather(1, tree.levels)
    on_path = torch.zeros_like(is_candidate)
    on_path[:, 0] = True
    for node in range(1, tree.nodes):
        above = on_path.gather(1, tree.parents[:, node : node + 1])[:, 0]
        on_path[:, node] = above & is_candidate[:, node]
    return (tree.levels * on_path).cummax(dim=1).values, tree.values


def tau_of_dynamic(observed: Sequence[Observed], sizes: Sequence[int]) -> dict[int, float]:
    """Tokens a forward with dynamic trees of each size."""
    levels = {id(answer): accepted_levels(answer, max(sizes))[0] for answer in observed}

    def with_size(size: int) -> Callable[[Observed, int], int]:
        return lambda answer, step: int(levels[id(answer)][step, min(size, levels[id(answer)].shape[1]) - 1])

    return {size: _tau(observed, with_size(size)) for size in sizes}


def rate_of_cut_trees(
    observed: Sequence[Observed],
    config: TreeConfig,
    draft_cost: float,
    calibration_class: type[AcceptanceCalibration] = AcceptanceCalibration,
) -> tuple[float, float]:
    """Tokens per forward, and per unit of the tree's cost curve, with dynamic trees that are cut in each step.

    Args:
        draft_cost: of a draft, in the unit of the cost curve.
        calibration_class: of the heads' probabilities, one for each answer.
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


def _tau(observed: Sequence[Observed], accepted: Callable[[Observed, int], int]) -> float:
    tokens = steps = 0
    for answer in observed:
        step = 0
        while step < len(answer):
            reached = min(accepted(answer, step) + 1, len(answer) - step)
            step, steps, tokens = step + reached, steps + 1, tokens + reached
    return tokens / max(steps, 1)
