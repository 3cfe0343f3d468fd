"""Checkpoint files: nothing is lost and nothing broken is believed, whatever the machine does.

Deaths happen in forked processes, disk-full on a real small tmpfs or file size limit, locks between
real processes. A fork of this process costs milliseconds where a fresh interpreter with PyTorch
costs seconds; only small tensors are touched in the children, so no thread pool is missed there.
"""

import errno
import io
import json
import os
import pickle
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint_files
from basics import durable, host
from checkpointing import background, files, run_folders
from conftest import DyingOs, die_at_call

SRC = Path(__file__).parents[1] / "src"
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def state_of(step: int, numel: int = 40_000) -> dict:
    """A small training state that says by its values which step it is of; 160 kB."""
    weight = torch.full((numel,), float(step))
    return {
        "model": {"wte.weight": weight, "lm_head.weight": weight, "bias": torch.arange(5) * step},
        "optimizer": {"state": {0: {"exp_avg": torch.full((3, 4), 0.5 * step)}}, "lr": 1e-3},
        "step": step,
        "config": {"name": "é", "betas": (0.9, 0.95), "none": None, "raw": b"\0\1"},
    }


def assert_is_step(state: dict, step: int) -> None:
    expected = state_of(step)
    assert state["step"] == step and state["config"] == expected["config"]
    assert torch.equal(state["model"]["wte.weight"], expected["model"]["wte.weight"])
    assert torch.equal(
        state["optimizer"]["state"][0]["exp_avg"], expected["optimizer"]["state"][0]["exp_avg"]
    )


def save_step(folder, step: int, **info) -> Path:
    path = files.step_path(folder, step)
    files.save(path, state_of(step), {"step": step, **info})
    return path


def fork(work) -> int:
    """Run `work` in a forked child; its process id. The child exits 0, or 1 after an exception."""
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)  # a fork has no thread pool and would wait for it for ever
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def run_in_child(work) -> None:
    assert os.waitpid(fork(work), 0)[1] == 0, "see the child's traceback on stderr"


def refused(path, *words: str) -> str:
    """`path` is refused by verify and by load with the same sentence, which names the path."""
    with pytest.raises(files.CheckpointError) as by_verify:
        files.verify(path)
    with pytest.raises(files.CheckpointError) as by_load:
        files.load(path)
    text = str(by_verify.value)
    assert text == str(by_load.value) and str(path) in text and "\n" not in text
    for word in words:
        assert word in text
    return text


# --- What is written ------------------------------------------------------------------------------


def test_round_trip_also_without_this_module(tmp_path):
    path = save_step(tmp_path / "deep" / "run", 7, val_loss=3.25)
    assert path.name == "step_00000007.pt" and os.listdir(path.parent) == [path.name]
    files.verify(path)
    assert_is_step(files.load(path), 7)
    for mapped in (False, True):
        assert_is_step(torch.load(path, weights_only=True, mmap=mapped), 7)
    with zipfile.ZipFile(path) as archive:  # every tool that knows ZIP finds it in order
        assert archive.testzip() is None and archive.comment.startswith(b"gpt2-checkpoint 1 {")


def test_info_is_read_without_the_tensors(tmp_path):
    before = time.time()
    path = save_step(tmp_path, 7, val_loss=3.25, note="ü", nothing=None)
    info = files.read_info(path)
    assert before <= info.pop("saved_at") <= time.time()
    assert info == {"step": 7, "val_loss": 3.25, "note": "ü", "nothing": None}
    with pytest.raises(ValueError, match="too long"):
        files.save(path, {}, {"note": "x" * 70_000})
    assert files.read_info(path)["step"] == 7 and os.listdir(tmp_path) == [path.name]


def test_tied_tensors_are_stored_once_and_views_without_their_base(tmp_path):
    base = torch.rand(1_000_000)
    view = base[10:30].view(4, 5)
    state = {"a": view, "b": view, "c": base[:3], "empty": torch.empty(0, 3), "t": view.T}
    files.save(tmp_path / "views.pt", state)
    assert (tmp_path / "views.pt").stat().st_size < 10_000
    loaded = files.load(tmp_path / "views.pt")
    assert all(torch.equal(loaded[k], state[k]) for k in state)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr() != loaded["c"].data_ptr()

    tied = files.load(save_step(tmp_path, 1))["model"]
    assert tied["wte.weight"].data_ptr() == tied["lm_head.weight"].data_ptr()
    assert files.step_path(tmp_path, 1).stat().st_size < 1.5 * 160_000


def test_loaded_tensors_can_be_changed_and_outlive_the_file(tmp_path):
    path = save_step(tmp_path, 1)
    content = path.read_bytes()
    state = files.load(path)
    state["model"]["wte.weight"].add_(1)
    assert path.read_bytes() == content
    path.unlink()
    assert state["model"]["wte.weight"].sum() == 2 * 40_000


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.float64(1.5), "state['config']['x'] is a float64"),
        (Path("x"), "state['config']['x'] is a"),
        ([1, {2, 3}], "state['config']['x'][1] is a set"),
        ({Path("x"): 1}, "has a key of type"),
    ],
)
def test_what_could_not_be_loaded_is_refused_when_it_is_saved(tmp_path, value, words):
    with pytest.raises(TypeError) as error:
        files.save(tmp_path / "x.pt", {"config": {"x": value}})
    assert words in str(error.value) and os.listdir(tmp_path) == []


