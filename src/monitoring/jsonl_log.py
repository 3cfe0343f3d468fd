"""Every scalar of a run as JSON lines, for plots of your own and for other trackers.

    log = JsonLinesLog("runs/my_run/metrics.jsonl", first_step=0)  # resume: checkpoint's step + 1
    log.scalars({"Loss/train": 3.2, "Gradient/norm": 0.8}, step=1)

A line is {"step": 1, "time": 1790000000.1, "Loss/train": 3.2, ...}; NaN and infinity, which JSON
does not have, are null. The rules are those of the event files (tensorboard_log.py): a line is in
the file, whole, when the method returns; a resume removes the lines from its first step on; a full
disk stops the log and never training.
"""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path


class JsonLinesLog:
    """One file, written by one process from one thread."""

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
        announce: called with one sentence now and then. retry_every: seconds between tries while
        the disk is full. Raises ValueError if the file cannot be written to (a full disk:
        announced instead)."""
        self.path, self.announce, self.retry_every = Path(path), announce, retry_every
        self._file = None  # unbuffered; None while logging is stopped
        self._lost = 0  # lines since then
        self._retry_at = 0.0  # monotonic clock
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if first_step == 0 or new_timeline:
                self._set_earlier_attempt_aside()
            self._open()
            self.rewind(first_step)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise ValueError(
                    f"--log_jsonl: cannot write {self.path} ({error.strerror or error})"
                ) from None
            self._stop(error)

    def _set_earlier_attempt_aside(self) -> None:
        if self.path.exists():
            target, n = self.path.with_name(f"earlier.{self.path.name}"), 0
            while target.exists():
                n += 1
                target = self.path.with_name(f"earlier.{n}.{self.path.name}")
            self.path.rename(target)

    def _open(self) -> None:
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed in _shut)
        self._size = os.fstat(self._file.fileno()).st_size  # bytes of whole lines

    def _stop(self, error: OSError) -> None:
        """Close the file at its last whole line; it is tried again at a later `scalars`."""
        self._shut()
        self._retry_at = time.monotonic() + self.retry_every
        if not self._lost:
            self.announce(
                f"logging to {self.path} stopped ({error.strerror or error}); training goes on, "
                f"logging is tried again every {self.retry_every:g} s"
            )

    def _come_back(self) -> bool:
        if time.monotonic() < self._retry_at:
            return False
        try:
            self._open()
        except OSError:
            self._retry_at = time.monotonic() + self.retry_every
        return self._file is not None

    def scalars(self, values: dict[str, float], step: int) -> None:
        """One line."""
        finite = {tag: v if math.isfinite(v) else None for tag, v in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3)} | finite).encode() + b"\n"
        if self._file is None and not self._come_back():
            self._lost += 1
            return
        left = memoryview(line)
        try:
            while left:  # a full disk takes a part, and raises at the next call
                left = left[self._file.write(left) :]
        except OSError as error:
            self._stop(error)
            self._lost += 1
            return
        self._size += len(line)
        if self._lost:
            self.announce(f"{self.path} is back at step {step}; {self._lost} lines are missing")
            self._lost = 0

    def rewind(self, first_step: int) -> None:
        """The log goes on at first_step: what it says of that step and later is removed, and half
        a line that a killed process left."""
        end = 0
        with contextlib.suppress(FileNotFoundError):
            with open(self.path, "rb") as lines:
                for line in lines:
                    if not _is_before(line, first_step):
                        break
                    end += len(line)
            os.truncate(self.path, end)
        self._size = end

    def flush(self) -> None:
        """Waits until the disk holds everything: a power cut after it loses nothing."""
        if self._file is None:
            return
        try:
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "the file was deleted")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._stop(error)

    def close(self) -> None:
        self.flush()
        self._shut()
        if self._lost:
            self.announce(f"{self._lost} lines were not recorded in {self.path}")

    def _shut(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def _is_before(line: bytes, first_step: int) -> bool:
    """Whether this is a whole line of a step before first_step."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] < first_step
    except (ValueError, KeyError, TypeError):
        return False
