"""The demonstration's parts: a small real model from the package index."""
