"""Files that exist whole or not at all, also after a power cut.

with durable.replacing(path) as file:  # written beside, flushed, renamed, folder flushed
    file.write(...)
durable.write(path, header, body)      # the same for bytes that are there already
"""

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


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "wb"):
    """Yield a new file beside `path`, which takes its name when the block ends without an error.

    mode: "wb" or "w" (UTF-8, newlines as written). The file is called .tmp-NAME-PID, and its own
    `name` says where that is. Raise OSError, with `path` in it, if the disk refuses; after any
    error what was at `path` is untouched and the new file is gone.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(temporary, mode, opener=lambda p, _: os.open(p, NEW_FILE, 0o666), **text) as file:
            yield file
            file.flush()
            flush_file(file.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(e, OSError) and e.filename in (None, temporary, str(temporary)):
            raise OSError(e.errno, e.strerror, str(path)) from None
        raise
    flush_folder(path.parent)


def write(path: str | Path, *parts) -> None:
    """Write buffers of bytes, one after the other, to `path` as `replacing` does."""
    with replacing(path) as file:
        for part in parts:
            file.write(part)


def flush_file(fd: int) -> None:
    """Wait until the disk holds what was written."""
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


def check_writable(folder) -> str | None:
    """Create `folder`, write, flush and remove a small file; raise ValueError if that fails.

    Return a sentence, and raise nothing, if only the disk is full: space may come back.
    """
    folder = Path(folder)
    probe = folder / ".write-test"
    try:
        make_folder(folder)
        write(probe, bytes(4096))
        probe.unlink(missing_ok=True)
    except OSError as e:
        sentence = f"cannot write in {folder}: {e.strerror}"
        if e.errno in DISK_FULL:
            return sentence
        raise ValueError(sentence) from None
    return None
