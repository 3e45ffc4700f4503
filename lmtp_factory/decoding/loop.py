"""The decoding loop: draft, verify, accept, advance, until every row has ended.

`generate` prepares processors, criteria, masks and caches, and calls `_sample` for greedy search and sampling. `decode`
replaces `_sample` only. Beam search, assisted and contrastive generation do not call it.
"""

import time

from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .. import geometry
from ..modeling.heads import lm_logits
from ..modeling.layer_states import recorded
from . import compat
from .accept import Acceptor
from .cache import TreeCache
from .compiled import Compiled, compiled_for
from .cpu_prepacked import prepacked_if_possible
from .draft import unembeddings_kept
from .request import current_request
from .state import DecodeState, prompt_length
from .stats import DecodeStats
from .stream import Stream
from .support import fall_back, unsupported_reason
from .tree_builder import TreeBuilder
from .tree_config import TreeConfig
from .verify import verify


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
    """Decode one prepared batch with the heads.

    Args:
        model: A model with leap heads.
        input_ids: (batch, prompt length), padded on the left.
        processors: Logits processors.
        criteria: Stopping criteria.
        config: Generation config.
        synced_gpus: Whether all ranks must run equally many forwards, see `generate`.
        streamer: Receives tokens as soon as they are accepted.
        model_kwargs: The model's inputs as `generate` prepared them, with the key-value cache.

    Returns:
        The same as `_sample`, or None if the call is not supported; the reason is logged once.

    Raises:
        LMTPError: A static tree uses candidate ranks beyond the vocabulary, or `lmtp/tree.json` is damaged.
    """
    request = current_request()
    request.arrived, stats = True, request.stats
    if request.strategy == "off":
        return None
    reason = unsupported_reason(model, input_ids, processors, criteria, config, synced_gpus, model_kwargs)
    cache = None
    if reason is None:
        compiles = compat.compiles(model, model_kwargs, config)
        tree = request.tree or model.tree_config(compiles)
        given = model_kwargs[compat.CACHE]
        new = config.max_length - input_ids.shape[1]
        columns = prompt_length(input_ids, model_kwargs) + new + tree.nodes
        cache = TreeCache.replacing(given, model.config.get_text_config(), columns)
        reason = None if cache is not None else f"a cache of type {type(given).__name__} cannot hold trees"
    if reason is not None:
        fall_back(stats, reason)
        return None
    tree.check_ranks(model.leap_heads.config.draft_vocab_size or model.config.get_text_config().vocab_size)
    stats.strategy, stats.stock_reason = "backward" if request.strategy == "auto" else request.strategy, None

    pad_token = compat.pad_token(config)
    state = DecodeState(Acceptor(input_ids, processors, criteria, config), cache)
    stream = Stream(streamer, state.acceptor, pad_token)
    weights = prepacked_if_possible(model, compiles)
    compiled = compiled_for(model, config.compile_config) if compiles else None
    with weights, unembeddings_kept(), stats.timed("total", input_ids.device):
        with stats.timed("prefill", input_ids.device):
            state.prefill(model, input_ids, config, model_kwargs)
        stats.count_prefill(len(input_ids))
        stream.flush()
        run(model, state, tree, stats, stream, compiled)
        stream.end()
    return state.output(given, config, pad_token)


def run(
    model: nn.Module,
    state: DecodeState,
    tree_config: TreeConfig,
    stats: DecodeStats,
    stream: Stream,
    compiled: Compiled | None,
) -> None:
    """Run the loop from the first token after the prefill to the end of the last row."""
    offsets, acceptor = model.leap_heads.config.offsets, state.acceptor
    is_compiled = compiled is not None and acceptor.follows_argmax  # the whole step
    unembeddings = compiled.unembeddings(model) if is_compiled else None
    builder = TreeBuilder(model, tree_config, state.cache.is_fixed, state.device, unembeddings)
    # F-MTP (the paper's appendix) takes plain steps to fill the window instead of reusing past states.
    plain_before_draft = geometry.window(offsets) - 1 if stats.strategy == "forward" else 0
    plain_steps = 0
    while not acceptor.finished():
        started, plain = time.perf_counter(), plain_steps < plain_before_draft
        if is_compiled:
            with stats.timed("verify", state.device):  # of this step all phases that the device computes
                read, nodes = compiled.step(model, state, builder, drafts=builder.nodes(plain) > 1)
            with stats.timed("accept", state.device):
                on_host = acceptor.append_followed(read)
            with stats.timed("commit", state.device):
                state.record(on_host)
        else:
            with stats.timed("draft", state.device):
                tree, tokens = builder.build(state, plain)  # tokens: (batch, nodes)
                nodes = tree.nodes
            with stats.timed("verify", state.device), recorded(model) as layers:
                hidden = (compiled.verify if compiled else verify)(model, tokens, tree, state)  # (batch, nodes, hidden)
                logits = lm_logits(model, hidden)  # (batch, nodes, vocabulary)
            with stats.timed("accept", state.device):
                branches, on_host = acceptor.accept(logits, tokens, tree, state.goes_on)
            with stats.timed("commit", state.device):
                state.advance(model.leap_heads.inputs(hidden, layers), branches, on_host)
        plain_steps = plain_steps + 1 if nodes == 1 else 0
        stats.count(nodes, on_host)
        builder.learn(nodes, on_host, time.perf_counter() - started)
        stream.flush()
