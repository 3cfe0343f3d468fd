"""Histograms of whole tensors, counted on their own device in one pass.

Subtract the median (of 4,096 values), and count the differences by the top 13 bits of their float32
pattern (sign, exponent, 4 bits of mantissa). So bins are as narrow as 3–6% of the distance from the
median, at any scale: gradients with far outliers and LayerNorm weights within 1 ± 0.001 are both
resolved, no range has to be known beforehand, NaN and inf have bins of their own. The host merges
the 8,192 bins to about 60.
"""

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import summary as torch_summary

PATTERN_BITS = 13
PATTERN_SHIFT = 32 - PATTERN_BITS
FINITE = 255 << (23 - PATTERN_SHIFT)  # patterns per sign below the exponent of inf and NaN
HALF = 1 << (PATTERN_BITS - 1)  # the pattern of the sign bit
POSITIVE_EDGES = np.append(
    (np.arange(FINITE, dtype=np.uint32) << PATTERN_SHIFT).view(np.float32).astype(np.float64),
    2.0**128,
)
EDGES = np.concatenate([-POSITIVE_EDGES[:0:-1], POSITIVE_EDGES])
UNIFORM_BINS = 30  # what TensorBoard's Histograms tab draws
# Edges at equal shares of the values, and at the quantiles that the Distributions tab draws.
SHARES = np.union1d(np.arange(1, 32) / 32, [0.0668, 0.1587, 0.3085, 0.6915, 0.8413, 0.9332])


@torch.no_grad()
def _count(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return pattern counts (8192, int32) and min, max, centre (3, float32) of a tensor, left on
    its device without waiting for it. min and max are NaN where there is a NaN."""
    x = tensor.detach().reshape(-1)
    on_cpu = x.device.type == "cpu"
    # CPU: pieces that stay in the cache, and so small that torch gives them to one thread: on a
    # busy machine the threads' waiting for each other took ten times the work. Elsewhere 2**24
    # values: histc counts in float32.
    size = 1 << 15 if on_cpu else 1 << 24
    # bincount is 5 times faster than histc on a CPU, would wait for the device on a GPU, and is the
    # only one that counts as deterministic.
    bincount = on_cpu or torch.are_deterministic_algorithms_enabled()
    middle = x[:: -(-x.numel() // 4096)].float().median()  # outliers do not shift it
    centre = torch.where(middle.abs() < 1e30, middle, 0.0)  # also 0 for NaN, inf
    counts = torch.zeros(2 * HALF, dtype=torch.int32, device=x.device)
    ends = []
    for piece in x.split(size):
        values = piece.float()
        ends += torch.aminmax(values)
        pattern = (values - centre).view(torch.int32) >> PATTERN_SHIFT & (2 * HALF - 1)
        if bincount:
            counts += torch.bincount(pattern, minlength=2 * HALF)
        else:
            counts += torch.histc(pattern.float(), 2 * HALF, min=0, max=2 * HALF).int()
    low, high = torch.aminmax(torch.stack(ends))
    return counts, torch.stack([low, high, centre])


def _merge_bins(counts: np.ndarray, stats: np.ndarray) -> tuple[Summary.Value | None, int]:
    """Return a tensor's histogram (None without finite values), and how many are not finite."""
    nonfinite = int(counts[FINITE:HALF].sum() + counts[HALF + FINITE :].sum())
    fine = np.concatenate([counts[HALF : HALF + FINITE][::-1], counts[:FINITE]]).astype(np.int64)
    used = np.flatnonzero(fine)
    if not len(used):
        return None, nonfinite
    fine = fine[used[0] : used[-1] + 1]
    low, high, centre = stats.tolist()
    edges = EDGES[used[0] : used[-1] + 2] + centre
    if nonfinite:  # low and high are NaN or inf: the bins know them well enough
        low, high = edges[0], edges[-1]
    edges[0], edges[-1] = low, high
    edges = np.clip(edges, low, high)
    middle = (edges[:-1] + edges[1:]) / 2
    below = np.concatenate([[0], np.cumsum(fine)])
    number = int(below[-1])
    crowded = np.flatnonzero(fine > number / 16)  # many equal values: a spike of its own
    cuts = [
        [0, len(fine)],
        np.searchsorted(below, SHARES * number),
        np.searchsorted(edges, np.linspace(low, high, UNIFORM_BINS + 1)[1:-1]),
        crowded,
        crowded + 1,
    ]
    cuts = np.unique(np.clip(np.concatenate(cuts), 0, len(fine)))
    value = torch_summary.histogram_raw(
        "", low, high, number, fine @ middle, fine @ middle**2,
        edges[cuts[1:]].tolist(), np.diff(below[cuts]).tolist(),
    ).value[0]  # fmt: skip
    return value, nonfinite


def summaries(tensors: dict[str, Tensor]) -> list[Summary]:
    """Return a Summary for each tensor that is not empty, about 1.2 KB each; one copy to the host
    for all. Where there are non-finite values a scalar TAG_nonfinite counts them. Counts are exact,
    min and max too as long as all values are finite; sums are added up from the bins."""
    tensors = {tag: tensor for tag, tensor in tensors.items() if tensor.numel()}
    if not tensors:
        return []
    counts, stats = zip(*map(_count, tensors.values()), strict=True)
    device = counts[0].device
    counts = torch.stack([c.to(device) for c in counts]).cpu().numpy()
    stats = torch.stack([s.to(device) for s in stats]).cpu().double().numpy()
    found = []
    for tag, tensor_counts, tensor_stats in zip(tensors, counts, stats, strict=True):
        value, nonfinite = _merge_bins(tensor_counts, tensor_stats)
        values = [] if value is None else [value]
        for value in values:
            value.tag = tag
        if nonfinite:
            values.append(Summary.Value(tag=f"{tag}_nonfinite", simple_value=nonfinite))
        found.append(Summary(value=values))
    return found
