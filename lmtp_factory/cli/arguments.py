"""Argument types that several commands share."""

import argparse


def count(text: str) -> int:
    """Parse an integer of 1 or more, as an `argparse` type.

    Raises:
        argparse.ArgumentTypeError: The text is not such an integer.
    """
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is no whole number of 1 or more")
    return int(text)
