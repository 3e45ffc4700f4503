"""The branches that a step accepts, on the device, where the next step needs them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .tree import Tree


@dataclass(frozen=True)
class Branches:
    """The accepted branch of each row on the device, root first. Of rows that had ended before only `counts` means anything.

    Attributes:
        nodes: (batch, longest or more) indices of each row's accepted nodes, filled up with node 0.
        counts: (batch, 1) number of accepted nodes; 0 for rows that had ended before.
        roots: (batch,) newest token of each row, root of the next step.
    """

    nodes: Tensor
    counts: Tensor
    roots: Tensor

    @classmethod
    def sent(cls, branches: Sequence[Sequence[int]], roots: Sequence[int], device: torch.device) -> "Branches":
        """Copy what the host has accepted to a device, in one transfer.

        Args:
            branches: Indices of each row's accepted nodes, root first. Empty for rows that had ended before.
            roots: Newest token of each row.
            device: Where they go.
        """
        longest = max(map(len, branches))
        rows = [[root, len(branch), *branch, *[0] * (longest - len(branch))] for root, branch in zip(roots, branches)]
        sent = torch.tensor(rows).to(device, non_blocking=True)  # (batch, 2 + longest)
        return cls(sent[:, 2:], sent[:, 1:2], sent[:, 0])


def follow(chosen: Tensor, tokens: Tensor, tree: Tree, goes_on: Tensor | None = None) -> tuple[Branches, Tensor]:
    """Walk down a tree along the tokens that the model chooses at its nodes, without the host.

    Siblings have different tokens, because a level's candidates are different tokens. So at most one node of each level is
    reached. The branch of a row that ends in this step may go on behind its end, which only the host knows.

    Args:
        chosen: (batch, nodes) token that the model chooses at each node.
        tokens: (batch, nodes) token of each node.
        tree: The tree.
        goes_on: (batch, 1) bool, False for rows that had ended before; None if there are none.

    Returns:
        The branches, and all that the host has to read: (batch, 1 + 2 (height + 1)) the count, the branch's nodes and the
        tokens that the model chose at these.
    """
    if tree.nodes == 1:
        nodes, appended, counts, roots = torch.zeros_like(chosen), chosen, torch.ones_like(chosen), chosen[:, 0]
    else:
        agrees = tokens == chosen.gather(1, tree.parents.expand_as(tokens))  # (batch, nodes)
        # A node is accepted if it and all of its ancestors agree with the model; the root was in the step before. Of bools
        # `<=` is implication.
        accepted = (tree.ancestors() <= agrees[:, None, :])[:, :, 1:].all(-1)  # (batch, nodes)
        indices = torch.arange(tree.nodes, device=tokens.device) * accepted  # (batch, nodes), 0 for rejected nodes
        nodes = indices.new_zeros(len(tokens), tree.height + 1)
        nodes.scatter_reduce_(1, tree.levels.expand_as(tokens), indices, "amax")  # (batch, height + 1)
        counts = accepted.sum(1, keepdim=True)  # (batch, 1)
        appended = chosen.gather(1, nodes)  # (batch, height + 1)
        roots = appended.gather(1, counts - 1)[:, 0]  # (batch,)
    if goes_on is not None:
        counts = counts * goes_on
    return Branches(nodes, counts, roots), torch.cat([counts, nodes, appended], dim=1)
