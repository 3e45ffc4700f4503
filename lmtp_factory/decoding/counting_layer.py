"""A static cache layer that counts its columns in a tensor, on all supported versions of transformers.

Its buffers and its count can be shared with a layer of transformers' own, which persists from call to call.
"""

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from .compat import TAKES_COLUMNS


class _Since54(StaticLayer):
    """Since transformers 5.4 every static layer counts its columns.

    Attributes:
        cumulative_length: (1,) number of columns.
    """

    def take_buffers(self, layer: StaticLayer) -> None:
        """Share the buffers and the count of an empty layer."""
        vars(self).update(vars(layer))

    def give_buffers(self, layer: StaticLayer, length: int) -> None:
        """Let a layer share the buffers and the count of `length` columns."""
        vars(layer).update(vars(self))
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int = length


class _Until53(StaticLayer):
    """Until transformers 5.3 a static layer has no count: its length is the number of columns whose keys are not all zero.

    Attributes:
        cumulative_length: (1,) number of columns.
    """

    def __init__(self, max_cache_len: int):
        super().__init__(max_cache_len)
        self.cumulative_length = torch.zeros(1, dtype=torch.long)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create the buffers, and move the count to their device."""
        super().lazy_initialization(key_states, value_states)
        self._place_count()

    def _place_count(self) -> None:
        self.cumulative_length = self.cumulative_length.to(self.device)
        torch._dynamo.mark_static_address(self.cumulative_length)  # or CUDA graphs would skip a step that changes it

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write (batch, heads, nodes, head size) states behind the counted columns; return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        nodes = key_states.shape[2]
        columns = self.cumulative_length + torch.arange(nodes, device=self.device)  # (nodes,)
        self.cumulative_length += nodes
        return super().update(key_states, value_states, {"cache_position": columns})

    def get_seq_length(self) -> Tensor:
        """Return the number of columns, (1,)."""
        return self.cumulative_length

    def take_buffers(self, layer: StaticLayer) -> None:
        """Share the buffers of an empty layer, and the count that `give_buffers` left with it."""
        fresh = self.cumulative_length
        vars(self).update(vars(layer))
        self.cumulative_length = vars(self).pop("count_of_ours", fresh)
        self.cumulative_length.zero_()
        self._place_count()

    def give_buffers(self, layer: StaticLayer, length: int) -> None:
        """Let a layer share the buffers. What lies behind `length` columns is cleared, because the layer would count it."""
        for buffer in (self.keys, self.values):  # (batch, heads, columns, head size)
            buffer[:, :, length:] = 0
        shared = vars(self) | {"count_of_ours": self.cumulative_length}
        del shared["cumulative_length"]
        vars(layer).update(shared)
        if hasattr(layer, "cumulative_length"):  # of a layer with a sliding window
            layer.cumulative_length = length


CountingLayer = _Until53 if TAKES_COLUMNS else _Since54
