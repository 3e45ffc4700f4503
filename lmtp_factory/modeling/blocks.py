"""Residual blocks of a leap head, and what the first of them reads.

A head of `head_inputs: state` reads a final hidden state (L-MTP, section 3.2). A head of `head_inputs: state_token` also
reads the embedding of the newest known token. When token `t + d` is drafted from the state at `t - back`, token `t + 1` is
known: it is the root of the draft tree. So the head reads the state at `s` and token `s + 1 + back`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dtypes import cast_like


# Width of the hidden layer of a GatedBlock, in multiples of the hidden size.
EXPANSION = 4
# Returns the function that computes a linear layer; decoding gives one that computes it in int8.
Linear = Callable[[nn.Linear], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class KnownToken:
    """The newest known token of each draft.

    Attributes:
        embedding: (..., hidden) embedding of the token, broadcastable to the states.
        back: (...) int64 number of positions from the state to the newest state.
    """

    embedding: Tensor
    back: Tensor


def unchanged(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Return `layer` itself, see `Linear`."""
    return layer


class _Block(nn.Module):
    """A residual block. It starts as the identity.

    Args:
        hidden_size: Width of its input and output.
        backs: Number of positions, from the newest state on, at which the block may read the state; 0 if it reads the
            state alone.
        width: Width of its first linear layer's output.
    """

    def __init__(self, hidden_size: int, backs: int, width: int):
        super().__init__()
        # A bias for each distance to the newest state, instead of the linear layer's own.
        self.leap_back = nn.Parameter(torch.zeros(backs, width)) if backs else None

    def read(self, layer: nn.Linear, hidden: Tensor, known: KnownToken | None, linear: Linear) -> Tensor:
        """Apply the first linear layer to (..., hidden) states and the known tokens."""
        hidden = cast_like(hidden, layer)
        if self.leap_back is None:
            return linear(layer)(hidden)
        embedding = _normed(known.embedding).to(hidden.dtype).expand_as(hidden)
        inputs = torch.cat([_normed(hidden).to(hidden.dtype), embedding], dim=-1)  # (..., 2 * hidden)
        return linear(layer)(inputs) + self.leap_back[known.back]


class ResidualBlock(_Block):
    """`z + SiLU(W x + b)`, x the state z or both inputs. W and b are initialised to zero."""

    def __init__(self, hidden_size: int, backs: int = 0):
        super().__init__(hidden_size, backs, hidden_size)
        # The name must be unique to this package: LLaMA-Factory chooses LoRA targets and frozen modules by leaf name.
        self.leap_proj = nn.Linear(hidden_size * (2 if backs else 1), hidden_size, bias=not backs)
        self.reset(None)

    def reset(self, generator: torch.Generator | None) -> None:
        """Initialise the parameters. No random number is drawn."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor, known: KnownToken | None = None, linear: Linear = unchanged) -> Tensor:
        """Map (..., hidden) to (..., hidden)."""
        return cast_like(hidden, self.leap_proj) + F.silu(self.read(self.leap_proj, hidden, known, linear))


class GatedBlock(_Block):
    """`z + W_down (SiLU(W_gate x) * W_up x)`, `EXPANSION` times as wide as z. W_down is initialised to zero."""

    def __init__(self, hidden_size: int, backs: int = 0):
        inner = EXPANSION * hidden_size
        super().__init__(hidden_size, backs, 2 * inner)
        self.leap_gate_up = nn.Linear(hidden_size * (2 if backs else 1), 2 * inner, bias=False)
        self.leap_down = nn.Linear(inner, hidden_size, bias=False)

    def reset(self, generator: torch.Generator | None) -> None:
        """Initialise the parameters. `generator` draws W_gate and W_up."""
        nn.init.kaiming_uniform_(self.leap_gate_up.weight, a=math.sqrt(5), generator=generator)  # as nn.Linear does
        nn.init.zeros_(self.leap_down.weight)
        if self.leap_back is not None:
            nn.init.zeros_(self.leap_back)

    def forward(self, hidden: Tensor, known: KnownToken | None = None, linear: Linear = unchanged) -> Tensor:
        """Map (..., hidden) to (..., hidden)."""
        gate, up = self.read(self.leap_gate_up, hidden, known, linear).chunk(2, dim=-1)  # (..., 4 * hidden) each
        return cast_like(hidden, self.leap_down) + linear(self.leap_down)(F.silu(gate) * up)


# Values of head_block to their classes.
BLOCKS = {"linear": ResidualBlock, "mlp": GatedBlock}


def _normed(vectors: Tensor) -> Tensor:
    """Divide by the root mean square, in fp32. The scale of the embeddings therefore does not matter.

    Gemma multiplies its embeddings by a constant, in some versions outside the embedding layer.
    """
    return F.rms_norm(vectors.float(), vectors.shape[-1:], eps=1e-10)
