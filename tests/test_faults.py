"""Faults in mid-run: skipped, healed, or stopped with the work saved and one clear sentence."""

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

import train_improved as ti
from checkpointing import run_folders
from conftest import ROOT, SCRIPT, SMALL, environment, run, start, write_data
from runtime import machine
from test_training import assert_same_training, checkpoint, logged, wait_for_step

FAULTY = ROOT / "tests" / "faulty.py"
QUIET = "--eval_freq 0 --sample_freq 0 --histogram_freq 0 --run_name a".split()
LENGTH = [*QUIET, "--max_steps", "20", "--checkpoint_freq", "5"]
FLAGS = [*LENGTH, "--use_tensorboard"]
LONG = [*QUIET, "--max_steps", "100000", "--checkpoint_freq", "0"]


def workers_of(process) -> list[int]:
    """Process ids of torchrun's workers by rank; by number they need not be, once those wrap."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)

    def rank(pid: int) -> int:
        return int(re.search(rb"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())[1])

    return sorted(map(int, found.stdout.split()), key=rank)


def faulty(kind, first, last, *flags, expect=0, **options):
    """The training program with a fault (see faulty.py), to its end -> (stdout, stderr)."""
    process = start_faulty(kind, first, last, *flags, **options)
    out, err = process.communicate(timeout=600)
    assert process.returncode == expect, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def start_faulty(kind, first, last, *flags, **options):
    return start(*flags, script=FAULTY, before=[kind, first, last], **options)


def saved_steps(folder, name="a") -> list[int]:
    return [c.step for c in run_folders.list_checkpoints(folder / "checkpoints" / name)]


def no_traceback_of_ours(err: str) -> bool:
    """torchrun prints one of its own when a worker fails or a signal comes."""
    return not re.search(r'File ".*src/\w+\.py", line', err)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("nproc", [None, 2])
def test_a_non_finite_step_never_touches_the_weights(tmp_path, data, kind, nproc):
    out, _ = faulty(kind, 8, 9, *FLAGS, cwd=tmp_path, data=data, nproc=nproc)
    assert "WARNING step 8: loss" in out and "update skipped; windows 56 to 63" in out
    scalars = logged(tmp_path / "runs" / "a")
    assert dict(scalars["Training/skipped_updates"])[7] == 0
    assert dict(scalars["Training/skipped_updates"])[20] == 2
    saved = torch.load(checkpoint(tmp_path, 20), weights_only=True)
    assert saved["state"]["skipped_updates"] == 2 and saved["state"]["rollbacks"] == 0
    for part in ("model", "optimizer"):
        assert all(t.isfinite().all() for t in tensors(saved[part]))
    # a skipped update is one that the optimizer never made
    assert {float(s["step"]) for s in saved["optimizer"]["state"].values()} == {18.0}
    assert scalars["Loss/train"][-1][1] < 10.5


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(value)


@pytest.mark.parametrize("nproc", [None, 2])
def test_nan_weights_roll_back_past_the_bad_data(tmp_path, data, nproc):
    flags = [*FLAGS, "--max_skips", "3"]
    out, _ = faulty("weights", 8, 8, *flags, cwd=tmp_path, data=data, nproc=nproc)
    assert "3 updates in a row were skipped" in out and "step_00000005.pt" in out
    scalars = logged(tmp_path / "runs" / "a")
    assert [s for s, _ in scalars["Loss/train"]] == list(range(1, 21)), "a clean timeline"
    assert all(math.isfinite(v) for _, v in scalars["Loss/train"])
    assert scalars["Training/rollbacks"][-1][1] == 1
    saved = torch.load(checkpoint(tmp_path, 20), weights_only=True)
    # back to step 5; steps 6 to 11 were drawn and judged, 12 was drawn: all of that is passed over
    assert saved["state"]["position"] == 8 * (20 + 7 - 0)
    assert all(t.isfinite().all() for t in tensors(saved["model"]))


def test_gives_up_with_an_explanation_after_some_rollbacks(tmp_path, data):
    flags = [*FLAGS, "--max_skips", "2", "--max_rollbacks", "2"]
    out, _ = faulty("loss", 8, 1000, *flags, cwd=tmp_path, data=data, expect=1)
    assert "after going back 2 times" in out and "--max_rollbacks" in out and "Traceback" not in out
    assert checkpoint(tmp_path, 5).exists() and not checkpoint(tmp_path, 10).exists()


@pytest.mark.parametrize("skip", [False, True])
def test_a_spike_is_reported_and_skipped_when_asked(tmp_path, data, skip):
    flags = "--max_steps 140 --eval_freq 0 --sample_freq 0 --checkpoint_freq 0 --run_name a".split()
    out, _ = faulty("spike", 135, 135, *flags, *(["--skip_spikes"] * skip), cwd=tmp_path, data=data)
    assert "WARNING step 135: loss" in out and "is a spike" in out
    state = torch.load(checkpoint(tmp_path, 140), weights_only=True)["state"]
    assert state["skipped_updates"] == skip
    assert max(state["recent_losses"]) < 20, "an outlier never enters the window"


def test_killed_in_an_evaluation_and_resumed_equals_uninterrupted(tmp_path, data):
    flags = (
        "--max_steps 12 --eval_freq 4 --checkpoint_freq 3 --use_tensorboard --run_name a".split()
    )
    for name in ("whole", "crash"):
        (tmp_path / name).mkdir()
    run(*flags, cwd=tmp_path / "whole", data=data)
    faulty("crash", 8, 8, *flags, cwd=tmp_path / "crash", data=data, expect=-9)
    run("--resume", "latest", "--use_tensorboard", cwd=tmp_path / "crash", small=False)
    assert_same_training(checkpoint(tmp_path / "whole", 12), checkpoint(tmp_path / "crash", 12))
    ours, theirs = (logged(tmp_path / name / "runs" / "a") for name in ("crash", "whole"))
    assert ours == theirs


def test_a_hang_ends_with_stacks_and_is_told(tmp_path, data):
    flags = "--max_steps 12 --eval_freq 4 --run_name a --hang_timeout 5".split()
    flags += ["--notify", 'cmd: (echo "$NOTIFY_EVENT, step $NOTIFY_STEP"; cat) > last']
    _, err = faulty("hang", 4, 4, *flags, cwd=tmp_path, data=data, expect=1)
    assert "no progress for 5 s (--hang_timeout)" in err and "faulty_validation_loss" in err
    told = (tmp_path / "last").read_text()
    assert told.startswith("hung, step 4\nno progress for 5 s (--hang_timeout)")


def test_a_rank_that_dies_ends_the_others_with_the_work_saved(tmp_path, data):
    flags = [*QUIET, "--max_steps", "20", "--checkpoint_freq", "0"]
    _, err = faulty("exit", 5, 5, *flags, cwd=tmp_path, data=data, nproc=2, expect=1)
    assert "rank 0: rank 1 has died, this process ends" in err and no_traceback_of_ours(err), err
    assert saved_steps(tmp_path) == [4]


def test_a_rank_that_is_stopped_ends_in_bounded_time_with_the_stacks_of_the_others(tmp_path, data):
    flags = [*LONG, "--total_batch_size", "384", "--hang_timeout", "4"]
    process = start(*flags, cwd=tmp_path, data=data, nproc=3)
    wait_for_step(process, 3)
    stopped = workers_of(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "does not answer" in line:
            os.kill(stopped, signal.SIGCONT)  # else torchrun waits 30 s before its kill -9
            break
    err = "".join(seen) + process.communicate(timeout=100)[1]
    assert process.returncode != 0
    assert f"(process {stopped}, stopped) does not answer" in err
    assert err.count("no progress for 4 s") + err.count("stacks, because another rank hangs") >= 2
    assert err.count("in forward_backward") >= 2


def test_data_that_only_one_rank_cannot_read_ends_all_with_the_work_saved(tmp_path, data):
    flags = [*QUIET, "--max_steps", "20", "--checkpoint_freq", "0"]
    out, err = faulty("data", 5, 0, *flags, cwd=tmp_path, data=data, nproc=2, expect=1)
    assert "rank 1: [Errno 5] Input/output error: 'a shard'" in err and no_traceback_of_ours(err)
    assert "a shard" in out and "saving and leaving" in out, out
    assert saved_steps(tmp_path) == [4]


def test_a_stop_is_honoured_within_an_evaluation(tmp_path, data):
    flags = "--max_steps 8 --eval_freq 4 --checkpoint_freq 0 --sample_freq 0 --run_name a".split()
    flags += ["--use_tensorboard"]
    process = start_faulty("slow", 0, 1, *flags, cwd=tmp_path, data=data)
    for line in process.stdout:
        if line == "evaluating\n":  # of step 0, in 16 pieces
            break
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "validation loss 1" not in out, out
    assert "stopped at step 0 of 8" in out and "nothing is saved yet" in out
    assert "--resume" not in out and saved_steps(tmp_path) == []


def test_stopped_in_the_last_evaluation_is_not_finished_yet(tmp_path, data):
    """All steps are done then, and only the evaluation is left to a resume."""
    flags = "--max_steps 8 --eval_freq 4 --checkpoint_freq 0 --sample_freq 0 --run_name a".split()
    flags += ["--use_tensorboard"]
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    run(*flags, cwd=tmp_path / "whole", data=data)
    process = start_faulty("slow", 8, 1, *flags, cwd=tmp_path / "stopped", data=data)
    for line in process.stdout:
        if line == "evaluating\n":  # of step 8, in 16 pieces
            break
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and saved_steps(tmp_path / "stopped") == [8]
    assert "stopped at step 8 of 8" in out and "finished" not in out and "--max_steps 8 " in out
    run("--resume", "latest", "--use_tensorboard", cwd=tmp_path / "stopped", small=False)
    assert_same_training(checkpoint(tmp_path / "whole", 8), checkpoint(tmp_path / "stopped", 8))
    ours, theirs = (logged(tmp_path / name / "runs" / "a") for name in ("stopped", "whole"))
    assert ours == theirs


@pytest.mark.parametrize("stop", [True, False])
def test_data_that_never_comes(tmp_path, data, stop):
    """A dead network disk: signals are honoured meanwhile, and without any it counts as a hang."""
    flags = [*QUIET, "--max_steps", "20", "--checkpoint_freq", "0", "--hang_timeout", "3"]
    process = start_faulty("stall", 5, 0, *flags, cwd=tmp_path, data=data)
    if stop:
        wait_for_step(process, 3)
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if stop else 1), err
    if not stop:
        assert "no progress for 3 s" in err and "next_batch" in err
    else:
        assert saved_steps(tmp_path)[-1] in (3, 4)


def test_validation_data_lost_in_mid_run_stops_with_the_work_saved(tmp_path):
    folder = write_data(tmp_path / "walk")
    flags = "--max_steps 8 --eval_freq 4 --sample_freq 0 --checkpoint_freq 0 --run_name a".split()
    process = start_faulty("slow", 4, 1, *flags, cwd=tmp_path, data=folder)
    for line in process.stdout:
        if line == "evaluating\n":  # of step 4, in 16 pieces
            break
    os.truncate(folder / "walk_val_000000.bin", 1100)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err
    assert "walk_val_000000.bin became shorter while it was in use" in out + err
    assert saved_steps(tmp_path) == [4]


def test_same_windows_in_the_same_steps_with_1_2_and_1_processes(tmp_path, data):
    flags = [*QUIET, "--checkpoint_freq", "3", "--warmup_steps", "2"]
    stages = {"3": None, "6": 2, "9": None}
    # In the middle of a line, too: another rank's may not have its line break yet.
    line = re.compile(r"windows (\d+) (\d+)((?: [0-9a-f]{8})+)")
    seen = {}
    for steps, nproc in stages.items():
        more = ["--max_steps", steps, "--resume", "auto"]
        out, _ = faulty("print", 0, 0, *flags, *more, cwd=tmp_path, data=data, nproc=nproc)
        for position, rank, hashes in line.findall(out):
            seen.setdefault(int(position), {})[int(rank)] = hashes.split()
    (tmp_path / "alone").mkdir()
    out, _ = faulty("print", 0, 0, *flags, "--max_steps", "9", cwd=tmp_path / "alone", data=data)
    expected = {int(position): hashes.split() for position, _, hashes in line.findall(out)}
    for position in range(8, 73, 8):
        together = [h for rank in sorted(seen[position]) for h in seen[position][rank]]
        assert together == expected[position] and len(set(together)) == 8


def test_folders_removed_in_mid_run_come_back(tmp_path, data):
    flags = "--max_steps 120 --eval_freq 0 --sample_freq 0 --checkpoint_freq 5 --run_name a".split()
    process = start(*flags, "--use_tensorboard", cwd=tmp_path, data=data)
    wait_for_step(process, 20)
    for name in ("checkpoints", "runs"):
        for _ in range(100):  # the run may write into it meanwhile
            with contextlib.suppress(OSError):
                shutil.rmtree(tmp_path / name)
                break
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert saved_steps(tmp_path) == [110, 115, 120], out
    assert logged(tmp_path / "runs" / "a")["Loss/train"][-1][0] == 120


def test_a_run_whose_folder_another_one_has_taken_writes_nothing_more(tmp_path, data):
    """A network file system gives the lock away while a machine is cut off for long."""
    flags = "--max_steps 5000 --eval_freq 0 --checkpoint_freq 1 --keep_checkpoints 5000".split()
    process = start(*flags, "--run_name", "a", "--sample_freq", 0, cwd=tmp_path, data=data)
    wait_for_step(process, 5)
    os.kill(process.pid, signal.SIGSTOP)
    taken = {"host": "node9", "pid": 77, "time": 1.79e9, "job": None}
    (tmp_path / "checkpoints" / "a" / ".lock").write_text(json.dumps(taken))
    before = saved_steps(tmp_path)
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 1, out
    assert "is now in use by process 77 on node9 (since " in out
    assert saved_steps(tmp_path) == before


@pytest.mark.parametrize("kind", ["terminal", "full disk"])
def test_output_that_goes_nowhere_does_not_cost_the_work(tmp_path, data, kind):
    """A terminal that is closed, which is also SIGHUP; a log file on a full disk, which is no
    reason to stop."""
    command = [sys.executable, SCRIPT, *SMALL, "--data_dir", data, *QUIET, "--checkpoint_freq", 0]
    steps = {"terminal": 100_000, "full disk": 30}[kind]
    command = [str(word) for word in [*command, "--max_steps", steps]]
    if kind == "full disk":
        with open("/dev/full", "w") as full:
            code = subprocess.run(
                command, cwd=tmp_path, env=environment(), stdout=full, stderr=full, timeout=600
            ).returncode
        assert code == 0 and saved_steps(tmp_path) == [30]
        return
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, command, environment())
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    seen = b""
    while b"loss" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert saved_steps(tmp_path), "nothing saved"


def test_nothing_listens_on_the_network(tmp_path, data):
    process = start(*LONG, "--use_tensorboard", cwd=tmp_path, data=data)
    wait_for_step(process, 2)
    sockets = set()
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        sockets |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(entry)))
    tables = [Path(f"/proc/{process.pid}/net/{name}") for name in ("tcp", "tcp6", "udp", "udp6")]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    assert sockets.isdisjoint(row[9] for row in rows)
    process.kill()
    process.communicate()


def test_workers_of_a_killed_torchrun_save_and_leave(tmp_path, data):
    process = start(*LONG, cwd=tmp_path, data=data, nproc=2)
    wait_for_step(process, 5)
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker survived its launcher"
        time.sleep(0.2)
    assert len(list((tmp_path / "checkpoints" / "a").glob("step_*.pt"))) == 1


def test_sigterm_to_torchrun_saves(tmp_path, data):
    process = start(*LONG, cwd=tmp_path, data=data, nproc=2)
    wait_for_step(process, 5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0  # torchrun's own, whatever its workers return
    assert "--resume latest" in out and "--run_name a" in out, err
    assert len(list((tmp_path / "checkpoints" / "a").glob("step_*.pt"))) == 1


def test_torchrun_restarts_go_on_from_the_latest_checkpoint(tmp_path, data):
    """No flag says so: torchrun --max-restarts alone brings the run back, with 2 processes; with
    --resume PATH it goes on from there once, and then from where it came to."""
    flags = "--max_steps 12 --eval_freq 0 --sample_freq 0 --checkpoint_freq 3".split()
    options = {"cwd": tmp_path, "data": data, "nproc": 2, "torchrun": ["--max-restarts=2"]}
    # Rank 1 exits in the 8th step of each attempt: the second attempt begins after step 7.
    out, err = faulty("exit", 8, 8, *flags, **options)
    assert out.count("resuming from") == 1 and "step_00000007.pt, step 7" in out, err
    assert "finished at step 12 of 12" in out
    (folder,) = (tmp_path / "checkpoints").iterdir()
    first = folder / "step_00000009.pt"
    flags[1] = "20"
    out, err = faulty("exit", 8, 8, *flags, "--resume", first, "--run_name", "b", **options)
    assert re.findall(r"resuming from .*, step (\d+)", out) == ["9", "16"], err
    assert "finished at step 20 of 20" in out


def test_a_restart_does_not_resume_what_the_first_attempt_was_refused(tmp_path, data):
    """A new run by the name of an old one: torchrun's second attempt is no resume either."""
    run(*LENGTH, cwd=tmp_path, data=data)
    before = (tmp_path / "checkpoints" / "a" / "step_00000020.pt").stat().st_mtime_ns
    flags = [*QUIET, "--max_steps", "30"]
    torchrun = ["--max-restarts=1"]
    _, err = run(*flags, cwd=tmp_path, data=data, nproc=1, torchrun=torchrun, expect=1)
    assert err.count("holds checkpoints up to step 20 already") == 2
    assert saved_steps(tmp_path)[-1] == 20
    assert (tmp_path / "checkpoints" / "a" / "step_00000020.pt").stat().st_mtime_ns == before


