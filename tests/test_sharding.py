"""--shard in real processes over gloo: the same numbers and the same file as without it."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from conftest import SCRIPT, environment, run, start
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
    worker = workers_of(process)[1]
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


# In the smallest model that fills some buckets, which are made smaller too; with a compiler that
# generates no code. Shares are of the operations in a backward pass: time would depend on others.
SHARES = """
import functools, json
import torch, torch.distributed
from torch.utils._python_dispatch import TorchDispatchMode
import train_improved as ti
from runtime import passes

class SmallBuckets(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, model, **options):
        super().__init__(model, bucket_cap_mb=0.3, **options)

class Count(TorchDispatchMode):
    operations = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))

def note(state, bucket):
    ready.append(count.operations)
    future = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])

torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 300_000
torch.nn.parallel.DistributedDataParallel = SmallBuckets
torch.compile = functools.partial(torch.compile, backend="aot_eager")
dist = ti.Distributed("cpu", 900.0)
model = ti.GPT(4, 2, 64, 32)
cfg = ti.Config(compile=True, micro_batch_size=1, seq_len=32)
run = ti.Run(cfg, set(), dist, None, None, [], torch.float32, model)
run.optimizer = torch.optim.SGD(model.parameters())
train_model = passes.prepare_pass(run, True)
train_model.register_comm_hook(None, note)
ids = torch.zeros(1, 33, dtype=torch.long)
for _ in range(2):  # DDP arranges its buckets in the first
    loss, ready = train_model(ids[:, :-1], ids[:, 1:]), []
    with Count() as count:
        loss.backward()
if dist.is_main:
    print(json.dumps([operations / count.operations for operations in ready]))
dist.leave()
"""


# What is asked for in which order; on a GPU communication has streams of its own.
ORDER = """
import json
import torch
from torch.utils._python_dispatch import TorchDispatchMode
import train_improved as ti
from training import sharding

KINDS = {"allgather": "G", "attention": "b", "reduce_scatter": "S"}

class Note(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        order.extend(letter for name, letter in KINDS.items() if name in func.__name__)
        return func(*args, **(kwargs or {}))

dist = ti.Distributed("cpu", 900.0)
model = ti.GPT(4, 2, 64, 32)
sharding.shard(model)
ids = torch.zeros(1, 33, dtype=torch.long)
for _ in range(2):  # FSDP2 learns the order of the blocks in the first
    order = []
    with Note():
        loss = model(ids[:, :-1], ids[:, 1:])
        order.append(" ")
        loss.backward()
if dist.is_main:
    print(json.dumps("".join(order)))
dist.leave()
"""


def of_two_processes(script: str, folder):
    """What a script prints last, as JSON, in two processes over gloo."""
    path = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
    (folder / "script.py").write_text(path + script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "script.py"], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_compiled_gradients_are_sent_while_the_backward_pass_runs(tmp_path):
    shares = of_two_processes(SHARES, tmp_path)
    assert shares[0] < 0.45 and sum(share < 0.9 for share in shares) >= 3, shares


def test_shares_travel_while_other_blocks_are_computed(tmp_path):
    """Forward: the embeddings, then each block's weights. Backward: before a block is computed the
    next one's weights are asked for; its gradients leave after it, the embeddings' at the end."""
    assert of_two_processes(ORDER, tmp_path) == "GGbGbGbGb GGbSGbSGbSbSS"
