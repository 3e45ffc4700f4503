"""The steps of `gpu.py`. Each module has `parts(settings)`: name of a part -> function that returns its results."""
