"""Edges: do low-rank scores between a drafted token and its candidate children make decoding faster?

Heads score places independently of each other. An edge score depends on the parent as well:

    log p(child | place, parent) = log p_place(child) + a(parent) . b(child), renormalised over the place's candidates

`a` is a projection of the backbone's embedding and `b` a table, trained on the candidates of frozen heads. Trees grow best
first with and without edges, on the model's own answers to prompts that nobody trained on. The edges' own time counts.

    python experiments/edges.py STAGE1 --rows data/self_distilled_smollm2_train.jsonl \\
        --test general=data/general_prompts.jsonl --json edges.json
"""

import argparse
import heapq
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from heads_runs import add_test_options
from torch import Tensor, nn
from tqdm import tqdm

from lmtp_factory import geometry
from lmtp_factory.decoding.cpu_prepacked import prepacked_if_possible
from lmtp_factory.decoding.draft import candidates_of, unembeddings_kept
from lmtp_factory.evaluation.machine import describe
from lmtp_factory.evaluation.report import load_for_scoring
from lmtp_factory.evaluation.scoring import Row, read_rows
from lmtp_factory.evaluation.self_generated import read_prompts, self_generated_rows
from lmtp_factory.modeling.model import base_of
from lmtp_factory.tuning import replay
from lmtp_factory.tuning.costs import measure_costs


WIDTH = 10
SIZES = (8, 16)
GAIN = 1.03  # what edges have to gain in tokens per second


@dataclass(frozen=True)
class Answer:
    """Candidates at every step of one answer.

    Attributes:
        tokens: (steps, levels, width) candidates.
        probabilities: (steps, levels, width).
        ranks: (steps, levels) rank of the text's token; `width` if it is no candidate.
        truth: (steps, levels) the text's tokens, 0 beyond its end.
    """

    tokens: Tensor
    probabilities: Tensor
    ranks: Tensor
    truth: Tensor


class Edges(nn.Module):
    """Scores between parents and children. All of them are 0 at the start."""

    def __init__(self, embedding: Tensor, rank: int):
        super().__init__()
        self.register_buffer("embedding", F.rms_norm(embedding, embedding.shape[-1:]))
        self.a = nn.Linear(embedding.shape[1], rank, bias=False)
        self.b = nn.Embedding(len(embedding), rank)
        nn.init.zeros_(self.b.weight)

    def forward(self, parents: Tensor, children: Tensor) -> Tensor:
        """Map (..., parents) and (..., children) token ids to (..., parents, children) scores."""
        return self.a(self.embedding[parents]) @ self.b(children).transpose(-1, -2)


def observe(model: nn.Module, row: Row) -> Answer | None:
    """Observe an answer with the tokens of its candidates, which `Observed` does not keep."""
    tokens = []

    def remember(*args):
        candidates = candidates_of(*args)
        tokens.append(candidates.tokens.cpu())
        return candidates

    replay.candidates_of = remember
    try:
        observed = replay.observe(model, row, WIDTH)
    finally:
        replay.candidates_of = candidates_of
    if not len(observed):
        return None
    text = torch.tensor(row[0] + row[1] + [0] * observed.ranks.shape[1])
    places = torch.arange(len(observed))[:, None] + torch.arange(observed.ranks.shape[1]) + len(row[0]) + 1
    return Answer(torch.cat(tokens), observed.probabilities, observed.ranks, text[places])


