"""The training program with a fault put into it, for test_faults.py and random_kills.py.

    python tests/faulty.py KIND FIRST LAST [flags of train_improved.py]

`loss`, `gradient`, `weights`  turned into NaN in the steps FIRST to LAST
`spike`                        a loss a thousand times too large in these steps
`exit`                         rank 1 ends in step FIRST
`crash`, `hang`                kill -9, or no end, in an evaluation from step FIRST on
`memory`                       from step FIRST on enough for LAST sequences at a time
`slow`                         evaluations from step FIRST on in pieces of LAST seconds each
`save`                         death at file-system call LAST of save FIRST
`disk`                         each piece of a checkpoint takes FIRST ms to write
`data`                         the last rank's data cannot be read from step FIRST on
`stall`                        reading data from step FIRST on never ends
`print`                        no fault: says which windows each step has, by their hashes
"""

import hashlib
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from runtime import supervisor

supervisor.begin()

import torch

import train_improved as ti
from checkpointing import files
from conftest import die_at_call
from training import evaluation

kind, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.argv = [str(Path(ti.__file__)), *sys.argv[4:]]
forward_backward, forward = ti.forward_backward, ti.GPT.forward
validation_loss = evaluation.validation_loss
calls = 0


def faulty_forward(model, idx_BT, targets_BT):
    if kind == "memory" and calls >= first and len(idx_BT) > last:
        raise torch.OutOfMemoryError("CUDA out of memory (a fault put in by a test)")
    return forward(model, idx_BT, targets_BT)


def faulty_forward_backward(run, train_model, batch, poll):
    """Steps are counted by calls, so that the same data met again is not poisoned again."""
    global calls
    calls += kind not in ("save", "data", "stall")
    if kind == "exit" and calls == first and run.dist.rank == 1:
        os._exit(7)
    loss = forward_backward(run, train_model, batch, poll)
    if not first <= calls <= last:
        return loss
    if kind == "loss":
        return loss * float("nan")
    if kind == "gradient":
        next(run.model.parameters()).grad[0, 0] = float("nan")
    elif kind == "weights" and calls == first:
        with torch.no_grad():
            run.model.transformer.wte.weight.fill_(float("nan"))
    elif kind == "spike":
        return loss * 1000
    return loss


def faulty_validation_loss(run, poll, reading):
    if kind in ("crash", "hang") and run.state.step >= first:
        if kind == "crash":
            os.kill(os.getpid(), 9)
        time.sleep(3600)
    if kind == "slow" and run.state.step >= first:
        evaluation.EVAL_TOKENS = run.cfg.seq_len  # a batch of one window
        read = run.val_data.windows_in_order
        run.val_data.windows_in_order = lambda index: (time.sleep(last), read(index))[1]
        print("evaluating", flush=True)
    return validation_loss(run, poll, reading)


def faulty_save(*args, **kwargs):
    global calls
    calls += 1
    if calls == first:
        die_at_call(last)
    return save(*args, **kwargs)


def slow_save(path, state, info, progress):
    save(path, state, info, lambda: (time.sleep(first / 1000), progress()))


save = files.save
files.save = {"save": faulty_save, "disk": slow_save}.get(kind, save)


def faulty_next_batch(loader, poll=None):
    global calls
    batch = next_batch(loader, poll)
    calls += kind in ("data", "stall")
    if kind == "print":
        hashes = " ".join(hashlib.sha256(w.numpy().tobytes()).hexdigest()[:8] for w in batch)
        print(f"windows {loader.position} {loader.rank} {hashes}\n", end="", flush=True)
    if kind == "data" and calls >= first and loader.rank == loader.world_size - 1:
        raise OSError(5, "Input/output error", "a shard")
    while kind == "stall" and calls >= first:
        time.sleep(0.2)
        poll()
    return batch


next_batch = ti.StepLoader.next_batch
ti.StepLoader.next_batch = faulty_next_batch
ti.forward_backward, evaluation.validation_loss = faulty_forward_backward, faulty_validation_loss
ti.GPT.forward = faulty_forward
supervisor.end(ti.main())