# --- Dying ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["a new step", "the same step again"])
def test_dying_at_every_file_system_call_leaves_a_valid_latest(tmp_path, target):
    """A save and the retention after it, killed at the first call, the second, ... the last."""
    new = 20 if target == "a new step" else 10
    outcomes = []
    for n in range(1, 200):
        folder = tmp_path / str(n)
        folder.mkdir()
        files.save(files.step_path(folder, 10), state_of(1))

        def save_and_die(folder=folder, n=n):
            die_at_call(n)
            files.save(files.step_path(folder, new), state_of(2))
            assert run_folders.retain(folder, keep_last=1) == []

        _, status = os.waitpid(fork(save_and_die), 0)
        path, skipped = run_folders.find_latest(folder)
        assert skipped == []  # no file with a checkpoint's name is ever broken
        outcomes.append(files.load(path)["step"])
        assert_is_step(files.load(path), outcomes[-1])
        removed = run_folders.sweep(folder)
        assert all(p.name.startswith(".tmp-step_") for p in removed)
        left = set(os.listdir(folder))
        assert left <= {"step_00000010.pt", f"step_{new:08d}.pt"}
        save_step(folder, 30)  # and the next save has nothing in its way
        assert run_folders.find_latest(folder) == (files.step_path(folder, 30), [])
        if not os.WIFSIGNALED(status):
            assert status == 0 and left == {f"step_{new:08d}.pt"}
            break
    assert n > 10 and outcomes == sorted(outcomes) and {1, 2} == set(outcomes)


def test_flushed_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    """What a power cut would show and a kill cannot: the order of the calls."""
    watched = DyingOs(0)
    for module in (durable, files, run_folders):
        monkeypatch.setattr(module, "os", watched)
    path = files.step_path(tmp_path / "new", 1)
    files.save(path, state_of(1))
    monkeypatch.undo()
    names = [name for name, _ in watched.calls if name in ("open", "write", "fsync", "replace")]
    writes = names.count("write")
    assert names == [
        *("open", "fsync"),  # the parent, since the run's folder is new
        *("open", *["write"] * writes, "fsync", "replace"),
        *("open", "fsync"),
    ]
    opened = [args[0] for name, args in watched.calls if name == "open"]
    assert opened[0] == tmp_path and opened[2] == path.parent
    assert [args[1] for name, args in watched.calls if name == "replace"] == [path]


