"""Argument types and options that several commands share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import LMTPError
from ..files import HEADS_FOLDER


def count(text: str) -> int:
    """Parse an integer of 1 or more, as an `argparse` type.

    Raises:
        argparse.ArgumentTypeError: The text is not such an integer.
    """
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is no whole number of 1 or more")
    return int(text)


def labelled_models(arguments: Sequence[str]) -> dict[str, str]:
    """Parse `[LABEL=]MODEL` arguments; without a label, the last part of the path is it.

    Returns:
        Label -> model, in the order given.

    Raises:
        LMTPError: Two models have the same label.
    """
    models: dict[str, str] = {}
    for argument in arguments:
        label, _, path = argument.partition("=") if "=" in argument else (Path(argument).name, "", argument)
        if label in models:
            raise LMTPError(f"Two models are labelled {label}: write LABEL={path} with another label for one of them.")
        models[label] = path
    return models


def heads_of(model: str) -> Path:
    """Return the `lmtp/` folder of a MODEL argument.

    Raises:
        LMTPError: It has none, or the hub cannot be asked.
    """
    from ..modeling.checkpoint import find_heads

    folder = find_heads(model)
    if folder is None:
        raise LMTPError(
            f"{model} has no {HEADS_FOLDER}/ folder, so no leap heads: name an export with heads, an adapter or a stage-1 "
            "directory."
        )
    return folder


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
