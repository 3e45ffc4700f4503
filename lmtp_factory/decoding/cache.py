"""Key-value caches that store a draft tree and then keep one branch of it.

A column is an index along the sequence axis. Row `b` of the batch owns the columns below its length. A step writes its
nodes from the cursor on, which is the length of the longest row. Then the columns of each row's accepted branch are
copied to the end of the row, in place:

    row of length 3, cursor 5, branch of nodes 0 and 2

    column    0   1   2   3   4   5   6   7   8
    before    k   k   k   -   -   n0  n1  n2  n3
    after     k   k   k   n0  n2  .   .   .   .
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)

from .branches import Branches
from .compat import forget_cache, query_length
from .counting_layer import CountingLayer


class _Movable:
    """Copying of columns, for layers with keys and values of shape (batch, heads, columns, head size)."""

    first = 0  # column of index 0 in the buffers

    def move(self, moves: "_Moves") -> None:
        """Copy columns. Sources and targets may overlap, because the sources are read before anything is written."""
        for buffer in (self.keys, self.values):  # (batch, heads, columns, head size)
            source, target = moves.of(buffer, self.first)
            # One row needs (n,) indices only. Rows that move different columns need an index per element.
            if len(buffer) == 1:
                buffer.index_copy_(2, target, buffer.index_select(2, source))
            else:
                buffer.scatter_(2, target, buffer.gather(2, source))


class _Moves:
    """Source and target columns of a step as index tensors, computed once for all layers of the same layout.

    Args:
        sources: (batch, n) columns that are copied.
        targets: (batch, n) columns that they are copied to, in the same order.
    """

    def __init__(self, sources: Tensor, targets: Tensor):
        # Columns by device; indices by device and layout.
        self.on, self.made = {sources.device: (sources, targets)}, {}

    def of(self, buffer: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Return the source and target indices for a (batch, heads, columns, head size) buffer.

        Returns:
            Two (n,) tensors for one row, else two (batch, heads, n, head size) tensors.
        """
        device, heads, size = buffer.device, buffer.shape[1], buffer.shape[3]
        key = device, first, heads, size
        if key not in self.made:
            if device not in self.on:
                self.on[device] = tuple(part.to(device) for part in next(iter(self.on.values())))
            both = self.on[device]  # two of (batch, n)
            if first:
                both = tuple(part - first for part in both)
            if len(buffer) == 1:
                self.made[key] = tuple(part[0] for part in both)
            else:
                self.made[key] = tuple(part[:, None, :, None].expand(-1, heads, -1, size) for part in both)
        return self.made[key]


