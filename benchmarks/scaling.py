"""What several processes cost: communication counted and timed here, expected elsewhere.

    python benchmarks/scaling.py                  about five minutes; as root, else without volumes
    python benchmarks/scaling.py --write          to docs/SCALING.md

Runs 1, 2 and 4 processes over gloo, replicated (DDP) and sharded (FSDP2), in a network namespace
of their own, whose loopback device counts the bytes. Beside each number stands what a ring needs: a
process sends (n-1)/n of the tensor for an all-gather or a reduce-scatter, twice that for an
all-reduce. The cost model for GPUs has the same volumes over the bandwidth of a link; where they
hide behind the backward pass they cost nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
SHAPE = {"n_layer": 6, "n_head": 8, "n_embd": 512, "seq_len": 64}
STEPS, SEQUENCES = 3, 1

# What the model assumes of machines: bf16 FLOP/s that training reaches of a device, bytes/s that a
# device sends to its neighbour in a ring, on the slowest link.
MACHINES = {
    "1 H100": (1, 400e12, 0.0),
    "8 H100, NVLink": (8, 400e12, 300e9),
    "8 x 8 H100, 400 Gbit/s each": (64, 400e12, 45e9),
    "1 DGX Spark": (1, 40e12, 0.0),
    "2 DGX Sparks, 200 Gbit/s": (2, 40e12, 20e9),
}
BATCH, SEQ_LEN, TOKENS = 524_288, 1024, 100e9
MICRO_BATCH = 16  # sequences of gpt2-xl, at most


# --- Measured: one process of several -------------------------------------------------------------


def loopback_bytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split()[9])
    return 0


def worker(mode: str) -> None:
    """Time passes without and with synchronisation, and what is synchronised alone; print JSON."""
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    import train_improved as ti
    from training import sharding

    dist.init_process_group("gloo")
    n = dist.get_world_size()
    torch.manual_seed(0)
    model = ti.GPT(**SHAPE)
    params = model.num_params()
    if mode == "shard":
        sharding.shard(model)
    passed = model if mode == "shard" or n == 1 else sharding.replicate(model)
    optimizer = ti.make_optimizer(model, ti.Config(optimizer="adamw"))
    optimizer.found_inf = torch.zeros(())
    ids = torch.randint(0, 50_257, (SEQUENCES, SHAPE["seq_len"] + 1))

    def step(last: bool) -> float:
        model.zero_grad(set_to_none=True)
        dist.barrier()
        begin = time.perf_counter()
        with sharding.synchronising(passed, last):
            passed(ids[:, :-1], ids[:, 1:]).backward()
        return time.perf_counter() - begin

    def median(function) -> float:
        function()
        return statistics.median(function() for _ in range(STEPS))

    def reduce_alone() -> float:
        gradients = torch.zeros(params)
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(gradients)
        return time.perf_counter() - begin

    buckets = []  # bytes, in the order in which DDP sends them: the last one when all else is done

    def note(_, bucket):
        buckets.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    if passed is not model:
        passed.register_comm_hook(None, note)
    synchronised = median(lambda: step(True))
    optimizer.step()
    model.zero_grad(set_to_none=True)
    dist.barrier()
    before = loopback_bytes()
    dist.barrier()
    empty, before = loopback_bytes() - before, loopback_bytes()
    buckets.clear()
    with sharding.synchronising(passed, True):
        passed(ids[:, :-1], ids[:, 1:]).backward()
    dist.barrier()
    early = 1 - buckets[-1] / sum(buckets) if buckets else 0.0
    sent = (loopback_bytes() - before - empty) / n
    kept = [*model.parameters(), *(p.grad for p in model.parameters())]
    kept += [t for of_one in optimizer.state.values() for t in of_one.values()]
    held = sum(sharding.local(tensor).nbytes for tensor in kept)
    found = {
        "n": n, "mode": mode, "params": params, "sent": sent, "held": held, "early": early,
        "with": synchronised, "without": median(lambda: step(False)), "alone": median(reduce_alone),
    }  # fmt: skip
    if dist.get_rank() == 0:
        print("FOUND " + json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)


def measure(n: int, mode: str) -> dict:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc_per_node={n}", __file__, "--worker", mode]
    if os.geteuid() == 0:
        command = ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *command]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    for line in done.stdout.splitlines():
        if line.startswith("FOUND "):
            return json.loads(line.removeprefix("FOUND "))
    raise SystemExit(done.stderr)


def volume(params: int, blocks: int, n: int, mode: str) -> float:
    """Bytes that a process sends in one synchronised pass over a ring, in float32.

    Sharded: weights are gathered for the forward pass, those of the blocks again for the backward
    pass, and gradients are scattered. blocks: parameters inside the blocks.
    """
    share = 4 * (n - 1) / n
    return share * (2 * params if mode == "replicate" else params + blocks + params)


def held_bytes(preset: str, n: int) -> list[int]:
    """Bytes of weights, gradients and moments in each of n processes that share a model out: of
    the tensors that FSDP2 and the optimizer make, without memory or network (PyTorch's fake ones).
    """
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import train_improved as ti
    from training import sharding

    held = []
    for rank in range(n):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n)
        with torch.device("meta"):
            model = ti.GPT(**ti.PRESETS[preset])
        if n > 1:
            sharding.shard(model)
        optimizer = ti.make_optimizer(model, ti.Config(optimizer="adamw"))
        for group in optimizer.param_groups:
            group["fused"] = False  # no kernel for a device without memory
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        kept = [*model.parameters(), *(p.grad for p in model.parameters())]
        kept += [t for of_one in optimizer.state.values() for t in of_one.values()]
        held.append(sum(sharding.local(tensor).nbytes for tensor in kept))
        dist.destroy_process_group()
    return held


def memory_rows() -> list[list[str]]:
    import torch

    import train_improved as ti
    from training.memory import training_bytes

    rows = []
    for preset in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        with torch.device("meta"):
            model = ti.GPT(**ti.PRESETS[preset])
        state = 16e-9 * model.num_params()
        for n in (1, 2, 4):
            held, gpu = held_bytes(preset, n), torch.device("cuda")
            needs = [
                training_bytes(model, torch.bfloat16, 1, gpu, True, n, sharded=sharded)
                for sharded in (False, True)
            ]
            rows.append([
                preset, str(n), f"{max(held) / 1e9:.3f}", f"{min(held) / 1e9:.3f}",
                f"{state / n:.3f}", *(f"{need / 1e9:.1f}" for need in needs),
            ])  # fmt: skip
    return rows


# --- Expected: GPUs -------------------------------------------------------------------------------


def exposed(
    params: int, blocks: int, n: int, bandwidth: float, mode: str, one: float, passes: int = 1,
    scatters: int = 1,
) -> float:  # fmt: skip
    """Seconds of a step in which nothing hides the communication over a ring.

    one: seconds that a pass computes, a third of them forward. Replicated, gradients of blocks
    travel during the last micro-batch's backward pass, those of the embeddings, which are tied to
    the output, when it has ended. Sharded, every micro-batch gathers weights, and while one block
    is computed the next one travels. scatters: 2 where a reduce-scatter costs an all-reduce.
    """
    share = 4 * (n - 1) / n / bandwidth
    rounds = 2 if mode == "replicate" else scatters
    hidden, late = rounds * share * blocks, rounds * share * (params - blocks)
    gathers = passes * max(0.0, share * (params + blocks) - one) if mode == "shard" else 0.0
    return late + max(0.0, hidden - 2 / 3 * one) + gathers


def expected(n: int, flops: float, bandwidth: float, mode: str) -> tuple[float, float, float]:
    """Seconds of a step of gpt2-xl, of which communication that nothing hides, and days for TOKENS,
    on a ring of all devices over the slowest link."""
    import torch

    import train_improved as ti

    with torch.device("meta"):
        model = ti.GPT(**ti.PRESETS["gpt2-xl"])
    params = model.num_params()
    blocks = sum(p.numel() for p in model.transformer.h.parameters())
    sequences = BATCH // SEQ_LEN / n
    passes = max(1, round(sequences / MICRO_BATCH))
    compute = BATCH * model.flops_per_token() / n / flops
    waits = 0.0
    if n > 1:
        waits = exposed(params, blocks, n, bandwidth, mode, compute / passes, passes)
    seconds = compute + waits
    return seconds, waits, TOKENS / BATCH * seconds / 86_400


# --- The document ---------------------------------------------------------------------------------


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def document() -> str:
    import torch

    import train_improved as ti

    with torch.device("meta"):
        model = ti.GPT(**SHAPE)
    blocks = sum(p.numel() for p in model.transformer.h.parameters())
    rows, one = [], 0.0
    for n in (1, 2, 4):
        for mode in ("replicate", "shard") if n > 1 else ("replicate",):
            found = measure(n, mode)
            needs = volume(found["params"], blocks, n, mode)
            if mode == "replicate":  # else it gathers weights
                one = found["without"]
            model_says = one
            if n > 1:
                rate = 8 * (n - 1) / n * found["params"] / found["alone"]  # as of an all-reduce
                model_says += exposed(found["params"], blocks, n, rate, mode, one, scatters=2)
            state = 16 * found["params"] / (n if mode == "shard" else 1)
            early = f"{found['early']:.0%}" if n > 1 and mode == "replicate" else "-"
            rows.append([
                str(n), mode, f"{found['sent'] / 1e6:.1f}", f"{needs / 1e6:.1f}",
                f"{found['held'] / 1e6:.1f}", f"{state / 1e6:.1f}", f"{found['without']:.2f}",
                f"{found['with']:.2f}", f"{model_says:.2f}",
                f"{found['alone']:.2f}" if n > 1 else "-", early,
            ])  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    measured = table(
        ["processes", "mode", "MB sent", "a ring needs", "MB held", "by theory", "s alone",
         "s synchronised", "s expected", "s all-reduce", "early"],
        rows,
    )  # fmt: skip
    memory = table(
        ["model", "processes", "most GB held", "least", "by theory", "needs replicated",
         "needs sharded"],
        memory_rows(),
    )  # fmt: skip
    plans = []
    for name, (n, flops, bandwidth) in MACHINES.items():
        for mode in ("replicate", "shard") if n > 1 else ("replicate",):
            seconds, waits, days = expected(n, flops, bandwidth, mode)
            plans.append([name, mode, f"{seconds:.2f}", f"{waits / seconds:.1%}", f"{days:,.1f}"])
    planned = table(["machine", "mode", "s a step", "waiting for the network", "days"], plans)
    shape = "x".join(str(value) for value in SHAPE.values())
    version = torch.__version__
    return f"""# What several processes cost

Made by `benchmarks/scaling.py`; the numbers are of the machine it ran on.

## Counted and timed

GPT of shape {shape} (layers, heads, width, context; {model.num_params():,} parameters), {SEQUENCES}
sequences per process, float32, gloo over loopback on {os.cpu_count()} cores, PyTorch {version}.

- *MB sent* by each process in one synchronised pass, counted by the network device. gloo has no
  reduce-scatter and makes it of an all-reduce, which doubles that third of what sharding sends;
  NCCL does not.
- *MB held* of weights, gradients and moments by rank 0; by theory 16 bytes per parameter, divided
  by the processes when sharded.
- *s alone* is a pass without synchronisation, *s synchronised* one with it, *s all-reduce* that of
  all gradients and nothing else, *s expected* what the cost model below makes of the first (of the
  replicated pass: a sharded one always gathers weights) and the bandwidth of the last. It lets
  communication hide behind computing; here both want the same cores, and FSDP2 waits for each of
  gloo's collectives. Processes share the cores with whatever else runs (a load of
  {os.getloadavg()[1]:.0f} here): these seconds are no speed.
