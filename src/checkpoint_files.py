"""Checkpoint files that exist whole or not at all: write, verify, load, list, retain, lock.

    python src/checkpoint_files.py [DIR=checkpoints] [--verify]     what is there, and is it whole?

A checkpoint is an ordinary `torch.save` file: `torch.load(path, weights_only=True)` reads it
without this module. What is added sits in the comment that every ZIP archive may have at its end:

    gpt2-checkpoint 1 {"saved_at": 1763000000.0, "step": 5000, ...} sha256 <64 hexadecimal digits>

The digest covers every byte of the file before it, so one flipped bit anywhere is noticed, a cut
file has no comment at all, and there is no second file that could be lost or be out of date. The
JSON is what a list of checkpoints shows; it is read without touching the tensors.

A save writes `.tmp-step_00005000.pt-<process id>` in the same folder, flushes it to the disk,
renames it and flushes the folder: whenever the machine dies, the name `step_00005000.pt` stands for
the old content or for the new, never for a part. PyTorch is imported where tensors are touched
only, so that listing and verifying start at once.

Sections: names and errors, writing, verifying and loading, finding, retention, folders, the lock,
background saving, the command.
"""

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

try:
    import fcntl
except ImportError:  # Windows: no lock, and folders cannot be flushed; the rest works
    fcntl = None

# --- Names and errors -----------------------------------------------------------------------------

MARK = b"gpt2-checkpoint 1 "  # the 1 is the version of the comment's layout
SEAL = b" sha256 "
DIGEST_LEN = 64
EOCD_LEN = 22  # a ZIP archive's last record ("end of central directory") without its comment
EOCD_SIGNATURE = b"PK\x05\x06"
CHUNK = 16 << 20  # bytes hashed, written or read in one go, while other threads run
GATHER = 1 << 16  # smaller writes are put together
# Never through a link somebody put there. No O_EXCL: in a container the process id in a temporary's
# name may well be the one of the process that crashed here before.
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
NEW_FILE |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

STEP_NAME = re.compile(r"step_([0-9]{8,})\.pt")
TEMPORARY_NAME = re.compile(r"\.tmp-(step_[0-9]{8,}\.pt|write-test)-[0-9]+")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint; the text names the file and the reason."""

    def __init__(self, path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


@dataclass(frozen=True)
class Info:
    """One checkpoint file as a folder lists it; nothing of it has been read."""

    path: Path
    step: int
    bytes: int
    mtime: float  # Unix time


def step_path(folder, step: int) -> Path:
    """`folder`/step_00005000.pt"""
    return Path(folder) / f"step_{step:08d}.pt"


def _size(n: float) -> str:
    """1490000000 -> '1.49 GB'."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= length:
            return f"{n / length:.2f} {unit}"
    return f"{n:.0f} bytes"


# --- Writing --------------------------------------------------------------------------------------


