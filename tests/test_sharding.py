"""--shard in real processes over gloo: the same numbers and the same file as without it."""

import os
import re
import signal

import pytest
import torch

from conftest import run, start
from test_faults import faulty, saved_steps, wait_for_step, workers_of
from test_plan import hellaswag_file
from test_training import checkpoint, logged

# The rate is constant after warm-up, so that the length of a part plays no part.
FLAGS = (
    "--eval_freq 3 --checkpoint_freq 3 --histogram_freq 3 --use_tensorboard --min_lr 1e-2 "
    "--warmup_steps 2 --total_batch_size 384 --micro_batch_size 2 --optimizer muon"
).split()


def test_a_run_through_all_modes_is_one_run(tmp_path, data):
    """2 sharded processes, then 1, then 3 sharded: each goes on from what the one before saved."""
    items = ["--hellaswag_file", hellaswag_file(tmp_path)]
    run(*FLAGS, *items, "--run_name", "whole", "--max_steps", 9, cwd=tmp_path, data=data)
    modes = [(2, ["--shard"]), (None, []), (3, ["--shard", "--activation_checkpointing"])]
    for steps, (nproc, more) in zip((3, 6, 9), modes, strict=True):
        more += [*items, "--run_name", "parts", "--resume", "auto", "--max_steps", steps]
        run(*FLAGS, *more, cwd=tmp_path, data=data, nproc=nproc)
    ours, theirs = (logged(tmp_path / "runs" / name) for name in ("parts", "whole"))
    # Three times as many processes sum in another order, and AdamW makes much of tiny gradients.
    for tag, tolerance in {
        "Loss/train": 2e-5,
        "Loss/validation": 2e-5,
        "Gradient/norm_unclipped": 1e-3,
    }.items():
        assert [step for step, _ in ours[tag]] == [step for step, _ in theirs[tag]], tag
        values = [value for _, value in theirs[tag]]
        assert [value for _, value in ours[tag]] == pytest.approx(values, rel=tolerance), tag
    assert [step for step, _ in ours["Evaluation/hellaswag_accuracy"]] == [0, 3, 6, 9]
    assert ours["Evaluation/hellaswag_accuracy"] == theirs["Evaluation/hellaswag_accuracy"]
    assert ours.keys() == theirs.keys()  # histograms, update ratios, samples and all
    whole, parts = (
        torch.load(checkpoint(tmp_path, 9, name), weights_only=True) for name in ("whole", "parts")
    )
    for name, tensor in whole["model"].items():
        assert type(parts["model"][name]) is torch.Tensor
        assert torch.allclose(parts["model"][name], tensor, atol=3e-3), name
    tied = parts["model"]["lm_head.weight"], parts["model"]["transformer.wte.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    for i, moments in whole["optimizer"]["state"].items():
        found = {k: v.shape for k, v in parts["optimizer"]["state"][i].items()}
        assert found == {k: v.shape for k, v in moments.items()}


def test_signals_to_one_rank_are_for_all(tmp_path, data):
    """A checkpoint takes all ranks, so that they agree on the step."""
    flags = [*FLAGS, "--max_steps", 5000, "--checkpoint_freq", 0, "--run_name", "a", "--shard"]
    process = start(*flags, cwd=tmp_path, data=data, nproc=2)
    wait_for_step(process, 5)
    worker = max(workers_of(process))
    os.kill(worker, signal.SIGUSR1)
    for line in process.stdout:
        if "SIGUSR1, saving" in line:
            break
    os.kill(worker, signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    step = int(re.search(r"stopped at step (\d+)", out)[1])
    assert saved_steps(tmp_path)[-1] == step, err


def test_bad_steps_go_back_to_a_checkpoint(tmp_path, data):
    flags = [*FLAGS, "--max_steps", 12, "--max_skips", 2, "--run_name", "a", "--shard"]
    out, _ = faulty("loss", 5, 7, *flags, cwd=tmp_path, data=data, nproc=2)
    assert "updates in a row were skipped up to step 6 (--max_skips 2): back to" in out
    assert "finished at step 12 of 12" in out