- *early* is the share of the gradients that DDP sends while the backward pass still runs. The rest
  are the embeddings: tied to the output matrix, their gradient is complete last. Sharded it is the
  same: a block's gradients leave when it is done, and the next one's weights are asked for before
  it begins (the order is tested in `tests/test_sharding.py`).

{measured}

## Memory of a process

Weights, gradients and moments (float32, AdamW) that each process holds under `--shard`: counted on
the tensors that FSDP2 makes, beside 16 bytes per parameter over the processes. Rows of a matrix are
not divided, so that the last process may hold less. *Needs* is what `--dry_run` expects in all of a
GPU in bfloat16 with one sequence at a time and gradients that accumulate, GB: those wait in full,
and an evaluation has the weights whole.

{memory}

## Expected of GPUs

gpt2-xl, {TOKENS / 1e9:.0f}B tokens, {BATCH:,} a step, micro-batches of {MICRO_BATCH}. Assumed:
training reaches 400 TFLOP/s of an H100 and 40 of a DGX Spark (measure yours: `Performance/mfu`);
NVLink carries 300 GB/s, a link of 400 Gbit/s 45 GB/s, one of 200 Gbit/s 20 GB/s. Volumes are
those above; what travels during the backward pass is hidden as far as it fits. Nobody has run
these: they say where to look.

{planned}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--worker", choices=("replicate", "shard"), help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="to docs/SCALING.md")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
    text = document()
    if args.write:
        (ROOT / "docs" / "SCALING.md").write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
