"""The branches that a step accepts, on the device, where the next step needs them, and on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .tree import Tree


@dataclass(frozen=True)
class Branches:
    """The accepted branch of each row, root first.

    Attributes:
        on_host: Indices of each row's accepted nodes. Empty for rows that had ended before. Of a row that ends in this step
            they stop where it ends.
        nodes: (batch, longest or more) the same on the device, each row filled up with node 0. Here a row that ends in this
            step goes on: the host decides where rows end.
        counts: (batch, 1) number of nodes of each row's branch on the device.
        roots: (batch,) newest token of each row, root of the next step, on the device.
    """

    on_host: list[list[int]]
    nodes: Tensor
    counts: Tensor
    roots: Tensor

    @classmethod
    def sent(cls, branches: list[list[int]], roots: Sequence[int], device: torch.device) -> "Branches":
        """Copy branches and roots that the host has chosen to a device, in one transfer.

        Args:
            branches: Indices of each row's accepted nodes, root first. Empty for rows that had ended before.
            roots: Newest token of each row.
            device: Where they go.
        """
        longest = max(map(len, branches))
        rows = [
            [root, len(branch), *branch, *[0] * (longest - len(branch))] for root, branch in zip(roots, branches)
        ]
        sent = torch.tensor(rows).to(device, non_blocking=True)  # (batch, 2 + longest)
        return cls(branches, sent[:, 2:], sent[:, 1:2], sent[:, 0])


def follow(chosen: Tensor, tokens: Tensor, tree: Tree) -> tuple[Tensor, Tensor, Tensor]:
    """Walk down a tree along the tokens that the model chooses at its nodes, without the host.

    Siblings have different tokens, because a level's candidates are different tokens. So at most one node of each level is
    reached.

    Args:
        chosen: (batch, nodes) token that the model chooses at each node.
        tokens: (batch, nodes) token of each node.
        tree: The tree.

    Returns:
        (batch, height + 1) indices of the accepted nodes, root first, filled up with 0; (batch, height + 1) tokens that the
        model chooses at these; (batch, 1) number of accepted nodes, at least 1 for the root.
    """
    if tree.nodes == 1:
        return torch.zeros_like(chosen), chosen, torch.ones_like(chosen)
    parents = tree.parents.expand_as(tokens)  # (batch, nodes)
    differs = tokens != chosen.gather(1, parents)  # (batch, nodes)
    # A node is accepted if it and all of its ancestors agree with the model. The root was accepted in the step before.
    accepted = ~(tree.ancestors() & differs[:, None, :])[:, :, 1:].any(-1)  # (batch, nodes)
    indices = torch.arange(tree.nodes, device=tokens.device) * accepted  # (batch, nodes), 0 for rejected nodes
    branch = indices.new_zeros(len(tokens), tree.height + 1)
    branch = branch.scatter_reduce_(1, tree.levels.expand_as(tokens), indices, "amax")  # (batch, height + 1)
    return branch, chosen.gather(1, branch), accepted.sum(1, keepdim=True)
