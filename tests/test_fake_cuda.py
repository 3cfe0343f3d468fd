"""The GPU's code without a GPU: on a CUDA device that has shapes and memory, but no kernels. With
builds of PyTorch for the CPU and for CUDA.

Not covered: kernels, streams, NCCL, pinned memory, fragmentation. tests/test_gpu.py wants a GPU.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import environment

HERE = Path(__file__).parent
DEFERRED_READ = ["aten._to_copy.default"]  # a step's metrics, which are waited for one step later

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (g++)")


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Path:
    library, package = tmp_path_factory.mktemp("stub") / "fake_cuda.so", Path(torch.__file__).parent
    folders = [f"-I{package}/include", f"-I{package}/include/torch/csrc/api/include"]
    link = [f"-L{package}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{package}/lib"]
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", HERE / "fake_cuda.cpp"]
    subprocess.run([*command, "-o", library, *folders, *link], check=True)
    return library


@pytest.fixture
def on_fake_cuda(stub, tmp_path):
    def on_fake_cuda(*parts) -> list[dict]:
        """The results of parts of on_fake_cuda.py, each (name, its options[, the card])."""
        lines = [json.dumps([*part, {}][:3]) for part in parts]
        done = subprocess.run(
            [sys.executable, HERE / "on_fake_cuda.py", stub, *lines],
            env=environment() | {"XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    return on_fake_cuda


def test_a_step_waits_for_nothing_and_crosses_once(on_fake_cuda):
    small = {"n_layer": 1, "seq_len": 128}
    ways = [
        {"optimizer": optimizer, "dtype": dtype, "accumulation": accumulation}
        for optimizer in ("adamw", "soap_muon")
        for dtype in ("bfloat16", "float16", "float32")
        for accumulation in (1, 2)
    ]
    for way, found in zip(ways, on_fake_cuda(*[("step", small | w) for w in ways]), strict=True):
        assert found["step"] == 100, "the update was looked at"
        assert (found["crossings"], found["waits"]) == (DEFERRED_READ, []), way


def test_the_plan_says_what_a_step_takes(on_fake_cuda):
    """For each size and precision; fewer of the larger ones' blocks, which are all the same."""
    ways = [
        {"model": "gpt2", "micro_batch": 4, "accumulation": 2},
        {"model": "gpt2", "micro_batch": 8, "dtype": "float32", "optimizer": "muon"},
        {"model": "gpt2-medium", "micro_batch": 8, "dtype": "float16", "n_layer": 6},
        {"model": "gpt2", "micro_batch": 4, "optimizer": "soap_muon"},
        {"model": "gpt2-large", "micro_batch": 2, "dtype": "float32", "n_layer": 6},
        {"model": "gpt2-xl", "micro_batch": 4, "accumulation": 2, "n_layer": 8},
        {"model": "gpt2", "micro_batch": 16, "activation_checkpointing": True},
    ]
    for way, found in zip(ways, on_fake_cuda(*[("step", way) for way in ways]), strict=True):
        assert found["estimate"] == pytest.approx(found["peak"], rel=0.1), way


def test_the_micro_batch_is_as_large_as_the_card(on_fake_cuda):
    cases = [
        ({"total": 8e9}, "gpt2", 4, 16),
        ({"total": 16e9}, "gpt2", 8, 32),
        ({"total": 24e9, "shared": True}, "gpt2", 4, 32),
        ({"total": 80e9}, "gpt2-xl", 8, 32),
        ({"total": 128e9, "shared": True}, "gpt2-xl", 8, 32),
    ]
    options = {"dtype": "float32", "accumulation": 16, "micro_batch": 8}
    parts = [("micro_batch", options | {"model": model}, card) for card, model, *_ in cases]
    for (card, _, least, most), found in zip(cases, on_fake_cuda(*parts), strict=True):
        assert least <= found["found"] <= most, card
        assert found["most"] <= found["budget"] < card["total"], card


def test_evaluation_waits_once(on_fake_cuda):
    (found,) = on_fake_cuda(("evaluation", {}))
    crossings = {operation for crossed, _ in found.values() for operation in crossed}
    assert crossings == {"aten._to_copy.default", "aten.to.dtype_layout"}, "copies, nothing else"
    assert {name: len(waits) for name, (_, waits) in found.items()} == {
        "validation_loss": 1,
        "hellaswag_accuracy": 1,
        "samples": 8,  # one for each token of each sample, which are read to be shown
    }


def test_histograms_checkpoint_and_restore(on_fake_cuda):
    (found,) = on_fake_cuda(("histograms_and_checkpoint", {}))
    assert found["histograms"] == [DEFERRED_READ, 2]
    assert found["checkpoint"][1] == 0, "copied without waiting for each tensor"
    assert found["copy on"] == ["cpu"]
    assert found["restore"][1] == 0
    assert found["step"] == [DEFERRED_READ, 0]
