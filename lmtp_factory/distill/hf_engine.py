"""Generation with transformers in this process: left-padded batches of prompts of similar length."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from ..errors import LMTPError, first_line
from .engine import Generation, Request, Sampling, cut_at_stop
from .plain_generation import plain_config


if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens in a batch if no batch size is given: prompts and answers, including padding. The KV cache of a 7B model with
# grouped-query attention takes 60-130 kB per token, so 65,536 tokens take 4-8 GB. On a CPU larger batches are not
# faster.
TOKEN_BUDGET = {"cuda": 65_536, "cpu": 8_192}
MAX_BATCH_SIZE = 256


def group_batches(
    requests: Sequence[Request], *, max_new_tokens: int, batch_size: int | None, token_budget: int
) -> list[list[Request]]:
    """Group requests into batches of similar length, the longest first, so that out-of-memory errors occur at once.

    Args:
        requests: All requests of the run.
        max_new_tokens: Largest number of tokens of an answer.
        batch_size: Rows per batch; None uses as many as `token_budget` allows, up to `MAX_BATCH_SIZE`.
        token_budget: Padded tokens per batch.
    """
    ordered = sorted(requests, key=lambda request: (-len(request.prompt_ids), request.id))
    batches = []
    while ordered:
        longest = len(ordered[0].prompt_ids) + max_new_tokens
        size = batch_size or max(1, min(MAX_BATCH_SIZE, token_budget // longest))
        batches.append(ordered[:size])
        ordered = ordered[size:]
    return batches


class HFEngine:
    """An `Engine` on a transformers model: bfloat16 on all GPUs, or float32 on the CPU.

    Args:
        model: Directory or hub id.
        batch_size: Rows per batch; None uses `TOKEN_BUDGET`.

    Raises:
        LMTPError: The model cannot be loaded.
    """

    def __init__(self, model: str, *, batch_size: int | None = None):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                model,
                dtype=torch.bfloat16 if device == "cuda" else torch.float32,  # most CPUs are slow in bfloat16
                device_map="auto" if device == "cuda" else None,
                trust_remote_code=False,
            ).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise LMTPError(
                f"No causal language model can be loaded from {model} ({first_line(error)}): name a Hugging Face model "
                "directory or hub id."
            ) from error
        self.batch_size = batch_size
        self.token_budget = TOKEN_BUDGET[device]

    def facts(self) -> dict[str, Any]:
        """See `Engine.facts`. The model's files are known before it is loaded (`identity.py`)."""
        return {}

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        done: Collection[int],
        on_finished: Callable[[list[Generation]], None],
    ) -> None:
        """See `Engine.generate`.

        A batch with some rows in `done` is generated completely, so that padding and random numbers are the same as in
        an uninterrupted run.

        Raises:
            LMTPError: A batch does not fit into the device's memory.
        """
        batches = group_batches(
            requests,
            max_new_tokens=sampling.max_new_tokens,
            batch_size=self.batch_size,
            token_budget=self.token_budget,
        )
        for batch in batches:
            missing = {request.id for request in batch if request.id not in done}
            if missing:
                try:
                    rows = self._generate_batch(batch, sampling)
                except torch.OutOfMemoryError as error:
                    if len(batch) == 1:
                        raise LMTPError(
                            "The device has no memory for one row: write a smaller --max-new-tokens or --max-prompt-tokens, "
                            "and another --name."
                        ) from error
                    raise LMTPError(
                        f"The device has no memory for {len(batch)} rows at once: run the same command again with "
                        f"--batch-size {len(batch) // 2}; finished rows are kept."
                    ) from error
                on_finished([row for row in rows if row.id in missing])

    @torch.inference_mode()
    def _generate_batch(self, batch: list[Request], sampling: Sampling) -> list[Generation]:
        width = max(len(request.prompt_ids) for request in batch)
        pad = sampling.stop_ids[0] if sampling.stop_ids else 0  # any id works, because padding is masked
        input_ids = torch.full((len(batch), width), pad)  # (rows, longest prompt)
        mask = torch.zeros_like(input_ids)
        for row, request in enumerate(batch):
            input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1

        sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        self.model.generation_config = plain_config(
            self.model.generation_config,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            eos_token_id=list(sampling.stop_ids) or None,
            pad_token_id=pad,
            **(sampled if sampling.temperature else {}),
        )
        device = self.model.device
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(sampling.seed_of(batch[0].id))
            output = self.model.generate(input_ids=input_ids.to(device), attention_mask=mask.to(device))
        rows = []
        for request, ids in zip(batch, output[:, width:].tolist(), strict=True):
            output_ids, finish_reason = cut_at_stop(ids, sampling.stop_ids)
            rows.append(Generation(request.id, output_ids, finish_reason))
        return rows
