"""Save checkpoints while training goes on."""

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from basics import words
from basics.durable import DISK_FULL
from basics.host import available_bytes
from checkpointing import files
from checkpointing.files import CHUNK, identity, map_tensors

# --- Background saving ----------------------------------------------------------------------------

SMALL_THINGS = 1 << 20  # bytes for random numbers, step counts and gaps beside the large tensors
HEADROOM = 1 << 30  # bytes left to the rest of the machine; below it the copy is not made


class BackgroundSaver:
    """Saves checkpoints while training goes on; the caller waits for a copy in memory only.

    The copy is allocated once (pinned when it comes from CUDA) and used for every save, so that
    memory use is the size of one checkpoint, known from the start. An error never reaches the
    caller: it is announced, older checkpoints stay as they are, and the next save tries again.
    One thread at a time; every method is for one thread (the training loop's).
    """

    def __init__(self, announce: Callable[[str], None] = print, headroom: int = HEADROOM):
        self.announce, self.headroom = announce, headroom
        self.synchronous = False  # no memory for the copy: save in the foreground
        self._buffers = {}  # place in the state -> CPU tensor in one of the arenas
        self._arenas = []  # the memory, and whether CUDA must be made to let go of it
        self._spare = None  # (the last arena's memory, bytes handed out, bytes left)
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._started = 0.0
        self._ok = True
        self._failures: list[tuple[Path, str]] = []

    def allocate(self, state: dict, at_least: int = 0) -> None:
        """Reserve the memory for copies of `state`, best before the first step; says how much.

        at_least: bytes of what the state will hold later, as an optimizer makes its moments in the
        first step; reserved at once, and given to the tensors that come.
        """
        import torch

        missing, total = {}, 0

        def look(tensor, where):
            nonlocal total
            buffer = self._buffers.get(where)
            layout = torch.empty_like(tensor, device="meta")  # same strides, if they are dense
            if buffer is not None and (buffer.shape, buffer.dtype, buffer.stride()) != (
                layout.shape,
                layout.dtype,
                layout.stride(),
            ):
                raise _LayoutChanged
            if buffer is None and where not in missing:
                missing[where] = (total, layout)
                total += -(-tensor.numel() * tensor.element_size() // 64) * 64
            cuda.update([tensor.device] if tensor.device.type == "cuda" else [])

        cuda = set()
        try:
            _map_unique(state, look)
        except _LayoutChanged:  # another model: two copies at once would break the promise
            self.wait()
            self._release()
            missing, total = {}, 0
            _map_unique(state, look)
        if not missing or self.synchronous:
            return
        if self._spare is not None and total <= self._spare[2]:
            self._hand_out(missing, total)
            return
        needed, total = total, max(total, at_least + SMALL_THINGS if at_least else 0)
        available = available_bytes()
        if available is not None and available < total + self.headroom:
            self._stay_synchronous(
                f"{words.size(total)} of memory for a copy would leave less than "
                f"{words.size(self.headroom)} of {words.size(available)}"
            )
            return
        try:
            raw = mmap.mmap(-1, max(total, 64), access=mmap.ACCESS_COPY)  # private, no file
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without: a copy takes 30% longer
                    raw.madvise(mmap.MADV_HUGEPAGE)
            arena = torch.frombuffer(raw, dtype=torch.uint8)
            arena.zero_()  # touches every page now, with all threads, and not in the first save
        except OSError:  # a limit that /proc does not know (ulimit -v)
            self._stay_synchronous(f"{words.size(total)} of memory for a copy cannot be had")
            return
        pinned = bool(cuda) and _pin(arena)
        self._arenas.append((arena, pinned))
        self._spare = (raw, 0, total)
        self._hand_out(missing, needed)
        self.announce(
            f"background checkpoints: {words.size(total)} of {'pinned ' if pinned else ''}memory "
            "reserved for the copy"
        )

    def _hand_out(self, missing: dict, needed: int) -> None:
        """Buffers for the tensors in `missing`, {place: (offset, layout)}, from the last arena."""
        import torch

        raw, begin, left = self._spare
        for where, (offset, layout) in missing.items():
            # Each buffer gets a storage of its own length, so that saving one does not save all.
            flat = (
                torch.frombuffer(
                    raw, dtype=layout.dtype, count=layout.numel(), offset=begin + offset
                )
                if layout.numel()
                else torch.empty(0, dtype=layout.dtype)
            )
            self._buffers[where] = flat.as_strided(layout.shape, layout.stride())
        self._spare = (raw, begin + needed, left - needed)

    def save(
        self,
        path,
        state: dict,
        info: dict | None = None,
        on_done: Callable[[], list[str] | None] | None = None,
        on_full: Callable[[], list[str]] | None = None,
    ) -> float:
        """Copy `state` and write it behind the caller's back; returns the seconds waited here.

        `on_done()` runs after a successful write, in the writing thread; the warnings it returns
        are announced (`retain`). `on_full()` runs when the disk is full; if it returns names of
        files that it deleted, the write is tried once more (`make_room`). The caller may change its
        tensors and values as soon as this returns.
        """
        import torch

        began = time.monotonic()
        if self.busy():
            self.announce(
                f"{self._path} is still being written after {began - self._started:.1f} s; "
                f"{Path(path).name} waits for it"
            )
        self.wait()
        self._path, self._started = Path(path), time.monotonic()
        self.allocate(state)
        if self.synchronous:
            self._write(Path(path), state, info, on_done, on_full)
            return time.monotonic() - began
        devices, moves = set(), []

        def copy(tensor, where):
            buffer = self._buffers[where]
            if tensor.device.type == "cuda":
                devices.add(tensor.device)
                buffer.copy_(tensor, non_blocking=True)
            elif tensor.device.type == "cpu" and tensor.stride() == buffer.stride():
                # The same layout: bytes. copy_ would make all threads of PyTorch meet after each of
                # hundreds of tensors, which takes five times as long when the machine is busy.
                for at in range(0, tensor.nbytes, CHUNK):
                    n = min(CHUNK, tensor.nbytes - at)
                    moves.append((buffer.data_ptr() + at, tensor.data_ptr() + at, n))
            else:
                buffer.copy_(tensor)
            return buffer

        copied = _map_unique(state, copy)
        _move_all(moves)
        for device in devices:
            torch.cuda.synchronize(device)
        arguments = (Path(path), copied, dict(info or {}), on_done, on_full)
        # Not a daemon: the interpreter waits for it, even after an exception.
        thread = threading.Thread(target=self._write, args=arguments, name="saver")
        try:
            thread.start()
            self._thread = thread
        except RuntimeError:  # the system gives this user no more threads
            self._write(*arguments)
        return time.monotonic() - began

    def busy(self) -> bool:
        """Whether a save is being written right now."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> bool:
        """Wait for a running save; True if the last save succeeded."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._ok

    def close(self) -> bool:
        """Wait for a running save and give the memory back; True if the last save succeeded."""
        self.wait()
        self._release()
        return self._ok

    def failures(self) -> list[tuple[Path, str]]:
        """(file, reason) of every save that failed so far."""
        return list(self._failures)

    def _write(self, path: Path, state: dict, info: dict | None, on_done, on_full) -> None:
        """Save and call `on_done`; any error ends here, since training is worth more."""
        try:
            try:
                files.save(path, state, info)
            except OSError as e:
                deleted = on_full() if on_full and e.errno in DISK_FULL else []
                if not deleted:
                    raise
                self.announce(
                    f"WARNING: no room for {path}: deleted {', '.join(deleted)}, which it replaces"
                )
                files.save(path, state, info)
            self._ok = True
        except Exception as e:
            reason = (e.strerror if isinstance(e, OSError) else None) or f"{type(e).__name__}: {e}"
            self._ok = False
            self._failures.append((path, reason))
            self.announce(
                f"WARNING: {path} COULD NOT BE WRITTEN: {reason}. Training goes on, older "
                "checkpoints are untouched, the next save tries again."
            )
            return
        try:
            for warning in (on_done and on_done()) or []:
                self.announce(f"WARNING: {warning}")
        except Exception as e:
            self.announce(f"WARNING: after writing {path}: {type(e).__name__}: {e}")

    def _stay_synchronous(self, why: str) -> None:
        self.synchronous = True
        self._release()
        self.announce(f"checkpoints are written in the foreground: {why}")

    def _release(self) -> None:
        self._buffers = {}
        for arena, pinned in self._arenas:
            if pinned:
                import torch

                torch.cuda.cudart().cudaHostUnregister(arena.data_ptr())
        self._arenas, self._spare = [], None


def _move_all(moves: list[tuple[int, int, int]]) -> None:
    """Copy (destination, source, bytes) for all, in this thread and up to three more."""
    rest = iter(moves)  # each thread takes the next, so that none waits for a slow one

    def work():
        for move in rest:
            ctypes.memmove(*move)  # lets other threads run

    helpers = [threading.Thread(target=work) for _ in range(min(4, os.cpu_count() or 1) - 1)]
    started = []
    with contextlib.suppress(RuntimeError):  # the system gives this user no more threads
        for helper in helpers:
            helper.start()
            started.append(helper)
    work()
    for helper in started:
        helper.join()


class _LayoutChanged(Exception):
    """A tensor no longer fits the buffer that was made for it."""


def _map_unique(state: dict, fn: Callable) -> dict:
    """`map_tensors` with one call for all tensors that are tied, so that they stay tied."""
    results = {}

    def once(tensor, where):
        tensor = tensor.detach()
        key = identity(tensor) if tensor.numel() else where
        if key not in results:
            results[key] = fn(tensor, where)
        return results[key]

    return map_tensors(state, once)


def _pin(arena) -> bool:
    """Let CUDA copy straight into this memory; False if it will not (copies are slower then).

    PyTorch's own pinned tensors are rounded up to a power of two: up to twice the memory.
    """
    import torch

    if int(torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), arena.numel(), 0)) == 0:
        return True
    with contextlib.suppress(RuntimeError):  # else the next kernel is blamed for this error
        torch.zeros(1, device="cuda")
    return False
