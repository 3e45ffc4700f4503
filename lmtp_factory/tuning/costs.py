"""What a step costs on this device: a forward by its number of tokens, and the draft."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache

from .. import geometry
from ..decoding import cpu_prepacked
from ..decoding.cache import TreeCache
from ..decoding.draft import Window, propose_candidates
from ..decoding.state import one_row_state
from ..decoding.tree import chain_paths, fixed, grow
from ..decoding.tree_config import DEFAULT_WIDTH, CostCurve
from ..decoding.verify import Verifier
from ..modeling.heads import lm_logits


SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class StepCosts:
    """Seconds, medians.

    Attributes:
        verify: of a forward with logits, by its number of tokens.
        draft: of making one draft and its tree.
    """

    verify: CostCurve
    draft: float


@torch.no_grad()
def measure_costs(
    model: nn.Module, sizes: Sequence[int] = SIZES, context: int = 256, repeats: int = 9, nodes: int = 32
) -> StepCosts:
    """Time forwards of `sizes` tokens behind `context` cached ones, in turn, and drafts of `nodes` nodes."""
    device, config = model.device, model.config.get_text_config()
    offsets = model.leap_heads.config.offsets
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, context), generator=generator).to(device)
    cache = TreeCache.replacing(DynamicCache(config=config), config, columns=0)
    with cpu_prepacked.prepacked(model) if cpu_prepacked.can_prepack(model) else nullcontext():
        hidden = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        window = Window.of_prompt(hidden, [context], geometry.window(offsets))
        state = one_row_state(cache, context, last_position=1 << 30, device=device)
        forward = Verifier(model)

        def verify(tree, tokens) -> None:
            cache.set_cursor(context, context)
            lm_logits(model, forward(tokens, tree, state))

        def propose() -> None:
            candidates = propose_candidates(model, window, geometry.reach(offsets) - 1, DEFAULT_WIDTH)
            tree = grow(candidates.probabilities, nodes)
            tree.tokens(ids[:, 0], candidates.tokens)

        jobs: dict[int, Callable[[], None]] = {0: propose}
        for size in sizes:
            tree, tokens = fixed(chain_paths(size), device), ids[:, :1].expand(1, size)
            jobs[size] = lambda tree=tree, tokens=tokens: verify(tree, tokens)
        seconds = _medians(jobs, repeats, device)
    return StepCosts(CostCurve({size: seconds[size] for size in sizes}), seconds[0])


def _medians(jobs: dict[int, Callable[[], None]], repeats: int, device: torch.device) -> dict[int, float]:
    """Median seconds of each job; the jobs take turns, so that a slow moment of the machine hits them alike."""
    times: dict[int, list[float]] = {name: [] for name in jobs}
    for repeat in tqdm(range(repeats + 2), desc="timing", unit="round"):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat >= 2:  # the first rounds warm up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}
