"""One forward over a whole tree: every node sees the row's past and its own ancestors, nothing else."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .cache import TreeCache
from .tree import Tree


# Attention implementations that take a mask of any shape.
MASKED_ATTENTION = ("sdpa", "eager")


def tree_masks(
    config, cache: TreeCache, tree: Tree, lengths: Sequence[int], prompt_mask: Tensor | None, dtype: torch.dtype
) -> Tensor | dict[str, Tensor | None] | None:
    """Attention masks of a tree in the form that the model's forward takes.

    Args:
        config: the text model's; layers of several kinds take a mask for each kind.
        lengths: columns that each row owns; the tree's nodes come behind the greatest of them.
        prompt_mask: (batch, prompt) bool, False where a row is padded; None where none is.
        dtype: of additive masks, for eager attention.

    Returns:
        (batch, 1, nodes, columns), bool for sdpa; None where the one node may see everything.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        return _mask(config, cache, 0, window, tree, lengths, prompt_mask, dtype)
    return {
        kind: _mask(
            config, cache, kinds.index(kind), window if kind == "sliding_attention" else None,
            tree, lengths, prompt_mask, dtype,
        )
        for kind in set(kinds)
    }  # fmt: skip


def _mask(config, cache, layer, window, tree, lengths, prompt_mask, dtype) -> Tensor | None:
    nodes = tree.nodes
    count, first = cache.layers[layer].get_mask_sizes(nodes)
    in_sight = window is None or count <= window  # a user's cache may keep more than the window
    if nodes == 1 and len(lengths) == 1 and prompt_mask is None and in_sight and not cache.is_fixed:
        return None
    device = cache.layers[layer].keys.device
    columns = torch.arange(first, first + count, device=device)
    own = torch.tensor(lengths, device=device)[:, None]
    past = columns < own
    if prompt_mask is not None:
        real = prompt_mask[:, first : first + count]
        past[:, : real.shape[1]] &= real
    levels = tree.levels.expand(len(lengths), -1)
    allowed = past[:, None, :].repeat(1, nodes, 1)
    if window is not None:
        allowed &= columns > (own + levels - window)[:, :, None]
    related = tree.ancestors()
    if window is not None:
        related = related & ((levels[:, :, None] - levels[:, None, :]) < window)
    start = max(lengths) - first
    allowed[:, :, start : start + nodes] = related
    allowed = allowed[:, None]
    if config._attn_implementation == "eager":
        return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, torch.finfo(dtype).min)
    return allowed


class Verifier:
    """The backbone's forward on one generation's trees.

    Attributes:
        positions: (..., batch, 1) position of each row's next root, in the form that the model counts positions in.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: TreeCache,
        positions: Tensor,
        prompt_mask: Tensor | None,
        last_position: int,
        forward: Callable | None = None,
    ):
        self.model, self.cache, self.positions = model, cache, positions
        self.prompt_mask, self.last_position = prompt_mask, last_position
        self.compiled = forward is not None
        self.forward = forward or model.base_model

    def __call__(self, tokens: Tensor, tree: Tree, lengths: Sequence[int]) -> Tensor:
        """(batch, nodes) token ids -> (batch, nodes, hidden) final hidden states; keys and values go to the cache."""
        config = self.model.config.get_text_config()
        masks = tree_masks(config, self.cache, tree, lengths, self.prompt_mask, self.model.dtype)
        # Nodes past the last position that generation may reach are never accepted; a table of learned positions may
        # end there.
        positions = (self.positions + tree.levels).clamp(max=self.last_position)
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        outputs = self.forward(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=masks,
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden = outputs.last_hidden_state
        return hidden.clone() if self.compiled else hidden  # CUDA graphs overwrite their outputs

    def advance(self, branches: Sequence[Sequence[int]]) -> None:
        """Move each row's next root behind its accepted branch."""
        counts = [len(branch) for branch in branches]
        self.positions = self.positions + torch.tensor(counts, device=self.positions.device)[:, None]
