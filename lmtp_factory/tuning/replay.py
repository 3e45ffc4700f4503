"""What look-back decoding would accept on text that the model has already written, for any tree, without decoding again.

Greedy decoding accepts a node exactly when its path is how the text goes on. So one forward over the text gives every
step's candidates, and from their ranks follows each tree's number of tokens a forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import geometry
from ..decoding.plan import TreePlan, Trust
from ..decoding.tree import grow
from ..evaluation.scoring import Row
from ..modeling.heads import unembed
from ..modeling.lmtp import softcap_of


_ROWS_AT_ONCE = 256  # logits of so many states exist at a time


@dataclass(frozen=True)
class Observed:
    """One answer, seen from every state that a step could start from.

    Attributes:
        probabilities: (steps, levels, width) of each level's candidates.
        ranks: (steps, levels) int64: which candidate the text goes on with; ``width`` where none does.
    """

    probabilities: Tensor
    ranks: Tensor

    def __len__(self) -> int:
        return len(self.ranks)


@torch.no_grad()
def observe(model: nn.Module, row: Row, width: int) -> Observed:
    """Candidates and truth for every step of one answer."""
    prompt, answer = row
    ids = torch.tensor([prompt + answer], device=model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    offsets = model.leap_heads.config.offsets
    lm_head, softcap = model.get_output_embeddings(), softcap_of(model)
    tokens, probabilities = [], []
    for head in model.leap_heads.heads:
        parts = []
        for states in hidden.split(_ROWS_AT_ONCE):
            logits = unembed(head.features(states), head.unembed or lm_head, softcap).float()
            best, chosen = logits.topk(width, dim=-1)
            parts.append((chosen, (best - logits.logsumexp(-1, keepdim=True)).exp()))
        tokens.append(torch.cat([part[0] for part in parts]))
        probabilities.append(torch.cat([part[1] for part in parts]))

    # A step starts at state t: its root is token t + 1 and level l drafts token t + 1 + l. Nothing follows the last token.
    steps = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 2)
    step_probabilities, ranks = [], []
    for level in range(1, geometry.reach(offsets)):
        head, back = geometry.lookback(level + 1, offsets)
        states = (steps - back).clamp(min=0)
        place = (steps + 1 + level).clamp(max=ids.shape[1] - 1)
        is_truth = tokens[head - 1][states] == ids[0, place][:, None]
        is_truth &= ((steps + 1 + level < ids.shape[1]) & (steps >= back))[:, None].to(is_truth.device)
        ranks.append(torch.where(is_truth.any(1), is_truth.float().argmax(1), width))
        step_probabilities.append(probabilities[head - 1][states] * (steps >= back)[:, None].to(is_truth.device))
    return Observed(torch.stack(step_probabilities, dim=1).cpu(), torch.stack(ranks, dim=1).cpu())


def accuracies(observed: Sequence[Observed]) -> list[list[float]]:
    """For each level, how often the candidate of each rank is how the text goes on."""
    ranks = torch.cat([answer.ranks for answer in observed])
    width = observed[0].probabilities.shape[2]
    return [
        [float((ranks[:, level] == rank).double().mean()) for rank in range(width)] for level in range(ranks.shape[1])
    ]


def tau_of_paths(observed: Sequence[Observed], paths: Sequence[Sequence[int]]) -> float:
    """Tokens a forward with a fixed tree (:func:`lmtp_factory.decoding.tree.fixed`)."""
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


def rate_of_cut_trees(observed: Sequence[Observed], plan: TreePlan, draft_cost: float) -> tuple[float, float]:
    """Tokens a forward, and tokens per unit of the plan's cost, with dynamic trees cut in each step by their worth."""
    tokens = steps = 0
    cost = 0.0
    for answer in observed:
        levels, values = accepted_levels(answer, plan.nodes)
        trust, step = Trust(), 0
        while step < len(answer):
            row = values[step].tolist()
            nodes = plan.best_size([row], trust.value)
            accepted = int(levels[step, nodes - 1])
            trust.learn(sum(row[1:nodes]), accepted)
            reached = min(accepted + 1, len(answer) - step)
            steps, tokens, step = steps + 1, tokens + reached, step + reached
            cost += plan.cost.at(nodes) + draft_cost
    return tokens / steps, tokens / cost


def _tau(observed: Sequence[Observed], accepted: Callable[[Observed, int], int]) -> float:
    tokens = steps = 0
    for answer in observed:
        step = 0
        while step < len(answer):
            reached = min(accepted(answer, step) + 1, len(answer) - step)
            step, steps, tokens = step + reached, steps + 1, tokens + reached
    return tokens / max(steps, 1)
