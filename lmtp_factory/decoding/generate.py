"""Look-back decoding behind ``model.generate``: draft, verify, accept, commit, until every row has ended.

``generate`` prepares processors, criteria, masks and caches as always and then calls ``_sample`` for greedy search and
sampling; :func:`decode` stands in for that one method. All that ``generate`` promises therefore holds, and beams, assisted
and contrastive generation never come here.
"""

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .. import geometry
from ..errors import LMTPError
from . import cpu_prepacked
from .accept import Acceptor
from .cache import TreeCache
from .draft import Window
from .drafter import Drafter
from .obstacles import obstacle
from .plan import TreePlan
from .stats import DecodeStats
from .strategies import STRATEGIES
from .stream import Stream
from .verify import Verifier, logits_of, takes_trees


logger = logging.getLogger(__name__)


@dataclass
class Request:
    """What one call of ``generate`` asks of the heads.

    Attributes:
        strategy: ``backward`` looks back, ``forward`` fills the window with plain steps first (the paper's F-MTP), ``off``
            is stock; ``auto`` is ``backward``.
        plan: of the tree; None takes the model's own, ``lmtp/tree.json`` or the device's default.
        stats: to add to.
        arrived: whether the call came to :func:`decode`.
    """

    strategy: str = "auto"
    plan: TreePlan | None = None
    stats: DecodeStats = field(default_factory=DecodeStats)
    arrived: bool = False

    def check(self) -> None:
        """Raise an LMTPError for an unknown strategy."""
        if self.strategy not in STRATEGIES:
            raise LMTPError(f"lmtp_decode is {self.strategy!r}, but it has to be one of {', '.join(STRATEGIES)}.")


_request: ContextVar[Request | None] = ContextVar("lmtp_request", default=None)


@contextmanager
def requested(request: Request, streamer: BaseStreamer | None) -> Iterator[None]:
    """``_sample`` inside this context (and thread) sees ``request``; an error still ends the stream."""
    token = _request.set(request)
    try:
        request.check()
        yield
        if not request.arrived and request.strategy != "off":
            _leave_to_stock(request.stats, "beam search, assisted and other special generation has no look-back")
    except BaseException:
        if streamer is not None:
            streamer.end()  # whoever reads it would wait for ever
        raise
    finally:
        _request.reset(token)


