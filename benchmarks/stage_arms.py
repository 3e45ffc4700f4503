"""The arms of `stage_throughput.py`: the training step of each arm, on the same documents."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from loss_arms import DTYPES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.modeling import onednn
from lmtp_factory.modeling.draft_vocabulary import most_frequent
from lmtp_factory.modeling.losses.targets import IGNORE_INDEX
from lmtp_factory.modeling.model import base_of, softcap_of
from lmtp_factory.plugin.training.collator import CACHE_INDEX, CachedStatesCollator
from lmtp_factory.plugin.training.hidden_cache import HiddenCache
from lmtp_factory.plugin.training.packing import arrange, pack
from lmtp_factory.plugin.training.shard_layout import ShardLayout


ARMS = {
    "stage 1, naive": "padded; computes the LM head and its loss, stores all hidden states, stacks all logits",
    "stage 1": "packed; final hidden states and the leap loss",
    "stage 1, cached": "packed; final hidden states from the cache on disk and the leap loss",
    "stage 1, cached, draft vocabulary": "the same; heads draft the most frequent tokens of the text only",
    "stage 1, backbone": "packed; only the frozen forward, a lower bound of stage 1 without a cache",
    "SFT": "padded; transformers' own loss",
    "stage 2, naive": "padded; stores all hidden states, stacks all logits",
    "stage 2": "padded; one backbone pass and the leap loss",
}


@dataclass(frozen=True)
class Setting:
    """Settings that all arms share."""

    model: str
    batch: int
    dtype: str
    device: str
    heads: int
    kind: str
    checkpointing: bool
    draft_vocab_size: int
    tuning: str = "lora"  # of stage 2 and SFT; or full
    attention: str = "sdpa"


def make_step(
    arm: str, setting: Setting, documents: Sequence[dict], folder: str, stack: ExitStack
) -> tuple[Callable[[Sequence[dict]], None], int, int]:
    """Create the training step of an arm.

    Args:
        arm: A key of `ARMS`.
        setting: Settings that all arms share.
        documents: All training documents.
        folder: Empty directory for the cache.
        stack: Receives the contexts in which the step has to run.

    Returns:
        The step (forward, backward and AdamW); bytes of the base model; bytes of the parameters added
        to it.
    """
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        setting.model, dtype=DTYPES[setting.dtype], attn_implementation=setting.attention
    ).to(setting.device)
    base_bytes = sum(p.nbytes for p in model.parameters())
    hidden_size, pad = model.config.hidden_size, model.config.pad_token_id or 0
    if arm.startswith("stage 1"):
        model.requires_grad_(False)
    else:
        if setting.tuning == "lora":
            from peft import LoraConfig, get_peft_model  # imported here because gpu.py runs without it

            model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        if setting.checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
    leap_model = model
    if arm != "SFT":
        size = setting.draft_vocab_size if "draft vocabulary" in arm else None
        config = LMTPConfig(num_heads=setting.heads, head_kind=setting.kind, draft_vocab_size=size)
        answers = ([token for token in document["labels"] if token >= 0] for document in documents)
        tokens = size and most_frequent(answers, size, model.config.vocab_size)
        attach_heads(model, config, stage=1 if "stage 1" in arm else 2, draft_tokens=tokens)
        leap_model = base_of(model)
        leap_model.leap_heads.float()
    model.train()
    added_bytes = sum(p.nbytes for p in model.parameters()) - base_bytes
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None  # the Trainer's default

    def packed(batch: Sequence[dict]) -> dict[str, Tensor]:
        return pack(batch, arrange([len(d["input_ids"]) for d in batch], hidden_size, setting.attention), pad)

    if "stage 1" in arm and "naive" not in arm:  # as the Trainer does
        stack.enter_context(onednn.multiplying(leap_model.base_model))
    cached = CachedStatesCollator(None, fill(folder, leap_model, documents, pad), pad) if "cached" in arm else None

    def loss_of(batch: Sequence[dict]) -> Tensor:
        if arm in ("stage 1", "stage 1, backbone"):
            inputs = _moved(packed(batch), setting.device)
            return model(**inputs).loss if arm == "stage 1" else leap_model.final_hidden_states(**_unlabelled(inputs))
        if "cached" in arm:
            return model(**_moved(cached(batch), setting.device)).loss
        inputs = _moved(padded(batch, pad), setting.device)
        return naive_loss(leap_model, inputs) if "naive" in arm else model(**inputs).loss

    def step(batch: Sequence[dict]) -> None:
        with torch.autocast(torch.device(setting.device).type, torch.bfloat16, enabled=setting.dtype == "bf16"):
            loss = loss_of(batch)
        if loss.requires_grad:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step, base_bytes, added_bytes


@torch.no_grad()
def fill(folder: str, model: nn.Module, documents: Sequence[dict], pad: int) -> HiddenCache:
    """Fill a cache with the documents' hidden states and store its index in each document."""
    plan = ShardLayout([len(document["input_ids"]) for document in documents], model.config.hidden_size)
    cache = HiddenCache.open(folder, plan, {})
    for shard, members in enumerate(plan.shards):
        states = []
        for document in (documents[i] for i in members):
            alone = _unlabelled(_moved(pack([document], [[0]], pad), str(model.device)))
            states.append(model.final_hidden_states(**alone)[0, : len(document["input_ids"])])
        cache.write(shard, torch.cat(states))
    for i, document in enumerate(documents):
        document[CACHE_INDEX] = i
    return cache


def padded(batch: Sequence[dict], pad: int) -> dict[str, Tensor]:
    """Pad documents to one per row, as LLaMA-Factory's collator does."""

    def column(key: str, value: int) -> Tensor:
        rows = [torch.as_tensor(document[key]) for document in batch]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    batch_of = {"input_ids": column("input_ids", pad), "labels": column("labels", IGNORE_INDEX)}
    lengths = torch.tensor([len(document["input_ids"]) for document in batch])
    mask = torch.arange(batch_of["input_ids"].shape[1]) < lengths.unsqueeze(1)
    return batch_of | {"attention_mask": mask.long()}


def naive_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Compute the loss without optimisations: all hidden states are kept, all logits are in one tensor."""
    labels, objective = inputs["labels"], model.objective
    model.objective = None  # selects the base class's forward
    output = model(**inputs, output_hidden_states=True, use_cache=False)
    model.objective = objective
    heads = model.leap_heads.logits(output.hidden_states[-1], model.get_output_embeddings(), softcap_of(model))
    logits = torch.cat([output.logits.unsqueeze(0), heads.to(output.logits.dtype)])
    losses = []
    for head_logits, offset in zip(logits, model.leap_heads.config.offsets, strict=True):
        shifted = head_logits[:, :-offset].float().flatten(0, 1)
        losses.append(F.cross_entropy(shifted, labels[:, offset:].flatten(), ignore_index=IGNORE_INDEX))
    trained = losses[objective.first_head :]
    return sum(weight * loss for weight, loss in zip(objective.weights, trained, strict=True))


def _moved(inputs: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in inputs.items()}


def _unlabelled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in inputs.items() if key != "labels"}
