"""Measuring the offset of each head on text.

A head's predictions are compared with the tokens 1, 2, 3, ... ahead of the same positions. The offset with the most
hits is often not the offset that a head was trained for, for two reasons:

- Heads start as copies of the LM head, and after little training they still predict the next token. So a prediction
  counts only if it differs from the LM head's.
- Nearby tokens are easier to predict for every head. So the score of an offset is how much more often a head hits it
  than the other heads do.

Little-trained heads need many positions of the model's own text. With fewer positions, or on other text, the measurement
is refused rather than guessed.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from .. import geometry
from ..errors import LMTPError, first_line
from ..evaluation.scoring import Row, read_rows
from ..modeling.heads import LeapHeads, unembed
from ..modeling.losses.chunked import chunk_rows
from ..modeling.model import base_of


MOST_POSITIONS, FEWEST_POSITIONS = 4096, 256
WINDOW = 512  # tokens of plain text per forward
LONGEST_LEAP = 4  # largest stride that is considered
_CHARACTERS = 16 * MOST_POSITIONS  # characters read from plain text; a token has about 4
# The best candidate must lead every other by this many standard errors. Between equals this happens once in 740 times.
MARGIN = 3.0


def read_text(path: str | Path, base: str, vocab_size: int) -> list[Row]:
    """Read rows of `lmtp-cli distill`, or plain text split into windows.

    Args:
        path: JSONL or text file.
        base: Directory or hub id of the base model, for its tokenizer.
        vocab_size: Vocabulary size of the base model.

    Raises:
        LMTPError: The file cannot be read, or its token ids exceed the vocabulary.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
            text = "" if _is_json_object(first) else (first + file.read(_CHARACTERS))[:_CHARACTERS]
    except (OSError, UnicodeDecodeError) as error:
        raise LMTPError(
            f"--text {path} cannot be read as UTF-8 text ({first_line(error)}): name a text file."
        ) from None
    rows = _windows(text, base) if text else read_rows(path, MOST_POSITIONS)
    if any(token >= vocab_size for prompt, output in rows for token in (*prompt, *output)):
        raise LMTPError(
            f"{path} holds token ids beyond the vocabulary of {base} ({vocab_size}): name a file of rows that this "
            "model wrote."
        )
    return rows


@torch.no_grad()
def measure(model: nn.Module, heads: LeapHeads, rows: Sequence[Row]) -> Tensor:
    """Find which tokens each head predicts correctly where it differs from the LM head.

    Args:
        model: The base model, in eval mode.
        heads: Heads on any device and in any dtype. Their offsets are ignored.
        rows: Token ids. Positions in prompts are not evaluated.

    Returns:
        (heads, offsets, positions) bool on the CPU. Offset index o is the token o + 1 ahead. Positions near the end of
        a row, where some of these tokens do not exist, are omitted.
    """
    base, lm_head = base_of(model), model.get_output_embeddings()
    farthest = LONGEST_LEAP * heads.config.num_heads + 1
    pairs = list(islice(_positions(base, rows, farthest), MOST_POSITIONS))
    if not pairs:
        return torch.zeros(heads.config.num_heads, farthest, 0, dtype=torch.bool)
    states, targets = (torch.stack(tensors) for tensors in zip(*pairs))
    next_token = _guesses(states, lm_head, lm_head.weight.shape[0])
    hits = []
    for head in heads.heads:
        # Copy one head at a time: all heads in the model's dtype may not fit beside it on its device.
        head = copy.deepcopy(head).to(states.device, states.dtype)
        layer = lm_head if head.unembed is None else head.unembed
        guesses = _guesses(
            states, lambda part, head=head, layer=layer: unembed(head.features(part), layer), heads.config.vocab_size
        )
        hits.append(((guesses == targets.T) & (guesses != next_token)).cpu())
    return torch.stack(hits)


