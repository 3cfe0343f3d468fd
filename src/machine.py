"""What this machine can do: precision, memory, micro-batch, the measured peak; what it uses."""

import contextlib
import math
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import checkpoint_files
from chunked_loss import PADDED_VOCAB, chunk_rows


def best_dtype(device: torch.device) -> str:
    """bfloat16 where the hardware has it, float32 otherwise."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


def training_bytes(model, dtype: torch.dtype, sequences: int) -> int:
    """Estimate of what a process needs: weights, gradients, two moments, activations, loss."""
    # Kept for the backward pass, in bytes per token, layer and channel, as measured on GPT-2 124M.
    width = 50 if dtype != torch.float32 else 80
    tokens = sequences * model.seq_len
    activations = tokens * model.n_layer * model.n_embd * width
    rows = min(chunk_rows(model.lm_head.weight), tokens)
    loss = rows * PADDED_VOCAB * 4 * 3 + 2 * PADDED_VOCAB * model.n_embd * 4
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
        print(f"WARNING torch.compile does not work here ({reason}): training without it")
        return model


class EnergyMeter:
    """Energy of the devices that train on this machine, in joules, sampled by a thread.

    CUDA: the power that nvidia-smi reports for the GPUs of this machine's processes. CPU: the
    counters of the processor packages, where Linux lets this user read them; all that runs on the
    packages is in them. `works` stays False where there is neither.
    """

    def __init__(self, device: torch.device, every: float = 10.0, powercap="/sys/class/powercap"):
        """every: seconds between samples."""
        self.works = False
        self._every, self._used, self._taken = every, 0.0, 0.0
        self._closed = threading.Event()
        if device.type == "cuda":
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            gpus = [device.index] if processes == 1 else range(processes)
            uuids = {str(torch.cuda.get_device_properties(i).uuid) for i in gpus}
            joules = _gpu_joules(uuids)
        elif device.type == "cpu":
            joules = _package_joules(powercap)
        else:
            return
        args = (joules,)
        threading.Thread(target=self._watch, args=args, name="energy", daemon=True).start()

    def take(self) -> float:
        """Joules since the last call."""
        used = self._used
        new, self._taken = used - self._taken, used
        return new

    def close(self) -> None:
        self._closed.set()

    def _watch(self, joules: Callable[[float], float | None]) -> None:
        mark = time.monotonic()
        self.works = joules(0.0) is not None  # also where a counter begins
        while self.works and not self._closed.wait(self._every):
            now = time.monotonic()
            # A process that was stopped for a while knows nothing about the power in between.
            used = joules(min(now - mark, 6 * self._every))
            mark = now
            self._used += used or 0.0


def _gpu_joules(uuids: set[str]) -> Callable[[float], float | None]:
    """-> f(seconds): what these GPUs use in that time at the power of now; None: not known."""
    query = ["nvidia-smi", "--query-gpu=uuid,power.draw", "--format=csv,noheader,nounits"]
    wanted = {uuid.removeprefix("GPU-") for uuid in uuids}

    def joules(seconds: float) -> float | None:
        watts = {}
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            table = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
            for line in table.splitlines():
                uuid, _, power = line.partition(",")
                with contextlib.suppress(ValueError):  # [N/A]
                    watts[uuid.strip().removeprefix("GPU-")] = float(power)
        known = wanted <= watts.keys()
        return seconds * sum(watts[uuid] for uuid in wanted) if known else None

    return joules


def _package_joules(powercap) -> Callable[[float], float | None]:
    """-> f(_): what the processor packages used since the last call; None: cannot be read.

    Zones intel-rapl:N (AMD's have that name too) named package-N; their parts and "psys", which
    has the packages in it, are left out. Counters are in microjoules and start over at a maximum.
    """
    before: dict[Path, int] = {}

    def joules(_seconds: float) -> float | None:
        used, found = 0, False
        for zone in Path(powercap).glob("intel-rapl:*"):
            with contextlib.suppress(OSError, ValueError):
                if not (zone / "name").read_text().startswith("package"):
                    continue
                now = int((zone / "energy_uj").read_text())
                span = int((zone / "max_energy_range_uj").read_text())
                used += (now - before.get(zone, now)) % (span + 1)
                before[zone], found = now, True
        return used / 1e6 if found else None

    return joules
