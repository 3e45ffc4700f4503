"""``lmtp-cli``: what ``llamafactory-cli`` has no verb for."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .errors import LMTPError


# Each module has add_arguments(parser) and run(args) -> exit status, and imports what is heavy in run only.
COMMANDS = {
    "doctor": ("lmtp_factory.doctor", "check the installation and say what is wrong with it"),
    "distill": ("lmtp_factory.data.distill.cli", "let a model write its own training data for stage 1"),
    "report": ("lmtp_factory.evaluation.cli", "loss, accuracy and perplexity on held-out text"),
    "import": ("lmtp_factory.importing.cli", "heads of other checkpoints: the L-MTP release's and Medusa's"),
    "tree": ("lmtp_factory.evaluation.tree_cli", "measure which draft tree is fastest, write lmtp/tree.json"),
    "bench": ("lmtp_factory.evaluation.bench_cli", "tokens per second with and without heads, side by side"),
    "demo": ("lmtp_factory.demo.cli", "the whole job on the real SmolLM2-135M-Instruct"),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="lmtp-cli", description="Leap multi-token prediction beside LLaMA-Factory.")
    parser.add_argument("--version", action="version", version=f"lmtp_factory {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        import_module(module).add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. A mistake of the user's ends in one sentence on stderr and status 1."""
    args = build_parser().parse_args(argv)
    try:
        return import_module(COMMANDS[args.command][0]).run(args)
    except LMTPError as error:
        print(f"lmtp-cli {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
