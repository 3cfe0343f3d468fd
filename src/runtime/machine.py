"""What this machine can do: precision, memory, micro-batch, the measured peak."""

import contextlib
import ctypes
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch

from basics import durable, host
from basics.words import marked
from training.memory import state_bytes, training_bytes


def choose_device(name: str | None, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """Return the device of --device for this process, prepared; without a name the best there is.

    Raise ValueError for one that is not there.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        alone = found is not None and found.type == "mps" and world_size > 1
        name = "cpu" if found is None or alone else found.type
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"--device {name}: is no device of PyTorch; use cuda, cpu or mps"
        ) from None
    if device.type == "cpu":
        keep_freed_memory()
        return device
    index = local_rank if device.index is None else device.index
    count = torch.accelerator.device_count()
    if found is None or found.type != device.type or index >= count:
        raise ValueError(
            f"--device {name}: not available to process {local_rank} here, PyTorch "
            f"{torch.__version__} sees {count} {found.type if found else 'CUDA'} device(s); use "
            "--device cpu, or fewer processes"
        )
    if index > 0:
        torch.accelerator.set_device_index(index)
    return torch.device(device.type, index)


def best_dtype(device: torch.device) -> str:
    """Return the name of the precision whose products the hardware is fastest at.

    bfloat16 where it is native; float16, with a loss scale, on GPUs that have only that (V100, T4);
    float32 elsewhere.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        return "float16" if torch.cuda.get_device_capability(device) >= (7, 0) else "float32"
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


def keep_freed_memory(keep: bool = True) -> None:
    """Have the C library keep what a step frees for the next one, instead of handing it back to the
    system, which gives it out again as pages of zeros: 1.3 times the CPU's speed (LAB_NOTES.md).
    Not `keep`: hand it back, now and from now on."""
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError):
        return  # glibc's alone
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt(trim_threshold, -1 if keep else 128 << 10)
    mallopt(mmap_max, 0 if keep else 65_536)
    if not keep:
        malloc_trim(0)


# --- Micro-batch ----------------------------------------------------------------------------------


def choose_micro_batch(run) -> int:
    """Return the largest divisor of a process' sequences per step that fits into memory.

    run: train_improved.Run. The checkpoint's size counts unless memory ran out with it lately. On
    CUDA the size is found by running the model; elsewhere, and for a model on the meta device, by
    the estimate. Raise ValueError if not even one sequence fits.
    """
    model, device, processes = run.model, run.dist.device, run.dist.world_size
    saved = run.cfg.micro_batch_size
    sequences = run.cfg.total_batch_size // model.seq_len // processes
    shortage = _recall_shortage(_key(model, device, run.dtype))
    sizes = [n for n in range(1, sequences + 1) if sequences % n == 0]
    if shortage:
        sizes = [n for n in sizes if n <= shortage]
        run.config_to_save = {"micro_batch_size": saved}
    if saved is not None:
        return saved if not shortage or saved <= shortage else max(sizes)
    # Beyond that a GPU is busy anyway, and the caches of a CPU lose.
    most = 4096 if device.type == "cpu" else 65_536
    sizes = [n for n in sizes if n * model.seq_len <= most] or [1]
    budget = memory_budget(device, processes)

    def estimate(n: int) -> int:
        accumulating, optimizer = n < sequences, run.cfg.optimizer
        return training_bytes(
            model, run.dtype, n, device, accumulating, processes, optimizer,
            run.cfg.shard, run.cfg.activation_checkpointing,
        )  # fmt: skip

    divided = run.cfg.shard and processes > 1  # which a trial of the whole model says nothing about
    if device.type != "cuda" or model.lm_head.weight.is_meta or divided:
        return max((n for n in sizes if estimate(n) <= budget), default=1)
    # What a pass alone does not show: moments, gradients that wait for more, DDP's buckets.
    params = model.num_params()
    rest = state_bytes(model, run.cfg.optimizer) - 4 * params
    rest += 4 * params * ((sequences > 1) + (processes > 1))

    def measure(n: int) -> float:
        return rest + _peak_bytes(model, n, device, run.autocast)

    print("finding the largest micro-batch that fits ...", flush=True)
    shared = torch.cuda.get_device_properties(device).is_integrated
    try:
        if shared and estimate(1) > budget:  # there too much does not raise, it freezes the host
            raise torch.OutOfMemoryError
        with _no_more_than(budget, device):
            return _search(sizes, budget, estimate, measure)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"--model: not even one sequence fits, training needs about {estimate(1) / 1e9:.1f} GB "
            f"and may fill {budget / 1e9:.1f} GB of the device's memory; use "
            f"{'--shard, ' if processes > 1 else ''}"
            f"{'' if model.activation_checkpointing else '--activation_checkpointing, '}"
            "a smaller --model or --seq_len"
        ) from None


