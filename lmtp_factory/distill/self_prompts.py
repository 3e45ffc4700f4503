"""Prompts that an instruct model writes itself, after the bare start of a user turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LMTPError
from . import chat
from .engine import Request
from .filters import Filters, NearDuplicates
from .prompts import Prompt, user_prompt
from .rows import parse_ids


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A wave asks for somewhat more prompts than are missing. A model that still has too few after so many waves only
# repeats itself.
_SURPLUS, _WAVES = 1.25, 8
_MIN_WORDS = 3


def write_prompts(
    tokenizer: PreTrainedTokenizerBase,
    turn: chat.UserTurn,
    count: int,
    generate: Callable[[Sequence[Request]], dict[int, dict[str, Any]]],
) -> tuple[list[Prompt], Counter[str]]:
    """Let the model write `count` prompts, no two alike.

    Waves of samples are taken until enough of them are good: ended by the model itself, at least three words, no
    special tokens, no loop, not nearly a prompt that is there already.

    Args:
        tokenizer: the model's.
        turn: the start and the end token of a user turn.
        count: prompts wanted.
        generate: turns requests into rows by id (and keeps them, so that a resumed run asks only for the rest).

    Returns:
        the prompts in the order of their samples, and how many samples were dropped for which reason.

    Raises:
        LMTPError: the model writes hardly any usable prompt.
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
            text, reason = _judge(tokenizer, rows[request.id], turn)
            if reason is None and text in seen:
                reason = "near-duplicate"
            if reason is None and len(prompts) < count:
                seen.add(text)
                prompts.append(user_prompt(text))
            elif reason is not None:
                dropped[reason] += 1
        if len(prompts) == count:
            return prompts, dropped
    if len(prompts) < count // 2 + 1:
        raise LMTPError(
            f"of {asked} texts that the model wrote as a user only {len(prompts)} are usable prompts: give prompts "
            "with `--prompts FILE` or `--dataset NAME`, or ask for fewer with `--num-prompts`."
        )
    return prompts, dropped


def _judge(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], turn: chat.UserTurn) -> tuple[str, str | None]:
    ids = parse_ids(row["output_ids"])
    if not ids or ids[-1] != turn.end_id:
        return "", "not ended"
    if set(ids[:-1]) & chat.special_ids(tokenizer):
        return "", "special tokens"
    text = tokenizer.decode(ids[:-1]).strip()
    if len(text.split()) < _MIN_WORDS:
        return text, "too short"
    if Filters().is_loop(ids):
        return text, "repetition loop"
    return text, None
