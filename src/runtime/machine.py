"""What this machine can do: precision, memory, micro-batch, the measured peak."""

import ctypes
import json
import math
import os
import time
from pathlib import Path

import torch

from basics import durable, host
from basics.words import marked
from training.memory import training_bytes


def choose_device(name: str | None, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """The device of --device for this process, prepared; without a name the best there is."""
    if name is None:
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available() and world_size == 1:
            name = "mps"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"--device {name}: is no device of PyTorch; use cuda, cpu or mps"
        ) from None
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    index = local_rank if device.index is None else device.index
    if not there.get(device.type) or (device.type == "cuda" and index >= there["cuda"]):
        raise ValueError(
            f"--device {name}: not available to process {local_rank} here, PyTorch "
            f"{torch.__version__} sees {there['cuda']} CUDA device(s); use --device cpu, or "
            "fewer processes"
        )
    if device.type == "cpu":
        keep_freed_memory()
    if device.type != "cuda":
        return device
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def best_dtype(device: torch.device) -> str:
    """bfloat16 where the hardware has it, float32 otherwise."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees for the next one, instead of handing it back to the
    system, which gives it out again as pages of zeros: 1.3 times the CPU's speed (LAB_NOTES.md)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # glibc's alone
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)


def choose_micro_batch(model, sequences: int, device: torch.device, dtype: torch.dtype,
                       processes: int, autocast) -> int:  # fmt: skip
    """The largest divisor of a process' `sequences` per step that fits into memory with headroom.

    Found by running the model where memory could be short, otherwise (and for a model on the meta
    device) by the estimate; remembered per device, model, precision and version of torch.
    """
    sizes = [n for n in range(1, sequences + 1) if sequences % n == 0]
    if device.type != "cuda":  # beyond that a CPU gains nothing, and its caches lose
        sizes = [n for n in sizes if n * model.seq_len <= 4096] or [1]
    budget = memory_budget(device, processes)
    if device.type != "cuda" and training_bytes(model, dtype, max(sizes)) < budget / 2:
        return max(sizes)
    if model.lm_head.weight.is_meta:
        known = remembered(_key(model, device, dtype), sizes)
        return known or _largest(sizes, lambda n: training_bytes(model, dtype, n) <= budget)
    key = _key(model, device, dtype)
    known = remembered(key, sizes)
    if known:
        return known
    print("finding the largest micro-batch that fits ...", flush=True)
    per_sequence, rest = _measured_bytes(model, device, sizes, autocast)
    rest += 8 * model.num_params()  # the two moments, which do not exist yet
    size = _largest(sizes, lambda n: rest + n * per_sequence <= budget)
    while device.type == "cuda" and not _fits(model, size, device, autocast):
        if size == 1:
            raise ValueError(
                "--micro_batch_size: not even one sequence fits into the device's memory; use a "
                "smaller --model or --seq_len"
            )
        size = smaller(size, sequences)
    remember(key, size)
    return size


def memory_budget(device: torch.device, processes: int) -> float:
    """Bytes that a process may fill. Where CPU and GPU share memory (a DGX Spark), asking for too
    much does not raise, it freezes the host: much is left alone there."""
    available = host.available_bytes() or 8e9
    if device.type != "cuda":
        return 0.5 * available / processes
    free = torch.cuda.mem_get_info(device)[0]
    if torch.cuda.get_device_properties(device).is_integrated:
        return min(0.6 * free, 0.6 * available)
    return 0.9 * free


def smaller(size: int, sequences: int) -> int:
    """The next micro-batch after an out-of-memory: half, or the divisor of `sequences` below."""
    return max(n for n in range(1, size // 2 + 1) if sequences % n == 0)


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _largest(sizes: list[int], fits) -> int:
    return max((n for n in sizes if fits(n)), default=1)


def _measured_bytes(model, device, sizes, autocast) -> tuple[float, float]:
    """What the training pass needs: bytes per sequence, and bytes whatever their number."""
    if device.type == "cuda":
        # Apart enough for the difference to be activations alone, and not the loss's chunk.
        low, high = sizes[len(sizes) // 4], sizes[len(sizes) // 2]
        if low == high or not (_fits(model, low, device, autocast)):
            low, high = 1, 1
        first = _peak_bytes(model, low, device, autocast)
        second = _peak_bytes(model, high, device, autocast) if high > low else 2 * first
        per_sequence = (second - first) / max(1, high - low)
        return per_sequence, max(0.0, first - low * per_sequence)
    # A CPU keeps no statistics: count what autograd keeps for the backward pass of one sequence.
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(1, model.seq_len + 1, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast():
        loss = model(ids[:, :-1], ids[:, 1:])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del loss
    # Half as much again: gradients of activations, and what the allocator cannot use.
    activations = 1.5 * sum(size for at, size in kept.items() if at not in weights)
    return activations, training_bytes(model, torch.float32, 0)


def _peak_bytes(model, size: int, device, autocast) -> float:
    """Highest allocation of a forward and backward pass above what was there, on a GPU."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    ids = torch.zeros(size, model.seq_len + 1, dtype=torch.long, device=device)
    try:
        with autocast():
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    finally:
        model.zero_grad(set_to_none=True)


