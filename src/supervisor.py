"""Signals, hangs and deaths: when a training process must stop, and how the others learn of it.

Rank 0 decides and saves, the others follow: every rank holds the same weights, so only the step
that rank 0 has finished matters and no agreement has to be reached inside a step. Rank 0 notices a
request at its next `poll` (called before every micro-batch and every batch of an evaluation) and
leaves; the other ranks may by then wait in a collective that will never complete, so their
watching thread ends them once rank 0 has said that it is done.

| what happens                            | what follows                                           |
|-----------------------------------------|--------------------------------------------------------|
| SIGTERM, SIGINT, SIGHUP on any rank     | rank 0 saves, all leave with 128 + signal              |
| a second SIGINT                         | this process leaves at once                            |
| SIGUSR1 on rank 0                       | a checkpoint of the last finished step, then on        |
| `max_hours` over                        | rank 0 saves, all leave with 0                         |
| torchrun itself was killed              | noticed by the change of parent: as SIGTERM            |
| no progress for `hang_timeout` seconds  | all stacks on stderr, exit 1 (torchrun ends the rest)  |
"""

import faulthandler
import os
import signal
import sys
import threading
import time

_STOP, _LEFT = "supervisor/stop", "supervisor/left"  # keys in the process group's store
_TICK = 0.2  # seconds between looks of the watching thread


class StopRequested(Exception):
    """Raised by `poll` on rank 0; `code` is the exit code after the checkpoint, `reason` a text."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


class Supervisor:
    """One per process, made in the main thread after the process group (whose `store` it uses)."""

    def __init__(self, rank=0, world_size=1, store=None, hang_timeout=900.0, max_hours=None):
        self.rank, self.store = rank, store if world_size > 1 else None
        self.hang_timeout = hang_timeout
        self._stop: tuple[int, str] | None = None
        self._save = False
        self._first_sigint = None
        self._parent = os.getppid()
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._beat = time.monotonic()
        self._closed = threading.Event()
        self._main_pid = self._share_main_pid()
        self._old_handlers = {
            number: signal.signal(number, self._on_stop)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        self._old_handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_save)
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Say "I am alive"; raise StopRequested on rank 0 if it is time to leave."""
        self._beat = time.monotonic()
        if self._stop is None and self._deadline is not None and self._beat > self._deadline:
            self._stop = (0, "--max_hours is over")
        if self._stop is not None and self.rank == 0:
            raise StopRequested(*self._stop)

    def take_save_request(self) -> bool:
        """True once after a SIGUSR1."""
        asked, self._save = self._save, False
        return asked

    def leave(self, code: int) -> None:
        """Rank 0, after its last checkpoint: tell the others to end with the same exit code."""
        if self.store is not None:
            try:
                self.store.set(_LEFT, str(code))
                time.sleep(3 * _TICK)  # the store may live in this process: let the others read it
            except Exception as e:  # the launcher that held the store is gone: they watch our pid
                print(f"could not reach the other processes ({e}); they end by themselves")
        self.close()

    def close(self) -> None:
        """Stop watching and give the signals back."""
        self._closed.set()
        self._thread.join()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    # Signal handlers only set flags: they run between two byte codes of the main thread.

    def _on_stop(self, number, frame):
        now = time.monotonic()
        if number == signal.SIGINT:
            # A terminal and torchrun both pass Ctrl-C on: the same one, milliseconds apart.
            if self._first_sigint is not None and now - self._first_sigint > 1.0:
                os.write(2, b"\nsecond Ctrl-C: leaving at once, without a checkpoint\n")
                os._exit(128 + number)
            self._first_sigint = self._first_sigint or now
        if self._stop is None:
            self._stop = (128 + number, f"received {signal.Signals(number).name}")

    def _on_save(self, number, frame):
        self._save = True

    def _share_main_pid(self) -> int | None:
        """Process id of rank 0 where it runs on this host, else None."""
        if self.store is None:
            return None
        here = f"{os.uname().nodename} {os.getpid()}"
        if self.rank == 0:
            self.store.set("supervisor/main", here)
            return None
        host, pid = self.store.get("supervisor/main").decode().split()
        return int(pid) if host == os.uname().nodename else None

    def _watch(self):
        told = False
        last_tick = time.monotonic()
        while not self._closed.wait(_TICK):
            now = time.monotonic()
            if now - last_tick > 10 * _TICK + 3:  # this process itself was stopped (Ctrl-Z)
                self._beat = now
            last_tick = now
            if now - self._beat > self.hang_timeout:
                self._die_of_hang()
            if self._stop is None and os.getppid() != self._parent:
                self._stop = (128 + signal.SIGTERM, "the process that started this one is gone")
            if self.store is None:
                continue
            try:
                if self._stop is not None and not told:
                    self.store.set(_STOP, f"{self._stop[0]} {self._stop[1]} (rank {self.rank})")
                    told = True
                if self._stop is None and self.store.check([_STOP]):
                    code, reason = self.store.get(_STOP).decode().split(" ", 1)
                    self._stop, told = (int(code), reason), True
                if self.rank > 0 and self.store.check([_LEFT]):
                    self._exit_now(int(self.store.get(_LEFT).decode()))
            except Exception:  # the store is gone with the launcher: the pid below still tells
                if self._stop is None:
                    self._stop = (128 + signal.SIGTERM, "the launcher's store is gone")
            if self._main_pid is not None and not _alive(self._main_pid):
                self._exit_now(self._stop[0] if self._stop else 1)

    def _die_of_hang(self):
        print(
            f"\nrank {self.rank}: no progress for {self.hang_timeout:g} s (--hang_timeout): "
            "another process is gone or stuck, or a device is. Stacks of this process follow; "
            "start again with --resume latest.",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        self._exit_now(1)

    def _exit_now(self, code: int):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the main thread may be inside a collective that never returns


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
