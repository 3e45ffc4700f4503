"""`lmtp-cli`: commands that `llamafactory-cli` does not have."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import LMTPError


# Command -> (module in this package, summary). Each module has add_arguments(parser) and run(args) -> exit status. Slow
# imports are inside run.
COMMANDS = {
    "doctor": ("doctor", "check the installation and report how to fix it"),
    "distill": ("distill", "let a model write its own training data for stage 1"),
    "report": ("report", "loss, accuracy and perplexity on held-out text"),
    "quality": ("quality", "score exported models on benchmarks through lm-evaluation-harness"),
    "import": ("import_heads", "import heads from checkpoints of the L-MTP release and of Medusa"),
    "select": ("select_heads", "keep those of the trained heads that decode fastest on this device"),
    "tree": ("tree", "measure which draft tree is fastest and write lmtp/tree.json"),
    "serve": ("serve", "serve an export with heads through vLLM"),
    "bench": ("bench", "tokens per second with and without heads, side by side"),
    "demo": ("demo", "train, export and decode with SmolLM2-135M-Instruct, from start to end"),
}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(prog="lmtp-cli", description="Leap multi-token prediction beside LLaMA-Factory.")
    parser.add_argument("--version", action="version", version=f"lmtp_factory {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        import_module(f".{module}", __package__).add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    An `LMTPError` is printed to stderr and returns 1.
    """
    args = build_parser().parse_args(argv)
    try:
        return import_module(f".{COMMANDS[args.command][0]}", __package__).run(args)
    except LMTPError as error:
        print(f"lmtp-cli {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
