"""From how many tokens on a packed weight is faster than an ordinary one on this CPU."""

import threading
import time
from functools import cache

import torch
from torch import Tensor, nn

from ..modeling import onednn


# Number of tokens for which oneDNN chooses the layout. Other numbers work too.
_TUNED_FOR = 8
# Numbers of tokens for which packed and ordinary weights are timed.
_TIMED_TOKENS = (1, 2, 4, 8, 16)
# Numbers in the weights that are timed: more than a CPU's nearer caches hold, as a model's are.
_TIMED_NUMBERS = 2**24
_MOST_TIMED = 64  # weights, if they are small

_measuring = threading.Lock()


def pack(weight: Tensor) -> Tensor:
    """Return an (out, in) fp32 weight in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _TUNED_FOR)


def fewest_tokens(shape: tuple[int, int]) -> int | None:
    """Return from how many tokens on a packed weight is faster on this CPU with this number of threads.

    Measured once a process for each shape, in a fraction of a second. Another process may find another number where both
    ways take about the same time.

    Args:
        shape: (out, in) of the weight.

    Returns:
        None if it is slower even for the largest number that is timed.
    """
    with _measuring:  # two threads at once would time each other
        return _fewest_tokens(tuple(shape), torch.get_num_threads())


@cache
def _fewest_tokens(shape: tuple[int, int], threads: int) -> int | None:
    rows, width = min(shape[0], max(1, _TIMED_NUMBERS // shape[1])), shape[1]
    count = min(max(1, _TIMED_NUMBERS // (rows * width)), _MOST_TIMED)
    weights, fewest = torch.ones(count, rows, width, dtype=torch.float32, device="cpu"), None
    packed = [pack(weight) for weight in weights]
    with torch.inference_mode():
        for tokens in reversed(_TIMED_TOKENS):
            inputs = torch.ones(tokens, width, dtype=torch.float32, device="cpu")
            ordinary, with_packed = _seconds(inputs, weights, packed)
            if with_packed > ordinary:
                break
            fewest = tokens
    return fewest


def _seconds(inputs: Tensor, weights: Tensor, packed: list[Tensor], repeats: int = 5) -> tuple[float, float]:
    """Return the shortest times in seconds that ordinary and packed weights take for (tokens, in) inputs.

    They take turns, so that other load on the machine slows both.
    """
    ordinary, with_packed = [], []
    for _ in range(repeats):
        for times, product, operands in (
            (ordinary, nn.functional.linear, weights),
            (with_packed, onednn.linear, packed),
        ):
            started = time.perf_counter()
            for weight in operands:
                product(inputs, weight)
            times.append(time.perf_counter() - started)
    return min(ordinary), min(with_packed)
