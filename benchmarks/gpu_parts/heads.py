"""Heads trained in bf16 on cached states, with twice as many passes over the rows until tau stops rising."""

import gc
import json
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from gpu_parts.settings import Settings
from lmtp_factory import LMTPConfig
from lmtp_factory.decoding import attach_heads
from lmtp_factory.decoding.tree import chain_paths
from lmtp_factory.decoding.tree_config import DEFAULT_WIDTH
from lmtp_factory.evaluation.scoring import Row
from lmtp_factory.files import HEADS_FOLDER
from lmtp_factory.modeling.checkpoint import save_heads
from lmtp_factory.modeling.draft_vocabulary import most_frequent
from lmtp_factory.modeling.losses.targets import IGNORE_INDEX
from lmtp_factory.plugin.training.packing import pack
from lmtp_factory.tuning.replay import observe_answers, tau_of_dynamic, tau_of_paths


OFFSETS = (2, 3, 6)
SIZES = (8, 16, 32, 64)
BATCH = 32  # rows
RATE = 2e-3
LEAST_GAIN = 1.01  # of tau, for twice as many passes


def parts(settings: Settings) -> dict[str, Callable[[], dict]]:
    """Return a part for each number of passes, each with a schedule of its own."""
    passes = (1, 2) if settings.toy else (1, 2, 4, 8, 16)
    return {f"{number:02}-passes": partial(results, settings, number) for number in passes}


def results(settings: Settings, passes: int) -> dict:
    """Train, replay held-out answers and keep the heads if they are the best so far."""
    before = _earlier(settings, passes)
    if len(before) > 1 and before[-1] < LEAST_GAIN * before[-2]:
        return {"open": f"tau had stopped rising before {passes} passes: {', '.join(f'{tau:.3f}' for tau in before)}"}
    model, rows = with_heads(settings), settings.training_rows()
    states = states_of(model, rows)
    started = time.perf_counter()
    train(model, rows, states, passes)
    seconds = time.perf_counter() - started
    del states
    model.eval()
    model.leap_heads.to(settings.dtype)
    observed = observe_answers(model, settings.heldout_rows(), DEFAULT_WIDTH)
    dynamic = tau_of_dynamic(observed, SIZES)
    if dynamic[16] > max(before, default=0):
        save_heads(model.leap_heads, settings.folder / "heads" / HEADS_FOLDER)
    tokens = passes * sum(len(answer) for _, answer in rows)
    found = {
        "passes": passes,
        "training tokens": tokens,
        "training seconds": seconds,
        "answer tokens per second": tokens / seconds,
        "chain": tau_of_paths(observed, chain_paths(OFFSETS[-1])),
        "dynamic": dynamic,
    }
    del model, observed
    gc.collect()
    return found


def _earlier(settings: Settings, passes: int) -> list[float]:
    """Return tau of the dynamic tree of 16 nodes after fewer passes, for those parts that trained."""
    parts = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(settings.folder.glob("heads-*-passes.json"))
        if int(path.name.split("-")[1]) < passes
    ]
    return [part["dynamic"]["16"] for part in parts if "open" not in part]


def with_heads(settings: Settings) -> nn.Module:
    """Return the base model with fresh fp32 heads that read the newest token, for stage 1."""
    model = settings.base()
    size = 64 if settings.toy else 8192
    words = most_frequent((answer for _, answer in settings.training_rows()), size, model.config.vocab_size)
    config = LMTPConfig(offsets=OFFSETS, head_inputs="state_token", draft_vocab_size=size)
    attach_heads(model, config, stage=1, draft_tokens=words, dtype=torch.float32)
    return model


@torch.no_grad()
def states_of(model: nn.Module, rows: list[Row]) -> list[Tensor]:
    """Return the (length, hidden) final hidden states of every row, on the device.

    Rows are padded on the right, which causal attention does not see.
    """
    states: dict[int, Tensor] = {}
    ids = [torch.tensor(prompt + answer) for prompt, answer in rows]
    for batch in torch.tensor([len(row) for row in ids]).argsort().split(BATCH):
        padded = nn.utils.rnn.pad_sequence([ids[row] for row in batch], batch_first=True).to(model.device)
        hidden = model.final_hidden_states(input_ids=padded)
        states |= {row: hidden[place, : len(ids[row])] for place, row in enumerate(batch.tolist())}
    return [states[row] for row in range(len(rows))]


def train(model: nn.Module, rows: list[Row], states: list[Tensor], passes: int) -> None:
    """Train the heads as stage 1 does: AdamW, a cosine schedule with warm-up, each head clipped by its own norm."""
    model.train()
    heads = model.leap_heads
    optimizer = torch.optim.AdamW(heads.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(42)
    batches = [batch for _ in range(passes) for batch in torch.randperm(len(rows), generator=generator).split(BATCH)]
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, len(batches) // 20), len(batches))
    documents = [
        {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer} for prompt, answer in rows
    ]
    for batch in batches:
        members = batch.tolist()
        inputs = pack([documents[row] for row in members], [list(range(len(members)))], pad_token_id=0)
        hidden = torch.cat([states[row] for row in members])  # (tokens, hidden)
        padding = inputs["input_ids"].shape[1] - len(hidden)
        hidden = nn.functional.pad(hidden, (0, 0, 0, padding))[None]
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            loss = model(**inputs, hidden_states=hidden).loss
        loss.backward()
        for head in heads.heads:
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
