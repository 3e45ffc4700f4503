"""`lmtp-cli quality`: score exported models on benchmarks through lm-evaluation-harness."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LMTPError
from .arguments import count, labelled_models
from .output import check_output_dir, writing


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval.api.model import LM

    from ..evaluation.quality.benchmarks import Benchmark, Row
    from ..evaluation.quality.scores import ModelResult

    Problems = Mapping[Benchmark, Sequence[Row]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "models", nargs="+", metavar="[LABEL=]EXPORT", help="export or plain model; with --engine server, a served name"
    )
    parser.add_argument(
        "--tasks",
        default="gsm8k,math500",
        metavar="NAMES",
        help="of gsm8k, math500, humaneval and mbpp, comma-separated (default: %(default)s)",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="directory with TASK*.jsonl (default: the hub's datasets)")
    parser.add_argument("--limit", type=count, metavar="N", help="use the first N rows of each task")
    parser.add_argument(
        "--max-new-tokens", type=count, default=512, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "--allow-code", action="store_true", help="run the code that models write for humaneval and mbpp, in a sandbox"
    )
    parser.add_argument(
        "--engine", choices=("hf", "server"), default="hf", help="transformers in this process, or vLLM, SGLang, ..."
    )
    parser.add_argument("--batch-size", type=count, default=8, metavar="N", help="for engine hf (default: %(default)s)")
    parser.add_argument(
        "--base-url",
        action="append",
        metavar="URL",
        help="http://host:port/v1 of a server; once, or once for each EXPORT",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="also write quality.json and answers.jsonl there")


def run(args: argparse.Namespace) -> int:
    """Ask and score each model, print the table and write the files.

    Raises:
        LMTPError: The options are invalid, something is missing or a prompt does not fit, all of which is checked before a
            model loads; or a model fails, after which the scores of those before it are printed.
    """
    from ..evaluation.quality.benchmarks import chosen
    from ..evaluation.quality.code_sandbox import check_sandbox
    from ..evaluation.quality.data import read_rows
    from ..evaluation.quality.harness import ask, check_installed
    from ..evaluation.quality.scores import ModelResult, write_results

    models = labelled_models(args.models)
    benchmarks = chosen(args.tasks, args.allow_code)
    urls = _servers(args, models)
    if any(benchmark.runs_code for benchmark in benchmarks):
        check_sandbox()
    check_installed()
    problems, sources = {}, {}
    for benchmark in benchmarks:
        problems[benchmark], sources[benchmark.name] = read_rows(benchmark, args.data_dir, args.limit)
    _check_models(args, models, urls, problems)
    if args.output_dir:
        check_output_dir(args.output_dir)

    facts = {
        "tasks": {b.name: {"rows": len(rows), "source": sources[b.name]} for b, rows in problems.items()},
        "max_new_tokens": args.max_new_tokens,
        "engine": args.engine,
        **_versions(),
    }
    results: dict[str, ModelResult] = {}
    try:
        for label, name in models.items():
            start = time.perf_counter()
            model = _model(args, name, urls.get(label))
            answers = ask(model, problems, args.max_new_tokens)
            results[label] = ModelResult(name, answers, time.perf_counter() - start)
            del model
            if args.output_dir:  # after each model, so that a failure keeps those before it
                with writing(args.output_dir):
                    write_results(facts, results, Path(args.output_dir))
    finally:  # whatever happens to a model, the scores of those before it are not lost
        _print(results)
    if args.output_dir:
        print(f"Written: {Path(args.output_dir)}")
    return 0


def _print(results: dict[str, ModelResult]) -> None:
    from ..evaluation.quality.scores import remarks, table

    if results:
        print(f"\n{table(results)}\n\nPercent of right answers, with 95 % intervals (Wilson).")
        print(remarks(results))


def _servers(args: argparse.Namespace, models: dict[str, str]) -> dict[str, str]:
    """Return label -> URL, empty for engine hf."""
    urls = args.base_url or []
    if args.engine == "hf":
        if urls:
            raise LMTPError("--base-url is for --engine server: add it, or leave --base-url out.")
        return {}
    if len(urls) not in (1, len(models)):
        raise LMTPError(
            f"--engine server needs --base-url once, or once for each of the {len(models)} models in order."
        )
    return dict(zip(models, urls * len(models) if len(urls) == 1 else urls))


def _check_models(args: argparse.Namespace, models: dict[str, str], urls: dict[str, str], problems: Problems) -> None:
    from ..evaluation.quality.models import check_export, check_lengths, check_served

    for label, name in models.items():
        if urls:
            check_served(urls[label], name)
        else:
            check_export(name)
    if not urls:
        for name in models.values():
            check_lengths(name, problems, args.max_new_tokens)


def _model(args: argparse.Namespace, name: str, url: str | None) -> LM:
    from ..evaluation.quality.models import load_export, server_model

    return load_export(name, args.batch_size) if url is None else server_model(url, name)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import torch

    from ..evaluation.machine import describe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"machine": describe(device), "lm_eval": version("lm_eval")}