def test_killed_at_random_moments(tmp_path):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    save_step(tmp_path, 1)

    def save_for_ever():
        saver = background.BackgroundSaver(announce=lambda text: None)
        step = run_folders.find_latest(tmp_path)[0]
        step = files.load(step)["step"]
        while True:
            step += 1
            path = files.step_path(tmp_path, step)
            saver.save(
                path, state_of(step), on_done=lambda: run_folders.retain(tmp_path, keep_last=2)
            )

    last = 1
    for _ in range(15):
        pid = fork(save_for_ever)
        time.sleep(draw.uniform(0.005, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        path, skipped = run_folders.find_latest(tmp_path)
        assert skipped == []
        step = run_folders.list_checkpoints(tmp_path)[-1].step
        assert_is_step(files.load(path), step)
        assert step >= last
        last = step
        run_folders.sweep(tmp_path)
        assert run_folders.retain(tmp_path, keep_last=2) == []
        assert len(os.listdir(tmp_path)) == min(step, 2)
    assert last > 1


# --- A full disk ----------------------------------------------------------------------------------


def limit_file_size(n: int) -> None:
    """Files of this process cannot grow beyond n bytes: a write ends partial, the next fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))


@pytest.mark.parametrize("limit", [0, 100, 100_000, 161_000])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, limit):
    path = save_step(tmp_path, 1)
    assert path.stat().st_size > 161_000

    def work():
        limit_file_size(limit)
        with pytest.raises(OSError) as error:
            files.save(path, state_of(2))
        assert error.value.errno == errno.EFBIG and error.value.filename == str(path)

    run_in_child(work)
    assert_is_step(files.load(path), 1)
    assert os.listdir(tmp_path) == [path.name]


def fill(disk: Path) -> None:
    """Take all the space that is left."""
    with open(disk / "ballast", "ab", buffering=0) as file, pytest.raises(OSError):
        while file.write(bytes(4096)):
            pass


def test_full_disk_does_not_stop_training_and_the_next_save_succeeds(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted here (needs root): limits of size are tested")
    try:
        said = []
        saver = background.BackgroundSaver(announce=said.append)
        for step in (1, 2, 3):  # the third does not fit
            saver.save(files.step_path(disk, step), state_of(step))
        assert not saver.wait()
        assert saver.failure == (files.step_path(disk, 3), "No space left on device")
        assert "COULD NOT BE WRITTEN: No space left on device" in said[-1]
        assert sorted(os.listdir(disk)) == ["step_00000001.pt", "step_00000002.pt"]
        with pytest.raises(OSError) as error:
            save_step(disk, 3)
        assert error.value.errno == errno.ENOSPC

        files.step_path(disk, 1).unlink()
        saver.save(files.step_path(disk, 4), state_of(4))
        assert saver.wait() and saver.failure is None
        assert_is_step(files.load(run_folders.find_latest(disk)[0]), 4)
        assert 0 < host.free_bytes(disk) < 400 * 1024

        def make_room():
            return run_folders.make_room(disk, keep_last=2)

        saver.save(files.step_path(disk, 5), state_of(5), on_full=make_room)
        assert saver.wait()
        assert "no room" in said[-1] and "deleted step_00000002.pt, which it replaces" in said[-1]
        fill(disk)
        assert "No space left" in durable.check_writable(disk)
        saver.save(files.step_path(disk, 6), state_of(6), on_full=make_room)
        assert saver.wait() and steps(disk) == [5, 6]
        fill(disk)
        saver.save(files.step_path(disk, 7), state_of(7), on_full=lambda: [])
        assert not saver.close() and steps(disk) == [5, 6]
        lock = run_folders.RunLock().acquire(
            disk
        )  # what its file says does not fit: it holds all the same

        def another():
            with pytest.raises(ValueError, match="is in use by"):
                run_folders.RunLock().acquire(disk)

        run_in_child(another)
        lock.release()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- Damage ---------------------------------------------------------------------------------------


def test_every_single_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "x.pt"
    files.save(path, {"w": torch.arange(8), "step": 3}, {"step": 3})
    content = path.read_bytes()
    assert len(content) < 4000
    unnoticed = []
    with open(path, "r+b", buffering=0) as file:
        for at in range(len(content)):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([content[at] ^ 1 << bit]), at)
                try:
                    files.verify(path)
                    unnoticed.append((at, bit))
                except files.CheckpointError as e:
                    assert e.reason
            os.pwrite(file.fileno(), content[at : at + 1], at)
    assert unnoticed == []
    files.verify(path)
    with open(path, "r+b", buffering=0) as file:
        file.seek(len(content) // 2)
        file.write(bytes([content[len(content) // 2] ^ 1]))
    refused(path, "does not match its checksum")


def test_flips_in_a_larger_file(tmp_path):
    path = save_step(tmp_path, 1)
    content = path.read_bytes()
    for at in random.Random(1).sample(range(len(content)), 100):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(files.CheckpointError, match=r"step_00000001\.pt"):
            files.load(path)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "x.pt"
    files.save(path, {"w": torch.arange(8), "step": 3}, {"step": 3})
    content = path.read_bytes()
    for length in range(len(content) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(files.CheckpointError):
            files.verify(path)
    refused(path, "is empty")
    path.write_bytes(content[: len(content) // 2])
    refused(path, "cut short")
    path.write_bytes(content + b"\n")
    refused(path, "the end of the archive is missing")
    path.write_bytes(content[len(content) // 2 :])
    refused(path, "does not match")


@pytest.mark.parametrize("start", [0, 1, 4096, 80_000, 159_744])
def test_the_tail_lost_in_a_power_cut_is_noticed(tmp_path, start):
    path = save_step(tmp_path, 2)
    save_step(tmp_path, 1)
    content = path.read_bytes()
    path.write_bytes(content[:start] + bytes(len(content) - start))
    text = refused(path)
    assert "NUL" in text or "cut short" in text
    assert run_folders.find_latest(tmp_path) == (
        files.step_path(tmp_path, 1),
        [(path, text.removeprefix(f"{path}: "))],
    )
    # A block of zeros in the middle, with the end intact
    path.write_bytes(content[:40_000] + bytes(4096) + content[44_096:])
    refused(path, "does not match its checksum")


def test_what_is_no_checkpoint_is_named(tmp_path):
    refused(tmp_path / "absent.pt", "does not exist")
    refused(tmp_path, "is a folder")
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", "not a regular file")
    (tmp_path / "text.pt").write_text("hello\n" * 1000)
    refused(tmp_path / "text.pt", "not a checkpoint of this program")
    (tmp_path / "short.pt").write_text("x")
    refused(tmp_path / "short.pt", "not a checkpoint of this program")
    torch.save(state_of(1), tmp_path / "plain.pt")
    refused(tmp_path / "plain.pt", "no checksum of this program")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.comment = b"made by hand"
    refused(tmp_path / "other.zip", "no checksum of this program")
    refused(tmp_path / "text.pt" / "x.pt", "cannot be read: Not a directory")
    assert issubclass(files.CheckpointError, ValueError)


def sealed(content: bytes, info: str = '{"step": 1}') -> bytes:
    """Any archive with a comment that is right: the layout as the module's docstring tells it."""
    text = b"gpt2-checkpoint 1 " + info.encode() + b" sha256 "
    content = content[:-2] + struct.pack("<H", len(text) + 64) + text
    return content + sha256(content).hexdigest().encode()


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_code_in_a_file_never_runs(tmp_path):
    ran, path = tmp_path / "ran", tmp_path / "attack.pt"
    path.write_bytes(pickle.dumps(Attack(ran)))
    refused(path, "not a checkpoint of this program")
    archive = io.BytesIO()
    torch.save({"model": Attack(ran)}, archive)
    path.write_bytes(archive.getvalue())
    refused(path, "no checksum")
    path.write_bytes(sealed(archive.getvalue()))  # whoever forges the file forges the digest too
    files.verify(path)
    with pytest.raises(files.CheckpointError, match="refused, nothing was run"):
        files.load(path)
    assert not ran.exists()
    torch.load(path, weights_only=False)  # the attack is real
    assert ran.exists()


def test_forged_files_end_in_a_sentence(tmp_path):
    path, archive = tmp_path / "x.pt", io.BytesIO()
    torch.save([1, 2], archive)
    path.write_bytes(sealed(archive.getvalue()))
    with pytest.raises(files.CheckpointError, match="holds a list and not a dict"):
        files.load(path)
    path.write_bytes(sealed(archive.getvalue(), info="[1]"))
    refused(path, "its description cannot be read")
    path.write_bytes(sealed(archive.getvalue(), info='{"step": '))
    refused(path, "its description cannot be read")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("archive/data.pkl", b"nonsense")
    path.write_bytes(sealed(archive.getvalue()))
    with pytest.raises(files.CheckpointError, match=r"x\.pt") as error:
        files.load(path)
    assert "\n" not in str(error.value)


def test_forged_and_damaged_files_never_end_in_another_exception(tmp_path):
    """The digest is right and the archive is not: whatever PyTorch trips over, one sentence."""
    path, archive, draw = tmp_path / "x.pt", io.BytesIO(), random.Random(7)
    torch.save({"w": torch.arange(3), "n": {"x": [1, 2.5, None, (1,)]}, "step": 3}, archive)
    refusals = 0
    for _ in range(300):
        content = bytearray(archive.getvalue())
        for _ in range(draw.choice((1, 3, 10))):
            content[draw.randrange(len(content) - 22)] = draw.randrange(256)
        path.write_bytes(sealed(bytes(content)))
        try:
            files.load(path)
        except files.CheckpointError as e:
            refusals += 1
            assert str(path) in str(e) and "\n" not in str(e)
    assert refusals > 100


# --- Finding --------------------------------------------------------------------------------------


def test_only_exact_names_are_listed_in_order_of_steps(tmp_path):
    for step in (100, 20, 123_456_789):
        save_step(tmp_path, step)
    for name in (
        "step_1.pt",
        "step_000000100.pt",
        "step_00000100.pt.bak",
        ".tmp-step_00000100.pt-7",
    ):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "step_00000300.pt").mkdir()
    found = run_folders.list_checkpoints(tmp_path)
    assert [c.step for c in found] == [20, 100, 123_456_789]
    assert found[0].path == files.step_path(tmp_path, 20)
    assert found[0].bytes == found[0].path.stat().st_size
    assert abs(found[0].mtime - time.time()) < 60
    assert run_folders.list_checkpoints(tmp_path / "absent") == []
    assert run_folders.find_latest(tmp_path / "absent") == (None, [])
    assert run_folders.find_latest_anywhere(tmp_path / "absent") == (None, [])


def test_latest_anywhere_is_the_one_saved_last_that_is_whole(tmp_path):
    a = save_step(tmp_path / "a", 500)
    b = save_step(tmp_path / "b", 20)
    c = save_step(tmp_path / "c", 10)
    os.utime(a)  # copied or touched later: the time in the file counts
    (tmp_path / "a-file").write_text("x")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    save_step(outside, 1)
    (tmp_path / "link").symlink_to(outside)  # a run on a disk of its own
    assert run_folders.find_latest_anywhere(tmp_path)[0] == files.step_path(tmp_path / "link", 1)
    (tmp_path / "link").unlink()
    assert run_folders.find_latest_anywhere(tmp_path) == (c, [])
    content = bytearray(c.read_bytes())
    content[1000] ^= 1
    c.write_bytes(content)
    path, skipped = run_folders.find_latest_anywhere(tmp_path)
    assert path == b and [p for p, _ in skipped] == [c] and "checksum" in skipped[0][1]
    b.write_bytes(b"")  # no time inside: when it was changed counts
    path, skipped = run_folders.find_latest_anywhere(tmp_path)
    assert path == a and {p for p, _ in skipped} == {b, c}


# --- Retention ------------------------------------------------------------------------------------


def steps(folder) -> list[int]:
    return [c.step for c in run_folders.list_checkpoints(folder)]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "best", "left"),
    [
        (3, 0, None, [60, 70, 80]),
        (3, 0, 80, [60, 70, 80]),
        (2, 0, 20, [20, 70, 80]),
        (1, 40, None, [40, 80]),
        (1, 30, 10, [10, 30, 60, 80]),
        (1, 0, None, [80]),
        (20, 0, None, [10, 20, 30, 40, 50, 60, 70, 80]),
        (0, 0, None, [10, 20, 30, 40, 50, 60, 70, 80]),
    ],
)
def test_retention_keeps_the_last_the_best_and_every_so_many(
    tmp_path, keep_last, keep_every, best, left
):
    for step in range(10, 90, 10):
        losses = {10: float("nan"), 30: None, best: 2.5}  # the others were evaluated, and worse
        save_step(tmp_path, step, **({"val_loss": losses.get(step, 3.0)} if best else {}))
    assert run_folders.retain(tmp_path, keep_last, keep_every) == []
    assert steps(tmp_path) == left


