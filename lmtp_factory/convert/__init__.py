"""Conversion of heads that other programs trained into an `lmtp/` folder."""
