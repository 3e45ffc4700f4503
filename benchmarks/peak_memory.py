"""Peak memory of a block of code."""

from pathlib import Path

import torch


MIB = 2**20


class PeakMemory:
    """Context manager that sets `bytes` to the peak memory above the memory at the start, or None if it is unknown.

    On CUDA it uses torch's allocator. On a CPU (Linux only) it uses the process's resident memory; writing "5" to
    `clear_refs` resets the kernel's high-water mark. Pages that malloc has kept are resident already and do not count,
    so measure in a new process. The resolution is about 1 MiB.
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
    """Return the memory available to new allocations, including torch's cached free blocks."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # imported here because gpu.py runs without it

    return psutil.virtual_memory().available
