"""What the machine is asked: memory, micro-batch, recompilations, profile."""

import functools
import json
import os
import re
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_improved as ti
from conftest import SCRIPT, run
from runtime import machine
from training.memory import training_bytes

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
GB = 1e9


@pytest.fixture
def model():
    return ti.GPT(2, 2, 32, 64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def choose(model, sequences=24, processes=1, saved=None):
    batch = sequences * model.seq_len * processes
    cfg = ti.Config(total_batch_size=batch, micro_batch_size=saved)
    dist = SimpleNamespace(device=CPU, world_size=processes)
    return machine.choose_micro_batch(ti.Run(cfg, set(), dist, None, None, [], FP32, model))


def test_on_a_cpu_the_largest_divisor_that_fits(model):
    assert choose(model) == 24
    assert choose(model, sequences=3 * 64) == 64, "no more than 4096 tokens a pass"
    # A share of the memory that cannot hold even the weights leaves one sequence.
    assert choose(model, processes=1_000_000) == 1
    assert choose(model, saved=5) == 5, "a checkpoint's counts"
    assert not machine.cache_file().exists(), "what is estimated need not be remembered"


def test_memory_that_ran_out_is_remembered_for_a_day(model, monkeypatch):
    machine.remember_shortage(model, CPU, FP32, 8)
    assert choose(model) == 8
    assert choose(model, sequences=9) == 3, "a divisor"
    assert (choose(model, saved=12), choose(model, saved=4)) == (8, 4), "it wins over a checkpoint"
    later = time.time() + machine.SHORTAGE_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert (choose(model), choose(model, saved=12)) == (24, 12)
    machine.cache_file().write_text("no JSON")
    assert choose(model) == 24


def test_the_micro_batch_is_looked_for_with_the_model_that_trains(tmp_path, data, monkeypatch):
    seen = []

    def choose(run):
        seen.append(run.model.activation_checkpointing)
        return 1

    monkeypatch.setattr(machine, "choose_micro_batch", choose)
    monkeypatch.chdir(tmp_path)
    given = {"model": "tiny", "data_dir": str(data), "activation_checkpointing": True}
    run, _ = ti.set_up(given, ti.Distributed("cpu", 60.0))
    assert seen == [True] and run.cfg.micro_batch_size == 1


def test_a_user_without_a_home(model, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it does for such a user
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(Path("elsewhere").absolute()))
    assert machine.cache_file().parts[-4] == "elsewhere"
    assert choose(model) == 24


@functools.cache
def estimated(name, dtype, sequences):
    with torch.device("meta"):
        model = ti.GPT(**ti.PRESETS[name])
    return training_bytes(model, dtype, sequences, torch.device("cuda"))


@pytest.mark.parametrize("card", [8, 16, 24, 80, 0.6 * 128])
@pytest.mark.parametrize("name", [name for name in ti.PRESETS if name != "tiny"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("more", [0.95, 1.0, 1.3])  # than the estimate, which may be wrong
def test_the_search_never_tries_what_the_budget_does_not_allow(card, name, dtype, more):
    budget, tried = 0.9 * card * GB, []
    estimate = functools.partial(estimated, name, dtype)

    def measure(n):
        tried.append(n)
        if more * estimate(n) > card * GB:
            raise torch.OutOfMemoryError
        return more * estimate(n)

    sizes = [1, 2, 4, 8, 16, 32, 64]
    if more * estimate(1) > card * GB:
        with pytest.raises(torch.OutOfMemoryError):
            machine._search(sizes, budget, estimate, measure)
        assert tried == [1]
        return
    found = machine._search(sizes, budget, estimate, measure)
    assert tried[0] == 1 and all(n <= 2 or more * estimate(n) <= budget for n in tried)
    assert found == max((n for n in sizes if more * estimate(n) <= budget), default=1)


def test_the_search_between_sizes_that_are_far_apart():
    tried = []

    def measure(n):
        tried.append(n)
        return 10 + n

    assert machine._search([1, 5, 35], 100, lambda n: 10 + n, measure) == 35
    assert tried == [1, 2, 5, 35]
    assert machine._search([1, 5, 35], 40, lambda n: 10 + n, measure) == 5
    assert machine._search([1], 100, lambda n: 10 + n, measure) == 1


@pytest.mark.parametrize(
    "size, sequences, next_size", [(8, 8, 4), (6, 6, 3), (3, 3, 1), (5, 10, 2)]
)
def test_smaller_divides_the_batch(size, sequences, next_size):
    assert machine.smaller(size, sequences) == next_size


def test_out_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert machine.is_out_of_memory(caught.value)
    assert machine.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not machine.is_out_of_memory(RuntimeError("shapes do not match"))


# The kernel's count of a process begins with what held it before exec: that of this one is small.
HELD = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True)
print("held", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


WIDE = "--n_head 8 --n_embd 512 --seq_len 128 --micro_batch_size 1"
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2".split()


@pytest.mark.parametrize(
    "launcher, shape",
    [([], ""), ([], f"--n_layer 2 {WIDE}"), (TORCHRUN, f"--n_layer 8 {WIDE} --shard")],
)
def test_on_a_cpu_the_summary_says_what_is_held(tmp_path, data, launcher, shape):
    """By a run with everything in it: evaluation, samples, histograms and a checkpoint."""
    flags = f"{shape} --device cpu --total_batch_size 512 --max_steps 1 --use_tensorboard".split()
    options = {"script": "-c", "before": [HELD, *launcher, SCRIPT], "small": False}
    out, _ = run(*flags, cwd=tmp_path, data=data, **options)
    said = re.search(r"about ([\d.]+) GB of memory .* ([\d.]+) GB for the copy", out).groups()
    held = int(re.search(r"^held (\d+)", out, re.M)[1])
    assert sum(map(float, said)) * GB == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize("steps", [8, 5])  # whole, and a command that ends within the trace
def test_profile_writes_a_trace(tmp_path, data, steps):
    flags = f"--max_steps {steps} --eval_freq 0 --sample_freq 0 --run_name a --profile".split()
    out, _ = run(*flags, cwd=tmp_path, data=data)
    (trace,) = (tmp_path / "runs" / "a").glob("*.pt.trace.json")
    assert f"--profile: runs/a/{trace.name}" in out
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::addmm" in names and any("ProfilerStep" in str(n) for n in names)


def test_a_profile_of_too_few_steps_is_said(tmp_path, data):
    flags = "--max_steps 2 --eval_freq 0 --sample_freq 0 --run_name a --profile".split()
    out, _ = run(*flags, cwd=tmp_path, data=data)
    assert "--profile: no trace, it needs at least 4 steps" in out
    assert not list((tmp_path / "runs").rglob("*.trace.json"))
