"""Run parts of the training program on a CUDA device that has shapes but no kernels.

Run as a program of its own: `python on_fake_cuda.py STUB.so '["step", {}, {}]'
...` prints a JSON line for each [part, its options, the card]. The stub
must be there before torch is imported, which reads its registry of hooks once.
"""

import contextlib
import ctypes
import json
import sys
import weakref
from pathlib import Path

if __name__ == "__main__":
    stub = ctypes.CDLL(sys.argv[1])
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
import torch
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_improved as ti
from basics import host
from monitoring import health
from runtime import machine
from runtime.own_work import OwnWork
from training import evaluation as evaluations
from training import memory, scoring

DEVICE = torch.device("cuda", 0)


class Watch(TorchDispatchMode):
    """Counts bytes alive on the device and their peak; notes what copies between devices or waits.

    crossings: operations with tensors of two devices. waits: those that keep the host until the
    device has come so far. limit: bytes of the card; what goes beyond is out of memory.
    """

    def __init__(self, limit: float = float("inf")):
        super().__init__()
        self.limit, self.live, self.peak = limit, 0, 0
        self.sizes, self.crossings, self.waits = {}, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default:  # .item(), .tolist(), bool()
            if tensors[0].is_cuda:
                self.waits.append(str(func))
            return {torch.bool: False, torch.int64: 1}.get(tensors[0].dtype, 1.0)
        out = func(*args, **(kwargs or {}))
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors + results}) > 1:
            self.crossings.append(str(func))
            non_blocking = (kwargs or {}).get("non_blocking") or (args[-1] is True)
            if results[0].device.type == "cpu" and not non_blocking:
                self.waits.append(str(func))
        for t in results:
            if t.is_cuda:
                self._count(t.untyped_storage())
        return out

    def _count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes:
            return
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


def softmax(tensor, dim, softmax=torch.Tensor.softmax):
    """A GPU's kernel copies what has gaps, and no dispatcher sees it (measured on an H200)."""
    return softmax(tensor.contiguous(), dim)


class Card:
    """What the program asks about a card, answered from a Watch. The rest of it is a stub's."""

    name, is_integrated = "a fake", False

    def __init__(self, watch: Watch, total: float, shared: bool):
        self.watch, self.total_memory, self.is_integrated = watch, total, shared

    def install(self) -> None:
        watch = self.watch
        torch.cuda.get_device_properties = lambda device=None: self
        of = torch.accelerator
        of.get_memory_info = lambda device=None: (self.total_memory - watch.live, self.total_memory)
        of.memory_reserved = of.memory_allocated = lambda device=None: watch.live
        of.max_memory_allocated = lambda device=None: watch.peak
        of.reset_peak_memory_stats = lambda device=None: setattr(watch, "peak", watch.live)
        of.empty_cache = of.synchronize = lambda device=None: None
        if self.is_integrated:  # the card's memory is the machine's
            host.available_bytes = lambda: self.total_memory - watch.live


@contextlib.contextmanager
def fake_cuda(total: float = float("inf"), shared: bool = False):
    """Tensors on "cuda" that hold nothing, on a card with `total` bytes, under a Watch."""
    FakeTensorMode.avoid_device_init = True  # although is_available() lies from here on
    fake_tensor.init_gpu_context = lambda device: None
    torch.cuda.is_available = lambda: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.get_rng_state = torch.get_rng_state
    torch.cuda.set_rng_state = torch.set_rng_state = lambda state: None
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.Tensor.numpy = lambda tensor, **_: np.zeros(tensor.shape, np.int32)
    torch.nn.functional.scaled_dot_product_attention = attention
    torch.Tensor.softmax = softmax
    with FakeTensorMode(allow_non_fake_inputs=True), Watch(total) as watch:
        Card(watch, total, shared).install()
        yield watch


