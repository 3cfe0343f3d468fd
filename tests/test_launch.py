"""Slurm's environment, as srun sets it, and two real processes that find each other by it."""

import signal
import socket
import subprocess
import sys

import pytest

from conftest import ROOT, SCRIPT, SMALL, environment, run
from runtime import launch
from test_training import checkpoint, logged

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[007-008,011]",
}


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("gpu[007-008,011]", "gpu007"),
        ("gpu[3,5-9],login", "gpu3"),
        ("tux[12]", "tux12"),
        ("rack[0-1]node[01-16],x", "rack0node01"),
        ("node[1-2]-ib,other[3-4]", "node1-ib"),
    ],
)
def test_first_host(nodes, host):
    assert launch.first_host(nodes) == host


def adopted(**changes) -> dict:
    """The environment after adopt_slurm, started from STEP; None removes a variable."""
    env = {k: v for k, v in (STEP | changes).items() if v is not None}
    launch.adopt_slurm(env)
    return env


def test_a_step_of_several_tasks():
    env = adopted()
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("5", "8", "1")
    assert env["MASTER_ADDR"] == "gpu007"
    port = int(env["MASTER_PORT"])
    assert 15_000 <= port < 30_000
    assert adopted(SLURM_PROCID="0")["MASTER_PORT"] == str(port)
    assert adopted(SLURM_STEP_ID="1")["MASTER_PORT"] != str(port)
    assert adopted(SLURM_JOB_ID="4712")["MASTER_PORT"] != str(port)


def test_a_step_on_a_part_of_the_jobs_nodes():
    assert adopted(SLURM_STEP_NODELIST="gpu011")["MASTER_ADDR"] == "gpu011"


def test_what_the_user_exported_stays():
    env = adopted(MASTER_ADDR="10.0.0.1", MASTER_PORT="29501")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["RANK"]) == ("10.0.0.1", "29501", "5")


@pytest.mark.parametrize(
    "visible, local_rank", [(None, "1"), ("0,1", "1"), ("3", "0"), ("", "1"), ("GPU-5f", "0")]
)
def test_a_process_that_sees_one_gpu_uses_that(visible, local_rank):
    assert adopted(CUDA_VISIBLE_DEVICES=visible)["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize(
    "changes",
    [
        dict.fromkeys(STEP),  # no Slurm at all
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},  # torchrun under srun
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},
        {"SLURM_STEP_ID": None, "SLURM_STEP_NUM_TASKS": None},  # the batch script itself
        {"SLURM_STEP_ID": "4294967291"},  # the same, where it is a step with a number
        {"SLURM_STEP_ID": "4294967290"},  # the shell of salloc
    ],
)
def test_everything_else_is_left_alone(changes):
    env = {k: v for k, v in (STEP | changes).items() if v is not None}
    before = dict(env)
    launch.adopt_slurm(env)
    assert env == before


def test_a_shell_in_a_step_is_no_task_of_it(capfd):
    """srun --ntasks=8 --pty bash, and then python typed there."""
    before = STEP | {"SLURM_PTY_PORT": "40001"}
    assert adopted(SLURM_PTY_PORT="40001") == before
    assert "one process trains" in capfd.readouterr().err


@pytest.mark.parametrize(
    "layout, node, here", [("4(x2)", "1", 4), ("4(x2),3", "2", 3), ("8", "0", 8), ("", "0", None)]
)
def test_tasks_of_this_node(layout, node, here):
    env = adopted(SLURM_TASKS_PER_NODE=layout, SLURM_NODEID=node)
    assert env.get("LOCAL_WORLD_SIZE") == (here and str(here))


LEFT_OVER = {
    "WORLD_SIZE=2 RANK=0": "MASTER_ADDR",
    "WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost": "MASTER_PORT",
    "WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=tcp://10.0.0.1:29500": "MASTER_PORT=tcp",
    "WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1": "no RANK",
    "WORLD_SIZE=two RANK=0": "WORLD_SIZE=two",
    "WORLD_SIZE=2 RANK=2 MASTER_ADDR=localhost MASTER_PORT=1": "RANK=2",
    "RANK=1": "RANK=1",
    "LOCAL_RANK=3": "LOCAL_RANK=3",
    "LOCAL_WORLD_SIZE=x TORCHELASTIC_RUN_ID=x": "LOCAL_WORLD_SIZE=x",
    "TORCHELASTIC_USE_AGENT_STORE=True WORLD_SIZE=1 RANK=0": "STORE=True in the",
    "SLURM_STEP_ID=0 SLURM_NTASKS=4(x2) SLURM_PROCID=0": "SLURM_NTASKS=4(x2)",
}


