"""The leap loss: Triton kernel, plain torch and Liger against eager, with values, gradients, time and memory."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from loss_arms import ARMS, Point, Problem, unavailable_reason
from loss_memory import compare

from gpu_parts.settings import Settings


VOCABULARIES = (49152, 152064, 262144)
KINDS = ("own", "shared")


def parts(settings: Settings) -> dict[str, Callable[[], dict]]:
    """Return the parts: time and memory, and differences in values, by vocabulary and kind of heads."""
    if settings.toy:
        point = Point(vocab=256, hidden=64, heads=2, tokens=64, kind="own", dtype="fp32", masked=0.25)
        return {"256-own": partial(results, point, settings.device, 0 if settings.device.type == "cpu" else 1)}
    points = {
        f"{vocab}-{kind}": Point(vocab, hidden=2048, heads=3, tokens=8192, kind=kind, dtype="bf16", masked=0.25)
        for vocab in VOCABULARIES
        for kind in KINDS
    }
    return {name: partial(results, point, settings.device, 5) for name, point in points.items()}


def results(point: Point, device: torch.device, rounds: int) -> dict:
    """Return time and memory of every arm, and how far its values are from those of fp32."""
    rows = compare(point, list(ARMS), rounds, device)
    for row in rows.values():
        row.pop("rounds", None)
    return {
        "point": str(point),
        "arms": rows,
        "values": differences(replace(point, tokens=min(point.tokens, 1024)), device),
    }


def differences(point: Point, device: torch.device) -> dict[str, dict[str, float]]:
    """Compare loss and gradients of every arm with the eager loss of the same weights in fp32.

    Returns:
        For each arm the relative difference of the loss, and that of all gradients in Frobenius norm.
    """
    problem = Problem(point, device)
    exact = Problem(replace(point, dtype="fp32"), device)
    exact.heads.load_state_dict(problem.heads.state_dict())
    exact.hidden, exact.targets = problem.hidden.float(), problem.targets
    if problem.lm_head is not None:
        exact.lm_head.load_state_dict(problem.lm_head.state_dict())
    reference_loss, _ = exact.step("eager")
    reference = [parameter.grad for parameter in exact.heads.parameters()]
    norm = torch.stack([gradient.norm() for gradient in reference]).norm()
    found = {}
    for arm in ARMS:
        if arm == "floor" or unavailable_reason(arm, device):
            continue
        problem.heads.zero_grad(set_to_none=True)
        loss, _ = problem.step(arm)
        away = [
            (parameter.grad.float() - expected).norm()
            for parameter, expected in zip(problem.heads.parameters(), reference, strict=True)
        ]
        found[arm] = {
            "loss": abs(loss - reference_loss) / abs(reference_loss),
            "gradients": float(torch.stack(away).norm() / norm),
        }
    return found
