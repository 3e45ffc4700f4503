"""Tokens per second of a vLLM server with leap heads against the same server without speculation, on the same prompts.

Each arm is a server of its own: none, then each longest draft of --lengths. Greedy answers are compared with those of the
server without speculation at the same concurrency. Acceptance by position comes from the server's /metrics; beside it stands
what replay of the served answers predicts. All levels of concurrency ask the same prompts, so that the later ones find their
prefixes cached, with and without speculation.

    python benchmarks/serving.py EXPORT --prompts FILE --limit 200 --lengths 2 5 --output-dir serving_run -- --dtype float32

Runs in vLLM's environment.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import torch

from lmtp_factory import load_model
from lmtp_factory.cli.serve import command_of
from lmtp_factory.decoding.tree import chain_paths
from lmtp_factory.distill.chat import stop_token_ids
from lmtp_factory.distill.engine import Generation, Request, Sampling
from lmtp_factory.distill.server_engine import ServerEngine
from lmtp_factory.evaluation.machine import describe
from lmtp_factory.evaluation.self_generated import read_prompts
from lmtp_factory.modeling.checkpoint import load_heads
from lmtp_factory.tuning.replay import accepted_of_paths, observe_answers, steps_of


START_SECONDS = 600


def main() -> None:
    args = parse()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer, prompts = read_prompts(args.model, args.prompts, args.limit)
    answers: dict[tuple[int, int], dict[int, Generation]] = {}
    sampling = Sampling(args.max_new_tokens, stop_ids=stop_token_ids(args.model, tokenizer))
    rows = []
    for length in (0, *args.lengths):
        with server(args, length):
            engine = ServerEngine([url(args)], tokenizer, model=args.model)
            ask(engine, prompts[: max(args.concurrency)], replace(sampling, max_new_tokens=8))  # a warm-up
            for concurrency in args.concurrency:
                engine.concurrency = concurrency
                before, started = counters(args), time.perf_counter()
                answers[length, concurrency] = ask(engine, prompts, sampling)
                rows.append(
                    row_of(args, length, concurrency, answers, time.perf_counter() - started, before, counters(args))
                )
                print(line(rows[-1]), flush=True)
    found = {
        "machine": describe(torch.device("cpu" if not torch.cuda.is_available() else "cuda")),
        "arguments": {key: value for key, value in vars(args).items() if key not in ("model", "prompts", "output_dir")},
        "head parameters": sum(tensor.numel() for tensor in load_heads(args.model).parameters()),
        "prompts": len(prompts),
        "rows": rows,
        "replay": predicted(args, prompts, answers[0, args.concurrency[0]]),
    }
    path = args.output_dir / "serving.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(found)}\n\nWritten: {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="export with heads")
    parser.add_argument("--prompts", required=True, help="JSON or JSONL, as lmtp-cli distill reads")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="longest drafts, one server each")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--output-dir", type=Path, required=True)
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:place])
    args.options = words[place + 1 :]  # of vLLM
    return args


def url(args: argparse.Namespace) -> str:
    return f"http://localhost:{args.port}/v1"


@contextmanager
def server(args: argparse.Namespace, length: int) -> Iterator[None]:
    """Run a server until the context ends; a length of 0 is the server without speculation."""
    if answers_at(args):
        raise SystemExit(f"Another server answers at port {args.port}: stop it or name another --port.")
    options = ["--port", str(args.port), "--seed", "0", *args.options]
    if length:
        command = command_of(args.model, ["--num-speculative-tokens", str(length), *options])
    else:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model, *options]
    log = args.output_dir / f"server-{length}.log"
    print(shlex.join(command), flush=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            wait(args, process, log)
            yield
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def wait(args: argparse.Namespace, process: subprocess.Popen, log: Path) -> None:
    """Wait until the server answers.

    Raises:
        SystemExit: It ended, or does not start in time.
    """
    for _ in range(START_SECONDS):
        if process.poll() is not None:
            raise SystemExit(f"The server ended, see the end of {log}.")
        if answers_at(args):
            return
        time.sleep(1)
    raise SystemExit(f"The server did not start in {START_SECONDS} s, see {log}.")


def answers_at(args: argparse.Namespace) -> bool:
    """Return whether a server answers at the port."""
    try:
        return httpx.get(f"http://localhost:{args.port}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def ask(engine: ServerEngine, prompts: list[list[int]], sampling: Sampling) -> dict[int, Generation]:
    """Return the greedy answers by number of the prompt."""
    answers: dict[int, Generation] = {}
    engine.generate(
        [Request(number, tuple(ids)) for number, ids in enumerate(prompts)],
        sampling,
        done=(),
        on_finished=lambda finished: answers.update({answer.id: answer for answer in finished}),
    )
    return answers


def counters(args: argparse.Namespace) -> dict[str, float]:
    """Return the server's counters of speculation: drafts, and accepted tokens by position."""
    found = {}
    for text in httpx.get(f"http://localhost:{args.port}/metrics", timeout=60).text.splitlines():
        name, _, rest = text.partition("{")
        if name == "vllm:spec_decode_num_drafts_total":
            found["drafts"] = float(text.rsplit(" ", 1)[1])
        elif name == "vllm:spec_decode_num_accepted_tokens_per_pos_total":
            found[rest.split('position="')[1].split('"')[0]] = float(text.rsplit(" ", 1)[1])
    return found


