"""Memory that this process can still allocate, limited by the host and by a container's cgroups."""

from pathlib import Path


try:
    import psutil
except ImportError:  # installed with accelerate, which transformers does not require
    psutil = None

_CGROUPS = Path("/sys/fs/cgroup")
# By cgroup version: the files of the limit and the usage, and the key in memory.stat for reclaimable page cache.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory() -> int | None:
    """Return the available memory in bytes, or None if it is unknown."""
    if psutil is None:
        return None
    left = free_in_cgroup()
    available = psutil.virtual_memory().available
    return available if left is None else min(available, left)


def free_in_cgroup(root: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return the bytes that the process's cgroup and its ancestors still allow, or None without a limit.

    Args:
        root: Mount point of the cgroups.
        membership: File of lines `hierarchy:controllers:path` with the process's cgroup in each hierarchy.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text(encoding="utf-8").splitlines()]
    except OSError:  # not Linux
        return None
    left = []
    for _, controllers, path in lines:
        if controllers == "":
            version, mount = 2, root
        elif "memory" in controllers.split(","):
            version, mount = 1, root / "memory"
        else:
            continue
        group = mount / path.lstrip("/")
        # In a container the mount point is the container's own group, whatever path the host uses.
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount) and (free := _left_in(folder, *_FILES[version])) is not None:
                left.append(free)
    return min(left, default=None)


def _left_in(folder: Path, limit_file: str, usage_file: str, reclaimable: str) -> int | None:
    try:
        limit, used = ((folder / name).read_text(encoding="utf-8").strip() for name in (limit_file, usage_file))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    except OSError:  # the root group has no limit file, and paths of the host do not exist in a container
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - int(used) + int(statistics.get(reclaimable, 0)))