def _search(sizes: list[int], budget: float, estimate, measure) -> int:
    """Return the largest of `sizes` whose need stays within the budget: 1, 2, 4 ... as far as the
    next one fits by the estimate of what it adds, corrected by what was measured so far. Out of
    memory with 1 is the caller's."""
    n, need, correction = 1, measure(1), 1.0
    probes = {2, *sizes} if max(sizes) > 1 else set()

    def expected(m: int) -> float:
        return need + correction * (estimate(m) - estimate(n))

    while ahead := [m for m in probes if m > n and expected(m) <= budget]:
        larger = max((m for m in ahead if m <= 2 * n), default=min(ahead))
        try:
            there = measure(larger)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            there = math.inf
        if there > budget:
            probes = {m for m in probes if m < larger}
        else:
            correction = (there - need) / (estimate(larger) - estimate(n))
            n, need = larger, there
    return max(m for m in sizes if m <= n)


def _peak_bytes(model, size: int, device, autocast) -> float:
    """Return the most that was allocated in a forward and backward pass on the device."""
    empty_cache(device)
    torch.accelerator.reset_peak_memory_stats(device)
    try:
        ids = torch.zeros(size, model.seq_len + 1, dtype=torch.long, device=device)
        with autocast():
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        wait_for(device)
        return torch.accelerator.max_memory_allocated(device)
    finally:
        model.zero_grad(set_to_none=True)


def memory_budget(device: torch.device, processes: int) -> float:
    """Return the bytes that a process may fill, with what it holds already.

    Where CPU and GPU share memory (a DGX Spark), asking for too much does not raise, it freezes the
    host, and the copy for checkpoints lies there too: much is left alone.
    """
    available = host.available_bytes() or 8e9
    if device.type == "cpu":
        return 0.5 * available / processes
    if device.type != "cuda":
        return 0.5 * available  # shared, as far as is known
    free, _ = torch.accelerator.get_memory_info(device)
    held = torch.accelerator.memory_reserved(device)
    if torch.cuda.get_device_properties(device).is_integrated:
        return 0.6 * min(free, available) + held
    return 0.9 * (free + held)


@contextlib.contextmanager
def _no_more_than(budget: float, device: torch.device):
    """Have CUDA's allocator raise OutOfMemoryError instead of growing beyond the budget."""
    if not torch.cuda.is_initialized():
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        empty_cache(device)


