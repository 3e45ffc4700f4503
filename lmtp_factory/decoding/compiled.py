"""Compiled decoding: what `torch.compile` is given, and how a compiled step runs.

If tokens are the argmax of the logits, a whole step is compiled: to draft, verify, accept and commit are operations on
tensors of the same shapes in every step. Else the host walks down the tree, and the backbone alone is compiled.
"""

import torch
from torch import Tensor, nn
from transformers import CompileConfig

from ..modeling.heads import lm_logits
from .branches import follow
from .state import DecodeState
from .tree import Tree
from .tree_builder import TreeBuilder
from .verify import verify


def whole_step(model: nn.Module, state: DecodeState, builder: TreeBuilder, nodes: int) -> tuple[Tensor, int]:
    """Draft, verify, accept and commit, without the host.

    Args:
        model: A model with leap heads.
        state: The state of the generation, with a cache of fixed size.
        builder: Drafts the trees.
        nodes: Largest number of nodes of the tree, including the root.

    Returns:
        What the host has to read, see `branches.follow`, and the number of nodes.
    """
    tree, tokens = builder.draft(state.window, nodes)
    hidden = verify(model, tokens, tree, state)
    branches, read = follow(lm_logits(model, hidden).argmax(-1), tokens, tree, state.goes_on)
    state.commit(hidden, branches)
    return read, tree.nodes


class Compiled:
    """The compiled functions of one model.

    Args:
        model: A model with leap heads.
        options: Options of `torch.compile`.
    """

    def __init__(self, model: nn.Module, options: CompileConfig):
        self.options = options
        self._backbone = torch.compile(model.base_model.__call__, **options.to_dict())
        self._step = torch.compile(whole_step, **options.to_dict())

    def verify(self, model: nn.Module, tokens: Tensor, tree: Tree, state: DecodeState) -> Tensor:
        """Call `verify.verify` with the compiled backbone."""
        torch.compiler.cudagraph_mark_step_begin()
        return verify(model, tokens, tree, state, self._backbone).clone()  # a CUDA graph overwrites what it returned

    def step(self, model: nn.Module, state: DecodeState, builder: TreeBuilder, nodes: int) -> tuple[Tensor, int]:
        """Call `whole_step`, compiled."""
        torch.compiler.cudagraph_mark_step_begin()
        results = self._step(model, state, builder, nodes)
        state.own()
        return results


def compiled_for(model: nn.Module, options: CompileConfig | None) -> Compiled:
    """Return the compiled functions of a model, kept for later calls with the same options."""
    options = options or CompileConfig()
    kept = model.compiled_functions
    if kept is None or kept.options != options:
        kept = model.compiled_functions = Compiled(model, options)
    return kept
