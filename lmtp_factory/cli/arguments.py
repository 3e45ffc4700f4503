"""Argument types and options that several commands share."""

import argparse


def count(text: str) -> int:
    """Parse an integer of 1 or more, as an `argparse` type.

    Raises:
        argparse.ArgumentTypeError: The text is not such an integer.
    """
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is no whole number of 1 or more")
    return int(text)


def add_replay_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that replay trees on the model's own answers and time this device."""
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSON or JSONL, as lmtp-cli distill reads")
    parser.add_argument("--limit", type=count, default=24, metavar="N", help="use the first N prompts (default: 24)")
    parser.add_argument(
        "--max-new-tokens", type=count, default=128, metavar="N", help="length of an answer (default: 128)"
    )
    parser.add_argument(
        "--context", type=count, default=256, metavar="N", help="cached tokens while timing (default: 256)"
    )
