"""Signals and hangs in real processes that have only the supervisor: no PyTorch, so they are quick.

What training makes of it is in test_training.py, test_faults.py and random_kills.py.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, environment

BEGIN = "import os, sys, time; from runtime import supervisor; supervisor.begin()\n"
READY = "print('ready', flush=True)\n"
# A training loop with nothing in it but what the script does about stops: 143 and so on.
LOOP = """
s = supervisor.Supervisor(hang_timeout={hang_timeout}, max_hours={max_hours})
print('ready', flush=True)
try:
    while True:
        s.poll({waiting})
        if s.take_save_request():
            print('saved', flush=True)
        time.sleep(0.01)
except supervisor.StopRequested as stop:
    print(stop, flush=True)
    s.leave(stop.code)
    sys.exit(stop.code)
"""


def loop(hang_timeout=60, max_hours=None, waiting=False) -> str:
    return BEGIN + LOOP.format(hang_timeout=hang_timeout, max_hours=max_hours, waiting=waiting)


def program(code: str, *before: str, ready=True, **options) -> subprocess.Popen:
    """Python running `code`, after the words `before`; returns when it says that it is ready."""
    env = environment() | {"PYTHONPATH": str(ROOT / "src")} | options.pop("env", {})
    process = subprocess.Popen(
        [*before, sys.executable, "-c", code],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        **options,
    )
    if ready:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def end(process, expect: int) -> tuple[str, str]:
    code = process.wait(timeout=60)
    out = process.stdout.read() if process.stdout else ""
    err = process.stderr.read()
    assert code == expect, (code, out, err)
    return out, err


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_before_training_a_signal_ends_at_once_without_a_traceback(name, code):
    process = program(BEGIN + READY + "time.sleep(60)")
    process.send_signal(signal.SIGUSR1)  # nothing to save: ignored
    process.send_signal(signal.Signals[name])
    assert end(process, code) == ("", "")


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_in_training_a_signal_is_noticed_at_the_next_poll(name, code):
    process = program(loop())
    process.send_signal(signal.Signals[name])
    assert end(process, code) == (f"received {name}\n", "")


def test_sigusr1_asks_for_a_save_and_nothing_else():
    process = program(loop())
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGTERM)
    end(process, 143)


def test_in_a_long_operation_the_first_sigint_is_answered_and_a_second_leaves_at_once():
    """As in a backward pass of a large model on a CPU: until it ends no handler of Python runs."""
    long = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**8)"
    process = program(BEGIN + "s = supervisor.Supervisor()\n" + READY + long)
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)  # the same Ctrl-C, by way of torchrun
    assert process.stderr.readline() == "\n"
    assert "received SIGINT: waiting for the pass under way" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "leaving at once" in end(process, 130)[1]


def test_under_nohup_a_closed_terminal_changes_nothing():
    for code in (loop(), BEGIN + READY + "time.sleep(60)"):
        process = program(code, "nohup", stdin=subprocess.DEVNULL)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        end(process, 143)


def background(code: str, folder: Path, env: dict) -> tuple[subprocess.Popen, int]:
    """A program started with & by a shell that waits; the shell and the program's id."""
    (folder / "code.py").write_text(code)
    (folder / "out.txt").touch()
    command = f"{sys.executable} code.py > out.txt 2>&1 & echo $!; read line"
    shell = subprocess.Popen(
        ["sh", "-c", command], cwd=folder, env=environment() | env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    pid = int(shell.stdout.readline())
    wait_until(lambda: "ready" in (folder / "out.txt").read_text())
    return shell, pid


def wait_until(condition, limit=60) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("launcher", [False, True])
def test_the_end_of_the_parent_matters_only_if_it_is_torchrun(tmp_path, launcher):
    env = {"PYTHONPATH": str(ROOT / "src")} | ({"TORCHELASTIC_RUN_ID": "x"} if launcher else {})
    shell, pid = background(loop(), tmp_path, env)
    shell.kill()
    shell.communicate()
    said = tmp_path / "out.txt"
    if launcher:
        wait_until(lambda: "the process that started this one is gone" in said.read_text())
        return
    time.sleep(1)
    assert said.read_text() == "ready\n"
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: "received SIGTERM" in said.read_text())


def test_max_hours_counts_from_the_start_of_the_program():
    code = loop(max_hours=2 / 3600).replace("s = super", "time.sleep(2)\ns = super")
    assert end(program(code), 0)[0] == "--max_hours is over\n"


def test_a_thread_that_is_at_work_keeps_a_waiting_process_from_ending():
    """The last checkpoint, larger than the disk can take within --hang_timeout."""
    code = BEGIN + (
        "import threading\n"
        "s = supervisor.Supervisor(hang_timeout=1)\n"
        "write = lambda: [(time.sleep(0.1), s.written()) for _ in range(30)]\n"
        "writer = threading.Thread(target=write)\n"
        "writer.start(); writer.join(); s.leave(0)\n"
    )
    process = program(code, ready=False)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 0


@pytest.mark.parametrize("waiting", [False, True])
def test_no_progress_ends_with_stacks(waiting):
    """Stuck in one place, or polling while what it waits for never comes."""
    code = loop(hang_timeout=1, waiting=True)
    if not waiting:
        code = code.replace("time.sleep(0.01)", "time.sleep(60)")
    _, err = end(program(code), 1)
    assert "no progress for 1 s (--hang_timeout)" in err and "Current thread" in err
    assert 'File "<string>"' in err


def test_output_that_goes_nowhere_does_not_stop_training():
    count = "for i in range(3000):\n    print('a line of output', i, flush=i % 2)\n"
    count += "print('done', file=sys.stderr)\n"
    process = program(BEGIN + count, ready=False)
    process.stdout.close()  # a pipe to a program that ended
    err = process.stderr.read()
    assert process.wait(timeout=60) == 0 and err == "done\n"
    with open("/dev/full", "w") as full:  # a log file on a full disk
        assert end(program(BEGIN + count, ready=False, stdout=full), 0)[1] == "done\n"


def test_a_terminal_that_knows_only_ascii():
    env = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    out, _ = end(program(BEGIN + "print('caf\\u00e9')", ready=False, env=env), 0)
    assert out == "caf\\xe9\n"
