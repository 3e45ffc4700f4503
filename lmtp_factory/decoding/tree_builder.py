"""Building each step's draft tree, or no tree if a draft is not expected to pay."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import geometry
from .draft import propose_candidates
from .draft_budget import PROBE_NODES, DraftBudget
from .state import DecodeState
from .tree import Tree, fixed, grow
from .tree_config import AcceptanceCalibration, TreeConfig


class TreeBuilder:
    """Builds the trees of one generation.

    Args:
        model: A model with leap heads.
        config: Kind and size of the trees.
        constant: Give every draft tree the same number of nodes, for compiled forwards.
        device: Device of the roots.
    """

    def __init__(self, model: nn.Module, config: TreeConfig, constant: bool, device: torch.device):
        self.model, self.config, self.constant = model, config, constant
        self.reach = geometry.reach(model.leap_heads.config.offsets) - 1  # number of levels that the heads can draft
        self.root = fixed([()], device)
        self.shape: Tree | None = None  # the static tree without the levels that the heads cannot draft
        self.width = config.width  # number of candidates per level
        if (paths := config.fixed_paths()) is not None:
            kept = [path for path in paths if len(path) <= self.reach]
            self.shape, self.probe = fixed(kept, device), fixed(kept[:PROBE_NODES], device)
            self.width = max((path[-1] for path in kept if path), default=0) + 1
        self.calibration, self.budget = AcceptanceCalibration(), DraftBudget(config.expected_gain)
        self.drafted = False  # whether the current step made a draft, even if its tree was cut to the root
        # Expected number of accepted tokens of each active row in the current step; empty if the tree was not cut.
        self.predicted: list[float] = []

    def plain(self, roots: Tensor) -> tuple[Tree, Tensor]:
        """Return the tree that has only the root, and its (batch, 1) tokens."""
        self.drafted = False
        return self.root, roots[:, None]

    def build(self, state: DecodeState) -> tuple[Tree, Tensor]:
        """Return the next step's tree and its (batch, nodes) tokens."""
        window, roots = state.window, state.roots
        nodes = self.config.nodes if self.config.always else self.budget.affordable(self.config.nodes)
        if nodes == 1:
            return self.plain(roots)
        if self.constant:
            nodes = self.config.nodes
        self.drafted, self.predicted = True, []
        if self.shape is not None:
            shape = self.shape if nodes == self.config.nodes else self.probe
            candidates = propose_candidates(self.model, window, shape.height, self.width)
            return shape, shape.tokens(roots, candidates.tokens)
        # Do not draft levels beyond the maximum length. A tree of n nodes has at most n - 1 levels.
        height = self.reach if self.constant else min(self.reach, state.acceptor.remaining_tokens() - 1, nodes - 1)
        if not height:
            return self.plain(roots)
        candidates = propose_candidates(self.model, window, height, min(self.width, nodes - 1))
        tree = grow(candidates.probabilities, nodes)
        if self.config.cost is not None and not self.constant:
            values = [values for values, row in zip(tree.values.tolist(), state.acceptor.rows) if not row.done]
            tree = tree.first(self.config.best_size(values, self.calibration.ratio))
            self.predicted = [sum(row[1 : tree.nodes]) for row in values]
        return tree, tree.tokens(roots, candidates.tokens)

    def learn(self, tree: Tree, branches: Sequence[Sequence[int]], seconds: float) -> None:
        """Update the draft budget and the calibration with the result of a step.

        Args:
            tree: The verified tree.
            branches: Indices of each row's accepted nodes, root first. Empty for rows that had ended before.
            seconds: Duration of the step, from the draft to the commit.
        """
        accepted = [len(branch) - 1 for branch in branches if branch]
        if not self.config.always:
            if self.drafted:
                self.budget.record_draft(seconds, tree.nodes, sum(accepted) / max(len(accepted), 1))
            else:
                self.budget.record_plain(seconds)
        if self.drafted:
            for predicted, count in zip(self.predicted, accepted):  # no predictions where nothing was cut
                self.calibration.learn(predicted, count)
