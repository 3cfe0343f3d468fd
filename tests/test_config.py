"""Flags and configuration files: what is read, what is refused and how it is said."""

import contextlib
import dataclasses
import json
import os
import pty
import random
import re
import shlex
import string
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import hellaswag
import train_improved as ti
from basics import inputs
from conftest import ROOT, SCRIPT, SMALL, environment, run, write_data
from runtime import flags
from tokens import shards as token_shards

RECIPES = sorted((ROOT / "configs").glob("*.toml"))


def config_file(folder: Path, text: str) -> Path:
    path = folder / "my.toml"
    path.write_text(text)
    return path


def parse(*argv) -> dict:
    return flags.parse_flags(ti.Config, "", [str(a) for a in argv])


def refused(capsys, *argv) -> str:
    """Parse what is wrong -> the sentence on stderr."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: "), err
    return err.splitlines()[-1]


# --- Typing mistakes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, meant",
    [
        ("--max_stepz", "did you mean --max_steps?"),
        ("--max-steps", "did you mean --max_steps?"),
        ("--max_stepz=3", "did you mean --max_steps?"),
        ("--warmup", "did you mean --warmup_steps?"),
        ("--tensorboard", "did you mean --use_tensorboard or --tensorboard_dir?"),
        ("--no_compile", "did you mean --no-compile?"),
        ("--learning_rate", "did you mean --max_lr?"),
        ("--block_size", "did you mean --seq_len?"),
        ("--logdir", "did you mean --tensorboard_dir?"),
        ("--gradient_accumulation_steps", "did you mean --total_batch_size?"),
    ],
)
def test_a_mistyped_flag_suggests_the_right_one(capsys, wrong, meant):
    sentence = refused(capsys, wrong, "3")
    assert wrong.split("=")[0] in sentence and sentence.endswith(meant)


def test_nothing_is_suggested_where_nothing_is_near(capsys):
    assert "did you mean" not in refused(capsys, "--xyzzy")
    assert refused(capsys, "stray") == "error: unrecognized argument: stray"


def test_suggestions_from_other_programs_exist():
    assert set(inputs.OTHER_NAMES.values()) <= ti.Config.__dataclass_fields__.keys()
    assert not set(inputs.OTHER_NAMES) & ti.Config.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    "argv, meant",
    [
        (("--model", "gpt2-meduim"), "gpt2-medium"),
        (("--model", "GPT2"), "gpt2"),
        (("--dtype", "bf16"), "bfloat16"),
    ],
)
def test_a_mistyped_choice_suggests_the_right_one(capsys, argv, meant):
    sentence = refused(capsys, *argv)
    assert argv[0] in sentence and argv[1] in sentence
    assert sentence.endswith(f"did you mean {meant}?")


# --- The configuration file -----------------------------------------------------------------------


def test_a_file_is_read_and_flags_win(tmp_path):
    path = config_file(
        tmp_path,
        'model = "gpt2"\nmax_lr = 1\nmax_steps = 1_000\ndata_dir = ["a:0.7", "b:0.3"]\n'
        "compile = false\nuse_tensorboard = true\nepochs = 2.5\n",
    )
    given = parse("--config", path, "--max_lr", "2e-3", "--seed", "7")
    assert given == {
        "model": "gpt2",
        "max_lr": 2e-3,
        "max_steps": 1000,
        "data_dir": "a:0.7 b:0.3",
        "compile": False,
        "use_tensorboard": True,
        "epochs": 2.5,
        "seed": 7,
        "config": str(path),
    }
    assert type(parse("--config", path)["max_lr"]) is float


def test_flags_win_over_what_the_file_would_put_before_them(tmp_path):
    """--max_steps wins over --epochs, a width over --model: but not from the file."""
    path = config_file(tmp_path, "max_steps = 9\nn_layer = 3\nn_embd = 24\nn_head = 2\n")
    given = parse("--config", path, "--epochs", "2", "--model", "tiny")
    assert "max_steps" not in given and "n_layer" not in given
    given = parse("--config", path, "--epochs", "2", "--max_steps", "5", "--n_layer", "1")
    assert given["max_steps"] == 5 and given["n_layer"] == 1 and given["n_embd"] == 24


@pytest.mark.parametrize(
    "text, words",
    [
        ("max_stepz = 3", ["max_stepz", "did you mean max_steps?"]),
        ("learning_rate = 3", ["learning_rate", "did you mean max_lr?"]),
        ("[training]\nmax_lr = 1e-3", ["training", "without [tables]"]),
        ('max_steps = "many"', ['max_steps = "many"', "whole number"]),
        ("max_steps = 3.0", ["max_steps = 3.0", "whole number"]),
        ("max_steps = true", ["max_steps = true", "whole number"]),
        ('max_lr = "1e-3"', ['max_lr = "1e-3"', "a number"]),
        ("max_lr = false", ["max_lr = false", "a number"]),
        (f"max_lr = {10**400}", ["max_lr = 1000", "a number"]),
        ("use_tensorboard = 1", ["use_tensorboard = 1", "true or false"]),
        ("run_name = 5", ["run_name = 5", "text in quotes"]),
        ("data_dir = [1, 2]", ["data_dir = [1, 2]", "text in quotes"]),
        ('model = "gpt3"', ['model = "gpt3"', "gpt2-xl", "did you mean gpt2?"]),
        ("max_lr = -1", ["max_lr = -1", "more than 0"]),
        ("max_lr = nan", ["max_lr = nan", "more than 0"]),
        ("max_steps = 0", ["max_steps = 0", "1 or more"]),
        ("dry_run = true", ["dry_run", "command line only"]),
        ('config = "x.toml"', ["config", "command line only"]),
        ("max_steps: 3", ["is not TOML", "line 1"]),
        ("max_steps = 3\nmax_steps = 4", ["is not TOML"]),
    ],
)
def test_a_bad_file_is_named_with_key_and_value(capsys, tmp_path, text, words):
    path = config_file(tmp_path, text)
    sentence = refused(capsys, "--config", path)
    for word in (str(path), *words):
        assert word in sentence, sentence


def test_an_unreadable_file_is_named(capsys, tmp_path):
    assert "No such file" in refused(capsys, "--config", tmp_path / "none.toml")
    assert "directory" in refused(capsys, "--config", tmp_path)
    (tmp_path / "latin1.toml").write_bytes(b'run_name = "\xe9"')
    assert "latin1.toml: is not TOML" in refused(capsys, "--config", tmp_path / "latin1.toml")


def test_any_configuration_survives_the_way_through_a_file(tmp_path):
    rng = random.Random(0)
    alphabet = string.printable.replace("~", "") + "\x00\x7fäß漢😀"  # ~ is home
    for _ in range(50):
        values = {}
        for field in dataclasses.fields(ti.Config):
            kind, meta = flags.kind_of(field), field.metadata
            if not meta["in_file"] or (field.default is None and rng.random() < 0.3):
                continue
            values[field.name] = {
                int: rng.choice([meta["least"], 1, 95_365, 2**40]) or 1,
                float: rng.choice([1e-300, 6e-05, 0.1 + 0.2, 3.0, 1e22]),
                bool: rng.random() < 0.5,
                str: rng.choice(meta["choices"] or ["".join(rng.choices(alphabet, k=20))]),
            }[kind]
        config = ti.Config(**values)
        path = config_file(tmp_path, flags.to_toml(config, values, "test"))
        read = flags.read_config(ti.Config, path)
        assert ti.Config(**read) == config
        for name, value in read.items():
            assert type(value) is type(getattr(config, name)), name


def print_config(capsys, monkeypatch, *argv) -> str:
    """Run main() with --print_config -> what is on stdout."""
    monkeypatch.setattr(sys, "argv", ["train_improved.py", *map(str, argv), "--print_config"])
    assert ti.main() == 0
    return capsys.readouterr().out


@pytest.fixture
def sample(monkeypatch, tmp_path) -> Path:
    """A folder to run in whose sample corpus is there already."""
    folder = write_data(tmp_path / "data" / "sample")
    shards = []
    for path in sorted(folder.iterdir()):
        entry = token_shards.write_shard(path, np.fromfile(path, "<u2")[512:])
        shards.append(entry | {"split": "val" if "_val_" in path.name else "train"})
    token_shards.write_manifest(folder, {"version": 1, "shards": shards})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_print_config_is_read_back_exactly(capsys, monkeypatch, sample):
    """All that is said beside the configuration goes to stderr."""
    flags_given = (*SMALL, "--max_lr", "7e-4", "--sample_prompt", 'a "b"\té', "--grad_clip", "0")
    first = print_config(capsys, monkeypatch, *flags_given)
    given = tomllib.loads(first)
    assert set(given) == {w[2:] for w in flags_given if w.startswith("--")}  # nothing decided here
    assert given["max_lr"] == 7e-4 and given["sample_prompt"] == 'a "b"\té'
    for line in (f"min_lr = {0.1 * 7e-4}", "warmup_steps = 60", f'data_dir = "{ti.SAMPLE_DIR}"'):
        assert f"\n# {line}\n" in first, first
    path = config_file(sample, first)
    assert print_config(capsys, monkeypatch, "--config", path) == first
    other = print_config(capsys, monkeypatch, "--config", path, "--run_name", "x", "--seed", "2")
    assert set(other.splitlines()) - set(first.splitlines()) == {'run_name = "x"', "seed = 2"}
    assert not (sample / "checkpoints").exists() and not (sample / "runs").exists()


def test_a_file_trains_like_its_flags(sample):
    """A real run from a file alone."""
    path = config_file(
        sample,
        'model = "tiny"\nn_layer = 2\nn_head = 2\nn_embd = 16\nseq_len = 32\nval_tokens = 512\n'
        'total_batch_size = 256\nmax_steps = 4\nsample_tokens = 4\ndevice = "cpu"\n'
        "use_tensorboard = true\nlog_jsonl = true\n",
    )
    run("--config", path, "--run_name", "a", cwd=sample, small=False)
    decided = json.loads((sample / "runs" / "a" / "config.json").read_text())["config"]
    assert decided["n_embd"] == 16 and decided["config"] == str(path)


# --- The recipes ----------------------------------------------------------------------------------


def test_there_are_recipes():
    assert len(RECIPES) >= 5
    listed = re.findall(r"^\| `(configs/[\w.-]+)` \|", (ROOT / "QUICK_START.md").read_text(), re.M)
    assert sorted(listed) == [f"configs/{p.name}" for p in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_a_recipe_is_valid_and_says_what_to_expect(path):
    header = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for word in ("# Command  ", "# Machine  ", "# Time     ", "# Result   "):
        assert header.count(word) == 1, word
    commands = re.findall(r"((?:python|torchrun) .*)$", header, re.M)
    trains = [c for c in commands if f"--config configs/{path.name}" in c]
    assert trains
    processes = 1
    for command in trains:
        words = shlex.split(command)
        script = words.index("src/train_improved.py")
        for word in words[:script]:
            if word.startswith("--nproc_per_node="):
                processes = int(word.partition("=")[2])
        with contextlib.chdir(ROOT):
            cfg = ti.Config(**parse(*words[script + 1 :]))
        ti.resolve_model(cfg, "cpu")
        ti.resolve_length(cfg, 10_000_000_000)
        ti.validate(cfg, processes)
        assert cfg.use_tensorboard and cfg.run_name


def test_a_recipe_wins_over_a_file():
    """All that a recipe decides: the file's rate is that of its optimizer."""
    given = parse("--config", ROOT / "configs" / "gpt2-124m-reference.toml", "--recipe", "fast")
    cfg = ti.Config(**(ti.RECIPES["fast"]["flags"] | given | {"data_dir": ti.FINEWEB_DIR}))
    ti.resolve_model(cfg, "cuda")
    ti.resolve_length(cfg, 10_000_000_000)
    assert (cfg.max_lr, cfg.min_lr, cfg.max_steps) == (pytest.approx(1.8e-3), 0.0, 57_219)
    assert cfg.keep_every == 5_000  # the rest is the file's


