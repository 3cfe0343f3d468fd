"""What the host has to give: memory and disk space."""

import contextlib
import os
import shutil
from pathlib import Path


def available_bytes(proc="/proc", cgroups="/sys/fs/cgroup") -> int | None:
    """Return the memory to be had without swapping, within a container's limit; None: unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path(proc, "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError):
        for line in Path(proc, "self/cgroup").read_text().splitlines():
            number, controllers, group = line.split(":", 2)
            if number == "0":  # control groups, version 2
                names = ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):  # version 1
                group = "/memory" + group
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            lowest = Path(cgroups) / group.strip("/")
            for level in (lowest, *lowest.parents):  # each may have a limit, the root has none
                with contextlib.suppress(OSError, ValueError):  # "max"
                    limit, used = (int((level / name).read_text()) for name in names[:2])
                    stats = (level / "memory.stat").read_text().splitlines()
                    used -= int(dict(row.split() for row in stats).get(names[2], 0))  # page cache
                    found.append(max(0, limit - used))
    return min(found, default=None)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def existing(folder) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    folder = Path(folder).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def free_bytes(folder) -> int:
    """Return the free space for this user on the file system of `folder`, there or not yet."""
    return shutil.disk_usage(existing(folder)).free
