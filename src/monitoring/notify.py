"""Tell someone who is not looking: messages to a phone, mail or chat, and heartbeats.

    python src/train_improved.py --notify '$NTFY' --heartbeat '$HEALTHCHECK'
    python src/train_improved.py --notify 'cmd: mail -s training me@example.org'

A target is an address of Apprise (https://github.com/caronc/apprise: ntfy, Slack, Telegram, e-mail,
webhooks and a hundred more) or `cmd: ...`, a shell command that gets the text on standard input and
facts in its environment: NOTIFY_EVENT, NOTIFY_TITLE, NOTIFY_RUN, NOTIFY_STEP. `$NAME` is read from
the environment. An address often is a password, so nothing but its beginning is ever printed or
written anywhere.

Training never waits: a thread takes messages from a short queue. A service that hangs, refuses or
answers with an error costs a line in the log now and then.
"""

import contextlib
import io
import math
import os
import queue
import re
import shlex
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

# --- Targets and their secrets --------------------------------------------------------------------

COMMAND = re.compile(r"cmd:\s+(.+)", re.S)

UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}


def revealed(flag: str, target: str) -> str:
    """Return the target, or the value of the variable if it is `$NAME`; ValueError if unset."""
    name = re.fullmatch(r"\$\{?(\w+)\}?", target)
    if not name:
        return target
    if not os.environ.get(name[1]):
        raise ValueError(f"{flag} {target}: the environment has no {name[1]}; export it first")
    return os.environ[name[1]]


def redacted(target: str) -> str:
    """Return as much of a target as anyone may read: `$NAME`, or how it begins."""
    if target.startswith("$"):
        return target
    if command := COMMAND.fullmatch(target):
        return f"cmd: {os.path.basename(command[1].split()[0])} ..."
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
    return float(match[1]) * UNITS[match[2]]


# --- Messages -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    event: str  # started, resumed, finished, stopped, warning, over, memory, digest, test ...
    title: str
    text: str
    step: int = 0
    picture: bytes | None = None  # PNG
    repeats: int = 0  # messages of this kind that were counted instead of sent


def command_sender(target: str, run_name: str) -> Callable[[Message], None]:
    """Return a function that gives a message to a shell command; it raises if the command fails."""
    line = COMMAND.fullmatch(target)[1]

    def send(message: Message) -> None:
        facts = {"EVENT": message.event, "TITLE": message.title, "RUN": run_name}
        facts |= {"STEP": str(message.step)}
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            input=message.text,
            text=True,
            env=os.environ | {f"NOTIFY_{name}": value for name, value in facts.items()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=Notifier.TIMEOUT,
            start_new_session=True,  # Ctrl-C on the terminal is not meant for it
        )
        if done.returncode:
            raise OSError(f"exit code {done.returncode}")

    return send


def apprise_sender(flag: str, target: str, address: str) -> Callable[[Message], None]:
    """Return a function that sends through Apprise and raises if the service does not take it."""
    try:
        import apprise
    except ImportError:
        raise ValueError(
            f"{flag} {redacted(target)}: needs Apprise: pip install apprise (or give a command, "
            "'cmd: ...')"
        ) from None
    service = apprise.Apprise.instantiate(address, suppress_exceptions=True)
    if service is None:
        raise ValueError(
            f"{flag} {redacted(target)}: Apprise knows no service of this address; see "
            "https://github.com/caronc/apprise/wiki"
        )

    service.request_rate_per_sec = 0  # the Notifier's own rate is lower

    def send(message: Message) -> None:
        kind = KINDS.get(message.event.split(":")[0], "info")
        with tempfile.TemporaryDirectory() as folder:
            picture = None
            if message.picture and service.attachment_support:
                picture = os.path.join(folder, "loss.png")
                with open(picture, "wb") as file:
                    file.write(message.picture)
            if not service.notify(
                title=message.title, body=message.text, notify_type=kind, attach=picture
            ):
                raise OSError("the service did not take it")

    return send


