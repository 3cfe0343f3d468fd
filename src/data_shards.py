"""Token shards: the files, the stream over them, the keyed shuffle, the prefetching loader.

    python src/data_shards.py DIR            what is in a folder of shards, and what is wrong
    python src/data_shards.py DIR --verify   the same, and recompute every shard's SHA-256

A position is a number. The token stream of a split is the concatenation of its shards in name
order. Window i of it is tokens [i*T, i*T + T], T + 1 of them, so neighbours share their edge token
and each token but the first is a target once. Epoch e is a permutation of the windows keyed by
(seed, e) alone, computed for any position in constant time; nothing about data needs saving but
how many windows were taken.

Files: NAME_{train,val}_000000.bin with 256 little-endian int32 of header (20240520, 1, token count)
and uint16 tokens, as in llm.c, and a manifest.json beside them. Read as they are, recognised by
content: build-nanogpt's .npy, llm.c's and modded-nanogpt's .bin, nanoGPT's bare train.bin/val.bin.

Shards are read with pread into arrays of our own, not memory-mapped: pages of a mapping count as
this process' memory and pile up over a shuffled read (nanoGPT issues 287 and 428), those of pread
stay in the system's cache.
"""

import argparse
import ast
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import queue
import re
import sys
import sysconfig
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from checkpoint_files import flush_folder
from tokenizer import EOT, VOCAB_SIZE, fingerprint, get_tokenizer

# --- Shard files ----------------------------------------------------------------------------------

MAGIC, VERSION = 20240520, 1  # llm.c's GPT-2 shards
HEADER_BYTES = 256 * 4
DTYPE = np.dtype("<u2")
MANIFEST = "manifest.json"
BLOCK = 4096  # tokens in one of the pieces that stand for a shard where it is too large to read
SMALL = 16_000_000  # tokens up to which a split is checked in full when it is opened
CHUNK = 8 << 20  # bytes per read where a whole shard is read


def write_shard(path: str | Path, tokens: np.ndarray) -> dict:
    """Write one shard so that it exists whole or not at all, also after a power cut.

    tokens: 1-d array of ids below 50,257. Returns its manifest entry: name, tokens, bytes, sha256.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not 0 < len(tokens) < 2**31:
        raise ValueError(f"{path}: a shard holds 1 to 2^31-1 tokens, not shape {tokens.shape}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= VOCAB_SIZE:
        raise ValueError(f"{path}: token ids must be 0 to {EOT}, found {tokens.max()}")
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    body = np.ascontiguousarray(tokens, DTYPE)
    sha = hashlib.sha256(header)
    sha.update(body)
    write_durably(path, header, body)
    size = HEADER_BYTES + body.nbytes
    return {
        "name": Path(path).name,
        "tokens": len(tokens),
        "bytes": size,
        "sha256": sha.hexdigest(),
    }


def write_manifest(folder: str | Path, manifest: dict) -> None:
    """Write manifest.json. Keys needed: version, tokenizer_fingerprint, vocab_size, shards (each
    with name, split, tokens, bytes, sha256; documents if known); more are welcome."""
    write_durably(Path(folder) / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")


def write_durably(path: str | Path, *parts) -> None:
    """Write buffers to `path`: temporary name, fsync, rename, fsync of the folder."""
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


@dataclass(frozen=True)
class Shard:
    path: Path
    format: str  # for people
    offset: int  # bytes before the first token
    tokens: int
    sha256: str | None  # of the whole file, from the manifest
    documents: int | None


class _File:
    """A file descriptor that closes itself when nobody reads from it any more."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self):
        if hasattr(self, "fd"):
            os.close(self.fd)


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"shard {path} cannot be read: {error.strerror}")