def map_tensors(tree, tensor_fn: Callable, where: str = "state"):
    """A copy of nested dicts, lists and tuples with `tensor_fn(tensor, where)` for each tensor.

    All else must be None, bool, int, float, str or bytes, because that is what can be loaded again
    without running code; a NumPy scalar or a Path raises TypeError here, at the save, where it is
    a bug to fix, and not months later at the load. Subclasses of dict and tuple become plain.
    """
    import torch

    if isinstance(tree, torch.Tensor):
        return tensor_fn(tree, where)
    if isinstance(tree, dict):
        for key in tree:
            if type(key) not in (str, int, float, bool, type(None)):
                raise TypeError(f"{where} has a key of type {type(key).__name__}: {key!r}")
        return {k: map_tensors(v, tensor_fn, f"{where}[{k!r}]") for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        items = [map_tensors(v, tensor_fn, f"{where}[{i}]") for i, v in enumerate(tree)]
        return items if isinstance(tree, list) else tuple(items)
    if type(tree) not in (type(None), bool, int, float, str, bytes):
        raise TypeError(
            f"{where} is a {type(tree).__name__}; a checkpoint holds tensors and plain values only"
        )
    return tree


def _identity(tensor) -> tuple:
    """Equal for tensors that are the same memory seen the same way: tied weights."""
    return (
        tensor.device,
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
    )


def _compact(state: dict) -> dict:
    """The same state, detached, without storages that are larger than the tensors in them.

    `torch.save` writes a view's whole storage: ten rows of a large matrix would cost the matrix.
    Such views are cloned (once for all that are tied); everything else is written as it lies.
    """
    clones = {}

    def compact(tensor, where):
        tensor = tensor.detach()
        if tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size():
            return tensor
        key = _identity(tensor)
        if key not in clones:
            clones[key] = tensor.clone()
        return clones[key]

    return map_tensors(state, compact)


class _SealingWriter:
    """What `torch.save` writes into: passes bytes on to a file descriptor and hashes them.

    The archive's last record is held back until `seal` has put the comment's length into it. That
    works in one pass because PyTorch writes its archives from front to back and never seeks.
    """

    def __init__(self, fd: int):
        self.fd = fd
        self.sha = hashlib.sha256()
        self.pending = bytearray()  # small writes gather here; never less than the last record
        self.error: OSError | None = None

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        if len(view) < GATHER:
            self.pending += view
            if len(self.pending) > GATHER:
                self._emit(self.pending[:-EOCD_LEN])
                del self.pending[:-EOCD_LEN]
        else:
            self._emit(self.pending)
            self._emit(view[:-EOCD_LEN])
            self.pending = bytearray(view[-EOCD_LEN:])
        return len(view)

    def flush(self) -> None:
        pass  # asked for by torch.save; `save` flushes to the disk, which is more

    def seal(self, info: dict) -> None:
        """Write the last record, the comment and the digest of everything before it."""
        end = bytes(self.pending[-EOCD_LEN:])
        assert end[:4] == EOCD_SIGNATURE and end[-2:] == b"\0\0", "not the end of an archive"
        text = MARK + json.dumps(info, sort_keys=True).encode("ascii") + SEAL
        length = len(text) + DIGEST_LEN
        if length > 0xFFFF:
            raise ValueError(f"info is too long for a ZIP comment: {length} of 65535 bytes")
        self._emit(self.pending[:-EOCD_LEN] + end[:-2] + struct.pack("<H", length) + text)
        self._write(memoryview(self.sha.hexdigest().encode("ascii")))

    def _emit(self, data) -> None:
        with memoryview(data) as view:
            for start in range(0, len(view), CHUNK):
                piece = view[start : start + CHUNK]
                self.sha.update(piece)
                self._write(piece)

    def _write(self, view: memoryview) -> None:
        try:
            _write_all(self.fd, view)
        except OSError as e:
            self.error = self.error or e  # torch.save hides it behind a RuntimeError
            raise


def _write_all(fd: int, view) -> None:
    while view:  # a write may be partial: signals, limits, a disk that is nearly full
        view = view[os.write(fd, view) :]


def _flush_to_disk(fd: int) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone leaves the data in the drive's cache
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def flush_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut; a no-op where folders cannot be flushed."""
    if fcntl is None:
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(fd)


def _make_folder(folder: Path) -> None:
    """Create `folder` and its parents so that they too survive a power cut."""
    if folder.is_dir():
        return
    if folder.exists():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush_folder(folder.parent)


def save(path, state: dict, info: dict | None = None) -> None:
    """Write `state` to `path` so that the file exists whole or not at all, also after a power cut.

    state: nested dicts, lists and tuples of tensors and plain values (see `map_tensors`).
    info: a few plain values for lists of checkpoints (step, val_loss, ...); `saved_at` is added.
    OSError: disk full (errno 28), quota, no permission...; what was there before is untouched and
    no temporary is left.
    """
    import torch

    path = Path(path)
    state = _compact(state)
    info = {"saved_at": time.time(), **(info or {})}
    _make_folder(path.parent)
    temporary = path.parent / f".tmp-{path.name}-{os.getpid()}"
    try:
        fd = os.open(temporary, NEW_FILE, 0o666)
        try:
            writer = _SealingWriter(fd)
            try:
                torch.save(state, writer)
                writer.seal(info)
            except RuntimeError:
                if writer.error is None:
                    raise
                raise writer.error from None
            _flush_to_disk(fd)
            if hasattr(os, "posix_fadvise"):
                # Nobody will read it soon; on machines whose GPU shares the memory (DGX Spark) the
                # pages would be missing there.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            written = os.fstat(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(e, OSError) and e.filename is None:  # a full disk does not say whose
            raise OSError(e.errno, e.strerror, str(path)) from None
        raise
    flush_folder(path.parent)
    _known_good[_signature(path, written)] = info


# --- Verifying and loading ------------------------------------------------------------------------

# Files that this process wrote or verified, by name and identity: not hashed again for retention.
_known_good: dict[tuple, dict] = {}


def _signature(path: Path, st: os.stat_result) -> tuple:
    return (os.path.abspath(path), st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns)


@contextlib.contextmanager
def _open(path: Path):
    """The file, unbuffered; what the system refuses, also later, becomes a CheckpointError."""
    try:
        mode = os.stat(path).st_mode  # first: opening a named pipe would wait for ever
    except FileNotFoundError:
        raise CheckpointError(path, "does not exist") from None
    except OSError as e:
        raise CheckpointError(path, f"cannot be read: {e.strerror}") from None
    except ValueError:  # a NUL in the name
        raise CheckpointError(repr(str(path)), "is not a possible file name") from None
    if stat.S_ISDIR(mode):
        raise CheckpointError(path, "is a folder, not a checkpoint file")
    if not stat.S_ISREG(mode):
        raise CheckpointError(path, "is not a regular file")
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as e:  # no permission, or the disk cannot give it back
        raise CheckpointError(path, f"cannot be read: {e.strerror}") from None


def _read_comment(path: Path, file) -> tuple[int, bytes, dict]:
    """(length of what the digest covers, the digest, info) from the end of an open file."""
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
        raise CheckpointError(path, "has no checksum of this program: another program wrote it")
    try:
        info = json.loads(text[len(MARK) : -len(SEAL)])
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise CheckpointError(path, "is damaged: its description cannot be read")
    return size - DIGEST_LEN, digest, info


def read_info(path) -> dict:
    """The `info` of a checkpoint and `saved_at`, from its last bytes. CheckpointError if not ours.

    A file that is cut short is noticed, damage inside it is not: that takes `verify`.
    """
    with _open(Path(path)) as file:
        return _read_comment(Path(path), file)[2]


def _saved_at(info: dict, otherwise: float) -> float:
    value = info.get("saved_at")
    return value if isinstance(value, int | float) else otherwise


def verify(path) -> None:
    """Read the whole file and compare its checksum; CheckpointError names the file and the reason.

    Runs at about 1 GB/s; a file of this process that has not changed since is not read again by
    `retain`, but always here.
    """
    path = Path(path)
    with _open(path) as file:
        covered, digest, info = _read_comment(path, file)
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
    _known_good[_signature(path, before)] = info


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
    """CheckpointError if what was loaded is not of the types that `layout` says: a type, a list of
    one layout, a dict of them by key, or a dataclass (for those of its fields that are there)."""
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


# --- Finding --------------------------------------------------------------------------------------


def list_checkpoints(folder) -> list[Info]:
    """The files in `folder` that are named like checkpoints, by step; [] if there is no folder.

    ValueError: the folder cannot be read.
    """
    found = []
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise ValueError(f"cannot list {folder}: {e.strerror}") from None
    for name in names:
        match = STEP_NAME.fullmatch(name)
        if match and name == step_path("", int(match[1])).name:
            with contextlib.suppress(OSError):  # deleted since, or a link to nothing
                path = Path(folder) / name
                st = os.stat(path)
                if stat.S_ISREG(st.st_mode):
                    found.append(Info(path, int(match[1]), st.st_size, st.st_mtime))
    return sorted(found, key=lambda c: c.step)


def _first_whole(candidates: list[Info]) -> tuple[Path | None, list[tuple[Path, str]]]:
    skipped = []
    for candidate in candidates:
        try:
            verify(candidate.path)
            return candidate.path, skipped
        except CheckpointError as e:
            skipped.append((candidate.path, e.reason))
    return None, skipped


def find_latest(folder) -> tuple[Path | None, list[tuple[Path, str]]]:
    """(the checkpoint of the highest step that verifies, [(skipped file, reason), ...])."""
    return _first_whole(list_checkpoints(folder)[::-1])


def find_latest_anywhere(checkpoint_dir) -> tuple[Path | None, list[tuple[Path, str]]]:
    """As `find_latest`, over all run folders in `checkpoint_dir`: the one saved last."""

    def saved_at(candidate: Info) -> float:
        with contextlib.suppress(CheckpointError):
            return _saved_at(read_info(candidate.path), candidate.mtime)
        return candidate.mtime

    candidates = [c for run in run_folders(checkpoint_dir) for c in list_checkpoints(run)]
    return _first_whole(sorted(candidates, key=lambda c: (saved_at(c), c.step), reverse=True))


def run_folders(checkpoint_dir) -> list[Path]:
    """The folders in `checkpoint_dir`, by name; links are not followed."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(
            p for p in Path(checkpoint_dir).iterdir() if p.is_dir() and not p.is_symlink()
        )
    return []


