"""Checkpoint files that exist whole or not at all: write, verify, load.

A checkpoint is an ordinary `torch.save` file: `torch.load(path, weights_only=True)` reads it
without this module. What is added sits in the comment that every ZIP archive may have at its end:

    gpt2-checkpoint 1 {"saved_at": 1763000000.0, "step": 5000, ...} sha256 <64 hexadecimal digits>

The digest covers every byte of the file before it, so one flipped bit anywhere is noticed, a cut
file has no comment at all, and there is no second file that could be lost or be out of date. The
JSON is what a list of checkpoints shows; it is read without touching the tensors.

A save writes beside and renames (basics/durable.py): whenever the machine dies, the name
`step_00005000.pt` stands for the old content or for the new, never for a part. PyTorch is imported
where tensors are touched only, so that listing and verifying start at once.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import stat
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from basics import durable
from basics.durable import make_folder

# --- Names and errors -----------------------------------------------------------------------------

MARK = b"gpt2-checkpoint 1 "  # the 1 is the version of the comment's layout
SEAL = b" sha256 "
DIGEST_LEN = 64
EOCD_LEN = 22  # a ZIP archive's last record ("end of central directory") without its comment
EOCD_SIGNATURE = b"PK\x05\x06"
CHUNK = 16 << 20  # bytes hashed, written or read in one go, while other threads run
STEP_NAME = re.compile(r"step_([0-9]{8,})\.pt")
TEMPORARY_NAME = re.compile(r"\.tmp-(step_[0-9]{8,}\.pt|\.?write-test)-[0-9]+|\.write-test")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


FOREIGN = "has no checksum of this program: another program wrote it"


class CheckpointError(ValueError):
    """Says which file cannot be used as a checkpoint, and the reason."""

    def __init__(self, path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Info:
    """Describes a checkpoint file as a folder lists it; nothing of it has been read."""

    path: Path
    step: int
    bytes: int
    mtime: float  # Unix time


def step_path(folder, step: int) -> Path:
    """Return `folder`/step_00005000.pt."""
    return Path(folder) / f"step_{step:08d}.pt"


# --- Writing --------------------------------------------------------------------------------------

PLAIN = (type(None), bool, int, float, str, bytes)


def map_tensors(tree, fn: Callable, where: str = "state", done: dict | None = None):
    """Return a copy of nested dicts, lists and tuples with `fn(tensor, where)` for each tensor.

    `fn` is called once for all tensors that are tied (the same memory seen the same way), so that
    they stay tied. All else must be None, bool, int, float, str or bytes, because that is what can
    be loaded again without running code; a NumPy scalar or a Path raises TypeError here, at the
    save, where it is a bug to fix, and not months later at the load. Subclasses of dict and tuple
    become plain.
    """
    import torch

    done = {} if done is None else done
    if isinstance(tree, torch.Tensor):
        begin = id(tree)
        if type(tree) in (torch.Tensor, torch.nn.Parameter) and tree.numel():
            begin = tree.untyped_storage().data_ptr() or begin
        seen = (begin, tree.storage_offset(), tree.shape, tree.stride(), tree.dtype, tree.device)
        if seen not in done:
            done[seen] = fn(tree, where)
        return done[seen]
    if isinstance(tree, dict):
        for key in tree:
            if type(key) not in PLAIN:
                raise TypeError(f"{where} has a key of type {type(key).__name__}: {key!r}")
        return {k: map_tensors(v, fn, f"{where}[{k!r}]", done) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        items = [map_tensors(v, fn, f"{where}[{i}]", done) for i, v in enumerate(tree)]
        return items if isinstance(tree, list) else tuple(items)
    if type(tree) not in PLAIN:
        raise TypeError(
            f"{where} is a {type(tree).__name__}; a checkpoint holds tensors and plain values only"
        )
    return tree


def _without_rest(tensor, where: str):
    """Clone a view of a larger storage: `torch.save` writes the storage, and ten rows of a large
    matrix would cost the matrix."""
    whole = tensor.untyped_storage().nbytes() <= tensor.nbytes
    return tensor.detach() if whole else tensor.detach().clone()


class _SealingWriter:
    """Takes the bytes of `torch.save`, passes them on to a file and hashes them.

    The archive's last record is held back until `seal` has put the comment's length into it. That
    works in one pass because PyTorch writes its archives from front to back and never seeks.
    """

    def __init__(self, file, progress: Callable[[], None]):
        self.file, self.progress, self.sha = file, progress, hashlib.sha256()
        self.held_back = b""  # the last bytes so far, as long as the last record
        self.error: OSError | None = None

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        if len(view) >= EOCD_LEN:
            self._emit(self.held_back)
            self._emit(view[:-EOCD_LEN])
            self.held_back = bytes(view[-EOCD_LEN:])
        else:
            both = self.held_back + view
            self._emit(both[:-EOCD_LEN])
            self.held_back = both[-EOCD_LEN:]
        return len(view)

    def flush(self) -> None:
        pass  # asked for by torch.save; `save` flushes to the disk, which is more

    def seal(self, info: dict) -> None:
        """Write the last record, the comment and the digest of everything before it."""
        end = self.held_back
        assert end[:4] == EOCD_SIGNATURE and end[-2:] == b"\0\0", "not the end of an archive"
        text = MARK + json.dumps(info, sort_keys=True).encode("ascii") + SEAL
        length = len(text) + DIGEST_LEN
        if length > 0xFFFF:
            raise ValueError(f"info is too long for a ZIP comment: {length} of 65535 bytes")
        self._emit(end[:-2] + struct.pack("<H", length) + text)
        self.file.write(self.sha.hexdigest().encode("ascii"))

    def _emit(self, data) -> None:
        try:
            for start in range(0, len(data), CHUNK):
                piece = data[start : start + CHUNK]
                self.sha.update(piece)
                self.file.write(piece)
                self.progress()
        except OSError as e:
            self.error = self.error or e  # torch.save hides it behind a RuntimeError
            raise


def save(
    path, state: dict, info: dict | None = None, progress: Callable[[], None] = lambda: None
) -> None:
    """Write `state` to `path` so that the file exists whole or not at all, also after a power cut.

    state: nested dicts, lists and tuples of tensors and plain values (see `map_tensors`).
    info: a few plain values for lists of checkpoints (step, val_loss, ...); `saved_at` is added.
    progress: called for every piece (CHUNK at most) that is written.
    OSError: disk full (errno 28), quota, no permission...; what was there before is untouched and
    no temporary is left.
    """
    import torch

    path = Path(path)
    state = map_tensors(state, _without_rest)
    info = {"saved_at": time.time(), **(info or {})}
    make_folder(path.parent)
    with durable.replacing(path) as file:
        writer = _SealingWriter(file, progress)
        try:
            torch.save(state, writer)
            writer.seal(info)
        except RuntimeError:
            if writer.error is None:
                raise
            raise writer.error from None
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            # Nobody will read it soon; on machines whose GPU shares the memory (DGX Spark) the
            # pages would be missing there.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        _known_good.add(_signature(path, os.fstat(file.fileno())))


# --- Verifying and loading ------------------------------------------------------------------------

# Files that this process wrote or verified, by name and identity: not hashed again for retention.
_known_good: set[tuple] = set()


def _signature(path: Path, st: os.stat_result) -> tuple:
    return (os.path.abspath(path), st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns)


def is_known_good(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return _signature(path, os.stat(path)) in _known_good
    return False


@contextlib.contextmanager
def _open(path: Path):
    """Yield the file, unbuffered; what the system refuses, also later, is a CheckpointError."""

    def at_once(name, flags):  # without O_NONBLOCK a named pipe would wait for ever
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        with open(path, "rb", buffering=0, opener=at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(path, "is not a regular file")
            yield file
    except FileNotFoundError:
        raise CheckpointError(path, "does not exist") from None
    except IsADirectoryError:
        raise CheckpointError(path, "is a folder, not a checkpoint file") from None
    except OSError as e:  # no permission, or the disk cannot give it back
        raise CheckpointError(path, f"cannot be read: {e.strerror}") from None


def _read_comment(path: Path, file) -> tuple[int, bytes, dict]:
    """Return (length of what the digest covers, digest, info) from the end of an open file."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise CheckpointError(path, "is empty")
    length = min(size, EOCD_LEN + 0xFFFF)
    file.seek(size - length)
    tail = file.read(length)
    if not tail.strip(b"\0"):
        raise CheckpointError(path, "ends in NUL bytes: the machine stopped before it was written")
    at = tail.rfind(EOCD_SIGNATURE)
    end = tail[at:] if at >= 0 else b""
    if len(end) < EOCD_LEN or struct.unpack("<H", end[20:22])[0] != len(end) - EOCD_LEN:
        file.seek(0)
        if file.read(2) != b"PK":
            raise CheckpointError(path, "is not a checkpoint of this program, or its start is lost")
        raise CheckpointError(path, "is cut short or damaged: the end of the archive is missing")
    comment = end[EOCD_LEN:]
    text, digest = comment[:-DIGEST_LEN], comment[-DIGEST_LEN:]
    if not (text.startswith(MARK) and text.endswith(SEAL)):
        raise CheckpointError(path, FOREIGN)
    try:
        info = json.loads(text[len(MARK) : -len(SEAL)])
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise CheckpointError(path, "is damaged: its description cannot be read")
    return size - DIGEST_LEN, digest, info