def test_a_disk_slower_than_the_hang_timeout_is_no_hang(tmp_path, data):
    """Rank 0 waits for the save before, and rank 1 for rank 0."""
    flags = [*QUIET, "--max_steps", "3", "--checkpoint_freq", "1", "--hang_timeout", "4"]
    out, err = faulty("disk", 15, 0, *flags, cwd=tmp_path, data=data, nproc=2)
    waited = re.search(r"still being written after ([\d.]+) s; step_00000003", out)
    assert waited and "no progress" not in err
    assert saved_steps(tmp_path) == [1, 2, 3]


def test_max_hours_saves_and_ends_with_0(tmp_path, data):
    flags = [*LONG, "--max_hours", "0.001"]  # 3.6 seconds
    out, _ = run(*flags, cwd=tmp_path, data=data)
    assert "--max_hours is over" in out
    step = int(re.search(r"stopped at step (\d+)", out)[1])  # 0 on a very slow machine
    assert saved_steps(tmp_path) == [step] * (step > 0)


def test_a_second_ctrl_c_leaves_at_once(tmp_path, data):
    process = start(*LONG, "--total_batch_size", "2097152", "--micro_batch_size", "65536",
                    cwd=tmp_path, data=data)  # fmt: skip
    for line in process.stdout:
        if line.strip().startswith("output"):
            break
    time.sleep(8)  # inside the first, very long micro-batch
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "leaving at once" in err


