"""Token shards: the files, the folders of them, and the stream of tokens over a split.

The token stream of a split is the concatenation of its shards in name order. Files:
NAME_{train,val}_000000.bin with 256 little-endian int32 of header (20240520, 1, token count) and
uint16 tokens, as in llm.c, and a manifest.json beside them. Read as they are, recognised by
content: build-nanogpt's .npy, llm.c's and modded-nanogpt's .bin, nanoGPT's bare train.bin/val.bin.

Shards are read with pread into arrays of our own, not memory-mapped: pages of a mapping count as
this process' memory and pile up over a shuffled read (nanoGPT issues 287 and 428), those of pread
stay in the system's cache.
"""

import bisect
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shlex
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from basics import durable
from tokens.tokenizer import EOT, VOCAB_SIZE, fingerprint

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
    durable.write(path, header, body)
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
    durable.write(Path(folder) / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")


@dataclass(frozen=True)
class Shard:
    path: Path
    format: str  # for people
    offset: int  # bytes before the first token
    tokens: int
    sha256: str | None  # of the whole file, from the manifest
    documents: int | None


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"shard {path} cannot be read: {error.strerror}")


class _File(io.FileIO):
    """Closed when nobody holds it any more: the cache lets go of it while a thread may read."""

    def __del__(self):
        self.close()


def _open(path: Path) -> _File:
    try:
        return _File(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def open_shard(path: Path, entry: dict | None = None) -> Shard:
    """Recognise a shard by its content; its tokens are not read here. Raise ValueError if it cannot
    be one, or is not what its manifest entry says."""
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
    """Return the split's shard files in name order, each with its manifest entry or None."""
    folder = Path(data_dir)
    prepare = "prepare data with python src/prepare_data.py"
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}: {prepare}, or give another --data_dir")
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
                f"{folder}: {unknown[0]} is not in its {MANIFEST}; move it to another "
                f"folder, or delete {MANIFEST} to have all shards taken as they are"
            )
        found = {s: [n for n in sorted(entries) if entries[n]["split"] == s] for s in found}
    elif (folder / "meta.pkl").exists():
        raise ValueError(
            f"{folder} holds characters, not GPT-2 tokens (its meta.pkl is nanoGPT's "
            "character table): prepare its text with python src/prepare_data.py --source FILE"
        )
    elif (folder / ".prepare").is_dir():
        raise ValueError(
            f"{folder}: its preparation is not finished; run the same prepare_data.py "
            "command again, it goes on where it was"
        )
    if not found[split]:
        if not found["train"] and not found["val"]:
            raise ValueError(
                f"{folder} holds no shards (.bin or .npy files with 'train' or 'val' "
                f"in their names): {prepare}, or give another --data_dir"
            )
        raise ValueError(
            f"{folder} has no {'validation' if split == 'val' else 'training'} split "
            f"(no shard with '{split}' in its name): {prepare}, which makes one, or rename one of "
            f"its shards so that '{split}' stands for its split"
        )
    return [(folder / name, entries and entries[name]) for name in found[split]]


def read_manifest(folder: Path) -> dict[str, dict] | None:
    """Return the entries of manifest.json by name; None without one. Nothing in it is trusted."""
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


def parse_data_dir(data_dir: str | Path | list[str]) -> list[tuple[str, Fraction]]:
    """Turn "DIR", "A:0.7 B:0.3" or a list of such into [(folder, share)] that add up to 1.

    In one text a folder with a blank in its name is quoted as in a shell: "'my books:0.7' B:0.3".
    """
    entries = data_dir if isinstance(data_dir, list | tuple) else [str(data_dir)]
    if len(entries) == 1:
        (entry,) = entries
        folder = _weight(entry)[0]
        for whole in (entry, folder):
            if os.path.exists(os.path.expanduser(whole)):
                return [(os.path.expanduser(whole), Fraction(1))]
        try:
            words = shlex.split(entry)
        except ValueError:  # an apostrophe
            words = entry.split()
        if not any(_weight(word)[1] for word in words):
            return [(os.path.expanduser(entry), Fraction(1))]
        entries = words
    parsed = [_weight(entry) for entry in entries]
    for entry, (folder, share) in zip(entries, parsed, strict=True):
        if not share:
            raise ValueError(f"{entry!r} needs a positive share, as in 'data/a:0.7 data/b:0.3'")
        if [folder for folder, _ in parsed].count(folder) > 1:
            raise ValueError(f"{folder} is given twice; add up its shares")
    total = sum(share for _, share in parsed)
    return [(folder, share / total) for folder, share in parsed]


def _weight(entry: str) -> tuple[str, Fraction | None]:
    folder, colon, number = entry.rpartition(":")
    if colon and re.fullmatch(r"\d+(\.\d*)?|\.\d+", number):
        return os.path.expanduser(folder), Fraction(number)
    return entry, None


# --- The stream -----------------------------------------------------------------------------------


