"""The folders of runs: find, keep and delete checkpoints, claim a folder for one run."""

import contextlib
import errno
import json
import math
import os
import socket
import stat
import time
from pathlib import Path

from basics.durable import make_folder
from checkpointing.files import (
    RUN_NAME,
    STEP_NAME,
    TEMPORARY_NAME,
    CheckpointError,
    Info,
    is_known_good,
    read_info,
    step_path,
    verify,
)

try:
    import fcntl
except ImportError:  # Windows: no lock, and folders cannot be flushed; the rest works
    fcntl = None

# --- Finding --------------------------------------------------------------------------------------


def list_checkpoints(folder) -> list[Info]:
    """Return the files in `folder` named like checkpoints, by step; [] if there is no folder.

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
    """Return (the checkpoint of the highest step that verifies, [(skipped, reason), ...])."""
    return _first_whole(list_checkpoints(folder)[::-1])


def find_latest_anywhere(checkpoint_dir) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return as `find_latest`, over all run folders in `checkpoint_dir`: the one saved last."""
    candidates = [c for run in run_folders(checkpoint_dir) for c in list_checkpoints(run)]
    return _first_whole(sorted(candidates, key=lambda c: (saved_at(c), c.step), reverse=True))


def saved_at(checkpoint: Info) -> float:
    """Return the Unix time at which it was saved, or else its file's."""
    with contextlib.suppress(CheckpointError):
        value = read_info(checkpoint.path).get("saved_at")
        return value if isinstance(value, int | float) else checkpoint.mtime
    return checkpoint.mtime


def run_folders(checkpoint_dir) -> list[Path]:
    """Return the folders in `checkpoint_dir`, by name, those behind links too."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(p for p in Path(checkpoint_dir).iterdir() if p.is_dir())
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
    reason), the one with the lowest `val_loss` in its info (on the `data` of the newest),
    `stable_step` (where a run can be extended), the file written last (after a roll-back it is not
    the highest step), and at least one that verifies. Only regular files with our name and our
    comment are ever deleted, and only those count. What this process wrote or verified is not
    hashed again.
    """
    ours, infos = [], {}
    for candidate in list_checkpoints(folder):
        with contextlib.suppress(CheckpointError):
            info = read_info(candidate.path)
            if not candidate.path.is_symlink():
                ours.append(candidate)
                infos[candidate.step] = info
    if keep_last <= 0 or len(ours) <= keep_last:
        return []
    keep = {c.step for c in ours[-keep_last:]}
    keep |= {c.step for c in ours if keep_every > 0 and c.step % keep_every == 0}
    newest = max(ours, key=lambda c: c.mtime).step
    losses = {
        step: info["val_loss"]
        for step, info in infos.items()
        if isinstance(info.get("val_loss"), float) and math.isfinite(info["val_loss"])
        if info.get("data") in (None, infos[newest].get("data"))  # losses on other text differ
    }
    keep |= {stable_step, newest}
    keep |= {min(losses, key=losses.get)} if losses else set()
    if not any(is_known_good(c.path) for c in ours if c.step in keep):
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


# --- Folders --------------------------------------------------------------------------------------


def validate_run_name(name: str) -> str:
    """Return the name; ValueError if it could be anything but one folder's name."""
    if not RUN_NAME.fullmatch(name):
        raise ValueError(
            f"--run_name {name!r}: use 1 to 100 letters, digits, '.', '_' and '-', beginning with "
            "a letter or digit"
        )
    return name


def run_folder(base, name: str) -> Path:
    """Return `base`/`name`, there or not yet; ValueError if it leads out of `base` (a link)."""
    folder = Path(base) / validate_run_name(name)
    resolved, inside = folder.resolve(), Path(base).resolve()
    if resolved == inside or not resolved.is_relative_to(inside):
        raise ValueError(
            f"--run_name {name}: {folder} is a link to {resolved}, outside {inside}: move the "
            f"link one level up (let {base} be the link), or name that folder's parent instead"
        )
    return folder