@pytest.fixture
def small_disk(tmp_path):
    """25 MiB of real disk; a checkpoint of the small model takes 9.7 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=25m", "tmpfs", str(disk)], capture_output=True
    )
    if done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_full_at_a_save_keeps_the_old_ones_and_goes_on(tmp_path, data, small_disk):
    """To the end, which is no success: the exit code says that the result is not saved."""
    flags = [*LENGTH, "--checkpoint_dir", small_disk, "--keep_checkpoints", "9"]
    out, err = run(*flags, cwd=tmp_path, data=data, expect=1)
    assert "step    20/20" in out and "Traceback" not in err
    names = sorted(p.name for p in (small_disk / "a").iterdir() if p.name != ".lock")
    assert names == ["step_00000005.pt", "step_00000010.pt"], (names, out)
    assert out.count("COULD NOT BE WRITTEN: No space left") == 2
    assert "step_00000020.pt is NOT SAVED (No space left on device): mend that" in out
    # There is room again: the lost steps are done again, and the end is saved.
    (small_disk / "a" / "step_00000005.pt").unlink()
    flags = ["--resume", "latest", "--checkpoint_dir", small_disk, "--keep_checkpoints", "1"]
    out, _ = run(*flags, cwd=tmp_path, small=False)
    assert "step_00000010.pt, step 10" in out and (small_disk / "a" / "step_00000020.pt").exists()


def test_a_disk_for_just_the_checkpoints_that_are_kept_is_enough(tmp_path, data, small_disk):
    """Two are kept and two fit: the one that each new one replaces is deleted first."""
    flags = [*LENGTH, "--checkpoint_dir", small_disk, "--keep_checkpoints", "2"]
    out, _ = run(*flags, cwd=tmp_path, data=data)
    assert out.count("which it replaces") == 2
    names = sorted(p.name for p in (small_disk / "a").iterdir() if p.name != ".lock")
    assert names == ["step_00000015.pt", "step_00000020.pt"]


def test_a_full_disk_at_a_resume_does_not_stop_it(tmp_path, data, small_disk):
    flags = [*QUIET, "--max_steps", "10", "--use_tensorboard", "--keep_checkpoints", "1"]
    flags += ["--checkpoint_dir", small_disk / "c", "--tensorboard_dir", small_disk / "r"]
    run(*flags, cwd=tmp_path, data=data)
    with open(small_disk / "ballast", "ab", buffering=0) as file, pytest.raises(OSError):
        while file.write(bytes(4096)):
            pass
    flags[flags.index("10")] = "12"
    out, err = run(*flags, "--resume", "latest", cwd=tmp_path, data=data, expect=1)
    assert out.count("WARNING cannot write in") == 2 and "config.json could not be written" in out
    assert "step    12/12" in out and "NOT SAVED" in out and "Traceback" not in err


def test_disk_full_at_a_log_write_does_not_hurt_training(tmp_path, data, small_disk):
    (small_disk / "ballast").write_bytes(bytes(25 * 2**20 - 8 * 4096))
    flags = [*LENGTH, "--use_tensorboard", "--tensorboard_dir", small_disk,
             "--histogram_freq", "4"]  # fmt: skip
    out, _ = run(*flags, cwd=tmp_path, data=data)
    assert "finished at step 20 of 20" in out
    assert out.count("No space left") == 1, out
    assert shutil.disk_usage(small_disk).free < 100_000 and os.listdir(tmp_path / "checkpoints/a")


def test_too_little_space_is_said_before_step_0(tmp_path, data, small_disk):
    (small_disk / "ballast").write_bytes(bytes(20_000_000))
    flags = [*LENGTH, "--checkpoint_dir", small_disk]
    out, _ = run(*flags, cwd=tmp_path, data=data, expect=1)  # and it was right
    assert out.index("GB free and a checkpoint takes") < out.index("step     1/20")
    assert out.index("of memory reserved for the copy") < out.index("step     1/20")


def test_too_little_space_for_logs_is_said_before_step_0(tmp_path, data, small_disk):
    (small_disk / "ballast").write_bytes(bytes(25 * 2**20 - 30 * 4096))
    flags = [*QUIET, "--max_steps", "4", "--use_tensorboard", "--tensorboard_dir", small_disk]
    out, _ = run(*flags, "--histogram_freq", "1", cwd=tmp_path, data=data)
    assert out.index("MB free, the run's logs need about") < out.index("step     1/4")


def test_bad_data_in_mid_run_stops_with_the_work_saved(tmp_path):
    folder = write_data(tmp_path / "walk", train=8_000_000)
    shard = folder / "walk_train_000000.bin"
    process = start(*LONG, cwd=tmp_path, data=folder)
    wait_for_step(process, 5)
    with shard.open("r+b") as file:  # rot, under the running program
        for at in range(1024, 16_000_000, 4096):
            file.seek(at)
            file.write(b"\xff\xff")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "65535" in out + err and shard.name in out + err
    assert len(list((tmp_path / "checkpoints" / "a").glob("step_*.pt"))) == 1


@pytest.mark.parametrize("nproc, micro, fits", [(None, 8, 2), (2, 2, 1)])
def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(
    tmp_path, data, nproc, micro, fits
):
    flags = [*FLAGS, "--micro_batch_size", micro]
    for folder in ("whole", "short"):
        (tmp_path / folder).mkdir()
    out, _ = faulty("memory", 6, fits, *flags, cwd=tmp_path / "short", data=data, nproc=nproc)
    while micro > fits:
        assert f"out of memory with --micro_batch_size {micro}; {micro // 2} from now on" in out
        micro //= 2
    run(*flags, cwd=tmp_path / "whole", data=data, nproc=nproc)
    for tag in ("Loss/train", "Gradient/norm_unclipped", "Training/tokens"):
        short, whole = (logged(tmp_path / f / "runs" / "a")[tag] for f in ("short", "whole"))
        for (step, a), (step_, b) in zip(short, whole, strict=True):
            assert step == step_ and a == pytest.approx(b, rel=1e-4), (tag, step)


@pytest.mark.parametrize("given, usual", [(["--micro_batch_size", 4], 4), ([], 8)])
def test_memory_that_ran_out_once_keeps_the_micro_batch_small_for_a_day(
    tmp_path, data, monkeypatch, given, usual
):
    """That run's, and that of one which began on this day; a resume later takes what is usual."""
    monkeypatch.setenv("XDG_CACHE_HOME", environment()["XDG_CACHE_HOME"])
    machine.cache_file().unlink(missing_ok=True)
    faulty("memory", 6, 2, *FLAGS, *given, cwd=tmp_path, data=data)
    run(*FLAGS, "--run_name", "same_day", cwd=tmp_path, data=data)

    def resumed(name: str) -> int:
        flags = {"resume": str(checkpoint(tmp_path, 20, name)), "dry_run": True}
        return ti.set_up(flags, ti.Distributed("cpu", 60.0))[0].cfg.micro_batch_size

    assert (resumed("a"), resumed("same_day")) == (2, 2)
    known = json.loads(machine.cache_file().read_text())
    old = {key: v | {"at": v["at"] - machine.SHORTAGE_SECONDS} for key, v in known.items()}
    machine.cache_file().write_text(json.dumps(old))
    assert (resumed("a"), resumed("same_day")) == (usual, 8)
