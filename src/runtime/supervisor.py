"""Signals, hangs and deaths: when a training process must stop, and how the others learn of it.

Rank 0 decides and saves, the others follow: every rank holds the same weights, so only the step
that rank 0 has finished matters and no agreement has to be reached inside a step. Rank 0 notices a
request at its next `poll` (called before every micro-batch and every batch of an evaluation) and
leaves; the other ranks may by then wait in a collective that will never complete, so their
watching thread ends them once rank 0 has said that it is done.

| what happens                            | what follows                                           |
|-----------------------------------------|--------------------------------------------------------|
| SIGTERM, SIGINT, SIGHUP on any rank     | rank 0 saves, all leave with 128 + signal              |
| the same before training has begun      | all leave at once: there is nothing to save            |
| SIGHUP under nohup                      | nothing                                                |
| a second SIGINT                         | this process leaves at once                            |
| SIGUSR1 on any rank                     | a checkpoint of the last finished step, then on        |
| `max_hours` over                        | rank 0 saves, all leave with 0                         |
| another rank died                       | rank 0 saves, all leave with 1                         |
| torchrun itself was killed              | noticed by the change of parent: as SIGTERM            |
| no progress for `hang_timeout` seconds  | stacks of all ranks on stderr, exit 1                  |
| terminal or pipe of the output is gone  | what is printed is dropped, training goes on           |
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from typing import NoReturn

from basics import terminal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_TICK = 0.2  # seconds between looks of the watching thread
_SAME_PRESS = 0.3  # seconds within which two SIGINT are one Ctrl-C that came by two ways
_GRACE = 5.0  # seconds for the other processes to react
_STARTED = time.monotonic()
# Keys in the process group's store; what follows a slash is a rank.
_STOP, _LEFT, _SAVE, _HANG = (f"supervisor/{name}" for name in ("stop", "left", "save", "hang"))

# --- Before training ------------------------------------------------------------------------------


def begin() -> None:
    """To be called first, before the slow imports. Until there is a Supervisor a signal ends the
    program at once, without a traceback, and SIGUSR1 has nothing to save."""
    for number in _honoured():
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    terminal.make_lasting()


def _honoured() -> list[signal.Signals]:
    """The signals that stop a run: SIGHUP only where it is not ignored, as nohup has it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if number != signal.SIGHUP or not ignored]


def end(code: int) -> NoReturn:
    """Leave at once, with everything said. Python's teardown takes a while in which a signal kills
    again, and in which threads of gloo abort a process that had finished, now and then; and with
    several processes the others may be inside a collective: nothing waits for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --- While training -------------------------------------------------------------------------------


class StopRequested(Exception):
    """Raised by `poll` on rank 0; `code` is the exit code after the checkpoint, `reason` a text."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


def is_lost_peer(error: BaseException) -> bool:
    """Whether PyTorch says with this exception that another process, or the store, is gone.

    gloo raises plain RuntimeErrors that name its source file; the rest has classes.
    """
    return type(error).__name__.startswith("Dist") or "gloo" in str(error)


