"""This process among the others: where they meet, what they agree on, what they send each other."""

import contextlib
import hashlib
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed

from checkpointing import run_folders
from runtime import launch, machine
from runtime.own_work import OwnWork
from runtime.peers import SILENCE, Peers

MINUTE = 60.0
MEETING = "train_improved/store"  # key of torchrun's store: the address of rank 0's
BEGUN = "train_improved/run"  # and: the name of the run, once its folders are claimed
# Flags that say where something is on this machine; all others must be the same everywhere.
OF_A_MACHINE = {
    *("checkpoint_dir", "config", "data_dir", "device", "hellaswag_file", "tensorboard_dir")
}


@contextlib.contextmanager
def saying_every_minute(text: str):
    """Print `text` every minute while the block waits."""
    done = threading.Event()

    def say():
        while not done.wait(MINUTE):
            print(text, file=sys.stderr, flush=True)

    threading.Thread(target=say, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        done.set()


class Distributed:
    """This process among the others, as torchrun's environment says; alone without it."""

    def __init__(self, device: str | None, hang_timeout: float):
        env = os.environ
        self.rank, self.world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        self.local_rank = int(env.get("LOCAL_RANK", 0))
        self.is_main = self.rank == 0
        # One process of each machine does what its disk needs. (Under Slurm's --gpus-per-task all
        # have LOCAL_RANK 0.)
        self.is_node_main = self.local_rank == 0 and env.get("SLURM_LOCALID", "0") == "0"
        self.device = machine.choose_device(device, self.local_rank, self.world_size)
        self.board = None  # torchrun's key-value store, which outlives its restarts
        self.peers = None
        self.work = OwnWork(self.device)
        self.starts = [launch.start_words(env)]  # of all machines, where they differ
        if self.is_main and (needs := launch.what_elastic_needs(env)):
            print(f"note: {needs}", file=sys.stderr, flush=True)
        timeout = timedelta(seconds=hang_timeout + 60)  # the supervisor's stacks come first
        if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # also of a process that is alone now
            address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
            with saying_every_minute(
                f"rank {self.rank} waits for torchrun's store at {address}:{port}"
            ):
                self.board = torch.distributed.TCPStore(
                    address, port, is_master=False, timeout=timeout
                )
        if self.world_size > 1:
            self._wait_for_name(os.environ["MASTER_ADDR"], timeout)
            with saying_every_minute(f"rank {self.rank} waits for the others to start"):
                store = self._meet(timeout)
            self._wait_for_all(store, timeout)
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout
            )
            self.peers = Peers(
                store, self.rank, self.world_size, min(SILENCE, hang_timeout), self.work
            )

    # -- Where they meet ---------------------------------------------------------------------------

    def _wait_for_name(self, address: str, timeout: timedelta) -> None:
        """Return when a machine's name can be resolved: a new node's may come after its processes.
        Raise ValueError after `timeout`."""
        begun, said = time.monotonic(), -MINUTE
        while True:
            try:
                socket.getaddrinfo(address, None)
                return
            except OSError as error:
                problem = f"MASTER_ADDR={address}: {error.strerror}"
            now = time.monotonic() - begun
            if now > timeout.total_seconds():
                raise ValueError(f"{problem}, for {now:.0f} s; start with torchrun, or unset it")
            if now - said > MINUTE:
                said = now
                print(f"rank {self.rank} waits: {problem}", file=sys.stderr, flush=True)
            time.sleep(0.2)

    def _meet(self, timeout: timedelta) -> torch.distributed.Store:
        """A key-value store of this attempt alone, in rank 0's process.

        torchrun's own outlives a restart: gloo would find there the addresses of processes that
        died, and no number that torchrun gives is the same on all nodes and new in each attempt. So
        rank 0 opens a store on a free port and publishes its address in torchrun's; the others
        read it again until a store answers that has not had a process of their rank yet.
        """
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        TCPStore = torch.distributed.TCPStore
        if self.board is None:  # srun, or an address of this attempt: nobody listens there yet
            return TCPStore(
                address, port, is_master=self.is_main, timeout=timeout, wait_for_workers=False
            )
        if self.is_main:
            store = TCPStore(address, 0, is_master=True, timeout=timeout, wait_for_workers=False)
            store.set("world_size", str(self.world_size))
            self.board.set(MEETING, f"{address} {store.port}")
            return store
        deadline = time.monotonic() + timeout.total_seconds()
        while time.monotonic() < deadline:
            address, port = self.board.get(MEETING).decode().split()
            try:
                store = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=5))
                world_size = int(store.get("world_size"))
                if world_size == self.world_size and store.add(f"here/{self.rank}", 1) == 1:
                    store.set_timeout(timeout)
                    return store
            except torch.distributed.DistError:  # of an attempt that is over
                pass
            time.sleep(0.2)
        raise ValueError(
            f"rank {self.rank} found no rank 0 at {address}: let --rdzv_endpoint name the machine "
            "whose address sorts first, see docs/SEVERAL_MACHINES.md"
        )

    def _wait_for_all(self, store: torch.distributed.Store, timeout: timedelta) -> None:
        """Return when every process is here; rank 0 says every minute which are missing."""
        store.set(f"started/{self.rank}", "")
        begun = said = time.monotonic()
        missing = list(range(self.world_size)) if self.is_main else []
        while missing := [rank for rank in missing if not store.check([f"started/{rank}"])]:
            now, ranks = time.monotonic(), ", ".join(map(str, missing[:8]))
            if now - begun > timeout.total_seconds():
                raise ValueError(
                    f"WORLD_SIZE={self.world_size}: rank {ranks} did not start within "
                    f"{now - begun:.0f} s; start all of them, or one process without torchrun's "
                    "variables (unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT)"
                )
            if now - said > MINUTE:
                said = now
                print(f"rank 0 waits for rank {ranks} to start", file=sys.stderr, flush=True)
            time.sleep(0.2)

    def begun(self, checkpoint_dir: Path) -> str | None:
        """Return the name of the run that an earlier attempt of this torchrun began, if any.

        Where torchrun keeps its store to itself (docs/SEVERAL_MACHINES.md), the folders say it.
        """
        if self.everywhere(lambda: self.board is None)[0]:
            names = self.everywhere(lambda: run_folders.run_of_job(checkpoint_dir))
            return next(filter(None, names), None)
        there = self.is_main and self.board.check([BEGUN])
        return self.on_main(lambda: self.board.get(BEGUN).decode() if there else None)

    def remember(self, run_name: str) -> None:
        """Rank 0: later attempts of this torchrun go on with this run."""
        if self.board is not None:
            self.board.set(BEGUN, run_name)

    # -- What they agree on ------------------------------------------------------------------------

    def on_main(self, function):
        """The plain value that `function` returns on rank 0, and what it finds wrong, on every
        rank (as ValueError)."""
        return self.on_rank(0, function)

    def on_rank(self, source: int, function):
        """The same of another rank."""
        value = error = None
        if self.rank == source:
            try:
                value = function()
            except (ValueError, OSError) as e:
                error = str(e)
        if self.world_size > 1:
            box = [value, error]
            torch.distributed.broadcast_object_list(box, src=source)
            value, error = box
        if error is not None:
            raise ValueError(error)
        return value

    def everywhere(self, function) -> list:
        """The plain values that `function` returns on each rank, on all of them; what it finds
        wrong on any is a ValueError on all."""
        value = error = None
        try:
            value = function()
        except (ValueError, OSError) as e:
            error = str(e)
        found = [(value, error)]
        if self.world_size > 1:
            found *= self.world_size
            torch.distributed.all_gather_object(found, (value, error))
        errors = {rank: error for rank, (_, error) in enumerate(found) if error is not None}
        for rank, error in errors.items():
            alone = 0 < len(errors) < self.world_size
            raise ValueError(f"{error} (on rank {rank})" if alone else error)
        return [value for value, _ in found]

    def agree(self, values: list[dict]) -> None:
        """ValueError that names a rank with other values than rank 0's; from `everywhere`."""
        first, *others = values
        for rank, theirs in enumerate(others, start=1):
            for name in first | theirs:
                ours, other = first.get(name, "none"), theirs.get(name, "none")
                if ours != other:
                    raise ValueError(
                        f"{name}: rank {rank} has {other} and rank 0 has {ours}; all machines must "
                        "run the same program with the same flags on the same data"
                    )

    def agree_to_start(self, given: dict) -> None:
        """Compare program and flags, before anything is done by them."""
        if self.world_size == 1:
            return
        flags = {f"--{name}": value for name, value in given.items() if name not in OF_A_MACHINE}
        flags |= {"PyTorch": torch.__version__, "the program (src/)": fingerprint()}
        self.agree(self.everywhere(lambda: flags))
        starts = self.everywhere(lambda: self.is_node_main and launch.start_words(os.environ))
        self.starts = [words for i, words in enumerate(starts) if words and words not in starts[:i]]

    # -- What they send each other -----------------------------------------------------------------

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over all processes, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.sum(torch.tensor(int(flag))))

    def leave(self) -> None:
        if self.world_size > 1:
            self.peers.close()
            torch.distributed.destroy_process_group()


def fingerprint() -> str:
    """Of the program: what is in the Python files of src/."""
    src, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(src.rglob("*.py")):
        digest.update(f"{path.relative_to(src)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
