"""Peak extra memory and time of the leap loss, forward and backward.

Baseline, ratio 1.00: `eager`, each head's logits for all rows and autograd. `torch` and `triton` are the chunked loss.
`liger` is Liger-Kernel's fused linear cross-entropy, called for each head. `floor` is only the unavoidable matmuls, in
chunks. Heads are trained and hidden states frozen, as in stage 1. Extra memory is the peak beyond weights and hidden
states. It includes the gradients of trained weights, which also have their own column.

    python benchmarks/loss_memory.py --sweep tokens vocab hidden heads --json loss.json --plot loss.png

Each axis is swept separately around a centre. An option with a single value sets the centre. On a CPU each arm and
round runs in a new process, and one more process measures memory; on CUDA all share one process. Arms are interleaved.
If an arm does not fit into memory, its memory is calculated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from loss_arms import ARMS, DTYPES, Point, Problem, needed, unavailable_reason
from peak_memory import MIB, PeakMemory, available_bytes

from lmtp_factory.evaluation.machine import describe
from lmtp_factory.options import HEAD_KINDS


# Axis -> (centre, swept values).
AXES = {
    "tokens": (8192, (2048, 8192, 32768)),
    "vocab": (152064, (49152, 128256, 152064, 262144)),
    "hidden": (576, (576, 2048, 3840)),
    "heads": (3, (1, 3, 6)),
}
AXIS_LABELS = {"tokens": "tokens", "vocab": "vocabulary", "hidden": "hidden size", "heads": "heads"}
BASELINE = "eager"

# glibc may keep freed blocks of less than 32 MiB, so memory would be counted twice or not at all. This setting returns
# blocks of 1 MiB or more to the system at once. It costs time, so memory is measured in a separate run.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    if args.worker:
        point = Point(**json.loads(args.worker))
        print(json.dumps(in_worker(point, args.arms[0], device)))
        return
    centre, points = chosen_points(args)
    print(describe(device))
    print(f"{sum(p.tflop for p in points):,.1f} TFLOP of matmuls for each arm and run")
    report = {"machine": describe(device), "baseline": BASELINE, "centre": asdict(centre), "points": []}
    for point in points:
        print(f"\n{point}: {point.tflop:,.2f} TFLOP of matmuls", flush=True)
        rows = compare(point, args.arms, args.rounds, device)
        print_table(rows)
        report["points"].append({"point": asdict(point), "tflop": point.tflop, "arms": rows})
        if args.json:  # after every point: a sweep takes hours
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw(report, [axis for axis in args.sweep if axis != "none"], args.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for axis, (_, values) in AXES.items():
        parser.add_argument(f"--{axis}", type=int, nargs="+", default=values)
    parser.add_argument("--sweep", nargs="+", choices=(*AXES, "none"), default=["none"], help="none: only the centre")
    parser.add_argument("--kind", choices=HEAD_KINDS, default="own", help="shared: a frozen LM head, read by all heads")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--masked", type=float, default=0.0, help="share of the targets")
    parser.add_argument("--rounds", type=int, default=3, help="0: only memory, on a CPU")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    parser.add_argument("--plot", metavar="FILE", help="also draw the swept axes, as PNG")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plot and args.sweep == ["none"]:
        parser.error("--plot draws swept axes: name them with --sweep")
    if not 0 <= args.masked < 1 or args.rounds < (1 if args.device != "cpu" else 0):
        parser.error("--masked is a share below 1, and CUDA has at least one round")
    return args


def chosen_points(args: argparse.Namespace) -> tuple[Point, list[Point]]:
    """Return the centre and all distinct points."""
    values = {axis: getattr(args, axis) for axis in AXES}
    middle = {axis: AXES[axis][0] if AXES[axis][0] in v else v[len(v) // 2] for axis, v in values.items()}
    centre = Point(**middle, kind=args.kind, dtype=args.dtype, masked=args.masked)
    swept = [replace(centre, **{axis: v}) for axis in args.sweep if axis != "none" for v in values[axis]]
    return centre, list(dict.fromkeys(swept)) or [centre]


def compare(point: Point, arms: list[str], rounds: int, device: torch.device) -> dict[str, dict]:
    """Return medians and ratios of each arm, or why they are missing."""
    rows = {arm: {} for arm in arms}
    for arm, row in rows.items():
        needs, words = needed(arm, point, device)
        row["needs_bytes"] = needs
        # Add 5 % and 0.5 GB for what the calculation omits, including the process itself.
        total, available = 1.05 * (needs + point.weights) + 5e8, available_bytes(device)
        if reason := unavailable_reason(arm, device):
            row["open"] = reason
        elif total > available:
            row["skipped"] = (
                f"needs {needs / 1e9:,.1f} GB: {words}; beside {point.weights / 1e9:,.1f} GB of weights and hidden "
                f"states, and {available / 1e9:,.1f} GB are available"
            )
    runs = {arm: [] for arm, row in rows.items() if not row.keys() & {"open", "skipped"}}
    problem = Problem(point, device) if device.type == "cuda" and runs else None
    for arm in runs if problem else ():
        measured(problem, arm)  # compiles kernels
    for _ in range(rounds):
        for arm, results in runs.items():
            results.append(measured(problem, arm) if problem else in_fresh_process(point, arm, device))
    for arm, results in runs.items():
        memory = results[0] if problem else in_fresh_process(point, arm, device, **GIVES_BACK)
        rows[arm] |= {key: memory[key] for key in ("peak_bytes", "gradient_bytes", "loss")}
        if results:
            rows[arm] |= {"seconds": statistics.median(result["seconds"] for result in results), "rounds": results}
    for row in rows.values():
        for other in (BASELINE, "floor"):
            if other in rows:
                add_ratios(row, rows[other], other)
    return rows


def add_ratios(row: dict, base: dict, name: str) -> None:
    """Add ratios to another arm: memory (measured or calculated) and time within the same round."""
    memory, _ = memory_of(row)
    base_memory, computed = memory_of(base)
    if memory and base_memory:
        row[f"memory_over_{name}"] = memory / base_memory
        row[f"memory_over_{name}_is_computed"] = computed or "skipped" in row
    if "rounds" in row and "rounds" in base:
        pairs = zip(row["rounds"], base["rounds"], strict=True)
        row[f"time_over_{name}"] = statistics.median(mine["seconds"] / its["seconds"] for mine, its in pairs)


def memory_of(row: dict) -> tuple[float | None, bool]:
    """Return the peak extra bytes, and whether they are calculated because the arm does not fit into memory."""
    return (row["needs_bytes"], True) if "skipped" in row else (row.get("peak_bytes"), False)


def measured(problem: Problem, arm: str) -> dict:
    """Measure one step that starts without gradients, as after `zero_grad`."""
    problem.heads.zero_grad(set_to_none=True)
    with PeakMemory(problem.device) as peak:
        started = time.perf_counter()
        loss, gradients = problem.step(arm)
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
        seconds = time.perf_counter() - started
    problem.heads.zero_grad(set_to_none=True)
    return {"peak_bytes": peak.bytes, "gradient_bytes": gradients, "seconds": seconds, "loss": loss}


def in_worker(point: Point, arm: str, device: torch.device) -> dict:
    # Warm-up: loads libraries, starts threads and allocates MKL's buffers, about 10 MiB.
    Problem(replace(point, vocab=4096, hidden=256, heads=1, tokens=256), device).step(arm)
    return measured(Problem(point, device), arm)


def in_fresh_process(point: Point, arm: str, device: torch.device, **environment: str) -> dict:
    """Measure one step in a new process, where no earlier step has left resident memory."""
    options = ["--worker", json.dumps(asdict(point)), "--arms", arm, "--device", str(device)]
    command = [sys.executable, os.path.abspath(__file__), *options]
    worker = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment)
    return json.loads(worker.stdout.splitlines()[-1])


def print_table(rows: dict[str, dict]) -> None:
    print(
        f"{'arm':<7}{'peak extra':>14}{'gradients':>14}{'over eager':>20}{'time':>11}{'over eager':>12}{'over floor':>12}"
    )
    for arm, row in rows.items():
        if "open" in row:
            print(f"{arm:<7}open ({row['open']})")
        elif "skipped" in row:
            print(f"{arm:<7}{row['skipped']}")
        else:
            ratio = cell(row.get("memory_over_eager"), "7.4f") + (
                " computed" if row.get("memory_over_eager_is_computed") else ""
            )
            print(
                f"{arm:<7}{cell(row['peak_bytes'], ',.1f', MIB, ' MiB'):>14}"
                f"{cell(row['gradient_bytes'], ',.1f', MIB, ' MiB'):>14}{ratio:>20}"
                f"{cell(row.get('seconds'), ',.3f', 1, ' s'):>11}"
                f"{cell(row.get('time_over_eager'), '.3f'):>12}{cell(row.get('time_over_floor'), '.3f'):>12}"
            )
    if any("peak_bytes" in row and row["peak_bytes"] is None for row in rows.values()):
        print("No peak memory: on a CPU it is read from Linux's /proc/self/status, which does not exist here.")


def cell(value: float | None, spec: str, unit: int = 1, suffix: str = "") -> str:
    return "" if value is None else f"{value / unit:{spec}}{suffix}"


def draw(report: dict, axes: list[str], path: str) -> None:
    """Draw peak extra memory and time, one row of panels per axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here so that workers start faster
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4 * len(axes)), layout="constrained")
    FigureCanvasAgg(figure)
    arms = [arm for arm in ARMS if any(arm in entry["arms"] for entry in report["points"])]
    for axis, (memory, seconds) in zip(axes, figure.subplots(len(axes), 2, squeeze=False), strict=True):
        entries = [e for e in report["points"] if {**e["point"], axis: 0} == {**report["centre"], axis: 0}]
        entries.sort(key=lambda entry: entry["point"][axis])
        values = [entry["point"][axis] for entry in entries]
        for arm in arms:
            style = {"color": f"C{ARMS.index(arm)}", "marker": "o"}
            rows = [entry["arms"][arm] for entry in entries]
            taken = [(x, *memory_of(row)) for x, row in zip(values, rows) if memory_of(row)[0]]
            if taken:
                memory.plot([t[0] for t in taken], [t[1] / MIB for t in taken], label=arm, **style)
                hollow = [(x, size / MIB) for x, size, computed in taken if computed]
                if hollow:
                    memory.plot(*zip(*hollow), linestyle="", markerfacecolor="white", **style)
            timed = [(x, row["seconds"]) for x, row in zip(values, rows) if "seconds" in row]
            if timed:
                seconds.plot(*zip(*timed), label=arm, **style)
        for panel, what in (
            (memory, "peak extra memory (MiB); hollow: computed"),
            (seconds, "forward and backward (s)"),
        ):
            panel.set(xscale="log", yscale="log", xlabel=AXIS_LABELS[axis], ylabel=what)
            panel.set_xticks(values, [f"{value:,}" for value in values])
            panel.set_xticks([], minor=True)
            panel.grid(alpha=0.3)
            if panel.lines:
                panel.legend()
    figure.suptitle(f"leap loss around {Point(**report['centre'])}", fontsize=10)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
