"""Generation in this process with transformers: prompts of like length in one batch, padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ..errors import LMTPError, first_line
from .engine import Generation, Request, Sampling, stop_at


if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens (prompt + answer, padding included) in one batch when no batch size is given. The KV cache of a 7B model with
# grouped queries takes some 60-130 kB a token, so 65,536 tokens are 4-8 GB; on a CPU beyond some 16 rows a step
# only gets proportionally slower.
TOKEN_BUDGET = {"cuda": 65_536, "cpu": 8_192}
MAX_BATCH_SIZE = 256


def plan_batches(
    requests: Sequence[Request], *, max_new_tokens: int, batch_size: int | None, token_budget: int
) -> list[list[Request]]:
    """Split requests into batches of like length, the longest first (so that too little memory shows at once).

    The plan depends on nothing but the arguments.

    Args:
        requests: all requests of the run.
        max_new_tokens: room for each answer.
        batch_size: rows in a batch; None: as many as `token_budget` allows, at most `MAX_BATCH_SIZE`.
        token_budget: padded tokens in a batch.
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
    """An `Engine` on a transformers model.

    Args:
        model: directory or hub id.
        dtype: a torch dtype's name; None: bfloat16 on a GPU, float32 on the CPU (most CPUs compute no bfloat16).
        device: `cuda`, `cpu`, `auto` (spread over all GPUs) and so on; None: a GPU if there is one.
        batch_size: rows in a batch; None: by `TOKEN_BUDGET`.
        trust_remote_code: run modelling code that comes with the model.

    Raises:
        LMTPError: no model can be loaded.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | None = None,
        trust_remote_code: bool = False,
    ):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        torch_dtype = getattr(torch, dtype) if dtype else (torch.float32 if device == "cpu" else torch.bfloat16)
        try:
            self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                model,
                dtype=torch_dtype,
                device_map=None if device == "cpu" else device,
                trust_remote_code=trust_remote_code,
            ).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise LMTPError(
                f"no causal language model can be loaded from `{model}` on {device} ({first_line(error)}): name another."
            ) from error
        self.batch_size = batch_size
        self.token_budget = TOKEN_BUDGET["cpu" if device == "cpu" else "cuda"]

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        done: Collection[int],
        on_tokens: Callable[[int], None],
        on_rows: Callable[[list[Generation]], None],
    ) -> None:
        """See `Engine.generate`. A batch of which some rows are done is generated whole: its random numbers and its
        padding are then those of an uninterrupted run."""
        batches = plan_batches(
            requests,
            max_new_tokens=sampling.max_new_tokens,
            batch_size=self.batch_size,
            token_budget=self.token_budget,
        )
        for batch in batches:
            missing = {request.id for request in batch if request.id not in done}
            if missing:
                try:
                    rows = self._generate_batch(batch, sampling, on_tokens)
                except torch.OutOfMemoryError as error:
                    raise LMTPError(
                        f"the device has no memory for {len(batch)} rows at once: run the same command again with "
                        f"`--batch-size {max(1, len(batch) // 2)}`, finished rows are kept."
                    ) from error
                on_rows([row for row in rows if row.id in missing])

    @torch.inference_mode()
    def _generate_batch(
        self, batch: list[Request], sampling: Sampling, on_tokens: Callable[[int], None]
    ) -> list[Generation]:
        width = max(len(request.prompt_ids) for request in batch)
        pad = sampling.stop_ids[0] if sampling.stop_ids else 0  # masked, so any id does
        input_ids = torch.full((len(batch), width), pad)
        mask = torch.zeros_like(input_ids)
        for row, request in enumerate(batch):
            input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1

        # generate() fills what a config leaves open from the model's own (penalties, top-k of the model's card):
        # the answers should follow the plain distribution that the heads will learn
        self.model.generation_config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            eos_token_id=list(sampling.stop_ids) or None,
            pad_token_id=pad,
            **(
                {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
                if sampling.temperature
                else {}
            ),
        )
        device = self.model.device
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(sampling.seed_of(batch[0].id))
            output = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                stopping_criteria=StoppingCriteriaList([_Ticker(sampling.stop_ids, on_tokens)]),
            )
        rows = []
        for request, ids in zip(batch, output[:, width:].tolist(), strict=True):
            output_ids, finish_reason = stop_at(ids, sampling.stop_ids)
            rows.append(Generation(request.id, output_ids, finish_reason))
        return rows


class _Ticker(StoppingCriteria):
    """Stops nothing; counts the tokens of the rows that are still being written."""

    def __init__(self, stop_ids: Sequence[int], on_tokens: Callable[[int], None]):
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.long)
        self.on_tokens = on_tokens
        self.writing: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        last = input_ids[:, -1].cpu()
        if self.writing is None:
            self.writing = torch.ones_like(last, dtype=torch.bool)
        self.on_tokens(int(self.writing.sum()))
        self.writing &= ~torch.isin(last, self.stop_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