def smaller(size: int, sequences: int) -> int:
    """Return the next micro-batch after an out-of-memory: half, or the divisor below."""
    return max(n for n in range(1, size // 2 + 1) if sequences % n == 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether PyTorch says so, also through a compiler or a library of NVIDIA's."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


def empty_cache(device: torch.device) -> None:
    if device.type != "cpu":  # torch.accelerator's fails on mps before PyTorch 2.13
        torch.get_device_module(device).empty_cache()


# --- Remembered between runs ----------------------------------------------------------------------

SHORTAGE_SECONDS = 24 * 3600  # that an out-of-memory counts: what else was there may be gone


def _key(model, device: torch.device, dtype: torch.dtype) -> str:
    name = device.type
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name} {properties.total_memory / 1e9:.0f} GB"
    shape = f"{model.n_layer}x{model.n_embd}x{model.seq_len}"
    shape += " recomputing" * model.activation_checkpointing
    return f"{name}, torch {torch.__version__}, {shape}, {dtype}"


def cache_file() -> Path:
    """Return where shortages are remembered; without a home, among the temporary files."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):  # neither HOME nor an entry in the list of users
        home = os.path.join(tempfile.gettempdir(), f"train_improved-{os.getuid()}")
    return Path(home, "train_improved", "micro_batch.json")


def _recall_shortage(key: str) -> int | None:
    """Return the size that an out-of-memory of the last day has left."""
    try:
        entry = json.loads(cache_file().read_text())[key]
        return entry["shortage"] if time.time() - entry["at"] < SHORTAGE_SECONDS else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember_shortage(model, device: torch.device, dtype: torch.dtype, size: int) -> None:
    """Have the next runs take no more than `size`, for a day."""
    path, key = cache_file(), _key(model, device, dtype)
    try:
        try:
            known = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            known = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        known[key] = {"shortage": size, "at": time.time()}
        durable.write(path, json.dumps(known, indent=1).encode() + b"\n")
    except OSError:
        pass  # then memory runs out once more


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
    """Return the rate of a matrix product in this precision, in FLOP/s, measured now over half a
    second (a CPU: a fifth) of work after a warm-up: what MFU refers to."""
    size, least = (1024, 0.2) if device.type == "cpu" else (8192, 0.5)
    own = torch.Generator().manual_seed(0)  # training's random numbers stay as they are
    a, b = (torch.randn(size, size, generator=own).to(device, dtype) for _ in range(2))
    out, count = a @ b, 0
    wait_for(device)
    start = time.perf_counter()
    while (seconds := time.perf_counter() - start) < least:
        for _ in range(4):
            torch.mm(a, b, out=out)
        wait_for(device)
        count += 4
    return count * 2 * size**3 / seconds


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that it was given. For measurements: Python's signal
    handlers do not run meanwhile."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def wait_until(event: torch.Event, poll=lambda: None) -> None:
    """Wait until the device has come to the event, in short sleeps between which Python's signal
    handlers run, and poll() does. A wait inside the driver would keep them out; with NCCL it never
    ends where another process has died."""
    while not event.query():
        poll()
        time.sleep(0.001)


def answers(device: torch.device, seconds: float = 5.0) -> bool:
    """Return whether the device does what it was given, within this time. With NCCL it does not
    where it waits for a process that has died."""
    if device.type == "cpu":
        return True
    event, deadline = torch.Event(device), time.monotonic() + seconds
    event.record()
    while not event.query():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def compiled(model, ids_BT, autocast, asked: bool | None, wrap=lambda model: model, say=print):
    """Return (training pass, whether it is compiled): wrap(model compiled), or wrap(model) where
    torch.compile fails and nobody asked for it.

    Tried at once on ids (micro-batch, T+1), forward and backward, so that trouble shows before the
    run begins; leaves gradients behind. `wrap` comes first: what DDP holds is cut at its buckets
    when it is compiled. The model itself stays as it is, for evaluation. Raise ValueError for
    trouble where it was `asked` for; running out of memory is the caller's to deal with.
    """
    say("compiling the training pass, about a minute the first time ...")
    # Not dynamic: after an out-of-memory the smaller micro-batch shall get a graph as good.
    train_model = wrap(torch.compile(model, dynamic=False))
    try:
        with getattr(train_model, "no_sync", contextlib.nullcontext)():
            with autocast():
                loss = train_model(ids_BT[:, :-1], ids_BT[:, 1:])
            loss.backward()
        return train_model, True
    except Exception as error:  # whatever a compiler can think of
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if asked:
            raise ValueError(
                f"--compile: torch.compile does not work here ({reason}); install a C++ compiler "
                "(on a GPU also Triton), or use --no-compile"
            ) from error
        say(marked(f"WARNING torch.compile does not work here ({reason}): training without it"))
        return wrap(model), False
