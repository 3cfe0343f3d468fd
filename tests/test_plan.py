"""What is decided before the first step: the reference run's plan, resume rules, help."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import train_improved as ti
from conftest import ROOT, SCRIPT, run
from monitoring import summary
from runtime import planning
from test_training import checkpoint, logged


def sparse_shards(folder, train_tokens, val_tokens):
    """Shards of zeros that take no disk: only their sizes are real."""
    folder.mkdir()
    for split, count in (("train", train_tokens), ("val", val_tokens)):
        path = folder / f"nominal_{split}_000000.bin"
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, min(count, 2**31 - 1)
        shards = -(-count // 1_000_000_000)
        for i in range(shards):
            tokens = min(1_000_000_000, count - i * 1_000_000_000)
            header[2] = tokens
            path = folder / f"nominal_{split}_{i:06d}.bin"
            with path.open("wb") as file:
                file.write(header.tobytes())
                file.truncate(1024 + 2 * tokens)


def test_the_reference_run_is_95365_steps(tmp_path):
    sparse_shards(tmp_path / "nominal", 10_000_000_000, 100_000_000)
    flags = ["--model", "gpt2", "--data_dir", "nominal", "--dry_run", "--device", "cpu"]
    out, err = run(*flags, cwd=tmp_path, small=False)
    assert err == ""
    for words in (
        "124,439,808 parameters",
        "524,288 tokens a step",
        "95,365 steps",
        "(19,073 steps each)",
        "warm-up 715 steps to 0.0006, then cosine to 6e-05",
        "weight decay 0.1",
        "clipped at 1,",
        "10,000,000,000 training tokens",
    ):
        assert words in out, out
    for name in ti.Config.__dataclass_fields__:
        assert f"  --{name} " in out
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "runs").exists()


def test_the_fast_recipe_for_fineweb(tmp_path, data):
    recipe = ti.RECIPES["fast"]
    cfg = ti.Config(model="gpt2", recipe="fast", data_dir="x", **recipe["flags"])
    ti.resolve_model(cfg, "cuda")
    ti.resolve_length(cfg, 10_000_000_000)
    assert (cfg.max_steps, cfg.min_lr) == (57_219, 0.0)
    assert cfg.max_lr == pytest.approx(1.8e-3)
    assert (cfg.optimizer, cfg.schedule) == ("muon", "linear")
    flags = ["--recipe", "fast", "--dry_run", "--schedule", "cosine", "--run_name", "a"]
    out, _ = run(*flags, cwd=tmp_path, data=data, small=False)
    decided = dict(re.findall(r"^  --(\w+) (.*?)(?:   \(given\))?$", out, re.M))
    assert (decided["optimizer"], decided["schedule"]) == ("muon", "cosine")  # flags win
    assert (decided["max_steps"], decided["max_lr"]) == ("360", "0.006")
    plans = re.search(r"--recipe +reference +fast\n +optimizer +AdamW +Muon\n", out)
    assert plans and re.search(r"^ +steps +600 +360$", out, re.M)


def test_a_first_look_with_a_larger_model_on_the_sample_corpus():
    cfg = ti.Config(model="gpt2", data_dir=ti.SAMPLE_DIR)
    ti.resolve_model(cfg, "cuda")
    ti.resolve_length(cfg, 1_279_269)
    assert (cfg.total_batch_size, cfg.max_steps) == (16_384, 200)
    cfg = ti.Config(model="gpt2", data_dir=ti.SAMPLE_DIR, epochs=3)
    ti.resolve_model(cfg, "cuda")
    ti.resolve_length(cfg, 1_279_269)
    assert cfg.max_steps == 234  # 3 x 78


def test_the_table_of_recipes_is_what_they_do_with_a_configuration_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('model = "tiny"\nmax_steps = 1000\nmax_lr = 1e-3\n')
    out, _ = run("--config", file, "--dry_run", cwd=tmp_path, small=False)
    assert re.search(r"^ +steps +1,000 +600$", out, re.M), out
    assert re.search(r"^ +max_lr +0.001 +0.003$", out, re.M), out


def test_a_short_wsd_run_has_a_warm_up_that_fits():
    cfg = ti.Config(schedule="wsd", max_steps=20, total_batch_size=256)
    ti.resolve_length(cfg, 10_000)
    assert cfg.warmup_steps == 10


def test_max_steps_and_epochs(tmp_path, data):
    out, _ = run("--epochs", "2", "--dry_run", cwd=tmp_path, data=data)
    assert "156 steps" in out  # 2 x floor(20,000 / 256)
    out, _ = run("--epochs", "2", "--max_steps", "9", "--dry_run", cwd=tmp_path, data=data)
    assert "9 steps" in out


def test_help_is_quick_and_names_every_flag():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for name in ti.Config.__dataclass_fields__:
        assert re.search(rf"--{name}\b", done.stdout), name


def test_checkpoint_is_plain(tmp_path, data):
    run("--max_steps", "2", "--eval_freq", "0", "--run_name", "a", cwd=tmp_path, data=data)
    saved = torch.load(checkpoint(tmp_path, 2), weights_only=True)
    assert saved["step"] == 2 and saved["config"]["n_embd"] == 16
    assert "transformer.h.0.attn.c_attn.weight" in saved["model"]
    assert saved["model"]["transformer.wte.weight"].shape == (50257, 16)
    assert not any("_orig_mod" in k or "module." in k for k in saved["model"])
    size = checkpoint(tmp_path, 2).stat().st_size
    assert size < 1.05 * 12 * 811_216, "the tied matrix is stored once"


@pytest.mark.parametrize("nproc, micro", [(2, 2), (None, 1)])
def test_resume_on_another_process_count_or_micro_batch(tmp_path, data, nproc, micro):
    flags = "--max_steps 10 --eval_freq 5 --sample_freq 0 --checkpoint_freq 5 --use_tensorboard"
    run(*flags.split(), "--run_name", "a", cwd=tmp_path, data=data)
    resume = ["--resume", str(checkpoint(tmp_path, 5)), "--run_name", "b", "--use_tensorboard"]
    resume += ["--micro_batch_size", micro]
    run(*resume, cwd=tmp_path, small=False, nproc=nproc)
    one, two = (logged(tmp_path / "runs" / name) for name in "ab")
    for (step, value), (step_, value_) in zip(
        one["Loss/train"][5:], two["Loss/train"], strict=True
    ):
        assert step == step_ and value == pytest.approx(value_, rel=1e-4)
    assert one["Training/epoch"][5:] == two["Training/epoch"]


def test_what_would_divide_the_batch_is_said():
    cfg = ti.Config(model="tiny", total_batch_size=1024)
    ti.resolve_model(cfg, "cpu")
    planning.validate(cfg, 4)
    with pytest.raises(ValueError, match=r"nearest is 1152, or start 1 or 2 or 4 process\(es\)"):
        planning.validate(cfg, 3)


ITEM = {"activity_label": "Walking", "ctx": "A man walks into a bar. He", "label": 1}


def hellaswag_file(folder):
    """Seven items, so that two and three processes have other shares."""
    with (folder / "items.jsonl").open("w") as file:
        for i in range(7):
            endings = [f"sits down {i}.", "orders a drink.", "flies away to the moon.", "is a bar."]
            file.write(json.dumps(ITEM | {"ind": i, "endings": endings, "label": i % 4}) + "\n")
    return file.name


def test_hellaswag_while_training(tmp_path, data):
    hellaswag_file(tmp_path)
    flags = "--max_steps 4 --eval_freq 2 --use_tensorboard --hellaswag_file items.jsonl"
    values = {}
    for name, nproc in (("one", None), ("two", 2)):
        out, _ = run(*flags.split(), "--run_name", name, cwd=tmp_path, data=data, nproc=nproc)
        assert "of 7 items" in out
        values[name] = logged(tmp_path / "runs" / name)["Evaluation/hellaswag_accuracy"]
    assert [step for step, _ in values["one"]] == [0, 2, 4]
    assert values["one"] == values["two"]


def test_low_precision_learns_the_same(tmp_path, data):
    flags = "--max_steps 8 --use_tensorboard --sample_freq 0 --eval_freq 0".split()
    losses = {}
    for dtype in ("float32", "bfloat16", "float16"):
        run(*flags, "--run_name", dtype, "--dtype", dtype, cwd=tmp_path, data=data)
        losses[dtype] = [v for _, v in logged(tmp_path / "runs" / dtype)["Loss/train"]]
    assert losses["float32"][-1] < losses["float32"][0] - 0.4
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-3)
    assert losses["float16"] == pytest.approx(losses["float32"], rel=1e-3)


def test_compiled_training_equals_eager(tmp_path, data):
    """On a CPU too, where a compiler is installed; without one the error says what to do."""
    flags = "--max_steps 4 --eval_freq 2 --sample_freq 2 --use_tensorboard".split()
    run(*flags, "--run_name", "eager", cwd=tmp_path, data=data)
    from conftest import start

    process = start(*flags, "--run_name", "compiled", "--compile", cwd=tmp_path, data=data)
    _, err = process.communicate(timeout=300)
    if process.returncode == 2:
        assert "--compile: torch.compile does not work here" in err and "--no-compile" in err
        pytest.skip("no working C++ compiler")
    assert process.returncode == 0, err
    one, two = (logged(tmp_path / "runs" / n)["Loss/train"] for n in ("eager", "compiled"))
    assert [v for _, v in one] == pytest.approx([v for _, v in two], rel=1e-4)


def test_compile_trouble_falls_back_or_is_an_error(monkeypatch, capsys):
    import contextlib

    import torch._inductor.config

    from runtime import machine

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nonexistent/c++",))
    torch._dynamo.reset()
    model = ti.GPT(n_layer=1, n_head=1, n_embd=24, seq_len=16)
    ids = torch.zeros(2, 17, dtype=torch.long)
    with pytest.raises(ValueError, match="does not work here"):
        machine.compiled(model, ids, contextlib.nullcontext, asked=True)
    capsys.readouterr()
    assert machine.compiled(model, ids, contextlib.nullcontext, asked=None) == (model, False)
    assert capsys.readouterr().out.count("WARNING torch.compile does not work here") == 1


def test_the_pinned_pytorch_is_the_one_of_the_requirements():
    assert f"torch=={summary.PINNED_TORCH}\n" in (ROOT / "requirements.txt").read_text()


def test_the_plan_says_what_is_off_or_changes_nothing(tmp_path, data):
    out, _ = run(
        *"--dry_run --shard --eval_freq 0 --sample_freq 0 --max_steps 9".split(),
        cwd=tmp_path,
        data=data,
    )
    assert "evaluation off" in out and "samples off" in out and "--shard changes nothing" in out