# --- Retention ------------------------------------------------------------------------------------


def sweep(folder) -> list[Path]:
    """Remove temporaries that crashed saves left in `folder`; for the holder of the lock only."""
    removed = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if TEMPORARY_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
                    removed.append(Path(entry.path))
    return removed


def retain(
    folder, keep_last: int, keep_every: int = 0, stable_step: int | None = None
) -> list[str]:
    """Delete old checkpoints in `folder`; returns a warning for each that could not be deleted.

    Kept are the `keep_last` highest steps (0: all), multiples of `keep_every` (0: none for that
    reason), the one with the lowest `val_loss` in its info, `stable_step` (where a run can be
    extended), the file written last (after a roll-back it is not the highest step), and at least
    one that verifies. Only regular files with
    our name and our comment are ever deleted, and only those count. What this process wrote or
    verified is not hashed again.
    """
    ours, losses = [], {}
    for candidate in list_checkpoints(folder):
        with contextlib.suppress(CheckpointError):
            loss = read_info(candidate.path).get("val_loss")
            if not candidate.path.is_symlink():
                ours.append(candidate)
                if isinstance(loss, float) and math.isfinite(loss):
                    losses[candidate.step] = loss
    if keep_last <= 0 or len(ours) <= keep_last:
        return []
    keep = {c.step for c in ours[-keep_last:]}
    keep |= {c.step for c in ours if keep_every > 0 and c.step % keep_every == 0}
    keep |= {stable_step, max(ours, key=lambda c: c.mtime).step}
    keep |= {min(losses, key=losses.get)} if losses else set()
    if not any(_is_known_good(c.path) for c in ours if c.step in keep):
        whole, _ = _first_whole(ours[::-1])
        if whole is None:
            return []
        keep |= {c.step for c in ours if c.path == whole}
    warnings = []
    for candidate in ours:
        if candidate.step not in keep:
            try:
                os.unlink(candidate.path)
            except FileNotFoundError:
                pass
            except OSError as e:  # never worth a training run: say it and go on
                warnings.append(f"{candidate.path} could not be deleted: {e.strerror}")
    return warnings