@pytest.mark.parametrize(
    ("keep_last", "deleted", "left"),
    [(3, [10], [5, 20, 30]), (2, [10, 20], [5, 30]), (1, [], [5, 10, 20, 30]), (9, [], None)],
)
def test_room_is_made_only_by_what_the_next_checkpoint_replaces(tmp_path, keep_last, deleted, left):
    """The best one stays (5), and one that is whole."""
    for step in (5, 10, 20, 30):
        save_step(tmp_path, step, val_loss=3.0 + step)
    names = [files.step_path("", step).name for step in deleted]
    assert run_folders.make_room(tmp_path, keep_last) == names
    assert steps(tmp_path) == (left or [5, 10, 20, 30])


def test_retention_touches_nothing_that_is_not_ours(tmp_path):
    torch.save({"step": 1}, files.step_path(tmp_path, 1))  # our name, another writer
    files.step_path(tmp_path, 2).write_bytes(b"PK")  # nobody knows
    save_step(tmp_path / "elsewhere", 3)
    files.step_path(tmp_path, 3).symlink_to(files.step_path(tmp_path / "elsewhere", 3))
    (tmp_path / "notes.txt").write_text("keep")
    for step in (4, 5, 6):
        save_step(tmp_path, step)
    assert run_folders.retain(tmp_path, keep_last=1) == []
    assert steps(tmp_path) == [1, 2, 3, 6] and (tmp_path / "notes.txt").exists()
    assert steps(tmp_path / "elsewhere") == [3]