def test_under_another_recipe_a_file_keeps_its_proportions(tmp_path):
    own = ROOT / "configs" / "own-corpus.toml"
    given = parse("--config", own, "--recipe", "fast")
    assert (given["epochs"], given["max_lr"]) == (2.4, 0.003)
    assert parse("--config", own, "--recipe", "reference") == parse("--config", own) | {
        "recipe": "reference"
    }
    fast = tmp_path / "fast.toml"
    fast.write_text('recipe = "fast"\nmax_steps = 360\nmax_lr = 0.009\noptimizer = "muon"\n')
    assert parse("--config", fast, "--recipe", "fast")["max_steps"] == 360
    given = parse("--config", fast, "--recipe", "reference", "--max_lr", "0.004")
    assert (given["max_steps"], given["max_lr"], "optimizer" in given) == (600, 0.004, False)


def test_a_branch_is_not_what_the_file_of_the_long_run_says(tmp_path):
    file = tmp_path / "long.toml"
    file.write_text('run_name = "long"\nmax_steps = 9\nwarmup_steps = 3\nschedule = "wsd"\n')
    given = parse("--config", file, "--decay_from", "checkpoints/long/step_00000008.pt")
    assert given.keys() == {"config", "decay_from", "schedule"}


def test_the_reference_recipe_is_the_reference_run():
    """Nothing in it differs from what the flags --model gpt2 and --max_steps decide."""
    names = ("gpt2-124m-reference", "8-gpus", "dgx-spark")
    for name in names:
        recipe = flags.read_config(ti.Config, ROOT / "configs" / f"{name}.toml")
        cfg, plain = ti.Config(**recipe), ti.Config(model="gpt2", max_steps=95_365)
        for config in (cfg, plain):
            config.data_dir = ti.FINEWEB_DIR
            ti.resolve_model(config, "cuda")
            ti.resolve_length(config, 10_000_000_000)
        of_the_machine = {"run_name", "use_tensorboard", "resume", "keep_every", "micro_batch_size"}
        of_the_machine |= {"hang_timeout", "checkpoint_freq", "epochs"}
        for field in dataclasses.fields(ti.Config):
            if field.name not in of_the_machine:
                same = getattr(plain, field.name)
                same = pytest.approx(same) if isinstance(same, float) else same
                assert getattr(cfg, field.name) == same, (name, field.name)


