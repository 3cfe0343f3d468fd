"""What the machine is asked: memory, micro-batch, recompilations, profile."""

import contextlib
import json

import pytest
import torch

import train_improved as ti
from conftest import run
from runtime import machine

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture
def model():
    return ti.GPT(2, 2, 32, 64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def choose(model, processes):
    return machine.choose_micro_batch(model, 24, CPU, FP32, processes, contextlib.nullcontext)


def test_the_largest_divisor_that_fits(model):
    assert choose(model, processes=1) == 24  # plenty of memory: nothing to try
    assert not machine.cache_file().exists()
    # A share of the memory that cannot hold even the weights leaves one sequence ...
    assert choose(model, processes=1_000_000) == 1
    # ... which is remembered,
    (known,) = json.loads(machine.cache_file().read_text()).values()
    assert known == 1
    # and a size found elsewhere is used as far as it divides the batch.
    (key,) = json.loads(machine.cache_file().read_text())
    machine.remember(key, 7)
    assert choose(model, processes=1_000_000) == 6
    machine.cache_file().write_text("no JSON")
    assert choose(model, processes=1_000_000) == 1


def test_measured_bytes_are_what_autograd_keeps(model):
    few, _ = machine._measured_bytes(model, CPU, [1], contextlib.nullcontext)
    # Per token and layer: two norms, qkv, attention, its output, four times the width twice; and
    # the loss's gradient of the features. Without the float32 logits of a plain loss.
    floats = few / 1.5 / 4
    channels = 64 * 32
    assert 2 * 12 * channels < floats < 2 * 25 * channels + 3 * 50_304 * 32 + 64 * 64 * 8


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
