"""Colours for what must not be overlooked: on a terminal only, never with NO_COLOR set."""

import os
import sys

_COLOURS = {"red": 31, "green": 32, "yellow": 33}


def tint(text: str, colour: str, stream=None) -> str:
    """`text` in a colour if `stream` (standard output) is a terminal that wants any.

    NO_COLOR with any content means none (no-color.org), TERM=dumb too.
    """
    stream = sys.stdout if stream is None else stream
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def marked(text: str, stream=None) -> str:
    """A line of output: yellow if it begins with WARNING, red if with ERROR or error."""
    for word, colour in (("WARNING", "yellow"), ("ERROR", "red"), ("error", "red")):
        if text.startswith(word):
            return tint(text, colour, stream)
    return text


def size(n: float) -> str:
    """1490000000 -> '1.49 GB'."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= length:
            return f"{n / length:.2f} {unit}"
    return f"{n:.0f} bytes"


def age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(0, seconds):.0f} s"
