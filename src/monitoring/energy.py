"""What the machine uses: the energy of the devices that train, where they report it."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch


class EnergyMeter:
    """Adds up what the devices that train on this machine use, in joules, in a thread of its own.

    CUDA: the power that nvidia-smi reports for the GPUs of this machine's processes. CPU: the
    counters of the processor packages, where Linux lets this user read them; all that runs on the
    packages is in them. `works` stays False where there is neither.
    """

    def __init__(self, device: torch.device, every: float = 10.0, powercap="/sys/class/powercap"):
        """every: seconds between samples."""
        self.works = False
        self._every, self._used, self._taken = every, 0.0, 0.0
        self._closed = threading.Event()
        if device.type == "cuda":
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            gpus = [device.index] if processes == 1 else range(processes)
            uuids = {str(torch.cuda.get_device_properties(i).uuid) for i in gpus}
            joules = _gpu_joules(uuids)
        elif device.type == "cpu":
            joules = _package_joules(powercap)
        else:
            return
        watch = threading.Thread(target=self._watch, args=[joules], name="energy", daemon=True)
        watch.start()

    def take(self) -> float:
        """Return the joules since the last call."""
        before, self._taken = self._taken, self._used
        return self._taken - before

    def close(self) -> None:
        self._closed.set()

    def _watch(self, joules: Callable[[float], float | None]) -> None:
        mark = time.monotonic()
        self.works = joules(0.0) is not None  # also where a counter begins
        while self.works and not self._closed.wait(self._every):
            now = time.monotonic()
            # A process that was stopped for a while knows nothing about the power in between.
            used = joules(min(now - mark, 6 * self._every))
            mark = now
            self._used += used or 0.0


def _gpu_joules(uuids: set[str]) -> Callable[[float], float | None]:
    """Return f(seconds): what these GPUs use in that time at the power of now; None: not known."""
    query = ["nvidia-smi", "--query-gpu=uuid,power.draw", "--format=csv,noheader,nounits"]
    wanted = {uuid.removeprefix("GPU-") for uuid in uuids}

    def joules(seconds: float) -> float | None:
        watts = {}
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            table = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
            for line in table.splitlines():
                uuid, _, power = line.partition(",")
                with contextlib.suppress(ValueError):  # [N/A]
                    watts[uuid.strip().removeprefix("GPU-")] = float(power)
        known = wanted <= watts.keys()
        return seconds * sum(watts[uuid] for uuid in wanted) if known else None

    return joules


def _package_joules(powercap) -> Callable[[float], float | None]:
    """Return f(_): what the processor packages used since the last call; None: cannot be read.

    Zones intel-rapl:N (AMD's have that name too) named package-N; their parts and "psys", which
    has the packages in it, are left out. Counters are in microjoules and start over at a maximum.
    """
    before: dict[Path, int] = {}

    def joules(_seconds: float) -> float | None:
        used, found = 0, False
        for zone in Path(powercap).glob("intel-rapl:*"):
            with contextlib.suppress(OSError, ValueError):
                if not (zone / "name").read_text().startswith("package"):
                    continue
                now = int((zone / "energy_uj").read_text())
                span = int((zone / "max_energy_range_uj").read_text())
                used += (now - before.get(zone, now)) % (span + 1)
                before[zone], found = now, True
        return used / 1e6 if found else None

    return joules
