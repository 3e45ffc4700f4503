"""Duration of a decoding step on this device: forwards by number of tokens, and the draft."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache

from .. import geometry
from ..decoding.cache import TreeCache
from ..decoding.compat import CACHE
from ..decoding.cpu_prepacked import prepacked_if_possible
from ..decoding.draft import Window, candidates_of, unembeddings_kept
from ..decoding.state import one_row_state
from ..decoding.tree import chain_paths, fixed, grow
from ..decoding.tree_config import DEFAULT_WIDTH, CostCurve
from ..decoding.verify import verify
from ..modeling.heads import lm_logits
from ..modeling.layer_states import recorded


SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class StepCosts:
    """Median durations in seconds.

    Attributes:
        verify: Duration of a forward with logits, by its number of tokens.
        draft: Duration of one draft, including its tree.
    """

    verify: CostCurve
    draft: float


def measure_costs(model: nn.Module, **options) -> StepCosts:
    """Time forwards and the draft of all heads; see `measure_drafts` for the options."""
    return measure_drafts(model, [geometry.lookback_pairs(model.leap_heads.config.offsets)], **options)[0]


@torch.no_grad()
def measure_drafts(
    model: nn.Module,
    drafts: Sequence[Sequence[tuple[int, int]]],
    sizes: Sequence[int] = SIZES,
    context: int = 256,
    repeats: int = 9,
    nodes: int = 32,
) -> list[StepCosts]:
    """Time forwards, and drafts that use some of the heads.

    Args:
        model: A model with leap heads.
        drafts: The `(head, back)` pairs of each draft, see `candidates_of`.
        sizes: Numbers of tokens of the forwards.
        context: Number of cached tokens before them.
        repeats: Number of measurements, of which the median is taken.
        nodes: Number of nodes of the drafted trees.

    Returns:
        The costs with each draft. The forwards are timed once and the same in all of them.
    """
    device, config = model.device, model.config.get_text_config()
    window_size = 1 + max(back for pairs in drafts for _, back in pairs)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, context), generator=generator).to(device)
    cache = TreeCache.replacing(DynamicCache(config=config), config, columns=0)
    with prepacked_if_possible(model), unembeddings_kept():
        with recorded(model) as layers:
            hidden = model.base_model(input_ids=ids, use_cache=True, **{CACHE: cache}).last_hidden_state
        window = Window.of_prompt(model.leap_heads.inputs(hidden, layers), [context], window_size)
        window.roots = ids[:, 0]
        state = one_row_state(cache, context, last_position=1 << 30, device=device)

        def forward(tree, tokens) -> None:
            with recorded(model) as layers:
                hidden = verify(model, tokens, tree, state)
            lm_logits(model, hidden)
            model.leap_heads.inputs(hidden, layers)

        def propose(pairs) -> None:
            candidates = candidates_of(model, window, pairs, DEFAULT_WIDTH)
            tree = grow(candidates.probabilities, nodes)
            tree.tokens(ids[:, 0], candidates.tokens)

        jobs: dict[tuple[str, int], Callable[[], None]] = {}
        for number, pairs in enumerate(drafts):
            jobs["draft", number] = partial(propose, pairs)
        for size in sizes:
            tree, tokens = fixed(chain_paths(size), device), ids[:, :1].expand(1, size)
            jobs["verify", size] = partial(forward, tree, tokens)
        seconds = _medians(jobs, repeats, device)
    verify_seconds = CostCurve({size: seconds["verify", size] for size in sizes})
    return [StepCosts(verify_seconds, seconds["draft", number]) for number in range(len(drafts))]


def _medians(jobs: Mapping[Hashable, Callable[[], None]], repeats: int, device: torch.device) -> dict[Hashable, float]:
    """Return the median seconds of each job. Jobs run in turns, so that slow phases of the machine affect all."""
    times: dict[Hashable, list[float]] = {name: [] for name in jobs}
    for repeat in tqdm(range(repeats + 2), desc="timing", unit="round"):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat >= 2:  # two warm-up rounds
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}
