"""Key-value caches that a tree can be written to and a branch of it kept in.

A column is one place in the cache. Row `b` of the batch owns the columns below its own length; a step writes its
nodes at a common cursor, the greatest length, and afterwards moves the accepted branch down to the row's end, in place.
"""

from collections.abc import Sequence

from torch import Tensor
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


class _Movable:
    """What both kinds of layer share: keys and values of shape (batch, heads, columns, head size)."""

    first = 0  # column that the buffers start with

    def move(self, moves: "_Moves") -> None:
        """Copy columns to other ones; they may overlap."""
        for buffer in (self.keys, self.values):
            source, target = moves.of(buffer, self.first)
            if len(buffer) == 1:
                buffer.index_copy_(2, target, buffer.index_select(2, source))
            else:
                buffer.scatter_(2, target, buffer.gather(2, source))


class _Moves:
    """The columns that a step copies, as indices into buffers; made once for all layers that can share them."""

    def __init__(self, columns: Tensor):
        self.on, self.made = {columns.device: columns}, {}

    def of(self, buffer: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Indices of what to copy from `buffer` (batch, heads, columns, head size) and where to."""
        device, heads, size = buffer.device, buffer.shape[1], buffer.shape[3]
        key = device, first, heads, size
        if key not in self.made:
            if device not in self.on:
                self.on[device] = next(iter(self.on.values())).to(device)
            columns = self.on[device] - first if first else self.on[device]
            both = columns.chunk(2, dim=1)
            if len(buffer) == 1:
                self.made[key] = tuple(part[0] for part in both)
            else:
                self.made[key] = tuple(part[:, None, :, None].expand(-1, heads, -1, size) for part in both)
        return self.made[key]


class GrowingLayer(_Movable, CacheLayerMixin):
    """Buffers that grow geometrically; a sliding-window layer also forgets columns that no row can see any more.

    Args:
        window: how many last tokens the layer attends to, the query counted; None for all.
    """

    is_compileable = False

    def __init__(self, window: int | None = None):
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.cursor = self.shortest = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty buffers like the states'."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def visible_from(self) -> int:
        """The first column that some row's next query may attend to."""
        return 0 if self.window is None else max(self.first, self.shortest - self.window + 1)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write at the cursor; keys and values from `visible_from` to the end of what was written."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.cursor + key_states.shape[2]
        if end - self.first > self.keys.shape[2]:
            self._make_room(end)
        written = slice(self.cursor - self.first, end - self.first)
        self.keys[:, :, written] = key_states
        self.values[:, :, written] = value_states
        visible = slice(self.visible_from() - self.first, end - self.first)
        self.cursor = end
        return self.keys[:, :, visible], self.values[:, :, visible]

    def _make_room(self, end: int) -> None:
        """New buffers for columns up to `end` and half as many again, without what is out of sight."""
        first = self.visible_from()
        old = slice(first - self.first, self.cursor - self.first)
        columns = max((end - first) * 3 // 2, 64)
        for name in ("keys", "values"):
            buffer = getattr(self, name)
            roomy = buffer.new_empty(*buffer.shape[:2], columns, buffer.shape[3])
            roomy[:, :, : old.stop - old.start] = buffer[:, :, old]
            setattr(self, name, roomy)
        self.first = first

    def set_cursor(self, cursor: int, shortest: int) -> None:
        """Where the next step writes, and the length of the row that has come least far."""
        self.cursor, self.shortest = cursor, shortest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns that `update` will return, and the first of them."""
        return self.cursor + query_length - self.visible_from(), self.visible_from()

    def get_seq_length(self) -> int:
        """Columns written."""
        return self.cursor

    def get_max_cache_shape(self) -> int:
        """No maximum."""
        return -1

    get_max_length = get_max_cache_shape  # its name since transformers 5.17


class FixedLayer(_Movable, StaticLayer):
    """Buffers of one size and address for `torch.compile` and CUDA graphs; sliding windows are left to the mask."""

    def set_cursor(self, cursor: int, shortest: int) -> None:
        """Where the next step writes."""
        self.cumulative_length.fill_(cursor)


class TreeCache(Cache):
    """A cache for look-back decoding; see the module's docstring."""

    @classmethod
    def replacing(cls, cache: Cache, config: PretrainedConfig, columns: int) -> "TreeCache | None":
        """A cache with the layers and contents of `cache`; None where its kind cannot hold trees.

        Args:
            cache: as `generate` prepared it or a user gave it.
            config: the text model's.
            columns: size of a static cache.
        """
        if type(cache) is StaticCache:
            if cache.offloading or int(cache.get_seq_length()):
                return None
            # generate() resets a cache and uses it again: so are its buffers, whose addresses compiled code knows.
            roomy = all(layer.is_initialized and layer.max_cache_len >= columns for layer in cache.layers)
            fixed = cls(layers=[FixedLayer(columns) for _ in cache.layers])
            if roomy:
                for ours, theirs in zip(fixed.layers, cache.layers):
                    ours.__dict__.update(theirs.__dict__)
            return fixed
        if type(cache) is not DynamicCache or cache.offloading:
            return None
        if not cache.layers:  # made without a config: layers come as they are first used
            cache.layers = [DynamicLayer() for _ in range(config.num_hidden_layers)]
        layers = cache.layers
        if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
            return None
        growing = cls(layers=[GrowingLayer(getattr(layer, "sliding_window", None)) for layer in layers])
        length = layers[0].get_seq_length()
        for ours, theirs in zip(growing.layers, layers):
            if length:
                ours.lazy_initialization(theirs.keys, theirs.values)
                ours.first = ours.cursor = ours.shortest = length - theirs.keys.shape[2]
                ours.update(theirs.keys, theirs.values)
                ours.shortest = length
        return growing

    @property
    def is_fixed(self) -> bool:
        """Whether the buffers have one size."""
        return isinstance(self.layers[0], FixedLayer)

    def moves(self, branches: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
        """(batch, 2 n) the columns of each row that `keep` copies, and then where to; n is 0 where none has to move.

        Args:
            branches: columns of each row's branch, from the root down; empty for a finished row, which keeps what it
                has.
            lengths: of the rows before this; the step's nodes were written from the greatest of them on.
        """
        if not any(branch and branch[-1] != length + len(branch) - 1 for branch, length in zip(branches, lengths)):
            return [[] for _ in branches]
        longest, somewhere = max(map(len, branches)), max(lengths)
        moves = []
        for branch, length in zip(branches, lengths):
            source, target = list(branch) or [somewhere], list(range(length, length + len(branch))) or [somewhere]
            # Short branches repeat their last move, and finished rows move a column to itself.
            more = longest - len(source)
            moves.append([*source, *source[-1:] * more, *target, *target[-1:] * more])
        return moves

    def keep(self, branches: Sequence[Sequence[int]], lengths: Sequence[int], moves: Tensor) -> None:
        """Keep one branch of the step's tree in each row, behind what the row had, and forget the others.

        Args:
            moves: what `moves` says of `branches` and `lengths`, on a device.
        """
        if moves.shape[1]:
            shared = _Moves(moves)
            for layer in self.layers:
                layer.move(shared)
        grown = [length + len(branch) for branch, length in zip(branches, lengths)]
        self.set_cursor(max(grown), min(length for length, branch in zip(grown, branches) if branch))

    def set_cursor(self, cursor: int, shortest: int) -> None:
        """Where the next step writes in every layer, and the length of the shortest row that still generates."""
        for layer in self.layers:
            layer.set_cursor(cursor, shortest)

    def hand_back(self, cache: Cache, length: int) -> None:
        """Give the first `length` columns to the cache that this one replaced, as if it had been in use all along.

        Only what rows hold behind their own end, where `generate` pads, is not what it would have been.
        """
        for ours, theirs in zip(self.layers, cache.layers):
            if isinstance(ours, FixedLayer):
                theirs.__dict__.update(ours.__dict__)
                if hasattr(theirs, "cumulative_length_int"):
                    theirs.cumulative_length_int = length
                continue
            if not theirs.is_initialized:
                theirs.lazy_initialization(ours.keys, ours.values)
            kept = slice(0, length - ours.first)
            if ours.window is not None:
                kept = slice(max(length - ours.first - ours.window + 1, 0), kept.stop)
                theirs.cumulative_length = length
            theirs.keys, theirs.values = ours.keys[:, :, kept], ours.values[:, :, kept]
