"""Look-back decoding on a page: draft, verify, accept, advance, until every row has ended.

`generate` prepares processors, criteria, masks and caches as always and then calls `_sample` for greedy search and
sampling; `decode` stands in for that one method. All that `generate` promises therefore holds, and beams, assisted
and contrastive generation never come here.
"""

import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .. import geometry
from ..modeling.heads import lm_logits
from . import compat, cpu_prepacked
from .accept import Acceptor
from .cache import TreeCache
from .request import current_request
from .state import DecodeState, prompt_length
from .stats import DecodeStats
from .stream import Stream
from .support import leave_to_stock, unsupported_reason
from .tree_builder import TreeBuilder
from .tree_config import TreeConfig
from .verify import Verifier


def decode(
    model: nn.Module,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    synced_gpus: bool,
    streamer: BaseStreamer | None,
    model_kwargs: dict,
) -> GenerateDecoderOnlyOutput | Tensor | None:
    """Generate with the heads.

    Args:
        input_ids: (batch, prompt length), padded on the left.
        model_kwargs: the model's inputs as `generate` prepared them, with `past_key_values`.

    Returns:
        What `_sample` would return; None where this call cannot be sped up, after saying why once.

    Raises:
        LMTPError: a static tree names candidates beyond the vocabulary.
    """
    request = current_request()
    request.arrived, stats = True, request.stats
    if request.strategy == "off":
        return None
    tree = request.tree or model.tree_config()
    reason = unsupported_reason(model, input_ids, processors, criteria, config, synced_gpus, model_kwargs)
    cache = None
    if reason is None:
        given = model_kwargs["past_key_values"]
        new = config.max_length - input_ids.shape[1]
        columns = prompt_length(input_ids, model_kwargs) + new + tree.nodes
        cache = TreeCache.replacing(given, model.config.get_text_config(), columns)
        reason = None if cache is not None else f"a cache of type {type(given).__name__} cannot hold trees"
    if reason is not None:
        leave_to_stock(stats, reason)
        return None
    tree.check_ranks(model.config.get_text_config().vocab_size)
    stats.strategy, stats.stock_reason = "backward" if request.strategy == "auto" else request.strategy, None

    compiled = compat.compiles(model, {**model_kwargs, "past_key_values": cache}, config)
    forward = model.compiled_backbone(config.compile_config) if compiled else None
    pad_token = compat.pad_token(config)
    state = DecodeState(Acceptor(input_ids, processors, criteria, config), cache)
    stream = Stream(streamer, state.acceptor, pad_token)
    # torch.compile lays weights out by itself and does not take layers that have been laid out; nor does autocast.
    prepack = not compiled and not torch.is_autocast_enabled("cpu") and cpu_prepacked.can_prepack(model)
    with cpu_prepacked.prepacked(model) if prepack else nullcontext(), stats.timed("total", input_ids.device):
        with stats.timed("prefill", input_ids.device):
            state.prefill(model, input_ids, model_kwargs)
        stream.flush()
        run(model, state, tree, stats, stream, Verifier(model, forward))
        stream.end()
    stats.rows += len(input_ids)
    stats.tokens += sum(row.length - input_ids.shape[1] for row in state.acceptor.rows)
    return state.output(given, config, pad_token)


def run(
    model: nn.Module, state: DecodeState, tree_config: TreeConfig, stats: DecodeStats, stream: Stream, verify: Verifier
) -> None:
    """The loop, from the prefill to the end of the last row."""
    offsets = model.leap_heads.config.offsets
    builder = TreeBuilder(model, tree_config, constant=state.cache.is_fixed, device=state.device)
    # Looking forward fills the window with plain steps instead of past states (F-MTP in the paper's appendix).
    plain_before_draft = geometry.window(offsets) - 1 if stats.strategy == "forward" else 0
    plain_steps = 0
    while not state.acceptor.finished():
        started = time.perf_counter()
        with stats.timed("draft", state.device):
            if plain_steps < plain_before_draft:
                tree, tokens = builder.plain(state.roots)
            else:
                tree, tokens = builder.build(state)  # tokens: (batch, nodes)
        plain_steps = plain_steps + 1 if tree.nodes == 1 else 0
        with stats.timed("verify", state.device):
            hidden = verify(tokens, tree, state)  # (batch, nodes, hidden)
            logits = lm_logits(model, hidden)  # (batch, nodes, vocabulary)
        with stats.timed("accept", state.device):
            branches = state.acceptor.walk(logits, tokens, tree.parents)  # of each row, root first
        stats.count(tree.nodes, branches)
        with stats.timed("commit", state.device):
            state.advance(hidden, branches)
        builder.learn(tree, branches, time.perf_counter() - started)
        stream.flush()
