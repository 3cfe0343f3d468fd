"""Histograms of all parameters and gradients of GPT-2 124M: ours and SummaryWriter.add_histogram.

    python benchmarks/histograms.py [--rounds 3] [--device cuda] [--dtype bfloat16]

Random values in the shapes of the model (148 parameters, 148 gradients with heavy tails): no model
is built. Prints the time of each (median over rounds in turns), their ratio, the bytes on disk of
one dump, and how far the quantiles that TensorBoard's Distributions tab draws are from the exact
ones (tensors of fewer than 10,000 values are said apart: their quantiles jump).
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from monitoring.tensorboard_log import TensorBoardLog


def gpt2_shapes(n_layer: int = 12, C: int = 768, T: int = 1024, V: int = 50257) -> dict[str, tuple]:
    """Name -> shape of the 148 parameters of GPT-2 124M."""
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C)}
    linears = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
    linears |= {"mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    for i in range(n_layer):
        for name, shape in linears.items():
            shapes[f"h.{i}.{name}.weight"], shapes[f"h.{i}.{name}.bias"] = shape, shape[:1]
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{i}.{name}.weight"] = shapes[f"h.{i}.{name}.bias"] = (C,)
    return shapes | {"ln_f.weight": (C,), "ln_f.bias": (C,)}


def random_tensors(device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tag -> values: normal parameters (LayerNorm near 1), normal times log-normal gradients."""
    generator = torch.Generator(device).manual_seed(1)
    tensors = {}
    for name, shape in gpt2_shapes().items():
        noise = torch.randn(shape, generator=generator, device=device)
        centre = 1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0
        tensors[f"Parameters/{name}"] = (noise * 0.02 + centre).to(dtype)
        heavy = torch.randn(shape, generator=generator, device=device).mul_(1.5).exp_().mul_(1e-5)
        tensors[f"Gradients/{name}"] = (heavy * noise).to(dtype)
    return tensors


def synchronized_seconds(call, device: str) -> float:
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def folder_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "mps"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    tensors = random_tensors(args.device, getattr(torch, args.dtype))
    elements = sum(t.numel() for t in tensors.values())
    print(f"{len(tensors)} tensors, {elements:,} values, {args.dtype} on {args.device}")

    with tempfile.TemporaryDirectory() as folder:
        stock = SummaryWriter(f"{folder}/stock")
        ours = TensorBoardLog(f"{folder}/ours", first_step=0)

        def stock_dump(step: int) -> None:
            for tag, tensor in tensors.items():
                stock.add_histogram(tag, tensor.float(), step)
            stock.flush()

        ours.histograms(dict(list(tensors.items())[:4]), 0)  # warm up
        before = folder_bytes(f"{folder}/ours")
        times: dict[str, list[float]] = {"add_histogram": [], "ours": []}
        for step in range(1, args.rounds + 1):
            times["add_histogram"] += [
                synchronized_seconds(lambda s=step: stock_dump(s), args.device)
            ]
            call = lambda s=step: ours.histograms(tensors, s)  # noqa: E731
            times["ours"] += [synchronized_seconds(call, args.device)]
        dump = (folder_bytes(f"{folder}/ours") - before) / args.rounds
        stock.close()
        stock_bytes = folder_bytes(f"{folder}/stock") / args.rounds
        stock_median, our_median = (statistics.median(t) for t in times.values())
        print(f"add_histogram  {stock_median:8.3f} s  {stock_bytes / 1e6:6.3f} MB a dump")
        print(f"ours           {our_median:8.3f} s  {dump / 1e6:6.3f} MB a dump (limit 0.5)")
        ratio = stock_median / our_median
        print(f"ratio          {ratio:8.1f} times faster (limit 5)")

        reader = EventAccumulator(f"{folder}/ours").Reload()
        worst: dict[str, float] = {}
        for tag, tensor in tensors.items():
            x = tensor.float().reshape(-1)
            if x.numel() > 1e6:  # quantile takes no more than 16M; sorting is slow
                continue
            points = reader.CompressedHistograms(tag)[-1].compressed_histogram_values
            shares, values = torch.tensor(points, device=x.device).float().T
            error = (values - x.quantile(shares / 10_000)).abs().max().item() / x.std().item()
            kind = f"{tag.split('/')[0]}, {'many' if x.numel() > 1e4 else 'few'} values"
            worst[kind] = max(worst.get(kind, 0.0), error)
        for kind, error in worst.items():
            print(f"{kind}: quantiles within {error:.4f} standard deviations of the exact ones")
        ours.close()


if __name__ == "__main__":
    main()
