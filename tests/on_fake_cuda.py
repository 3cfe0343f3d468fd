"""Run parts of the training program on a CUDA device that has shapes but no kernels.

Run as a program of its own: `python on_fake_cuda.py STUB.so PART ...` prints a JSON line a part. The stub
must be there before torch is imported, which reads its registry of hooks once.
"""

import contextlib
import ctypes
import json
import sys
import weakref
from pathlib import Path

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)


class Watch(TorchDispatchMode):
    """Bytes alive on the device and their peak; operations between devices; too much is an error.

    limit: bytes of the card. An operation whose result is beyond it raises OutOfMemoryError.
    """

    def __init__(self, limit: float = float("inf")):
        super().__init__()
        self.limit, self.live, self.peak = limit, 0, 0
        self.sizes, self.crossings = {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors}) > 1:
            self.crossings.append(str(func))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.is_cuda:
                self._count(t.untyped_storage())
        return out

    def _count(self, storage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        size = storage.nbytes()
        if self.live + size > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {size:,} bytes")
        self.sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key) -> None:
        self.live -= self.sizes.pop(key, 0)


def attention(q, k, v, attn_mask=None, is_causal=False):
    """What a GPU chooses; without one SDPA would take the kernel that keeps all scores."""
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype)  # as SDPA does with a mask of bools
        attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, q.requires_grad, 0.0, is_causal)[0]


@contextlib.contextmanager
def fake_cuda(limit: float = float("inf")):
    """Tensors on "cuda" that hold nothing, under a Watch."""
    FakeTensorMode.avoid_device_init = True  # although is_available() lies from here on
    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.nn.functional.scaled_dot_product_attention = attention
    with FakeTensorMode(allow_non_fake_inputs=True), Watch(limit) as watch:
        yield watch


class Recorder:
    """Takes a monitor's calls in training and keeps none of them."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: 0.0


class Batches:
    """A loader whose batches are on the device."""

    def __init__(self, sequences: int, seq_len: int):
        self.shape, self.position = (sequences, seq_len + 1), 0

    def next_batch(self, poll):
        self.position += self.shape[0]
        return torch.zeros(self.shape, dtype=torch.long, device=DEVICE)


def build(ti, model: str, micro_batch: int, accumulation: int, n_layer=None, **flags):
    """A run of this model on the fake device, as `build` of the script makes it."""
    shape = ti.PRESETS[model] | ({"n_layer": n_layer} if n_layer else {})
    batch = micro_batch * accumulation
    cfg = ti.Config(
        model=model, micro_batch_size=micro_batch, total_batch_size=batch * shape["seq_len"],
        max_steps=10**6, warmup_steps=10, max_lr=1e-3, min_lr=0.0, run_name="fake",
        hellaswag_freq=0, sample_freq=0, eval_freq=0, histogram_freq=0, checkpoint_freq=0,
        dtype="bfloat16", compile=False, **shape,
    )  # fmt: skip
    vars(cfg).update(flags)
    with DEVICE:
        gpt = ti.GPT(cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.seq_len)
    dist = type("Alone", (), {"device": DEVICE, "world_size": 1, "rank": 0, "is_main": True})()
    dist.sum = lambda values: values
    dtype = getattr(torch, cfg.dtype)
    data = type("Data", (), {"fingerprint": "none", "num_tokens": 0, "num_windows": 64})()
    data.windows_in_order = lambda index: __import__("numpy").zeros(
        (len(index), cfg.seq_len + 1), "uint16"
    )
    run = ti.Run(cfg, set(), dist, data, data, [], dtype, model=gpt)
    run.optimizer = ti.make_optimizer(gpt, cfg)
    run.loss_scale = ti.LossScale(dtype, DEVICE)
    run.checkpoint_folder = Path("checkpoints")
    training = ti.Training(
        run, gpt, Batches(batch, cfg.seq_len), None, Recorder(), Recorder()
    )
    return run, training


def steps(ti, watch, count: int = 3, **options) -> dict:
    """What `count` training steps do: crossings and reads of a step, peak, the plan's estimate."""
    from training.memory import training_bytes

    run, training = build(ti, **options)
    reads, crossings = [], []

    def read(flight):
        reads.append(flight.values.device.type)
        return [2.0, 1.0, 0.0] + [1.0] * (len(flight.values) - 3)

    ti.InFlight.wait = read
    training.poll = lambda waiting=False: None
    for _ in range(count):  # .item(), .tolist(), bool(tensor) raise by themselves
        watch.crossings.clear()
        training.step()
        crossings.append(list(watch.crossings))
    accumulating = options["accumulation"] > 1
    estimate = training_bytes(run.model, run.dtype, run.cfg.micro_batch_size, accumulating=accumulating)
    return {"crossings": crossings[-1], "reads": len(reads), "peak": watch.peak, "estimate": estimate}
