"""Generation of the rows that are missing in a journal, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .engine import Engine, Generation, Request, Sampling
from .journal import Journal
from .rows import format_ids


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def complete_journal(
    journal: Journal,
    requests: Sequence[Request],
    sampling: Sampling,
    get_engine: Callable[[], Engine],
    tokenizer: PreTrainedTokenizerBase,
    what: str,
) -> None:
    """Generate and append the row of every request that is not in the journal.

    Args:
        journal: Receives rows in the format of `rows.py`.
        requests: All requests. Their ids become the rows' ids.
        sampling: Sampling parameters.
        get_engine: Called only if rows are missing, so a finished run loads no model.
        tokenizer: Decodes the answers.
        what: Title of the progress bar.

    Raises:
        LMTPError: The engine fails, or the journal's rows are of an engine with other facts.
    """
    by_id = {request.id: request for request in requests}
    done = journal.rows.keys() & by_id.keys()
    if len(done) == len(requests):
        return
    engine = get_engine()
    journal.record(engine.facts())
    tokens = 0
    # smoothing=0: rows arrive in batches, so only the average speed predicts the remaining time
    with tqdm(total=len(requests), initial=len(done), desc=what, unit="row", smoothing=0) as bar:

        def on_finished(generations: list[Generation]) -> None:
            nonlocal tokens
            journal.append([_row(by_id[generation.id], generation, tokenizer) for generation in generations])
            tokens += sum(len(generation.output_ids) for generation in generations)
            bar.set_postfix_str(f"{tokens} tokens", refresh=False)
            bar.update(len(generations))

        engine.generate(requests, sampling, done=frozenset(done), on_finished=on_finished)


def _row(request: Request, generation: Generation, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "id": request.id,
        "instruction": request.text,
        "output": tokenizer.decode(generation.output_ids, skip_special_tokens=True),
        "prompt_ids": format_ids(request.prompt_ids),
        "output_ids": format_ids(generation.output_ids),
        "finish_reason": generation.finish_reason,
    }
