"""Files that exist whole or not at all, also after a power cut."""

import contextlib
import errno
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: folders cannot be flushed; the rest works
    fcntl = None

# Never through a link somebody put there. No O_EXCL: in a container the process id in a temporary's
# name may well be the one of the process that crashed here before.
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
NEW_FILE |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_all(fd: int, view) -> None:
    while view:  # a write may be partial: signals, limits, a disk that is nearly full
        view = view[os.write(fd, view) :]


def flush_file(fd: int) -> None:
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


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents so that they too survive a power cut."""
    if folder.is_dir():
        return
    if folder.exists():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush_folder(folder.parent)


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


def check_writable(folder) -> str | None:
    """Create `folder` and write, flush and remove a small file there; ValueError if that fails.

    Only a full disk is no error but the sentence that is returned: space may come back.
    """
    folder = Path(folder)
    probe = folder / f".tmp-write-test-{os.getpid()}"
    try:
        make_folder(folder)
        fd = os.open(probe, NEW_FILE, 0o666)
        try:
            write_all(fd, bytes(4096))
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
