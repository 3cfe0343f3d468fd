"""Tell someone who is not looking: messages to a phone, mail or chat, and heartbeats.

    python src/train_improved.py --notify '$NTFY' --heartbeat '$HEALTHCHECK'
    python src/train_improved.py --notify 'cmd: mail -s training me@example.org'

A target is an address of Apprise (https://github.com/caronc/apprise: ntfy, Slack, Telegram, e-mail,
webhooks and a hundred more) or `cmd: ...`, a shell command that gets the text on standard input and
facts in its environment: NOTIFY_EVENT, NOTIFY_TITLE, NOTIFY_RUN, NOTIFY_STEP. `$NAME` is read from
the environment. An address often is a password, so nothing but its beginning is ever printed or
written anywhere.

Training never waits: threads take messages from short queues. A service that hangs, refuses or
answers with an error costs a line in the log now and then.
"""

import contextlib
import math
import os
import queue
import re
import shlex
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from tempfile import NamedTemporaryFile

# --- Targets and their secrets --------------------------------------------------------------------

COMMAND, VARIABLE = re.compile(r"cmd:\s+(.+)", re.S), re.compile(r"\$\{?(\w+)\}?")


def revealed(flag: str, target: str) -> str:
    """Return the target, or the value of the variable if it is `$NAME`; ValueError if unset."""
    name = VARIABLE.fullmatch(target)
    if not name:
        return target
    if not os.environ.get(name[1]):
        raise ValueError(f"{flag} {target}: the environment has no {name[1]}; export it first")
    return os.environ[name[1]]


def redacted(target: str) -> str:
    """Return as much of a target as anyone may read: `$NAME`, or how it begins."""
    if VARIABLE.fullmatch(target):
        return target
    if command := COMMAND.fullmatch(target):
        program = re.match(r"([\w./-]+)\s", command[1] + " ")  # and not TOKEN=secret before it
        return f"cmd: {os.path.basename(program[1])} ..." if program else "cmd: ..."
    scheme, colon, _ = target.partition("://")
    return f"{scheme}://..." if colon else "..."


def redact_words(words: list[str]) -> list[str]:
    """Return a command line without the secrets of --notify and --heartbeat."""
    words, hidden = list(words), ("--notify", "--heartbeat")
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in hidden and equals:
            words[i] = f"{name}={redacted(value)}"
        elif i and words[i - 1] in hidden:
            words[i] = redacted(word)
    return words