def open_shard(path: Path, entry: dict | None = None) -> Shard:
    """Recognise a shard by its content. ValueError if it cannot be one, or is not what its manifest
    entry says; its tokens are not read here."""
    again = "prepare it again, or fetch it again"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from None
    if entry and size != entry["bytes"]:
        raise ValueError(
            f"shard {path} has {size:,} bytes, its manifest says {entry['bytes']:,}: {again}"
        )
    if size == 0:
        raise ValueError(f"shard {path} is empty: {again}")
    magic, version, count = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    if head[:6] == b"\x93NUMPY":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)  # reads the header alone
        except ValueError as error:
            raise ValueError(f"shard {path} is a damaged .npy file ({error}): {again}") from None
        if array.dtype != DTYPE or array.ndim != 1:
            raise ValueError(
                f"shard {path} holds {array.dtype} of shape {array.shape}, expected one dimension "
                "of little-endian uint16: convert it with .astype('<u2')"
            )
        kind, offset, count = "NumPy array (build-nanogpt)", array.offset, len(array)
    elif magic == MAGIC:
        if version != VERSION:
            raise ValueError(f"shard {path} is version {version} of its format, only 1 is known")
        kind, offset = "llm.c header, uint16", HEADER_BYTES
    elif magic == 20240801:
        raise ValueError(f"shard {path} holds Llama 3 tokens; GPT-2 tokens are needed")
    elif size % 2:
        raise ValueError(
            f"shard {path} has {size:,} bytes, an odd number, and no known header: not uint16 "
            f"tokens, or cut short; {again}"
        )
    else:  # a header's first id, 55,448, is beyond the vocabulary: no bare file looks like one
        kind, offset, count = "bare uint16 (nanoGPT)", 0, size // 2
    if size != offset + 2 * count:
        raise ValueError(
            f"shard {path} has {size:,} bytes, but {count:,} tokens after a header of {offset:,} "
            f"would be {offset + 2 * count:,}: cut short or damaged, {again}"
        )
    if count == 0:
        raise ValueError(f"shard {path} holds no tokens: {again}, or remove it")
    if entry and count != entry["tokens"]:
        raise ValueError(
            f"shard {path} holds {count:,} tokens, its manifest says {entry['tokens']:,}: {again}"
        )
    entry = entry or {}
    return Shard(path, kind, offset, count, entry.get("sha256"), entry.get("documents"))


# --- Folders --------------------------------------------------------------------------------------

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLIT_IN_NAME = re.compile(r"(?<![a-z])(training|train|validation|valid|val)(?![a-z])")


def list_shards(data_dir: str | Path, split: str) -> list[tuple[Path, dict | None]]:
    """The split's shard files in name order, each with its manifest entry if there is one."""
    folder = Path(data_dir)
    prepare = "prepare data with python src/prepare_data.py"
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"data folder {folder} {what}: {prepare}, or give another --data_dir")
    entries = read_manifest(folder)
    found: dict[str, list[str]] = {"train": [], "val": []}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".bin", ".npy") and not path.name.startswith("."):
            marks = SPLIT_IN_NAME.findall(path.stem.lower())
            if marks:
                found[SPLITS[marks[-1]]].append(path.name)
    if entries is not None:
        unknown = sorted({*found["train"], *found["val"]} - entries.keys())
        if unknown:
            raise ValueError(
                f"data folder {folder}: {unknown[0]} is not in its {MANIFEST}; move it to another "
                f"folder, or delete {MANIFEST} to have all shards taken as they are"
            )
        found = {s: [n for n in sorted(entries) if entries[n]["split"] == s] for s in found}
    elif (folder / "meta.pkl").exists():
        raise ValueError(
            f"data folder {folder} holds characters, not GPT-2 tokens (its meta.pkl is nanoGPT's "
            "character table): prepare its text with python src/prepare_data.py --source FILE"
        )
    elif (folder / ".prepare").is_dir():
        raise ValueError(
            f"data folder {folder}: its preparation is not finished; run the same prepare_data.py "
            "command again, it goes on where it was"
        )
    if not found[split]:
        if not found["train"] and not found["val"]:
            raise ValueError(
                f"data folder {folder} holds no shards (.bin or .npy files with 'train' or 'val' "
                f"in their names): {prepare}, or give another --data_dir"
            )
        raise ValueError(
            f"data folder {folder} has no {'validation' if split == 'val' else 'training'} split "
            f"(no shard with '{split}' in its name): {prepare}, which makes one, or rename one of "
            f"its shards so that '{split}' stands for its split"
        )
    return [(folder / name, entries and entries[name]) for name in found[split]]


def read_manifest(folder: Path) -> dict[str, dict] | None:
    """Shard entries of manifest.json by name; None without one. Nothing in it is trusted."""
    path = folder / MANIFEST
    fix = "prepare the folder again, or delete the manifest to have its shards taken as they are"
    try:
        manifest = json.loads(path.read_bytes())
        entries = {}
        for entry in manifest["shards"]:
            name = entry["name"]
            if not re.fullmatch(r"[^./\\\0][^/\\\0]*", name) or name in entries:
                raise ValueError(f"bad shard name {name!r}")
            if entry["split"] not in ("train", "val"):
                raise ValueError(f"bad split {entry['split']!r}")
            if type(entry["tokens"]) is not int or type(entry["bytes"]) is not int:
                raise ValueError(f"bad size of {name}")
            if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
                raise ValueError(f"bad sha256 of {name}")
            entries[name] = entry
        made_with = manifest.get("tokenizer_fingerprint", fingerprint())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a manifest of shards ({type(error).__name__}: {error}): {fix}"
        ) from None
    if made_with != fingerprint():
        raise ValueError(
            f"{path}: made with tokenizer {made_with!r}, training uses GPT-2's ({fingerprint()}): "
            "the ids would mean other text; prepare the data again"
        )
    return entries