def test_retention_never_deletes_the_only_valid_one(tmp_path):
    """Files of an earlier process, the newer ones damaged inside: hashing finds the one to keep."""
    os.waitpid(fork(lambda: [save_step(tmp_path, s) for s in (1, 2, 3, 4)]), 0)
    for step in (3, 4):
        path = files.step_path(tmp_path, step)
        content = bytearray(path.read_bytes())
        content[50_000] ^= 1
        path.write_bytes(content)
    assert run_folders.retain(tmp_path, keep_last=1) == []
    assert steps(tmp_path) == [2, 4] and run_folders.find_latest(tmp_path)[0] == files.step_path(
        tmp_path, 2
    )
    for step in (1, 2, 3):
        files.step_path(tmp_path, step).unlink(missing_ok=True)
    files.step_path(tmp_path, 1).write_bytes(content)
    assert run_folders.retain(tmp_path, keep_last=1) == [] and steps(tmp_path) == [
        1,
        4,
    ]  # none is valid


def test_retention_after_a_roll_back_keeps_what_was_just_written(tmp_path):
    for step in (10, 20, 30, 15):
        save_step(tmp_path, step)
    assert run_folders.retain(tmp_path, keep_last=1) == []
    assert steps(tmp_path) == [15, 30]


def test_a_failed_deletion_is_a_warning(tmp_path):
    chattr = ["chattr", "+i", str(save_step(tmp_path, 1))]
    save_step(tmp_path, 2)
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
    elif subprocess.run(chattr, capture_output=True).returncode != 0:
        pytest.skip("root here, and this file system has no immutable files")
    try:
        (warning,) = run_folders.retain(tmp_path, keep_last=1)
        assert f"{files.step_path(tmp_path, 1)} could not be deleted" in warning
    finally:
        tmp_path.chmod(0o700)
        if os.geteuid() == 0:
            subprocess.run(["chattr", "-i", *chattr[2:]], check=True)


def test_sweep_removes_temporaries_of_ours_only(tmp_path):
    stale = [".tmp-step_00000005.pt-123", ".tmp-step_123456789.pt-1", ".tmp-write-test-77"]
    others = [".tmp-step_5.pt-123", ".tmp-step_00000005.pt-12a", ".tmp-mine", "step_00000005.pt"]
    for name in stale + others:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".tmp-step_00000006.pt-1").mkdir()
    (tmp_path / ".tmp-step_00000007.pt-1").symlink_to(tmp_path / "step_00000005.pt")
    kept = {*others, ".tmp-step_00000006.pt-1", ".tmp-step_00000007.pt-1"}
    assert {p.name for p in run_folders.sweep(tmp_path)} == set(stale)
    assert set(os.listdir(tmp_path)) == kept
    assert run_folders.sweep(tmp_path) == run_folders.sweep(tmp_path / "absent") == []


# --- Background saving ----------------------------------------------------------------------------


