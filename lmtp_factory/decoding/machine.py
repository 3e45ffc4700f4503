"""Names of the processor and the GPU."""

import platform
from functools import cache
from pathlib import Path

import torch


def machine_name(device: torch.device) -> str:
    """Return the name of a GPU, or of this machine's processor for any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


@cache
def processor_name() -> str:
    """Return the name of this machine's processor, or its architecture where the name is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
