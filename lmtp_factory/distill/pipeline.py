"""A distillation run from start to end: prompts, answers, filters, data set."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..errors import LMTPError
from . import chat
from .dataset import read_info, write_dataset
from .engine import Engine, Generation, Request, Sampling
from .filters import Filters, NearDuplicates, filter_rows
from .journal import Journal, digest
from .prompts import Prompt
from .rows import TEMPLATE_NAME, format_ids, parse_ids
from .self_prompts import write_prompts


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Settings:
    """What a run is asked for; the command line's options, checked.

    Attributes:
        model: directory or hub id.
        name: of the data set; files are `output_dir/name.jsonl` and so on.
        output_dir: made if missing.
        prompts: what to ask; None: the model writes `num_prompts` prompts itself.
        prompt_sampling: (temperature, top-p) of self-written prompts.
        max_prompt_tokens: prompts longer than this, system text and turn markers included, are left out.
        heldout: share of the rows that goes to `name_heldout` instead of `name_train`; 0: one data set, `name`.
        fingerprint: what else decides the answers (engine, dtype); recorded in the work file.
    """

    model: str
    name: str
    output_dir: Path
    prompts: list[Prompt] | None
    num_prompts: int = 1000
    system: str | None = None
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    prompt_sampling: tuple[float, float] = (1.0, 0.95)
    seed: int = 0
    limit: int | None = None
    heldout: float = 0.0
    filters: Filters = field(default_factory=Filters)
    fingerprint: dict[str, Any] = field(default_factory=dict)


def distill(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    make_engine: Callable[[], Engine],
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Run, or go on with a run that was interrupted, and write the data set.

    Args:
        settings: what to do.
        tokenizer: the model's.
        make_engine: loads the model or reaches for the server; not called when every row is there already.
        say: takes one line of report at a time.

    Returns:
        the JSONL files written.

    Raises:
        LMTPError: anything the user can mend, in one sentence.
    """
    _make_directory(settings.output_dir)
    read_info(settings.output_dir)  # a broken dataset_info.json is found out before hours of work
    engine = _Lazily(make_engine)
    stop_ids = chat.stop_token_ids(settings.model, tokenizer)
    if not stop_ids:
        raise LMTPError(
            f"neither tokenizer nor generation_config.json of `{settings.model}` names an end token: "
            "set eos_token in tokenizer_config.json."
        )

    prompts = settings.prompts
    if prompts is None:
        prompts = _self_written_prompts(settings, tokenizer, engine, stop_ids, say)
    requests, texts = _requests(settings, prompts, tokenizer, say)

    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, settings.seed, stop_ids)
    identity = _identity(settings, sampling) | {"prompts": digest(request.prompt_ids for request in requests)}
    with Journal(settings.output_dir / f"{settings.name}.raw.jsonl", identity) as journal:
        _answer(journal, requests, texts, sampling, engine, tokenizer, "answers")
        rows = [journal.rows[request.id] for request in requests]
    return _write(settings, rows, say)


def _self_written_prompts(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    stop_ids: tuple[int, ...],
    say: Callable[[str], None],
) -> list[Prompt]:
    turn = chat.bare_user_turn(tokenizer, settings.system)
    temperature, top_p = settings.prompt_sampling
    stops = tuple(dict.fromkeys((turn.end_id, *stop_ids)))
    room = settings.max_prompt_tokens - len(turn.before_ids)
    if room < 16:
        raise LMTPError(
            f"`--max-prompt-tokens {settings.max_prompt_tokens}` leaves no room for a prompt: the model reads "
            f"{len(turn.before_ids)} tokens before a user's first word."
        )
    sampling = Sampling(room, temperature, top_p, settings.seed, stops)
    identity = _identity(settings, sampling) | {"start": format_ids(turn.before_ids)}
    with Journal(settings.output_dir / f"{settings.name}.prompts.raw.jsonl", identity) as journal:

        def generate(requests: Sequence[Request]) -> dict[int, dict[str, Any]]:
            texts = dict.fromkeys((request.id for request in requests), "")
            _answer(journal, requests, texts, sampling, engine, tokenizer, "prompts")
            return journal.rows

        prompts, dropped = write_prompts(tokenizer, turn, settings.num_prompts, generate)
    say(f"prompts: the model wrote {len(prompts)}{_counts(dropped)}")
    return prompts


