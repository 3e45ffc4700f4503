"""How much memory this process may still take: the host's, and what a container's limit (cgroup) leaves of it."""

from pathlib import Path


try:
    import psutil
except ImportError:  # transformers alone, without accelerate
    psutil = None

_CGROUPS = Path("/sys/fs/cgroup")
# By version: a group's limit, what it uses, and the line of memory.stat with the pages that the kernel gives up in need.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory() -> int | None:
    """Bytes; None where nothing is known of them."""
    if psutil is None:
        return None
    left = free_in_cgroup()
    available = psutil.virtual_memory().available
    return available if left is None else min(available, left)


def free_in_cgroup(root: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that the process's control group and those above it still allow; None where none sets a limit.

    Args:
        root: where the groups are mounted.
        membership: lines `hierarchy:controllers:path`, the process's group in each hierarchy.
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
        # A container sees its own group as the mount itself, whatever path the host calls it by.
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount) and (free := _left_in(folder, *_FILES[version])) is not None:
                left.append(free)
    return min(left, default=None)


def _left_in(folder: Path, limit_file: str, usage_file: str, reclaimable: str) -> int | None:
    try:
        limit, used = ((folder / name).read_text(encoding="utf-8").strip() for name in (limit_file, usage_file))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    except OSError:  # the root group has no limit, and a path of the host's is not mounted here
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - int(used) + int(statistics.get(reclaimable, 0)))
