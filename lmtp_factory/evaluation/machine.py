"""Description of the machine for reports."""

import os
import platform
from pathlib import Path

import torch
import transformers


def describe(device: torch.device) -> str:
    """Describe the processor or GPU, threads and versions in one line."""
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    else:
        what = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{what}; torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
