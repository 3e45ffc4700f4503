"""Description of the machine for reports."""

import os
import platform

import torch
import transformers

from ..decoding.machine import machine_name


def describe(device: torch.device) -> str:
    """Describe the processor or GPU, threads and versions in one line."""
    what = machine_name(device)
    if device.type != "cuda":
        what += f", {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{what}; torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
