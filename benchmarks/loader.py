"""The data loader: does training wait for it, and what does a late position cost?

    python benchmarks/loader.py [--step_ms 100] [--windows 64] [--seq_len 1024] [--steps 50]

1. A loop of real matrix products of about --step_ms, fed by StepLoader, against the same loop fed
   by one batch that is always there: share of the time spent waiting for data, ratio of the loops,
   and the processor time that loading one step takes. Shards of random tokens (400 MB, temporary),
   dropped from the system's cache, and cached.
2. Ten billion tokens (sparse files): time to open, cost of a step at 90,000 against step 0, and how
   far resident memory grows over a long shuffled read; the same read through memory maps.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tokens import loader as token_loader
from tokens import shards, stream

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def drop_from_cache(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def matrix_step(step_ms: float):
    """A function that computes for about `step_ms`."""
    a = torch.randn(512, 512)
    begin = time.perf_counter()
    for _ in range(20):
        a @ a
    repeats = max(1, round(step_ms / 1000 / ((time.perf_counter() - begin) / 20)))

    def step(batch: torch.Tensor) -> None:
        batch.float().mean()
        for _ in range(repeats):
            a @ a

    return step


def timed_loop(next_batch, step, steps: int) -> tuple[float, float]:
    """-> (seconds a step, seconds of that until next_batch came back), medians: on a machine with
    other work the mean tells how long the scheduler kept the loop from running."""
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        batch = next_batch()
        got = time.perf_counter()
        step(batch)
        del batch  # freed here: that is no waiting for data
        times.append((time.perf_counter() - begin, got - begin))
    total, waited = (statistics.median(column) for column in zip(*times, strict=True))
    return total, waited


def waiting(args) -> None:
    step = matrix_step(args.step_ms)
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        for k in range(4):
            tokens = rng.integers(0, 50257, 50_000_000, dtype=np.uint16)
            shards.write_shard(folder / f"random_train_{k:06d}.bin", tokens)
        source = stream.open_source(name, "train", args.seq_len, 0)
        results: dict[str, list[tuple[float, float, float]]] = {"cold": [], "cached": []}
        for _ in range(args.rounds):
            for state in results:
                if state == "cold":
                    drop_from_cache(folder)
                loader = token_loader.StepLoader(source, args.windows, 0, 1, "cpu")
                batch = loader.next_batch()  # the first one is waited for, once in a run
                total, waited = timed_loop(loader.next_batch, step, args.steps)
                loader.close()
                bare, _ = timed_loop(lambda: batch, step, args.steps)  # noqa: B023
                results[state].append((total, waited / total, total / bare))
        begin = time.thread_time()
        for i in range(args.steps):
            source.windows(np.arange(i * args.windows, (i + 1) * args.windows)).astype(np.int64)
        busy = (time.thread_time() - begin) / args.steps
    tokens = args.windows * args.seq_len
    print(f"{tokens:,} tokens a step; loading it takes {busy * 1000:.2f} ms of one core")
    for state, rounds in results.items():
        ms, share, ratio = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(
            f"{state:6}  step {ms * 1000:6.1f} ms: {share:.3%} of it waiting for data; "
            f"{ratio:.3f} times the loop without a loader"
        )


def scale(args) -> None:
    size, T, windows = 100_000_000, 1024, 512
    header = np.zeros(256, "<i4")
    header[:3] = shards.MAGIC, shards.VERSION, size
    with tempfile.TemporaryDirectory() as name:
        for k in range(100):
            path = Path(name, f"sparse_train_{k:06d}.bin")
            path.write_bytes(header)
            os.truncate(path, shards.HEADER_BYTES + 2 * size)
        begin = time.perf_counter()
        source = stream.open_source(name, "train", T, 1337)
        print(f"opening {source.num_tokens:,} tokens: {time.perf_counter() - begin:.3f} s")

        def cost(step: int) -> float:
            begin = time.perf_counter()
            source.windows(np.arange(step * windows, (step + 1) * windows))
            return time.perf_counter() - begin

        cost(0)
        pairs = [(cost(i), cost(90_000 + i)) for i in range(50)]
        early, late = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"{windows} windows: {early * 1000:.2f} ms at step 0, {late * 1000:.2f} ms at step "
            f"90,000: {late / early:.2f} times"
        )
        memory = resident_mb()
        for i in range(400):
            cost(i)
        read = 400 * windows * (T + 1) * 2 / 2**20
        grown = resident_mb() - memory
        print(f"resident memory after {read:,.0f} MB of shuffled reads: {grown:+.0f} MB")
        memory = resident_mb()
        maps = [
            np.memmap(path, "<u2", "r", shards.HEADER_BYTES) for path in source.streams[0].paths
        ]
        for i in range(400):
            for window in stream.epoch_order(
                1337, 0, source.num_windows, np.arange(i * windows, (i + 1) * windows)
            ).tolist():
                shard, first = divmod(window * T, size)
                maps[shard][first : first + T + 1].copy()
        print(f"the same through memory maps: {resident_mb() - memory:+.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--step_ms", type=float, default=100, help="compute time of a step")
    parser.add_argument("--windows", type=int, default=64, help="sequences in a step")
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50, help="steps in a loop")
    parser.add_argument("--rounds", type=int, default=3, help="loops of each kind, in turns")
    args = parser.parse_args()
    waiting(args)
    scale(args)


if __name__ == "__main__":
    main()
