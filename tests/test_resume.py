"""What a resume takes from where, what it derives again, and what it knows of the past."""

import dataclasses
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import export
import train_improved as ti
from checkpointing import files, run_folders
from conftest import SCRIPT, SMALL, environment, run, start, write_data
from monitoring import summary, tensorboard_log
from runtime import flags, planning
from test_config import sample  # noqa: F401 (a fixture)
from test_training import checkpoint, logged
from tokens import shards

D = ("--data_dir", "data/walk")


def read(*argv) -> flags.CommandLine:
    return flags.read_command_line(ti.Config, "", [str(a) for a in argv])


def planned(*argv):
    """Plan in this process -> the run, with every default decided."""
    given = read("--device", "cpu", *argv).values() | {"dry_run": True}
    return ti.set_up(given, ti.Distributed("cpu", 60.0))[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four steps of 256 tokens; the file of step 4."""
    cwd = tmp_path_factory.mktemp("trained")
    write_data(cwd / "data" / "walk")
    run(*D, "--max_steps", 4, "--eval_freq", 2, "--run_name", "a", "--use_tensorboard", cwd=cwd)
    return cwd


@pytest.fixture
def resumed(trained, tmp_path, monkeypatch):
    """Plan a resume of that file after changes in its configuration, and in what was asked."""
    monkeypatch.chdir(trained)
    saved = files.load(checkpoint(trained, 4))

    def plan(changes: dict, asked: str, *argv):
        there = saved | {"config": saved["config"] | changes, "asked": asked.split()}
        files.save(tmp_path / "x.pt", there)
        return planned("--resume", tmp_path / "x.pt", "--run_name", "b", *argv)

    return plan


# --- Derived again --------------------------------------------------------------------------------

LONG = {"max_steps": 300, "warmup_steps": 30}


@pytest.mark.parametrize(
    "changes, asked, argv, expected",
    [
        (LONG, "max_steps", "", {"max_steps": 300, "warmup_steps": 30, "min_lr": 1e-3}),
        (LONG, "max_steps", "--max_steps 20", {"warmup_steps": 2}),
        (LONG, "max_steps warmup_steps", "--max_steps 40", {"warmup_steps": 30}),
        (LONG, "max_steps", "--max_steps 20 --warmup_steps 3", {"warmup_steps": 3}),
        (LONG, "max_steps", "--max_steps 40 --total_batch_size 512", {"warmup_steps": 4}),
        # a warm-up that is over does not come again
        (LONG | {"warmup_steps": 3}, "max_steps", "--max_steps 900", {"warmup_steps": 3}),
        (LONG, "max_steps", "--max_lr 1e-4", {"min_lr": 1e-5}),
        (LONG, "max_steps", "--schedule linear", {"min_lr": 0.0}),
        (LONG, "max_steps min_lr", "--max_lr 0.1", {"min_lr": 1e-3}),
        (LONG, "max_steps", "--eval_freq 0", {"hellaswag_freq": 0, "sample_freq": 0}),
        (LONG, "max_steps sample_freq", "--eval_freq 0", {"sample_freq": 2}),
        (LONG, "max_steps", f"--sample_prompt {'a-' * 15}", {"sample_tokens": 2}),
        # 78 steps of 256 tokens an epoch; a batch of twice the size for what is left of it
        ({"epochs": 1.0, "max_steps": 78}, "epochs", "", {"max_steps": 78}),
        ({"epochs": 1.0, "max_steps": 78}, "epochs", "--epochs 2", {"max_steps": 156}),
        ({"epochs": 1.0, "max_steps": 78}, "epochs", "--total_batch_size 512", {"max_steps": 41}),
        (LONG, "max_steps", "--epochs 2", {"max_steps": 156}),  # the command wins
        (LONG, "max_steps", "--total_batch_size 512", {"max_steps": 300, "micro_batch_size": 16}),
    ],
)
def test_what_is_derived_is_derived_again_when_what_it_comes_from_changes(
    resumed, changes, asked, argv, expected
):
    cfg = resumed(changes, asked, *argv.split()).cfg
    assert {name: getattr(cfg, name) for name in expected} == pytest.approx(expected)


def test_each_change_is_said_and_those_that_change_learning_are_kept(resumed, capsys):
    plan = resumed(LONG, "max_steps", "--max_lr", "1e-4", "--eval_freq", "0", "--device", "cpu")
    out = capsys.readouterr().out
    assert re.search(r"step 4: 1,024 tokens \(0.05 epochs .* best validation loss \d", out)
    said = re.findall(r"changed since the checkpoint: (.*)", out)
    learned = ["--max_lr: 0.01 -> 0.0001", "--min_lr: 0.001 -> 1e-05, derived again"]
    assert [line for line in said if "_lr" in line] == learned
    assert "--sample_freq: 2 -> 0, derived again" in said
    assert plan.changes == [f"step 4: {text}" for text in learned]


def test_what_derived_values_come_from_exists():
    names = {field.name for field in dataclasses.fields(ti.Config)}
    for field in dataclasses.fields(ti.Config):
        assert field.metadata["derived_from"] <= names
        # what is derived says in its help, in brackets, from what
        assert not field.metadata["derived_from"] or field.default is None


# --- The past -------------------------------------------------------------------------------------


def test_tokens_seen_are_those_that_were_seen(trained, tmp_path):
    """Not all steps times today's batch: case of a resume with another --total_batch_size."""
    path = checkpoint(trained, 4)
    flags_ = ("--resume", path, "--run_name", "b", "--data_dir", trained / "data" / "walk")
    more = ("--total_batch_size", 512, "--max_steps", 6, "--use_tensorboard")
    out, _ = run(*flags_, *more, cwd=tmp_path, small=False)
    points = dict(logged(tmp_path / "runs" / "b")["Training/tokens"])
    assert points == {5: 4 * 256 + 512, 6: 4 * 256 + 2 * 512}
    assert "6 steps = 2,048 tokens" in out
    end = files.load(checkpoint(tmp_path, 6, "b"))
    facts = export.run_facts(end)
    assert facts["tokens seen"].startswith("2,048 (0.10 epochs")
    assert "step 4: --total_batch_size: 256 -> 512" in facts["changed on the way"]
    assert "step 4: --max_steps: 4 -> 6" in facts["changed on the way"]
    end["state"]["watt_seconds"] = 7.2e6  # this machine may have no counter
    assert export.run_facts(end)["energy"] == "2 kWh, of the devices"
    (sentence,) = [line for line in out.splitlines() if "1,024 tokens" in line]
    assert sentence.startswith("resuming from ")


def test_old_checkpoints_have_seen_steps_times_their_batch(trained):
    saved = files.load(checkpoint(trained, 4))
    assert saved["state"]["tokens"] == 1024
    for name in ("tokens", "changes"):
        del saved["state"][name]
    data = planned(*SMALL, "--data_dir", trained / "data" / "walk", "--max_steps", 9).train_data
    cfg = dataclasses.replace(ti.Config(**saved["config"]), total_batch_size=4096)
    state = ti.state_of(saved, cfg, data)
    assert (state.tokens, state.changes, state.step) == (1024, [], 4)
    assert export.run_facts(saved)["tokens seen"].startswith("1,024 ")


def test_other_data_begins_anew(trained, tmp_path):
    """Position, best loss and what the guard expects; the weights go on."""
    other = write_data(tmp_path / "other", seed=1)
    flags_ = ("--resume", checkpoint(trained, 4), "--data_dir", other, "--allow_data_change")
    more = ("--max_steps", 6, "--run_name", "b", "--keep_checkpoints", 1, "--eval_freq", 1)
    out, _ = run(*flags_, *more, "--checkpoint_freq", 1, cwd=tmp_path, small=False)
    assert "from its beginning; the best validation loss begins anew" in out
    end = files.load(checkpoint(tmp_path, 6, "b"))
    assert end["state"]["position"] == 2 * 8  # windows: two steps
    assert end["state"]["tokens"] == 6 * 256
    found = re.findall(r"validation loss ([\d.]+) \(", out)
    assert end["state"]["best_loss"] == pytest.approx(min(map(float, found)), abs=1e-4)
    assert any("another set" in change for change in end["state"]["changes"])


def test_the_best_checkpoint_is_the_best_on_the_data_of_today(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    losses = {1: (1.0, "old"), 2: (5.0, "new"), 3: (4.0, "new"), 4: (6.0, "new"), 5: (7.0, "new")}
    for step, (loss, data) in losses.items():
        path = folder / f"step_{step:08d}.pt"
        files.save(path, {"step": step}, info={"step": step, "val_loss": loss, "data": data})
        os.utime(path, (step, step))
    run_folders.retain(folder, 1)
    assert [c.step for c in run_folders.list_checkpoints(folder)] == [3, 5]


# --- The command that goes on ---------------------------------------------------------------------


def go_on(typed: flags.CommandLine, name: str, finished=False, **values):
    """The printed command as a shell and this program read it: {name: value}."""
    cfg = dataclasses.replace(ti.Config(**typed.values()), run_name=name, max_steps=9)
    folder = Path("checkpoints") / name
    dist = SimpleNamespace(starts=[["python"]])
    run_ = ti.Run(cfg, set(), dist, None, None, [], None, checkpoint_folder=folder)
    words = shlex.split(planning.next_command(run_, typed, finished, None))
    assert Path(words[1]).samefile(SCRIPT)
    return read(*words[2:]).values()


@pytest.fixture
def saved_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints" / "n"
    folder.mkdir(parents=True)
    (folder / "step_00000004.pt").write_bytes(b"")
    return tmp_path


def test_the_printed_command_is_the_same_command_again(saved_run):
    Path("my file.toml").write_text("use_tensorboard = true\nmax_lr = 1e-3\n")
    argv = ("--device", "cpu", "--no-compile", "--max_hours", "8", "--hang_timeout", "60")
    argv += ("--config", "my file.toml", "--data_dir", "my data:0.7", "b:0.3", "--seed", "3")
    argv += ("--sample_prompt", "it's $HOME", "--checkpoint_dir", "a b")
    typed = read(*argv)
    (saved_run / "a b").mkdir()
    again = go_on(typed, "n")
    assert again == typed.values() | {"resume": "latest", "run_name": "n"}
    again = go_on(typed, "n", finished=True)
    assert again == typed.values() | {"resume": "latest", "run_name": "n", "max_steps": 18}


def test_the_printed_command_has_what_came_through_a_pipe(saved_run):
    reader, writer = os.pipe()
    os.write(writer, b"use_tensorboard = true\nmax_lr = 1e-3\n")
    os.close(writer)
    typed = read("--config", f"/dev/fd/{reader}", "--device", "cpu")
    os.close(reader)
    assert typed.values()["max_lr"] == 1e-3
    # the learning rate is in the checkpoint; what a resume takes from the command is not
    expected = {"use_tensorboard": True, "device": "cpu", "resume": "latest", "run_name": "n"}
    assert go_on(typed, "n") == expected


def test_a_branch_goes_on_as_a_branch(saved_run):
    typed = read("--decay_from", "checkpoints/long/step_00000008.pt", "--max_steps", "50")
    assert go_on(typed, "n")["resume"] == "auto"
    assert "decay_from" not in go_on(typed, "n", finished=True)


def test_a_configuration_from_a_pipe_is_read_once(tmp_path, data):
    """Case 30: read twice, the second time it is empty and every key is lost."""
    text = "n_layer = 2\nn_head = 2\nn_embd = 16\nseq_len = 32\nmax_steps = 7\nseed = 5\n"
    text += "val_tokens = 512\ntotal_batch_size = 256\n"
    argv = [sys.executable, SCRIPT, "--config", "/dev/stdin", "--data_dir", data, "--dry_run"]
    done = subprocess.run(
        argv, cwd=tmp_path, env=environment(), input=text, capture_output=True, text=True
    )
    assert "7 steps = 1,792 tokens" in done.stdout and "seed 5" in done.stdout, done.stderr
    fast = round(7 * ti.RECIPES["fast"]["length"])  # the table of recipes, too
    assert re.search(rf"^ +steps +7 +{fast}$", done.stdout, re.M), done.stdout


# --- Paths ----------------------------------------------------------------------------------------


def test_a_tilde_is_home_in_every_path_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "my.toml"
    paths = [f.name for f in dataclasses.fields(ti.Config) if f.metadata["path"]]
    assert {"data_dir", "checkpoint_dir", "tensorboard_dir", "resume", "config"} <= set(paths)
    file.write_text("".join(f'{n} = "~/{n}"\n' for n in paths if n not in ("config",)))
    given = read("--config=~/my.toml").values()
    assert given == {name: f"{tmp_path}/{name}" for name in paths} | {"config": str(file)}
    for name in set(paths) - {"config"}:
        assert read(f"--{name}=~/x").values() == {name: f"{tmp_path}/x"}
    mixture = f"{tmp_path}/a:0.7 {tmp_path}/b:0.3"
    assert read("--data_dir", "~/a:0.7", "~/b:0.3").values() == {"data_dir": mixture}
    assert read("--data_dir", "~/a:0.7 ~/b:0.3").values() == {"data_dir": mixture}
    file.write_text('data_dir = ["~/a:0.7", "~/b:0.3"]\n')
    assert read("--config", file).values()["data_dir"] == mixture


def test_a_tilde_without_a_home_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, no such user
    with pytest.raises(SystemExit):
        read("--data_dir=~/x", "--checkpoint_dir=~")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert [line.split(":")[1] for line in lines] == [" --data_dir ~/x", " --checkpoint_dir ~"] or (
        "'~/x'" in lines[0] and "HOME is not set" in lines[1]
    )


@pytest.mark.parametrize("names", [("my data", "b"), ("it's", "b"), ("a:2", "b"), ("ä 漢", "%b")])
def test_a_mixture_of_folders_with_any_name(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    parts = [f"{name}:{share}" for name, share in zip(names, (0.75, 0.25), strict=True)]
    found = shards.parse_data_dir(read("--data_dir", *parts).values()["data_dir"])
    assert [(folder, float(share)) for folder, share in found] == [
        (names[0], 0.75), (names[1], 0.25)
    ]  # fmt: skip


def test_a_name_that_is_not_utf8_reaches_tensorboard(tmp_path):
    name = os.fsdecode(b"data\xff")
    log = tensorboard_log.TensorBoardLog(tmp_path, 0, print)
    log.hparams({"data_dir": name}, ["Loss/validation"])
    log.close()
    (events,) = tmp_path.glob("*tfevents*")
    assert rb"data\udcff" in events.read_bytes()


def test_folders_may_be_links_to_other_disks(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ck", "logs"):
        (tmp_path / "disk" / name).mkdir(parents=True)
    Path("checkpoints").symlink_to("disk/ck")
    Path("runs").symlink_to("disk/logs")
    flags_ = ("--data_dir", trained / "data" / "walk", "--max_steps", 2, "--eval_freq", 0)
    run(*flags_, "--run_name", "a", cwd=tmp_path)
    out, _ = run(*flags_[:2], "--max_steps", 3, "--resume", "latest", cwd=tmp_path, small=False)
    assert "resuming from checkpoints/a/step_00000002.pt" in out
    # a run's folder alone on another disk is found; that it is not written to is said
    Path("disk/ck/a").rename("elsewhere")
    Path("disk/ck/a").symlink_to(tmp_path / "elsewhere")
    assert run_folders.find_latest_anywhere("checkpoints")[0] is not None
    with pytest.raises(ValueError, match=r"--run_name a: .* is a link to .* one level up"):
        planned("--resume", "latest")


# --- Endless, enormous ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv", ["--max_steps 9223372036854775807", "--epochs 1e15", "--epochs 1e300"]
)
def test_train_until_i_stop_it(trained, monkeypatch, argv):
    monkeypatch.chdir(trained)
    plan = planned(*SMALL, *D, *argv.split(), "--use_tensorboard")
    assert plan.cfg.max_steps >= 4e18 / 256 or "1e15" in argv
    summary.plan(plan)
    summary.disk_warnings(plan, plan.checkpoint_folder, Path("runs/x"))
    assert 0 < ti.learning_rate(10, plan.cfg) <= ti.learning_rate(1000, plan.cfg)
    assert ti.learning_rate(plan.cfg.max_steps, plan.cfg) == pytest.approx(plan.cfg.min_lr)


def test_an_endless_run_trains_and_saves(trained, tmp_path):
    flags_ = ("--data_dir", trained / "data" / "walk", "--max_steps", 10**15, "--eval_freq", 0)
    process = start(*flags_, "--run_name", "a", cwd=tmp_path)
    lines = iter(process.stdout.readline, "")
    step = next(line for line in lines if "step " in line and "| loss" in line)
    assert "/1000000000000000" in step and " left" in step
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in err
    assert run_folders.list_checkpoints(tmp_path / "checkpoints" / "a")


@pytest.mark.parametrize("asked", ["--max_steps 95365", "--epochs 100"])
def test_the_sample_corpus_is_not_trained_on_for_ever(sample, asked):  # noqa: F811
    name, value = asked.split()
    with pytest.raises(ValueError, match=rf"^{name} {value}.*: is [\d,]+ times through the small"):
        planned(*SMALL, *asked.split())
    assert planned(*SMALL, *asked.split(), "--data_dir", ti.SAMPLE_DIR).cfg.max_steps > 5000
    assert planned(*SMALL, "--max_steps", 600).cfg.max_steps == 600


def test_history_without_losses_says_none(trained, monkeypatch):
    monkeypatch.chdir(trained)
    plan = planned(*SMALL, *D, "--max_steps", 9)
    assert math.isinf(plan.state.best_loss) and "loss" not in summary.history(plan)
