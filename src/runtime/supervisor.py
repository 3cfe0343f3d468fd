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
| another rank died, or is silent (peers) | rank 0 saves, all leave with 1. With NCCL the device   |
|                                         | may wait for it for ever: then nothing can be saved    |
|                                         | and the work since the last checkpoint is lost         |
| torchrun itself was killed              | noticed by the change of parent: as SIGTERM            |
| the run's folder has another owner      | this one leaves with 1 and saves nothing               |
| no progress for `hang_timeout` seconds  | stacks of all ranks on stderr, told, exit 1            |
| terminal or pipe of the output is gone  | what is printed is dropped, training goes on           |
"""

import contextlib
import errno
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from basics import terminal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_TICK = 0.2  # seconds between looks of the watching thread
_SAME_PRESS = 0.3  # seconds within which two SIGINT are one Ctrl-C that came by two ways
_PATIENCE = 3.0  # seconds until it is said why a signal has not ended the run yet
_GRACE = 5.0  # seconds for the other processes to react
_LAST_WAIT = 25.0  # seconds that rank 0 has to save when another process is silent
_STARTED = time.monotonic()
# Keys in the process group's store; what follows a slash is a rank.
_STOP, _LEFT, _SAVE, _HANG, _WRITTEN = (
    f"supervisor/{name}" for name in ("stop", "left", "save", "hang", "written")
)

# --- Before training ------------------------------------------------------------------------------


Poll = Callable[[], None]  # called often: notices signals, may raise
_at_work: "Supervisor | None" = None  # which has the work saved first


def begin() -> None:
    """Take the signals, before the slow imports. Until there is a Supervisor a signal ends the
    program at once, without a traceback, and SIGUSR1 has nothing to save.

    A thread hears of signals: the main thread may be in C++ for long, in a backward pass or waiting
    for another process that never comes, where Python runs no handler.
    """
    for number in (*STOP_SIGNALS, signal.SIGUSR1):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # by nohup
            signal.signal(number, lambda number, frame: None)
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(heard,), name="signals", daemon=True).start()
    terminal.make_lasting()


def _hear(pipe: int) -> None:
    while heard := os.read(pipe, 1):
        number = heard[0]
        if _at_work is not None:
            _at_work.take(number)
        elif number in STOP_SIGNALS:
            os._exit(128 + number)


def end(code: int) -> NoReturn:
    """Leave at once, with everything said. Python's teardown takes a while in which a signal kills
    again, and in which threads of gloo abort a process that had finished, now and then; and with
    several processes the others may be inside a collective: nothing waits for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --- While training -------------------------------------------------------------------------------


class StopRequested(Exception):
    """Raised by `poll` on rank 0, with a reason; `code` is the exit code after the checkpoint."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code = code


@contextlib.contextmanager
def reading():
    """Stop with the work saved where data goes bad in mid-run, and name it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise StopRequested(2, str(error)) from None


def is_lost_peer(error: BaseException) -> bool:
    """Return whether this exception of PyTorch's says that another process, or the store, is gone.

    gloo raises plain RuntimeErrors that name its source file; the rest has classes.
    """
    return type(error).__name__.startswith("Dist") or "gloo" in str(error)


