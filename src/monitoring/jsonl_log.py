"""Every scalar of a run as JSON lines, for plots of your own and for other trackers.

    log = JsonLinesLog("runs/my_run/metrics.jsonl", first_step=0)  # resume: checkpoint's step + 1
    log.scalars({"Loss/train": 3.2, "Gradient/norm": 0.8}, step=1)

A line is {"step": 1, "time": 1790000000.1, "Loss/train": 3.2, ...}; NaN and infinity, which JSON
does not have, are null. A resume removes the lines from its first step on. On a full disk: see
log_file.py.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from monitoring.log_file import LogFile, set_aside


class JsonLinesLog(LogFile):
    def __init__(
        self,
        path: str | os.PathLike,
        first_step: int,
        announce: Callable[[str], None] = print,
        retry_every: float = 30.0,
        new_timeline: bool = False,
    ):
        """first_step: 0 for a fresh run, which sets a file of an earlier attempt aside as
        earlier.NAME, as does new_timeline. Else lines of that step and later are removed.
        Raise ValueError if the file cannot be written to (a full disk: announced instead)."""
        self.path = Path(path)
        super().__init__(f"logging to {path}", announce, retry_every)

        def prepare():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if (first_step == 0 or new_timeline) and self.path.exists():
                set_aside(self.path, "earlier")
            self.rewind(first_step)

        self._begin(prepare, f"--log_jsonl: cannot write {path}")

    def _open(self) -> None:
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed in _shut)
        self._size = os.fstat(self._file.fileno()).st_size

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write one line."""
        finite = {tag: v if math.isfinite(v) else None for tag, v in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3)} | finite)
        self._write(line.encode() + b"\n", step, len(values))

    def rewind(self, first_step: int) -> None:
        """Go on at first_step: remove what the file says of that step and later, and half a line
        that a killed process left."""
        end = 0
        with contextlib.suppress(FileNotFoundError):
            with open(self.path, "rb") as lines:
                for line in lines:
                    if not _is_before(line, first_step):
                        break
                    end += len(line)
            os.truncate(self.path, end)
        self._size = end


def _is_before(line: bytes, first_step: int) -> bool:
    """Tell if this is a whole line of a step before first_step."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] < first_step
    except (ValueError, KeyError, TypeError):
        return False
