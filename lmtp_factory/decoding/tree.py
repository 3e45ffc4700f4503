"""Draft trees: which drafted token hangs below which (Medusa, arXiv 2401.10774, section 2.3; DDTree, arXiv 2604.12989).

Node 0 is the root: the token that the last step decided, whose hidden state the next forward computes. A node of level
`l` drafts the token `l` places after the root (depth `l + 1` of the geometry) and takes one of the candidates that
the heads name for that place. The candidates of a place do not depend on the path to it, so a node is its parent and
the rank of its candidate. Parents stand before their children, and more valuable nodes before less valuable ones, so the
first n nodes of a tree are the best tree of n nodes.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


# Logarithms. A child is worth a trifle less than its parent even at probability 1, and never infinitely little, so that
# a sort keeps parents in front.
_CHILD_DISCOUNT = -1e-3
_LEAST = -50.0


@dataclass(frozen=True)
class Tree:
    """The shape of one step's draft; `batch` is 1 where all rows share it.

    Attributes:
        parents: (batch, nodes) int64; the root is its own parent.
        levels: (batch, nodes) int64, distance from the root.
        ranks: (batch, nodes) int64, 0 for the most probable candidate of a level; the root's is 0.
        height: no level is above it.
        values: (batch, nodes) probability that a node is accepted, as far as the heads know; None for fixed shapes.
    """

    parents: Tensor
    levels: Tensor
    ranks: Tensor
    height: int
    values: Tensor | None = None
    _made: dict = field(default_factory=dict, init=False, repr=False, compare=False)  # a shape is used step after step

    @property
    def nodes(self) -> int:
        """Number of nodes, the root counted."""
        return self.parents.shape[1]

    def first(self, nodes: int) -> "Tree":
        """The tree of the first `nodes` nodes."""
        if nodes == self.nodes:
            return self
        values = None if self.values is None else self.values[:, :nodes]
        return Tree(self.parents[:, :nodes], self.levels[:, :nodes], self.ranks[:, :nodes], self.height, values)

    def tokens(self, root: Tensor, candidates: Tensor) -> Tensor:
        """(batch, nodes) token ids from the roots' (batch,) and the candidates' (batch, levels, ranks)."""
        if self.nodes == 1:
            return root[:, None]
        batch, levels, width = candidates.shape
        if ("index", width) not in self._made:
            self._made["index", width] = ((self.levels - 1) * width + self.ranks)[:, 1:]
        index = self._made["index", width].expand(batch, -1)
        return torch.cat([root[:, None], candidates.flatten(1).gather(1, index)], dim=1)

    def ancestors(self, window: int | None = None) -> Tensor:
        """(batch, nodes, nodes) bool: whether the column's node is the row's node or an ancestor of it.

        Args:
            window: how many levels a node sees, its own counted; None for all.
        """
        if window is not None and window > self.height:
            window = None
        if ("ancestors", window) not in self._made:
            self._made["ancestors", window] = self._ancestors() if window is None else self._near(window)
        return self._made["ancestors", window]

    def _near(self, window: int) -> Tensor:
        return self.ancestors() & ((self.levels[:, :, None] - self.levels[:, None, :]) < window)

    def _ancestors(self) -> Tensor:
        seen = torch.eye(self.nodes, dtype=torch.bool, device=self.parents.device).repeat(len(self.parents), 1, 1)
        seen.scatter_(2, self.parents[:, :, None], True)
        for _ in range(max(self.height - 1, 0).bit_length()):  # each squaring doubles how far up a node sees
            seen = (seen.float() @ seen.float()) > 0
        return seen


def fixed(paths: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tree:
    """A tree from its nodes' paths: the ranks taken at level 1, 2, ..., the node's own last. `()` is the root.

    Raises:
        ValueError: the root is missing, or a path's parent does not stand before it.
    """
    index = {tuple(path): node for node, path in enumerate(paths)}
    if not paths or tuple(paths[0]) != ():
        raise ValueError("A tree starts with its root, the empty path.")
    parents = [0]
    for node, path in enumerate(paths[1:], 1):
        parent = index.get(tuple(path[:-1]))
        if parent is None or parent >= node:
            raise ValueError(f"The parent of path {tuple(path)} has to stand before it.")
        parents.append(parent)
    levels = [len(path) for path in paths]
    ranks = [path[-1] if path else 0 for path in paths]
    rows = (torch.tensor([row], dtype=torch.long, device=device) for row in (parents, levels, ranks))
    return Tree(*rows, height=max(levels))


def chain_paths(nodes: int) -> list[tuple[int, ...]]:
    """The most probable candidate of each level, one below the other."""
    return [(0,) * level for level in range(nodes)]


def best_first_paths(accuracies: Sequence[Sequence[float]], nodes: int) -> list[tuple[int, ...]]:
    """The `nodes` paths of greatest value, the root first, where a path's value is the product of its accuracies.

    Args:
        accuracies: for each level, how often the candidate of each rank is right, falling with the rank.
    """
    paths: list[tuple[int, ...]] = [()]
    frontier = [(-accuracies[0][0], (0,), 1.0)] if accuracies else []  # (-value, path, its parent's value)
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
    """The best-first tree over this step's own probabilities, level by level on their device.

    No path outside a level's `nodes - 1` best can be among the `nodes - 1` best of all, because values only fall
    with depth; so each level extends at most that many.

    Args:
        probabilities: (batch, levels, width) of the candidates, falling with the rank.
        nodes: of the tree, the root counted.
    """
    batch, height, width = probabilities.shape
    drafted = min(nodes - 1, sum(width**level for level in range(1, height + 1)))
    # Heads that overflow give NaN or infinity, which must not break the order either.
    logarithms = probabilities.float().log().nan_to_num(nan=_LEAST).clamp(_LEAST, 0.0) + _CHILD_DISCOUNT
    values, parents, ranks, levels = [], [], [], []
    above, first_above = logarithms.new_zeros(batch, 1), 0  # the level above, and its first node's number
    for level in range(height):
        paths = (above[:, :, None] + logarithms[:, level, None, :]).flatten(1)
        above_size = above.shape[1]
        above, chosen = paths.topk(min(drafted, paths.shape[1]), dim=1)
        values.append(above)
        ranks.append(chosen % width)
        parents.append(chosen // width + first_above)
        levels.append(torch.full_like(chosen, level + 1))
        first_above += above_size
    values, kept = torch.cat(values, dim=1).topk(drafted, dim=1)
    parents, ranks, levels = (torch.cat(part, dim=1).gather(1, kept) for part in (parents, ranks, levels))

    # Parents count nodes in the order they were made (0 is the root); say where the kept ones stand now.
    made = torch.zeros(batch, first_above + above.shape[1], dtype=torch.long, device=kept.device)
    place = torch.arange(1, drafted + 1, device=kept.device).expand(batch, -1)
    made.scatter_(1, kept + 1, place)
    root = kept.new_zeros(batch, 1)
    return Tree(
        parents=torch.cat([root, made.gather(1, parents)], dim=1),
        levels=torch.cat([root, levels], dim=1),
        ranks=torch.cat([root, ranks], dim=1),
        height=min(height, drafted),
        values=torch.cat([values.new_zeros(batch, 1), values], dim=1).exp(),
    )
