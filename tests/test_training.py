"""The training program as its users run it: real processes, read back with TensorBoard's reader."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import train_improved as ti
from conftest import SCRIPT, read_scalars, run, start
from tokens import stream

CONTRACT = [
    "Loss/train",
    "Loss/validation",
    "Learning_Rate/lr",
    "Gradient/norm",
    "Performance/step_time_ms",
    "Performance/tokens_per_sec",
    "Training/epoch",
]
TIMES = ("Performance/",)  # tags whose values are times


def logged(folder) -> dict:
    """{tag: [(step, value), ...]} of all that is not a time, as TensorBoard's reader sees it."""
    return {
        tag: [(step, value) for step, value, _ in points]
        for tag, points in read_scalars(folder).items()
        if not tag.startswith(TIMES)
    }


def assert_same_training(a: Path, b: Path, changed=False):
    """Two checkpoints hold bit-identical weights, moments, random numbers and state; `changed`: but
    for the note that a resume changed a flag."""
    one, two = (torch.load(p, weights_only=True) for p in (a, b))
    for part in ("model", "optimizer", "rng", "loss_scale"):
        assert_equal(one[part], two[part], part)
    for name in one["state"]:
        if not name.endswith("_seconds") and not (changed and name == "changes"):
            assert one["state"][name] == two["state"][name], name


def assert_equal(one, two, where):
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, pair in enumerate(zip(one, two, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    else:
        assert one == two, where


def checkpoint(folder, step, name="a") -> Path:
    return Path(folder) / "checkpoints" / name / f"step_{step:08d}.pt"


FREQS = "--use_tensorboard --max_steps 24 --eval_freq 8 --checkpoint_freq 6 --histogram_freq 10"
FREQS = [*FREQS.split(), "--warmup_steps", "5", "--run_name", "a"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """A run that nothing interrupts."""
    cwd = tmp_path_factory.mktemp("whole")
    out, err = run(*FREQS, cwd=cwd, data=data)
    return cwd, out, err


def test_a_run_learns_and_says_where_everything_is(whole):
    cwd, out, err = whole
    assert err == ""
    losses = logged(cwd / "runs" / "a")["Loss/train"]
    assert losses[0][1] > 10 and losses[-1][1] < 9
    for text in (
        "finished at step 24 of 24",
        "checkpoints/a",
        "runs/a",
        "tensorboard --logdir=runs",
    ):
        assert text in out
    again = out.split("train longer")[1]  # the same command again, as it can be typed
    for flag in ("--resume latest", "--run_name a", "--use_tensorboard", "--max_steps 48"):
        assert flag in again
    assert out.count("HellaSwag is off, ") == 1  # its data is not there
    assert out.index("of memory reserved for the copy") < out.index("step     1/24")
    assert out.count("of memory reserved for the copy") == 1  # of the moments, too
    config = json.loads((cwd / "runs" / "a" / "config.json").read_text())
    assert config["config"]["max_lr"] == 0.01 and config["torch"] == torch.__version__


def test_losses_are_those_of_a_plain_loop(whole, data):
    """Chunked loss, micro-batches, fused AdamW, deferred clipping: against the textbook's step."""
    cfg = ti.Config(**torch.load(checkpoint(whole[0], 24), weights_only=True)["config"])
    torch.manual_seed(cfg.seed)
    model = ti.GPT(cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.seq_len)
    source = stream.open_source(str(data), "train", cfg.seq_len, cfg.seed)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    B, losses, norms = cfg.total_batch_size // cfg.seq_len, [], []
    for step in range(1, cfg.max_steps + 1):
        windows = source.windows(np.arange((step - 1) * B, step * B)).astype(np.int64)
        x, y = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
        logits = model.lm_head(model.features(x))
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)))
        for group in optimizer.param_groups:
            group["lr"] = ti.learning_rate(step, cfg)
        optimizer.step()
        losses.append(loss.item())
    values = logged(whole[0] / "runs" / "a")
    assert [v for _, v in values["Loss/train"]] == pytest.approx(losses, rel=2e-5)
    assert [v for _, v in values["Gradient/norm_unclipped"]] == pytest.approx(norms, rel=2e-3)