def senders(targets: list[str], run_name: str) -> list[tuple[str, Callable[[Message], None]]]:
    """Return [(what may be printed of it, function that sends)] of --notify. ValueError for one
    that cannot work."""
    found = []
    for target in targets:
        address = revealed("--notify", target)
        if COMMAND.fullmatch(address):
            found.append((redacted(target), command_sender(address, run_name)))
        else:
            found.append((redacted(target), apprise_sender("--notify", target, address)))
    return found


# What services show in another colour.
KINDS = {"warning": "warning", "finished": "success", "over": "success"}
KINDS |= dict.fromkeys(("gave up", "crashed", "not saved"), "failure")


class Notifier:
    """Sends messages in a thread of its own, at most BURST at once and one a minute after that.

    A message whose event was sent less than AGAIN seconds ago is counted, not sent; the next of its
    kind says how many there were. `announce` is called with a sentence if a service fails.
    """

    BURST, REFILL = 10, 60.0  # messages at once; seconds until one more may go
    AGAIN = 600.0  # seconds between two messages of one kind, but for those in ALWAYS
    ALWAYS = ("started", "resumed", "finished", "stopped", "gave up", "crashed", "test")
    TIMEOUT = 30.0  # seconds for a service
    FAREWELL = 10.0  # seconds that the end of the program waits for the last message

    def __init__(
        self,
        targets: list[tuple[str, Callable[[Message], None]]],
        run_name: str,
        announce: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.targets, self.run_name, self.announce, self._clock = (
            targets, run_name, announce, clock,
        )  # fmt: skip
        self.failures: Counter = Counter()  # by target
        self._queue: queue.Queue[Message | None] = queue.Queue(maxsize=100)
        self._tokens, self._filled = float(self.BURST), clock()
        self._sent: dict[str, float] = {}  # when a kind was last sent
        self._held: Counter = Counter()  # counted since
        self._thread = threading.Thread(target=self._work, name="notifier", daemon=True)
        if targets:
            self._thread.start()

    def tell(
        self, event: str, text: str, step: int = 0, picture: Callable[[], bytes] | None = None
    ) -> bool:
        """Queue a message; return whether it will be sent. Never waits, never raises."""
        if not self.targets:
            return False
        now = self._clock()
        self._tokens = min(self.BURST, self._tokens + (now - self._filled) / self.REFILL)
        self._filled = now
        lately = now - self._sent.get(event, -self.AGAIN) < self.AGAIN and event not in self.ALWAYS
        if lately or self._tokens < 1:
            self._held[event] += 1
            return False
        self._tokens -= 1
        self._sent[event] = now
        repeats = self._held.pop(event, 0)
        if repeats:
            text += f"\n(and {repeats} more like this since the last message)"
        message = Message(event, f"{self.run_name}: {event}", text, step, picture, repeats)
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(message)
            return True
        return False

    def close(self) -> None:
        """Give the last messages a few seconds to leave."""
        if self.targets:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
            self._thread.join(self.FAREWELL)

    def _work(self) -> None:
        while (message := self._queue.get()) is not None:
            if callable(message.picture):
                drawn = None
                with contextlib.suppress(Exception):  # a message without a picture is one, too
                    drawn = message.picture()
                message = Message(message.event, message.title, message.text, message.step, drawn)
            for name, send in self.targets:
                try:
                    send(message)
                except Exception as error:  # whatever a service, or its library, can think of
                    self.failures[name] += 1
                    if self.failures[name] in (1, 10, 100):
                        # Not the error's text: it may have the address in it.
                        self.announce(
                            f"--notify {name}: {self.failures[name]} message(s) not sent, the last "
                            f"was '{message.event}' ({type(error).__name__}); training goes on"
                        )


# --- Heartbeats -----------------------------------------------------------------------------------


class Heartbeat:
    """Pings a URL after steps, at most once a minute, so that silence is noticed.

    healthchecks.io and what speaks its way (`/ping/` in the path, hc-ping.com): URL/start when
    training begins, URL after steps, URL/fail when it ends badly. Uptime Kuma (`/api/push/`): its
    status up and down. Any other URL is fetched after steps and at a good end, and not at a bad
    one. Under systemd (NOTIFY_SOCKET) its watchdog is fed, too. One ping at a time: while a server
    hangs, none is added.
    """

    EVERY = 60.0  # seconds
    WATCHDOG = 5.0  # seconds between two words to systemd
    TIMEOUT = 10.0

    def __init__(self, url: str | None, announce=print, clock=time.monotonic):
        self.url, self.announce, self._clock = url, announce, clock
        self.failures = 0
        self._last = self._fed = -self.EVERY
        self._watchdog = os.environ.get("NOTIFY_SOCKET")
        self._busy: threading.Thread | None = None

    def start(self) -> None:
        self._tell_systemd(b"READY=1")
        self._ping("start")

    def step(self) -> None:
        """To be called after every step."""
        now = self._clock()
        if now - self._fed >= self.WATCHDOG:
            self._fed = now
            self._tell_systemd(b"WATCHDOG=1")
        if now - self._last >= self.EVERY:
            self._last = now
            self._ping("step")

    def end(self, well: bool) -> None:
        """The run finished or was stopped on purpose (well), or it failed."""
        self._tell_systemd(b"STOPPING=1")
        if self._busy is not None:
            self._busy.join(self.TIMEOUT)
        self._ping("finish" if well else "fail")
        if self._busy is not None:
            self._busy.join(self.TIMEOUT)

    def address(self, event: str) -> str | None:
        """Return the URL that says start, step, finish or fail to this kind of service."""
        parts = urllib.parse.urlsplit(self.url)
        if "/api/push/" in parts.path:
            query = dict(urllib.parse.parse_qsl(parts.query)) | {"msg": event}
            query["status"] = "down" if event == "fail" else "up"
            return urllib.parse.urlunsplit(parts._replace(query=urllib.parse.urlencode(query)))
        if parts.hostname == "hc-ping.com" or "/ping/" in parts.path:
            ending = {"start": "/start", "fail": "/fail"}.get(event, "")
            return urllib.parse.urlunsplit(parts._replace(path=parts.path.rstrip("/") + ending))
        return None if event in ("start", "fail") else self.url

    def _ping(self, event: str) -> None:
        if self.url is None or (self._busy is not None and self._busy.is_alive()):
            return
        address = self.address(event)
        if address is not None:
            self._busy = threading.Thread(
                target=self._fetch, args=(address,), name="heartbeat", daemon=True
            )
            self._busy.start()

    def _fetch(self, address: str) -> None:
        try:
            with urllib.request.urlopen(address, timeout=self.TIMEOUT) as answer:
                answer.read(1000)
        except Exception as error:  # no network for an hour is no reason to stop
            self.failures += 1
            if self.failures in (1, 10, 100, 1000):
                self.announce(
                    f"--heartbeat: {self.failures} ping(s) failed ({type(error).__name__}); "
                    "training goes on"
                )

    def _tell_systemd(self, what: bytes) -> None:
        if self._watchdog:
            name = self._watchdog.replace("@", "\0", 1)  # an abstract socket
            with (
                contextlib.suppress(OSError),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s,
            ):
                s.sendto(what, name)


def check_url(flag: str, url: str) -> str:
    """Return the URL that a flag means. ValueError unless it is one of http or https."""
    address = revealed(flag, url)
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{flag} {redacted(url)}: give a URL that begins with http:// or https://")
    return address


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


@dataclass
class Digest:
    """A message now and then with the numbers, and what became best since the last."""

    every: float  # seconds
    clock: Callable[[], float] = time.monotonic
    losses: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, tuple[int, float]] = field(default_factory=dict)
    POINTS = 400  # of the chart

    def __post_init__(self):
        self._last, self._spacing, self._seen = self.clock(), 1, 0

    def step(self, step: int, loss: float) -> None:
        """Remember a loss for the chart: every one at first, later every second, fourth ..."""
        self._seen += 1
        if self._seen % self._spacing == 0:
            self.losses.append((step, loss))
        if len(self.losses) > self.POINTS:
            self.losses, self._spacing = self.losses[::2], 2 * self._spacing

    def is_due(self) -> bool:
        return self.clock() - self._last >= self.every

    def take(self, numbers: str) -> tuple[str, Callable[[], bytes]]:
        """Return the text, and a function that draws the chart; begin the next period."""
        self._last = self.clock()
        lines = [numbers]
        for name, (step, value) in self.best.items():
            lines.append(f"new best {name}: {value:.4f} at step {step:,}")
        self.best = {}
        losses = list(self.losses)
        return "\n".join(lines), lambda: chart(losses)


