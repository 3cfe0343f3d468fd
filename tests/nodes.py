"""Machines of a cluster on this one: network namespaces on a bridge, each with a disk of its own.

Needs root and `ip`. One call makes the network, and closing it removes everything; the addresses
may be the same in several networks at a time, since nothing connects them.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import SCRIPT, SMALL, environment

# A machine that comes back finds the others only with the second (docs/SEVERAL_MACHINES.md).
SETTINGS = {"GLOO_SOCKET_IFNAME": "e0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
FLAGS = [*SMALL, "--total_batch_size", "384", "--sample_freq", "0", "--eval_freq", "0"]


class NotPermitted(Exception):
    """No namespaces can be made here."""


def ip(*words) -> None:
    done = subprocess.run(["ip", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise NotPermitted(f"ip {' '.join(map(str, words))}: {done.stderr.strip()}")


class Nodes:
    """Nodes 1 to `count`. shared: one disk for all, at the path that else is each one's own."""

    def __init__(self, folder: Path, count: int, shared: bool = False):
        self.folder, self.count, self.shared = folder, count, shared
        self.tag = f"{os.getpid() % 10000}{int(time.monotonic() * 100) % 1000:03d}"
        self.processes: dict[int, subprocess.Popen] = {}
        self.started = 0
        self.local = folder / "local"
        self.local.mkdir(parents=True, exist_ok=True)
        bridge = f"b{self.tag}"
        try:
            ip("link", "add", bridge, "type", "bridge")
            ip("link", "set", bridge, "up")
            for i in range(1, count + 1):
                name, link = f"n{self.tag}-{i}", f"v{self.tag}-{i}"
                ip("netns", "add", name)
                ip("link", "add", link, "type", "veth", "peer", "name", "e0", "netns", name)
                ip("link", "set", link, "master", bridge, "up")
                ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "e0")
                ip("-n", name, "link", "set", "e0", "up")
                ip("-n", name, "link", "set", "lo", "up")
                self.disk(i).mkdir(exist_ok=True)
        except (NotPermitted, FileNotFoundError) as error:
            self.close()
            raise NotPermitted(str(error)) from None

    def close(self) -> None:
        """Kill what still runs and remove the network."""
        for i, process in self.processes.items():
            for pid in [*self.workers(i), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        for i in range(1, self.count + 1):
            subprocess.run(["ip", "netns", "del", f"n{self.tag}-{i}"], capture_output=True)
        subprocess.run(["ip", "link", "del", f"b{self.tag}"], capture_output=True)

    def disk(self, i: int) -> Path:
        """What node i has at `self.local`."""
        return self.local if self.shared else self.folder / f"disk{i}"

    def start(self, i: int, *flags, nnodes=None, restarts=0, host=1) -> None:
        """The training program on node i, under torchrun, whose rendezvous node `host` has; what it
        says is in `said(i)`."""
        torchrun = (
            f"--nnodes {nnodes or self.count} --nproc_per_node 1 --max-restarts {restarts} "
            f"--rdzv_backend c10d --rdzv_endpoint 10.77.0.{host}:29400 --rdzv_id x --local_addr "
            f"10.77.0.{i} --rdzv_conf "
            # dead after 3 s; cut off it waits for the link (docs/SEVERAL_MACHINES.md)
            f"is_host={int(i == host)},last_call_timeout=5,keep_alive_interval=1,read_timeout=1200"
        )
        words = [sys.executable, "-m", "torch.distributed.run", *torchrun.split(), SCRIPT, *FLAGS]
        words += ["--tensorboard_dir", self.local / "runs", "--checkpoint_dir", self.local / "ck"]
        mount = "" if self.shared else f"mount --bind {self.disk(i)} {self.local}; "
        shell = f'mount --make-rprivate /; {mount}exec "$@"'
        enter = ["ip", "netns", "exec", f"n{self.tag}-{i}", "unshare", "-m", "bash", "-c", shell]
        self.started += 1
        with open(self.folder / f"node{i}.{self.started:03d}.log", "w") as log:
            self.processes[i] = subprocess.Popen(
                [*enter, "bash", *map(str, words), *map(str, flags)],
                env=environment() | SETTINGS,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def said(self, i: int) -> str:
        """Everything that was printed on node i."""
        return "".join(p.read_text() for p in sorted(self.folder.glob(f"node{i}.*.log")))

    def cut(self, i: int) -> None:
        ip("link", "set", f"v{self.tag}-{i}", "down")

    def heal(self, i: int) -> None:
        ip("link", "set", f"v{self.tag}-{i}", "up")

    def workers(self, i: int) -> list[int]:
        """Process ids of the training program on node i, without those that have ended but whose
        torchrun, which waits for the network, has not noticed."""
        process = self.processes[i]
        if process.poll() is not None:
            return []
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        with contextlib.suppress(OSError):
            pids = map(int, children.read_text().split())
            return [pid for pid in pids if Path(f"/proc/{pid}/cmdline").read_bytes()]
        return []

    def wait_for(self, condition, limit: float = 120) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, self.story()
            time.sleep(0.1)

    def wait_for_step(self, step: int, limit: float = 120) -> None:
        """Until any node has said that step `step`, or a later one, is done."""

        def reached() -> bool:
            said = "".join(self.said(i) for i in range(1, self.count + 1))
            steps = re.findall(r"step +([\d,]+)/", said)
            return any(int(s.replace(",", "")) >= step for s in steps)

        self.wait_for(reached, limit)

    def wait(self, limit: float = 240) -> dict[int, int]:
        """Until all have ended -> exit code of each node's torchrun."""
        self.wait_for(lambda: all(p.poll() is not None for p in self.processes.values()), limit)
        return {i: p.returncode for i, p in self.processes.items()}

    def story(self) -> str:
        return "\n".join(f"--- node {i}\n{self.said(i)[-6000:]}" for i in range(1, self.count + 1))
