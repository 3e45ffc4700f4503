"""`lmtp-cli distill`: self-distillation."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..errors import LMTPError
from ..options import DISTILL_ANSWER_TOKENS, DISTILL_PROMPT_TOKENS, DISTILL_PROMPTS
from .arguments import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", help="Hugging Face model directory or hub id; with --engine server, its tokenizer")

    group = parser.add_argument_group(
        "prompts", "Without --prompts and --dataset, an instruct model writes its own prompts."
    )
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompts", metavar="FILE", help="JSON or JSONL: prompt, instruction (+ input) or messages")
    source.add_argument("--dataset", metavar="NAME", help="datasets in dataset_info.json, comma-separated")
    group.add_argument("--dataset-dir", default="data", metavar="DIR", help="directory for --dataset (default: data)")
    group.add_argument(
        "--num-prompts",
        type=count,
        metavar="N",
        help=f"prompts to write (default: {DISTILL_PROMPTS}), or the first N given prompts",
    )
    group.add_argument(
        "--max-prompt-tokens",
        type=count,
        default=DISTILL_PROMPT_TOKENS,
        metavar="N",
        help="skip longer prompts (default: %(default)s)",
    )

    group = parser.add_argument_group("answers", "Short, truncated and repetitive answers are dropped.")
    group.add_argument(
        "--max-new-tokens",
        type=count,
        default=DISTILL_ANSWER_TOKENS,
        metavar="N",
        help="longest answer (default: %(default)s)",
    )
    group.add_argument("--keep-truncated", action="store_true", help="keep answers cut at --max-new-tokens")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, the default")
    group.add_argument("--seed", type=int, default=0, help="seed of all sampling (default: 0)")

    group = parser.add_argument_group("output")
    group.add_argument("--name", help="name of the dataset (default: self_distilled_ and the model's name)")
    group.add_argument(
        "--output-dir", default="data", metavar="DIR", help="directory of rows and dataset_info.json (default: data)"
    )
    group.add_argument(
        "--heldout", type=float, default=0.0, metavar="SHARE", help="split into NAME_train and NAME_heldout"
    )

    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine", choices=("hf", "server"), default="hf", help="transformers in this process, or vLLM, SGLang, ..."
    )
    group.add_argument("--batch-size", type=count, metavar="N", help="for engine hf (default: by a token budget)")
    group.add_argument(
        "--base-url", action="append", metavar="URL", help="http://host:port/v1 of a server; several share the work"
    )


def run(args: argparse.Namespace) -> int:
    """Run a distillation and return 0 when the dataset is written.

    Raises:
        LMTPError: The options are invalid, or the run fails for a reason that the user can fix.
    """
    _check(args)
    from ..distill.chat import load_tokenizer
    from ..distill.pipeline import Settings, distill

    prompts = _given_prompts(args)
    tokenizer = load_tokenizer(args.model)
    settings = Settings(
        model=args.model,
        name=args.name or _default_name(args.model),
        output_dir=Path(args.output_dir),
        engine=args.engine,
        prompts=prompts,
        num_prompts=args.num_prompts,
        max_prompt_tokens=args.max_prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        heldout=args.heldout,
        keep_truncated=args.keep_truncated,
    )
    distill(settings, tokenizer, lambda: _engine(args, tokenizer))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Check the options before anything is loaded."""
    if not 0 <= args.temperature < float("inf"):
        raise LMTPError(
            f"--temperature is {args.temperature}, but it has to be 0 or more: write for instance --temperature 0.7."
        )
    if not 0 <= args.heldout < 1:
        raise LMTPError(
            f"--heldout is {args.heldout}, but it has to be a share of the rows: write for instance --heldout 0.05."
        )
    if args.engine == "server" and not args.base_url:
        raise LMTPError("--engine server needs an address: add --base-url http://HOST:PORT/v1.")
    if args.engine == "hf" and args.base_url:
        raise LMTPError("--base-url is for a server: add --engine server.")
    if args.name is not None and not re.fullmatch(r"[\w.\-]+", args.name):
        raise LMTPError("--name becomes a file name: use letters, digits, _, - and . only.")


def _given_prompts(args: argparse.Namespace) -> list | None:
    if args.prompts is not None:
        from ..distill.prompts import prompts_from_file

        return prompts_from_file(args.prompts)
    if args.dataset is not None:
        from ..plugin.dataset_prompts import prompts_from_dataset

        prompts, skipped = prompts_from_dataset([name.strip() for name in args.dataset.split(",")], args.dataset_dir)
        if skipped:
            print(f"prompts: {skipped} rows skipped because they have tools, media or no user text")
        return prompts
    return None


def _default_name(model: str) -> str:
    name = Path(model).resolve().name if Path(model).exists() else model
    return "self_distilled_" + re.sub(r"[^\w.\-]+", "_", name)


def _engine(args: argparse.Namespace, tokenizer):
    if args.engine == "server":
        from ..distill.server_engine import ServerEngine

        return ServerEngine(args.base_url, tokenizer, model=args.model)
    from ..distill.hf_engine import HFEngine

    return HFEngine(args.model, batch_size=args.batch_size)
