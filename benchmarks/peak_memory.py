"""The most memory that a piece of code held beyond what was held before it."""

from pathlib import Path

import psutil
import torch


MIB = 2**20


class PeakMemory:
    """Context manager; `.bytes` afterwards is the peak above what was held at the start, None where it is not known.

    On CUDA: torch's allocator. On a CPU, Linux only: the process's resident memory, whose high-water mark the kernel
    resets when "5" is written to `clear_refs`. A page that malloc kept from earlier is resident already and counts for
    nothing, so measure in a fresh process. Resolution: some 1 MiB.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            try:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            except OSError:  # not Linux, or not allowed
                return self
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        if self._before is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self.bytes = max(0, _resident("VmHWM") - self._before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def available_bytes(device: torch.device | str) -> int:
    """What a new allocation may take; torch's own free blocks count as free."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