class Supervisor:
    """One per process, made in the main thread after the process group (whose `store` it uses)."""

    def __init__(self, rank=0, world_size=1, store=None, hang_timeout=900.0, max_hours=None):
        self.rank, self.world_size = rank, world_size
        self.store = store if world_size > 1 else None
        self.hang_timeout = hang_timeout
        self._stop: tuple[int, str] | None = None
        self._save = False
        self._first_sigint = None
        # Only torchrun is watched: a shell may end, with nohup it is meant to.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._deadline = None if max_hours is None else _STARTED + 3600 * max_hours
        self._beat = time.monotonic()
        self._closed = threading.Event()
        self._pids = self._share_pids()
        self._old_handlers = {n: signal.signal(n, self._on_stop) for n in _honoured()}
        self._old_handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_save)
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def poll(self, waiting: bool = False) -> None:
        """Say "I am alive", unless `waiting` for something that may never come; raise StopRequested
        on rank 0 if it is time to leave."""
        now = time.monotonic()
        if not waiting:
            self._beat = now
        if self._stop is None and self._deadline is not None and now > self._deadline:
            self._stop = (0, "--max_hours is over")
        if self._stop is not None and self.rank == 0:
            raise StopRequested(*self._stop)

    def take_save_request(self) -> bool:
        """True once after a SIGUSR1."""
        asked, self._save = self._save, False
        return asked

    def stop_for(self, error: Exception) -> StopRequested:
        """What an exception in training means: a reason to stop with the work saved. Raises it
        again if it is anything but a StopRequested or the loss of another process."""
        if isinstance(error, StopRequested):
            if self.rank > 0 and self._stop is None:  # trouble of this rank alone
                print(f"rank {self.rank}: {error}", file=sys.stderr)
                self._stop = (error.code, error.reason)  # the watching thread tells rank 0
            return error
        if self.world_size == 1 or not is_lost_peer(error):
            raise error
        time.sleep(5 * _TICK)  # a signal or a reason may be on its way
        gone = [str(r) for r, pid in self._pids.items() if not _alive(pid)]
        who = f"rank {', '.join(gone)} has died" if gone else "another process has died"
        code, reason = self._stop or (1, who)
        print(f"rank {self.rank}: {who}, this process ends", file=sys.stderr)
        return StopRequested(code, reason)

    def leave(self, code: int) -> None:
        """At the end. Rank 0, after its last checkpoint, tells the others to end with the same exit
        code; another rank that stops gives rank 0 the time to save."""
        if self.rank == 0 and self.store is not None:
            try:
                self.store.set(_LEFT, str(code))
                time.sleep(3 * _TICK)  # the store may live in this process: let the others read it
            except Exception as e:  # the launcher that held the store is gone: they watch our pid
                print(f"could not reach the other processes ({e}); they end by themselves")
        elif self._stop is not None and self.rank > 0:
            time.sleep(_GRACE)  # the watching thread ends this process before that, if all is well
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
            if self._first_sigint is not None and now - self._first_sigint > _SAME_PRESS:
                os.write(2, b"\nsecond Ctrl-C: leaving at once, without a checkpoint\n")
                os._exit(128 + number)
            self._first_sigint = self._first_sigint or now
        if self._stop is None:
            self._stop = (128 + number, f"received {signal.Signals(number).name}")

    def _on_save(self, number, frame):
        self._save = True

    def _share_pids(self) -> dict[int, int]:
        """{rank: process id} of the other ranks on this host."""
        if self.store is None:
            return {}
        host, pids = os.uname().nodename, {}
        self.store.set(f"supervisor/pid/{self.rank}", f"{host} {os.getpid()}")
        for rank in range(self.world_size):
            where, pid = self.store.get(f"supervisor/pid/{rank}").decode().split()
            if where == host and rank != self.rank:
                pids[rank] = int(pid)
        return pids

    # -- the watching thread -----------------------------------------------------------------------

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
            gone = self._launcher is not None and os.getppid() != self._launcher
            if gone and self._stop is None:
                self._stop = (128 + signal.SIGTERM, "the process that started this one is gone")
            if self.store is None:
                continue
            try:
                told = self._exchange(told)
            except Exception:  # the store is gone with the launcher: the pid below still tells
                if self._stop is None:
                    self._stop = (128 + signal.SIGTERM, "the launcher's store is gone")
            if 0 in self._pids and not _alive(self._pids[0]):
                print(f"rank {self.rank}: rank 0 has died, this process ends", file=sys.stderr)
                self._exit_now(self._stop[0] if self._stop else 1)

    def _exchange(self, told: bool) -> bool:
        """One look into the store, in both directions; whether our reason to stop is in there."""
        if self._stop is not None and not told:
            self.store.set(_STOP, f"{self._stop[0]} {self._stop[1]} (rank {self.rank})")
            told = True
        if self._stop is None and self.store.check([_STOP]):
            code, reason = self.store.get(_STOP).decode().split(" ", 1)
            self._stop, told = (int(code), reason), True
        if self.rank > 0 and self.take_save_request():
            self.store.set(_SAVE, "")
        if self.rank == 0 and self.store.check([_SAVE]):
            self.store.delete_key(_SAVE)
            self._save = True
        if self.rank > 0 and self.store.check([_LEFT]):
            self._exit_now(int(self.store.get(_LEFT).decode()))
        if self.store.check([_HANG]) and not self.store.check([f"{_HANG}/{self.rank}"]):
            self._show_stacks(f"rank {self.rank}: stacks, because another rank hangs")
            self.store.set(f"{_HANG}/{self.rank}", "")
        return told

    def _die_of_hang(self):
        self._show_stacks(
            f"rank {self.rank}: no progress for {self.hang_timeout:g} s (--hang_timeout): another "
            "process is gone or stuck, or a device is. Stacks of this process follow; start again "
            "with --resume latest."
        )
        if self.store is not None:
            with contextlib.suppress(Exception):  # a store that is gone: our own stacks must do
                self._ask_for_stacks()
        self._exit_now(1)

    def _ask_for_stacks(self):
        """Give every rank the time to show its stacks too; name those that do not answer."""
        self.store.set(f"{_HANG}/{self.rank}", "")
        self.store.set(_HANG, "")
        silent = set(range(self.world_size)) - {self.rank}
        deadline = time.monotonic() + _GRACE
        while silent and time.monotonic() < deadline:
            time.sleep(_TICK)
            silent = {rank for rank in silent if not self.store.check([f"{_HANG}/{rank}"])}
        for rank in sorted(silent):
            pid = self._pids.get(rank)
            where = f"process {pid}, {_state(pid)}" if pid else "on another host"
            print(f"rank {rank} ({where}) does not answer", file=sys.stderr, flush=True)

    def _show_stacks(self, why: str):
        print(f"\n{why}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(sys.stderr.fileno(), all_threads=True)

    def _exit_now(self, code: int):
        end(code)  # the main thread may be inside a collective that never returns


def _alive(pid: int) -> bool:
    """Whether a process of this id runs; one that has ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _state(pid) != "ended"


def _state(pid: int) -> str:
    """What the kernel says of a process, in a word; "running" where it cannot be asked."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            letter = file.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "running"
    return {"T": "stopped", "t": "stopped", "Z": "ended", "X": "ended"}.get(letter, "running")
