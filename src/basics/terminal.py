"""What a command says, and to whom: the same manners in all of them.

    @terminal.command
    def main(argv=None) -> int: ...

Bad input (ValueError, OSError) is a sentence beginning "error: " on standard error and exit code 2;
Ctrl-C is 130, without a traceback. A reader who leaves (`| head`), a terminal that is gone and a
full disk behind `>` end nothing: what is only said is dropped and the work goes on. Colours are for
what must not be overlooked, on a terminal only, never with NO_COLOR set.

To be imported before anything that opens files: with standard input, output or error closed
(`>&-`) the next file to be opened would take its number, and what is printed would go into it.
"""

import argparse
import contextlib
import errno
import functools
import io
import os
import sys
from collections.abc import Callable

from basics import inputs
from basics.words import marked

for _number, _name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, _name) is None:  # closed: os.open takes the lowest number that is free
        with contextlib.suppress(OSError):
            _fd = os.open(os.devnull, os.O_RDWR)
            if _fd != _number:
                os.dup2(_fd, _number)
                os.close(_fd)
            os.set_inheritable(_number, True)
            setattr(sys, _name, os.fdopen(_number, "w" if _number else "r", closefd=False))

try:
    os.getcwd()
except FileNotFoundError:  # PyTorch's libraries would end the process with a riddle
    print("error: the working folder is not there any more: cd to another one", file=sys.stderr)
    sys.exit(2)

# --- Output ---------------------------------------------------------------------------------------

_GONE = (errno.EPIPE, errno.EIO)  # nobody reads it any more, or the terminal was closed


class Lasting:
    """A standard stream that cannot end the program: what cannot be written is dropped."""

    def __init__(self, stream):
        self._stream = stream
        self.lost: OSError | None = None  # why something could not be written

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable, *arguments) -> None:
        try:
            act(*arguments)
        except OSError as e:
            self.lost = self.lost or e
            if e.errno in _GONE:  # also for what libraries write, and what is in the buffers
                with contextlib.suppress(OSError, ValueError):
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, self._stream.fileno())
                    os.close(null)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def make_lasting() -> None:
    """Make standard output and error drop what cannot be written, or their encoding has not."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know only ASCII
        if not isinstance(stream, Lasting):
            setattr(sys, name, Lasting(stream))


def check_output() -> None:
    """Leave quietly when nobody reads standard output any more, raise OSError when it cannot be
    written: for a command whose whole work is what it prints."""
    sys.stdout.flush()
    lost = getattr(sys.stdout, "lost", None)
    if lost is not None and lost.errno in _GONE:
        sys.exit(0)
    if lost is not None:
        raise OSError(lost.errno, lost.strerror, "standard output")


# --- Commands -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors begin with "error: ", and whose --help keeps its lines."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def parse_args(self, argv=None, namespace=None):
        arguments, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            words = [word.split("=")[0] for word in unknown if word.startswith("-")] or unknown
            near = inputs.nearest(words[0], self._option_string_actions)
            self.error(f"unrecognized argument: {' '.join(words)}{near}")
        return arguments

    def error(self, message: str):
        self.print_usage(sys.stderr)
        print_error(message)
        sys.exit(2)


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate a command's `main`: see above for what becomes of its output and its exceptions."""

    @functools.wraps(main)
    def run(*arguments, **named) -> int:
        streams = sys.stdout, sys.stderr
        make_lasting()
        try:
            return main(*arguments, **named)
        except (ValueError, OSError) as error:
            print_error(error)
            return 2
        except KeyboardInterrupt:
            return 130
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sys.stdout, sys.stderr = streams

    return run


def _say_what_is_missing(kind, error, trace) -> None:
    if kind is not ModuleNotFoundError:
        return sys.__excepthook__(kind, error, trace)
    print_error(f"{error} in {sys.executable}: run pip install -r requirements.txt there")
    sys.exit(2)


sys.excepthook = _say_what_is_missing


def print_error(error: Exception | str) -> None:
    """Print "error: " and what went wrong on standard error, in red."""
    if isinstance(error, OSError) and error.strerror:
        error = ": ".join([*([str(error.filename)] if error.filename else []), error.strerror])
    sys.stdout.flush()  # what was said before comes first
    for line in str(error).splitlines() or [""]:
        print(marked(f"error: {line}", sys.stderr), file=sys.stderr, flush=True)