# --- The stream -----------------------------------------------------------------------------------


class TokenStream:
    """The shards of one split as one sequence of tokens. Reading is safe from several threads.

    num_tokens, paths, shard_tokens, and a fingerprint of what is in it: from the manifest's
    checksums if there are any, else from sizes and a few blocks of each shard. Equal data in
    shards of other names has the same fingerprint.
    """

    def __init__(self, shards: list[Shard]):
        self.shards = shards
        self.paths = [shard.path for shard in shards]
        self.shard_tokens = [shard.tokens for shard in shards]
        self._begins = np.array([0, *itertools.accumulate(self.shard_tokens)])
        self._offsets = np.array([shard.offset for shard in shards])
        self.num_tokens = int(self._begins[-1])
        # Few open files even with thousands of shards. One that falls out of the cache while
        # another thread reads it stays open until that thread lets go of it.
        self._file = functools.lru_cache(maxsize=64)(lambda k: _File(self.paths[k]))
        sha = hashlib.sha256()
        full = self.num_tokens <= SMALL
        for k, shard in enumerate(shards):
            sha.update(f"{shard.tokens} {shard.sha256}\n".encode())
            for begin in self._blocks(shard.tokens, full):
                tokens = self.read(int(self._begins[k]) + begin, min(BLOCK, shard.tokens - begin))
                if shard.sha256 is None:
                    sha.update(tokens)
        self.fingerprint = sha.hexdigest()[:16]

    @staticmethod
    def _blocks(tokens: int, full: bool) -> list[int]:
        """Where the blocks begin that are checked and fingerprinted at opening."""
        if full:
            return list(range(0, tokens, BLOCK))
        last = max(0, tokens - BLOCK)
        return sorted({0, last // 3, 2 * last // 3, last})

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens [start, start + n) as uint16, across shard borders."""
        out = np.empty(n, DTYPE)
        self._fill(start, out)
        if n and out.max() >= VOCAB_SIZE:
            self._refuse(start, out)
        return out

    def windows(self, index: np.ndarray, T: int) -> np.ndarray:
        """Windows `index` (n,) of length T as uint16 (n, T+1)."""
        out = np.empty((len(index), T + 1), DTYPE)
        starts, size = index * T, 2 * (T + 1)
        shard = np.searchsorted(self._begins, starts, "right") - 1
        at = (starts - self._begins[shard]) * 2 + self._offsets[shard]
        where = list(zip(shard.tolist(), at.tolist(), strict=True))
        if hasattr(os, "posix_fadvise"):
            # Announcing all reads lets the disk work on them side by side: 15 instead of 51 ms for
            # 512 scattered windows that are not in memory, on the disk where this was measured.
            for k, offset in where:
                file = self._open(k)
                os.posix_fadvise(file.fd, offset, size, os.POSIX_FADV_WILLNEED)
        rows = memoryview(out.reshape(-1)).cast("B")
        for i, (k, offset) in enumerate(where):
            file = self._open(k)
            try:
                got = os.preadv(file.fd, [rows[i * size : (i + 1) * size]], offset)
            except OSError as error:
                raise _unreadable(self.paths[k], error) from None
            if got != size:  # the window goes on in the next shard
                self._fill(int(starts[i]), out[i])
        if len(index) and out.max() >= VOCAB_SIZE:
            bad = int((out >= VOCAB_SIZE).any(axis=1).argmax())
            self._refuse(int(starts[bad]), out[bad])
        return out

    def _pieces(self, start: int, n: int) -> Iterator[tuple[int, int, int]]:
        """[start, start + n) as (shard number, first token inside it, count), shard by shard."""
        assert start >= 0 and start + n <= self.num_tokens, (start, n)
        k = int(np.searchsorted(self._begins, start, "right")) - 1
        while n > 0:
            first = start - int(self._begins[k])
            count = min(n, self.shard_tokens[k] - first)
            yield k, first, count
            start, n, k = start + count, n - count, k + 1

    def _fill(self, start: int, out: np.ndarray) -> None:
        done = 0
        for k, first, count in self._pieces(start, len(out)):
            buffer = memoryview(out[done : done + count]).cast("B")
            file, offset = self._open(k), self.shards[k].offset + 2 * first
            while buffer:
                try:
                    got = os.preadv(file.fd, [buffer], offset)
                except OSError as error:
                    raise _unreadable(self.paths[k], error) from None
                if got == 0:
                    raise ValueError(f"shard {self.paths[k]} became shorter while it was in use")
                buffer, offset = buffer[got:], offset + got
            done += count

    def _open(self, k: int) -> "_File":
        try:
            return self._file(k)
        except OSError as error:
            raise _unreadable(self.paths[k], error) from None

    def _refuse(self, start: int, tokens: np.ndarray) -> None:
        at = start + int((tokens >= VOCAB_SIZE).argmax())
        k = int(np.searchsorted(self._begins, at, "right")) - 1
        raise ValueError(
            f"shard {self.paths[k]}: token {at - self._begins[k]:,} is {tokens[at - start]}, "
            f"beyond GPT-2's last id {EOT}: damaged, or another tokenizer's; prepare it again"
        )


def open_split(data_dir: str | Path, split: str) -> TokenStream:
    """The stream over the `split` ("train" or "val") shards of a folder.

    Checked here: sizes and headers of all shards against each other and the manifest, and token
    ids, of a small set in full, else in a few blocks of each shard (every window is checked again
    when it is read). ValueError names the folder or file and the fix.
    """
    return TokenStream([open_shard(*found) for found in list_shards(data_dir, split)])


def verify(data_dir: str | list[str], progress: Callable[[int, int], None] | None = None) -> None:
    """Read every shard in full: SHA-256 against the manifest where there is one, and token ids.

    progress(bytes read, bytes in all). ValueError names every bad shard.
    """
    shards, problems = [], []
    for folder, _ in parse_data_dir(data_dir):
        for split in ("train", "val"):
            for path, entry in list_shards(folder, split):
                try:
                    shards.append(open_shard(path, entry))
                except ValueError as error:
                    problems.append(str(error))
    total, done = sum(shard.path.stat().st_size for shard in shards), 0
    for shard in shards:
        sha, token, bad = hashlib.sha256(), 0, None
        try:
            with open(shard.path, "rb") as file:
                head = file.read(shard.offset)
                sha.update(head)
                done += len(head)
                while chunk := file.read(CHUNK):
                    sha.update(chunk)
                    beyond = np.frombuffer(chunk, DTYPE) >= VOCAB_SIZE
                    if bad is None and beyond.any():
                        bad = token + int(beyond.argmax())
                    token += len(beyond)
                    done += len(chunk)
                    if progress:
                        progress(done, total)
        except OSError as error:
            problems.append(str(_unreadable(shard.path, error)))
            continue
        if bad is not None:
            problems.append(f"shard {shard.path}: token {bad:,} is beyond id {EOT}")
        elif shard.sha256 not in (None, sha.hexdigest()):
            problems.append(f"shard {shard.path}: SHA-256 differs from its manifest's")
    if problems:
        raise ValueError("; ".join(problems) + ": prepare or fetch these again")


# --- The keyed shuffle ----------------------------------------------------------------------------

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit mixing function (the finaliser of splitmix64), element by element, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_order(seed: int, epoch, num_windows: int, positions: np.ndarray) -> np.ndarray:
    """Element `positions` of epoch `epoch`'s permutation of range(num_windows), in constant time.

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
    a, b = np.uint64(a), np.uint64(b)
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
                left = (
                    left + ((_mix(_mix(key) + right) >> np.uint64(32)) * a >> np.uint64(32))
                ) % a
            else:
                right = (
                    right + ((_mix(_mix(key) + left) >> np.uint64(32)) * b >> np.uint64(32))
                ) % b
        return left * b + right

    x = permute(x, key)
    while (outside := x >= n).any():
        x[outside] = permute(x[outside], key[outside])
    return x.astype(np.int64)


ROUNDS = 8


# --- Sources of windows ---------------------------------------------------------------------------


def parse_data_dir(data_dir: str | Path | list[str]) -> list[tuple[str, Fraction]]:
    """ "DIR", "A:0.7 B:0.3" or a list of such -> [(folder, share)], the shares adding up to 1."""
    entries = data_dir if isinstance(data_dir, list | tuple) else [str(data_dir)]
    if len(entries) == 1 and not Path(entries[0]).exists():
        words = entries[0].split()
        if any(_weight(word)[1] for word in words):
            entries = words
    if len(entries) == 1 and (Path(entries[0]).exists() or _weight(entries[0])[1] is None):
        return [(entries[0], Fraction(1))]
    parsed = [_weight(entry) for entry in entries]
    for entry, (folder, share) in zip(entries, parsed, strict=True):
        if not share:
            raise ValueError(
                f"--data_dir: {entry!r} needs a positive share, as in 'data/a:0.7 data/b:0.3'"
            )
        if [folder for folder, _ in parsed].count(folder) > 1:
            raise ValueError(f"--data_dir: {folder} is given twice; add up its shares")
    total = sum(share for _, share in parsed)
    return [(folder, share / total) for folder, share in parsed]


def _weight(entry: str) -> tuple[str, Fraction | None]:
    folder, colon, number = entry.rpartition(":")
    if colon and re.fullmatch(r"\d+(\.\d*)?|\.\d+", number):
        return folder, Fraction(number)
    return entry, None


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
                    f"data folder {stream.paths[0].parent} has {stream.num_tokens:,} tokens in "
                    f"{stream.paths[0].name}{' ...' if len(stream.paths) > 1 else ''}, fewer than "
                    f"one window of {T} + 1: prepare more, or lower --seq_len"
                )
        self._sizes = [(stream.num_tokens - 1) // T for stream in streams]
        self.num_windows = sum(self._sizes)
        self.num_tokens = sum(stream.num_tokens for stream in streams)
        shares = [Fraction(str(w)) for w in weights or [1] * len(streams)]
        self._slots = _block_of(shares)  # which stream each slot of a block draws from
        counts = np.bincount(self._slots, minlength=len(streams))
        self._counts = counts.astype(np.int64)
        self._ranks = np.concatenate([np.arange(c) for c in counts])
        parts = [s.fingerprint for s in streams]
        if len(streams) > 1:
            parts += [",".join(map(str, counts))]
        self.fingerprint = (
            parts[0]
            if len(parts) == 1
            else hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
        )

    def windows(self, positions: np.ndarray) -> np.ndarray:
        """Windows at `positions` (n,) of the endless shuffled sequence, as uint16 (n, T+1)."""
        return self._read(positions, shuffled=True)

    def windows_in_order(self, index: np.ndarray) -> np.ndarray:
        """Windows `index` (n,) without shuffling, as uint16 (n, T+1): the order for validation.

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
    """Stream number of each slot of the smallest block that holds the shares exactly; a block of
    `largest`, and the nearest whole numbers, where none that small does."""
    shares = [share / sum(shares) for share in shares]
    size = min(math.lcm(*(share.denominator for share in shares)), largest)
    counts = [int(share * size) for share in shares]
    rest = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k] * size)
    for k in rest[: size - sum(counts)]:
        counts[k] += 1
    if min(counts) == 0:
        raise ValueError(f"--data_dir: a share is below 1 in {largest:,}, too little to draw from")
    return np.repeat(np.arange(len(shares)), counts)


def open_source(data_dir: str | list[str], split: str, T: int, seed: int) -> WindowSource:
    """Open a folder, or a mixture "a:0.7 b:0.3". ValueError as for `open_split`."""
    folders = parse_data_dir(data_dir)
    streams = [open_split(folder, split) for folder, _ in folders]
    return WindowSource(streams, T, seed, [share for _, share in folders])


# --- The loader -----------------------------------------------------------------------------------


class StepLoader:
    """This rank's windows of one training step after the other, read ahead by a thread.

    next() gives an int64 tensor (windows_per_step / world_size, T+1) on `device`; rank r has the
    r-th slice of the step's windows. position: the window at which the next batch begins, counted
    over all ranks. On CUDA the thread also sends the batches, from two pinned buffers on a stream
    of its own, so that they wait on the device.
    """

    def __init__(
        self,
        source: WindowSource,
        windows_per_step: int,
        rank: int,
        world_size: int,
        device,
        position: int = 0,
        depth: int = 2,
    ):
        import torch

        self.source, self.rank, self.world_size, self.depth = source, rank, world_size, depth
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.windows_per_step = windows_per_step
        self._stop = lambda: None
        self.seek(position)

    def seek(self, position: int, windows_per_step: int | None = None) -> None:
        """Go on at another position, or with another number of windows in a step."""
        windows_per_step = windows_per_step or self.windows_per_step
        if windows_per_step % self.world_size:
            raise ValueError(
                f"{windows_per_step} windows in a step cannot be shared by {self.world_size} "
                f"processes: make it a multiple of {self.world_size}"
            )
        self.close()
        self.position, self.windows_per_step, self._error = position, windows_per_step, None
        self._ready: queue.Queue = queue.Queue(self.depth)
        stopped = threading.Event()
        share = windows_per_step // self.world_size
        arguments = (self.source, position + self.rank * share, share, windows_per_step)
        # The thread knows nothing of this object, which may thus be forgotten without close().
        thread = threading.Thread(
            target=_read_ahead,
            args=(*arguments, self.device, self._ready, stopped),
            name="data loader",
            daemon=True,
        )
        self._stop = weakref.finalize(self, _halt, thread, self._ready, stopped)
        thread.start()

    def next_batch(self, poll: Callable[[], None] | None = None):
        """The next batch. While there is none yet, poll() is called five times a second; it may
        raise. What went wrong in the thread is raised here."""
        if self._error is not None:
            raise self._error
        while True:
            try:
                batch, copied = self._ready.get(timeout=0.2)
                break
            except queue.Empty:
                if poll is not None:
                    poll()
        if isinstance(batch, BaseException):
            self._error = batch
            raise batch
        self.position += self.windows_per_step
        if copied is not None:
            import torch

            # The copy ran on another stream: let ours wait for it, and keep the allocator from
            # reusing the memory there while ours still reads it.
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            batch.record_stream(current)
        return batch if batch.device == self.device else batch.to(self.device)

    __next__ = next_batch

    def __iter__(self) -> Iterator:
        return self

    def close(self) -> None:
        """End the thread."""
        self._stop()
        self._error = RuntimeError("this StepLoader is closed")


def _read_ahead(source, first, share, stride, device, ready, stopped) -> None:
    """The loader's thread: puts (tensor, event or None) or (exception, None) into `ready`."""
    import torch

    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # per thread; else pinning would wake up GPU 0 as well
            stream = torch.cuda.Stream()
            shape = (share, source.T + 1)
            buffers = [torch.empty(shape, dtype=torch.int32).pin_memory() for _ in range(2)]
            events: list = [None, None]
        number = 0
        while not stopped.is_set():
            windows = source.windows(np.arange(first, first + share))
            if device.type == "cuda":
                slot = number % 2
                if events[slot] is not None:
                    events[slot].synchronize()  # the device has read this buffer
                buffers[slot].numpy()[:] = windows
                with torch.cuda.stream(stream):
                    batch = buffers[slot].to(device, non_blocking=True).long()
                    events[slot] = torch.cuda.Event()
                    events[slot].record(stream)
                ready.put((batch, events[slot]))
            else:
                ready.put((torch.from_numpy(windows.astype(np.int64)), None))
            first, number = first + stride, number + 1
    except BaseException as error:
        ready.put((error, None))


def _halt(thread, ready, stopped) -> None:
    """End a loader's thread: it may be waiting for room in the queue."""
    stopped.set()
    for _ in range(100):  # 5 s: a read from a dead network disk must not hold up the end
        if not thread.is_alive():
            return
        try:
            ready.get_nowait()
        except queue.Empty:
            thread.join(0.05)


# --- Sample corpus --------------------------------------------------------------------------------

SAMPLE_PACKAGES = ("numpy", "torch", "networkx")  # torch needs the last: all three are there
SAMPLE_SKIPS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages"}
SAMPLE_LEAST = 200_000  # tokens below which there is no point in training


def sample_corpus(folder: str | Path, roots: list[Path] | None = None) -> None:
    """Build a small English corpus from the documentation in this Python installation: the language
    reference that help() shows, and the docstrings of the standard library and a few packages.

    The same for the same versions. A document is a topic or a module; every 20th is validation.
    The folder appears whole or not at all; one that another process built meanwhile is kept.
    roots: folders of Python files, the standard library first (default: those installed).
    ValueError if there is too little text (a stripped distribution).
    """
    folder = Path(folder)
    roots = roots or _documentation()
    splits: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    encode = get_tokenizer().encode_ordinary
    for number, text in enumerate(_sample_documents(roots)):
        tokens = np.array([EOT, *encode(text)], DTYPE)
        splits["val" if number % 20 == 19 else "train"].append(tokens)
    total = sum(len(tokens) for documents in splits.values() for tokens in documents)
    if total < SAMPLE_LEAST:
        raise ValueError(
            f"no data prepared, and this Python installation carries only {total:,} tokens of "
            f"documentation, too little for a sample corpus ({SAMPLE_LEAST:,}): prepare data with "
            "python src/prepare_data.py --source FILES, and give it as --data_dir"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            building = Path(temporary, folder.name)
            building.mkdir()
            shards = []
            for split, documents in splits.items():
                path = building / f"sample_{split}_000000.bin"
                entry = write_shard(path, np.concatenate(documents))
                shards.append({**entry, "split": split, "documents": len(documents)})
            manifest = {
                "version": 1,
                "tokenizer": "gpt2",
                "tokenizer_fingerprint": fingerprint(),
                "vocab_size": VOCAB_SIZE,
                "source": f"documentation in Python {sys.version.split()[0]} and its packages",
                "shards": shards,
            }
            write_manifest(building, manifest)
            building.rename(folder)
            flush_folder(folder.parent)
    except OSError as error:
        if not (folder / MANIFEST).exists():  # else another process was faster
            raise ValueError(
                f"the sample corpus cannot be written to {folder} ({error.strerror}): make room "
                "there, or give another --data_dir"
            ) from None


def _documentation() -> list[Path]:
    """Folders of the standard library and of SAMPLE_PACKAGES; found, not imported."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in SAMPLE_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots.append(Path(spec.submodule_search_locations[0]))
    return roots


def _sample_documents(roots: list[Path]) -> Iterator[str]:
    """Documents of the sample corpus in a fixed order. Files are parsed, nothing of them is run."""
    topics = roots[0] / "pydoc_data" / "topics.py"
    if topics.exists():
        for node in ast.parse(topics.read_bytes()).body:
            if isinstance(node, ast.Assign):
                for _, text in sorted(ast.literal_eval(node.value).items()):
                    yield _prose(text)
    seen = set()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if SAMPLE_SKIPS.intersection(parts) or any(re.match("_(?!_init_)", p) for p in parts):
                continue  # tests, installed packages, private modules
            names = [*([] if root == roots[0] else [root.name]), *parts[:-1], path.stem]
            module = ".".join(name for name in names if name != "__init__")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old escape sequences in other people's code
                try:
                    tree = ast.parse(path.read_bytes())
                except (SyntaxError, ValueError, OSError):
                    continue
            texts = []
            for name, doc in _docstrings(tree, module):
                prose = _prose(doc)
                if len(prose) >= 80 and prose not in seen:
                    seen.add(prose)
                    texts.append(f"{name}\n\n{prose}")
            if sum(map(len, texts)) >= 400:
                yield "\n\n\n".join(texts)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module or class and what is defined in it, in source order."""
    doc = ast.get_docstring(node)
    if doc:
        yield name, doc
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child, f"{name}.{child.name}")


def _prose(text: str) -> str:
    """The paragraphs that are sentences, their lines unindented and joined; no interpreter
    sessions, tables, code or grammar."""
    kept = [p for p in re.split(r"\n\s*\n", text.strip("\n")) if _is_prose(p)]
    text = re.sub(r"(?m)^[ \t]+|[ \t]+$", "", "\n\n".join(kept))
    return re.sub(r"(?m)^(.{40,})\n(?=\w)", r"\1 ", text)


def _is_prose(paragraph: str) -> bool:
    words = paragraph.strip()
    if re.match(r">>>|\.\. |\+-|\|", words):
        return False
    return sum(c.isalpha() or c == " " for c in words) >= 0.85 * len(words) > 0


# --- Looking at a folder --------------------------------------------------------------------------

LOOK_BLOCK = 1 << 20  # tokens per piece that the summary reads
LOOK_BLOCKS = 64  # pieces per split; where there are more, these are spread evenly and it says so
ZERO_RUN = 1024  # ids 0 ("!") in a row; text never has two, since "!!" is a token of its own


def look(folder: str | Path) -> list[str]:
    """Print what a folder of shards holds; return the problems found, each a sentence."""
    problems: list[str] = []
    for split in ("train", "val"):
        try:
            found = list_shards(folder, split)
        except ValueError as error:
            if str(error) not in problems:
                problems.append(str(error))
            continue
        shards = []
        for path, entry in found:
            try:
                shards.append(open_shard(path, entry))
            except ValueError as error:
                problems.append(str(error))
        if shards:
            _look_at_split(split, shards, problems)
    return problems


def _look_at_split(split: str, shards: list[Shard], problems: list[str]) -> None:
    total = sum(shard.tokens for shard in shards)
    print(f"{split}: {total:,} tokens in {_count(len(shards), 'shard')}")
    for kind in sorted({shard.format for shard in shards}):
        mine = [shard for shard in shards if shard.format == kind]
        names = mine[0].path.name + (f" ... {mine[-1].path.name}" if len(mine) > 1 else "")
        sizes = sorted({shard.tokens for shard in mine})
        spread = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
        print(f"  files       {names}: {kind}, {spread} tokens each")
    for a, b in itertools.pairwise(shards):
        if a.sha256 is not None and a.sha256 == b.sha256:
            problems.append(f"shards {a.path} and {b.path.name} have the same content")

    # Read all of it, or pieces spread evenly.
    pieces = [(s, begin) for s in shards for begin in range(0, s.tokens, LOOK_BLOCK)]
    everything = len(pieces) <= LOOK_BLOCKS
    if not everything:
        picks = [i * (len(pieces) - 1) // (LOOK_BLOCKS - 1) for i in range(LOOK_BLOCKS)]
        pieces = [pieces[i] for i in picks]
    seen = np.zeros(1 << 16, np.int64)
    lengths = []
    since = None  # tokens since the last <|endoftext|>, None where its place is unknown
    accused = set()  # shards with a problem already named
    for shard, begin in pieces:
        count = min(LOOK_BLOCK, shard.tokens - begin)
        tokens = np.fromfile(shard.path, DTYPE, count, offset=shard.offset + 2 * begin)
        seen += np.bincount(tokens, minlength=len(seen))
        for what in _wrong_tokens(tokens, begin):
            if shard.path not in accused:
                accused.add(shard.path)
                problems.append(f"shard {shard.path}: {what}; prepare or fetch it again")
        ends = np.flatnonzero(tokens == EOT)
        if len(ends):
            if everything and since is not None:
                lengths.append(np.array([since + ends[0]]))
            lengths.append(np.diff(ends) - 1)
            since = len(tokens) - int(ends[-1]) - 1
        elif since is not None:
            since += len(tokens)
    if everything and since:
        lengths.append(np.array([since]))  # the last one has no <|endoftext|> after it

    read = int(seen.sum())
    if not everything:
        print(
            f"  sampled     {LOOK_BLOCKS} pieces of {LOOK_BLOCK:,} tokens, {read / total:.1%} of "
            "the split; what follows was seen there"
        )
    recorded = [shard.documents for shard in shards]
    documents, about = int(seen[EOT]), ""
    if None not in recorded:
        documents = sum(recorded)
    elif not everything:
        documents, about = round(documents / read * total), "about "
    line = f"  documents   {about}{documents:,}"
    lengths = np.concatenate(lengths) if lengths else np.empty(0, int)
    if len(lengths):
        low, middle, high = np.quantile(lengths, (0.05, 0.5, 0.95)).astype(int).tolist()
        line += (
            f"; tokens in one: median {middle:,}, from {low:,} (5%) to {high:,} (95%), "
            f"longest {lengths.max():,}"
        )
    elif not seen[EOT]:
        line += ": no <|endoftext|> anywhere, documents run into each other"
    print(line)
    used = int(np.count_nonzero(seen[:VOCAB_SIZE]))
    decode = get_tokenizer().decode_single_token_bytes
    top = [i for i in np.argsort(-seen[:VOCAB_SIZE], kind="stable")[:8].tolist() if seen[i]]
    often = ", ".join(f"'{_safe(decode(i))}' {seen[i] / read:.1%}" for i in top)
    print(f"  vocabulary  {used:,} of {VOCAB_SIZE:,} ids; most frequent: {often}")
    for at in (0, total // 3, 2 * total // 3):  # snippets: the next document from there
        for shard in shards:
            if at < shard.tokens:
                break
            at -= shard.tokens
        tokens = np.fromfile(shard.path, DTYPE, 1 << 14, offset=shard.offset + 2 * at)
        ends = np.flatnonzero(tokens[:-60] == EOT)
        first = int(ends[0]) + 1 if len(ends) else 0
        tokens = tokens[first : first + 60]
        text = get_tokenizer().decode_bytes(tokens[tokens < VOCAB_SIZE].tolist())
        print(f"  {shard.path.name}, from token {at + first:,}:\n    {_safe(text)}")


def _wrong_tokens(tokens: np.ndarray, begin: int) -> Iterator[str]:
    if tokens.max() >= VOCAB_SIZE:
        at = int((tokens >= VOCAB_SIZE).argmax())
        yield f"token {begin + at:,} is {tokens[at]}, beyond GPT-2's last id {EOT}"
    rows = tokens[: len(tokens) // ZERO_RUN * ZERO_RUN].reshape(-1, ZERO_RUN)
    zero = ~rows.any(axis=1)
    if zero.any():
        at = begin + int(zero.argmax()) * ZERO_RUN
        yield f"nothing but zeros from token {at:,} on, as after a power cut or a sparse copy"


def _safe(text: bytes) -> str:
    """Bytes of a corpus as one line that no terminal takes for a command."""
    decoded = text.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in decoded)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 nothing wrong, 1 problems found, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        description="Say what is in a folder of token shards, and what is wrong with it."
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of shards")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every shard in full: SHA-256 against the manifest, and every token id",
    )
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        what = "is not a folder" if args.folder.exists() else "does not exist"
        print(f"error: {args.folder} {what}: give a folder of shards", file=sys.stderr)
        return 2
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know only ASCII
    try:
        problems = look(args.folder)
        if args.verify and not problems:
            problems += _verify_aloud(args.folder)
    except KeyboardInterrupt:
        return 130
    for problem in problems:
        print(f"PROBLEM {problem}")
    if not problems:
        print("no problem found")
    return 1 if problems else 0


def _verify_aloud(folder: Path) -> list[str]:
    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\rverifying: {done / total:.0%}", end="", file=sys.stderr)

    try:
        verify([str(folder)], progress)
    except ValueError as error:
        return [str(error)]
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)
    if (folder / MANIFEST).exists():
        print(f"every shard has the SHA-256 of its {MANIFEST}")
    else:
        print(f"every token id is GPT-2's; there is no {MANIFEST} to compare checksums with")
    return []


if __name__ == "__main__":
    sys.exit(main())
