"""A complete distillation run: prompts, answers, filters, dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LMTPError
from ..options import DISTILL_ANSWER_TOKENS, DISTILL_PROMPT_TOKENS, DISTILL_PROMPTS
from . import chat, self_prompts
from .answers import complete_journal
from .dataset import read_info, split_heldout, write_dataset
from .engine import Engine, Request, Sampling
from .filters import filter_rows
from .identity import run_identity, weight_facts
from .journal import Journal, digest
from .prompts import Prompt
from .rows import TEMPLATE_NAME, format_ids, parse_ids


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Smallest number of tokens that `max_prompt_tokens` must leave for a self-written prompt.
_MIN_PROMPT_ROOM = 16


@dataclass
class Settings:
    """Settings of a run.

    Attributes:
        model: Directory or hub id.
        name: Name of the dataset and of its files in `output_dir`.
        output_dir: Directory of the files, created if missing.
        engine: Name of the engine. A run can only be resumed with the same engine.
        prompts: Prompts to answer; None lets the model write them.
        num_prompts: Number of prompts to write, or number of `prompts` to answer. None: `DISTILL_PROMPTS` to write, or
            all `prompts`.
        max_prompt_tokens: Longer prompts are skipped. System text and turn markers count.
        max_new_tokens: Largest number of tokens of an answer.
        temperature: Temperature of the answers; 0 is greedy.
        seed: Seed of all sampling.
        heldout: Share of the rows in `<name>_heldout`; the others are in `<name>_train`. 0 writes one dataset `<name>`.
        keep_truncated: Keep answers that were cut at `max_new_tokens`.
    """

    model: str
    name: str
    output_dir: Path
    engine: str = "hf"
    prompts: list[Prompt] | None = None
    num_prompts: int | None = None
    max_prompt_tokens: int = DISTILL_PROMPT_TOKENS
    max_new_tokens: int = DISTILL_ANSWER_TOKENS
    temperature: float = 0.0
    seed: int = 0
    heldout: float = 0.0
    keep_truncated: bool = False


def distill(settings: Settings, tokenizer: PreTrainedTokenizerBase, make_engine: Callable[[], Engine]) -> list[Path]:
    """Start or resume a run and write its dataset.

    Args:
        settings: Settings of the run.
        tokenizer: The model's tokenizer.
        make_engine: Loads the model or connects to the server. Not called if no row is missing.

    Returns:
        Paths of the JSONL files.

    Raises:
        LMTPError: The run fails for a reason that the user can fix.
    """
    try:
        settings.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LMTPError(
            f"Directory {settings.output_dir} cannot be created ({error.strerror}): choose another --output-dir."
        ) from error
    read_info(settings.output_dir)  # fails on a broken dataset_info.json before hours of generation
    get_engine = cache(make_engine)
    stop_ids = chat.stop_token_ids(settings.model, tokenizer)

    weights = weight_facts(settings)

    prompts = settings.prompts
    if prompts is None:
        prompts = _self_written_prompts(settings, tokenizer, get_engine, stop_ids, weights)
    requests = _requests(settings, prompts, tokenizer)
    sampling = Sampling(settings.max_new_tokens, settings.temperature, seed=settings.seed, stop_ids=stop_ids)
    facts = {"prompts": digest(request.prompt_ids for request in requests)}
    identity = run_identity(settings, sampling, weights) | facts
    with Journal(settings.output_dir / f"{settings.name}.raw.jsonl", identity) as journal:
        complete_journal(journal, requests, sampling, get_engine, tokenizer, "answers")
        rows = [journal.rows[request.id] for request in requests]
    return _write(settings, rows)


def _self_written_prompts(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    get_engine: Callable[[], Engine],
    stop_ids: tuple[int, ...],
    weights: dict[str, str],
) -> list[Prompt]:
    turn = chat.bare_user_turn(tokenizer)
    # The model writes the token that ends the turn itself, so that one is in `room`.
    around = len(turn.before_ids) + len(turn.after_ids) - 1
    room = settings.max_prompt_tokens - around
    if room < _MIN_PROMPT_ROOM:
        raise LMTPError(
            f"--max-prompt-tokens {settings.max_prompt_tokens} leaves no room for a prompt, because the chat template puts "
            f"{around + 1} tokens around a user's text: write at least {around + _MIN_PROMPT_ROOM}."
        )
    stops = tuple(dict.fromkeys((turn.end_id, *stop_ids)))
    sampling = Sampling(room, self_prompts.TEMPERATURE, self_prompts.TOP_P, settings.seed, stops)
    facts = {"start": format_ids(turn.before_ids)}
    path = settings.output_dir / f"{settings.name}.prompts.raw.jsonl"
    with Journal(path, run_identity(settings, sampling, weights) | facts) as journal:

        def generate(requests: Sequence[Request]) -> dict[int, dict[str, Any]]:
            complete_journal(journal, requests, sampling, get_engine, tokenizer, "prompts")
            return journal.rows

        count = settings.num_prompts or DISTILL_PROMPTS
        prompts, dropped = self_prompts.write_prompts(tokenizer, turn, count, generate)
    print(f"prompts: the model wrote {len(prompts)}{_counts(dropped)}")
    return prompts


def _requests(settings: Settings, prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[Request]:
    """Return a request for each prompt that is neither too long nor a duplicate, at most `num_prompts`."""
    requests, asked = [], set()
    dropped: Counter[str] = Counter()
    for prompt in prompts:
        if len(requests) == settings.num_prompts:
            break
        ids = chat.prompt_ids(tokenizer, prompt)
        if len(ids) > settings.max_prompt_tokens:
            dropped["too long"] += 1
        elif ids in asked:
            dropped["duplicate"] += 1
        else:
            asked.add(ids)
            requests.append(Request(len(requests), ids, prompt.text))
    print(f"prompts: {len(requests)} to answer{_counts(dropped)}")
    if not requests:
        raise LMTPError(
            "No prompt is left to answer: give more prompts, or write a larger --max-prompt-tokens and another --name."
        )
    return requests


def _write(settings: Settings, rows: list[dict[str, Any]]) -> list[Path]:
    kept, dropped = filter_rows(rows, keep_truncated=settings.keep_truncated)
    parts = {settings.name: kept}
    if settings.heldout:
        heldout, train, alike = split_heldout(kept, settings.heldout)
        dropped["too close to a held-out row"] += alike
        parts = {f"{settings.name}_train": train, f"{settings.name}_heldout": heldout}
    print(f"rows: {sum(map(len, parts.values()))} kept of {len(rows)}{_counts(dropped)}")
    if not kept:
        raise LMTPError(
            "No row passes the filters: write --keep-truncated, or a larger --max-new-tokens and another --name."
        )
    if not all(parts.values()):
        raise LMTPError(f"--heldout {settings.heldout} of {len(kept)} rows leaves one part empty: write another share.")

    paths = []
    for name, part in parts.items():
        paths.append(write_dataset(settings.output_dir, name, part))
        longest = max(len(parse_ids(row["prompt_ids"])) + len(parse_ids(row["output_ids"])) for row in part)
        print(f"{paths[-1]}: {len(part)} rows, the longest has {longest} tokens")
    keys = ("dataset", "eval_dataset")
    datasets = ", ".join(f"{key}: {name}" for key, name in zip(keys, parts, strict=False))
    print(
        f"Train with {datasets}, dataset_dir: {settings.output_dir}, template: {TEMPLATE_NAME} and a cutoff_len of at "
        "least the longest row."
    )
    return paths


def _counts(dropped: Counter[str]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()) if count)
    return f" (dropped: {reasons})" if reasons else ""
