"""Training speed of this machine, in one table: this program beside Hugging Face's GPT-2.

    python benchmarks/throughput.py                            124M; on a CPU 2 x 512 tokens a step
    python benchmarks/throughput.py --micro_batch_size 16 --rounds 5 --compile

Each way trains the same shape on random tokens with the same batch, precision and AdamW, in
processes of their own, in turns, round after round. MFU refers to the rate of a matrix product
in the training precision, measured here and now. The peer's loop is the plain one: its own loss,
clip_grad_norm_, fused AdamW, zero_grad. Shares are of the time of one step of this program.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))


def ours(args) -> dict:
    """Tokens per second, peak memory and shares of this program, from its own parts."""
    import numpy as np

    import train_improved as ti
    from tokens import shards

    folder = Path(tempfile.mkdtemp())
    step_tokens = args.micro_batch_size * args.seq_len * args.accumulation
    rng = np.random.default_rng(0)
    for split, steps in (("train", args.steps + 4), ("val", 1)):
        tokens = rng.integers(0, 50_257, (steps + 1) * step_tokens).astype(np.uint16)
        shards.write_shard(folder / f"random_{split}_000000.bin", tokens)
    given = {
        "model": args.model, "seq_len": args.seq_len, "data_dir": str(folder), "dtype": args.dtype,
        "micro_batch_size": args.micro_batch_size, "total_batch_size": step_tokens,
        "device": args.device, "compile": args.compile, "max_steps": 1000, "run_name": "throughput",
        "val_tokens": args.seq_len, "sample_freq": 0, "hellaswag_freq": 0, "use_tensorboard": True,
        "tensorboard_dir": str(folder / "runs"), "checkpoint_dir": str(folder / "checkpoints"),
    }  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        dist = ti.Distributed(args.device, 900.0)
        if dist.device.type == "cpu":
            ti.machine.keep_freed_memory()
        run, checkpoint = ti.set_up(given, dist)
        ti.planning.preflight(run, checkpoint)
        train_model, loader, _, monitor = ti.build(run, checkpoint, ti.notify.NOBODY)
    params = list(run.model.parameters())
    wait = lambda: ti.machine.wait_for(dist.device)  # noqa: E731
    parts = dict.fromkeys(("data", "forward", "backward", "optimizer", "logging"), 0.0)
    clock = [0.0]

    class Timed(ti.nn.Module):
        """The training pass, with the time of its forward half taken (`timing` on)."""

        def forward(self, idx, targets):
            wait()
            start = time.perf_counter()
            loss = train_model(idx, targets)
            wait()
            parts["forward"] += time.perf_counter() - start
            return loss

    def took(name: str) -> None:
        wait()
        now = time.perf_counter()
        parts[name] += now - clock[0]
        clock[0] = now

    def step(model, timing: bool) -> float:
        start = clock[0] = time.perf_counter()
        batch = loader.next_batch()
        took("data") if timing else None
        loss = ti.forward_backward(run, model, batch, lambda: None)
        took("backward") if timing else None
        norm = ti.nn.utils.get_total_norm([p.grad for p in params])
        ti.nn.utils.clip_grads_with_norm_(params, 1.0, norm)
        for group in run.optimizer.param_groups:
            group["lr"] = 1e-4
        run.optimizer.step()
        took("optimizer") if timing else None
        run.state.step += 1
        with contextlib.redirect_stdout(sys.stderr):
            monitor.step(run, float(loss), float(norm), False, 1e-4, 1.0, [])
        took("logging") if timing else None
        wait()
        return time.perf_counter() - start

    step(train_model, False)
    seconds = [step(train_model, False) for _ in range(args.steps)]
    for name in parts:
        parts[name] = 0.0
    for _ in range(2):
        step(Timed(), True)
    parts["backward"] -= parts["forward"]
    loader.close()
    peak = ti.machine.measure_peak_flops(dist.device, run.dtype)
    return {
        "tokens_per_s": step_tokens / statistics.median(seconds),
        "flops_per_token": run.model.flops_per_token(),
        "peak_flops": peak,
        "shares": {name: t / sum(parts.values()) for name, t in parts.items()},
    }


def peer(args) -> dict:
    """Hugging Face's GPT2LMHeadModel in a plain loop."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import train_improved as ti

    preset = ti.PRESETS[args.model]
    config = GPT2Config(
        n_layer=preset["n_layer"], n_head=preset["n_head"], n_embd=preset["n_embd"],
        n_positions=args.seq_len, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    model = GPT2LMHeadModel(config).to(device)
    forward = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    batch = torch.randint(0, 50_257, (args.micro_batch_size, args.seq_len)).to(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    seconds = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        for _ in range(args.accumulation):
            with autocast:
                loss = forward(input_ids=batch, labels=batch).loss / args.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ti.machine.wait_for(device)
        seconds.append(time.perf_counter() - start)
    tokens = args.micro_batch_size * args.seq_len * args.accumulation
    return {"tokens_per_s": tokens / statistics.median(seconds[1:])}


WAYS = {"this program": ours, "transformers": peer}


def memory_gb(device: str) -> float:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2", help="size [gpt2]")
    parser.add_argument("--seq_len", type=int, help="tokens [1024; 512 on a CPU]")
    parser.add_argument("--micro_batch_size", type=int, help="sequences [8; 2 on a CPU]")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches a step [1]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="[the fastest here]")
    parser.add_argument("--device", help="cuda, cpu or mps [the best there is]")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each round [3]")
    parser.add_argument("--rounds", type=int, default=3, help="[3]")
    parser.add_argument("--way", choices=tuple(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()

    import torch

    from runtime import machine

    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    small = args.device == "cpu"
    args.seq_len = args.seq_len or (512 if small else 1024)
    args.micro_batch_size = args.micro_batch_size or (2 if small else 8)
    args.dtype = args.dtype or machine.best_dtype(torch.device(args.device))
    if args.way:
        result = WAYS[args.way](args)
        print(json.dumps(result | {"memory_gb": memory_gb(args.device)}))
        return

    command = [sys.executable, __file__]
    for name, value in vars(args).items():
        if name not in ("way", "compile"):
            command += [f"--{name}", str(value)]
    command += ["--compile"] * args.compile
    results = {way: [] for way in WAYS}
    for i in range(args.rounds):
        for way, found in results.items():
            done = subprocess.run([*command, "--way", way], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{way} failed:\n{done.stderr}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {i + 1}: {way:14}{found[-1]['tokens_per_s']:10,.0f} tokens/s", flush=True)

    mine = results["this program"]
    flops, peak = mine[0]["flops_per_token"], max(r["peak_flops"] for r in mine)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else os.uname().machine
    print(
        f"\nGPT-2 {args.model}, {args.micro_batch_size} x {args.seq_len} tokens x "
        f"{args.accumulation}, {args.dtype}, {'compiled' if args.compile else 'eager'}, "
        f"{args.device} ({name}), torch {torch.__version__}\n"
        f"matrix product: {peak / 1e12:.2f} TFLOP/s\n\n"
        f"{'':14}{'tokens/s':>10}{'MFU':>8}{'peak memory':>14}"
    )
    median = {w: statistics.median(r["tokens_per_s"] for r in rs) for w, rs in results.items()}
    for way, found in results.items():
        memory = statistics.median(r["memory_gb"] for r in found)
        mfu = median[way] * flops / peak
        print(f"{way:14}{median[way]:10,.0f}{mfu:8.1%}{memory:11.2f} GB")
    shares = {
        part: statistics.median(r["shares"][part] for r in mine) for part in mine[0]["shares"]
    }
    print("\nof a step: " + ", ".join(f"{part} {share:.1%}" for part, share in shares.items()))
    pairs = zip(*([r["tokens_per_s"] for r in rs] for rs in results.values()), strict=True)
    print(f"ratio to transformers: {statistics.median(a / b for a, b in pairs):.2f}")


if __name__ == "__main__":
    # Freed memory and waiting threads as in train_improved.py; read when torch is loaded.
    if "this program" in sys.argv:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