def train(edges: Edges, answers: list[Answer], epochs: int, batch: int = 4096) -> list[float]:
    """Train the edges on the places whose token is a candidate.

    Returns:
        Mean loss without edges, then that of each epoch.
    """
    parents = torch.cat([answer.truth[:, :-1].flatten() for answer in answers])
    children = torch.cat([answer.tokens[:, 1:].flatten(0, 1) for answer in answers])
    logs = torch.cat([answer.probabilities[:, 1:].flatten(0, 1) for answer in answers]).clamp(min=1e-9).log()
    ranks = torch.cat([answer.ranks[:, 1:].flatten() for answer in answers])
    kept = (ranks < WIDTH).nonzero()[:, 0]
    optimizer = torch.optim.AdamW(edges.parameters(), lr=2e-3, weight_decay=0.01)
    losses = [float(F.cross_entropy(logs[kept], ranks[kept]))]
    for epoch in range(epochs):
        total = 0.0
        for part in tqdm(kept[torch.randperm(len(kept))].split(batch), desc=f"epoch {epoch + 1}", leave=False):
            scores = logs[part] + edges(parents[part, None], children[part])[:, 0]
            loss = F.cross_entropy(scores, ranks[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss) * len(part)
        losses.append(total / len(kept))
    return losses


@torch.no_grad()
def conditional(answer: Answer, edges: Edges | None) -> Tensor:
    """Return (steps, levels, width, width) probabilities of each candidate given each candidate of the level before."""
    steps, levels, width = answer.tokens.shape
    probabilities = answer.probabilities[:, :, None].expand(-1, -1, width, -1).clone()
    if edges is not None:
        logs = answer.probabilities[:, 1:, None].clamp(min=1e-9).log()
        scores = logs + edges(answer.tokens[:, :-1], answer.tokens[:, 1:])
        mass = answer.probabilities[:, 1:].sum(-1)[:, :, None, None]
        probabilities[:, 1:] = scores.softmax(-1) * mass
    return probabilities


def accepted(probabilities: Tensor, ranks: list[int], nodes: int) -> int:
    """Grow one step's tree best first and return how many levels of the text it holds.

    Args:
        probabilities: (levels, width, width) nested lists, see `conditional`.
        ranks: Rank of the text's token on each level.
        nodes: Number of nodes with the root.
    """
    heap = [(-probability, (rank,)) for rank, probability in enumerate(probabilities[0][0])]
    heapq.heapify(heap)
    right = 0
    for _ in range(nodes - 1):
        if not heap:
            break
        value, path = heapq.heappop(heap)
        if list(path) == ranks[: len(path)]:
            right = len(path)
        if len(path) < len(probabilities):
            for rank, probability in enumerate(probabilities[len(path)][path[-1]]):
                heapq.heappush(heap, (value * probability, (*path, rank)))
    return right


def tau(answers: list[Answer], edges: Edges | None, nodes: int) -> float:
    """Replay all answers with dynamic trees."""
    tokens = steps = 0
    for answer in answers:
        probabilities, ranks = conditional(answer, edges).tolist(), answer.ranks.tolist()
        step = 0
        while step < len(ranks):
            reached = min(accepted(probabilities[step], ranks[step], nodes) + 1, len(ranks) - step)
            steps, tokens, step = steps + 1, tokens + reached, step + reached
    return tokens / steps


def seconds_of_edges(edges: Edges, levels: int) -> float:
    """Time the scores of one draft."""
    tokens = torch.randint(len(edges.embedding), (1, levels, WIDTH))
    answer = Answer(tokens, torch.full(tokens.shape, 0.05), tokens[..., 0], tokens[..., 0])
    taken = []
    for _ in range(200):
        started = time.perf_counter()
        conditional(answer, edges)
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="output directory of stage 1, adapter or export with heads")
    parser.add_argument("--rows", type=Path, required=True, help="rows of lmtp-cli distill that the edges train on")
    parser.add_argument("--train-rows", type=int, default=1500)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--epochs", type=int, default=4)
    add_test_options(parser)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    model = base_of(load_for_scoring(args.model))
    levels, costs = geometry.reach(model.leap_heads.config.offsets) - 1, measure_costs(model)
    with prepacked_if_possible(model.base_model), unembeddings_kept():
        training = [observe(model, row) for row in tqdm(read_rows(args.rows, args.train_rows), desc="candidates")]
        tests = {}
        for label, file in args.test:
            _, prompts = read_prompts(args.model, file, args.limit)
            rows = list(self_generated_rows(model, prompts, args.max_new_tokens))
            tests[label] = [answer for row in rows if (answer := observe(model, row)) is not None]
    training = [answer for answer in training if answer is not None]

    def results(edges: Edges | None, seconds: float) -> dict:
        found = {}
        for label, answers in tests.items():
            found[label] = {}
            for nodes in SIZES:
                reached = tau(answers, edges, nodes)
                rate = reached / (costs.verify.at(nodes) + costs.draft + seconds)
                found[label][nodes] = {"tau": reached, "tokens per second": rate}
        return found

    report = {
        "machine": describe(torch.device("cpu")),
        "seed": args.seed,
        "steps of training": sum(len(answer.ranks) for answer in training),
        "without edges": results(None, 0.0),
        "edges": {},
    }
    for rank in args.ranks:
        torch.manual_seed(args.seed)
        edges = Edges(model.get_input_embeddings().weight.detach().float(), rank)
        losses = train(edges, training, args.epochs)
        seconds = seconds_of_edges(edges, levels)
        with_edges = results(edges, seconds)
        report["edges"][rank] = {"losses": losses, "ms of a draft's edges": 1e3 * seconds, **with_edges}
        for label, sizes in with_edges.items():
            for nodes, one in sizes.items():
                plain = report["without edges"][label][nodes]
                ratio = one["tokens per second"] / plain["tokens per second"]
                verdict = "kept" if ratio >= GAIN else f"less than {GAIN}"
                print(
                    f"rank {rank:<4} {label:<10} {nodes:>2} nodes: tau {plain['tau']:.3f} -> {one['tau']:.3f}, "
                    f"tokens/s x {ratio:.3f} ({verdict})",
                    flush=True,
                )
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
