"""The order in which training takes windows: a keyed shuffle, and mixtures of several streams.

A position is a number. Window i of a stream is tokens [i*T, i*T + T], T + 1 of them, so neighbours
share their edge token and each token but the first is a target once. Epoch e is a permutation of
the windows keyed by (seed, e) alone, computed for any position in constant time; nothing about data
needs saving but how many windows were taken.
"""

import hashlib
import math
from fractions import Fraction

import numpy as np

from tokens.shards import DTYPE, TokenStream, open_split, parse_data_dir

# --- The keyed shuffle ----------------------------------------------------------------------------

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix 64 bits (the finaliser of splitmix64), element by element, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_order(seed: int, epoch, num_windows: int, positions: np.ndarray) -> np.ndarray:
    """Return elements `positions` of epoch `epoch`'s permutation of range(num_windows).

    epoch: a number, or one for each position. positions: int64 in [0, num_windows).

    A Feistel network on the pairs (l, r) with l < a, r < b, a * b just above num_windows: each
    round adds a keyed hash of one half to the other, which is a permutation whatever the hash.
    Results beyond num_windows are sent round again until they fall inside (cycle walking), which
    makes it a permutation of exactly num_windows.
    """
    assert num_windows >= 1
    n = np.uint64(num_windows)
    a = math.isqrt(num_windows - 1) + 1
    b = -(-num_windows // a)
    a, b, half = np.uint64(a), np.uint64(b), np.uint64(32)
    x = np.asarray(positions).astype(np.uint64)
    key = _mix(np.asarray(seed & MASK, np.uint64).reshape(1) + np.uint64(GOLDEN))
    key = _mix(key + np.asarray(epoch).astype(np.uint64) * np.uint64(GOLDEN))
    key = np.broadcast_to(key, x.shape)

    def permute(x, key):
        left, right = x // b, x % b
        for number in range(ROUNDS):
            key = key + np.uint64(GOLDEN)
            # the upper 32 bits of a hash times a size, shifted: a number below that size
            if number % 2 == 0:
                left = (left + ((_mix(_mix(key) + right) >> half) * a >> half)) % a
            else:
                right = (right + ((_mix(_mix(key) + left) >> half) * b >> half)) % b
        return left * b + right

    x = permute(x, key)
    while (outside := x >= n).any():
        x[outside] = permute(x[outside], key[outside])
    return x.astype(np.int64)


ROUNDS = 8


# --- Sources of windows ---------------------------------------------------------------------------


class WindowSource:
    """Windows of T + 1 tokens in the order in which training takes them, from one or more streams.

    The endless sequence of one stream is "epoch 0's permutation, epoch 1's, ...". Several streams
    are mixed in blocks of fixed composition (0.7 and 0.3: seven and three of every ten windows, in
    an order keyed by seed and block), each going through its own endless sequence at its own pace.
    num_windows and num_tokens are sums over the streams.
    """

    def __init__(self, streams: list[TokenStream], T: int, seed: int, weights=None):
        self.streams, self.T, self.seed = streams, T, seed
        for stream in streams:
            if stream.num_tokens < T + 1:
                raise ValueError(
                    f"{stream.paths[0].parent} has {stream.num_tokens:,} tokens in "
                    f"{stream.paths[0].name}{' ...' if len(stream.paths) > 1 else ''}, fewer than "
                    f"one window of {T} + 1: prepare more, or lower --seq_len"
                )
        self._sizes = [(stream.num_tokens - 1) // T for stream in streams]
        self.num_windows = sum(self._sizes)
        self.num_tokens = sum(stream.num_tokens for stream in streams)
        shares = [Fraction(str(w)) for w in weights or [1] * len(streams)]
        self._slots = _block_of(shares)  # which stream each slot of a block draws from
        self._counts = counts = np.bincount(self._slots, minlength=len(streams))
        self._ranks = np.concatenate([np.arange(c) for c in counts])
        parts = [s.fingerprint for s in streams]
        if len(streams) > 1:
            parts += [",".join(map(str, counts))]
        mixed = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
        self.fingerprint = mixed if len(streams) > 1 else parts[0]

    def windows(self, positions: np.ndarray) -> np.ndarray:
        """Read windows at `positions` (n,) of the endless shuffled sequence: uint16 (n, T+1)."""
        return self._read(positions, shuffled=True)

    def windows_in_order(self, index: np.ndarray) -> np.ndarray:
        """Read windows `index` (n,) without shuffling: uint16 (n, T+1), the order for validation.

        Several streams alternate in their shares; the shorter one comes round again.
        """
        return self._read(index, shuffled=False)

    def _read(self, positions: np.ndarray, shuffled: bool) -> np.ndarray:
        positions = np.asarray(positions, np.int64)
        size = len(self._slots)
        block, slot = positions // size, positions % size
        if shuffled and size > 1:
            slot = epoch_order(self.seed ^ GOLDEN, block, size, slot)
        out = np.empty((len(positions), self.T + 1), DTYPE)
        for k, stream in enumerate(self.streams):
            mine = self._slots[slot] == k
            own = block[mine] * self._counts[k] + self._ranks[slot[mine]]
            epoch, index = own // self._sizes[k], own % self._sizes[k]
            if shuffled:
                index = epoch_order(self.seed, epoch, self._sizes[k], index)
            out[mine] = stream.windows(index, self.T)
        return out


def _block_of(shares: list[Fraction], largest: int = 10_000) -> np.ndarray:
    """Return the stream number of each slot of the smallest block that holds the shares exactly; of
    a block of `largest`, with the nearest whole numbers, where none that small does."""
    shares = [share / sum(shares) for share in shares]
    size = min(math.lcm(*(share.denominator for share in shares)), largest)
    counts = [int(share * size) for share in shares]
    rest = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k] * size)
    for k in rest[: size - sum(counts)]:
        counts[k] += 1
    if min(counts) == 0:
        raise ValueError(f"a share is below 1 in {largest:,}, too little to draw from")
    return np.repeat(np.arange(len(shares)), counts)


def open_source(data_dir: str | list[str], split: str, T: int, seed: int) -> WindowSource:
    """Open a folder, or a mixture "a:0.7 b:0.3"; raise ValueError as `open_split` does."""
    folders = parse_data_dir(data_dir)
    streams = [open_split(folder, split) for folder, _ in folders]
    return WindowSource(streams, T, seed, [share for _, share in folders])