def test_every_tag_of_the_contract_at_every_step(whole):
    scalars = logged(whole[0] / "runs" / "a") | {
        tag: [(s, v) for s, v, _ in points]
        for tag, points in read_scalars(whole[0] / "runs" / "a").items()
    }
    for tag in CONTRACT:
        steps = [step for step, _ in scalars[tag]]
        assert steps == ([0, 8, 16, 24] if "validation" in tag else list(range(1, 25))), tag
    cfg = ti.Config(max_lr=1e-2, min_lr=1e-3, warmup_steps=5, max_steps=24)
    for step, lr in scalars["Learning_Rate/lr"]:
        assert lr == pytest.approx(ti.learning_rate(step, cfg), rel=1e-6)
    norms = dict(scalars["Gradient/norm_unclipped"])
    for step, norm in scalars["Gradient/norm"]:
        assert norm == pytest.approx(min(1.0, norms[step]), rel=1e-6)
    epoch = dict(scalars["Training/epoch"])
    assert epoch[24] == pytest.approx(24 * 256 / 20_000, rel=1e-2)


def test_histograms_text_and_hparams_are_in_the_run(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = whole[0] / "runs" / "a"
    assert {p.name for p in folder.iterdir() if p.is_dir()} == set(), "no sub-runs"
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0}).Reload()
    tags = events.Tags()
    names = [n for n, _ in ti.GPT(2, 2, 16, 32).named_parameters()]
    for name in names:
        for kind in ("Parameters", "Gradients"):
            steps = [h.step for h in events.Histograms(f"{kind}/{name}")]
            assert steps == [1, 10, 20, 24], (kind, name)
    assert "Generated_Samples/text/text_summary" in tags["tensors"]
    metadata = events.SummaryMetadata("_hparams_/session_start_info")
    assert metadata.plugin_data.plugin_name == "hparams"


def test_nothing_of_tensorboard_is_imported_without_the_flag(tmp_path, data):
    program = (
        "import sys, runpy\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "loaded = [m for m in sys.modules if 'tensorboard' in m]\n"
        "assert not loaded, loaded\n"
    )
    from conftest import SMALL, environment

    flags = [*SMALL, "--data_dir", str(data), "--max_steps", "2"]
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n" + program
    code = f"import sys; sys.argv = {[str(SCRIPT), *flags]!r}\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "runs").glob("*/events*"))


