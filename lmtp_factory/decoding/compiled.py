"""Compiled decoding: what `torch.compile` is given, and how a compiled step runs.

If tokens are the argmax of the logits, a whole step is compiled: drafting, verifying, accepting and committing are
operations on tensors of the same shapes in every step. Else the host walks down the tree, and the backbone alone is
compiled.
"""

import torch
from torch import Tensor, nn
from transformers import CompileConfig

from ..modeling.heads import lm_logits
from .branches import follow
from .draft import unembeddings_of
from .state import DecodeState
from .tree import Tree
from .tree_builder import TreeBuilder
from .verify import verify


# Steps with and without a draft, batches, and lengths of prompts and caches have a graph each, of all models of a process.
# Beyond torch's own limit of 8 the others would run uncompiled.
_MOST_GRAPHS = 64


def whole_step(model: nn.Module, state: DecodeState, builder: TreeBuilder, drafts: bool) -> tuple[Tensor, int]:
    """Draft, verify, accept and commit, without the host.

    Args:
        model: A model with leap heads.
        state: The state of the generation, with a cache of fixed size.
        builder: Drafts the trees.
        drafts: Whether to draft. A number of nodes would become a symbolic size when it changes.

    Returns:
        What the host has to read, see `branches.follow`, and the number of nodes.
    """
    tree, tokens = builder.draft(state.window, builder.config.nodes if drafts else 1)
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
        self._rows: nn.Module | None = None

    @torch.no_grad()
    def unembeddings(self, model: nn.Module) -> list[nn.Module]:
        """Return the heads' unembeddings. Rows of the LM head are copied to the same memory in every call.

        CUDA graphs, which know the addresses of parameters, would be recorded again for others.
        """
        given = unembeddings_of(model)
        if model.leap_heads.config.head_kind == "own" or model.leap_heads.draft_tokens is None:
            return given
        rows = given[0]
        if self._rows is None or _layout(self._rows) != _layout(rows):  # other heads, or a model that was cast or moved
            self._rows = rows
        elif self._rows is not rows:
            self._rows.load_state_dict(rows.state_dict())
        return [self._rows] * len(given)

    def verify(self, model: nn.Module, tokens: Tensor, tree: Tree, state: DecodeState) -> Tensor:
        """Call `verify.verify` with the compiled backbone."""
        torch.compiler.cudagraph_mark_step_begin()
        return verify(model, tokens, tree, state, self._backbone).clone()  # a CUDA graph overwrites what it returned

    def step(self, model: nn.Module, state: DecodeState, builder: TreeBuilder, drafts: bool) -> tuple[Tensor, int]:
        """Call `whole_step`, compiled."""
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
            results = self._step(model, state, builder, drafts)
        state.copy_outputs()
        return results


def _layout(layer: nn.Module) -> tuple:
    """Return the shape, dtype and device of a layer's parameters, and their names."""
    return tuple((name, part.shape, part.dtype, part.device) for name, part in layer.state_dict().items())


def compiled_for(model: nn.Module, options: CompileConfig | None) -> Compiled:
    """Return the compiled functions of a model, kept for later calls with the same options."""
    options = options or CompileConfig()
    kept = model.compiled_functions
    if kept is None or kept.options != options:
        kept = model.compiled_functions = Compiled(model, options)
    return kept
