"""Continuations of many prefixes of one text in one forward.

The text is cached once. A node continues a prefix of it: it attends to the prefix, to the nodes above it on its path and
to itself, so that one forward computes nodes behind many prefixes. For the text `a b c d`, with the nodes `e` and `f`
behind its prefix of length 2, `g` behind that of length 3, and in a second forward `h` below `f`:

    column   0  1  2  3   4  5  6   7
             a  b  c  d   e  f  g   h
    e        x  x  .  .   x  .  .
    f        x  x  .  .   .  x  .
    g        x  x  x  .   .  .  x
    h        x  x  .  .   .  x  .   x
"""

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..modeling.layer_states import recorded
from .cache import TreeCache
from .compat import CACHE
from .verify import masks_by_layer_type


class CachedText:
    """A text whose keys and values are cached, and the nodes that continue its prefixes.

    Args:
        model: A model with leap heads that `no_tree_forward_reason` allows.
        ids: (length,) token ids of the text.

    Attributes:
        hidden: (length, hidden) final hidden states of the text.
        states: (length, hidden) or (length, heads, hidden) what the heads read, see `LeapHeads.inputs`.
        forwards: Number of forwards, the text's own included.
        rows: Number of token rows of these forwards.
    """

    def __init__(self, model: nn.Module, ids: Tensor):
        self.model, self.length = model, len(ids)
        config = model.config.get_text_config()
        self.cache = TreeCache.replacing(DynamicCache(config=config), config, columns=0)
        self.shortest = 0
        self.forwards, self.rows = 1, len(ids)
        with recorded(model) as layers:
            hidden = model.base_model(
                input_ids=ids[None],
                position_ids=torch.arange(len(ids), device=ids.device)[None],
                **{CACHE: self.cache},
                use_cache=True,
            ).last_hidden_state
        self.hidden, self.states = hidden[0], model.leap_heads.inputs(hidden, layers)[0]

    def discard_nodes(self, shortest: int) -> None:
        """Discard all nodes. Later nodes continue prefixes of at least `shortest` tokens.

        Raises:
            ValueError: `shortest` is below that of an earlier call. Layers with a sliding window may have dropped the
                columns that shorter prefixes need.
        """
        if shortest < self.shortest:
            raise ValueError(f"Prefixes of {shortest} tokens come after prefixes of {self.shortest}: sort them first.")
        self.shortest = shortest
        self.cache.set_cursor(self.length, shortest)

    def extend(self, tokens: Tensor, prefixes: Tensor, above: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute nodes of one level.

        Args:
            tokens: (nodes,) token ids.
            prefixes: (nodes,) lengths of the prefixes that the nodes continue, at least `shortest`.
            above: (nodes, level) columns of the nodes above each node, the one next to the prefix first. None for nodes
                next to their prefix.

        Returns:
            (nodes, hidden) final hidden states; (nodes,) columns of the nodes.
        """
        above = prefixes.new_empty(len(prefixes), 0) if above is None else above
        start = int(self.cache.get_seq_length())
        columns = torch.arange(start, start + len(tokens), device=tokens.device)  # (nodes,)
        paths = torch.cat([above, columns[:, None]], dim=1)  # (nodes, level + 1)
        masks = masks_by_layer_type(
            self.model.config.get_text_config(),
            lambda layer, window: self._allowed(prefixes, paths, layer, window),
            self.model.dtype,
        )
        outputs = self.model.base_model(
            input_ids=tokens[None],
            position_ids=(prefixes + above.shape[1])[None],
            attention_mask=masks,
            **{CACHE: self.cache},
            use_cache=True,
        )
        self.forwards, self.rows = self.forwards + 1, self.rows + len(tokens)
        return outputs.last_hidden_state[0], columns

    def _allowed(self, prefixes: Tensor, paths: Tensor, layer: int, window: int | None) -> Tensor:
        """Return which columns the nodes attend to in one layer.

        Args:
            prefixes: (nodes,) lengths of the nodes' prefixes.
            paths: (nodes, level + 1) columns of the nodes above each node and of itself.
            layer: Index of the layer.
            window: Number of tokens that a node attends to, itself included; None for all.

        Returns:
            (1, nodes, columns) bool.
        """
        count, first = self.cache.layers[layer].get_mask_sizes(len(prefixes))
        columns = torch.arange(first, first + count, device=prefixes.device)  # (columns,)
        allowed = columns < prefixes[:, None]  # (nodes, columns)
        if window is not None:
            # A node is token number `prefix + level` of its path, and a column of the text holds the token of its number.
            allowed &= columns > (prefixes + paths.shape[1] - 1 - window)[:, None]
            paths = paths[:, -window:]
        allowed.scatter_(1, paths - first, True)
        return allowed[None]
