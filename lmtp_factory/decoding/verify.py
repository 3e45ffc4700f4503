"""One forward over a whole tree: every node sees the row's past and its own ancestors, nothing else."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .compat import attention_implementation
from .tree import Tree


if TYPE_CHECKING:
    from .state import DecodeState

# Attention implementations that take a mask of any shape.
MASKED_ATTENTION = ("sdpa", "eager")


def tree_masks(
    config: PretrainedConfig, tree: Tree, state: "DecodeState", dtype: torch.dtype
) -> Tensor | dict[str, Tensor | None] | None:
    """Attention masks of a tree in the form that the model's forward takes.

    Args:
        config: the text model's; layers of several kinds take a mask for each kind.
        state: whose cache the tree's nodes are written to, behind the longest row.
        dtype: of additive masks, for eager attention.

    Returns:
        (batch, 1, nodes, columns), bool for sdpa; None where the one node may see everything.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    eager = attention_implementation(config) == "eager"
    if kinds is None:
        return _mask(state, tree, 0, window, dtype if eager else None)
    return {
        kind: _mask(
            state, tree, kinds.index(kind), window if kind == "sliding_attention" else None, dtype if eager else None
        )
        for kind in set(kinds)
    }


def _mask(
    state: "DecodeState", tree: Tree, layer: int, window: int | None, additive: torch.dtype | None
) -> Tensor | None:
    nodes, lengths, own = tree.nodes, state.lengths(), state.columns  # own: (batch, 1)
    count, first = state.cache.layers[layer].get_mask_sizes(nodes)
    in_sight = window is None or count <= window  # a user's cache may keep more than the window
    if nodes == 1 and len(lengths) == 1 and state.prompt_mask is None and in_sight and not state.cache.is_fixed:
        return None
    columns = torch.arange(first, first + count, device=own.device)
    past = columns < own  # (batch, count)
    if state.prompt_mask is not None:
        real = state.prompt_mask[:, first : first + count]
        past[:, : real.shape[1]] &= real
    allowed = past[:, None, :].repeat(1, nodes, 1)  # (batch, nodes, count)
    if window is not None:
        allowed &= columns > (own + tree.levels - window)[:, :, None]
    start = max(lengths) - first  # the tree's first column in the mask
    allowed[:, :, start : start + nodes] = tree.ancestors(window)
    allowed = allowed[:, None]  # (batch, 1, nodes, count)
    if additive is None:
        return allowed
    mask = torch.zeros(allowed.shape, dtype=additive, device=own.device)
    return mask.masked_fill_(~allowed, torch.finfo(additive).min)


class Verifier:
    """The backbone's forward on the trees of a generation.

    Args:
        forward: the backbone's compiled forward; None takes its ordinary one.
    """

    def __init__(self, model: nn.Module, forward: Callable | None = None):
        self.model, self.compiled = model, forward is not None
        self.forward = forward or model.base_model

    def __call__(self, tokens: Tensor, tree: Tree, state: "DecodeState") -> Tensor:
        """(batch, nodes) token ids -> (batch, nodes, hidden) final hidden states; keys and values go to the cache."""
        masks = tree_masks(self.model.config.get_text_config(), tree, state, self.model.dtype)
        # Nodes past the last position that generation may reach are never accepted; a table of learned positions may
        # end there.
        positions = (state.shift + state.columns + tree.levels).clamp(max=state.last_position)  # (..., batch, nodes)
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        outputs = self.forward(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=masks,
            past_key_values=state.cache,
            use_cache=True,
        )
        hidden = outputs.last_hidden_state
        return hidden.clone() if self.compiled else hidden  # CUDA graphs overwrite their outputs