def _requests(
    settings: Settings, prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> tuple[list[Request], dict[int, str]]:
    """A request for every prompt that is neither too long nor asked already, and the prompts' texts by id."""
    requests, texts, asked = [], {}, set()
    dropped: Counter[str] = Counter()
    for prompt in prompts:
        ids = chat.prompt_ids(tokenizer, prompt, settings.system)
        if len(ids) > settings.max_prompt_tokens:
            dropped["too long"] += 1
        elif ids in asked:
            dropped["duplicate"] += 1
        elif settings.limit is None or len(requests) < settings.limit:
            asked.add(ids)
            texts[len(requests)] = prompt.text
            requests.append(Request(len(requests), ids))
    say(f"prompts: {len(requests)} to answer{_counts(dropped)}")
    if not requests:
        raise LMTPError("no prompt is left to answer: give more prompts or a larger `--max-prompt-tokens`.")
    return requests, texts


def _answer(
    journal: Journal,
    requests: Sequence[Request],
    texts: dict[int, str],
    sampling: Sampling,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    unit: str,
) -> None:
    """Have every request answered that is not in the journal yet, with a progress bar."""
    done = journal.rows.keys() & {request.id for request in requests}
    if len(done) == len(requests):
        return
    prompt_ids = {request.id: request.prompt_ids for request in requests}
    tokens = 0
    # smoothing=0: rows come batch by batch, only the average says when a run will be over
    with tqdm(total=len(requests), initial=len(done), desc=unit, unit="row", smoothing=0, mininterval=0.5) as bar:

        def on_tokens(count: int) -> None:
            nonlocal tokens
            tokens += count
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{tokens / max(elapsed, 1e-9):.0f} tokens/s, {tokens} tokens", refresh=False)
            bar.update(0)

        def on_rows(generations: list[Generation]) -> None:
            journal.append([row(generation) for generation in generations])
            bar.update(len(generations))

        def row(generation: Generation) -> dict[str, Any]:
            return {
                "id": generation.id,
                "instruction": texts[generation.id],
                "output": tokenizer.decode(generation.output_ids, skip_special_tokens=True),
                "prompt_ids": format_ids(prompt_ids[generation.id]),
                "output_ids": format_ids(generation.output_ids),
                "finish_reason": generation.finish_reason,
            }

        engine.generate(requests, sampling, done=frozenset(done), on_tokens=on_tokens, on_rows=on_rows)


def _write(settings: Settings, rows: list[dict[str, Any]], say: Callable[[str], None]) -> list[Path]:
    kept, dropped = filter_rows(rows, settings.filters)
    parts = {settings.name: kept}
    if settings.heldout:
        heldout, train, alike = split_heldout(kept, settings.heldout)
        dropped["too close to a held-out row"] += alike
        parts = {f"{settings.name}_train": train, f"{settings.name}_heldout": heldout}
    say(f"rows: {sum(map(len, parts.values()))} kept of {len(rows)}{_counts(dropped)}")
    if not all(parts.values()):
        if kept:
            raise LMTPError(
                f"`--heldout {settings.heldout}` of {len(kept)} rows leaves one part empty: write another share."
            )
        raise LMTPError("no row passes the filters: allow more with `--max-new-tokens` or `--keep-truncated`.")

    paths = []
    for name, part in parts.items():
        paths.append(write_dataset(settings.output_dir, name, part))
        longest = max(len(parse_ids(row["prompt_ids"])) + len(parse_ids(row["output_ids"])) for row in part)
        say(f"{paths[-1]}: {len(part)} rows, the longest {longest} tokens")
    say(
        f"train on it with `dataset: {','.join(parts)}`, `dataset_dir: {settings.output_dir}`, "
        f"`template: {TEMPLATE_NAME}` and a `cutoff_len` that the longest row fits into"
        if len(parts) == 1
        else f"train with `dataset: {settings.name}_train`, `eval_dataset: {settings.name}_heldout`, "
        f"`dataset_dir: {settings.output_dir}`, `template: {TEMPLATE_NAME}` and a `cutoff_len` that the longest row "
        "fits into"
    )
    return paths


def split_heldout(rows: list[dict[str, Any]], share: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Held-out rows, training rows, and how many rows went to neither because they resemble a held-out one.

    Which rows are held out depends on their prompts only, not on their order or number.
    """
    ordered = sorted(rows, key=lambda row: hashlib.sha256(row["prompt_ids"].encode()).digest())
    heldout_ids = {row["id"] for row in ordered[: round(share * len(rows))]}
    heldout = [row for row in rows if row["id"] in heldout_ids]
    seen = NearDuplicates()
    for row in heldout:
        seen.add(row["instruction"])
    rest = [row for row in rows if row["id"] not in heldout_ids]
    train = [row for row in rest if row["instruction"] not in seen]
    return heldout, train, len(rest) - len(train)


def _identity(settings: Settings, sampling: Sampling) -> dict[str, Any]:
    """What must not change between the runs that make one work file."""
    model = settings.model
    return {
        "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "system": settings.system,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        **settings.fingerprint,
    }


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LMTPError(f"`{directory}` cannot be made ({error.strerror}): choose another --output-dir.") from error


def _counts(dropped: Counter[str]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()) if count)
    return f" (dropped: {reasons})" if reasons else ""


class _Lazily:
    """An engine that is made when it is first used: a finished run loads no model."""

    def __init__(self, make: Callable[[], Engine]):
        self.make = make
        self.engine: Engine | None = None

    def generate(self, *args: Any, **kwargs: Any) -> None:
        if self.engine is None:
            self.engine = self.make()
        self.engine.generate(*args, **kwargs)
