"""`lmtp-cli distill`: the command line of self-distillation."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..errors import LMTPError


DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `distill` to a parser."""
    parser.add_argument("model", help="Hugging Face model directory or hub id; with --engine server, its tokenizer")

    group = parser.add_argument_group("prompts (none given: an instruct model writes its own)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompts", metavar="FILE", help="JSON or JSONL: prompt, instruction (+ input) or messages")
    source.add_argument("--dataset", metavar="NAME", help="dataset(s) of a dataset_info.json, comma-separated")
    group.add_argument("--dataset-dir", default="data", metavar="DIR", help="where --dataset looks (default: data)")
    group.add_argument("--num-prompts", type=int, default=1000, metavar="N", help="prompts to write (default: 1000)")
    group.add_argument("--prompt-temperature", type=float, default=1.0, metavar="T", help="for prompts it writes")
    group.add_argument("--prompt-top-p", type=float, default=0.95, metavar="P", help="for prompts it writes")
    group.add_argument("--system", metavar="TEXT", help="system text, where the prompt brings none of its own")
    group.add_argument("--limit", type=int, metavar="N", help="answer the first N prompts only")
    group.add_argument("--max-prompt-tokens", type=int, default=1024, metavar="N", help="leave out longer prompts")

    group = parser.add_argument_group("output")
    group.add_argument("--name", help="name of the dataset (default: self_distilled_ and the model's name)")
    group.add_argument(
        "--output-dir", default="data", metavar="DIR", help="also holds dataset_info.json (default: data)"
    )
    group.add_argument(
        "--heldout", type=float, default=0.0, metavar="SHARE", help="split into NAME_train and NAME_heldout"
    )

    group = parser.add_argument_group("answers")
    group.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, the default")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P")
    group.add_argument("--seed", type=int, default=0)

    group = parser.add_argument_group("filters")
    group.add_argument("--min-tokens", type=int, default=8, metavar="N", help="drop shorter answers (default: 8)")
    group.add_argument("--keep-truncated", action="store_true", help="keep answers cut at --max-new-tokens")
    group.add_argument("--loop-repeats", type=int, default=4, metavar="N", help="repeats in a row that make a loop")
    group.add_argument("--loop-span", type=int, default=24, metavar="N", help="tokens that a loop covers at least")
    group.add_argument(
        "--min-distinct", type=float, default=0.4, metavar="SHARE", help="smallest share of distinct 4-grams; 0: off"
    )

    group = parser.add_argument_group("engine hf (in this process)")
    group.add_argument("--engine", choices=("hf", "server"), default="hf")
    group.add_argument("--batch-size", type=int, metavar="N", help="default: as many as a token budget allows")
    group.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    group.add_argument("--device", help="cuda, cpu, auto (all GPUs); default: a GPU if there is one")
    group.add_argument("--trust-remote-code", action="store_true")

    group = parser.add_argument_group("engine server (vLLM, SGLang: anything OpenAI-compatible)")
    group.add_argument("--base-url", action="append", metavar="URL", help="http://host:port/v1; several share the work")
    group.add_argument("--served-model-name", metavar="NAME", help="default: the first that the server lists")
    group.add_argument("--api-key", metavar="KEY", help="default: OPENAI_API_KEY of the environment")
    group.add_argument("--concurrency", type=int, default=32, metavar="N", help="requests at once (default: 32)")
    group.add_argument("--max-retries", type=int, default=5, metavar="N", help="of one request (default: 5)")


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is loaded.

    Raises:
        LMTPError: naming the option and what to write instead.
    """
    for option in ("max_new_tokens", "max_prompt_tokens", "num_prompts", "concurrency", "batch_size", "limit"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise LMTPError(f"`--{option.replace('_', '-')}` must be at least 1, not {value}.")
    for option in ("temperature", "prompt_temperature", "min_tokens", "max_retries", "seed"):
        if getattr(args, option) < 0:
            raise LMTPError(f"`--{option.replace('_', '-')}` cannot be negative.")
    if args.prompt_temperature == 0:
        raise LMTPError("`--prompt-temperature 0` would write one prompt again and again: give a value such as 1.0.")
    for option in ("top_p", "prompt_top_p"):
        if not 0 < getattr(args, option) <= 1:
            raise LMTPError(f"`--{option.replace('_', '-')}` must be above 0 and at most 1.")
    if not 0 <= args.heldout < 1:
        raise LMTPError("`--heldout` is a share of the rows: write, say, `--heldout 0.05`.")
    if args.loop_repeats < 2:
        raise LMTPError("`--loop-repeats` must be at least 2.")
    if args.engine == "server" and not args.base_url:
        raise LMTPError("`--engine server` needs an address: add `--base-url http://HOST:PORT/v1`.")
    if args.engine == "hf" and args.base_url:
        raise LMTPError("`--base-url` is for a server: add `--engine server`.")
    if args.name and not re.fullmatch(r"[\w.\-]+", args.name):
        raise LMTPError("`--name` becomes a file name: use letters, digits, `_`, `-` and `.` only.")


def run(args: argparse.Namespace) -> int:
    """Distil as the options say; 0 when the data set is written.

    Raises:
        LMTPError: anything the user can mend, in one sentence.
    """
    check(args)
    from ..distill import chat
    from ..distill.filters import Filters
    from ..distill.pipeline import Settings, distill
    from ..distill.prompts import prompts_from_dataset, prompts_from_file

    prompts = None
    if args.prompts:
        prompts = prompts_from_file(args.prompts)
    elif args.dataset:
        prompts, skipped = prompts_from_dataset([name.strip() for name in args.dataset.split(",")], args.dataset_dir)
        if skipped:
            print(f"prompts: {skipped} rows left out, they have tools or media or no user text")

    tokenizer = chat.load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    model_name = re.sub(r"[^\w.\-]+", "_", Path(args.model).resolve().name if Path(args.model).exists() else args.model)
    settings = Settings(
        model=args.model,
        name=args.name or f"self_distilled_{model_name}",
        output_dir=Path(args.output_dir),
        prompts=prompts,
        num_prompts=args.num_prompts,
        system=args.system,
        max_prompt_tokens=args.max_prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        prompt_sampling=(args.prompt_temperature, args.prompt_top_p),
        seed=args.seed,
        limit=args.limit,
        heldout=args.heldout,
        filters=Filters(args.min_tokens, args.keep_truncated, args.loop_repeats, args.loop_span, args.min_distinct),
        fingerprint=_fingerprint(args),
    )
    distill(settings, tokenizer, lambda: _engine(args, tokenizer))
    return 0


def _fingerprint(args: argparse.Namespace) -> dict[str, object]:
    if args.engine == "server":  # addresses may change between a run and its continuation
        return {"engine": "server", "served_model_name": args.served_model_name}
    return {"engine": "hf", "dtype": args.dtype}  # a smaller batch must be able to rescue a run that ran out of memory


def _engine(args: argparse.Namespace, tokenizer):
    if args.engine == "server":
        import os

        from ..distill.server_engine import ServerEngine

        return ServerEngine(
            args.base_url,
            tokenizer,
            model=args.served_model_name,
            api_key=args.api_key or os.environ.get("OPENAI_API_KEY"),
            concurrency=args.concurrency,
            max_retries=args.max_retries,
        )
    from ..distill.hf_engine import HFEngine

    return HFEngine(
        args.model,
        dtype=args.dtype,
        device=args.device,
        batch_size=args.batch_size,
        trust_remote_code=args.trust_remote_code,
    )