def _fits(model, size: int, device, autocast) -> bool:
    try:
        _peak_bytes(model, size, device, autocast)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    torch.cuda.empty_cache()
    return fits


# --- Remembered between runs ----------------------------------------------------------------------


def _key(model, device: torch.device, dtype: torch.dtype) -> str:
    name, total = "cpu", host.available_bytes()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, total = properties.name, properties.total_memory
    shape = f"{model.n_layer}x{model.n_embd}x{model.seq_len}"
    return f"{name} {(total or 0) / 1e9:.0f} GB, torch {torch.__version__}, {shape}, {dtype}"


def cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "train_improved" / "micro_batch.json"


def remembered(key: str, sizes: list[int]) -> int | None:
    """The size found earlier, as a member of `sizes`; None if nothing (readable) is known."""
    try:
        known = json.loads(cache_file().read_text())[key]
        return _largest(sizes, lambda n: n <= known)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(key: str, size: int) -> None:
    path = cache_file()
    try:
        try:
            known = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            known = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write(path, json.dumps(known | {key: size}, indent=1).encode() + b"\n")
    except OSError:
        pass  # then it is found again next time


def remember_smaller(model, device: torch.device, dtype: torch.dtype, size: int) -> None:
    remember(_key(model, device, dtype), size)


# --- Speed ----------------------------------------------------------------------------------------


def measure_speed(new_model, cfg, device: torch.device, autocast) -> float:
    """Tokens/s of forward and backward passes here, not compiled: what training is faster than.

    On a CPU one sequence of at most 512 tokens, on a GPU the micro-batch; about a second each.
    """
    B, T = (cfg.micro_batch_size, cfg.seq_len) if device.type != "cpu" else (1, 512)
    T = min(T, cfg.seq_len)
    with torch.device(device):
        model = new_model(cfg.n_layer, cfg.n_head, cfg.n_embd, T)
        ids = torch.zeros(B, T, dtype=torch.long)
    best = math.inf
    for _ in range(3):
        wait_for(device)
        start = time.perf_counter()
        with autocast():
            loss = model(ids, ids)
        loss.backward()
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return B * T / best


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a matrix product in this precision, in FLOP/s, measured now: what MFU refers to."""
    size = 8192 if device.type == "cuda" else 1024
    own = torch.Generator().manual_seed(0)  # training's random numbers stay as they are
    a, b = (torch.randn(size, size, generator=own).to(device, dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):
        wait_for(device)
        start = time.perf_counter()
        a @ b
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def compiled(model, ids_BT, autocast, asked: bool | None):
    """torch.compile of model's loss, or the model itself where that fails and nobody asked for it.

    Tried at once on ids (micro-batch, T+1), forward and backward, so that trouble shows before the
    run begins; leaves gradients behind. The model itself stays as it is, for evaluation. With
    `asked`, trouble is a ValueError.
    """
    print("compiling the training pass, about a minute the first time ...", flush=True)
    train_model = torch.compile(model)
    try:
        with autocast():
            loss = train_model(ids_BT[:, :-1], ids_BT[:, 1:])
        loss.backward()
        return train_model
    except Exception as error:  # whatever a compiler can think of
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if asked:
            raise ValueError(
                f"--compile: torch.compile does not work here ({reason}); install a C++ compiler "
                "(on a GPU also Triton), or use --no-compile"
            ) from error
        warning = f"WARNING torch.compile does not work here ({reason}): training without it"
        print(marked(warning), flush=True)
        return model