def row_of(
    args: argparse.Namespace,
    length: int,
    concurrency: int,
    answers: dict[tuple[int, int], dict[int, Generation]],
    seconds: float,
    before: dict[str, float],
    after: dict[str, float],
) -> dict:
    """Return what one server did at one concurrency."""
    ours, stock = answers[length, concurrency], answers[0, concurrency]
    tokens = sum(len(answer.output_ids) for answer in ours.values())
    drafts = after.get("drafts", 0) - before.get("drafts", 0)
    if length and not drafts:
        raise SystemExit("The server drafted nothing: this is a bug, please report it.")
    positions = [after[str(place)] - before.get(str(place), 0) for place in range(length)]
    return {
        "length": length,
        "concurrency": concurrency,
        "seconds": seconds,
        "tokens": tokens,
        "tokens per second": tokens / seconds,
        "requests per second": len(ours) / seconds,
        "acceptance": [count / drafts for count in positions],
        "other answers": sum(ours[number].output_ids != stock[number].output_ids for number in stock),
        # What another batch composition does to the server without speculation.
        "other answers of stock": sum(
            stock[number].output_ids != answers[0, args.concurrency[0]][number].output_ids for number in stock
        ),
    }


@torch.no_grad()
def predicted(
    args: argparse.Namespace, prompts: list[list[int]], answers: dict[int, Generation]
) -> dict[int, list[float]]:
    """Return the acceptance by position that replay of answers predicts, for each longest draft."""
    model = load_model(args.model, dtype=torch.float32)
    rows = [(prompts[number], list(answer.output_ids)) for number, answer in answers.items()]
    observed = observe_answers(model, rows, width=1)
    rates = {}
    for length in args.lengths:
        steps = [step for answer in observed for step in steps_of(accepted_of_paths(answer, chain_paths(length + 1)))]
        rates[length] = [sum(step > place for step in steps) / len(steps) for place in range(1, length + 1)]
    return rates


def line(row: dict) -> str:
    accepted = ", ".join(f"{100 * rate:.0f}%" for rate in row["acceptance"])
    return (
        f"drafts of {row['length']}, {row['concurrency']} at once: {row['tokens per second']:.1f} tokens/s, "
        f"{row['requests per second']:.2f} requests/s, accepted {accepted or '-'}, {row['other answers']} other answers"
    )


def table(found: dict) -> str:
    """Format the results as Markdown."""
    stock = {row["concurrency"]: row for row in found["rows"] if not row["length"]}
    lines = [
        "| longest draft | at once | requests/s | tokens/s | x no speculation | accepted at position 1, 2, ... | replay "
        "predicts | other answers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        accepted, replay = (
            ", ".join(f"{100 * rate:.0f}%" for rate in rates)
            for rates in (row["acceptance"], found["replay"].get(row["length"], []))
        )
        ratio = row["tokens per second"] / stock[row["concurrency"]]["tokens per second"]
        lines.append(
            f"| {row['length'] or 'none'} | {row['concurrency']} | {row['requests per second']:.2f} | "
            f"{row['tokens per second']:.1f} | {ratio:.2f} | {accepted} | {replay} | "
            f"{row['other answers'] if row['length'] else row['other answers of stock']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
