"""Building each step's draft tree, or no tree if a draft is not expected to pay."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import geometry
from .draft import Window, propose_candidates
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
        unembeddings: See `draft.candidates_of`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TreeConfig,
        constant: bool,
        device: torch.device,
        unembeddings: Sequence[nn.Module] | None = None,
    ):
        self.model, self.config, self.constant, self.unembeddings = model, config, constant, unembeddings
        self.reach = geometry.reach(model.leap_heads.config.offsets) - 1  # number of levels that the heads can draft
        self.root = fixed([()], device)
        self.shape: Tree | None = None  # the static tree without the levels that the heads cannot draft
        self.probe: Tree | None = None  # its first nodes
        self.width = config.width  # number of candidates per level
        if (paths := config.fixed_paths()) is not None:
            kept = [path for path in paths if len(path) <= self.reach]
            self.shape, self.probe = fixed(kept, device), fixed(kept[:PROBE_NODES], device)
            self.width = max((path[-1] for path in kept if path), default=0) + 1
        if constant:  # what depends on the shape alone is computed here and not in a compiled step
            window = getattr(model.config.get_text_config(), "sliding_window", None)
            for tree in (self.root, self.shape, self.probe):
                if tree is not None:
                    tree.prepare(self.width, window)
        self.calibration, self.budget = AcceptanceCalibration(), DraftBudget(config.expected_gain)
        self.drafted = False  # whether the current step made a draft, even if its tree was cut to the root
        self.offered = 1  # number of nodes that its tree may have, before a cost curve cuts it
        # Expected number of accepted tokens of each active row in the current step; empty if the tree was not cut.
        self.predicted: list[float] = []

    def nodes(self, plain: bool = False) -> int:
        """Return the number of nodes that the next step's tree may have, including the root. 1 is a plain step.

        Args:
            plain: Whether the step has to be plain.
        """
        nodes = 1 if plain else self.config.nodes
        if not plain and not self.config.always:
            nodes = self.budget.affordable(nodes)
        if nodes > 1 and self.constant:
            nodes = self.config.nodes
        self.drafted, self.offered, self.predicted = nodes > 1, nodes, []
        return nodes

    def draft(self, window: Window, nodes: int, levels: int | None = None) -> tuple[Tree, Tensor]:
        """Draft a tree, by operations on tensors alone.

        Args:
            window: The last hidden states and the roots.
            nodes: Number of nodes, including the root.
            levels: Number of levels of a dynamic tree; None for all that the heads can draft.

        Returns:
            The tree and its (batch, nodes) tokens.
        """
        if nodes == 1:
            return self.root, window.roots[:, None]
        if self.shape is not None:
            shape = self.shape if nodes == self.config.nodes else self.probe
            candidates = propose_candidates(self.model, window, shape.height, self.width, self.unembeddings)
            return shape, shape.tokens(window.roots, candidates.tokens)
        levels, width = levels or self.reach, min(self.width, nodes - 1)
        candidates = propose_candidates(self.model, window, levels, width, self.unembeddings)
        tree = grow(candidates.probabilities, nodes)
        return tree, tree.tokens(window.roots, candidates.tokens)

    def build(self, state: DecodeState, plain: bool = False) -> tuple[Tree, Tensor]:
        """Return the next step's tree and its (batch, nodes) tokens.

        Args:
            state: The state of the generation.
            plain: Whether the step has to be plain.
        """
        nodes, levels = self.nodes(plain), None
        if self.shape is None and not self.constant:
            # Do not draft levels beyond the maximum length. A tree of n nodes has at most n - 1 levels.
            levels = min(self.reach, state.acceptor.remaining_tokens() - 1, nodes - 1)
            if not levels:
                nodes, self.drafted = 1, False
        tree, tokens = self.draft(state.window, nodes, levels)
        if tree.values is not None and self.config.cost is not None and not self.constant:
            values = [values for values, row in zip(tree.values.tolist(), state.acceptor.rows) if not row.done]
            size = self.config.best_size(values, self.calibration.ratio)
            tree, tokens = tree.first(size), tokens[:, :size]
            self.predicted = [sum(row[1:size]) for row in values]
        return tree, tokens

    def learn(self, nodes: int, branches: Sequence[Sequence[int]], seconds: float) -> None:
        """Update the draft budget and the calibration with the result of a step.

        Args:
            nodes: Number of nodes of the verified tree.
            branches: Indices of each row's accepted nodes, root first. Empty for rows that had ended before.
            seconds: Duration of the step, from the draft to the commit.
        """
        accepted = [len(branch) - 1 for branch in branches if branch]
        if not self.config.always:
            if self.drafted:
                self.budget.record_draft(seconds, nodes, sum(accepted) / max(len(accepted), 1), self.offered)
            else:
                self.budget.record_plain(seconds)
        if self.drafted:
            for predicted, count in zip(self.predicted, accepted):  # no predictions where nothing was cut
                self.calibration.learn(predicted, count)
