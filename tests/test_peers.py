"""A process that dies or is stopped while all others wait for it in calls that never return.

That is how NCCL waits. Real processes of one machine, which have met as a run's do, and then are in
libc's pause().
"""

import os
import re
import signal
import subprocess
import sys

import pytest

from conftest import ROOT, environment

MEMBERS = """
import ctypes, os, socket, sys
from runtime import distributed, supervisor
distributed.SILENCE, supervisor._LAST_WAIT = float(sys.argv[1]), 1.0

def member(rank):
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    dist = distributed.Distributed("cpu", 900.0)
    supervisor.Supervisor(rank, dist.world_size, dist.peers, 900.0)
    os.write(1, b"ready\\n")
    while True:
        ctypes.CDLL(None).pause()

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ["MASTER_PORT"] = str(free.getsockname()[1])
pids = [os.fork() or member(rank) for rank in range(4)]
os.write(1, f"{pids}\\n".encode())
for _ in pids:
    pid, status = os.wait()
    os.write(1, f"{pids.index(pid)} {os.waitstatus_to_exitcode(status)}\\n".encode())
"""


@pytest.mark.parametrize(
    "victim, number", [(0, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGSTOP)]
)
def test_one_of_four_is_gone(victim, number):
    """All others end, and name it if they have noticed it themselves."""
    silence = "60" if number == signal.SIGKILL else "2"
    process = subprocess.Popen(
        [sys.executable, "-c", MEMBERS, silence],
        env=environment()
        | {"PYTHONPATH": str(ROOT / "src"), "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = sorted(process.stdout.readline() for _ in range(5))
    pids = [int(pid) for pid in re.findall(r"\d+", said[0])]
    os.kill(pids[victim], number)
    codes = {}
    while len(codes) < 4:
        if len(codes) == 3 and victim not in codes:
            os.kill(pids[victim], signal.SIGKILL)
        rank, code = process.stdout.readline().split()
        codes[int(rank)] = int(code)
    err = process.communicate(timeout=30)[1]
    assert codes == dict.fromkeys(range(4), 1) | {victim: -9}, err
    if number == signal.SIGSTOP:  # only rank 0 watches, and its end is the others'
        assert f"rank 0: rank {victim} has been silent for 2 s" in err
        return
    for rank in {0, 1, 2, 3} - {victim}:
        assert f"rank {rank}: rank {victim} has died" in err
