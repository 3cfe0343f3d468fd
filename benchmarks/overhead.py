"""What everything around a training step costs: the tiny model bare, and with everything on.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --rounds 10 --steps 40

Bare is forward, backward, clipping and AdamW on a batch that is already there. Everything on is the
training program's own loop: loader, guard, TensorBoard at every step, progress lines, signals,
evaluation every 250 steps and checkpoints every 250. Both take turns on the same model, and steps
that evaluate, save or make histograms are left out. The last line is the ratio of the two.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train_improved.py, before torch
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
import torch

import train_improved as ti
from monitoring.event_files import RunReader
from runtime import machine
from runtime.supervisor import Supervisor
from tokens import shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6, help="turns of each way [6]")
    parser.add_argument("--steps", type=int, default=40, help="of each turn [40]")
    parser.add_argument("--total_batch_size", type=int, default=1024, help="tokens a step [1024]")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    rng = np.random.default_rng(0)
    for split, count in (("train", 2_000_000), ("val", 20_000)):
        tokens = rng.integers(0, 50_257, count).astype(np.uint16)
        shards.write_shard(folder / f"random_{split}_000000.bin", tokens)
    given = {
        "model": "tiny", "data_dir": str(folder), "total_batch_size": args.total_batch_size,
        "max_steps": 1_000_000, "warmup_steps": 10, "run_name": "overhead", "device": "cpu",
        "use_tensorboard": True, "tensorboard_dir": str(folder / "runs"),
        "checkpoint_dir": str(folder / "checkpoints"),
    }  # fmt: skip
    dist = ti.Distributed("cpu", 900.0)
    machine.keep_freed_memory()
    run, checkpoint = ti.set_up(given, dist)
    ti.planning.preflight(run, checkpoint)
    train_model, loader, saver, monitor = ti.build(run, checkpoint, ti.notify.NOBODY)
    supervisor = Supervisor()
    params = list(run.model.parameters())
    batch = loader.next_batch()
    run.state.position = loader.position

    def bare_step() -> float:
        start = time.perf_counter()
        run.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for micro in batch.split(run.cfg.micro_batch_size):
            with run.autocast():
                loss = train_model(micro[:, :-1], micro[:, 1:]) / (
                    len(batch) // run.cfg.micro_batch_size
                )
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        torch.nn.utils.clip_grads_with_norm_(params, 1.0, norm)
        run.optimizer.step()
        return time.perf_counter() - start

    def everything(steps: int) -> list[int]:
        """Steps of the real loop -> their numbers, without those that do more than train."""
        first = run.state.step + 1
        run.cfg.max_steps = run.state.step + steps
        with contextlib.redirect_stdout(sys.stderr):
            ti.Training(run, train_model, loader, saver, monitor, supervisor).train()
        return [s for s in range(first + 1, first + steps - 1) if s % 250]

    everything(20)
    bare, counted = [], []
    for _ in range(args.rounds):
        bare.append(statistics.median(bare_step() for _ in range(args.steps)))
        counted.append(everything(args.steps))
    monitor.close(finished=False)
    saver.close()
    loader.close()
    supervisor.close()
    reader = RunReader(folder / "runs" / "overhead")
    reader.update()
    points = reader.scalars["Performance/step_time_ms"]
    milliseconds = dict(zip(points.steps, points.values, strict=True))
    full = [statistics.median(milliseconds[s] for s in steps) / 1000 for steps in counted]
    for i, (a, b) in enumerate(zip(bare, full, strict=True)):
        print(f"round {i + 1}: bare {1000 * a:.1f} ms, everything {1000 * b:.1f} ms, {b / a:.4f}")
    ratio = statistics.median(b / a for a, b in zip(bare, full, strict=True))
    print(f"everything on takes {ratio:.4f} of the bare step's time")


if __name__ == "__main__":
    main()
