"""Save checkpoints while training goes on."""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from basics import words
from basics.durable import DISK_FULL
from basics.host import available_bytes
from checkpointing import files
from checkpointing.files import map_tensors

HEADROOM = 1 << 30  # bytes left to the rest of the machine; below it the copy is not made
PINNED_FROM = 1 << 20  # bytes: smaller tensors share pages, and are copied without being pinned


class BackgroundSaver:
    """Saves checkpoints while training goes on; the caller waits for a copy in memory only.

    The copy is allocated once (pinned where it comes from CUDA) and used for every save, so that
    memory use is the size of one checkpoint, known from the start. An error never reaches the
    caller: it is announced, older checkpoints stay as they are, and the next save tries again.
    One thread at a time; every method is for one thread (the training loop's). `progress` is called
    by the writing thread for every few megabytes: a large file on a slow disk is no hang.
    """

    def __init__(
        self,
        announce: Callable[[str], None] = print,
        headroom: int = HEADROOM,
        progress: Callable[[], None] = lambda: None,
    ):
        self.announce, self.headroom, self.progress = announce, headroom, progress
        self.synchronous = False  # no memory for the copy: save in the foreground
        self._copies = {}  # place in the state -> CPU tensor
        self._pinned = []  # those of them that CUDA copies into directly
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._started = 0.0
        self.failure: tuple[Path, str] | None = None  # file and reason, if the last save failed

    def allocate(self, state: dict) -> None:
        """Reserve memory for a copy of `state`, best before the first step, and say how much."""
        import torch

        tensors = {}
        map_tensors(state, lambda tensor, where: tensors.setdefault(where, tensor))
        layout = {where: (t.shape, t.dtype) for where, t in tensors.items()}
        if self.synchronous or layout == {w: (c.shape, c.dtype) for w, c in self._copies.items()}:
            return
        self.close()  # of another layout: never two copies at once
        needed, available = sum(tensor.nbytes for tensor in tensors.values()), available_bytes()
        if available is not None and available < needed + self.headroom:
            return self._stay_synchronous(
                f"{words.size(needed)} of memory for a copy would leave less than "
                f"{words.size(self.headroom)} of {words.size(available)}"
            )
        try:
            for where, tensor in tensors.items():
                copy = torch.empty_like(tensor.detach(), device="cpu")
                self._copies[where] = copy.zero_()  # its pages exist from now on
                if tensor.is_cuda and tensor.nbytes >= PINNED_FROM and _pin(copy):
                    self._pinned.append(copy)
        except RuntimeError:  # a limit that /proc does not know (ulimit -v)
            return self._stay_synchronous(
                f"{words.size(needed)} of memory for a copy cannot be had"
            )
        self.announce(
            f"background checkpoints: {words.size(needed)} of {'pinned ' * bool(self._pinned)}"
            "memory reserved for the copy"
        )

    def save(
        self,
        path,
        state: dict,
        info: dict | None = None,
        on_done: Callable[[], list[str] | None] | None = None,
        on_full: Callable[[], list[str]] | None = None,
    ) -> float:
        """Copy `state` and write it behind the caller's back; return the seconds waited here.

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
        if not self.synchronous:
            devices = set()

            def copy(tensor, where):
                if tensor.is_cuda:
                    devices.add(tensor.device)
                return self._copies[where].copy_(tensor.detach(), non_blocking=tensor.is_cuda)

            state = map_tensors(state, copy)
            for device in devices:
                torch.accelerator.synchronize(device)
        arguments = (Path(path), state, dict(info or {}), on_done, on_full)
        # Not a daemon: the interpreter waits for it, even after an exception.
        thread = threading.Thread(target=self._write, args=arguments, name="saver")
        if not self.synchronous:
            with contextlib.suppress(RuntimeError):  # the system gives this user no more threads
                thread.start()
                self._thread = thread
        if self._thread is None:
            self._write(*arguments)
        return time.monotonic() - began

    def busy(self) -> bool:
        """Return whether a save is being written right now."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> bool:
        """Wait for a running save; return whether the last save succeeded."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.failure is None

    def close(self) -> bool:
        """Wait for a running save and give the memory back; return as `wait`."""
        self.wait()
        self._release()
        return self.failure is None

    def _write(self, path: Path, state: dict, info: dict, on_done, on_full) -> None:
        """Save and call `on_done`; any error ends here, since training is worth more."""
        try:
            try:
                files.save(path, state, info, self.progress)
            except OSError as e:
                deleted = on_full() if on_full and e.errno in DISK_FULL else []
                if not deleted:
                    raise
                self.announce(
                    f"WARNING: no room for {path}: deleted {', '.join(deleted)}, which it replaces"
                )
                files.save(path, state, info, self.progress)
            self.failure = None
        except Exception as e:
            reason = (e.strerror if isinstance(e, OSError) else None) or f"{type(e).__name__}: {e}"
            self.failure = path, reason
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
        for copy in self._pinned:
            import torch

            torch.cuda.cudart().cudaHostUnregister(copy.data_ptr())
        self._copies, self._pinned = {}, []


def _pin(tensor) -> bool:
    """Let CUDA copy straight into this memory; return False if it will not (copies are slower).

    PyTorch's own pinned tensors are rounded up to a power of two: up to twice the memory.
    """
    import torch

    if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) == 0:
        return True
    with contextlib.suppress(RuntimeError):  # else the next kernel is blamed for this error
        torch.zeros(1, device="cuda")
    return False