# --- Help, completion, colours --------------------------------------------------------------------


def test_every_flag_has_group_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(ti.Config):
        (entry,) = re.findall(rf"^  --{field.name}\b(?:.*\n)+?(?=  -|\n|\Z)", text, re.M)
        assert re.search(r"\[[^\]]+\]\s*$", entry), entry
    assert text.count("\n\n") > 8  # groups


def test_flags_are_read_before_pytorch_is_loaded():
    """--help is answered where PyTorch cannot even be imported."""
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        "sys.argv = ['train_improved.py', '--help']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    path = {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment() | path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--max_lr FLOAT" in done.stdout, done.stderr
    assert ti.Config.hellaswag_file == hellaswag.DEFAULT_FILE  # the one default known twice


def completions(line: str, **env) -> subprocess.CompletedProcess:
    """What the shell would be answered after `line` and Tab, as argcomplete's hook asks it."""
    env |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    env |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    env |= {"_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout"}
    return subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment() | env, capture_output=True, text=True
    )


def test_completion():
    pytest.importorskip("argcomplete")
    assert "PYTHON_ARGCOMPLETE_OK" in SCRIPT.read_text()[:1024]
    assert completions("train_improved.py --max_st").stdout.split() == ["--max_steps"]
    assert completions("train_improved.py --dtype bf").stdout.split() == ["bfloat16"]


