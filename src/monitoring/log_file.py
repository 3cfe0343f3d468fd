"""A log that never stands in training's way: whole records, also on a full disk.

A record is one unbuffered write: in the file when the method returns, or known to be lost. What the
disk does never raises: the log stops with one announcement, is tried again from time to time, and
says what is missing when it is back. The event files and metrics.jsonl are such logs.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

from basics.durable import DISK_FULL


class LogFile:
    """Appends to one file, from one thread. Subclasses say how it begins: their `_open` sets
    `_file`, unbuffered, and `_size`, or raises OSError and leaves nothing behind."""

    def __init__(self, name: str, announce: Callable[[str], None], retry_every: float):
        """name: what begins each announcement. announce: called with one sentence now and then.
        retry_every: seconds between tries while the disk is full."""
        self.name, self.announce, self.retry_every = name, announce, retry_every
        self._file = None  # None while logging is stopped
        self._size = 0  # bytes of whole records in it
        self._retry_at = 0.0  # monotonic clock
        self._stopped = False  # and said so
        self._lost = 0  # values since then
        self._lost_steps = (0, 0)

    def _begin(self, prepare: Callable[[], None], refusal: str) -> None:
        """Prepare the place and open. Raise ValueError with `refusal` where that cannot be done,
        but for a full disk, from which a log comes back."""
        try:
            prepare()
            self._open()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise ValueError(f"{refusal} ({error.strerror or error})") from None
            self._stop(error)

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:  # a full disk takes a part, and raises at the next call
            view = view[self._file.write(view) :]
        self._size += len(data)

    def _shut(self) -> None:
        """Close the file at its last whole record."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _stop(self, error: OSError) -> None:
        self._shut()
        self._retry_at = time.monotonic() + self.retry_every
        if not self._stopped:
            self._stopped = True
            self.announce(
                f"{self.name} stopped ({error.strerror or error}); training goes on, logging is "
                f"tried again every {self.retry_every:g} s"
            )

    def _write(self, data: bytes, step: int, values: int) -> bool:
        """Append a record of so many values, whole or not at all -> whether it is in the file."""
        try:
            if self._file is None and time.monotonic() >= self._retry_at:
                self._open()
            if self._file is not None:
                self._append(data)
                if self._stopped:
                    self._announce_return(step)
                return True
        except OSError as error:
            self._stop(error)
        if values:
            self._lost_steps = (self._lost_steps[0] if self._lost else step, step)
            self._lost += values
        return False

    def _announce_return(self, step: int) -> None:
        missing = ""
        if self._lost:
            first, last = self._lost_steps
            missing = f"; {self._lost} values of steps {first} to {last} are missing"
        self.announce(f"{self.name} is back at step {step}{missing}")
        self._stopped, self._lost = False, 0

    def flush(self) -> None:
        """Wait until the disk holds everything: a power cut after it loses nothing. (A killed
        process loses nothing that was logged, without this.)"""
        if self._file is None:
            return
        try:
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "the file was deleted")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._stop(error)
            if isinstance(error, FileNotFoundError):
                self._retry_at = 0.0  # a new file may well be possible at once

    def close(self) -> None:
        self.flush()
        self._shut()
        self._retry_at = float("inf")
        if self._lost:
            self.announce(f"{self.name}: {self._lost} values were not recorded")
            self._lost = 0


def set_aside(path: Path, why: str) -> None:
    """Rename a file to WHY.ITS_NAME so that TensorBoard no longer reads it; overwrite nothing."""
    name, n = path.name.replace("tfevents", "events"), 0
    while (target := path.with_name(f"{why}.{n}.{name}" if n else f"{why}.{name}")).exists():
        n += 1
    path.rename(target)