def make_room(
    folder, keep_last: int, keep_every: int = 0, stable_step: int | None = None
) -> list[str]:
    """Delete what `retain` would delete if one more checkpoint were there already, never the last
    one; returns the names of the deleted files."""
    before = list_checkpoints(folder)
    retain(folder, keep_last - 1, keep_every, stable_step)
    left = {c.step for c in list_checkpoints(folder)}
    return [c.path.name for c in before if c.step not in left]


def _is_known_good(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return _signature(path, os.stat(path)) in _known_good
    return False


# --- Folders --------------------------------------------------------------------------------------


def validate_run_name(name: str) -> str:
    """The name itself, or ValueError if it could be anything but one folder's name."""
    if not RUN_NAME.fullmatch(name):
        raise ValueError(
            f"run name {name!r} is not allowed: use 1 to 100 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    return name


def run_folder(base, name: str) -> Path:
    """`base`/`name`, which need not exist; ValueError if it leads out of `base` (a link)."""
    folder = Path(base) / validate_run_name(name)
    resolved, inside = folder.resolve(), Path(base).resolve()
    if resolved == inside or not resolved.is_relative_to(inside):
        raise ValueError(f"{folder} is a link to {resolved}, outside {inside}: remove the link")
    return folder


def check_writable(folder) -> str | None:
    """Create `folder` and write, flush and remove a small file there; ValueError if that fails.

    Only a full disk is no error but the sentence that is returned: space may come back.
    """
    folder = Path(folder)
    probe = folder / f".tmp-write-test-{os.getpid()}"
    try:
        _make_folder(folder)
        fd = os.open(probe, NEW_FILE, 0o666)
        try:
            _write_all(fd, bytes(4096))
            os.fsync(fd)
        finally:
            os.close(fd)
            os.unlink(probe)
    except OSError as e:
        sentence = f"cannot write in {folder}: {e.strerror}"
        if e.errno in DISK_FULL:
            return sentence
        raise ValueError(sentence) from None
    return None


def free_bytes(folder) -> int:
    """Free space for this user on the file system of `folder`, which need not exist yet."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# --- The lock -------------------------------------------------------------------------------------


class RunLock:
    """One training run per folder: a lock on `folder`/.lock that dies with the process.

    A POSIX record lock (`fcntl.lockf`), because it belongs to this process alone: a forked child (a
    loader, a compile worker) that outlives a killed run does not go on holding it, as it would an
    `flock`; and it works over NFS. Its one trap, that closing *any* descriptor of the file drops
    it, is met by never opening the file again in the process that holds it. What the file says
    is only for the message: after a crash it is stale, and the lock is free all the same.
    """

    # (process, lock file): the kernel does not exclude a process from its own locks
    _held: ClassVar[set[tuple[int, str]]] = set()

    def __init__(self):
        self.path: Path | None = None
        self.fd: int | None = None

    def acquire(self, folder) -> "RunLock":
        """Take the lock of `folder`; ValueError names the host and the process that have it."""
        assert self.fd is None
        if fcntl is None:
            return self
        path = Path(folder).resolve() / ".lock"
        _make_folder(path.parent)
        if (os.getpid(), str(path)) in self._held:
            raise ValueError(f"{folder} is in use by this very process ({os.getpid()})")
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except OSError as e:
                raise ValueError(f"cannot lock {folder}: {path}: {e.strerror}") from None
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    break
            except FileNotFoundError:
                pass  # removed between opening and locking: what we hold is nobody's lock
            except OSError as e:
                if e.errno in (errno.EACCES, errno.EAGAIN):
                    holder = self._holder(fd)
                    os.close(fd)
                    raise ValueError(
                        f"{folder} is in use by {holder}: stop it or choose another --run_name"
                    ) from None
                os.close(fd)
                if e.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    return self  # a file system without locks
                raise
            os.close(fd)
        content = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        content["job"] = launcher()
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(fd, os.pwrite(fd, json.dumps(content).encode("ascii"), 0))
        self.fd, self.path = fd, path
        self._held.add((os.getpid(), str(path)))
        return self

    def holds(self, folder) -> bool:
        """Whether this is the lock of `folder`."""
        return self.path is not None and self.path.parent == Path(folder).resolve()

    @staticmethod
    def _holder(fd: int) -> str:
        for _ in range(20):  # the holder may be about to write its name
            with contextlib.suppress(ValueError, KeyError, TypeError):
                content = json.loads(os.pread(fd, 4096, 0))
                since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(content["time"]))
                return f"process {content['pid']} on {content['host']} (since {since})"
            time.sleep(0.05)
        return "another process"

    def release(self) -> None:
        """Give the lock back; the file stays, since removing it would race with the next owner."""
        if self.fd is not None:
            self._held.discard((os.getpid(), str(self.path)))
            os.close(self.fd)
            self.fd = self.path = None


def launcher() -> str | None:
    """What the torchrun that started this process is called, the same over all its restarts."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{run_id} {socket.gethostname()} {os.getppid()}" if run_id is not None else None


def run_of_launcher(checkpoint_dir) -> str | None:
    """Name of the run whose folder an earlier attempt of our torchrun claimed, if there is one."""
    for folder in run_folders(checkpoint_dir) if launcher() else ():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads((folder / ".lock").read_bytes()).get("job") == launcher():
                return folder.name
    return None


# --- Background saving ----------------------------------------------------------------------------

SMALL_THINGS = 1 << 20  # bytes for random numbers, step counts and gaps beside the large tensors
HEADROOM = 1 << 30  # bytes left to the rest of the machine; below it the copy is not made


def available_bytes(proc="/proc", cgroups="/sys/fs/cgroup") -> int | None:
    """Memory that can be had without swapping, also within a container's limit; None: unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path(proc, "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError):
        for line in Path(proc, "self/cgroup").read_text().splitlines():
            number, controllers, group = line.split(":", 2)
            if number == "0":  # control groups, version 2
                names = ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):  # version 1
                group = "/memory" + group
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            lowest = Path(cgroups) / group.strip("/")
            for level in (lowest, *lowest.parents):  # each may have a limit, the root has none
                with contextlib.suppress(OSError, ValueError):  # "max"
                    limit, used = (int((level / name).read_text()) for name in names[:2])
                    stats = (level / "memory.stat").read_text().splitlines()
                    used -= int(dict(row.split() for row in stats).get(names[2], 0))  # page cache
                    found.append(max(0, limit - used))
    return min(found, default=None)


class BackgroundSaver:
    """Saves checkpoints while training goes on; the caller waits for a copy in memory only.

    The copy is allocated once (pinned when it comes from CUDA) and used for every save, so that
    memory use is the size of one checkpoint, known from the start. An error never reaches the
    caller: it is announced, older checkpoints stay as they are, and the next save tries again.
    One thread at a time; every method is for one thread (the training loop's).
    """

    def __init__(self, announce: Callable[[str], None] = print, headroom: int = HEADROOM):
        self.announce, self.headroom = announce, headroom
        self.synchronous = False  # no memory for the copy: save in the foreground
        self._buffers = {}  # place in the state -> CPU tensor in one of the arenas
        self._arenas = []  # the memory, and whether CUDA must be made to let go of it
        self._spare = None  # (the last arena's memory, bytes handed out, bytes left)
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._started = 0.0
        self._ok = True
        self._failures: list[tuple[Path, str]] = []

    def allocate(self, state: dict, at_least: int = 0) -> None:
        """Reserve the memory for copies of `state`, best before the first step; says how much.

        at_least: bytes of what the state will hold later, as an optimizer makes its moments in the
        first step; reserved at once, and given to the tensors that come.
        """
        import torch

        missing, total = {}, 0

        def look(tensor, where):
            nonlocal total
            buffer = self._buffers.get(where)
            layout = torch.empty_like(tensor, device="meta")  # same strides, if they are dense
            if buffer is not None and (buffer.shape, buffer.dtype, buffer.stride()) != (
                layout.shape,
                layout.dtype,
                layout.stride(),
            ):
                raise _LayoutChanged
            if buffer is None and where not in missing:
                missing[where] = (total, layout)
                total += -(-tensor.numel() * tensor.element_size() // 64) * 64
            cuda.update([tensor.device] if tensor.device.type == "cuda" else [])

        cuda = set()
        try:
            _map_unique(state, look)
        except _LayoutChanged:  # another model: two copies at once would break the promise
            self.wait()
            self._release()
            missing, total = {}, 0
            _map_unique(state, look)
        if not missing or self.synchronous:
            return
        if self._spare is not None and total <= self._spare[2]:
            self._hand_out(missing, total)
            return
        needed, total = total, max(total, at_least + SMALL_THINGS if at_least else 0)
        available = available_bytes()
        if available is not None and available < total + self.headroom:
            self._stay_synchronous(
                f"{_size(total)} of memory for a copy would leave less than "
                f"{_size(self.headroom)} of {_size(available)}"
            )
            return
        try:
            raw = mmap.mmap(-1, max(total, 64), access=mmap.ACCESS_COPY)  # private, no file
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without: a copy takes 30% longer
                    raw.madvise(mmap.MADV_HUGEPAGE)
            arena = torch.frombuffer(raw, dtype=torch.uint8)
            arena.zero_()  # touches every page now, with all threads, and not in the first save
        except OSError:  # a limit that /proc does not know (ulimit -v)
            self._stay_synchronous(f"{_size(total)} of memory for a copy cannot be had")
            return
        pinned = bool(cuda) and _pin(arena)
        self._arenas.append((arena, pinned))
        self._spare = (raw, 0, total)
        self._hand_out(missing, needed)
        self.announce(
            f"background checkpoints: {_size(total)} of {'pinned ' if pinned else ''}memory "
            "reserved for the copy"
        )

    def _hand_out(self, missing: dict, needed: int) -> None:
        """Buffers for the tensors in `missing`, {place: (offset, layout)}, from the last arena."""
        import torch

        raw, begin, left = self._spare
        for where, (offset, layout) in missing.items():
            # Each buffer gets a storage of its own length, so that saving one does not save all.
            flat = (
                torch.frombuffer(
                    raw, dtype=layout.dtype, count=layout.numel(), offset=begin + offset
                )
                if layout.numel()
                else torch.empty(0, dtype=layout.dtype)
            )
            self._buffers[where] = flat.as_strided(layout.shape, layout.stride())
        self._spare = (raw, begin + needed, left - needed)

    def save(
        self,
        path,
        state: dict,
        info: dict | None = None,
        on_done: Callable[[], list[str] | None] | None = None,
        on_full: Callable[[], list[str]] | None = None,
    ) -> float:
        """Copy `state` and write it behind the caller's back; returns the seconds waited here.

        `on_done()` runs after a successful write, in the writing thread; the warnings it returns
        are announced (`retain`). `on_full()` runs when the disk is full; if it returns names of
        files that it deleted, the write is tried once more (`make_room`). The caller may change its
        tensors and values as soon as this returns.
        """
        import torch

        began = time.monotonic()
        if self.busy():
            self.announce(
                f"{self._path} is still being written after {began - self._started:.1f} s; "
                f"{Path(path).name} waits for it"
            )
        self.wait()
        self._path, self._started = Path(path), time.monotonic()
        self.allocate(state)
        if self.synchronous:
            self._write(Path(path), state, info, on_done, on_full)
            return time.monotonic() - began
        devices, moves = set(), []

        def copy(tensor, where):
            buffer = self._buffers[where]
            if tensor.device.type == "cuda":
                devices.add(tensor.device)
                buffer.copy_(tensor, non_blocking=True)
            elif tensor.device.type == "cpu" and tensor.stride() == buffer.stride():
                # The same layout: bytes. copy_ would make all threads of PyTorch meet after each of
                # hundreds of tensors, which takes five times as long when the machine is busy.
                for at in range(0, tensor.nbytes, CHUNK):
                    n = min(CHUNK, tensor.nbytes - at)
                    moves.append((buffer.data_ptr() + at, tensor.data_ptr() + at, n))
            else:
                buffer.copy_(tensor)
            return buffer

        copied = _map_unique(state, copy)
        _move_all(moves)
        for device in devices:
            torch.cuda.synchronize(device)
        arguments = (Path(path), copied, dict(info or {}), on_done, on_full)
        # Not a daemon: the interpreter waits for it, even after an exception.
        thread = threading.Thread(target=self._write, args=arguments, name="saver")
        try:
            thread.start()
            self._thread = thread
        except RuntimeError:  # the system gives this user no more threads
            self._write(*arguments)
        return time.monotonic() - began

    def busy(self) -> bool:
        """Whether a save is being written right now."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> bool:
        """Wait for a running save; True if the last save succeeded."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._ok

    def close(self) -> bool:
        """Wait for a running save and give the memory back; True if the last save succeeded."""
        self.wait()
        self._release()
        return self._ok

    def failures(self) -> list[tuple[Path, str]]:
        """(file, reason) of every save that failed so far."""
        return list(self._failures)

    def _write(self, path: Path, state: dict, info: dict | None, on_done, on_full) -> None:
        """Save and call `on_done`; any error ends here, since training is worth more."""
        try:
            try:
                save(path, state, info)
            except OSError as e:
                deleted = on_full() if on_full and e.errno in DISK_FULL else []
                if not deleted:
                    raise
                self.announce(
                    f"WARNING: no room for {path}: deleted {', '.join(deleted)}, which it replaces"
                )
                save(path, state, info)
            self._ok = True
        except Exception as e:
            reason = (e.strerror if isinstance(e, OSError) else None) or f"{type(e).__name__}: {e}"
            self._ok = False
            self._failures.append((path, reason))
            self.announce(
                f"WARNING: {path} COULD NOT BE WRITTEN: {reason}. Training goes on, older "
                "checkpoints are untouched, the next save tries again."
            )
            return
        try:
            for warning in (on_done and on_done()) or []:
                self.announce(f"WARNING: {warning}")
        except Exception as e:
            self.announce(f"WARNING: after writing {path}: {type(e).__name__}: {e}")

    def _stay_synchronous(self, why: str) -> None:
        self.synchronous = True
        self._release()
        self.announce(f"checkpoints are written in the foreground: {why}")

    def _release(self) -> None:
        self._buffers = {}
        for arena, pinned in self._arenas:
            if pinned:
                import torch

                torch.cuda.cudart().cudaHostUnregister(arena.data_ptr())
        self._arenas, self._spare = [], None


def _move_all(moves: list[tuple[int, int, int]]) -> None:
    """Copy (destination, source, bytes) for all, in this thread and up to three more."""
    rest = iter(moves)  # each thread takes the next, so that none waits for a slow one

    def work():
        for move in rest:
            ctypes.memmove(*move)  # lets other threads run

    helpers = [threading.Thread(target=work) for _ in range(min(4, os.cpu_count() or 1) - 1)]
    started = []
    with contextlib.suppress(RuntimeError):  # the system gives this user no more threads
        for helper in helpers:
            helper.start()
            started.append(helper)
    work()
    for helper in started:
        helper.join()


class _LayoutChanged(Exception):
    """A tensor no longer fits the buffer that was made for it."""


def _map_unique(state: dict, fn: Callable) -> dict:
    """`map_tensors` with one call for all tensors that are tied, so that they stay tied."""
    results = {}

    def once(tensor, where):
        tensor = tensor.detach()
        key = _identity(tensor) if tensor.numel() else where
        if key not in results:
            results[key] = fn(tensor, where)
        return results[key]

    return map_tensors(state, once)


def _pin(arena) -> bool:
    """Let CUDA copy straight into this memory; False if it will not (copies are slower then).

    PyTorch's own pinned tensors are rounded up to a power of two: up to twice the memory.
    """
    import torch

    if int(torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), arena.numel(), 0)) == 0:
        return True
    with contextlib.suppress(RuntimeError):  # else the next kernel is blamed for this error
        torch.zeros(1, device="cuda")
    return False


# --- The command ----------------------------------------------------------------------------------


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(0, seconds):.0f} s"


def main(argv: list[str] | None = None) -> int:
    import argparse

    parser = argparse.ArgumentParser(description="List checkpoints: step, loss, size, age, state.")
    parser.add_argument("dir", nargs="?", default="checkpoints", help="of all runs, or of one")
    parser.add_argument("--verify", action="store_true", help="read every file and check its sum")
    args = parser.parse_args(argv)
    if not Path(args.dir).is_dir():
        print(
            f"{args.dir} is not a folder: name the one given as --checkpoint_dir", file=sys.stderr
        )
        return 2
    bad = listed = 0
    for folder in (Path(args.dir), *run_folders(args.dir)):
        checkpoints = list_checkpoints(folder)
        if checkpoints:
            print(f"{folder}\n{'step':>10} {'val loss':>9} {'size':>9} {'age':>9}  state")
        for c in checkpoints:
            listed += 1
            info, saved_at, state = {}, c.mtime, "ok" if args.verify else "ok (not verified)"
            try:
                info = read_info(c.path)
                saved_at = _saved_at(info, c.mtime)
                if args.verify:
                    verify(c.path)
            except CheckpointError as e:
                bad, state = bad + 1, e.reason
            loss = info.get("val_loss")
            loss = f"{loss:.4f}" if isinstance(loss, float) else "-"
            age = _age(time.time() - saved_at)
            print(f"{c.step:>10} {loss:>9} {_size(c.bytes):>9} {age:>9}  {state}")
    if not listed:
        print(f"no checkpoints in {args.dir}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
