"""What is checked and said before step 0: folders, disk, memory, data, and the record of it all."""

import dataclasses
import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_improved as ti
from checkpointing import files, run_folders
from conftest import read_scalars, run, write_data
from monitoring import summary
from test_bad_input import refused
from test_fuzz import small_data

D = ("--data_dir", "data/walk")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("trained")
    write_data(cwd / "data" / "walk")
    flags = "--max_steps 40 --eval_freq 8 --histogram_freq 10 --checkpoint_freq 20 --run_name a"
    out, _ = run(*D, *flags.split(), "--use_tensorboard", cwd=cwd)
    return cwd, out


def planned(**values) -> SimpleNamespace:
    """As much of a run as the estimates need."""
    cfg = ti.Config(model="tiny", **values)
    ti.resolve_model(cfg, "cpu")
    cfg.micro_batch_size = cfg.micro_batch_size or 1
    with torch.device("meta"):
        model = ti.GPT(cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.seq_len)
    dist = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    state = ti.TrainState()
    return SimpleNamespace(cfg=cfg, model=model, dist=dist, dtype=torch.float32, state=state)


def test_the_estimate_of_the_logs_is_near_what_they_are(trained):
    cwd, out = trained
    config = json.loads((cwd / "runs" / "a" / "config.json").read_text())["config"]
    written = sum(p.stat().st_size for p in (cwd / "runs" / "a").glob("events*"))
    names = [f.name for f in dataclasses.fields(ti.Config)]
    run_ = planned(**{k: v for k, v in config.items() if k in names and k != "model"})
    estimate = summary.log_bytes(run_)
    assert 0.6 * written < estimate < 2 * written, (estimate, written)
    assert f"(about {estimate / 1e6:,.1f} MB)" in out
    assert summary.log_bytes(run_, 20) < 0.7 * estimate  # a resume needs only the rest
    run_.cfg.use_tensorboard = False
    assert summary.log_bytes(run_) == 0


def test_the_estimate_of_a_checkpoint_is_what_it_is(trained):
    cwd, _ = trained
    (one, *_) = run_folders.list_checkpoints(cwd / "checkpoints" / "a")
    run_ = SimpleNamespace(cfg=ti.Config(), model=ti.GPT(2, 2, 16, 32))
    assert one.bytes == pytest.approx(summary.checkpoint_bytes(run_), rel=0.02)


def test_disk_is_compared_with_the_whole_planned_run(tmp_path, monkeypatch):
    """Files that a resume finds count as written; both folders on one disk share its space."""
    run_ = planned(max_steps=1_000_000, use_tensorboard=True, keep_checkpoints=2, keep_every=1)
    first, second = tmp_path / "checkpoints", tmp_path / "runs"
    first.mkdir()
    second.mkdir()
    size = summary.checkpoint_bytes(run_)
    need = size * 1_000_004 + summary.log_bytes(run_)
    (sentence,) = summary.disk_warnings(run_, first, second)  # 87 TB: no disk has that
    assert f"the run needs up to {size * 1_000_004 / 1e9:.2f} GB more (1000004 files" in sentence
    assert f"and {summary.log_bytes(run_) / 1e9:.2f} GB for logs" in sentence
    free = shutil.disk_usage(tmp_path).free
    said = 1e9 * float(re.search(r"has ([\d.]+) GB free", sentence)[1])
    assert said == pytest.approx(free, rel=0.05) and need > free  # others write, too
    run_ = planned(max_steps=10)
    assert summary.disk_warnings(run_, first, second) == []


def test_memory_for_the_chosen_micro_batch(monkeypatch):
    assert summary.memory_warning(planned()) is None
    sentence = summary.memory_warning(planned(micro_batch_size=10**7))
    assert "--micro_batch_size 10000000 needs about" in sentence
    assert "GB of memory and the copy for checkpoints 0.1 GB" in sentence
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000000")  # each process needs its share
    assert "are free" in summary.memory_warning(planned())


def test_the_effective_configuration_is_stored_with_the_run(trained):
    cwd, _ = trained
    record = json.loads((cwd / "runs" / "a" / "config.json").read_text())
    assert record["config"].keys() == {f.name for f in dataclasses.fields(ti.Config)}
    assert record["config"]["warmup_steps"] == 4  # decided, not given
    assert record["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"numpy", "tensorboard"} <= record["packages"].keys()
    assert record["command"][1:3] == ["--n_layer", "2"] or "--max_steps" in record["command"]
    if shutil.which("git"):
        assert record["git_revision"] is None or len(record["git_revision"]) >= 40


def test_one_folder_for_checkpoints_and_logs(tmp_path):
    write_data(tmp_path / "data" / "walk")
    flags = [*D, "--checkpoint_dir", "out", "--tensorboard_dir", "out", "--run_name", "a"]
    run(*flags, "--use_tensorboard", "--max_steps", 3, "--eval_freq", 0, cwd=tmp_path)
    more = ["--resume", "latest", "--max_steps", 4, "--use_tensorboard"]
    run(*flags, *more, cwd=tmp_path)
    points = read_scalars(tmp_path / "out" / "a")["Loss/train"]
    assert [step for step, _, _ in points] == [1, 2, 3, 4]


def test_verify_data_names_the_shard_with_one_flipped_bit(capsys, monkeypatch, tmp_path):
    small_data(tmp_path / "data" / "walk")
    shard = tmp_path / "data" / "walk" / "walk_train_000000.bin"
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)
    sentence = refused(
        capsys, monkeypatch, tmp_path, *D, "--max_steps", 3, "--verify_data", "--run_name", "a"
    )
    assert str(shard.relative_to(tmp_path)) in sentence and "SHA-256" in sentence


def test_a_run_folder_that_is_a_link_elsewhere_is_refused(capsys, monkeypatch, tmp_path):
    write_data(tmp_path / "data" / "walk")
    outside = tmp_path / "outside"
    outside.mkdir()
    for base in ("checkpoints", "runs"):
        (tmp_path / base).mkdir()
        (tmp_path / base / "a").symlink_to(outside)
        sentence = refused(capsys, monkeypatch, tmp_path, *D, "--max_steps", 3, "--run_name", "a")
        assert f"{base}/a is a link to {outside}" in sentence
        (tmp_path / base / "a").unlink()
    assert list(outside.iterdir()) == []


def test_a_checkpoint_of_another_tokenizer_is_refused(capsys, monkeypatch, trained, tmp_path):
    cwd, _ = trained
    state = files.load(cwd / "checkpoints" / "a" / "step_00000040.pt")
    files.save(tmp_path / "x.pt", state | {"tokenizer": "another one"})
    sentence = refused(capsys, monkeypatch, cwd, "--resume", tmp_path / "x.pt", small=False)
    assert "another one" in sentence and ti.tokenizer.fingerprint() in sentence


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(capsys, monkeypatch, tmp_path):
    """With --resume auto, as a service has it: somebody has to look first."""
    write_data(tmp_path / "data" / "walk")
    folder = tmp_path / "checkpoints" / "a"
    folder.mkdir(parents=True)
    (folder / "step_00000007.pt").write_bytes(np.arange(100).tobytes())
    flags = (*D, "--resume", "auto", "--run_name", "a", "--max_steps", 9)
    sentence = refused(capsys, monkeypatch, tmp_path, *flags)
    assert "none of the checkpoints in checkpoints/a is whole" in sentence, sys.path
