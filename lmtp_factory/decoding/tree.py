"""Draft trees (Medusa, arXiv 2401.10774, section 2.3; DDTree, arXiv 2604.12989).

Node 0 is the root: the token chosen in the last step, whose hidden state the next forward computes. A node of level `l`
drafts the token `l` positions after the root (depth `l + 1` of the geometry) with one of the heads' candidates for that
level. Candidates do not depend on the path from the root, so a node is defined by its parent and the rank of its
candidate. Parents precede their children, and nodes are sorted by decreasing value, so the first n nodes are the best
tree of n nodes.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


# Children are discounted by 1e-3 nats so that sorting by value keeps parents first, even at probability 1.
# Log-probabilities are clamped at -50, because with -inf a child and its parent would be equal.
_CHILD_DISCOUNT = -1e-3
_MIN_LOG_PROBABILITY = -50.0


@dataclass(frozen=True)
class Tree:
    """The shape of one step's draft. `batch` is 1 if all rows share the tree.

    Attributes:
        parents: (batch, nodes) int64 index of each node's parent. The root is its own parent.
        levels: (batch, nodes) int64 distance from the root.
        ranks: (batch, nodes) int64 rank of each node's candidate, 0 for the most probable. The root's rank is 0.
        height: Upper bound of `levels`.
        values: (batch, nodes) estimated probability that a node is accepted; None for static trees.
    """

    parents: Tensor
    levels: Tensor
    ranks: Tensor
    height: int
    values: Tensor | None = None
    # Index tensors and masks, cached because a static tree is used in every step.
    _cached: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def nodes(self) -> int:
        """Number of nodes, including the root."""
        return self.parents.shape[1]

    def first(self, nodes: int) -> "Tree":
        """Return the tree of the first `nodes` nodes."""
        if nodes == self.nodes:
            return self
        values = None if self.values is None else self.values[:, :nodes]
        height = min(self.height, nodes - 1)
        return Tree(self.parents[:, :nodes], self.levels[:, :nodes], self.ranks[:, :nodes], height, values)

    def tokens(self, root: Tensor, candidates: Tensor) -> Tensor:
        """Look up the tokens of all nodes.

        Args:
            root: (batch,) token ids of the roots.
            candidates: (batch, levels, width) token ids by level and rank.

        Returns:
            (batch, nodes) token ids.
        """
        if self.nodes == 1:
            return root[:, None]
        index = self._index(candidates.shape[2]).expand(len(candidates), -1)  # (batch, nodes - 1)
        return torch.cat([root[:, None], candidates.flatten(1).gather(1, index)], dim=1)

    def _index(self, width: int) -> Tensor:
        """Return the (batch, nodes - 1) indices of the nodes' tokens in flattened (levels * width) candidates."""
        if ("index", width) not in self._cached:
            self._cached["index", width] = ((self.levels - 1) * width + self.ranks)[:, 1:]  # the root has none
        return self._cached["index", width]

    def prepare(self, width: int, window: int | None) -> None:
        """Compute what `tokens` and `ancestors` keep, before the first step needs it."""
        self._index(width)
        for size in (None, window):
            self.ancestors(size)

    def ancestors(self, window: int | None = None) -> Tensor:
        """Return the tree's attention mask.

        Args:
            window: Number of levels that a node attends to, its own included; None for all.

        Returns:
            (batch, nodes, nodes) bool. Element [b, i, j] is True if node j is node i or an ancestor of it.
        """
        if window is not None and window > self.height:
            window = None
        if ("ancestors", window) not in self._cached:
            self._cached["ancestors", window] = self._ancestors() if window is None else self._near(window)
        return self._cached["ancestors", window]

    def _near(self, window: int) -> Tensor:
        return self.ancestors() & ((self.levels[:, :, None] - self.levels[:, None, :]) < window)

    def _ancestors(self) -> Tensor:
        # (batch, nodes, nodes): each node attends to itself and, by the scatter, to its parent.
        seen = torch.eye(self.nodes, dtype=torch.bool, device=self.parents.device).repeat(len(self.parents), 1, 1)
        seen.scatter_(2, self.parents[:, :, None], True)
        # `seen` covers 1 level up. Each squaring of this reachability matrix doubles the number of levels.
        for _ in range(max(self.height - 1, 0).bit_length()):
            seen = (seen.float() @ seen.float()) > 0
        return seen