def seconds_of(flag: str, text: str) -> float:
    """Return the seconds of 30m, 24h or 7d. ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mhd])", text)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"{flag} {text}: give minutes, hours or days, as 30m, 24h or 7d")
    return float(match[1]) * {"m": 60.0, "h": 3600.0, "d": 86400.0}[match[2]]


def checked_url(flag: str, url: str) -> str:
    """Return the URL that a flag means. ValueError unless it is one of http or https."""
    address = revealed(flag, url)
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{flag} {redacted(url)}: give a URL that begins with http:// or https://")
    return address


def split_targets(text: str) -> list[str]:
    """Return the targets of --notify, which are words of a shell, or one command as it is."""
    return [text] if COMMAND.fullmatch(text) else shlex.split(text)


# --- Messages -------------------------------------------------------------------------------------

Draw = Callable[[str], None]  # writes a PNG to a path


@dataclass(frozen=True)
class Message:
    run: str
    event: str  # started, resumed, finished, stopped, warning, over, digest, test ...
    text: str
    step: int = 0
    draw: Draw | None = None

    @property
    def title(self) -> str:
        return f"{self.run}: {self.event}"


Send = Callable[[Message], None]  # raises if it was not taken
COMMAND_TIMEOUT = 30.0  # seconds; Apprise has its own, of a few seconds


def command_sender(line: str) -> Send:
    """Return a function that gives a message to a shell command."""

    def send(message: Message) -> None:
        facts = {"NOTIFY_EVENT": message.event, "NOTIFY_TITLE": message.title}
        facts |= {"NOTIFY_RUN": message.run, "NOTIFY_STEP": str(message.step)}
        subprocess.run(
            ["/bin/sh", "-c", line],
            input=f"{message.text}\n".encode(),
            env=os.environ | facts,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=COMMAND_TIMEOUT,
            start_new_session=True,  # Ctrl-C on the terminal is not meant for it
            check=True,
        )

    return send


# What services show in another colour.
KINDS = {"warning": "warning", "finished": "success", "over": "success"}
KINDS |= dict.fromkeys(("gave up", "crashed", "hung", "not saved"), "failure")


def apprise_sender(about: str, address: str) -> Send:
    """Return a function that sends through Apprise. ValueError, which begins with `about`, if that
    is missing or does not know the address."""
    try:
        import apprise
    except ImportError:
        raise ValueError(
            f"{about}: needs Apprise: pip install apprise (or give a command, 'cmd: ...')"
        ) from None
    service = apprise.Apprise.instantiate(address, suppress_exceptions=True)
    if service is None:
        raise ValueError(
            f"{about}: Apprise knows no service of this address; see "
            "https://github.com/caronc/apprise/wiki"
        )
    service.request_rate_per_sec = 0  # ours is lower

    def send(message: Message) -> None:
        words = {"title": message.title, "body": message.text}
        words["notify_type"] = KINDS.get(message.event.split(":")[0], "info")
        with contextlib.ExitStack() as stack:
            # Without its picture, if /tmp is full or nothing can draw, a message still is one.
            with contextlib.suppress(Exception):
                if message.draw and service.attachment_support:
                    file = stack.enter_context(NamedTemporaryFile(prefix="loss-", suffix=".png"))
                    message.draw(file.name)
                    words["attach"] = file.name
            if not service.notify(**words):
                raise ConnectionError

    return send


def senders(targets: list[str]) -> list[tuple[str, Send]]:
    """Return [(what may be printed of it, function that sends)] of --notify. ValueError for one
    that cannot work."""
    found = []
    for target in targets:
        address, name = revealed("--notify", target), redacted(target)
        if command := COMMAND.fullmatch(address):
            found.append((name, command_sender(command[1])))
        else:
            found.append((name, apprise_sender(f"--notify {name}", address)))
    return found


class Sender:
    """Sends what it is given, one after the other, in a thread of its own. At most `size` wait,
    what comes then is dropped; a failure costs a sentence to `announce` now and then."""

    def __init__(self, name: str, send: Callable, size: int, announce: Callable[[str], None]):
        self._queue = queue.Queue(size)
        work = (name, send, announce)
        self._thread = threading.Thread(target=self._work, args=work, name=name, daemon=True)
        self._thread.start()

    def put(self, item, seconds: float = 0.0) -> None:
        """Queue an item, None to end; wait that many seconds for a place."""
        with contextlib.suppress(queue.Full):
            self._queue.put(item, timeout=seconds)

    def close(self, seconds: float) -> None:
        """Give what waits a few seconds to leave."""
        self.put(None, seconds)
        self._thread.join(seconds)

    def _work(self, name: str, send: Callable, announce: Callable[[str], None]) -> None:
        failures = 0
        while (item := self._queue.get()) is not None:
            try:
                send(item)
            except Exception as error:  # whatever a service, or its library, can think of
                failures += 1
                if failures in (1, 10, 100, 1000):
                    # Not the error's text: it may have the address in it.
                    why = type(error).__name__
                    announce(f"{name} failed {failures} time(s) ({why}); training goes on")


# --- Heartbeats -----------------------------------------------------------------------------------


class Heartbeat:
    """Pings a URL after steps, at most once a minute, so that silence is noticed.

    healthchecks.io and what speaks its way (`/ping/` in the path, hc-ping.com): URL/start when
    training begins, URL after steps, URL/fail when it ends badly. Uptime Kuma (`/api/push/`): its
    status up and down. Any other URL is fetched after steps and at a good end, and not at a bad
    one. Under systemd (NOTIFY_SOCKET) its watchdog is fed, too. While a server hangs, no more than
    one ping waits for it.
    """

    EVERY = 60.0  # seconds
    WATCHDOG = 5.0  # seconds between two words to systemd
    TIMEOUT = 10.0

    def __init__(self, url: str | None, announce: Callable[[str], None], clock=time.monotonic):
        self.url, self._clock = url, clock
        self._last = self._fed = -math.inf
        self._watchdog = os.environ.get("NOTIFY_SOCKET")
        self._sender = Sender("--heartbeat", self._fetch, 1, announce) if url else None

    def start(self) -> None:
        self._tell_systemd(b"READY=1")
        self._ping("start")

    def step(self) -> None:
        """Ping, if it is time, after a step."""
        now = self._clock()
        if now - self._fed >= self.WATCHDOG:
            self._fed = now
            self._tell_systemd(b"WATCHDOG=1")
        if now - self._last >= self.EVERY:
            self._last = now
            self._ping("step")

    def end(self, well: bool) -> None:
        """Say that the run finished or was stopped on purpose (well), or that it failed."""
        self._tell_systemd(b"STOPPING=1")
        if self._sender:
            self._ping("finish" if well else "fail", self.TIMEOUT)
            self._sender.close(self.TIMEOUT)

    def address(self, event: str) -> str | None:
        """Return the URL that says start, step, finish or fail to this kind of service."""
        parts = urllib.parse.urlsplit(self.url)
        if "/api/push/" in parts.path:
            query = dict(urllib.parse.parse_qsl(parts.query)) | {"msg": event}
            query["status"] = "down" if event == "fail" else "up"
            parts = parts._replace(query=urllib.parse.urlencode(query))
        elif parts.hostname == "hc-ping.com" or "/ping/" in parts.path:
            ending = f"/{event}" if event in ("start", "fail") else ""
            parts = parts._replace(path=parts.path.rstrip("/") + ending)
        elif event in ("start", "fail"):
            return None
        return parts.geturl()

    def _ping(self, event: str, seconds: float = 0.0) -> None:
        if self._sender and (address := self.address(event)):
            self._sender.put(address, seconds)

    def _fetch(self, address: str) -> None:
        with urllib.request.urlopen(address, timeout=self.TIMEOUT) as answer:
            answer.read(1000)

    def _tell_systemd(self, what: bytes) -> None:
        if self._watchdog:
            name = self._watchdog.replace("@", "\0", 1)  # an abstract socket
            with (
                contextlib.suppress(OSError),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s,
            ):
                s.sendto(what, name)


# --- What is worth a message ----------------------------------------------------------------------


class Slowdown:
    """Notices tokens/s down by a third for ten minutes, and when that is over.

    The mean of ten minutes counts, not the typical step: a machine that does nothing now and then
    is slow as well.
    """

    WINDOW = 600.0  # seconds of training
    DOWN = 2 / 3  # of the best ten minutes

    def __init__(self):
        self._seconds, self._steps, self._best, self._on = 0.0, 0, 0.0, False

    def step(self, seconds: float) -> str | None:
        """Take a step into account; return a sentence when a slowdown begins or ends."""
        self._seconds += seconds
        self._steps += 1
        if self._seconds < self.WINDOW:
            return None
        rate = self._steps / self._seconds
        self._seconds, self._steps = 0.0, 0
        self._best = max(self._best, rate)
        slow = rate <= self.DOWN * self._best
        if slow == self._on:
            return None
        self._on = slow
        what = "tokens/s are" if slow else "over, tokens/s are"
        return f"{what} {rate / self._best:.0%} of the best so far, over the last ten minutes"


DRAWING = threading.Lock()  # matplotlib is for one thread at a time


def draw_losses(losses: list[tuple[int, float]], path: str) -> None:
    """Write a small PNG of the training loss."""
    from matplotlib.figure import Figure

    with DRAWING:
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*losses, strict=True), lw=0.8)
        values = sorted(loss for _, loss in losses)
        axes.set_ylim(top=values[int(0.98 * (len(values) - 1))] + 0.1)  # without the first fall
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        figure.savefig(path, format="png", dpi=120)


# --- All of it ------------------------------------------------------------------------------------


class Outside:
    """Everything that leaves this machine: messages, heartbeats, the digest now and then. The only
    place that holds addresses in clear.

    Each target has a thread of its own: one that hangs delays no other. At most BURST messages go
    at once and one a minute after that, and none whose event was sent less than AGAIN seconds ago:
    those are counted, and the next message says how many. Only how a run begins and ends, which
    happens once, is always sent.
    """

    BURST, REFILL = 10, 60.0  # messages at once; seconds until one more may go
    AGAIN = 600.0  # seconds between two messages of one kind
    ALWAYS = ("started", "resumed", "finished", "stopped", "gave up", "crashed", "hung")
    FAREWELL = 10.0  # seconds that the end of the program waits for the last message
    POINTS = 400  # of the digest's chart

    def __init__(self, typed: dict, in_file: dict):
        """Check where --notify and --heartbeat go, and leave of them in both {flag: value} what
        anyone may read. ValueError for an address that cannot work."""
        values = in_file | typed
        self.targets = senders(split_targets(values.get("notify") or ""))
        url = values.get("heartbeat")
        self._url = url and checked_url("--heartbeat", url)
        self._every = seconds_of("--notify_every", values.get("notify_every", "24h"))
        for where in (typed, in_file):
            if where.get("notify"):
                where["notify"] = shlex.join(map(redacted, split_targets(where["notify"])))
            if where.get("heartbeat"):
                where["heartbeat"] = redacted(where["heartbeat"])

    def open(self, run: str, announce: Callable[[str], None], clock=time.monotonic) -> None:
        """Start the threads of a run; nothing is sent yet."""
        self.run, self._clock = run, clock
        self._senders = [
            Sender(f"--notify {name}", send, 100, announce) for name, send in self.targets
        ]
        self.heartbeat, self.slowdown = Heartbeat(self._url, announce), Slowdown()
        self._allowed, self._filled = float(self.BURST), clock()
        self._sent: dict[str, float] = {}  # when a kind was last sent
        self._held: Counter = Counter()  # counted since the last message
        self._digest, self._spacing = clock(), 1
        self._losses: list[tuple[int, float]] = []
        self._best: dict[str, str] = {}  # what became best since the last digest

    def tell(self, event: str, text: str, step: int, draw: Draw | None = None) -> bool:
        """Send a message, or count it; return whether it was sent. Never waits, never raises."""
        now = self._clock()
        self._allowed = min(self.BURST, self._allowed + (now - self._filled) / self.REFILL)
        self._filled = now
        lately = now - self._sent.get(event, -math.inf) < self.AGAIN
        if event not in self.ALWAYS and (lately or self._allowed < 1):
            self._held[event] += 1
            return False
        self._allowed -= 1
        self._sent[event] = now
        if self._held:
            counts = ", ".join(f"{count} x {kind}" for kind, count in self._held.items())
            text += f"\n(not sent since the last message: {counts})"
            self._held.clear()
        for sender in self._senders:
            sender.put(Message(self.run, event, text, step, draw))
        return True

    def start(self, event: str, text: str, step: int) -> None:
        """Tell that training begins."""
        self.tell(event, text, step)
        self.heartbeat.start()

    def step(self, step: int, loss: float, seconds: float, numbers: Callable[[], str]) -> None:
        """Take a finished step into account; `numbers()` is the text of a digest."""
        self.heartbeat.step()
        if news := self.slowdown.step(seconds):
            self.tell("over: slow" if news.startswith("over") else "slow", news, step)
        if step % self._spacing == 0 and math.isfinite(loss):
            self._losses.append((step, loss))
        if len(self._losses) > self.POINTS:  # from now on every second, fourth ... loss
            self._losses, self._spacing = self._losses[::2], 2 * self._spacing
        if self._clock() - self._digest >= self._every:
            self._digest, losses = self._clock(), list(self._losses)
            text = "\n".join([numbers(), *self._best.values()])
            if self.tell("digest", text, step, lambda path: draw_losses(losses, path)):
                self._best.clear()

    def best(self, name: str, step: int, value: float) -> None:
        """Keep a new best value for the next digest."""
        self._best[name] = f"new best {name}: {value:.4f} at step {step:,}"

    def end(self, event: str, text: str, step: int, well: bool) -> None:
        """Tell how it ended; wait a few seconds for that, and no longer."""
        self.tell(event, text, step)
        until = time.monotonic() + self.FAREWELL
        self.heartbeat.end(well)
        for sender in self._senders:
            sender.close(max(0.0, until - time.monotonic()))


NOBODY = Outside({}, {})