def wait_for_step(process, step, timeout=120):
    """Until the program has printed that step (a line every step or so in these runs)."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        done = re.search(r"step +([\d,]+)/", line)
        if done and int(done[1].replace(",", "")) >= step:
            return seen
    raise AssertionError("ended before:\n" + "".join(seen) + process.stderr.read())


@pytest.mark.parametrize("number, code", [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)])
def test_stopped_and_resumed_equals_uninterrupted(whole, tmp_path, data, number, code):
    process = start(*FREQS, cwd=tmp_path, data=data)
    wait_for_step(process, 10)
    process.send_signal(getattr(signal, number))
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    if number != "SIGKILL":
        assert "--resume latest" in out and "--run_name a" in out
    out, err = run(
        "--use_tensorboard", "--resume", "latest", "--run_name", "a", cwd=tmp_path, small=False
    )
    assert "resuming from checkpoints/a/step_" in out
    assert_same_training(checkpoint(whole[0], 24), checkpoint(tmp_path, 24))
    assert logged(tmp_path / "runs" / "a") == logged(whole[0] / "runs" / "a")
    texts = re.findall(r"step +\d+ sample:\n(?:    .*\n)+", out)
    assert texts and all(text in whole[1] for text in texts), "the same texts"


def test_same_losses_with_1_2_and_4_processes(whole, tmp_path, data):
    expected = logged(whole[0] / "runs" / "a")
    for nproc in (2, 4):
        cwd = tmp_path / str(nproc)
        cwd.mkdir()
        run(*FREQS, "--micro_batch_size", "1", cwd=cwd, data=data, nproc=nproc)
        got = logged(cwd / "runs" / "a")
        assert got.keys() == expected.keys()
        for tag in ("Loss/train", "Loss/validation", "Gradient/norm_unclipped", "Training/epoch"):
            for (step, value), (step_, value_) in zip(got[tag], expected[tag], strict=True):
                assert step == step_ and value == pytest.approx(value_, rel=2e-4), (tag, step)


def test_resume_under_another_name_begins_a_new_timeline(whole, tmp_path, data):
    flags = ["--resume", str(checkpoint(whole[0], 12)), "--run_name", "b", "--use_tensorboard"]
    run(*flags, cwd=tmp_path, small=False)
    ours, theirs = logged(tmp_path / "runs" / "b"), logged(whole[0] / "runs" / "a")
    assert ours["Loss/train"] == theirs["Loss/train"][12:]
    assert_same_training(checkpoint(whole[0], 24), checkpoint(tmp_path, 24, "b"))


def test_resume_with_more_steps_goes_on_and_says_what_changed(whole, tmp_path):
    flags = ["--resume", str(checkpoint(whole[0], 24)), "--run_name", "more", "--max_steps", "30"]
    out, _ = run(*flags, cwd=tmp_path, small=False)
    assert "--max_steps: 24 -> 30" in out
    assert torch.load(checkpoint(tmp_path, 30, "more"), weights_only=True)["step"] == 30


def test_a_finished_run_resumed_has_nothing_to_do(whole):
    cwd = whole[0]
    before = checkpoint(cwd, 24).read_bytes()
    out, _ = run("--resume", "latest", "--run_name", "a", cwd=cwd, small=False)
    assert "finished at step 24" in out
    assert checkpoint(cwd, 24).read_bytes() == before


def test_sigusr1_saves_and_goes_on(tmp_path, data):
    flags = "--max_steps 80 --eval_freq 0 --sample_freq 0 --checkpoint_freq 0 --run_name a".split()
    process = start(*flags, cwd=tmp_path, data=data)
    wait_for_step(process, 10)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    steps = sorted(p.name for p in (tmp_path / "checkpoints" / "a").glob("step_*.pt"))
    assert len(steps) == 2 and steps[-1] == "step_00000080.pt"


def test_evaluation_and_sampling_do_not_change_training(whole, tmp_path, data):
    flags = [f if f != "8" else "0" for f in FREQS]
    run(*flags, cwd=tmp_path, data=data)
    one, two = (torch.load(checkpoint(c, 24), weights_only=True) for c in (whole[0], tmp_path))
    assert_equal(one["model"], two["model"], "model")
    assert_equal(one["optimizer"], two["optimizer"], "optimizer")
    assert_equal(one["rng"], two["rng"], "rng")


def test_a_dead_rank_ends_the_others(tmp_path, data):
    flags = ["--max_steps", "100000", "--eval_freq", "0", "--sample_freq", "0", "--run_name", "a"]
    process = start(*flags, cwd=tmp_path, data=data, nproc=2)
    wait_for_step(process, 3)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 2
    subprocess.run(["kill", "-9", children[1]], check=True)
    start_time = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - start_time < 60


def test_a_mixture_of_folders_resumes_exactly(tmp_path, data):
    from conftest import write_data

    other = write_data(tmp_path / "other", seed=5)
    mixture = ["--data_dir", f"{data}:0.7", f"{other}:0.3"]
    flags = [*FREQS, *mixture]
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    run(*flags, cwd=tmp_path / "whole")
    process = start(*flags, cwd=tmp_path / "parts")
    wait_for_step(process, 10)
    process.kill()
    process.communicate()
    # the checkpoint knows the mixture
    run("--resume", "latest", "--run_name", "a", cwd=tmp_path / "parts", small=False)
    assert_same_training(checkpoint(tmp_path / "whole", 24), checkpoint(tmp_path / "parts", 24))
    _, err = run(
        "--resume", "latest", "--run_name", "a", "--max_steps", "30", "--data_dir",
        f"{data}:0.6", f"{other}:0.4", cwd=tmp_path / "parts", small=False, expect=2,
    )  # fmt: skip
    assert "fingerprint" in err and "--allow_data_change" in err
