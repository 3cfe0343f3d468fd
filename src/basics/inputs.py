"""What a person typed: paths with a ~, and how it is said that something in it is wrong."""

import contextlib
import os
import re
import shlex


def path(text: str) -> str:
    """Return `text` with ~ and ~name as home folders, wherever the shell left them alone.

    Raise ValueError where ~ means nothing: no HOME, and no such user.
    """
    expanded = os.path.expanduser(text)
    if expanded == text and re.match("~(/|$)", text):
        raise ValueError("~ means nothing here, HOME is not set: write the whole path")
    return expanded


def paths(text: str) -> str:
    """Do as `path` for a text of several: "~/a:0.7 ~/b:0.3"."""
    return re.sub(r"(?<!\S)~[^/\s:]*", lambda tilde: path(tilde[0]), text)


def shown(value) -> str:
    """Return a value as one would type it in a shell."""
    return shlex.quote(str(value))


def wrong(name: str, value, problem) -> ValueError:
    """Return the error that says it of --name: first the flag and its value, then the problem."""
    return ValueError(f"--{name} {shown(value)}: {problem}")


@contextlib.contextmanager
def about(name: str, value):
    """Say of --name what goes wrong inside, unless that speaks of a flag already."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
        if text.startswith("--"):
            raise
        for begin in (f"{value}: ", f"{value} "):
            text = text.removeprefix(begin)
        raise wrong(name, value, text) from None