def chart(losses: list[tuple[int, float]]) -> bytes:
    """Return a small PNG of the training loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*losses, strict=True), lw=0.8)
    values = sorted(loss for _, loss in losses)
    axes.set_ylim(top=values[int(0.98 * (len(values) - 1))] + 0.1)  # without the first fall
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


# --- For the monitor ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Addresses:
    """Where messages and heartbeats go, checked. The only place that holds them in clear."""

    targets: list[tuple[str, Callable[[Message], None]]]
    heartbeat: str | None
    every: float  # seconds between digests


NOBODY = Addresses([], None, math.inf)


def take_addresses(typed: dict, in_file: dict) -> Addresses:
    """Return where --notify and --heartbeat go, and leave of them in both {flag: value} what anyone
    may read. ValueError for an address that cannot work."""
    values = in_file | typed
    targets = split_targets(values.get("notify") or "")
    heartbeat = values.get("heartbeat")
    found = Addresses(
        senders(targets, values.get("run_name") or "training"),
        heartbeat and check_url("--heartbeat", heartbeat),
        seconds_of("--notify_every", values.get("notify_every", "24h")),
    )
    for where in (typed, in_file):
        if where.get("notify"):
            where["notify"] = shlex.join(map(redacted, split_targets(where["notify"])))
        if where.get("heartbeat"):
            where["heartbeat"] = redacted(where["heartbeat"])
    return found


def split_targets(text: str) -> list[str]:
    """Return the targets of --notify, which are words of a shell, or one command as it is."""
    return [text] if COMMAND.fullmatch(text) else shlex.split(text)


def try_out(addresses: Addresses) -> list[tuple[str, str | None]]:
    """Send a test message to every target -> [(what may be printed of it, what went wrong)]."""
    found, text = [], "A test: this is how the run will speak to you."
    for name, send in addresses.targets:
        try:
            send(Message("test", "training: test", text))
            found.append((name, None))
        except Exception as error:  # whatever a service, or its library, can think of
            found.append((name, type(error).__name__))
    return found


class Outside:
    """Everything that leaves this machine: messages, heartbeats, the digest now and then."""

    def __init__(self, addresses: Addresses, run_name: str, announce: Callable[[str], None]):
        self.notifier = Notifier(addresses.targets, run_name, announce)
        self.heartbeat = Heartbeat(addresses.heartbeat, announce)
        self.digest, self.slowdown = Digest(addresses.every), Slowdown()

    def tell(self, event: str, text: str, step: int = 0) -> None:
        self.notifier.tell(event, text, step)

    def start(self, event: str, text: str, step: int) -> None:
        """Tell that training begins."""
        self.tell(event, text, step)
        self.heartbeat.start()

    def step(self, step: int, loss: float, seconds: float, numbers: Callable[[], str]) -> None:
        """Take a finished step into account; `numbers()` is the text of a digest."""
        self.heartbeat.step()
        if not self.notifier.targets:
            return
        self.digest.step(step, loss)
        if news := self.slowdown.step(seconds):
            self.tell("slow", news, step)
        if self.digest.is_due():
            text, draw = self.digest.take(numbers())
            self.notifier.tell("digest", text, step, draw)

    def best(self, name: str, step: int, value: float) -> None:
        """Keep a new best value for the next digest."""
        self.digest.best[name] = (step, value)

    def end(self, event: str, text: str, step: int, well: bool) -> None:
        """Tell how it ended; wait a few seconds for that, and no longer."""
        self.tell(event, text, step)
        self.heartbeat.end(well)
        self.notifier.close()