class HeldSaver(background.BackgroundSaver):
    """Writes only when `go` is set: what is on a slow disk a matter of time is decided here."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.go = threading.Event()

    def _write(self, *args):
        assert self.go.wait(30)
        super()._write(*args)


def test_background_save_writes_the_state_as_it_was_at_the_call(tmp_path):
    said, done = [], []
    saver = HeldSaver(announce=said.append)
    state, info = state_of(3), {"step": 3}
    state["model"]["view"] = torch.arange(100.0).reshape(10, 10)[:, :5]
    state["model"]["transposed"] = torch.arange(6.0).reshape(2, 3).T
    state["model"]["expanded"] = torch.ones(1).expand(4)
    state["model"]["scalar"], state["model"]["none"] = torch.tensor(2.5), torch.empty(0, 2)
    state["model"]["half"] = torch.ones(3, dtype=torch.bfloat16)
    before = {k: v.clone() for k, v in state["model"].items()}
    path = files.step_path(tmp_path, 3)
    waited = saver.save(path, state, info, on_done=lambda: done.append(path.exists()))
    for tensor in state["model"].values():
        if tensor is not state["model"]["expanded"]:
            tensor.zero_()
    state["optimizer"]["state"][0]["exp_avg"].zero_()
    state["config"]["name"], state["step"], info["step"] = "changed", 4, 4
    assert saver.busy() and not path.exists() and 0 < waited < 30
    saver.go.set()
    assert saver.wait() and not saver.busy() and done == [True]
    loaded = files.load(path)
    assert_is_step(loaded, 3)
    assert files.read_info(path)["step"] == 3
    for name, value in before.items():
        assert (
            torch.equal(loaded["model"][name], value) and loaded["model"][name].dtype == value.dtype
        )
    tied = loaded["model"]
    assert tied["wte.weight"].data_ptr() == tied["lm_head.weight"].data_ptr()
    assert tied["transposed"].stride() == (1, 3)
    assert path.stat().st_size < 1.5 * 160_000
    assert len(said) == 1 and "memory reserved for the copy" in said[0]


def test_memory_for_the_copy_is_allocated_once_and_bounded(tmp_path):
    said = []
    saver = background.BackgroundSaver(announce=said.append)
    saver.allocate({"model": state_of(1)["model"]})  # before the optimizer has any state
    saver.allocate(state_of(1))
    places = {where: copy.data_ptr() for where, copy in saver._copies.items()}
    assert len(said) == 2
    for step in (2, 3):
        saver.save(files.step_path(tmp_path, step), state_of(step))
        assert_is_step(files.load(files.step_path(tmp_path, step)) if saver.wait() else {}, step)
    assert len(said) == 2
    assert {where: copy.data_ptr() for where, copy in saver._copies.items()} == places
    assert 160_000 < sum(copy.nbytes for copy in saver._copies.values()) < 161_000
    saver.save(files.step_path(tmp_path, 4), state_of(4, numel=50_000))  # another model
    assert saver.wait() and len(said) == 3
    assert sum(copy.nbytes for copy in saver._copies.values()) < 201_000
    assert files.load(files.step_path(tmp_path, 4))["model"]["wte.weight"].numel() == 50_000
    saver.close()
    assert not saver._copies


def test_a_large_file_on_a_slow_disk_shows_progress(tmp_path, monkeypatch):
    """What the hang watch is told: the writing thread is at work, for every piece."""
    monkeypatch.setattr(files, "CHUNK", 10_000)
    pieces = []
    saver = background.BackgroundSaver(lambda text: None, progress=lambda: pieces.append(1))
    saver.save(tmp_path / "a.pt", state_of(1))
    assert saver.close() and len(pieces) > 160_000 / 10_000


def test_without_threads_saving_is_synchronous(tmp_path):
    """A limit (ulimit -v, cgroup) that leaves no room for a thread's stack."""

    def work():
        saver = background.BackgroundSaver(announce=lambda text: None, headroom=0)
        saver.allocate(state_of(1))
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (4 << 20), resource.RLIM_INFINITY))
        with pytest.raises(RuntimeError, match="thread"):
            while True:  # until the stacks of earlier threads are used up
                threading.Thread(target=threading.Event().wait, daemon=True).start()
        saver.save(files.step_path(tmp_path, 1), state_of(1))
        assert not saver.busy() and files.step_path(tmp_path, 1).exists() and saver.close()

    run_in_child(work)
    assert_is_step(files.load(files.step_path(tmp_path, 1)), 1)


def test_a_save_still_running_is_waited_for_and_said(tmp_path):
    said = []
    saver = HeldSaver()

    def announce(text):
        said.append(text)
        if "still being written" in text:
            saver.go.set()

    saver.announce = announce
    saver.save(files.step_path(tmp_path, 1), state_of(1))
    saver.save(files.step_path(tmp_path, 2), state_of(2))
    assert saver.close() and "step_00000001.pt is still being written after" in said[1]
    assert "step_00000002.pt waits for it" in said[1]
    for step in (1, 2):
        assert_is_step(files.load(files.step_path(tmp_path, step)), step)