def read_info(path) -> dict:
    """Return the `info` of a checkpoint, from its last bytes. CheckpointError if it is not ours.

    A file that is cut short is noticed, damage inside it is not: that takes `verify`.
    """
    with _open(Path(path)) as file:
        return _read_comment(Path(path), file)[2]


def verify(path) -> None:
    """Read the whole file and compare its checksum; CheckpointError names the file and the reason.

    Runs at about 1 GB/s. `load` and `retain` believe it, or a save of this process, of a file that
    has not changed since.
    """
    path = Path(path)
    with _open(path) as file:
        covered, digest, _ = _read_comment(path, file)
        before = os.fstat(file.fileno())
        file.seek(0)
        sha, buffer = hashlib.sha256(), memoryview(bytearray(min(covered, CHUNK)))
        while covered:
            n = file.readinto(buffer[: min(covered, CHUNK)])
            if not n:
                raise CheckpointError(path, "became shorter while it was read")
            sha.update(buffer[:n])
            covered -= n
    if sha.hexdigest().encode("ascii") != digest:
        raise CheckpointError(path, "is damaged: its content does not match its checksum")
    _known_good.add(_signature(path, before))


def load(path, map_location="cpu") -> dict:
    """Verify a checkpoint and load it; nothing in the file is ever executed.

    The file is mapped into memory: the bytes just hashed are not read or copied again, and pages
    nobody uses cost nothing. The tensors may be changed freely (the file is not: private pages),
    and the file may be deleted or replaced meanwhile (Linux keeps it until they are gone).
    CheckpointError: missing, a folder, cut short, damaged, foreign, or not a plain dict of tensors.
    """
    import pickle

    import torch

    path = Path(path)
    if not is_known_good(path):
        verify(path)
    try:
        state = torch.load(path, map_location=map_location, weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            path, "holds more than tensors and plain values (code?): refused, nothing was run"
        ) from None
    except Exception as e:  # forged, as the checksum was right: any parser may trip over anything
        reason = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise CheckpointError(path, f"cannot be loaded: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(path, f"holds a {type(state).__name__} and not a dict")
    return state


def check_layout(path, value, layout, where: str = "it") -> None:
    """Raise CheckpointError if what was loaded is not of the types that `layout` says: a type, a
    list of one layout, a dict of them by key, or a dataclass (for its fields that are there)."""
    if dataclasses.is_dataclass(layout) and isinstance(value, dict):
        layout = {f.name: f.type for f in dataclasses.fields(layout) if f.name in value}
    kind = type(layout) if isinstance(layout, dict | list) else layout
    if layout in (float, float | None):
        kind = layout | int
    if dataclasses.is_dataclass(kind) or not isinstance(value, kind):
        is_a = type(value).__name__
        raise CheckpointError(path, f"is no checkpoint of this program: {where} is a {is_a}")
    if isinstance(layout, dict):
        for key, part in layout.items():
            check_layout(path, value.get(key), part, key)
    elif isinstance(layout, list):
        for part in value:
            check_layout(path, part, layout[0], f"a part of {where}")
