"""What must be true on a GPU, of the training program as people run it: `pytest -m gpu`.

And that benchmarks/gpu.py, which says how fast and how close, runs whole where there is none.
"""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, environment, read_scalars, run, start
from test_faults import no_traceback_of_ours, saved_steps, workers_of
from test_training import assert_same_training, checkpoint, logged, wait_for_step
from training.chunked_loss import chunked_cross_entropy

BENCHMARK = ROOT / "benchmarks" / "gpu.py"
GPUS = torch.cuda.device_count()
# A rate that does not depend on the length, for runs of several lengths.
FLAGS = (
    "--device cuda --n_layer 4 --n_head 4 --n_embd 256 --seq_len 256 --total_batch_size 8192 "
    "--micro_batch_size 8 --max_lr 1e-3 --min_lr 1e-3 --warmup_steps 2 --run_name a "
    "--eval_freq 0 --sample_freq 0 --hellaswag_freq 0 --histogram_freq 0 --checkpoint_freq 0 "
    "--use_tensorboard --max_steps"
).split()


def gpu(count: int = 1):
    """Mark a test that needs so many GPUs."""
    skip = pytest.mark.skipif(count > GPUS, reason=f"needs {count} CUDA GPU(s), here are {GPUS}")
    return lambda test: pytest.mark.gpu(skip(test))


@gpu()
def test_eager_compiled_and_float32_losses_agree(tmp_path, data):
    losses = []
    for how in (["--no-compile"], ["--compile"], ["--no-compile", "--dtype", "float32"]):
        folder = tmp_path / f"{len(losses)}"
        folder.mkdir()
        run(*FLAGS, 12, *how, cwd=folder, data=data, small=False)
        losses.append([value for _, value in logged(folder / "runs" / "a")["Loss/train"]])
    eager, compiled, exact = losses
    assert eager == pytest.approx(exact, abs=0.03) and compiled == pytest.approx(exact, abs=0.03)


@gpu()
def test_a_resume_is_exact_with_deterministic_algorithms(tmp_path, data, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options = {"script": BENCHMARK, "before": ["--deterministic"], "small": False, "data": data}
    for name, stages in {"whole": [12], "parts": [6, 12]}.items():
        (tmp_path / name).mkdir()
        for steps in stages:
            run(*FLAGS, steps, "--resume", "auto", cwd=tmp_path / name, **options)
    parts, whole = (checkpoint(tmp_path / name, 12) for name in ("parts", "whole"))
    assert_same_training(parts, whole, changed=True)


@gpu()
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "soap_muon"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_step_does_not_wait_for_the_device(tmp_path, data, optimizer, dtype):
    options = {"script": BENCHMARK, "before": ["--watch_waits"], "small": False}
    flags = [*FLAGS, 12, "--no-compile"]  # SOAP's bases are renewed at step 10
    flags += ["--optimizer", optimizer, "--dtype", dtype]
    out, _ = run(*flags, cwd=tmp_path, data=data, **options)
    assert "finished at step 12" in out and not re.findall("^WAIT .*", out, re.M)


@gpu()
def test_the_compiled_loss_has_the_logits_of_one_chunk_at_a_time():
    x = torch.randn(8 * 4096, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(50_257, 64, device="cuda", requires_grad=True)
    y = torch.zeros(len(x), dtype=torch.long, device="cuda")
    compiled, peak = torch.compile(chunked_cross_entropy), 0
    for _ in range(2):  # the first compiles
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        compiled(x, w, y).backward()
        peak = torch.cuda.max_memory_allocated() - held
    assert peak < 1.5 * 2 * 4096 * 50_304


@gpu()
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_peak_is_what_the_plan_says(tmp_path, data, dtype):
    flags = [*FLAGS, 4, "--model", "gpt2", "--n_layer", 12, "--n_head", 12, "--n_embd", 768]
    flags += ["--seq_len", 512, "--no-compile", "--dtype", dtype]
    out, _ = run(*flags, cwd=tmp_path, data=data, small=False)
    peak = read_scalars(tmp_path / "runs" / "a")["Performance/memory_gb"][-1][1]
    assert float(re.search(r"about ([\d.]+) GB of memory", out)[1]) == pytest.approx(peak, rel=0.1)


@gpu()
def test_the_micro_batch_that_is_found_trains(tmp_path, data):
    flags = [flag for flag in FLAGS if flag not in ("--micro_batch_size", "8")]
    out, _ = run(*flags, 4, cwd=tmp_path, data=data, small=False)
    assert "finished at step 4" in out and "out of memory" not in out


@gpu()
def test_the_doctor_looks_at_the_gpu_whatever_else_is_wrong(tmp_path):
    flags = "--doctor --data_dir none --no-compile".split()
    out, _ = run(*flags, cwd=tmp_path, small=False, expect=2)
    assert "TF32" in out and "the run uses the CPU" not in out


@gpu()
def test_sigterm_saves(tmp_path, data):
    process = start(*FLAGS, 100_000, cwd=tmp_path, data=data, small=False)
    wait_for_step(process, 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert saved_steps(tmp_path)


@gpu(2)
def test_sigterm_to_torchrun_saves_under_nccl(tmp_path, data):
    process = start(*FLAGS, 100_000, cwd=tmp_path, data=data, small=False, nproc=2)
    wait_for_step(process, 5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert saved_steps(tmp_path) and no_traceback_of_ours(err)


@gpu(2)
def test_a_rank_that_is_killed_ends_the_others_under_nccl(tmp_path, data):
    process = start(*FLAGS, 100_000, cwd=tmp_path, data=data, small=False, nproc=2)
    wait_for_step(process, 5)
    subprocess.run(["kill", "-9", str(workers_of(process)[1])], check=True)
    _, err = process.communicate(timeout=60)
    assert "rank 1 has died" in err and no_traceback_of_ours(err)


PARTS = "doctor waits agree speed peers memory resume evaluation optimizers several".split()


@pytest.mark.parametrize("part", PARTS)
def test_the_benchmark_runs_whole_without_a_gpu(part, tmp_path):
    command = [sys.executable, BENCHMARK, "--device", "cpu", "--model", "tiny", "--quick"]
    command += ["--part", part, "--out", tmp_path / "lines"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    machine, line = (json.loads(line) for line in done.stdout.splitlines())
    assert machine["part"] == "machine" and line["part"] == part
    assert (tmp_path / "lines").read_text() == done.stdout
    assert not re.search(r'"(error|end)":|"code": (?!0\b|\[0, 0\])', done.stdout), done.stdout
    if part == "resume":
        found = line["deterministic"]
        assert found["codes"] == [0, 143, 0] and found["equal"] and found["stopped_after"] > 0
    if part == "several":
        assert line["saved"] == 1 and line["stop_seconds"] < 30
    if part == "speed":
        assert all(line[size]["tokens_per_s"] > 0 for size in ("2", "chosen"))
    if part == "evaluation":
        kinds = {"histogram", "hellaswag", "sample", "eval", "checkpoint"}
        assert line["stall_s"].keys() == kinds and line["usual_gap_s"] > 0
