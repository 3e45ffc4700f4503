"""Heads that other programs trained, turned into an `lmtp/` folder."""
