"""Numbers as people say them, and colours for what must not be overlooked.

Nothing here raises, whatever the number: it is only shown.
"""

import math
import os
import re
import sys

YEAR = 365.25 * 86400
UNITS = (("years", YEAR, 2), ("d", 86400, 1), ("h", 3600, 1), ("min", 60, 1))  # from how many on


def duration(seconds: float) -> str:
    """Return 5025 as '1.4 h': seconds, minutes, hours, days, years; infinity is 'for ever'."""
    seconds = _number(seconds)
    if math.isnan(seconds):
        return "unknown"
    if seconds >= 1e6 * YEAR:
        return "for ever"
    for unit, length, least in UNITS:
        if round(seconds / length, 1) >= least:
            return f"{seconds / length:,.{0 if seconds > 1000 * YEAR else 1}f} {unit}"
    return f"{seconds:.1f} s" if 0.05 <= seconds < 9.95 else f"{max(0, seconds):.0f} s"


def size(n: float) -> str:
    """Return 1490000000 as '1.49 GB'."""
    return _scaled(_number(n), (" bytes", " kB", " MB", " GB", " TB", " PB"))


def count(n: float) -> str:
    """Return 1490000000 as '1.49B': of tokens, parameters, documents."""
    return _scaled(_number(n), ("", "k", "M", "B", "T"))


def _scaled(n: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(n) < 999.5:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g}{units[-1]}"


def _number(n: float) -> float:
    try:
        return float(n)
    except OverflowError:  # a whole number of more than 308 digits
        return math.copysign(math.inf, n > 0 or -1)


# --- Colours --------------------------------------------------------------------------------------

_COLOURS = {"red": 31, "green": 32, "yellow": 33}


def tint(text: str, colour: str, stream=None) -> str:
    """Return `text` in a colour if `stream` (standard output) is a terminal that wants any.

    NO_COLOR with any content means none (no-color.org), TERM=dumb too.
    """
    stream = sys.stdout if stream is None else stream
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def plain(text: str) -> str:
    """Replace control characters, whoever wrote them, by �."""
    return re.sub(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "�", text)


def marked(text: str, stream=None) -> str:
    """Return a line of output, yellow if it begins with WARNING, red if with ERROR or error."""
    for word, colour in (("WARNING", "yellow"), ("ERROR", "red"), ("error", "red")):
        if text.startswith(word):
            return tint(text, colour, stream)
    return text
