"""Several machines: network namespaces with disks of their own, real torchrun on each.

What random cuts, kills and returns do is in cut_nodes.py.
"""

import os
import re
import signal

import pytest

from conftest import run
from nodes import FLAGS, Nodes, NotPermitted
from test_training import logged

SAME = "--use_tensorboard --run_name a --max_lr 1e-3 --min_lr 1e-3 --warmup_steps 2".split()


@pytest.fixture
def nodes(tmp_path, request):
    """2 machines with disks of their own, or what `request.param` says."""
    try:
        network = Nodes(tmp_path / "nodes", **getattr(request, "param", {"count": 2}))
    except NotPermitted as reason:
        pytest.skip(f"no network namespaces here: {reason}")
    yield network
    network.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """Losses of a run by one process, whose first steps are those of any shorter one."""
    folder = tmp_path_factory.mktemp("alone")
    run(*FLAGS, "--data_dir", data, *SAME, "--max_steps", 60, cwd=folder)
    return losses(folder)


def losses(folder, name="a") -> dict[int, float]:
    values = logged(folder / "runs" / name)["Loss/train"]
    steps = [step for step, _ in values]
    assert steps == list(range(1, len(steps) + 1))  # each once
    return dict(values)


def sigterm(nodes, i: int) -> None:
    """SIGTERM for torchrun of node i; rank 0, on node 1, says so and has the file of its step."""
    before = len(nodes.said(1))
    nodes.processes[i].send_signal(signal.SIGTERM)
    who = "" if i == 1 else r" \(rank 1\)"
    pattern = rf"(?s)received SIGTERM{who}: saving and leaving.*?stopped at step ([\d,]+) of"
    nodes.wait_for(lambda: re.search(pattern, nodes.said(1)[before:]))
    step = int(re.search(pattern, nodes.said(1)[before:])[1].replace(",", ""))
    assert (nodes.disk(1) / "ck" / "a" / f"step_{step:08}.pt").exists(), nodes.story()


def test_two_machines_with_disks_of_their_own(nodes, data, alone):
    """They train as one process does, and resume although only one has the checkpoint."""
    for steps in (6, 12):
        for i in (1, 2):
            nodes.start(i, "--data_dir", data, *SAME, "--max_steps", steps, "--resume", "auto")
        assert nodes.wait() == {1: 0, 2: 0}, nodes.story()
    assert losses(nodes.disk(1)) == pytest.approx({i: alone[i] for i in range(1, 13)}, rel=2e-5)
    assert "step_00000006.pt, step 6" in nodes.said(1)
    assert not (nodes.disk(2) / "ck").exists()
    for i in (1, 2):  # the command for each machine
        assert f"--local_addr 10.77.0.{i} --rdzv_conf is_host={2 - i}" in nodes.said(1)


def test_machines_that_differ_are_named_before_step_1(nodes, data):
    for i in (1, 2):
        nodes.start(i, "--data_dir", data, "--run_name", "a", "--max_lr", f"{i}e-3")
    assert nodes.wait() == {1: 1, 2: 1}, nodes.story()
    assert "error: --max_lr: rank 1 has 0.002 and rank 0 has 0.001" in nodes.said(1)
    assert "step     1/" not in nodes.said(1)


def test_a_worker_that_is_killed_comes_back_on_its_machine(nodes, data):
    """And SIGTERM on the machine without rank 0 saves."""
    flags = ["--data_dir", data, *SAME, "--max_steps", 5000, "--checkpoint_freq", 0]
    for i in (1, 2):
        nodes.start(i, *flags, nnodes="1:2", restarts=3)
    nodes.wait_for_step(3)
    (worker,) = nodes.workers(2)
    os.kill(worker, signal.SIGKILL)
    nodes.wait_for(lambda: "resuming from" in nodes.said(1))
    came_to = max(losses(nodes.disk(1)))
    nodes.wait_for(lambda: max(losses(nodes.disk(1))) > came_to + 3)
    assert "2 process(es)" in nodes.said(1).split("resuming from")[1]
    sigterm(nodes, 2)


@pytest.mark.parametrize("nodes", [{"count": 3, "shared": True}], indirect=True)
def test_three_machines_one_is_lost_and_comes_back(nodes, data, alone):
    """Whoever is there goes on by itself, on the same batches; SIGTERM to rank 0's saves."""
    flags = ["--data_dir", data, *SAME, "--max_steps", 5000, "--checkpoint_freq", 5]
    for i in (1, 2, 3):
        nodes.start(i, *flags, nnodes="1:3", restarts=5)
    nodes.wait_for_step(10)
    for pid in (nodes.processes[3].pid, *nodes.workers(3)):
        os.kill(pid, signal.SIGKILL)
    nodes.wait_for(lambda: "2 process(es)" in nodes.said(1))
    nodes.start(3, *flags, nnodes="1:3", restarts=5)
    nodes.wait_for(lambda: nodes.said(1).count("3 process(es)") == 2)
    nodes.wait_for(lambda: max(losses(nodes.local)) > len(alone))
    sigterm(nodes, 1)
    found = losses(nodes.local)
    assert {step: found[step] for step in alone} == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("nodes", [{"count": 2, "shared": True}], indirect=True)
def test_after_a_partition_only_one_side_writes(nodes, data, alone):
    """Rank 0, which writes, is cut off from the rendezvous, with which the other side goes on."""
    flags = ["--data_dir", data, *SAME, "--max_steps", 60, "--checkpoint_freq", 5]
    for i in (1, 2):
        nodes.start(i, *flags, "--hang_timeout", 5, nnodes="1:2", restarts=5, host=2)
    nodes.wait_for_step(10)
    nodes.cut(1)
    nodes.wait_for(lambda: "| loss" in nodes.said(2))  # it is rank 0 now
    assert not nodes.workers(1), nodes.story()  # the first writer has ended
    nodes.heal(1)
    nodes.wait_for(lambda: nodes.processes[2].poll() is not None)
    assert nodes.processes[2].returncode == 0, nodes.story()
    assert losses(nodes.local) == pytest.approx(alone, rel=1e-4)