class Supervisor:
    """Watches over this process; made in the main thread. peers: peers.Peers, if it has any."""

    def __init__(self, rank=0, world_size=1, peers=None, hang_timeout=900.0, max_hours=None):
        self.rank, self.world_size, self.peers = rank, world_size, peers
        self.store = peers.store if peers is not None else None
        self.hang_timeout = hang_timeout
        self._lost_since: float | None = None  # a silent peer, which we may be waiting for
        self._leaving = self._told = False
        self._stop: tuple[int, str] | None = None
        self._save = False
        self._asked: float | None = None  # when a signal asked to stop, until that is answered
        self._first_sigint: float | None = None
        # Only torchrun is watched: a shell may end, with nohup it is meant to.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._deadline = None if max_hours is None else _STARTED + 3600 * max_hours
        self._beat, self._pieces = time.monotonic(), 0
        self.tell: Callable[[str, str], None] = lambda event, text: None  # those who do not look
        self.outlived: Callable[[], str | None] = lambda: None  # who else writes to our folders now
        self._look_at = 0.0
        self._closed = threading.Event()
        self._pids = self._share_pids()
        global _at_work
        _at_work = self
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()
        if peers is not None:
            peers.on_lost, peers.exchange = self._on_lost, self._exchange
            peers.pids = dict(self._pids)
            if peers.lost is not None:
                self._on_lost(peers.lost)

    def alive(self, waiting: bool = False) -> None:
        """Say "I am alive", unless `waiting` for something that may never come;
        from whichever thread."""
        now = time.monotonic()
        if not waiting:
            self._beat = now
        if self._stop is None and self._deadline is not None and now > self._deadline:
            self._stop = (0, "--max_hours is over")
        if self._stop is None and now > self._look_at:
            self._look_at = now + 1
            if other := self.outlived():
                self._stop = (1, other)

    def written(self) -> None:
        """Say the same for all ranks, from the thread that writes a checkpoint: they may have to
        wait for a disk slower than hang_timeout. Raise OSError if another run has its folder."""
        if other := self.outlived():
            raise OSError(errno.EBUSY, other)
        self._pieces += 1
        self._beat = time.monotonic()

    def poll(self, waiting: bool = False, agree=bool, all_ranks: bool = False) -> None:
        """Be `alive`; raise StopRequested if it is time to leave: on rank 0, or on `all_ranks`,
        where agree(own wish) says on each whether any wants to."""
        self.alive(waiting)
        if agree(self._stop is not None) and (self.rank == 0 or all_ranks):
            while self._stop is None:  # another rank's reason is on its way
                time.sleep(_TICK)
            self._leaving = True
            raise StopRequested(*self._stop)

    def take_save_request(self) -> bool:
        """Return True once after a SIGUSR1."""
        asked, self._save = self._save, False
        return asked

    def stop_for(self, error: Exception) -> StopRequested:
        """Return the reason to stop that an exception in training is, where the work can be saved.
        Raise it again if it is neither a StopRequested nor the loss of another process."""
        if isinstance(error, StopRequested):
            if self.rank > 0 and self._stop is None:  # trouble of this rank alone
                print(f"rank {self.rank}: {error}", file=sys.stderr)
                self._stop = (error.code, str(error))  # the watching thread tells rank 0
            return error
        if self.world_size == 1 or not is_lost_peer(error):
            raise error
        self._leaving = True
        time.sleep(5 * _TICK)  # a signal or a reason may be on its way
        gone = [str(r) for r, pid in self._pids.items() if not is_alive(pid)]
        who = f"rank {', '.join(gone)} has died" if gone else "another process has died"
        if not gone and self.peers.lost is not None:
            who = self.peers.lost
        code, reason = self._stop or (1, who)
        print(f"rank {self.rank}: {who}, this process ends", file=sys.stderr)
        return StopRequested(code, reason)

    def leave(self, code: int) -> None:
        """Have all end: rank 0, after its last checkpoint, tells the others to, with the same exit
        code; another rank that stops gives rank 0 the time to save."""
        if self.rank == 0 and self.store is not None:
            self.store.set(_LEFT, str(code))
            time.sleep(5 * _TICK)  # the store is in this process: let the others read it
        elif self._stop is not None and self.rank > 0:
            time.sleep(_GRACE)  # the watching thread ends this process before that, if all is well
        self.close()

    def close(self) -> None:
        """Stop watching: the next signal ends the program at once."""
        global _at_work
        _at_work = None
        self._closed.set()
        if self.peers is not None:
            self.peers.close()
        self._thread.join()

    def take(self, number: int) -> None:
        """Take a signal, from the thread that hears of them."""
        now = time.monotonic()
        if number == signal.SIGUSR1:
            self._save = True
        if number not in STOP_SIGNALS:
            return
        if number == signal.SIGINT:
            if self._first_sigint is not None and now - self._first_sigint > _SAME_PRESS:
                os.write(2, b"\nsecond Ctrl-C: leaving at once, without a checkpoint\n")
                os._exit(128 + number)
            self._first_sigint = self._first_sigint or now
        if self._stop is None:
            self._asked = now
            self._stop = (128 + number, f"received {signal.Signals(number).name}")

    def _share_pids(self) -> dict[int, int]:
        """Return {rank: process id} of the other ranks on this host."""
        if self.store is None:
            return {}
        host, pids = _where_ids_mean_the_same(), {}
        self.store.set(f"supervisor/pid/{self.rank}", f"{host} {os.getpid()}")
        for rank in range(self.world_size):
            where, pid = self.store.get(f"supervisor/pid/{rank}").decode().split()
            if where == host and rank != self.rank:
                pids[rank] = int(pid)
        return pids

    # -- the watching thread -----------------------------------------------------------------------

    def _watch(self):
        last_tick = time.monotonic()
        while not self._closed.wait(_TICK):
            now = time.monotonic()
            if now - last_tick > 10 * _TICK + 3:  # this process itself was stopped (Ctrl-Z)
                self._beat = now
            last_tick = now
            if self._asked is not None and now - self._asked > _PATIENCE:
                self._asked = None
                if self.rank == 0 and not self._leaving:
                    self._say_what_it_waits_for()
            if now - self._beat > self.hang_timeout:
                self._die_of_hang()
            gone = self._launcher is not None and os.getppid() != self._launcher
            if gone and self._stop is None:
                self._stop = (128 + signal.SIGTERM, "the process that started this one is gone")
            waited = 0 if self._lost_since is None else now - self._lost_since
            if waited > min(_LAST_WAIT, self.hang_timeout) and not self._leaving:
                self._end_for(f"{self.peers.lost} and this process waits for it")

    def _say_what_it_waits_for(self):
        text = "waiting for the pass under way to end (or its compilation), then saving"
        if self._first_sigint is not None:
            text += "; a second Ctrl-C leaves at once, without"
        print(f"\n{self._stop[1]}: {text}", file=sys.stderr, flush=True)

    # -- with the others: in the threads of peers.Peers --------------------------------------------

    def _on_lost(self, who: str):
        """Have rank 0 save when it next polls; the others have nothing to save."""
        if self._stop is None:
            self._stop = (1, who)
        if self.rank > 0:
            self._end_for(who)
        self._lost_since = time.monotonic()

    def _end_for(self, who: str):
        print(f"rank {self.rank}: {who}, this process ends", file=sys.stderr)
        self._tell_and_end("crashed", who, self._stop[0] if self._stop else 1)

    def _tell_and_end(self, event: str, text: str, code: int) -> NoReturn:
        """End for the main thread, which may be stuck in a collective."""
        try:
            self.tell(event, text)  # seconds at most
        finally:
            end(code)

    def _exchange(self):
        """Tell the others through the store what happened here, and hear what happened there."""
        if self._stop is not None and not self._told:
            self.store.set(_STOP, f"{self._stop[0]} {self._stop[1]} (rank {self.rank})")
            self._told = True
        if self._stop is None and self.store.check([_STOP]):
            code, reason = self.store.get(_STOP).decode().split(" ", 1)
            self._stop, self._told = (int(code), reason), True
        if self.rank > 0 and self.take_save_request():
            self.store.set(_SAVE, "")
        if self.rank == 0 and self.store.check([_SAVE]):
            self.store.delete_key(_SAVE)
            self._save = True
        if self.rank == 0 and self._pieces:
            self.store.set(_WRITTEN, str(self._pieces))
        elif self.store.check([_WRITTEN]):
            pieces = int(self.store.get(_WRITTEN))
            if pieces != self._pieces:
                self._pieces, self._beat = pieces, time.monotonic()
        if self.rank > 0 and self.store.check([_LEFT]):
            end(int(self.store.get(_LEFT)))
        if self.store.check([_HANG]) and not self.store.check([f"{_HANG}/{self.rank}"]):
            self._show_stacks(f"rank {self.rank}: stacks, because another rank hangs")
            self.store.set(f"{_HANG}/{self.rank}", "")

    def _die_of_hang(self):
        why = f"no progress for {self.hang_timeout:g} s (--hang_timeout): another process is gone "
        why += "or stuck, or a device is. Start again with --resume latest."
        self._show_stacks(f"rank {self.rank}: {why} Stacks of this process follow.")
        if self.store is not None:  # which may never answer
            asking = threading.Thread(target=self._ask_for_stacks, daemon=True)
            asking.start()
            asking.join(2 * _GRACE)
        self._tell_and_end("hung", why, 1)

    def _ask_for_stacks(self):
        """Give every rank the time to show its stacks too; name those that do not answer."""
        silent = set(range(self.world_size)) - {self.rank}
        with contextlib.suppress(Exception):  # a store that is gone: our own stacks must do
            self.store.set(f"{_HANG}/{self.rank}", "")
            self.store.set(_HANG, "")
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
            faulthandler.dump_traceback()


def _where_ids_mean_the_same() -> str:
    """Return a word for this machine, or this container. Its name would not do: machines made from
    one image may all have the same."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return os.uname().nodename


def is_alive(pid: int) -> bool:
    """Return whether a process of this id runs here; one that has ended, and only waits for its
    parent, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _state(pid) != "ended"


def _state(pid: int) -> str:
    """Return the kernel's word for a process; "running" where it cannot be asked."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            letter = file.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "running"
    return {"T": "stopped", "t": "stopped", "Z": "ended", "X": "ended"}.get(letter, "running")