def decide(hits: Tensor) -> tuple[int, ...]:
    """Choose the offset of each head: its own best offset if all heads are clear, else the best constant stride.

    Args:
        hits: Result of `measure`.

    Returns:
        Increasing offsets.

    Raises:
        LMTPError: There are too few positions, no choice is clearly the best, or the offsets do not increase from 2 on.
    """
    num_heads, farthest, positions = hits.shape
    if positions < FEWEST_POSITIONS:
        raise LMTPError(
            f"--text has {positions} positions with {farthest} tokens after them, but measuring takes {FEWEST_POSITIONS}: "
            "give more or longer text."
        )
    if not hits.any():
        raise LMTPError(
            "The heads are right only where the LM head makes the same guess: they are untrained or of another base "
            "model, so name the model that they were trained on with --base."
        )
    scores = hits.float()
    if num_heads > 1:
        scores = (scores - scores.mean(0)) * num_heads / (num_heads - 1)  # minus the mean of the other heads
    leads = [_leads(of_head) for of_head in scores]
    own = [int(of_head.argmax()) + 1 for of_head in leads]  # the best candidate's lead over itself is inf
    if all(of_head.min() >= MARGIN for of_head in leads):
        if any(near >= far for near, far in zip([1, *own], own)):
            written = ", ".join(f"+{offset}" for offset in own)
            raise LMTPError(
                f"The heads predict {written}, but the offsets of leap heads rise from +2 or more: give a checkpoint of "
                "leap heads, in their order."
            )
        return tuple(own)
    strides = [geometry.offsets(num_heads + 1, stride)[1:] for stride in range(1, LONGEST_LEAP + 1)]
    at_stride = torch.stack([scores[range(num_heads), [o - 1 for o in offsets]].sum(0) for offsets in strides])
    stride_leads = _leads(at_stride)
    found = strides[int(stride_leads.argmax())]
    contradicted = any(MARGIN <= of_head[offset - 1] < torch.inf for of_head, offset in zip(leads, found))
    if stride_leads.min() < MARGIN or contradicted:
        unclear = next(head for head, of_head in enumerate(leads) if of_head.min() < MARGIN)
        other = int(leads[unclear].argmin()) + 1
        raise LMTPError(
            f"{positions} positions do not tell what the heads predict (no stride fits clearly best, and head {unclear + 1} "
            f"may predict +{own[unclear]} or +{other}): give more text, best what the base model wrote itself (lmtp-cli "
            "distill), or write --stride or --offsets."
        )
    return found


def table(hits: Tensor, offsets: Sequence[int] = ()) -> str:
    """Format the share of positions that each head hits at each offset, with the chosen `offsets` marked."""
    rates = hits.float().mean(-1)
    lines = [f"{'':<8}" + "".join(f"{f'+{offset}':>7} " for offset in range(1, rates.shape[1] + 1))]
    for head, of_head in enumerate(rates.tolist()):
        marked = offsets[head] if offsets else None
        cells = "".join(f"{rate:7.1%}{'*' if o == marked else ' '}" for o, rate in enumerate(of_head, 1))
        lines.append(f"{f'head {head + 1}':<8}{cells}")
    return "\n".join(line.rstrip() for line in lines)


def _leads(scores: Tensor) -> Tensor:
    """Return by how many standard errors the best candidate leads each candidate; inf for itself.

    Args:
        scores: (candidates, positions).

    Returns:
        (candidates,) leads.
    """
    best = int(scores.mean(-1).argmax())
    ahead = scores[best] - scores
    error = ahead.std(-1) / ahead.shape[-1] ** 0.5
    leads = ahead.mean(-1) / error.clamp(min=torch.finfo(error.dtype).tiny)
    leads[best] = torch.inf
    return leads


def _positions(base: nn.Module, rows: Sequence[Row], farthest: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of a (hidden,) final hidden state and the (farthest,) tokens after its position."""
    for prompt, output in rows:
        ids = torch.tensor(prompt + output, device=base.device)
        first, end = max(len(prompt) - 1, 0), len(ids) - farthest
        if first < end:
            hidden = base.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            yield from zip(hidden[first:end], ids[1:].unfold(0, farthest, 1)[first:end])


def _guesses(states: Tensor, project: Callable[[Tensor], Tensor], vocab_size: int) -> Tensor:
    """Return the (states,) argmax tokens, with the logits of one chunk of states at a time."""
    return torch.cat([project(part).argmax(-1) for part in states.split(chunk_rows(vocab_size, states.device))])


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _windows(text: str, base: str) -> list[Row]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise LMTPError(f"No tokenizer can be loaded from {base} ({first_line(error)}): name another --base.") from None
    ids = tokenizer(text, verbose=False).input_ids
    # Every window starts with the beginning-of-sequence token if the tokenizer adds one, as in training.
    start = ids[:1] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []
    ids = ids[len(start) :]
    return [(start, ids[i : i + WINDOW]) for i in range(0, len(ids), WINDOW)]
