"""Soft targets: does a divergence to the LM head's own distribution make better heads than the text's tokens?

The head at offset o reads the state at s. Its hard target is token s + o, its soft target the LM head's distribution at
state s + o - 1. Both arms train on the same states in the same order. Trees are replayed on greedy answers and on answers
sampled at temperature 1, where a draft is accepted as often as the sampled text follows it.

    python experiments/divergence.py demo_run/model --rows data/self_distilled_smollm2_train.jsonl \\
        --test general=data/general_prompts.jsonl --json divergence.json
"""

import argparse
import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from heads_runs import HEADS, add_test_options
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig
from lmtp_factory.decoding import attach_heads
from lmtp_factory.decoding.cpu_prepacked import prepacked_if_possible
from lmtp_factory.decoding.tree import chain_paths
from lmtp_factory.decoding.tree_config import DEFAULT_WIDTH
from lmtp_factory.evaluation.machine import describe
from lmtp_factory.evaluation.scoring import Row, read_rows
from lmtp_factory.evaluation.self_generated import read_prompts
from lmtp_factory.modeling import onednn
from lmtp_factory.modeling.blocks import KnownToken
from lmtp_factory.modeling.draft_vocabulary import most_frequent
from lmtp_factory.tuning.replay import observe_answers, tau_of_dynamic, tau_of_paths


OFFSETS = (1, 2, 3, 6)
NODES = 16
BATCH = 4  # rows
# Weight of the divergence; the rest is cross-entropy.
ARMS = {"hard": 0.0, "half": 0.5, "soft": 1.0}


def train(model: nn.Module, rows: list[Row], states: list[Tensor], soft: float, args: argparse.Namespace) -> None:
    """Train the model's heads for one pass, each clipped by its own norm as in stage 1."""
    heads, tokens = model.leap_heads, model.leap_heads.draft_tokens
    words = model.get_output_embeddings().weight.detach()[tokens]  # (draft vocabulary, hidden)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=args.learning_rate, weight_decay=0.0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).split(BATCH)
    warmup = max(1, len(order) // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(order) - warmup),
        ],
        [warmup],
    )
    for batch in tqdm(order, desc=f"soft {soft}", leave=False):
        for head, offset in zip(heads.heads, OFFSETS[1:]):
            inputs, known, backs, targets, ahead = [], [], [], [], []
            for row in batch.tolist():
                prompt, answer = rows[row]
                ids, hidden = torch.tensor(prompt + answer), states[row].float()
                first, last = max(len(prompt) - offset, 0), len(ids) - offset
                if last <= first:
                    continue
                at = torch.arange(first, last)
                back = at % head.backs
                inputs.append(hidden[at])
                known.append(ids[at + 1 + back])
                backs.append(back)
                targets.append(heads.draft_labels(ids[at + offset]))
                ahead.append(hidden[at + offset - 1])
            embeddings = model.get_input_embeddings()(torch.cat(known)).detach()
            newest = KnownToken(embeddings, torch.cat(backs))
            features = head.features(torch.cat(inputs), newest, onednn.trainable_linear)
            logits = onednn.trainable_linear(head.unembed)(features)  # (rows, draft vocabulary)
            logs = logits.log_softmax(-1)
            targets = torch.cat(targets)
            loss = (1 - soft) * F.nll_loss(logs, targets, ignore_index=-100)
            if soft:
                goal = onednn.mm(torch.cat(ahead), words.t()).softmax(-1)
                loss = loss + soft * -(goal * logs).sum(-1).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def answers(model: nn.Module, prompts: list[list[int]], args: argparse.Namespace, sampled: bool) -> list[Row]:
    """Let the model answer without drafts, greedily or at temperature 1."""
    torch.manual_seed(args.seed)
    how = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0} if sampled else {"do_sample": False}
    rows = []
    for ids in tqdm(prompts, desc="the model writes", leave=False):
        prompt = torch.tensor([ids])
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.max_new_tokens, repetition_penalty=1.0,
            lmtp_decode="off", **how,
        )  # fmt: skip
        rows.append((ids, output[0, len(ids) :].tolist()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="base model")
    parser.add_argument("--rows", type=Path, required=True, help="training rows of lmtp-cli distill")
    parser.add_argument("--train-rows", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    add_test_options(parser)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    rows = read_rows(args.rows, args.train_rows)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    words = most_frequent((answer for _, answer in rows), HEADS["draft_vocab_size"], model.config.vocab_size)
    attach_heads(model, LMTPConfig(offsets=OFFSETS[1:], **HEADS), stage=1, draft_tokens=words)
    model.leap_heads.reset(args.seed)
    model.eval()
    start = copy.deepcopy(model.leap_heads.state_dict())
    with torch.no_grad(), prepacked_if_possible(model.base_model):
        states = [
            model.final_hidden_states(input_ids=torch.tensor([prompt + answer]))[0].bfloat16()
            for prompt, answer in tqdm(rows, desc="states")
        ]
    texts = {}
    for label, file in args.test:
        _, prompts = read_prompts(args.model, file, args.limit)
        for name, sampled in (("greedy", False), ("temperature 1", True)):
            texts[f"{label}, {name}"] = answers(model, prompts, args, sampled)

    report = {"machine": describe(torch.device("cpu")), "seed": args.seed, "rows": len(rows), "arms": {}}
    for arm, soft in ARMS.items():
        model.leap_heads.load_state_dict(start)
        train(model, rows, states, soft, args)
        report["arms"][arm] = {}
        for label, written in texts.items():
            observed = observe_answers(model, written, DEFAULT_WIDTH)
            chain, tree = tau_of_paths(observed, chain_paths(OFFSETS[-1])), tau_of_dynamic(observed, [NODES])[NODES]
            report["arms"][arm][label] = {"chain": chain, "dynamic": tree}
            print(f"{arm:<6}{label:<28} chain {chain:.3f}, dynamic tree of {NODES} nodes {tree:.3f}", flush=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
