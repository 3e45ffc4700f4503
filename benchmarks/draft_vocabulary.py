"""What a draft vocabulary saves: time and memory of the heads' training step, and time of a draft.

Baseline, ratio 1.00: heads of the same kind that can draft every token of the model's vocabulary. The backbone is one
random layer of Llama; the training step (forward, backward, AdamW) reads given hidden states, as from the cache of stage
1. Memory is the step's peak on top of the weights: gradients, states of AdamW and the loss. Each arm has a process of its
own.

    python benchmarks/draft_vocabulary.py --vocab 49152 152064 --draft-vocab 8192 32768 --json draft_vocabulary.json
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from peak_memory import MIB, PeakMemory
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.evaluation.machine import describe
from lmtp_factory.tuning.costs import measure_costs


OFFSETS = (2, 3, 6)


def model_of(args: argparse.Namespace, vocab: int, kind: str, draft_vocab: int | None) -> nn.Module:
    """Return a model of one random layer with heads; the first `draft_vocab` tokens are the draft vocabulary."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=args.hidden, intermediate_size=args.hidden, num_hidden_layers=1,
        num_attention_heads=args.hidden // 64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    heads = LMTPConfig(offsets=OFFSETS, head_kind=kind, head_inputs="state_token", draft_vocab_size=draft_vocab)
    return attach_heads(model, heads, stage=1, draft_tokens=draft_vocab and range(draft_vocab))


def step_of(args: argparse.Namespace, model: nn.Module) -> Callable[[], None]:
    """Return a training step of the heads on given hidden states and tokens, all of them in every draft vocabulary."""
    ids = torch.randint(min(args.draft_vocab), (1, args.tokens))
    states = torch.randn(1, args.tokens, args.hidden)
    optimizer = torch.optim.AdamW(model.leap_heads.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids, hidden_states=states).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def median_seconds(job: Callable[[], None], rounds: int) -> float:
    """Return the median of some rounds after one that is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def measured(args: argparse.Namespace, vocab: int, kind: str, draft_vocab: int | None) -> dict:
    """Measure one arm, in a new process."""
    torch.manual_seed(0)
    model = model_of(args, vocab, kind, draft_vocab)
    step = step_of(args, model)
    with PeakMemory("cpu") as memory:
        step()
    return {
        "vocabulary": vocab,
        "head kind": kind,
        "draft vocabulary": draft_vocab or vocab,
        "head parameters": sum(parameter.numel() for parameter in model.leap_heads.parameters()),
        "step bytes": memory.bytes,
        "step seconds": median_seconds(step, args.rounds),
        "draft seconds": measure_costs(model.eval(), sizes=(1,)).draft,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 152064])
    parser.add_argument("--draft-vocab", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--head-kind", nargs="+", choices=("own", "shared"), default=["own", "shared"])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()

    arms = [
        (vocab, kind, size)
        for vocab in args.vocab
        for kind in args.head_kind
        for size in (None, *(size for size in args.draft_vocab if size < vocab))
    ]
    rows = []
    for arm in arms:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows.append(process.submit(measured, args, *arm).result())
    print(table(rows))
    if args.json:
        facts = {"machine": describe(torch.device("cpu")), "hidden": args.hidden, "tokens": args.tokens}
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict]) -> str:
    """Format the results as Markdown."""
    lines = [
        "| vocabulary | unembedding | heads draft | head parameters | training step, MiB | ms | ratio | draft, ms | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = [other for other in rows if all(other[key] == row[key] for key in ("vocabulary", "head kind"))]
        memory = "" if row["step bytes"] is None else f"{row['step bytes'] / MIB:,.0f}"
        cells = [f"{row['vocabulary']:,}", row["head kind"], f"{row['draft vocabulary']:,}"]
        cells += [f"{row['head parameters'] / 1e6:.1f} M", memory]
        for key in ("step seconds", "draft seconds"):
            cells += [f"{1e3 * row[key]:.1f}", f"{row[key] / same[0][key]:.2f}"]  # the first drafts every token
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
