"""The tree of each step: shape by the plan, tokens by the heads, and no draft where it does not pay."""

from collections.abc import Sequence

from torch import Tensor, nn

from .. import geometry
from .draft import Window, draft
from .plan import TreePlan, Trust
from .tree import Tree, fixed, grow


# While no draft would pay for itself, so many steps go by without one before the next try; the number doubles up to this.
_LONGEST_PAUSE = 16


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
        self.trust = Trust()
        self.pause = self.waiting = 0

    def plain(self, roots: Tensor) -> tuple[Tree, Tensor]:
        """The tree of the roots alone, and its (batch, 1) tokens."""
        return self.root, roots[:, None]

    def draft(self, window: Window, roots: Tensor, active: Sequence[bool], wanted: int) -> tuple[Tree, Tensor]:
        """A tree and its (batch, nodes) tokens.

        Args:
            roots: (batch,) token ids.
            active: which rows still generate.
            wanted: the most tokens that a row may still get; deeper levels would be thrown away.
        """
        if self.plan.nodes == 1 or self.waiting:
            self.waiting = max(self.waiting - 1, 0)
            return self.plain(roots)
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
            self._consider_pause(drafted=tree.nodes > 1)
        return tree, tree.tokens(roots, candidates.tokens)

    def _consider_pause(self, drafted: bool) -> None:
        if drafted:
            self.pause = 0
        else:
            self.waiting = self.pause
            self.pause = min(max(2 * self.pause, 1), _LONGEST_PAUSE)

    def learn(self, tree: Tree, branches: Sequence[Sequence[int]]) -> None:
        """Compare what a dynamic tree promised with what was accepted."""
        if tree.values is None or self.plan.cost is None:
            return
        for values, branch in zip(tree.values.tolist(), branches):
            if branch:
                self.trust.learn(sum(values[1:]), len(branch) - 1)
