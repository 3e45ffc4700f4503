"""Types of command-line arguments that several commands share."""

import argparse


def count(text: str) -> int:
    """A whole number of 1 or more, for `argparse`.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is no whole number of 1 or more")
    return int(text)
