"""Heartbeats: every process notices within two minutes that another one, or its machine, is gone.

gloo and NCCL notice a connection that was closed; a cable that was pulled, a machine without power
or a process that was stopped they wait for until their time-out, and so does a call to the store.
So the store is talked to in one thread, which may be stuck in a call, and watched by another.
"""

import contextlib
import os
import threading
import time

from basics import terminal
from runtime.own_work import OwnWork
from runtime.supervisor import end, is_alive

SILENCE = 75.0  # seconds without a heartbeat after which a process counts as lost
TICK = 0.2  # seconds between looks into the store
BEAT = 1.0  # seconds between heartbeats
LEFT = b"left"  # instead of a heartbeat: that process has ended as it should


class Peers:
    """The other processes of a run, from the moment they have met until this one leaves.

    Rank 0, in whose process the store is, watches all others, and they watch rank 0. A process of
    `pids` ({rank: id}, of this machine) that ends is noticed at once, by all. `exchange()` is
    called in the talking thread at every tick. `on_lost(who)` is called once, in the watching
    thread, with a sentence; until training has begun it ends this process.
    """

    def __init__(self, store, rank: int, world_size: int, limit: float, work: OwnWork):
        self.store, self.rank, self.limit, self.work = store.clone(), rank, limit, work
        self.pids: dict[int, int] = {}
        self.lost: str | None = None
        self.exchange = lambda: None
        self.on_lost = self._end
        others = range(1, world_size) if rank == 0 else [0]
        self._silent = dict.fromkeys(others, 0.0)  # seconds, by rank
        self.heard: dict[int, bytes] = {}  # last heartbeats: number, seconds of own work, host
        self._beat(0)  # who reads it waits until it is there
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("peers talk", self._talk), ("peers watch", self._watch))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Say that this process leaves, and stop watching."""
        self._closed.set()
        for thread in self._threads:
            thread.join(2.0)  # it may be stuck in a call that never returns

    def work_by_process(self) -> dict[str, float]:
        """Return {process: seconds it works by itself in a step} on rank 0; {} until all said."""
        found = {f"rank 0 on {os.uname().nodename}": self.work.median}
        for rank, beat in list(self.heard.items()):
            if beat != LEFT:
                _, seconds, host = beat.decode().split(" ", 2)
                found[f"rank {rank} on {host}"] = float(seconds)
        return found if all(found.values()) else {}

    def _end(self, who: str) -> None:
        terminal.print_error(f"{who}, while this process was starting")
        end(1)

    def _beat(self, number: int) -> None:
        work = f"{self.work.median:.4g} {os.uname().nodename}"
        self.store.set(f"beat/{self.rank}", f"{number} {work}")

    def _talk(self) -> None:
        beats, next_beat = 0, 0.0
        try:
            while not self._closed.wait(TICK):
                ended = [rank for rank, pid in self.pids.items() if not is_alive(pid)]
                if 0 in ended:
                    raise ConnectionError  # the store has gone with it
                if time.monotonic() >= next_beat:
                    beats, next_beat = beats + 1, time.monotonic() + BEAT
                    self._beat(beats)
                    ranks = list(self._silent)
                    values = self.store.multi_get([f"beat/{rank}" for rank in ranks])
                    for rank, value in zip(ranks, values, strict=True):
                        if value != self.heard.get(rank):
                            self.heard[rank], self._silent[rank] = value, 0.0
                        if value == LEFT:
                            del self._silent[rank]
                self.exchange()  # which ends this process too if the run is over
                for rank in ended:
                    if self.store.get(f"beat/{rank}") != LEFT:
                        self._silent[rank] = float("inf")
                    del self.pids[rank]
            self.store.set(f"beat/{self.rank}", LEFT)
        except Exception:  # the connection was closed, and rank 0's process with it
            self._silent = {0: float("inf")}

    def _watch(self) -> None:
        last = time.monotonic()
        while self.lost is None and not self._closed.wait(TICK):
            now = time.monotonic()
            passed, last = min(now - last, 10 * TICK), now  # more: this process itself was stopped
            for rank, seconds in list(self._silent.items()):
                with contextlib.suppress(KeyError):
                    self._silent[rank] += passed
                if seconds > self.limit and not self._closed.is_set():
                    silent = f"has been silent for {self.limit:g} s"
                    self.lost = f"rank {rank} {'has died' if seconds == float('inf') else silent}"
                    self.on_lost(self.lost)
                    break
