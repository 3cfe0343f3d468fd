"""What a user can get wrong: one sentence that names it, exit code 2, nothing on disk touched."""

import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_improved as ti
from conftest import SMALL, run, write_data


def refused(capsys, monkeypatch, cwd: Path, *flags, small=True) -> str:
    """Run main() in this process -> the sentence; checks all that bad input must have in common."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(
        sys, "argv", ["train_improved.py", *(SMALL if small else ()), *map(str, flags)]
    )
    before = snapshot(cwd)
    try:
        code = ti.main()
    except SystemExit as stop:  # argparse
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2, err
    assert "Traceback" not in err
    assert snapshot(cwd) == before, "something on disk was touched"
    return err.strip().splitlines()[-1]


def snapshot(folder: Path) -> dict:
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


@pytest.fixture
def cwd(tmp_path):
    write_data(tmp_path / "data" / "walk")
    return tmp_path


D = ("--data_dir", "data/walk")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--max_stepz", "3"], ["unrecognized", "--max_stepz"]),
        (["--max_steps", "many"], ["--max_steps", "many"]),
        (["--model", "gpt3"], ["--model", "gpt3", "gpt2-xl"]),
        (["--max_steps", "0"], ["--max_steps 0", "1 or more"]),
        (["--max_lr", "-1"], ["--max_lr -1", "more than 0"]),
        (["--max_lr", "nan"], ["--max_lr nan"]),
        (["--n_embd", "15"], ["--n_embd 15", "--n_head 2"]),
        (["--total_batch_size", "300"], ["--total_batch_size 300", "nearest is 288"]),
        (["--micro_batch_size", "3"], ["--total_batch_size 256", "96", "nearest is 288"]),
        (["--warmup_steps", "9", "--max_steps", "8"], ["--warmup_steps 9", "8 steps"]),
        (["--min_lr", "1"], ["--min_lr 1", "--max_lr"]),
        (["--sample_tokens", "64"], ["--sample_tokens 64", "--seq_len 32"]),
        (["--seed", "18446744073709551616"], ["--seed 18446744073709551616", "below"]),
        (["--max_steps", "9223372036854775808"], ["--max_steps 9223372036854775808", "below"]),
        (["--data_dir", "nothing"], ["--data_dir nothing: does not exist", "prepare_data.py"]),
        (["--data_dir", "a:0", "b:1"], ["--data_dir 'a:0 b:1'", "positive share"]),
        (["--hellaswag_file", "data"], ["--hellaswag_file data"]),
        (["--sample_prompt", ""], ["--sample_prompt"]),
        (["--val_tokens", "8"], ["--val_tokens 8"]),
        (["--device", "abacus"], ["--device abacus", "cpu"]),
        (["--run_name", "../../x"], ["--run_name '../../x': "]),
        (["--run_name", "/etc/x"], ["/etc/x"]),
        (["--run_name", "a\nb"], ["name"]),
        (["--run_name", "a" * 101], ["name"]),
        (["--resume", "latest"], ["--resume latest", "checkpoints"]),
        (["--resume", "nowhere.pt"], ["nowhere.pt", "does not exist"]),
        (["--resume", "data"], ["data"]),
        (["--epochs", "0.001"], ["--epochs 0.001", "--total_batch_size"]),
    ],
)
def test_flags(capsys, monkeypatch, cwd, flags, words):
    sentence = refused(capsys, monkeypatch, cwd, *D, *flags)
    for word in words:
        assert word in sentence, sentence
    known = "error: unrecognized" in sentence or sentence.startswith("error: argument --")
    name = next(f for f in flags if f.startswith("--"))
    assert known or sentence.startswith((f"error: {name} ", "error: --total_batch_size")), sentence


def test_all_mistakes_of_a_command_are_said(capsys, monkeypatch, cwd):
    flags = ("--beta1", "2", "--min_lr", "1", "--val_tokens", "8", "--max_steps", "3")
    refused(capsys, monkeypatch, cwd, *D, *flags)
    monkeypatch.setattr(sys, "argv", ["train_improved.py", *SMALL, *D, *flags])
    assert ti.main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["--beta1", "--min_lr", "--val_tokens"]


def header(tokens: int) -> bytes:
    head = np.zeros(256, "<i4")
    head[:3] = 20240520, 1, tokens
    return head.tobytes()


def bad_shard(content: bytes):
    def make(cwd):
        (cwd / "data" / "walk" / "walk_train_000000.bin").write_bytes(content)

    return make


def no_validation(cwd):
    (cwd / "data" / "walk" / "walk_val_000000.bin").unlink()


def empty_folder(cwd):
    for p in (cwd / "data" / "walk").iterdir():
        p.unlink()


@pytest.mark.parametrize(
    "make, words",
    [
        (bad_shard(header(5000) + bytes(2 * 4000)), ["walk_train_000000.bin"]),
        (bad_shard(header(5000) + bytes(2 * 5000 - 1)), ["walk_train_000000.bin"]),
        (bad_shard(b""), ["walk_train_000000.bin"]),
        (bad_shard(header(5000) + np.full(5000, 50257, "<u2").tobytes()), ["50257"]),
        (bad_shard(header(20) + bytes(40)), ["20"]),
        (no_validation, ["val"]),
        (empty_folder, ["data/walk"]),
        (lambda cwd: (empty_folder(cwd), (cwd / "data" / "walk").rmdir()), ["data/walk"]),
    ],
    ids=["truncated", "odd", "empty", "token", "short", "no_val", "empty_folder", "no_folder"],
)
def test_data(capsys, monkeypatch, cwd, make, words):
    make(cwd)
    sentence = refused(capsys, monkeypatch, cwd, *D, "--max_steps", "3")
    for word in words:
        assert word in sentence, sentence


def test_unwritable_folders_are_named_before_the_model_is_built(capsys, monkeypatch, cwd):
    (cwd / "file").write_text("")
    for flag in ("--checkpoint_dir", "--tensorboard_dir"):
        sentence = refused(
            capsys, monkeypatch, cwd, *D, "--use_tensorboard", flag, "file/x", "--run_name", "a"
        )
        assert flag in sentence and "file" in sentence


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("trained")
    write_data(cwd / "data" / "walk")
    run(*D, "--max_steps", "4", "--eval_freq", "0", "--run_name", "a", cwd=cwd)
    return cwd


def test_resume_with_another_shape_names_both_values(capsys, monkeypatch, trained):
    sentence = refused(
        capsys, monkeypatch, trained, "--resume", "latest", "--n_layer", "3", small=False
    )
    assert "--n_layer 3" in sentence and "n_layer 2" in sentence
    sentence = refused(
        capsys, monkeypatch, trained, "--resume", "latest", "--model", "gpt2", small=False
    )
    assert "12" in sentence and "2" in sentence


def test_fresh_start_does_not_overwrite_a_run(capsys, monkeypatch, trained):
    sentence = refused(capsys, monkeypatch, trained, *D, "--run_name", "a", "--max_steps", "9")
    assert "--run_name a" in sentence and "--resume latest" in sentence
    # Nor does another run's checkpoint go into its folder, where latest would mean two histories.
    other = trained / "checkpoints" / "other"
    shutil.copytree(trained / "checkpoints" / "a", other)
    flags = ("--resume", other / "step_00000004.pt", "--run_name", "b", "--max_steps", "5")
    run(*flags, cwd=trained, small=False)
    sentence = refused(capsys, monkeypatch, trained, *flags, small=False)
    assert "--run_name b" in sentence and "up to step 5 already" in sentence
    for name in ("b", "other"):
        shutil.rmtree(trained / "checkpoints" / name)


def test_resume_behind_the_end(capsys, monkeypatch, trained):
    flags = ("--resume", "latest", "--max_steps", "2")
    sentence = refused(capsys, monkeypatch, trained, *flags, small=False)
    assert "--max_steps 2" in sentence and "step 4" in sentence
    # Under another name the finished run would leave empty folders, and exit code 0.
    flags = ("--resume", "latest", "--run_name", "mistyped")
    sentence = refused(capsys, monkeypatch, trained, *flags, small=False)
    assert "--run_name mistyped" in sentence and "--max_steps 8 trains it longer" in sentence
    assert not (trained / "checkpoints" / "mistyped").exists()
    assert not (trained / "runs" / "mistyped").exists()


def test_changed_data_is_refused_unless_allowed(capsys, monkeypatch, trained, tmp_path):
    other = write_data(tmp_path / "other", seed=1)
    flags = ("--resume", "latest", "--data_dir", other, "--max_steps", "6", "--run_name", "b")
    sentence = refused(capsys, monkeypatch, trained, *flags, small=False)
    assert "--data_dir" in sentence and "--allow_data_change" in sentence
    out, _ = run(*flags, "--allow_data_change", cwd=trained, small=False)
    assert "another set" in out


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


@pytest.mark.parametrize(
    "kind", ["pickle", "torch", "truncated", "flipped", "nuls", "text", "state"]
)
def test_bad_checkpoints_by_path(capsys, monkeypatch, trained, tmp_path, kind):
    good = (trained / "checkpoints" / "a" / "step_00000004.pt").read_bytes()
    bad = tmp_path / "bad.pt"
    if kind == "pickle":
        bad.write_bytes(pickle.dumps(Evil()))
    elif kind == "torch":
        torch.save({"model": Evil()}, bad)
    elif kind == "state":
        torch.save({"model": {}}, bad)
    else:
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1
        bad.write_bytes(
            {
                "truncated": good[: len(good) // 2],
                "flipped": bytes(flipped),
                "nuls": bytes(len(good)),
                "text": b"hello",
            }[kind]
        )
    sentence = refused(capsys, monkeypatch, trained, "--resume", bad, small=False)
    assert "bad.pt" in sentence
    assert not (trained / "owned").exists()


def test_latest_skips_a_broken_checkpoint_and_says_so(trained, tmp_path):
    folder = tmp_path / "checkpoints" / "a"
    folder.mkdir(parents=True)
    good = (trained / "checkpoints" / "a" / "step_00000004.pt").read_bytes()
    (folder / "step_00000004.pt").write_bytes(good)
    (folder / "step_00000005.pt").write_bytes(good[:-1000])
    flags = ("--resume", "latest", "--max_steps", "6", "--data_dir", trained / "data" / "walk")
    out, err = run(*flags, cwd=tmp_path, small=False)
    assert "step_00000004.pt, step 4" in out
    assert "skipped" in err and "step_00000005.pt" in err


def test_a_second_run_of_the_same_name_is_refused(trained):
    from checkpointing import run_folders

    lock = run_folders.RunLock().acquire(trained / "checkpoints" / "a")
    try:
        flags = ("--resume", "latest", "--run_name", "a", "--max_steps", "9")
        _, err = run(*flags, cwd=trained, small=False, expect=2)
        assert str(os.getpid()) in err and os.uname().nodename in err
    finally:
        lock.release()


def test_an_older_checkpoint_resumed_sets_the_newer_ones_aside(cwd):
    flags = (*D, "--max_steps", "6", "--eval_freq", "0", "--run_name", "a")
    run(*flags, "--checkpoint_freq", "2", cwd=cwd)
    folder = cwd / "checkpoints" / "a"
    out, _ = run("--resume", folder / "step_00000002.pt", "--max_steps", "3", cwd=cwd, small=False)
    assert "beyond the resumed step" in out
    names = sorted(p.name for p in folder.glob("*.pt"))
    aside = [f"set_aside_step_0000000{step}.pt" for step in (4, 6)]
    assert names == [*aside, "step_00000002.pt", "step_00000003.pt"]


def test_resume_auto_starts_fresh_where_there_is_nothing(cwd):
    flags = (*D, "--resume", "auto", "--run_name", "a", "--max_steps", "2", "--eval_freq", "0")
    run(*flags, cwd=cwd)
    out, _ = run(*flags[:-4], "--max_steps", "3", cwd=cwd)
    assert "resuming from checkpoints/a/step_00000002.pt" in out