# --- The lock -------------------------------------------------------------------------------------


class RunLock:
    """Keeps a folder for one training run: a lock on `folder`/.lock that dies with the process.

    A POSIX record lock (`fcntl.lockf`), because it belongs to this process alone: a forked child (a
    loader, a compile worker) that outlives a killed run does not go on holding it, as it would an
    `flock`; and it works over NFS. Its one trap, that closing *any* descriptor of the file drops
    it, is met by never opening the file again in the process that holds it. What the file says
    is only for the message: after a crash it is stale, and the lock is free all the same.
    """

    def __init__(self):
        self.path: Path | None = None
        self.fd: int | None = None
        self._content = b""

    def acquire(self, folder, patience: float = 0.0) -> "RunLock":
        """Take the lock of `folder`, which another process may hold for `patience` seconds more;
        then ValueError names its host and number."""
        if fcntl is None:
            return self
        path = Path(folder).resolve() / ".lock"
        make_folder(path.parent)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as e:
            raise ValueError(f"cannot lock {folder}: {path}: {e.strerror}") from None
        while (locked := _try_lock(fd)) is False:
            if patience <= 0:
                holder = _holder(fd)
                os.close(fd)
                raise ValueError(
                    f"{folder} is in use by {holder}: stop it or choose another --run_name"
                )
            time.sleep(1)
            patience -= 1
        if locked is None:  # nothing to hold
            os.close(fd)
            return self
        there = False
        with contextlib.suppress(FileNotFoundError):
            there = os.path.samestat(os.fstat(fd), os.stat(path))
        if not there:  # removed between opening and locking: what we hold is nobody's lock
            os.close(fd)
            return self.acquire(folder, patience)
        content = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        content = json.dumps(content | {"job": torchrun_job()}).encode("ascii")
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(fd, os.pwrite(fd, content, 0))
            self._content = content
        self.fd, self.path = fd, path
        return self

    def holds(self, folder) -> bool:
        """Return whether this is the lock of `folder`."""
        return self.path is not None and self.path.parent == Path(folder).resolve()

    def lost_to(self) -> str | None:
        """Return who has the lock now, if this process had it and has it no more.

        A network file system gives it away when the holder's machine has been cut off, or stood
        still, for longer than a lease (NFS 4: some 90 s). To lock again what is held changes
        nothing, but asks the server, and what is read after that is what is there.
        """
        if self.fd is None:
            return None
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(self.fd), os.stat(self.path)):
                ours = self._content in (b"", os.pread(self.fd, 4096, 0))
                return None if ours else _holder(self.fd)
        except FileNotFoundError:
            return None  # somebody removed the folder: nobody else has it
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EIO):
                return None
        return "another process"

    def release(self) -> None:
        """Give the lock back; the file stays, since removing it would race with the next owner."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = self.path = None


def _try_lock(fd: int) -> bool | None:
    """Lock the file; return False if another process holds it, None if there are no locks here."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if e.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return None
        raise
    return True


def _holder(fd: int) -> str:
    for _ in range(20):  # the holder may be about to write its name
        with contextlib.suppress(ValueError, KeyError, TypeError):
            content = json.loads(os.pread(fd, 4096, 0))
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(content["time"]))
            return f"process {content['pid']} on {content['host']} (since {since})"
        time.sleep(0.05)
    return "another process"


def torchrun_job() -> str | None:
    """Return what --rdzv_id calls the job that this process belongs to, if it does."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if job == "none" else job


def run_of_job(checkpoint_dir) -> str | None:
    """Return the name of the run whose folder a process of our job claimed last, if one did."""
    found = []
    for folder in run_folders(checkpoint_dir) if torchrun_job() else ():
        with contextlib.suppress(OSError, ValueError, AttributeError, KeyError):
            content = json.loads((folder / ".lock").read_bytes())
            if content.get("job") == torchrun_job():
                found.append((content["time"], folder.name))
    return max(found)[1] if found else None
