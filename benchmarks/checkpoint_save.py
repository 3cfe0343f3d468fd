"""How long training waits for a checkpoint: BackgroundSaver against a plain torch.save.

    python benchmarks/checkpoint_save.py [--rounds 3] [--folder DIR] [--device cuda]

The state is GPT-2 124M's in fp32 with AdamW's two moments (1.49 GB), random values in the model's
shapes, nothing else. In turns, `--rounds` times: a plain `torch.save` to the folder (over the last
one, as many scripts do; neither flushed nor checked), our save in the foreground (flushed, with
checksum), and a background save, whose wait is what the training loop sees. While the last is being
written, a loop of small forward and backward passes runs; its speed is compared with the same loop
undisturbed. The loop has one thread, like a process that feeds a GPU: what it loses, it loses to
Python's lock and the memory bus (the saver needs one core of its own). Needs 5 GB of memory and
6 GB of disk. The aim is a wait of at most a tenth. On a machine busy with other work both times
are mostly that work's.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from checkpointing import background, files, run_folders


def gpt2_state(device: str, n_layer: int = 12, C: int = 768, T: int = 1024, V: int = 50257) -> dict:
    """A checkpoint in the shapes of GPT-2 124M: the weights, tied as in the model, and AdamW."""
    shapes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C)}
    linears = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
    linears |= {"mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    for i in range(n_layer):
        block = f"transformer.h.{i}."
        for name, shape in linears.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}{name}.weight": (C,), f"{block}{name}.bias": (C,)}
    shapes |= {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
    model = {name: torch.rand(shape, device=device) for name, shape in shapes.items()}
    moments = {
        i: {"step": torch.tensor(1.0), "exp_avg": torch.rand_like(p), "exp_avg_sq": p * p}
        for i, p in enumerate(model.values())
    }
    model["lm_head.weight"] = model["transformer.wte.weight"]
    return {"model": model, "optimizer": {"state": moments}, "step": 1}


def training_steps(device: str, while_true) -> float:
    """Steps a second of a small network, for as long as `while_true()` and at least one second."""
    net = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(8)]).to(device)
    x = torch.rand(256, 256, device=device)
    began, steps = time.perf_counter(), 0
    while while_true() or time.perf_counter() - began < 1:
        net(x).square().mean().backward()
        steps += 1
    if device != "cpu":
        torch.cuda.synchronize()
    return steps / (time.perf_counter() - began)


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="Time that training waits for a checkpoint.")
    parser.add_argument("--rounds", type=int, default=3, help="each way of saving, in turns")
    parser.add_argument("--folder", help="a folder on the disk to measure (default: temporary)")
    parser.add_argument("--device", default="cpu", help="where the state is: cpu or cuda")
    args = parser.parse_args()

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint_save-", dir=args.folder))
    try:
        state = gpt2_state(args.device)
        saver = background.BackgroundSaver()
        print(f"reserving the copy: {seconds(lambda: saver.allocate(state)):.2f} s, once")
        plain, durable, wait, behind, slowdown = [], [], [], [], []
        training_steps(args.device, lambda: False)  # warm up
        for i in range(args.rounds):
            free_speed = training_steps(args.device, lambda: False)
            plain.append(seconds(lambda: torch.save(state, folder / "plain.pt")))
            with open(folder / "plain.pt", "rb") as file:
                os.fsync(file.fileno())  # what it left to the kernel is not to be paid by the next
            durable.append(seconds(lambda: files.save(folder / "sync.pt", state)))
            (folder / "sync.pt").unlink()
            path = files.step_path(folder, i)
            began = time.perf_counter()
            wait.append(saver.save(path, state, {"step": i}))
            busy_speed = training_steps(args.device, saver.busy)
            assert saver.wait(), saver.failure
            behind.append(time.perf_counter() - began)
            slowdown.append(1 - busy_speed / free_speed)
            size = path.stat().st_size
            print(
                f"round {i + 1}: plain torch.save {plain[-1]:.2f} s, durable in the foreground "
                f"{durable[-1]:.2f} s, wait for the background save {wait[-1]:.3f} s "
                f"({behind[-1]:.2f} s until on disk, training {100 * slowdown[-1]:.0f}% slower)"
            )
            run_folders.retain(folder, keep_last=1)
        began = time.perf_counter()
        files.load(path)
        load = time.perf_counter() - began
        saver.close()
    finally:
        shutil.rmtree(folder)
    ratio = statistics.median(wait) / statistics.median(plain)
    print(f"state {size / 1e9:.2f} GB on {args.device}; verified load {load:.2f} s")
    print(
        f"wait / plain torch.save, medians: {ratio:.3f} ({'at' if ratio <= 0.1 else 'NOT at'} "
        "most a tenth)"
    )


if __name__ == "__main__":
    main()