def test_a_failed_save_is_loud_and_the_next_tries_again(tmp_path):
    said = []
    saver = background.BackgroundSaver(announce=said.append)
    folder = tmp_path / "run"
    folder.write_text("a file where a folder should be")
    saver.save(files.step_path(folder, 1), state_of(1), on_done=lambda: said.append("done"))
    assert not saver.wait()
    assert saver.failure[0] == files.step_path(folder, 1)
    assert "WARNING" in said[-1] and "step_00000001.pt COULD NOT BE WRITTEN" in said[-1]
    folder.unlink()
    saver.save(files.step_path(folder, 2), state_of(2))
    assert saver.wait() and saver.failure is None
    assert_is_step(files.load(run_folders.find_latest(folder)[0]), 2)


def test_warnings_and_errors_of_what_follows_a_save_are_said(tmp_path):
    said = []
    saver = background.BackgroundSaver(announce=said.append)
    saver.save(tmp_path / "a.pt", state_of(1), on_done=lambda: ["one", "two"])
    assert saver.wait() and said[1:] == ["WARNING: one", "WARNING: two"]
    saver.save(tmp_path / "a.pt", state_of(1), on_done=lambda: 1 / 0)
    assert saver.wait() and "ZeroDivisionError" in said[-1]


def test_without_memory_for_the_copy_saving_is_synchronous(tmp_path):
    said = []
    saver = background.BackgroundSaver(announce=said.append, headroom=1 << 60)
    for step in (1, 2):
        saver.save(files.step_path(tmp_path, step), state_of(step))
        assert not saver.busy()
        assert_is_step(files.load(files.step_path(tmp_path, step)), step)
    assert len(said) == 1 and "written in the foreground" in said[0] and not saver._copies
    saver.save(tmp_path, state_of(3))  # a folder is in the way: no exception here either
    assert not saver.close() and "COULD NOT BE WRITTEN" in said[-1]


