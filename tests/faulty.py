"""The training program with a fault put into it, for test_faults.py.

    python tests/faulty.py KIND FIRST LAST [flags of train_improved.py]

KIND: `loss`, `gradient` or `weights` turned into NaN, or `spike`, a loss a thousand times too
large, in the steps FIRST to LAST; `crash` or `hang` in an evaluation from step FIRST on; `exit` of
rank 1 in step FIRST; `memory` that from step FIRST on suffices for LAST sequences at a time;
`save`: death at file-system call LAST of save FIRST.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
import supervisor

supervisor.begin()

import torch

import checkpoint_files
import train_improved as ti
from conftest import DyingOs

kind, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.argv = [str(Path(ti.__file__)), *sys.argv[4:]]
forward_backward, validation_loss, forward = ti.forward_backward, ti.validation_loss, ti.GPT.forward
calls = 0


def faulty_forward(model, idx_BT, targets_BT):
    if kind == "memory" and calls >= first and len(idx_BT) > last:
        raise torch.OutOfMemoryError("CUDA out of memory (a fault put in by a test)")
    return forward(model, idx_BT, targets_BT)


def faulty_forward_backward(run, train_model, batch):
    """Steps are counted by calls, so that the same data met again is not poisoned again."""
    global calls
    calls += 1
    loss = forward_backward(run, train_model, batch)
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
    elif kind == "exit" and run.dist.rank == 1:
        os._exit(7)
    return loss


def faulty_validation_loss(run):
    if kind in ("crash", "hang") and run.state.step >= first:
        if kind == "crash":
            os.kill(os.getpid(), 9)
        time.sleep(3600)
    return validation_loss(run)


def faulty_save(*args, **kwargs):
    global calls
    calls += 1
    if calls == first:
        checkpoint_files.os = DyingOs(last)
    return save(*args, **kwargs)


save = checkpoint_files.save
if kind == "save":
    checkpoint_files.save = faulty_save
    sys.exit(ti.main())
ti.forward_backward, ti.validation_loss = faulty_forward_backward, faulty_validation_loss
ti.GPT.forward = faulty_forward
sys.exit(ti.main())