class Silent:
    """Takes the calls of training on its monitor and its supervisor."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: 0.0


class Batches:
    """A loader whose batches are on the device."""

    def __init__(self, sequences: int, seq_len: int):
        self.shape, self.position = (sequences, seq_len + 1), 0

    def next_batch(self, poll):
        self.position += self.shape[0]
        return torch.zeros(self.shape, dtype=torch.long, device=DEVICE)


class Data:
    """Validation data of zeros."""

    fingerprint, num_tokens, num_windows = "zeros", 10**6, 64

    def __init__(self, seq_len: int):
        self.seq_len = seq_len

    def windows_in_order(self, index):
        return np.zeros((len(index), self.seq_len + 1), np.uint16)


class Alone:
    """The one process of a run on the fake device."""

    device, world_size, rank, is_main = DEVICE, 1, 0, True
    work = OwnWork(DEVICE)

    def sum(self, values):
        return values


def make_run(model="gpt2", micro_batch=4, accumulation=1, dtype="bfloat16", **flags) -> ti.Run:
    """A run as set_up and build make it."""
    shape = ti.PRESETS[model] | {k: flags.pop(k) for k in ("n_layer", "seq_len") if k in flags}
    never = dict.fromkeys(
        "eval_freq hellaswag_freq sample_freq histogram_freq checkpoint_freq".split(), 0
    )
    cfg = ti.Config(
        model=model, **shape, micro_batch_size=micro_batch, dtype=dtype, compile=False,
        total_batch_size=micro_batch * accumulation * shape["seq_len"], max_steps=10**6,
        warmup_steps=10, max_lr=1e-3, min_lr=0.0, run_name="fake", **(never | flags),
    )  # fmt: skip
    with DEVICE:
        gpt = ti.GPT(cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.seq_len)
    gpt.activation_checkpointing = cfg.activation_checkpointing
    data = Data(cfg.seq_len)
    run = ti.Run(cfg, set(), Alone(), data, data, [], getattr(torch, dtype), model=gpt)
    run.optimizer = ti.make_optimizer(gpt, cfg)
    run.loss_scale = ti.LossScale(run.dtype, DEVICE)
    return run


def step(watch, count=2, **options) -> dict:
    """The last of `count` steps, at a step number whose update is looked at."""
    run = make_run(**options)
    batches = Batches(run.cfg.total_batch_size // run.cfg.seq_len, run.cfg.seq_len)
    training = ti.Training(run, run.model, batches, None, Silent(), Silent())
    training.poll = lambda waiting=False: None
    run.state.step = health.CHECK_EVERY - count
    for _ in range(count):
        watch.crossings.clear()
        watch.waits.clear()
        training.step()
    return {
        "crossings": watch.crossings,
        "waits": watch.waits,
        "peak": watch.peak,
        "estimate": memory.of_run(run),
        "step": run.state.step,
    }


def micro_batch(watch, **options) -> dict:
    """The micro-batch found on a card, and the peak of a step with it."""
    run = make_run(**options)
    budget, run.cfg.micro_batch_size = machine.memory_budget(DEVICE, 1), None
    found = machine.choose_micro_batch(run)
    return {"found": found, "most": watch.peak, "budget": budget}


def evaluation(watch) -> dict:
    """Waits of each kind of evaluation, and what copies between devices in it."""
    run = make_run(n_layer=2, seq_len=256, val_tokens=16_384, sample_tokens=4)
    endings = [[318, 257], [318], [257], [257, 318, 11]]
    item = scoring.Item(0, 0, [464, 3290, 318], endings, [4, 2, 1, 5], exact=True)
    run.hellaswag_items = [item] * 3
    found = {}
    for name in ("validation_loss", "hellaswag_accuracy", "samples"):
        watch.crossings.clear()
        watch.waits.clear()
        try:
            getattr(evaluations, name)(run, lambda: None)
        finally:
            found[name] = [list(watch.crossings), list(watch.waits)]
    return found


def histograms_and_checkpoint(watch) -> dict:
    """Crossings and waits of histograms, of the copy for a checkpoint, and of a step after it was
    restored."""
    from checkpointing import background, files
    from monitoring import histograms

    run = make_run(n_layer=2, seq_len=256, optimizer="muon", dtype="float16")
    training = ti.Training(run, run.model, Batches(4, 256), None, Silent(), Silent())
    training.poll = lambda waiting=False: None
    training.step()
    found = {}

    def note(name, work):
        watch.crossings.clear()
        watch.waits.clear()
        result = work()
        found[name] = [sorted(set(watch.crossings)), len(watch.waits)]
        return result

    tensors = {name: p.detach() for name, p in run.model.named_parameters()}
    note("histograms", lambda: histograms.summaries(tensors))

    # What asks for addresses: tensors that hold nothing have none.
    background._pin = lambda arena: True
    background._move_all = lambda moves: None
    background.identity = lambda t: (t.untyped_storage()._cdata, t.storage_offset(), t.shape)
    saver, copies = background.BackgroundSaver(lambda text: None), []
    saver._write = lambda path, state, *_: copies.append(state)  # what is on disk is another test's
    state = ti.checkpoint_of(run)
    saver.allocate(state)
    note("checkpoint", lambda: saver.save("step.pt", state))
    saver.wait()
    devices = set()
    files.map_tensors(copies[0], lambda tensor, where: devices.add(tensor.device.type))
    found["copy on"] = sorted(devices)
    note("restore", lambda: ti.restore(run, copies[0]))
    note("step", training.step)
    return found


if __name__ == "__main__":
    stub.take_over()
    for line in sys.argv[2:]:
        part, options, card = json.loads(line)
        with fake_cuda(**card) as watch:
            print(json.dumps(globals()[part](watch, **options)), flush=True)