def test_memory_that_the_system_refuses_is_no_error(tmp_path):
    """ulimit -v, as on shared clusters: /proc/meminfo knows nothing of it."""

    def work():
        state = {"w": torch.zeros(150_000_000)}  # from memory that was freed before, or new
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = in_use + (100 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        said = []
        saver = background.BackgroundSaver(announce=said.append, headroom=0)
        saver.allocate(state)
        assert saver.synchronous and "cannot be had" in said[0]

    run_in_child(work)


def test_available_memory_is_plausible():
    available = host.available_bytes()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available is not None and 0 < available <= total


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts(tmp_path, version):
    """The files of /proc and of the control groups as Linux writes them: job in slice in root."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    assert host.available_bytes(proc, groups) is None
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\nCached: 1 kB\n")
    assert host.available_bytes(proc, groups) == 8_192_000
    line = "5:devices:/x\n4:cpu,memory:/slice/job\n" if version == 1 else "0::/slice/job\n"
    (proc / "self" / "cgroup").write_text(line)
    assert host.available_bytes(proc, groups) == 8_192_000  # another name space: no such folder
    job = groups / ("memory/slice/job" if version == 1 else "slice/job")
    job.mkdir(parents=True)
    limit, used, inactive = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (job / limit).write_text("9223372036854771712\n" if version == 1 else "max\n")
    (job / used).write_text("2000000\n")
    (job / "memory.stat").write_text(f"anon 5\n{inactive} 500000\n")
    assert host.available_bytes(proc, groups) == 8_192_000
    for name, text in ((limit, "4000000\n"), (used, "3000000\n"), ("memory.stat", "anon 5\n")):
        (job.parent / name).write_text(text)
    assert host.available_bytes(proc, groups) == 1_000_000
    (job / limit).write_text("2200000\n")
    assert host.available_bytes(proc, groups) == 700_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: pinned copies untested")
def test_background_save_from_cuda(tmp_path):
    said = []
    saver = background.BackgroundSaver(announce=said.append)
    large = background.PINNED_FROM // 4
    state = state_of(5, large)
    state["model"] = {k: v.cuda() for k, v in state["model"].items()}
    saver.save(files.step_path(tmp_path, 5), state)
    state["model"]["wte.weight"].zero_()
    assert saver.close() and "pinned" in said[0]
    found, expected = files.load(files.step_path(tmp_path, 5)), state_of(5, large)
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor)


# --- The lock -------------------------------------------------------------------------------------


def holder_of(folder) -> int:
    """A process that holds the lock of `folder` and waits; its id."""
    reader, writer = os.pipe()

    def work():
        os.close(reader)
        run_folders.RunLock().acquire(folder)
        os.write(writer, b"x")
        signal.pause()

    pid = fork(work)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_second_run_is_refused_by_name_until_the_first_dies(tmp_path):
    pid = holder_of(tmp_path)
    try:
        with pytest.raises(ValueError) as error:
            run_folders.RunLock().acquire(tmp_path)
        assert f"process {pid} on {socket.gethostname()}" in str(error.value)
        assert str(tmp_path) in str(error.value)
        run_folders.RunLock().acquire(tmp_path / "another").release()
    finally:
        kill(pid)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == pid  # stale, and no hindrance
    lock = run_folders.RunLock().acquire(tmp_path)
    assert json.loads(os.pread(lock.fd, 4096, 0))["pid"] == os.getpid()
    lock.release()
    kill(holder_of(tmp_path))


def test_a_forked_child_does_not_keep_the_lock_of_a_dead_run(tmp_path):
    reader, writer = os.pipe()

    def work():
        run_folders.RunLock().acquire(tmp_path)
        os.write(writer, b"%d\n" % fork(lambda: time.sleep(60)))
        signal.pause()

    pid = fork(work)
    child = int(os.read(reader, 20))
    kill(pid)
    try:
        os.kill(child, 0)  # lives, with everything it inherited
        run_folders.RunLock().acquire(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_lock_survives_what_the_holder_does(tmp_path):
    """Children that end, saves, lists and sweeps in the folder: the lock is still held."""
    lock = run_folders.RunLock().acquire(tmp_path)
    run_in_child(lambda: None)
    subprocess.run([sys.executable, "-c", ""], check=True)
    save_step(tmp_path, 1)
    run_folders.retain(tmp_path, 1)
    run_folders.sweep(tmp_path)
    run_folders.find_latest(tmp_path)
    durable.check_writable(tmp_path)

    def another():
        with pytest.raises(ValueError, match=f"process {os.getppid()} on"):
            run_folders.RunLock().acquire(tmp_path)

    run_in_child(another)
    lock.release()
    run_in_child(lambda: run_folders.RunLock().acquire(tmp_path))


def test_stale_or_senseless_lock_files_do_not_block(tmp_path):
    for content in (b"", b"garbage", b'{"pid": 1}', b"\0" * 100):
        (tmp_path / ".lock").write_bytes(content)
        run_folders.RunLock().acquire(tmp_path).release()
    (tmp_path / ".lock").unlink()
    (tmp_path / "precious").write_text("content")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="cannot lock"):
        run_folders.RunLock().acquire(tmp_path)
    assert (tmp_path / "precious").read_text() == "content"


# --- Folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "run-1", "2026.11.22_x", "A" * 100])
def test_run_names(tmp_path, name):
    assert run_folders.validate_run_name(name) == name
    assert run_folders.run_folder(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "a/b", "/etc/x", "a\\b", "-a", ".a", "a b", "é", "１"),
        *("a\n", "a\nb", "a\0", "A" * 101, "a" * 5000),
    ],
)
def test_names_that_could_be_paths_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="--run_name"):
        run_folders.run_folder(tmp_path, name)


def test_a_run_folder_that_links_elsewhere_is_refused(tmp_path):
    base, outside = tmp_path / "checkpoints", tmp_path / "outside"
    base.mkdir()
    outside.mkdir()
    (base / "run").symlink_to(outside)
    (base / "up").symlink_to("..")
    (base / "self").symlink_to(".")
    for name in ("run", "up", "self"):
        with pytest.raises(ValueError, match="is a link to"):
            run_folders.run_folder(base, name)
    (tmp_path / "alias").symlink_to(base)  # the user's own choice of a disk
    assert run_folders.run_folder(tmp_path / "alias", "new") == tmp_path / "alias" / "new"


def test_write_test_and_free_space(tmp_path):
    durable.check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"cannot write in .*file/run: Not a directory"):
        durable.check_writable(tmp_path / "file" / "run")

    def full():
        limit_file_size(1000)
        with pytest.raises(ValueError, match="cannot write in"):
            durable.check_writable(tmp_path)

    run_in_child(full)
    assert set(os.listdir(tmp_path)) == {"a", "file"}
    free = host.free_bytes(tmp_path / "not" / "yet" / "there")
    assert free > 0 and abs(free - host.free_bytes(tmp_path)) < 1 << 30


# --- The command ----------------------------------------------------------------------------------


def test_the_command_lists_step_loss_size_age_and_state(tmp_path, capsys):
    assert checkpoint_files.main([str(tmp_path)]) == 0
    assert "no checkpoints" in capsys.readouterr().out
    assert checkpoint_files.main([str(tmp_path / "absent")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    save_step(tmp_path / "one", 10, val_loss=3.5)
    save_step(tmp_path / "two", 20, val_loss=None)
    path = save_step(tmp_path / "two", 30, val_loss=3.25)
    content = bytearray(path.read_bytes())
    content[50_000] ^= 1
    path.write_bytes(content)
    assert checkpoint_files.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("ok (not verified)") == 3
    row = next(line for line in out.splitlines() if "3.5000" in line)
    assert row.split()[:2] == ["10", "3.5000"] and row.split()[3:6:2] == ["kB", "s"]
    assert checkpoint_files.main([str(tmp_path / "two"), "--verify"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-2].endswith(" ok") and out[-1].endswith("does not match its checksum")
    files.step_path(tmp_path / "one", 40).write_bytes(b"")
    assert checkpoint_files.main([str(tmp_path / "one")]) == 1
    assert "is empty" in capsys.readouterr().out


def test_listing_and_verifying_do_not_wait_for_pytorch(tmp_path):
    save_step(tmp_path / "run", 10, val_loss=3.5)
    code = (
        "import sys, checkpoint_files as cf; code = cf.main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), "--verify"]
    result = subprocess.run(command, cwd=SRC, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "3.5000" in result.stdout
