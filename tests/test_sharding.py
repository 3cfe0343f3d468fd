"""--shard in real processes over gloo: the same numbers and the same file as without it."""

import re
import signal

import pytest
import torch

from conftest import run, start
from test_faults import faulty, saved_steps, wait_for_step
from test_training import checkpoint, logged

FLAGS = "--max_steps 8 --eval_freq 4 --checkpoint_freq 4 --use_tensorboard --log_jsonl".split()
FLAGS += "--total_batch_size 384 --micro_batch_size 2 --histogram_freq 4".split()
CLOSE = {"Loss/train": 2e-6, "Loss/validation": 2e-6, "Gradient/norm_unclipped": 2e-4}


def assert_close(ours: dict, theirs: dict) -> None:
    """Logged values of two runs, which differ by the order of sums."""
    for tag, tolerance in CLOSE.items():
        assert [step for step, _ in ours[tag]] == [step for step, _ in theirs[tag]], tag
        values = [v for _, v in theirs[tag]]
        assert [v for _, v in ours[tag]] == pytest.approx(values, rel=tolerance), tag


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_through_all_modes_is_one_run(tmp_path, data, optimizer):
    """2 sharded processes, 1, 3 sharded, 2 replicated: each goes on from the other's file."""
    flags = [*FLAGS, "--optimizer", optimizer, "--run_name"]
    run(*flags, "whole", cwd=tmp_path, data=data)
    modes = [(2, ["--shard"]), (None, []), (3, ["--shard", "--activation_checkpointing"]), (2, [])]
    for steps, (nproc, more) in zip((2, 4, 6, 8), modes, strict=True):
        more = [*more, "--resume", "auto", "--max_steps", steps, "--warmup_steps", 0]
        flags[flags.index("--max_steps") + 1] = steps
        run(*flags, "parts", *more, cwd=tmp_path, data=data, nproc=nproc)
    whole, parts = (torch.load(checkpoint(tmp_path, 8, n), weights_only=True) for n in ("whole", "parts"))
    assert whole["model"].keys() == parts["model"].keys()
