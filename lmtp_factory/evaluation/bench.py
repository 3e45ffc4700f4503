"""Comparison of decoding methods with the same model, prompts, dtype, device and process, interleaved per prompt."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import geometry
from ..decoding.cpu_prepacked import can_prepack, prepacked
from ..decoding.stats import DecodeStats
from ..decoding.tree import best_first_paths
from ..decoding.tree_config import TreeConfig
from .self_generated import generate_greedy


STOCK, OWN_LOOP, DEFAULT_TREE = "stock generate", "our loop, no heads", "backward, default tree"
_LOOKUP_TOKENS = 10


@dataclass
class Arm:
    """One decoding method and its measurements.

    Attributes:
        options: Arguments of `generate`.
        around: Context manager in which `generate` is called.
        outputs: (1, length) token ids for each prompt.
        seconds: Seconds for each prompt, the best of the repeats.
        forwards: Number of backbone forwards, including prefills.
        stats: Statistics of look-back decoding; empty for stock methods.
    """

    options: Mapping
    around: Callable[[], AbstractContextManager] = nullcontext
    outputs: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    forwards: int = 0
    stats: DecodeStats = field(default_factory=DecodeStats)


@dataclass(frozen=True)
class ArmResult:
    """A row of the table.

    Attributes:
        name: Name of the arm.
        tau: Tokens per forward, not counting the prefill.
        mean_acceptance_length: Tokens per step that verified a draft. None for stock methods and without drafts.
        acceptance: For each level, the share of drafts of which it was accepted; empty for stock methods.
        tokens_per_second: Speed, including the prefill.
        over_stock: Speed-up over stock `generate`.
        over_own_loop: Speed-up over look-back decoding without drafts.
        verify_share: Share of verification in the time after the prefill. None for stock methods, and on a GPU unless
            `Arm.stats.profile` is set, which makes decoding slower.
        differing: Number of answers that differ from stock `generate`.
        is_ours: Whether our loop has decoded the answers. False for stock methods.
    """

    name: str
    tau: float
    mean_acceptance_length: float | None
    acceptance: tuple[float, ...]
    tokens_per_second: float
    over_stock: float
    over_own_loop: float
    verify_share: float | None
    differing: int
    is_ours: bool


def default_arms(model: nn.Module, accuracies: Sequence[Sequence[float]], nodes: int) -> dict[str, Arm]:
    """Return stock decoding, our loop without heads, prompt lookup, and the heads with each strategy and kind of tree.

    Args:
        model: A model with leap heads.
        accuracies: For each level the accuracy of the candidate of each rank, from which the static tree is built.
        nodes: Number of nodes of the static and dynamic trees.

    Raises:
        LMTPError: `lmtp/tree.json` is damaged.
    """
    reach = geometry.reach(model.leap_heads.config.offsets)
    paths = tuple(best_first_paths(accuracies, nodes))

    def ours(tree_config: TreeConfig, strategy: str = "backward") -> Arm:
        return Arm({"lmtp_decode": strategy, "lmtp_tree": tree_config})

    arms = {STOCK: Arm({"lmtp_decode": "off"})}
    if can_prepack(model):
        arms["stock, prepacked weights"] = Arm({"lmtp_decode": "off"}, around=lambda: prepacked(model))
    arms["prompt lookup"] = Arm({"lmtp_decode": "off", "prompt_lookup_num_tokens": _LOOKUP_TOKENS})
    arms[OWN_LOOP] = ours(TreeConfig("chain", 1))
    arms["backward, chain"] = ours(TreeConfig("chain", reach))
    arms["backward, static"] = ours(TreeConfig("static", len(paths), paths))
    arms["backward, dynamic"] = ours(TreeConfig("dynamic", nodes))
    arms[DEFAULT_TREE] = ours(model.tree_config())
    arms["forward, dynamic"] = ours(TreeConfig("dynamic", nodes), "forward")
    return arms


def run_arms(
    model: nn.Module, arms: Mapping[str, Arm], prompts: Sequence[Sequence[int]], max_new_tokens: int, repeats: int
) -> None:
    """Run every arm on every prompt and store the measurements in the arms."""
    for arm in arms.values():  # warm-up: kernels, prepacked weights, caches
        with arm.around():
            generate_greedy(model, prompts[0], 8, **always_drafting(arm.options))
    for ids in tqdm(prompts, desc="benchmark", unit="prompt"):
        times: dict[str, list[float]] = {name: [] for name in arms}
        for repeat in range(repeats):
            for name, arm in arms.items():
                stats, steps = arm.stats if not repeat else DecodeStats(), arm.stats.steps
                with arm.around(), _counted_forwards(model, arm) as forwards:
                    started = time.perf_counter()
                    output = generate_greedy(model, ids, max_new_tokens, lmtp_stats=stats, **arm.options)
                    if model.device.type == "cuda":
                        torch.cuda.synchronize()
                    times[name].append(time.perf_counter() - started)
                if not repeat:
                    arm.outputs.append(output.cpu())
                    if forwards is not None:
                        arm.forwards += len(forwards)
                    elif stats.rows:
                        arm.forwards += 1 + stats.steps - steps
                    else:
                        arm.forwards += output.shape[1] - len(ids)
        for name, arm in arms.items():
            arm.seconds.append(min(times[name]))


@contextmanager
def _counted_forwards(model: nn.Module, arm: Arm) -> Iterator[list | None]:
    """Collect one entry for each forward of the backbone; None for a compiled arm, which a hook would compile again."""
    if "cache_implementation" in arm.options:
        yield None
        return
    forwards: list[None] = []
    hook = model.base_model.register_forward_hook(lambda *_: forwards.append(None))
    try:
        yield forwards
    finally:
        hook.remove()


def results(arms: Mapping[str, Arm], prompts: Sequence[Sequence[int]]) -> list[ArmResult]:
    """Return the rows of the table."""
    rates = {name: _new_tokens(arm, prompts) / sum(arm.seconds) for name, arm in arms.items()}
    rows = []
    for name, arm in arms.items():
        steps = arm.forwards - len(prompts)
        rows.append(
            ArmResult(
                name=name,
                tau=(_new_tokens(arm, prompts) - len(prompts)) / max(steps, 1),
                mean_acceptance_length=arm.stats.mean_acceptance_length if arm.stats.drafts else None,
                acceptance=tuple(arm.stats.acceptance()),
                tokens_per_second=rates[name],
                over_stock=rates[name] / rates[STOCK],
                over_own_loop=rates[name] / rates[OWN_LOOP],
                verify_share=arm.stats.share("verify"),
                differing=sum(not torch.equal(a, b) for a, b in zip(arm.outputs, arms[STOCK].outputs)),
                is_ours=arm.stats.rows > 0,
            )
        )
    return rows


def always_drafting(options: Mapping) -> Mapping:
    """Return the options with a tree that drafts in every step, so that a few tokens warm up drafting too."""
    tree = options.get("lmtp_tree")
    return options if tree is None else {**options, "lmtp_tree": replace(tree, always=True)}


def _new_tokens(arm: Arm, prompts: Sequence[Sequence[int]]) -> int:
    return sum(output.shape[1] - len(ids) for output, ids in zip(arm.outputs, prompts))


@torch.no_grad()
def margins(model: nn.Module, arms: Mapping[str, Arm]) -> dict[str, list[float]]:
    """Return, for each answer that differs from stock, the gap between the logits of the first two different tokens.

    In fp32 no answer should differ. In bf16 two logits may be equal, and rounding then decides.
    """
    found: dict[str, list[float]] = {}
    for name, arm in arms.items():
        for ours, stock in zip(arm.outputs, arms[STOCK].outputs):
            common = min(ours.shape[1], stock.shape[1])
            parted = (ours[0, :common] != stock[0, :common]).nonzero()
            if len(parted):
                place = int(parted[0])
                logits = model(stock[:, :place].to(model.device)).logits[0, -1].float()
                found.setdefault(name, []).append(float((logits[ours[0, place]] - logits[stock[0, place]]).abs()))
    return found


def table(rows: Sequence[ArmResult]) -> str:
    """Format one line per arm. `length` is the mean acceptance length."""
    levels = max(len(row.acceptance) for row in rows)
    width = max(len(row.name) for row in rows)
    header = (
        f"{'':<{width}} {'tokens/s':>9} {'x stock':>8} {'x own loop':>11} {'tau':>6} {'length':>7} {'verify':>7}  "
        "accepted at level"
    )
    lines = [f"{header} {' '.join(f'{level:>4}' for level in range(1, levels + 1))}"]
    for row in rows:
        length = "" if row.mean_acceptance_length is None else f"{row.mean_acceptance_length:.2f}"
        share = "" if row.verify_share is None else f"{100 * row.verify_share:.0f}%"
        accepted = " ".join(f"{100 * rate:>3.0f}%" for rate in row.acceptance)
        lines.append(
            f"{row.name:<{width}} {row.tokens_per_second:>9.1f} {row.over_stock:>8.2f} {row.over_own_loop:>11.2f} "
            f"{row.tau:>6.2f} {length:>7} {share:>7}  {'':<17} {accepted}".rstrip()
        )
    return "\n".join(lines)