class TokenStream:
    """The shards of one split as one sequence of tokens. Reading is safe from several threads.

    num_tokens, paths, and a fingerprint of what is in it: from the manifest's
    checksums if there are any, else from sizes and a few blocks of each shard. Equal data in
    shards of other names has the same fingerprint.
    """

    def __init__(self, shards: list[Shard]):
        self.shards = shards
        self.paths = paths = [shard.path for shard in shards]
        self._begins = [0, *itertools.accumulate(2 * shard.tokens for shard in shards)]  # bytes
        self.num_tokens = self._begins[-1] // 2
        # Few open files even with thousands of shards. One that falls out of the cache while
        # another thread reads it stays open until that thread lets go of it.
        self._file = functools.lru_cache(maxsize=64)(lambda k: _open(paths[k]))
        sha = hashlib.sha256()
        for shard, begin in zip(shards, self._begins, strict=False):
            sha.update(f"{shard.tokens} {shard.sha256}\n".encode())
            last = max(0, shard.tokens - BLOCK)
            blocks = sorted({0, last // 3, 2 * last // 3, last})
            if self.num_tokens <= SMALL:
                blocks = range(0, shard.tokens, BLOCK)
            for block in blocks:
                tokens = self.read(begin // 2 + block, min(BLOCK, shard.tokens - block))
                if shard.sha256 is None:
                    sha.update(tokens)
        self.fingerprint = sha.hexdigest()[:16]

    def read(self, start: int, n: int) -> np.ndarray:
        """Return tokens [start, start + n) as uint16, across shard borders."""
        return self._read([start], n)[0]

    def windows(self, index: np.ndarray, T: int) -> np.ndarray:
        """Return windows `index` (n,) of length T as uint16 (n, T+1)."""
        return self._read((index * T).tolist(), T + 1)

    def _read(self, starts: list[int], n: int) -> np.ndarray:
        """Return n tokens from each of `starts` on, as uint16 (len(starts), n)."""
        out = np.empty((len(starts), n), DTYPE)
        if hasattr(os, "posix_fadvise"):
            # Announcing all reads lets the disk work on them side by side: 15 instead of 51 ms for
            # 512 scattered windows that are not in memory, on the disk where this was measured.
            for start in starts:
                k, offset = self._at(2 * start)
                file = self._file(k)
                os.posix_fadvise(file.fileno(), offset, 2 * n, os.POSIX_FADV_WILLNEED)
        for start, row in zip(starts, out, strict=True):
            buffer, at = memoryview(row).cast("B"), 2 * start
            while buffer:
                k, offset = self._at(at)
                file, rest = self._file(k), self._begins[k + 1] - at
                try:
                    got = os.preadv(file.fileno(), [buffer[:rest]], offset)
                except OSError as error:
                    raise _unreadable(self.paths[k], error) from None
                if got == 0:
                    raise ValueError(f"shard {self.paths[k]} became shorter while it was in use")
                buffer, at = buffer[got:], at + got
        if out.size and out.max() >= VOCAB_SIZE:
            row, column = np.argwhere(out >= VOCAB_SIZE)[0].tolist()
            at = 2 * (starts[row] + column)
            k, _ = self._at(at)
            raise ValueError(
                f"shard {self.paths[k]}: token {(at - self._begins[k]) // 2:,} is "
                f"{out[row, column]}, beyond GPT-2's last id {EOT}: damaged, or another "
                "tokenizer's; prepare it again"
            )
        return out

    def _at(self, at: int) -> tuple[int, int]:
        """Return where byte `at` of the stream is: (number of the shard, byte in its file)."""
        k = bisect.bisect_right(self._begins, at) - 1
        return k, self.shards[k].offset + at - self._begins[k]


def open_split(data_dir: str | Path, split: str) -> TokenStream:
    """Open the stream over the `split` ("train" or "val") shards of a folder.

    Checked here: sizes and headers of all shards against each other and the manifest, and token
    ids, of a small set in full, else in a few blocks of each shard (every window is checked again
    when it is read). Raise ValueError with the folder or file and the fix.
    """
    return TokenStream([open_shard(*found) for found in list_shards(data_dir, split)])


def verify(data_dir: str | list[str]) -> None:
    """Read every shard in full: SHA-256 against the manifest where there is one, and token ids.

    A bar on a terminal says how far it is. Raise ValueError that names every bad shard.
    """
    shards, problems = [], []
    for folder, _ in parse_data_dir(data_dir):
        for split in ("train", "val"):
            for path, entry in list_shards(folder, split):
                try:
                    shards.append(open_shard(path, entry))
                except ValueError as error:
                    problems.append(str(error))
    total = sum(shard.path.stat().st_size for shard in shards)
    # disable=None: where standard error is no terminal
    with tqdm(desc="verifying", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for shard in shards:
            sha, token, bad = hashlib.sha256(), 0, None
            try:
                with open(shard.path, "rb") as file:
                    sha.update(file.read(shard.offset))
                    while chunk := file.read(CHUNK):
                        sha.update(chunk)
                        beyond = np.frombuffer(chunk, DTYPE) >= VOCAB_SIZE
                        if bad is None and beyond.any():
                            bad = token + int(beyond.argmax())
                        token += len(beyond)
                        bar.update(len(chunk))
            except OSError as error:
                problems.append(str(_unreadable(shard.path, error)))
                continue
            if bad is not None:
                problems.append(f"shard {shard.path}: token {bad:,} is beyond id {EOT}")
            elif shard.sha256 not in (None, sha.hexdigest()):
                problems.append(f"shard {shard.path}: SHA-256 differs from its manifest's")
    if problems:
        raise ValueError("; ".join(problems) + ": prepare or fetch these again")
