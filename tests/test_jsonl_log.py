"""metrics.jsonl: one line per step whatever happens, the same values as TensorBoard's."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from conftest import read_scalars, run, start
from monitoring.jsonl_log import JsonLinesLog


def lines(path: Path) -> list[dict]:
    """Every line, read strictly: half lines and NaN are errors."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def written(path: Path, steps, **options) -> JsonLinesLog:
    log = JsonLinesLog(path, 0, **options)
    for step in steps:
        log.scalars({"Loss/train": 10 / (step + 1)}, step)
    return log


def test_a_line_is_in_the_file_when_the_method_returns(tmp_path):
    path = tmp_path / "runs" / "a" / "metrics.jsonl"
    written(path, [1, 2])  # neither flushed nor closed
    one, two = lines(path)
    assert one == {"step": 1, "time": one["time"], "Loss/train": 5.0}
    assert two["step"] == 2 and abs(two["time"] - time.time()) < 60


def test_what_json_does_not_have_is_null(tmp_path):
    log = JsonLinesLog(tmp_path / "m.jsonl", 0)
    log.scalars({"a": float("nan"), "b": float("-inf"), "c": 1.5}, 1)
    (line,) = lines(tmp_path / "m.jsonl")
    assert line["a"] is None and line["b"] is None and line["c"] == 1.5


def test_a_resume_removes_what_is_beyond_it(tmp_path):
    path = tmp_path / "m.jsonl"
    log = written(path, [0, 1, 2, 3])
    log.scalars({"Loss/validation": 3.0}, 3)
    log.scalars({"Loss/train": 2.0}, 4)
    with path.open("ab") as file:
        file.write(b'{"step": 5, "ti')  # killed here
    log = JsonLinesLog(path, 4)
    log.scalars({"Loss/train": 2.5}, 4)
    log.close()
    assert [line["step"] for line in lines(path)] == [0, 1, 2, 3, 3, 4]
    assert lines(path)[-1]["Loss/train"] == 2.5


def test_nuls_of_a_power_cut_are_removed(tmp_path):
    path = tmp_path / "m.jsonl"
    written(path, [1, 2]).close()
    with path.open("ab") as file:
        file.write(bytes(100) + b"\n[1]\n")
    JsonLinesLog(path, 9).close()
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_rewind_in_the_same_process(tmp_path):
    path = tmp_path / "m.jsonl"
    log = written(path, [1, 2, 3, 4])
    log.rewind(3)
    log.scalars({"Loss/train": 7.0}, 3)
    assert [(line["step"], line["Loss/train"]) for line in lines(path)][2:] == [(3, 7.0)]


@pytest.mark.parametrize("options", [{"first_step": 0}, {"first_step": 3, "new_timeline": True}])
def test_an_earlier_attempt_is_set_aside(tmp_path, options):
    path = tmp_path / "m.jsonl"
    for _ in range(3):
        written(path, [1, 2]).close()
    JsonLinesLog(path, **options).close()
    assert path.read_text() == ""
    kept = [p for p in tmp_path.iterdir() if p != path]
    assert len(kept) == 3 and all(len(lines(p)) == 2 for p in kept)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--log_jsonl: cannot write .*file/m\.jsonl"):
        JsonLinesLog(tmp_path / "file" / "m.jsonl", 0)


@contextlib.contextmanager
def size_limit(n: int):
    """Files of this process cannot grow beyond n bytes: writing more takes a part, then fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_lines_and_nothing_else(tmp_path):
    path, said = tmp_path / "m.jsonl", []
    log = JsonLinesLog(path, 0, said.append, retry_every=0.0)
    with size_limit(150):  # two lines and a part of the third
        for step in range(1, 6):
            log.scalars({"Loss/train": 10 / (step + 1)}, step)
    assert [line["step"] for line in lines(path)] == [1, 2]  # nothing half
    for step in range(6, 8):
        log.scalars({"Loss/train": 1.0}, step)
    log.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 6, 7]
    assert len(said) == 2
    assert "stopped" in said[0] and os.strerror(errno.EFBIG) in said[0]
    assert "back at step 6; 3 values of steps 3 to 5 are missing" in said[1]


def test_it_is_not_tried_at_every_step(tmp_path):
    said = []
    log = JsonLinesLog(tmp_path / "m.jsonl", 0, said.append, retry_every=3600.0)
    with size_limit(10):
        log.scalars({"Loss/train": 1.0}, 1)
    log.scalars({"Loss/train": 1.0}, 2)
    log.close()
    assert lines(tmp_path / "m.jsonl") == []
    assert "2 values were not recorded" in said[-1]


def test_a_full_disk_from_the_start(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted here (needs root)")
    try:
        with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        said = []
        log = JsonLinesLog(disk / "m.jsonl", 0, said.append, retry_every=0.0)
        log.scalars({"Loss/train": 1.0}, 1)
        assert "No space left" in said[0]
        (disk / "ballast").unlink()
        log.scalars({"Loss/train": 1.0}, 2)
        log.close()
        assert [line["step"] for line in lines(disk / "m.jsonl")] == [2]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- In training ----------------------------------------------------------------------------------

FLAGS = "--eval_freq 5 --sample_freq 0 --checkpoint_freq 5 --warmup_steps 2 --log_jsonl".split()


def curves(path: Path) -> dict:
    """{tag: [(step, value)]}"""
    found = {}
    for line in lines(path):
        for tag in line.keys() - {"step", "time"}:
            found.setdefault(tag, []).append((line["step"], line[tag]))
    return found


def test_killed_and_resumed_it_has_each_step_once_and_tensorboards_values(tmp_path, data):
    process = start(
        *FLAGS, "--use_tensorboard", "--max_steps", 400, "--run_name", "a", cwd=tmp_path, data=data
    )
    path = tmp_path / "runs" / "a" / "metrics.jsonl"
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes().count(b"\n") > 17:
                break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = json.loads(path.read_text().splitlines()[-2])["step"]
    assert 10 < before < 400
    last = before + 7
    flags = ("--log_jsonl", "--use_tensorboard", "--resume", "latest", "--max_steps", last)
    run(*flags, cwd=tmp_path, small=False)
    ours = curves(path)
    assert [step for step, _ in ours["Loss/train"]] == list(range(1, last + 1))
    theirs = read_scalars(path.parent)
    assert ours.keys() == theirs.keys()
    for tag, points in theirs.items():
        expected = [(step, pytest.approx(value, rel=1e-6)) for step, value, _ in points]
        assert ours[tag] == expected, tag


def test_it_does_not_need_tensorboard(tmp_path, data):
    out, _ = run(*FLAGS, "--max_steps", 6, "--run_name", "a", cwd=tmp_path, data=data)
    folder = tmp_path / "runs" / "a"
    assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == [
        "config.json",
        "metrics.jsonl",
    ]
    found = curves(folder / "metrics.jsonl")
    assert [step for step, _ in found["Loss/train"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found["Loss/validation"]] == [0, 5, 6]
    assert "--log_jsonl" in out.splitlines()[-1]  # the command that trains longer