@pytest.mark.parametrize("variables, words", LEFT_OVER.items())
def test_variables_left_over_are_a_sentence(variables, words):
    env = dict(pair.split("=", 1) for pair in variables.split())
    with pytest.raises(ValueError) as caught:
        launch.adopt_slurm(env)
        launch.check_environment(env)
    assert words in str(caught.value) and "unset" in str(caught.value)


@pytest.mark.parametrize("variables", ["WORLD_SIZE= RANK=", "CUDA_VISIBLE_DEVICES=", "RANK=0"])
def test_empty_variables_count_as_not_set(variables):
    env = dict(pair.split("=", 1) for pair in variables.split())
    launch.adopt_slurm(env)
    launch.check_environment(env)
    assert not env.get("WORLD_SIZE")


@pytest.mark.parametrize(
    "torchrun, variables, words",
    [
        ("--nnodes=1:3", {}, ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "--rdzv_id=NAME"]),
        ("--nnodes 1:3", {"TORCHELASTIC_RUN_ID": "x"}, ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]),
        ("--nnodes=1:3", {"TORCHELASTIC_RUN_ID": "x"}, ["--rdzv_conf=read_timeout=1200"]),
        ("--nnodes=2", {}, []),
    ],
)
def test_what_elastic_machines_need_is_said(torchrun, variables, words):
    child = "import os; from runtime import launch; print(launch.what_elastic_needs(os.environ))"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    env = environment() | {"PYTHONPATH": str(ROOT / "src"), "TORCHELASTIC_RUN_ID": "none"}
    command = [sys.executable, "-c", code, "torchrun", *torchrun.split(), "train_improved.py"]
    said = subprocess.run(command, env=env | variables, capture_output=True, text=True).stdout
    assert bool(said.strip()) == bool(words)
    for word in words:
        assert word in said
    assert words or "--rdzv_id" not in said


def test_a_torn_environment_is_an_error():
    with pytest.raises(ValueError, match="SLURM_LOCALID"):
        adopted(SLURM_LOCALID=None)


def test_srun_trains_like_one_process(tmp_path, data):
    """Two processes with nothing but what srun sets (a local one: its host is this one)."""
    flags = "--max_steps 6 --eval_freq 3 --sample_freq 0 --use_tensorboard".split()
    run(*flags, "--run_name", "one", cwd=tmp_path, data=data)
    slurm = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NODELIST": "localhost"}
    command = [sys.executable, str(SCRIPT), *SMALL, "--data_dir", str(data), *flags]
    processes = [
        subprocess.Popen(
            [*command, "--run_name", "two"],
            cwd=tmp_path,
            env=environment() | slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (out, err), (silent, _) = (p.communicate(timeout=300) for p in processes)
    assert [p.returncode for p in processes] == [0, 0], err
    assert "Slurm step 4711.0: 2 processes, meeting at localhost:" in err
    assert "2 process(es)" in out and silent == ""
    one, two = (logged(tmp_path / "runs" / name)["Loss/train"] for name in ("one", "two"))
    assert [v for _, v in two] == pytest.approx([v for _, v in one], rel=1e-5)
    assert checkpoint(tmp_path, 6, "two").exists()


@pytest.mark.parametrize("rank, host", [(0, "127.0.0.1"), (1, "127.0.0.1"), (1, "no.such.host")])
def test_a_wait_for_others_says_so_and_ends_at_a_signal(tmp_path, data, rank, host):
    """A process of two whose peer never comes, as with variables left over in a shell."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    env |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    program = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
    program += "from runtime import supervisor; supervisor.begin()\n"
    program += "import train_improved as ti; from runtime import distributed\n"
    program += "distributed.MINUTE = 0.3; supervisor.end(ti.main())"
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *SMALL, "--data_dir", str(data)],
            cwd=tmp_path,
            env=environment() | env | {"MASTER_PORT": str(port + i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(len(signals))
    ]
    for number, process in zip(signals, processes, strict=True):
        waits = "rank 0 waits for rank 1 to start" if rank == 0 else "rank 1 waits for the others"
        waits = waits if host == "127.0.0.1" else f"rank 1 waits: MASTER_ADDR={host}: "
        assert any(waits in line for line in iter(process.stderr.readline, ""))
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number
