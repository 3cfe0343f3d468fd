"""HellaSwag scoring here against one item at a time with all logits, on the same model and items.

    python benchmarks/hellaswag.py                       random items from the default file, 124M
    python benchmarks/hellaswag.py --items 64 --rounds 5 --device cuda

The slow way is the usual one (build-nanogpt's): four padded rows of context and ending, logits of
every position. Both are timed in turns, round after round; the ratio is the median over the rounds.
The losses and predictions of both are compared item by item. Weights are random: they do not change
the time. Processor time is what to look at on a CPU that others use, too. Last printed line: the
ratios.
"""

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train_improved.py, before torch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # this file is called hellaswag, too
import train_improved
from runtime import machine
from training import scoring


@torch.inference_mode()
def one_item_at_a_time(model, items) -> torch.Tensor:
    """(items, 4) mean losses."""
    device = model.lm_head.weight.device
    means = []
    for item in items:
        n, longest = len(item.context), max(len(ending) for ending in item.endings)
        idx, mask = torch.zeros(2, 4, n + longest, dtype=torch.long)
        for row, ending in enumerate(item.endings):
            idx[row, : n + len(ending)] = torch.tensor(item.context + ending)
            mask[row, n : n + len(ending)] = 1
        idx, mask = idx.to(device), mask.to(device)[:, 1:]
        logits = model.logits(model.features(idx))[:, :-1].flatten(0, 1)
        losses = F.cross_entropy(logits, idx[:, 1:].flatten(), reduction="none").view(4, -1)
        means.append((losses * mask).sum(1) / mask.sum(1))
    return torch.stack(means).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--file", default=train_improved.Config.hellaswag_file, help="items as JSON lines"
    )
    parser.add_argument("--items", type=int, default=24, help="how many of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_tokens", type=int, help="of a pass [the default of the device]")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    machine.keep_freed_memory()  # for both ways, as training has it
    items = scoring.load_items(args.file)
    items = random.Random(0).sample(items, min(args.items, len(items)))
    torch.manual_seed(0)
    model = train_improved.GPT(n_layer=12, n_head=12, n_embd=768, seq_len=1024)
    model = model.to(args.device).eval()

    ways = {
        "one item at a time": lambda some: one_item_at_a_time(model, some),
        "hellaswag.score": lambda some: torch.tensor(
            [r.losses for r in scoring.score(model, some, args.batch_tokens)]
        ),
    }
    results, seconds = {}, {name: [] for name in ways}
    for way in ways.values():
        way(items[:4])  # not timed: first-use costs
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter(), time.process_time()
            results[name] = way(items)
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))

    print(f"GPT-2 124M, float32, {args.device}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}: {len(items)} items, {args.rounds} rounds")  # fmt: skip
    for name, values in seconds.items():
        wall, processor = (statistics.median(v) / len(items) for v in zip(*values, strict=True))
        print(f"{name:20}{1 / wall:8.2f} items/s, {processor:.3f} processor seconds an item")
    a, b = results.values()
    same = (a.argmin(1) == b.argmin(1)).sum().item()
    print(
        f"predictions: {same} of {len(items)} the same, losses differ by {(a - b).abs().max():.1e}"
    )
    assert same == len(items)
    rounds = list(zip(*seconds.values(), strict=True))
    wall, processor = (
        statistics.median(slow[i] / fast[i] for slow, fast in rounds) for i in (0, 1)
    )
    print(f"{wall:.2f} times as fast, {processor:.2f} by processor time")


if __name__ == "__main__":
    main()