def test_completion_never_starts_a_run(monkeypatch):
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setitem(sys.modules, "argcomplete", None)  # as where it is not installed
    with pytest.raises(ImportError):
        parse("--model", "tiny")


def on_a_terminal(*argv, **env) -> str:
    """Output of the program on a terminal of its own."""
    leader, follower = pty.openpty()
    command = [sys.executable, str(SCRIPT), *argv]
    env = {k: v for k, v in environment().items() if k not in ("NO_COLOR", "TERM")} | env
    with subprocess.Popen(
        command, env=env, stdin=follower, stdout=follower, stderr=follower
    ) as process:
        os.close(follower)
        output = b""
        with contextlib.suppress(OSError):  # the other side is closed
            while chunk := os.read(leader, 4096):
                output += chunk
    os.close(leader)
    assert process.returncode == 2
    return output.decode()


def test_colours_only_on_a_terminal_that_wants_them():
    red = "\x1b[31merror: unrecognized argument: --nope\x1b[0m"
    assert red in on_a_terminal("--nope", TERM="xterm")
    plain = on_a_terminal("--nope", TERM="xterm", NO_COLOR="1")
    assert "error: unrecognized" in plain and "\x1b" not in plain
    done = subprocess.run([sys.executable, str(SCRIPT), "--nope"], capture_output=True, text=True)
    assert "error: unrecognized" in done.stderr and "\x1b" not in done.stderr
