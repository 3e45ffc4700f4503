"""The tree of each step: shape by the plan, tokens by the heads, and no draft where it does not pay."""

from collections.abc import Sequence

from torch import Tensor, nn

from .. import geometry
from .draft import Window, draft
from .draft_budget import DraftBudget
from .plan import TreePlan, Trust
from .tree import Tree, fixed, grow


class Drafter:
    """Trees for one generation.

    Args:
        offsets: of the heads.
        constant: every tree has the same number of nodes, as compiled forwards need.
    """

    def __init__(self, model: nn.Module, plan: TreePlan, offsets: Sequence[int], constant: bool):
        self.model, self.plan, self.constant = model, plan, constant
        self.reach = geometry.reach(offsets) - 1
        device = model.get_output_embeddings().weight.device
        self.root = fixed([()], device)
        paths = plan.fixed_paths()
        self.shape = None if paths is None else fixed([path for path in paths if len(path) <= self.reach], device)
        self.trust, self.budget = Trust(), DraftBudget()
        self.drafted = False  # whether the step at hand made a draft, though its tree may have been cut to the root

    def plain(self, roots: Tensor) -> tuple[Tree, Tensor]:
        """The tree of the roots alone, and its (batch, 1) tokens."""
        self.drafted = False
        return self.root, roots[:, None]

    def draft(self, window: Window, roots: Tensor, active: Sequence[bool], wanted: int) -> tuple[Tree, Tensor]:
        """A tree and its (batch, nodes) tokens.

        Args:
            roots: (batch,) token ids.
            active: which rows still generate.
            wanted: the most tokens that a row may still get; deeper levels would be thrown away.
        """
        if self.plan.nodes == 1 or not (self.plan.always or self.budget.allows_draft()):
            return self.plain(roots)
        self.drafted = True
        if self.shape is not None:
            candidates = draft(self.model, window, self.shape.height, width=int(max(self.plan.ranks())) + 1)
            return self.shape, self.shape.tokens(roots, candidates.tokens)
        height = self.reach if self.constant else min(self.reach, wanted - 1)
        if not height:
            return self.plain(roots)
        candidates = draft(self.model, window, height, min(self.plan.width, self.plan.nodes - 1))
        tree = grow(candidates.probabilities, self.plan.nodes)
        if self.plan.cost is not None and not self.constant:
            values = [row for row, is_active in zip(tree.values.tolist(), active) if is_active]
            tree = tree.first(self.plan.best_size(values, self.trust.value))
        return tree, tree.tokens(roots, candidates.tokens)

    def learn(self, tree: Tree, branches: Sequence[Sequence[int]], seconds: float) -> None:
        """What the step brought, and in what time.

        Args:
            tree: that was verified.
            branches: accepted nodes of each row, the root first; empty for a row that was finished before.
            seconds: from the draft to the commit.
        """
        accepted = [len(branch) - 1 for branch in branches if branch]
        if not self.plan.always:
            if self.drafted:
                self.budget.record_draft(seconds, tree.nodes, sum(accepted) / max(len(accepted), 1))
            else:
                self.budget.record_plain(seconds)
        if self.drafted and tree.values is not None and self.plan.cost is not None:
            for values, branch in zip(tree.values.tolist(), branches):
                if branch:
                    self.trust.learn(sum(values[1:]), len(branch) - 1)
