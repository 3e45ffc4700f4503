"""The state of one generation: sequences, key-value cache, window of hidden states and positions, advanced in one place."""

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .. import geometry
from ..modeling.heads import lm_logits
from .accept import Acceptor
from .cache import TreeCache
from .draft import Window


# What generate() prepares for the language-model wrapper, and its backbone does not take.
_WRAPPER_ONLY = ("logits_to_keep", "labels", "output_attentions", "output_hidden_states", "return_dict")


def prompt_length(input_ids: Tensor, model_kwargs: dict) -> int:
    """Number of the prompt's tokens, some of which may be in the cache already."""
    embedded = model_kwargs.get("inputs_embeds")
    return (input_ids if embedded is None else embedded).shape[1]


class DecodeState:
    """What a generation knows between two steps. After the prefill, and after each `advance`, all of it agrees.

    Attributes:
        acceptor: the sequences, and which of them have ended.
        cache: keys and values of every accepted token but the roots.
        window: the last hidden states, from which the next draft is made.
        roots: (batch,) the newest token of each row, on `device`.
        columns: (batch, 1) how many columns of the cache each row owns, on `device`.
        shift: (..., batch, 1) what a row's columns lack to the position of its root; padding and a user's own positions
            make it differ from 0.
        prompt_mask: (batch, prompt) bool, False where a row is padded; None where none is.
        last_position: that generation may reach.
        device: the logits', where trees are made and walked.
    """

    window: Window
    roots: Tensor
    columns: Tensor
    shift: Tensor
    prompt_mask: Tensor | None
    last_position: int
    device: torch.device

    def __init__(self, acceptor: Acceptor, cache: TreeCache):
        self.acceptor, self.cache = acceptor, cache

    def prefill(self, model: nn.Module, input_ids: Tensor, model_kwargs: dict) -> None:
        """The prompt's forward: fills cache and window and decides the first token.

        Args:
            input_ids: (batch, prompt length), padded on the left.
            model_kwargs: as `generate` prepared them.
        """
        kwargs = {**model_kwargs, "past_key_values": self.cache}
        known = int(self.cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        length = prompt_length(input_ids, kwargs)
        # A mask longer than the input_ids says that these are new ones only.
        whole = kwargs.get("inputs_embeds") is not None or mask is None or mask.shape[1] == length
        inputs = model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=length - known if known and whole else None,
            is_first_iteration=True,
            **kwargs,
        )
        inputs = {name: value for name, value in inputs.items() if name not in _WRAPPER_ONLY}
        hidden = model.base_model(**inputs).last_hidden_state  # (batch, new prompt tokens, hidden)

        start = int(self.cache.get_seq_length())
        padded = mask is not None and not bool(mask.all())
        lengths = mask.sum(-1).tolist() if padded else [length] * len(input_ids)
        size = geometry.window(model.leap_heads.config.offsets)
        self.window = Window.of_prompt(hidden, [min(n, hidden.shape[1]) for n in lengths], size)
        for row in self.acceptor.rows:
            row.columns = start
        self.cache.set_cursor(start, start)
        logits = lm_logits(model, hidden[:, -1:])  # (batch, 1, vocabulary)
        self.device = logits.device
        positions = kwargs["position_ids"][..., -1:]
        self.shift = (positions + 1 - start).to(self.device)
        self.prompt_mask = mask.bool().to(self.device) if padded else None
        self.last_position = int(positions.max()) + self.acceptor.remaining_tokens()
        nothing = torch.zeros(len(input_ids), 1, dtype=torch.long, device=self.device)
        self.acceptor.walk(logits, nothing, nothing)
        self._upload()

    def lengths(self) -> list[int]:
        """Number of cache columns that each row owns, on the host."""
        return [row.columns for row in self.acceptor.rows]

    def advance(self, hidden: Tensor, branches: list[list[int]]) -> None:
        """Keep one branch of the step's tree in each row: in the cache, the window and the positions.

        Args:
            hidden: (batch, nodes, hidden) final hidden states of the tree.
            branches: numbers of each row's accepted nodes, root first; empty for a row that was finished before.
        """
        lengths = self.lengths()
        cursor = max(lengths)  # where the step wrote its nodes
        kept = [[cursor + node for node in branch] for branch in branches]
        for row, branch in zip(self.acceptor.rows, branches):
            row.columns += len(branch)
        places, moves = self._upload(self.window.places(branches), self.cache.moves(kept, lengths))
        self.cache.keep(kept, lengths, moves)
        self.window.push(hidden, branches, places)

    def _upload(self, *numbers: list[list[int]]) -> list[Tensor]:
        """Roots, columns and lists of (batch, n) `numbers`, sent to the device in one piece."""
        rows = self.acceptor.rows
        parts = [[[row.last] for row in rows], [[row.columns] for row in rows], *numbers]
        widths = [len(part[0]) for part in parts]
        flat = [number for part in parts for row in part for number in row]
        sent = torch.tensor(flat).to(self.device, non_blocking=True).split([len(rows) * width for width in widths])
        roots, self.columns, *sent = (part.view(len(rows), width) for part, width in zip(sent, widths))
        self.roots = roots[:, 0]
        return sent

    def output(self, given, config: GenerationConfig, pad_token: int | None) -> GenerateDecoderOnlyOutput | Tensor:
        """What `_sample` returns; `given`, the cache that the caller knows, gets the contents of ours."""
        sequences = self.acceptor.padded(pad_token)
        self.cache.hand_back(given, max(self.lengths()))
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self.acceptor.stacked("scores") if self.acceptor.keep_scores else None,
            logits=self.acceptor.stacked("logits") if self.acceptor.keep_logits else None,
            past_key_values=given,
        )


def one_row_state(cache: TreeCache, length: int, last_position: int, device: torch.device) -> DecodeState:
    """A state for trying or timing forwards over trees: one row whose `length` tokens are in the cache, no sequence."""
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    state = DecodeState(Acceptor(ids, LogitsProcessorList(), StoppingCriteriaList(), GenerationConfig()), cache)
    cache.set_cursor(length, length)
    state.device, state.shift, state.prompt_mask = device, torch.zeros(1, 1, dtype=torch.long, device=device), None
    state.columns, state.last_position = torch.full((1, 1), length, device=device), last_position
    return state