def decode(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    streamer: BaseStreamer | None,
    model_kwargs: dict,
) -> GenerateDecoderOnlyOutput | Tensor | None:
    """Generate with the heads.

    Args:
        input_ids: (batch, prompt length), padded on the left.
        model_kwargs: the model's inputs as ``generate`` prepared them, with ``past_key_values``.

    Returns:
        What ``_sample`` would return; None where this call cannot be sped up, after saying why once.

    Raises:
        LMTPError: a static tree names candidates beyond the vocabulary.
    """
    request = _request.get() or Request()
    request.arrived, stats = True, request.stats
    if request.strategy == "off":
        return None
    plan = request.plan or model.decoding_plan()
    config = model.config.get_text_config()
    reason = obstacle(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
    reason = reason or ("synced_gpus is on" if synced_gpus else None)
    cache = given = None
    if reason is None:
        given = model_kwargs["past_key_values"]
        new = generation_config.max_length - input_ids.shape[1]
        cache = TreeCache.replacing(given, config, columns=prompt_length(input_ids, model_kwargs) + new + plan.nodes)
        reason = None if cache is not None else f"a cache of type {type(given).__name__} cannot hold trees"
    if reason is None and not takes_trees(model):
        reason = "a forward over a tree is not what forwards over its branches are"
    if reason is not None:
        _leave_to_stock(stats, reason)
        return None
    _check_ranks(plan, config.vocab_size)
    stats.strategy = "backward" if request.strategy == "auto" else request.strategy
    generation = Generation(
        model, cache, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, stats
    )
    # torch.compile lays weights out by itself and does not take layers that have been laid out; nor does autocast.
    pack = not generation.compiled and not torch.is_autocast_enabled("cpu") and cpu_prepacked.can_prepack(model)
    with cpu_prepacked.prepacked(model) if pack else nullcontext(), stats.timed("total", input_ids.device):
        generation.run(plan, streamer)
    return generation.result(given)


def _check_ranks(plan: TreePlan, vocabulary: int) -> None:
    """Raise an LMTPError where a static tree names candidates that do not exist; a dynamic one takes what there is."""
    deepest = max(plan.ranks(), default=0) if plan.kind == "static" else 0
    if deepest >= vocabulary:
        raise LMTPError(
            f"The static tree takes candidates down to rank {deepest}, but the vocabulary has {vocabulary} tokens (ranks 0 "
            f"to {vocabulary - 1}): measure a tree on this model with lmtp-cli tree."
        )


def prompt_length(input_ids: Tensor, model_kwargs: dict) -> int:
    """Number of the prompt's tokens, some of which may be in the cache already."""
    embedded = model_kwargs.get("inputs_embeds")
    return (input_ids if embedded is None else embedded).shape[1]


class Generation:
    """The state of one call.

    Attributes:
        acceptor: sequences and their ends.
        window: the last hidden states, from which the next draft is made.
        home: the logits' device, where trees are made and walked.
        roots: (batch,) the last token of each row.
        owned: (batch, 1) the columns of the cache that each row owns.
        compiled: whether forwards are, as ``generate`` would compile the model.
    """

    def __init__(self, model, cache, input_ids, processors, criteria, config, model_kwargs, stats):
        self.model, self.cache, self.config, self.stats = model, cache, config, stats
        self.model_kwargs = {**model_kwargs, "past_key_values": cache}
        self.input_ids, self.device = input_ids, input_ids.device
        self.acceptor = Acceptor(input_ids, processors, criteria, config)
        pad = config._pad_token_tensor
        self.pad_token = None if pad is None else int(pad)
        self.offsets = model.leap_heads.config.offsets
        self.window: Window | None = None
        self.compiled = model._valid_auto_compile_criteria(self.model_kwargs, config)

    def run(self, plan: TreePlan, streamer: BaseStreamer | None) -> None:
        """The loop."""
        stream = Stream(streamer, self.acceptor, self.pad_token)
        with self.stats.timed("prefill", self.device):
            self.prefill()
        stream.flush()
        drafter = Drafter(self.model, plan, self.offsets, constant=self.cache.is_fixed)
        fill = geometry.window(self.offsets) - 1 if self.stats.strategy == "forward" else 0
        plain_steps = 0
        while not self.acceptor.finished():
            started = time.perf_counter()
            with self.stats.timed("draft", self.device):
                if plain_steps < fill:
                    tree, tokens = drafter.plain(self.roots)
                else:
                    active = [not row.done for row in self.acceptor.rows]
                    tree, tokens = drafter.draft(self.window, self.roots, active, self.acceptor.wanted())
            plain_steps = plain_steps + 1 if tree.nodes == 1 else 0
            with self.stats.timed("verify", self.device):
                hidden = self.verifier(tokens, tree, self.columns(), self.owned)
                logits = logits_of(self.model, hidden)
            with self.stats.timed("accept", self.device):
                branches = self.acceptor.walk(logits, tokens, tree.parents)
            self.stats.count(tree.nodes, branches)
            with self.stats.timed("commit", self.device):
                self.commit(hidden, branches)
            drafter.learn(tree, branches, time.perf_counter() - started)
            stream.flush()
        stream.end()
        self.stats.rows += len(self.acceptor.rows)
        self.stats.tokens += sum(row.length - self.input_ids.shape[1] for row in self.acceptor.rows)

    def prefill(self) -> None:
        """The prompt's forward: caches, window and the first token."""
        model, kwargs = self.model, self.model_kwargs
        known = int(self.cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        length = prompt_length(self.input_ids, kwargs)
        # A mask longer than the input_ids says that these are new ones only.
        whole = kwargs.get("inputs_embeds") is not None or mask is None or mask.shape[1] == length
        unseen = length - known if known and whole else None
        inputs = model.prepare_inputs_for_generation(
            self.input_ids, next_sequence_length=unseen, is_first_iteration=True, **kwargs
        )
        dropped = ("logits_to_keep", "labels", "output_attentions", "output_hidden_states", "return_dict")
        inputs = {name: value for name, value in inputs.items() if name not in dropped}
        hidden = model.base_model(**inputs).last_hidden_state

        start = int(self.cache.get_seq_length())
        padded = mask is not None and not bool(mask.all())
        lengths = mask.sum(-1).tolist() if padded else [length] * len(self.input_ids)
        size = geometry.window(self.offsets)
        self.window = Window.of_prompt(hidden, [min(n, hidden.shape[1]) for n in lengths], size)
        for row in self.acceptor.rows:
            row.columns = start
        for layer in self.cache.layers:
            layer.settle(start, start)
        logits = logits_of(model, hidden[:, -1:])
        self.home = logits.device
        self.verifier = Verifier(
            model,
            self.cache,
            shift=(kwargs["position_ids"][..., -1:] + 1 - start).to(self.home),
            prompt_mask=mask.bool().to(self.home) if padded else None,
            last_position=int(kwargs["position_ids"][..., -1].max()) + self.acceptor.wanted(),
            forward=self.model.compiled_backbone(self.config.compile_config) if self.compiled else None,
        )
        nothing = torch.zeros(len(self.input_ids), 1, dtype=torch.long, device=self.home)
        self.acceptor.walk(logits, nothing, nothing)
        self.upload()

    def upload(self, *numbers: list[list[int]]) -> list[Tensor]:
        """Set :attr:`roots` and :attr:`owned`; send them and lists of (batch, n) ``numbers`` to the device in one piece."""
        rows = self.acceptor.rows
        parts = [[[row.last] for row in rows], [[row.columns] for row in rows], *numbers]
        widths = [len(part[0]) for part in parts]
        flat = [number for part in parts for row in part for number in row]
        sent = torch.tensor(flat).to(self.home, non_blocking=True).split([len(rows) * width for width in widths])
        roots, self.owned, *sent = (part.view(len(rows), width) for part, width in zip(sent, widths))
        self.roots = roots[:, 0]
        return sent

    def columns(self) -> list[int]:
        """Of the cache, owned by each row."""
        return [row.columns for row in self.acceptor.rows]

    def commit(self, hidden: Tensor, branches: list[list[int]]) -> None:
        """Keep the accepted branches in cache, window and positions; each row's next root stands behind its branch."""
        columns = self.columns()
        cursor = max(columns)
        kept = [[cursor + node for node in branch] for branch in branches]
        for row, branch in zip(self.acceptor.rows, branches):
            row.columns += len(branch)
        places, moves = self.upload(self.window.places(branches), self.cache.moves(kept, columns))
        self.cache.keep(kept, columns, moves)
        self.window.push(hidden, branches, places)

    def result(self, given) -> GenerateDecoderOnlyOutput | Tensor:
        """What ``_sample`` returns; ``given``, the cache that the caller knows, gets the contents of ours."""
        sequences = self.acceptor.padded(self.pad_token)
        self.cache.hand_back(given, max(self.columns()))
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self.acceptor.stacked("scores") if self.acceptor.keep_scores else None,
            logits=self.acceptor.stacked("logits") if self.acceptor.keep_logits else None,
            past_key_values=given,
        )


def _leave_to_stock(stats: DecodeStats, reason: str) -> None:
    stats.strategy = f"off: {reason}"
    _say_once(f"Decoding without leap heads: {reason}.")


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
