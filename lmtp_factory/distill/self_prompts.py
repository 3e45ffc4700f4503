"""Prompts that an instruct model writes itself when it continues the start of a user turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LMTPError
from . import chat
from .engine import Request
from .filters import is_repetitive
from .near_duplicates import NearDuplicates
from .prompts import Prompt, build_prompt
from .rows import parse_ids


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts are sampled, because greedy decoding would always write the same prompt.
TEMPERATURE, TOP_P = 1.0, 0.95
# Each wave requests _SURPLUS times the missing prompts. A model with too few prompts after _WAVES waves repeats itself.
_SURPLUS, _WAVES = 1.25, 8
_MIN_WORDS = 3


def write_prompts(
    tokenizer: PreTrainedTokenizerBase,
    turn: chat.UserTurn,
    count: int,
    generate: Callable[[Sequence[Request]], dict[int, dict[str, Any]]],
) -> tuple[list[Prompt], Counter[str]]:
    """Let the model write `count` different prompts.

    A sample is accepted as a prompt if the model ended it and it has at least three words, no special tokens, no
    repetition loop and no near-duplicate among the earlier prompts. Waves of samples are generated until there are
    enough.

    Args:
        tokenizer: The model's tokenizer.
        turn: Start and end of a user turn.
        count: Number of prompts.
        generate: Maps requests to rows by id. It stores the rows, so a resumed run generates only the missing ones.

    Returns:
        The prompts in the order of their samples; the number of dropped samples by reason.

    Raises:
        LMTPError: At most half of the requested prompts were found.
    """
    prompts: list[Prompt] = []
    dropped: Counter[str] = Counter()
    seen = NearDuplicates()
    asked = 0
    for _ in range(_WAVES):
        wave = int((count - len(prompts)) * _SURPLUS) + 1
        requests = [Request(asked + number, turn.before_ids) for number in range(wave)]
        asked += wave
        rows = generate(requests)
        for request in requests:
            if len(prompts) == count:
                break
            text, reason = _text_or_reason(tokenizer, parse_ids(rows[request.id]["output_ids"]), turn)
            if reason is None and text in seen:
                reason = "near-duplicate"
            if reason is None:
                seen.add(text)
                prompts.append(build_prompt(text))
            else:
                dropped[reason] += 1
        if len(prompts) == count:
            return prompts, dropped
    if len(prompts) <= count // 2:
        raise LMTPError(
            f"Of {asked} texts that the model wrote as a user only {len(prompts)} are usable prompts: give prompts "
            "with --prompts FILE or --dataset NAME, or ask for fewer with --num-prompts."
        )
    return prompts, dropped


def _text_or_reason(tokenizer: PreTrainedTokenizerBase, ids: list[int], turn: chat.UserTurn) -> tuple[str, str | None]:
    """Return the text of a sample, and the reason to drop it or None."""
    if not ids or ids[-1] != turn.end_id:
        return "", "not ended"
    if set(ids[:-1]) & chat.special_ids(tokenizer):
        return "", "special tokens"
    text = tokenizer.decode(ids[:-1]).strip()
    if len(text.split()) < _MIN_WORDS:
        return text, "too short"
    if is_repetitive(ids):
        return text, "repetition loop"
    return text, None
