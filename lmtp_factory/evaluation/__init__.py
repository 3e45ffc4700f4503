"""Evaluation: head accuracy, perplexity, decoding speed, plots."""
