"""What the host has to give: memory and disk space."""

import contextlib
import shutil
from pathlib import Path


def available_bytes(proc="/proc", cgroups="/sys/fs/cgroup") -> int | None:
    """Memory that can be had without swapping, also within a container's limit; None: unknown."""
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


def free_bytes(folder) -> int:
    """Free space for this user on the file system of `folder`, which need not exist yet."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
