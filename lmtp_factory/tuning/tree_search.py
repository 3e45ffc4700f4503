"""Choosing a tree: the option with the most tokens per second, from replayed text and the device's costs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ..decoding.tree import best_first_paths, chain_paths
from ..decoding.tree_config import TreeConfig
from ..errors import LMTPError
from .costs import StepCosts
from .replay import Observed, accuracies, rate_of_cut_trees, tau_of_dynamic, tau_of_paths, with_steps


SIZES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Option:
    """A kind and size of tree with its expected speed.

    Attributes:
        kind: `none`, `chain`, `static`, `dynamic`, or `dynamic, cut` to the best size in each step.
        nodes: Number of nodes verified per step, including the root; the maximum if trees are cut.
        tau: Tokens per forward.
        tokens_per_second: Speed of decoding without the prefill.
    """

    kind: str
    nodes: int
    tau: float
    tokens_per_second: float


def rank_trees(observed: Sequence[Observed], costs: StepCosts) -> list[Option]:
    """Evaluate every kind and size of tree.

    Static trees are built from the first half of the answers. All trees are evaluated on the second half.

    Args:
        observed: The observed answers. Those without a step do not count.
        costs: Durations on the device.

    Raises:
        LMTPError: No answer has a step.
    """
    observed = with_steps(observed)
    half = max(len(observed) // 2, 1)
    first, second = observed[:half], observed[half:] or observed
    rates = accuracies(first)
    options = [Option("none", 1, 1.0, 1 / costs.verify.at(1))]

    def add(kind: str, nodes: int, tau: float) -> None:
        options.append(Option(kind, nodes, tau, tau / (costs.verify.at(nodes) + costs.draft)))

    for nodes in range(2, len(rates) + 2):
        add("chain", nodes, tau_of_paths(second, chain_paths(nodes)))
    for nodes in SIZES:
        add("static", nodes, tau_of_paths(second, best_first_paths(rates, nodes)))
    for nodes, tau in tau_of_dynamic(second, SIZES).items():
        add("dynamic", nodes, tau)
    for nodes in SIZES:
        config = TreeConfig("dynamic", nodes, cost=costs.verify)
        options.append(Option("dynamic, cut", nodes, *rate_of_cut_trees(second, config, costs.draft)))
    return options


def rank_chains(observed: Sequence[Observed], seconds: Mapping[int, float]) -> list[Option]:
    """Evaluate chains for an engine that verifies nothing else.

    Args:
        observed: The observed answers. Those without a step do not count.
        seconds: Seconds of the engine's step by number of drafts, the drafting included; 0 is a step without drafts.

    Raises:
        LMTPError: No answer has a step, or a chain is longer than the heads reach.
    """
    observed = with_steps(observed)
    levels = observed[0].ranks.shape[1]
    if max(seconds) > levels:
        raise LMTPError(f"Steps with {max(seconds)} drafts are given, but these heads draft {levels}: leave them out.")
    taus = {length: tau_of_paths(observed, chain_paths(length + 1)) if length else 1.0 for length in sorted(seconds)}
    return [
        Option("chain" if length else "none", length + 1, tau, tau / seconds[length]) for length, tau in taus.items()
    ]


def tree_config_of(option: Option, observed: Sequence[Observed], costs: StepCosts) -> TreeConfig:
    """Return the tree configuration of an option."""
    if option.kind == "none":
        return TreeConfig("chain", 1)
    # A step takes tau / tokens_per_second seconds, and in plain steps that time would have brought so many tokens.
    gain = option.tau - option.tau / option.tokens_per_second / costs.verify.at(1)
    if option.kind == "static":
        paths = best_first_paths(accuracies(observed), option.nodes)
        return TreeConfig("static", len(paths), tuple(paths), expected_gain=gain)
    cost = costs.verify if option.kind == "dynamic, cut" else None
    return TreeConfig(option.kind.split(",")[0], option.nodes, cost=cost, expected_gain=gain)


def table(options: Sequence[Option]) -> str:
    """Format one line per option and mark the best."""
    best = max(options, key=lambda option: option.tokens_per_second)
    lines = [f"{'tree':<14} {'nodes':>5} {'tau':>6} {'tokens/s':>9}"]
    for option in options:
        mark = "  <- chosen" if option is best else ""
        lines.append(f"{option.kind:<14} {option.nodes:>5} {option.tau:>6.2f} {option.tokens_per_second:>9.1f}{mark}")
    return "\n".join(lines)


def measured(options: Sequence[Option], observed: Sequence[Observed], costs: StepCosts) -> dict:
    """Return the measurements behind the choice, for `tree.json`."""
    return {
        "accuracies": [[round(rate, 4) for rate in level] for level in accuracies(observed)],
        "verify_seconds": {str(size): round(seconds, 6) for size, seconds in costs.verify.seconds.items()},
        "draft_seconds": round(costs.draft, 6),
        "steps": sum(map(len, observed)),
        "options": [asdict(option) for option in options],
    }
