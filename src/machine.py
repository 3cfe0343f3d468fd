"""What this machine can do: precision, memory, micro-batch, the measured peak."""

import ctypes
import math
import time

import torch

import checkpoint_files
from chunked_loss import PADDED_VOCAB, chunk_rows
from console import marked


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


def training_bytes(model, dtype: torch.dtype, sequences: int) -> int:
    """Estimate of what a process needs: weights, gradients, two moments, activations, loss."""
    # Kept for the backward pass, in bytes per token, layer and channel, as measured on GPT-2 124M.
    width = 50 if dtype != torch.float32 else 80
    tokens = sequences * model.seq_len
    activations = tokens * model.n_layer * model.n_embd * width
    weight = model.lm_head.weight
    logits = min(chunk_rows(weight.device), tokens) * PADDED_VOCAB * dtype.itemsize
    in_float = 2 * PADDED_VOCAB * (4096 if weight.is_cuda else 32) * 4
    loss = logits + in_float + 2 * PADDED_VOCAB * model.n_embd * 4
    return 16 * model.num_params() + activations + loss


def choose_micro_batch(model, sequences: int, device: torch.device, dtype: torch.dtype,
                       processes: int) -> int:  # fmt: skip
    """The largest divisor of a process' `sequences` per step whose estimate fits with headroom."""
    sizes = [n for n in range(1, sequences + 1) if sequences % n == 0]
    if device.type == "cuda":
        budget = 0.8 * torch.cuda.mem_get_info()[0]
    else:
        available = checkpoint_files.available_bytes() or 8e9
        budget = 0.5 * available / processes
        # Beyond that a CPU gains nothing, and its caches lose.
        sizes = [n for n in sizes if n * model.seq_len <= 4096] or [1]
    return max((n for n in sizes if training_bytes(model, dtype, n) <= budget), default=1)


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
