"""Verification: one forward over the tree, in which a node attends to the row's past, its ancestors and itself."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .compat import CACHE, attention_implementation, column_arguments
from .tree import Tree


if TYPE_CHECKING:
    from .state import DecodeState

# Attention implementations that accept an arbitrary 4-D mask.
MASKED_ATTENTION = ("sdpa", "eager")


def tree_masks(
    config: PretrainedConfig, tree: Tree, state: "DecodeState", dtype: torch.dtype
) -> Tensor | dict[str, Tensor | None] | None:
    """Build the attention masks of a tree in the form that the model's forward accepts.

    Args:
        config: Configuration of the text model.
        tree: The tree.
        state: The state whose cache receives the tree's keys and values, from the length of the longest row on. Its cursor
            has been placed.
        dtype: Dtype of the additive masks of eager attention.

    Returns:
        A (batch, 1, nodes, columns) mask, bool for sdpa and additive for eager attention, or None if it would mask
        nothing. A model with several layer types gets a dict with one mask per type.
    """
    return masks_by_layer_type(config, lambda layer, window: _allowed(state, tree, layer, window), dtype)


def masks_by_layer_type(
    config: PretrainedConfig, allowed: Callable[[int, int | None], Tensor | None], dtype: torch.dtype
) -> Tensor | dict[str, Tensor | None] | None:
    """Convert the masks of each layer type to the form that the model's forward accepts, see `tree_masks`.

    Args:
        config: Configuration of the text model.
        allowed: Called with the index of a layer and its sliding window (None for full attention). Returns a
            (batch, nodes, columns) bool mask, True where a node attends, or None if it would mask nothing.
        dtype: Dtype of the additive masks of eager attention.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    additive = dtype if attention_implementation(config) == "eager" else None
    if kinds is None:
        return _as_mask(allowed(0, window), additive)
    return {
        kind: _as_mask(allowed(kinds.index(kind), window if kind == "sliding_attention" else None), additive)
        for kind in set(kinds)
    }


def _as_mask(allowed: Tensor | None, additive: torch.dtype | None) -> Tensor | None:
    """Return the (batch, 1, nodes, columns) mask: bool, or additive if its dtype is given."""
    if allowed is None:
        return None
    allowed = allowed[:, None]  # (batch, 1, nodes, columns)
    if additive is None:
        return allowed
    mask = torch.zeros(allowed.shape, dtype=additive, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(additive).min)


def _allowed(state: "DecodeState", tree: Tree, layer: int, window: int | None) -> Tensor | None:
    """Return which columns the nodes of a tree attend to in one layer, (batch, nodes, columns) bool; None for all.

    Args:
        state: The state of the generation.
        tree: The tree.
        layer: Index of a layer of the type in question.
        window: Sliding window of the layer; None for full attention.
    """
    nodes, own = tree.nodes, state.columns  # own: (batch, 1) columns of each row
    count, first = state.cache.layers[layer].get_mask_sizes(nodes)  # number and first index of the visible columns
    is_visible = window is None or count <= window  # a user's cache may hold more columns than the window
    if nodes == 1 and len(own) == 1 and state.prompt_mask is None and is_visible and not state.cache.is_fixed:
        return None
    columns = torch.arange(first, first + count, device=own.device)  # (count,)
    past = columns < own  # (batch, count)
    if state.prompt_mask is not None:
        real = state.prompt_mask[:, first : first + count]  # (batch, visible prompt columns)
        past[:, : real.shape[1]] &= real
    allowed = past[:, None, :].repeat(1, nodes, 1)  # (batch, nodes, count)
    if window is not None:
        # A node of level l is token number own + l of its row, which may differ from its column.
        allowed &= columns > (own + tree.levels - window)[:, :, None]  # (batch, nodes, count)
    start = state.cursor() - first  # index of the tree's first column in the mask
    if isinstance(start, Tensor):
        places = start + torch.arange(nodes, device=own.device)
        return allowed.index_copy_(2, places, tree.ancestors(window).expand(len(own), -1, -1))
    allowed[:, :, start : start + nodes] = tree.ancestors(window)  # (batch, nodes, nodes)
    return allowed


def verify(
    model: nn.Module, tokens: Tensor, tree: Tree, state: "DecodeState", forward: Callable | None = None
) -> Tensor:
    """Compute the final hidden states of all nodes and write their keys and values to the cache.

    Args:
        model: A model with leap heads.
        tokens: (batch, nodes) token ids.
        tree: The tree.
        state: The state of the generation.
        forward: The backbone's compiled forward; None uses the backbone itself.

    Returns:
        (batch, nodes, hidden) final hidden states.
    """
    state.place_cursor()
    masks = tree_masks(model.config.get_text_config(), tree, state, model.dtype)
    # Clamp positions of nodes beyond the maximum length: such nodes are never accepted, and a table of learned position
    # embeddings may end there.
    positions = (state.shift + state.columns + tree.levels).clamp(max=state.last_position)  # (..., batch, nodes)
    outputs = (forward or model.base_model)(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=masks,
        use_cache=True,
        **column_arguments(state.cursor(), tree.nodes, tokens.device),
        **{CACHE: state.cache},
    )
    return outputs.last_hidden_state
