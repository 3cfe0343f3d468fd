"""Several machines: network namespaces with disks of their own, real torchrun on each.

What random cuts, kills and returns do is in cut_nodes.py.
"""

import os
import signal

import pytest

from conftest import run
from nodes import FLAGS, Nodes, NotPermitted
from test_training import logged


@pytest.fixture
def nodes(tmp_path):
    try:
        network = Nodes(tmp_path / "nodes", 2)
    except NotPermitted as reason:
        pytest.skip(f"no network namespaces here: {reason}")
    yield network
    network.close()


def losses(folder, name="a") -> dict[int, float]:
    values = logged(folder / "runs" / name)["Loss/train"]
    steps = [step for step, _ in values]
    assert steps == list(range(1, len(steps) + 1))  # each once
    return dict(values)


def test_two_machines_with_disks_of_their_own(nodes, tmp_path, data):
    """They train as one process does, and resume although only one has the checkpoint."""
    flags = ["--data_dir", data, "--use_tensorboard", "--min_lr", "1e-2", "--warmup_steps", 2]
    run(*FLAGS, *flags, "--run_name", "a", "--max_steps", 12, cwd=tmp_path)
    for steps in (6, 12):
        for i in (1, 2):
            nodes.start(i, *flags, "--run_name", "a", "--max_steps", steps, "--resume", "auto")
        assert nodes.wait() == {1: 0, 2: 0}, nodes.story()
    assert losses(nodes.disk(1)) == pytest.approx(losses(tmp_path), rel=2e-5)
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
    """And SIGTERM on one machine of two saves."""
    flags = ["--data_dir", data, "--use_tensorboard", "--run_name", "a", "--max_steps", 5000]
    for i in (1, 2):
        nodes.start(i, *flags, nnodes="1:2", restarts=3)
    nodes.wait_for_step(3)
    (worker,) = nodes.workers(2)
    os.kill(worker, signal.SIGKILL)
    nodes.wait_for(lambda: "resuming from" in nodes.said(1))
    came_to = max(losses(nodes.disk(1)))
    nodes.wait_for(lambda: max(losses(nodes.disk(1))) > came_to + 3)
    assert "2 process(es)" in nodes.said(1).split("resuming from")[1]
    nodes.processes[2].send_signal(signal.SIGTERM)
    nodes.wait_for(lambda: "received SIGTERM (rank 1): saving and leaving" in nodes.said(1))
