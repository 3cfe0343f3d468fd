"""Faults in mid-run: skipped, healed, or stopped with the work saved and one clear sentence."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT, environment, run, start
from test_training import assert_same_training, checkpoint, logged, wait_for_step

FAULTY = ROOT / "tests" / "faulty.py"
QUIET = "--eval_freq 0 --sample_freq 0 --histogram_freq 0 --run_name a".split()
LENGTH = [*QUIET, "--max_steps", "20", "--checkpoint_freq", "5"]
FLAGS = [*LENGTH, "--use_tensorboard"]


def faulty(kind, first, last, *flags, cwd, data, **options):
    """The training program with a fault in steps first..last (see faulty.py)."""
    process_flags = [kind, first, last]
    script = FAULTY
    command = [sys.executable]
    nproc = options.pop("nproc", None)
    if nproc:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    from conftest import SMALL

    command += [script, *process_flags, *SMALL, "--data_dir", data, *flags]
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment(), capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    expect = options.pop("expect", 0)
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


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


def test_a_hang_ends_with_stacks(tmp_path, data):
    flags = "--max_steps 12 --eval_freq 4 --run_name a --hang_timeout 5".split()
    _, err = faulty("hang", 4, 4, *flags, cwd=tmp_path, data=data, expect=1)
    assert "no progress for 5 s (--hang_timeout)" in err and "faulty_validation_loss" in err


def test_a_rank_that_exits_ends_the_others(tmp_path, data):
    began = time.monotonic()
    faulty("exit", 5, 5, *FLAGS, cwd=tmp_path, data=data, nproc=2, expect=1)
    assert time.monotonic() - began < 120


def workers_of(process) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


LONG = [*QUIET, "--max_steps", "100000", "--checkpoint_freq", "0"]


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
    assert "--resume latest --run_name a" in out, err
    assert len(list((tmp_path / "checkpoints" / "a").glob("step_*.pt"))) == 1


def test_torchrun_restarts_go_on_from_the_latest_checkpoint(tmp_path, data):
    """No flag says so: torchrun --max-restarts alone brings the run back, with 2 processes."""
    from conftest import SMALL

    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=2".split()
    command = [sys.executable, *torchrun, FAULTY, "exit", "8", "8", *SMALL, "--data_dir", data]
    command += "--max_steps 12 --eval_freq 0 --sample_freq 0 --checkpoint_freq 3".split()
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240
    )
    # Rank 1 exits in the 8th step of each attempt: the second attempt begins after step 6.
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resuming from") == 1 and "step_00000006.pt, step 6" in done.stdout
    assert "finished at step 12 of 12" in done.stdout


def test_max_hours_saves_and_ends_with_0(tmp_path, data):
    flags = [*LONG, "--max_hours", "0.001"]  # 3.6 seconds
    out, _ = run(*flags, cwd=tmp_path, data=data)
    assert "--max_hours is over" in out and "stopped at step" in out
    assert len(list((tmp_path / "checkpoints" / "a").glob("step_*.pt"))) == 1


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
    flags = [*LENGTH, "--checkpoint_dir", small_disk, "--keep_checkpoints", "9"]
    out, err = run(*flags, cwd=tmp_path, data=data)
    assert "finished at step 20 of 20" in out
    names = sorted(p.name for p in (small_disk / "a").iterdir() if p.name != ".lock")
    assert names == ["step_00000005.pt", "step_00000010.pt"], (names, out)
    assert "No space left" in out + err


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
    out, _ = run(*flags, cwd=tmp_path, data=data)
    assert out.index("GB free and a checkpoint takes") < out.index("step     1/20")


def test_bad_data_in_mid_run_stops_with_the_work_saved(tmp_path):
    from conftest import write_data

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
    assert torch.load(checkpoint(tmp_path / "short", 20), weights_only=True)["config"][
        "micro_batch_size"
    ] == (fits)