class GrowingLayer(_Movable, CacheLayerMixin):
    """A layer with buffers that grow geometrically. With a sliding window it drops columns that no row attends to.

    Args:
        window: Number of tokens that a query attends to, itself included; None for all.
    """

    is_compileable = False

    def __init__(self, window: int | None = None):
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.cursor = self.shortest = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create empty buffers with the dtype, device and shape of the states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def visible_from(self) -> int:
        """Return the first column that the next query of some row may attend to."""
        return 0 if self.window is None else max(self.first, self.shortest - self.window + 1)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write states at the cursor and return all visible keys and values.

        Args:
            key_states: (batch, heads, nodes, head size).
            value_states: (batch, heads, nodes, head size).
            args, kwargs: Ignored.

        Returns:
            Keys and values of shape (batch, heads, visible columns, head size), views from `visible_from()` on.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.cursor + key_states.shape[2]
        if end - self.first > self.keys.shape[2]:
            self._make_room(end)
        written = slice(self.cursor - self.first, end - self.first)
        self.keys[:, :, written] = key_states  # (batch, heads, nodes, head size)
        self.values[:, :, written] = value_states
        # With a sliding window, columns before `visible_from` stay in the buffer until it grows; they are not returned.
        visible = slice(self.visible_from() - self.first, end - self.first)
        self.cursor = end
        return self.keys[:, :, visible], self.values[:, :, visible]

    def _make_room(self, end: int) -> None:
        """Allocate buffers for 1.5 times the columns up to `end`, and drop columns before `visible_from()`."""
        first = self.visible_from()
        old = slice(first - self.first, self.cursor - self.first)
        columns = max((end - first) * 3 // 2, 64)
        for name in ("keys", "values"):
            buffer = getattr(self, name)  # (batch, heads, columns, head size)
            roomy = buffer.new_empty(*buffer.shape[:2], columns, buffer.shape[3])
            roomy[:, :, : old.stop - old.start] = buffer[:, :, old]
            setattr(self, name, roomy)
        self.first = first

    def set_cursor(self, cursor: int, shortest: int) -> None:
        """Set the column where the next step writes, and the length of the shortest row that still generates."""
        self.cursor, self.shortest = cursor, shortest

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Return the number of columns that `update` will return, and the first of them."""
        return self.cursor + query_length(query) - self.visible_from(), self.visible_from()

    def get_seq_length(self) -> int:
        """Return the number of columns written."""
        return self.cursor

    def get_max_cache_shape(self) -> int:
        """Return -1: the layer has no maximum size."""
        return -1

    get_max_length = get_max_cache_shape  # renamed in transformers 5.17


class FixedLayer(_Movable, CountingLayer):
    """A layer with buffers of fixed size and address, for `torch.compile` and CUDA graphs.

    It keeps all columns; the attention mask applies sliding windows.
    """

    def set_cursor(self, cursor: int | Tensor, shortest: int | None = None) -> None:
        """Set the column where the next step writes."""
        if isinstance(cursor, Tensor):  # which may be on another device
            self.cumulative_length.copy_(cursor)
        else:
            self.cumulative_length.fill_(cursor)


class TreeCache(Cache):
    """A key-value cache for look-back decoding; see the module's docstring."""

    @classmethod
    def replacing(cls, cache: Cache, config: PretrainedConfig, columns: int) -> "TreeCache | None":
        """Return a tree cache with the layers and contents of `cache`, or None if its type is not supported.

        Args:
            cache: Cache that `generate` prepared or the user passed.
            config: Configuration of the text model.
            columns: Number of columns of a static cache.
        """
        if type(cache) is StaticCache:
            if cache.offloading or int(cache.get_seq_length()):
                return None
            # generate() reuses a static cache. Reuse its buffers too: compiled code depends on their addresses.
            roomy = all(layer.is_initialized and layer.max_cache_len >= columns for layer in cache.layers)
            # A later turn may need all columns of a caller's own cache.
            columns = max(columns, *(layer.max_cache_len for layer in cache.layers))
            fixed = cls(layers=[FixedLayer(columns) for _ in cache.layers])
            if roomy:
                for ours, theirs in zip(fixed.layers, cache.layers):
                    ours.take_buffers(theirs)
            return fixed
        if type(cache) is not DynamicCache or cache.offloading:
            return None
        if not cache.layers:  # created without a config, such a cache adds layers when they are first used
            cache.layers = [DynamicLayer() for _ in range(config.num_hidden_layers)]
        layers = cache.layers
        if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
            return None
        growing = cls(layers=[GrowingLayer(getattr(layer, "sliding_window", None)) for layer in layers])
        length = layers[0].get_seq_length()  # not 0 if the user's cache holds an earlier part of the prompt
        for ours, theirs in zip(growing.layers, layers):
            if length:
                # A sliding-window layer holds only the last columns, so its buffers start at column `first`.
                ours.lazy_initialization(theirs.keys, theirs.values)
                ours.first = ours.cursor = ours.shortest = length - theirs.keys.shape[2]
                ours.update(theirs.keys, theirs.values)
                ours.shortest = length
        return growing

    @property
    def is_fixed(self) -> bool:
        """Whether the buffers have a fixed size."""
        return isinstance(self.layers[0], FixedLayer)

    def move(self, branches: Branches, cursor: int | Tensor, columns: Tensor) -> None:
        """Copy the columns of each row's branch to the end of the row.

        Args:
            branches: The accepted branches.
            cursor: First column of the step's nodes; an integer tensor of one number does too.
            columns: (batch, 1) number of columns that each row owned before the step.
        """
        sources = cursor + branches.nodes  # (batch, longest)
        # What fills up a short branch is copied to columns beyond the row's end, which the next step overwrites.
        targets = columns + torch.arange(sources.shape[1], device=columns.device)  # (batch, longest)
        if len(columns) > 1:  # rows that have ended copy columns to themselves
            targets = targets.where(branches.counts > 0, sources)
        shared = _Moves(sources, targets)
        for layer in self.layers:
            layer.move(shared)

    def set_cursor(self, cursor: int | Tensor, shortest: int | None) -> None:
        """Set, in every layer, the next step's first column and the length of the shortest row that still generates.

        Layers of fixed size need no `shortest` and take a tensor of one number as the cursor.
        """
        for layer in self.layers:
            layer.set_cursor(cursor, shortest)

    def hand_back(self, cache: Cache, length: int) -> None:
        """Copy the first `length` columns to the cache that this one replaced, as if it had been used all along.

        Columns beyond a row's own end, where `generate` pads, hold other values than they would have.

        Args:
            cache: The cache that was given to `replacing`.
            length: Length of the longest row.
        """
        for ours, theirs in zip(self.layers, cache.layers):
            if isinstance(ours, FixedLayer):
                ours.set_cursor(length)
                ours.give_buffers(theirs, length)
                continue
            if not theirs.is_initialized:
                theirs.lazy_initialization(ours.keys, ours.values)
            kept = slice(0, length - ours.first)
            if ours.window is not None:  # transformers' sliding layers keep window - 1 columns
                kept = slice(max(length - ours.first - ours.window + 1, 0), kept.stop)
                theirs.cumulative_length = length
            theirs.keys, theirs.values = ours.keys[:, :, kept], ours.values[:, :, kept]


@contextmanager
def static_cache_reset_on_error(model: nn.Module, cache: Cache | None) -> Iterator[None]:
    """If an exception is raised inside, empty a static cache that was empty before, and let the next call use it.

    `generate` keeps a static cache of its own with the model and asks for the size of its buffers in the next call. Until
    `hand_back`, new buffers are the tree cache's alone. A cache that has none is therefore dropped from the model.

    Args:
        model: The model.
        cache: Cache that `generate` prepared or the user passed.
    """
    is_static = type(cache) is StaticCache and all(isinstance(layer, StaticLayer) for layer in cache.layers)
    was_empty = is_static and not int(cache.get_seq_length())
    try:
        yield
    except BaseException:
        if was_empty:
            if not all(layer.is_initialized for layer in cache.layers):
                forget_cache(model, cache)
            cache.reset()  # its buffers may be the tree cache's too, and hold nodes that were not accepted
        raise
