"""State of one generation: sequences, key-value cache, window of hidden states and positions."""

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .. import geometry
from ..modeling.heads import lm_logits
from ..modeling.layer_states import recorded
from . import compat
from .accept import Acceptor
from .branches import Branches
from .cache import TreeCache
from .draft import Window
from .tree import fixed


# Inputs that generate() prepares for `*ForCausalLM.forward` and that the backbone does not accept.
_WRAPPER_ONLY = ("logits_to_keep", "labels", "output_attentions", "output_hidden_states", "return_dict")


def prompt_length(input_ids: Tensor, model_kwargs: dict) -> int:
    """Return the number of prompt tokens, including those that are already in the cache."""
    embedded = model_kwargs.get("inputs_embeds")
    return (input_ids if embedded is None else embedded).shape[1]


class DecodeState:
    """State between two steps. Its parts are consistent after `prefill` and after each `advance`, or `commit` and `record`.

    Attributes:
        acceptor: The sequences, and which of them have ended.
        cache: Keys and values of all accepted tokens except the roots.
        window: The last hidden states of each row and its newest token, input of the next draft.
        columns: (batch, 1) number of cache columns that each row owns, on `device`.
        goes_on: (batch, 1) bool on `device`, False for rows that have ended; None if no row has to be told apart.
        shift: (..., batch, 1) position of a row's root minus its number of columns. It is not 0 if the row is padded or
            the user passes positions. Leading axes are those of models with several position axes.
        prompt_mask: (batch, prompt) bool, False for padding; None without padding.
        last_position: () the largest position that generation can reach, on `device`.
        device: Device of the logits, on which trees are built and walked.
    """

    window: Window
    columns: Tensor
    goes_on: Tensor | None
    shift: Tensor
    prompt_mask: Tensor | None
    last_position: Tensor
    device: torch.device

    def __init__(self, acceptor: Acceptor, cache: TreeCache):
        self.acceptor, self.cache = acceptor, cache

    def prefill(self, model: nn.Module, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict) -> None:
        """Run the forward of the prompt: fill the cache and the window, and choose the first token.

        Args:
            model: A model with leap heads.
            input_ids: (batch, prompt length), padded on the left.
            config: Generation config.
            model_kwargs: The model's inputs as `generate` prepared them.
        """
        kwargs = {**model_kwargs, compat.CACHE: self.cache}
        known = int(self.cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        length = prompt_length(input_ids, kwargs)
        # If the mask is longer than input_ids, the user has passed only the tokens that are not in the cache.
        is_whole = known > 0 and (
            kwargs.get("inputs_embeds") is not None or compat.mask_length(mask, config, length) == length
        )
        inputs = compat.prompt_inputs(model, input_ids, known, length - known if is_whole else length, kwargs)
        inputs = {name: value for name, value in inputs.items() if name not in _WRAPPER_ONLY}
        size = geometry.window(model.leap_heads.config.offsets)
        with recorded(model, last=size) as layers:
            hidden = model.base_model(**inputs).last_hidden_state  # (batch, new prompt tokens, hidden)

        start = int(self.cache.get_seq_length())
        padded = mask is not None and not bool(mask.all())
        lengths = mask.sum(-1).tolist() if padded else [length] * len(input_ids)
        states = model.leap_heads.inputs(hidden[:, -size:], layers)  # (batch, at most size, ...)
        self.window = Window.of_prompt(states, [min(n, hidden.shape[1]) for n in lengths], size)
        for row in self.acceptor.rows:
            row.columns = start
        # Padding is on the left, so the last state is real in every row.
        logits = lm_logits(model, hidden[:, -1:])  # (batch, 1, vocabulary)
        self.device = logits.device
        positions = kwargs["position_ids"][..., -1:]  # (..., batch, 1), of the last prompt token
        self.shift = (positions + 1 - start).to(self.device)  # (..., batch, 1)
        self.prompt_mask = mask.bool().to(self.device) if padded else None
        last_position = int(positions.max()) + self.acceptor.remaining_tokens()
        self.last_position = torch.full((), last_position, device=self.device)
        self.columns = torch.full((len(input_ids), 1), start, device=self.device)
        # A tree of one node, whose token is not read, makes the acceptor choose the first token.
        root = torch.zeros(len(input_ids), 1, dtype=torch.long, device=self.device)
        branches, _ = self.acceptor.accept(logits, root, fixed([()], self.device))
        self.window.roots, self.goes_on = branches.roots, None
        if self.cache.is_fixed and len(input_ids) > 1:  # from the start, or the end of a row would need another graph
            self.goes_on = torch.ones(len(input_ids), 1, dtype=torch.bool, device=self.device)
        self._tell_which_go_on([[0] for _ in self.acceptor.rows])

    def lengths(self) -> list[int]:
        """Return the number of cache columns that each row owns, on the host."""
        return [row.columns for row in self.acceptor.rows]

    def cursor(self) -> int | Tensor:
        """Return the first column of the next step's nodes. In a cache of fixed size it is a tensor on the device."""
        return self.columns.max() if self.cache.is_fixed else max(self.lengths())

    def place_cursor(self) -> None:
        """Let the next forward write its keys and values from the cursor on."""
        shortest = None
        if not self.cache.is_fixed:
            shortest = min(row.columns for row in self.acceptor.rows if not row.done)
        self.cache.set_cursor(self.cursor(), shortest)

    def commit(self, hidden: Tensor, branches: Branches, moves: bool = True) -> None:
        """Keep the accepted branches: the half of `advance` on the device.

        Args:
            hidden: (batch, nodes, ...) states of the tree, as the heads read them.
            branches: The accepted branches.
            moves: Whether a branch has to be copied in the cache.
        """
        if moves:
            self.cache.move(branches, self.cursor(), self.columns)
        self.window.push(hidden, branches)
        self.columns = self.columns + branches.counts

    def copy_outputs(self) -> None:
        """Copy what a compiled step has written: a CUDA graph overwrites its outputs in the next step."""
        window, self.columns = self.window, self.columns.clone()
        window.states, window.roots = window.states.clone(), window.roots.clone()
        window.real = None if window.real is None else window.real.clone()

    def record(self, branches: list[list[int]]) -> None:
        """Count the accepted branches: the half of `advance` on the host.

        Args:
            branches: Indices of each row's accepted nodes. Empty for rows that had ended before.
        """
        rows = self.acceptor.rows
        for row, branch in zip(rows, branches):
            row.columns += len(branch)
        self.window.count(branches)
        self._tell_which_go_on(branches)

    def _tell_which_go_on(self, branches: list[list[int]]) -> None:
        """Tell a device that walks alone, and does not know where rows end, that one has ended in this step."""
        rows = self.acceptor.rows
        if not self.acceptor.follows_argmax:
            return
        if any(branch and row.done for branch, row in zip(branches, rows)) and not self.acceptor.finished():
            facts = torch.tensor([[not row.done, row.columns] for row in rows]).to(self.device, non_blocking=True)
            self.goes_on, self.columns = facts[:, :1].bool(), facts[:, 1:].clone()  # compiled code knows strides

    def advance(self, hidden: Tensor, branches: Branches, on_host: list[list[int]]) -> None:
        """Commit the accepted branch of each row to the cache, the window and the positions.

        Args:
            hidden: (batch, nodes, ...) states of the tree, as the heads read them.
            branches: The accepted branches.
            on_host: Their indices, as `Acceptor.accept` returns them.
        """
        lengths = self.lengths()
        start = max(lengths)
        # A branch is in place if its last node is at the row's new end, because the columns of a branch increase.
        moves = any(
            branch and start + branch[-1] != length + len(branch) - 1 for branch, length in zip(on_host, lengths)
        )
        self.commit(hidden, branches, moves)
        self.record(on_host)

    def output(self, given, config: GenerationConfig, pad_token: int | None) -> GenerateDecoderOnlyOutput | Tensor:
        """Build the return value of `_sample`; copy the cache's contents to `given`, the cache of the caller."""
        sequences = self.acceptor.padded(pad_token)
        self.cache.hand_back(given, max(self.lengths()))
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self.acceptor.stacked("scores") if self.acceptor.keep_scores else None,
            logits=self.acceptor.stacked("logits") if self.acceptor.keep_logits else None,
            **{compat.CACHE: given},
        )


def one_row_state(cache: TreeCache, length: int, last_position: int, device: torch.device) -> DecodeState:
    """Return a state of one row with `length` cached tokens and no sequence, for testing or timing tree forwards."""
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    state = DecodeState(Acceptor(ids, LogitsProcessorList(), StoppingCriteriaList(), GenerationConfig()), cache)
    state.device, state.shift, state.prompt_mask = device, torch.zeros(1, 1, dtype=torch.long, device=device), None
    state.columns, state.goes_on = torch.full((1, 1), length, device=device), None
    state.last_position = torch.full((), last_position, device=device)
    return state
