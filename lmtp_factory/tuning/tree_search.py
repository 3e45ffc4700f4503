"""Choosing a tree: tokens a forward from replayed text, seconds a forward from the device, most tokens a second wins."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..decoding.tree import best_first_paths, chain_paths
from ..decoding.tree_config import TreeConfig
from .costs import StepCosts
from .replay import Observed, accuracies, rate_of_cut_trees, tau_of_dynamic, tau_of_paths


SIZES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Option:
    """One way of drafting and what it promises.

    Attributes:
        kind: `none`, `chain`, `static`, `dynamic`, or `dynamic, cut` in each step where it pays most.
        nodes: verified in a step, the root counted; the most of them where trees are cut.
        tau: tokens a forward.
        tokens_per_second: of decoding alone, without prefill.
    """

    kind: str
    nodes: int
    tau: float
    tokens_per_second: float


def weigh(observed: Sequence[Observed], costs: StepCosts) -> list[Option]:
    """Every kind and size, on the second half of the answers; static trees are grown on the first half."""
    half = max(len(observed) // 2, 1)
    grown_on, weighed_on = observed[:half], observed[half:] or observed
    rates = accuracies(grown_on)
    options = [Option("none", 1, 1.0, 1 / costs.verify.at(1))]

    def add(kind: str, nodes: int, tau: float) -> None:
        options.append(Option(kind, nodes, tau, tau / (costs.verify.at(nodes) + costs.draft)))

    for nodes in range(2, len(rates) + 2):
        add("chain", nodes, tau_of_paths(weighed_on, chain_paths(nodes)))
    for nodes in SIZES:
        add("static", nodes, tau_of_paths(weighed_on, best_first_paths(rates, nodes)))
    for nodes, tau in tau_of_dynamic(weighed_on, SIZES).items():
        add("dynamic", nodes, tau)
    for nodes in SIZES:
        plan = TreeConfig("dynamic", nodes, cost=costs.verify)
        options.append(Option("dynamic, cut", nodes, *rate_of_cut_trees(weighed_on, plan, costs.draft)))
    return options


def plan_of(option: Option, observed: Sequence[Observed], costs: StepCosts) -> TreeConfig:
    """The plan that carries out an option."""
    if option.kind == "none":
        return TreeConfig("chain", 1)
    if option.kind == "static":
        paths = best_first_paths(accuracies(observed), option.nodes)
        return TreeConfig("static", len(paths), tuple(paths))
    cost = costs.verify if option.kind == "dynamic, cut" else None
    return TreeConfig(option.kind.split(",")[0], option.nodes, cost=cost)


def table(options: Sequence[Option]) -> str:
    """A row an option, the best marked."""
    best = max(options, key=lambda option: option.tokens_per_second)
    lines = [f"{'tree':<14} {'nodes':>5} {'tau':>6} {'tokens/s':>9}"]
    for option in options:
        mark = "  <- chosen" if option is best else ""
        lines.append(f"{option.kind:<14} {option.nodes:>5} {option.tau:>6.2f} {option.tokens_per_second:>9.1f}{mark}")
    return "\n".join(lines)


def measured(options: Sequence[Option], observed: Sequence[Observed], costs: StepCosts) -> dict:
    """What a choice rests on, for `tree.json`."""
    return {
        "accuracies": [[round(rate, 4) for rate in level] for level in accuracies(observed)],
        "verify_seconds": {str(size): round(seconds, 6) for size, seconds in costs.verify.seconds.items()},
        "draft_seconds": round(costs.draft, 6),
        "steps": sum(map(len, observed)),
        "options": [asdict(option) for option in options],
    }