def fixed(paths: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tree:
    """Build a static tree from the paths of its nodes.

    Args:
        paths: For each node the candidate ranks at levels 1, 2, ... on the way from the root; `()` is the root. Parents
            precede their children.
        device: Device of the tree's tensors.

    Raises:
        ValueError: The first path is not the root, a parent is missing or comes after its child, or a rank is negative.
    """
    index = {tuple(path): node for node, path in enumerate(paths)}
    if not paths or tuple(paths[0]) != ():
        raise ValueError("A tree starts with its root: begin the list with the empty path ().")
    parents = [0]
    for node, path in enumerate(paths[1:], 1):
        parent = index.get(tuple(path[:-1]))
        if parent is None or parent >= node:
            raise ValueError(
                f"The parent of path {tuple(path)} does not precede it: list parents before their children."
            )
        parents.append(parent)
    levels = [len(path) for path in paths]
    ranks = [path[-1] if path else 0 for path in paths]
    if min(ranks) < 0:
        raise ValueError(f"A candidate has the rank {min(ranks)}, but ranks start at 0.")
    rows = (torch.tensor([row], dtype=torch.long, device=device) for row in (parents, levels, ranks))
    return Tree(*rows, height=max(levels))


def chain_paths(nodes: int) -> list[tuple[int, ...]]:
    """Return the paths of a chain: the most probable candidate of each level."""
    return [(0,) * level for level in range(nodes)]


def assumed_accuracies(levels: int, width: int = 8) -> list[list[float]]:
    """Return accuracies for `best_first_paths` if none were measured. They decrease with the level and the rank."""
    return [[0.3 * 0.6**level * 0.4**rank for rank in range(width)] for level in range(levels)]


def best_first_paths(accuracies: Sequence[Sequence[float]], nodes: int) -> list[tuple[int, ...]]:
    """Return the `nodes` paths of largest value, root first. The value of a path is the product of its accuracies.

    Args:
        accuracies: For each level the accuracy of the candidate of each rank, decreasing with the rank.
        nodes: Number of paths, including the root.
    """
    paths: list[tuple[int, ...]] = [()]
    # Min-heap of (-value, path, value of the parent). Each path enters after its parent and its better sibling.
    frontier = [(-accuracies[0][0], (0,), 1.0)] if accuracies else []
    while frontier and len(paths) < nodes:
        negative, path, above = heapq.heappop(frontier)
        paths.append(path)
        level, rank = len(path) - 1, path[-1]
        if rank + 1 < len(accuracies[level]):
            heapq.heappush(frontier, (-above * accuracies[level][rank + 1], (*path[:-1], rank + 1), above))
        if level + 1 < len(accuracies):
            heapq.heappush(frontier, (negative * accuracies[level + 1][0], (*path, 0), -negative))
    return paths


def grow(probabilities: Tensor, nodes: int) -> Tree:
    """Build the best-first tree for one step's probabilities, level by level on their device.

    Values decrease with depth, so a path outside the `nodes - 1` best paths of its level is not among the `nodes - 1`
    best paths of all levels. Each level therefore extends at most `nodes - 1` paths.

    Args:
        probabilities: (batch, levels, width) candidate probabilities, decreasing with the rank.
        nodes: Number of nodes, including the root.

    Returns:
        The tree, with min(`nodes`, all paths + 1) nodes.
    """
    batch, height, width = probabilities.shape
    drafted = min(nodes - 1, sum(width**level for level in range(1, height + 1)))
    # (batch, levels, width). Overflowing heads give NaN or infinity, which must not break the sort either.
    log_probabilities = probabilities.float().log().nan_to_num(nan=_MIN_LOG_PROBABILITY)
    log_probabilities = log_probabilities.clamp(_MIN_LOG_PROBABILITY, 0.0) + _CHILD_DISCOUNT
    values, parents, ranks, levels = [], [], [], []
    above = log_probabilities.new_zeros(batch, 1)  # values of the previous level, at first of the root
    first_above = 0  # index of the previous level's first node
    for level in range(height):
        # (batch, above, 1) + (batch, 1, width) -> (batch, above * width): every candidate below every node above.
        paths = (above[:, :, None] + log_probabilities[:, level, None, :]).flatten(1)
        above_size = above.shape[1]
        above, chosen = paths.topk(min(drafted, paths.shape[1]), dim=1)  # (batch, nodes of this level)
        values.append(above)
        ranks.append(chosen % width)
        parents.append(chosen // width + first_above)
        levels.append(torch.full_like(chosen, level + 1))
        first_above += above_size
    values, kept = torch.cat(values, dim=1).topk(drafted, dim=1)  # (batch, drafted)
    parents, ranks, levels = (torch.cat(part, dim=1).gather(1, kept) for part in (parents, ranks, levels))

    # `parents` are indices in order of construction (0 is the root). Map them to indices after the sort.
    new_index = torch.zeros(batch, first_above + above.shape[1], dtype=torch.long, device=kept.device)
    sorted_index = torch.arange(1, drafted + 1, device=kept.device).expand(batch, -1)
    new_index.scatter_(1, kept + 1, sorted_index)
    root = kept.new_zeros(batch, 1)
    return Tree(
        parents=torch.cat([root, new_index.gather(1, parents)], dim=1),
        levels=torch.cat([root, levels], dim=1),
        ranks=torch.cat([root, ranks], dim=1),
        height=min(height, drafted),
        values=torch.cat([values.new_zeros(batch, 1), values], dim=1).exp(),
    )
