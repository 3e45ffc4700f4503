"""Ways of decoding side by side: same model, prompts, dtype, device and process, taking turns on every prompt."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import geometry
from ..decoding.cpu_prepacked import can_prepack, prepacked
from ..decoding.stats import DecodeStats
from ..decoding.tree import best_first_paths
from ..decoding.tree_config import TreeConfig
from .self_generated import generate_greedy


STOCK, OWN_LOOP = "stock generate", "our loop, no heads"
_LOOKUP_TOKENS = 10


@dataclass
class Arm:
    """One way of decoding, and what it did.

    Attributes:
        options: of `generate`.
        around: context that its calls run in.
        outputs: (1, length) of every prompt.
        seconds: of every prompt, the best of the repeats.
        forwards: of the backbone, prefills included.
        stats: of our own loop; empty for stock ways.
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
        tau: tokens a forward after the prefill.
        acceptance: for each level, the share of steps that accepted it; empty for stock ways.
        tokens_per_second: prefill included.
        over_stock, over_own_loop: speed-up.
        verify_share: of the time between prefill and end; None for stock ways.
        differing: answers that are not the stock ones.
    """

    name: str
    tau: float
    acceptance: tuple[float, ...]
    tokens_per_second: float
    over_stock: float
    over_own_loop: float
    verify_share: float | None
    differing: int


def default_arms(model: nn.Module, accuracies: Sequence[Sequence[float]], nodes: int) -> dict[str, Arm]:
    """Stock, our loop without heads, prompt lookup, and the heads in every way.

    Args:
        accuracies: of each level's candidates, to grow the static tree from.
        nodes: of the static and dynamic trees.
    """
    reach = geometry.reach(model.leap_heads.config.offsets)
    paths = tuple(best_first_paths(accuracies, nodes))

    def ours(plan: TreeConfig, strategy: str = "backward") -> Arm:
        return Arm({"lmtp_decode": strategy, "lmtp_tree": plan})

    arms = {STOCK: Arm({"lmtp_decode": "off"})}
    if can_prepack(model):
        arms["stock, packed weights"] = Arm({"lmtp_decode": "off"}, around=lambda: prepacked(model))
    arms["prompt lookup"] = Arm({"lmtp_decode": "off", "prompt_lookup_num_tokens": _LOOKUP_TOKENS})
    arms[OWN_LOOP] = ours(TreeConfig("chain", 1))
    arms["backward, chain"] = ours(TreeConfig("chain", reach))
    arms["backward, static"] = ours(TreeConfig("static", len(paths), paths))
    arms["backward, dynamic"] = ours(TreeConfig("dynamic", nodes))
    arms["backward, as left to us"] = ours(model.tree_config())
    arms["forward, dynamic"] = ours(TreeConfig("dynamic", nodes), "forward")
    return arms


def run_arms(
    model: nn.Module, arms: Mapping[str, Arm], prompts: Sequence[Sequence[int]], max_new_tokens: int, repeats: int
) -> None:
    """Let every arm answer every prompt, and note what it did."""
    forwards = 0

    def count(*_) -> None:
        nonlocal forwards
        forwards += 1

    hook = model.base_model.register_forward_hook(count)
    try:
        for arm in arms.values():  # kernels, packed weights and caches warm up
            with arm.around():
                generate_greedy(model, prompts[0], 8, **arm.options)
        for ids in tqdm(prompts, desc="benchmark", unit="prompt"):
            times: dict[str, list[float]] = {name: [] for name in arms}
            for repeat in range(repeats):
                for name, arm in arms.items():
                    forwards = 0
                    stats = arm.stats if not repeat else DecodeStats()
                    with arm.around():
                        started = time.perf_counter()
                        output = generate_greedy(model, ids, max_new_tokens, lmtp_stats=stats, **arm.options)
                        if model.device.type == "cuda":
                            torch.cuda.synchronize()
                        times[name].append(time.perf_counter() - started)
                    if not repeat:
                        arm.outputs.append(output.cpu())
                        arm.forwards += forwards
            for name, arm in arms.items():
                arm.seconds.append(min(times[name]))
    finally:
        hook.remove()


def results(arms: Mapping[str, Arm], prompts: Sequence[Sequence[int]]) -> list[ArmResult]:
    """The table's rows."""
    rates = {name: _new_tokens(arm, prompts) / sum(arm.seconds) for name, arm in arms.items()}
    rows = []
    for name, arm in arms.items():
        steps = arm.forwards - len(prompts)
        decoding = sum(arm.stats.seconds[phase] for phase in ("draft", "verify", "accept", "commit"))
        rows.append(
            ArmResult(
                name=name,
                tau=(_new_tokens(arm, prompts) - len(prompts)) / max(steps, 1),
                acceptance=tuple(arm.stats.acceptance()),
                tokens_per_second=rates[name],
                over_stock=rates[name] / rates[STOCK],
                over_own_loop=rates[name] / rates[OWN_LOOP],
                verify_share=arm.stats.seconds["verify"] / decoding if decoding else None,
                differing=sum(not torch.equal(a, b) for a, b in zip(arm.outputs, arms[STOCK].outputs)),
            )
        )
    return rows


def _new_tokens(arm: Arm, prompts: Sequence[Sequence[int]]) -> int:
    return sum(output.shape[1] - len(ids) for output, ids in zip(arm.outputs, prompts))


@torch.no_grad()
def margins(model: nn.Module, arms: Mapping[str, Arm]) -> dict[str, list[float]]:
    """For each answer that is not the stock one, how far apart the two tokens' logits are where they part.

    In fp32 there should be none; in bf16 two logits may be equal to the last bit that the format has.
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
    """Arms below each other."""
    levels = max(len(row.acceptance) for row in rows)
    width = max(len(row.name) for row in rows)
    header = (
        f"{'':<{width}} {'tokens/s':>9} {'x stock':>8} {'x own loop':>11} {'tau':>6} {'verify':>7}  accepted at level"
    )
    lines = [f"{header} {' '.join(f'{level:>4}' for level in range(1, levels + 1))}"]
    for row in rows:
        share = "" if row.verify_share is None else f"{100 * row.verify_share:.0f}%"
        accepted = " ".join(f"{100 * rate:>3.0f}%" for rate in row.acceptance)
        lines.append(
            f"{row.name:<{width}} {row.tokens_per_second:>9.1f} {row.over_stock:>8.2f} {row.over_own_loop:>11.2f} "
            f"{row.tau:>6.2f} {share:>7}  {'':<17} {accepted}".rstrip()
        )
    return "\n".join(lines)
