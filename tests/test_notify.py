"""Messages and heartbeats: to real servers on this machine, also to ones that hang or refuse."""

import http.server
import json
import shlex
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest

from conftest import ROOT, SMALL, environment, run, start
from monitoring import notify
from monitoring.monitor import Monitor
from runtime.flags import words as words_of
from train_improved import Config

FAULTY = ROOT / "tests" / "faulty.py"


class Server:
    """An HTTP server that keeps what it is sent: a service of ntfy's kind, or of healthchecks.io's.

    behaviour: "takes" everything, "hangs", or answers a number.
    """

    def __init__(self, behaviour="takes"):
        self.requests, outer = [], self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.requests.append((self.path, dict(self.headers), body))
                if behaviour == "hangs":
                    outer.released.wait(60)
                self.send_response(behaviour if isinstance(behaviour, int) else 200)
                self.end_headers()
                self.wfile.write(b"{}")

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *args):
                pass

        self.released = threading.Event()
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server():
    servers = []

    def make(behaviour="takes"):
        servers.append(Server(behaviour))
        return servers[-1]

    yield make
    for one in servers:
        one.close()


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def opened(*targets, clock=time.monotonic, **flags) -> tuple[notify.Outside, list[str]]:
    outside, said = notify.Outside({"notify": shlex.join(targets)} | flags, {}), []
    outside.open("myrun", said.append, clock)
    return outside, said


def test_a_service_of_apprise_gets_the_message(server):
    service = server()
    outside, said = opened(f"ntfy://127.0.0.1:{service.port}/secret-topic")
    outside.tell("warning", "loss flat", 300)
    wait_until(lambda: service.requests)
    body = json.loads(service.requests[0][2])
    assert body["message"] == "loss flat" and body["title"] == "myrun: warning"
    assert body["topic"] == "secret-topic" and said == []


def test_a_picture_goes_where_the_service_takes_one(server):
    service = server()
    outside, said = opened(f"ntfy://127.0.0.1:{service.port}/topic")
    losses = [(i, 5 - i / 100) for i in range(99)]
    outside.tell("digest", "numbers", 99, lambda path: notify.draw_losses(losses, path))
    wait_until(lambda: any(b"\x89PNG" in body for _, _, body in service.requests))
    assert said == []


def test_a_picture_that_cannot_be_drawn_costs_no_message(server):
    """As on a full disk, when the message matters most."""
    service = server()
    outside, said = opened(f"ntfy://127.0.0.1:{service.port}/topic")
    outside.tell("digest", "numbers", 99, lambda path: 1 / 0)
    wait_until(lambda: service.requests)
    assert json.loads(service.requests[0][2])["message"] == "numbers" and said == []


def test_a_command_gets_text_and_facts(tmp_path):
    out = tmp_path / "out"
    facts = "$NOTIFY_EVENT|$NOTIFY_RUN|$NOTIFY_STEP|$NOTIFY_TITLE"
    line = f'cmd: cat > "{out}"; echo "{facts}" >> "{out}"'
    outside, said = opened(line)
    outside.end("finished", "done, validation loss 3.2", 42, well=True)
    assert out.read_text() == "done, validation loss 3.2\nfinished|myrun|42|myrun: finished\n"
    assert said == []


@pytest.mark.parametrize("trouble", ["hangs", 500, "refuses"])
def test_a_service_in_trouble_costs_nothing_and_its_address_is_not_printed(server, trouble):
    if trouble == "refuses":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    else:
        port = server(trouble).port
    outside, said = opened(f"json://user:hunter2@127.0.0.1:{port}/secret")
    start = time.monotonic()
    for _ in range(300):  # more than the queue holds
        outside.tell("resumed", "text", 0)
    assert time.monotonic() - start < 1
    wait_until(lambda: said)
    assert "json://..." in said[0] and "training goes on" in said[0]
    assert "hunter2" not in said[0] and "secret" not in said[0] and str(port) not in said[0]


def test_one_that_hangs_delays_no_other(server, tmp_path):
    out = tmp_path / "out"
    outside, _ = opened("cmd: sleep 20", f'cmd: cat > "{out}"')
    start = time.monotonic()
    outside.tell("started", "hello", 0)
    wait_until(out.exists)
    assert time.monotonic() - start < 10


def test_never_more_than_a_stated_rate_and_repeats_are_counted(tmp_path):
    now, out = [0.0], tmp_path / "out"
    outside, _ = opened(f'cmd: cat >> "{out}"', clock=lambda: now[0])
    for _ in range(50):
        outside.tell("warning", "again", 0)
    for i in range(50):
        outside.tell(f"kind {i}", "another", 0)
    now[0] = outside.AGAIN + 1
    outside.tell("warning", "later", 0)
    outside.end("finished", "the end", 0, well=True)
    said = out.read_text()
    assert said.count("again\n") == 1 and said.count("another\n") == outside.BURST - 1
    assert "another\n(not sent since the last message: 49 x warning)" in said
    assert "later\n(not sent since the last message: 1 x kind 9, 1 x kind 10, " in said
    assert said.endswith("the end\n")


def test_targets_that_cannot_work_are_refused_without_their_secret(monkeypatch):
    for target in ("nosuch://secret@host", "secret-word"):
        with pytest.raises(ValueError, match="--notify") as caught:
            notify.senders([target])
        assert "secret" not in str(caught.value)
    monkeypatch.delenv("NTFY", raising=False)
    with pytest.raises(ValueError, match=r"--notify \$NTFY: the environment has no NTFY"):
        notify.senders(["$NTFY"])
    monkeypatch.setenv("NTFY", "json://localhost")
    assert notify.senders(["$NTFY"])[0][0] == "$NTFY"
    with pytest.raises(ValueError, match="--heartbeat"):
        notify.checked_url("--heartbeat", "ftp://x")


def test_a_command_line_is_redacted():
    words = ["x.py", "--notify", "ntfy://a/b", "--notify=json://c", "--heartbeat", "https://d/e"]
    words += ["--notify", "$NTFY", "--notify", "cmd: curl -H 'token: t' https://f", "--seed", "1"]
    assert notify.redact_words(words) == [
        "x.py", "--notify", "ntfy://...", "--notify=json://...", "--heartbeat", "https://...",
        "--notify", "$NTFY", "--notify", "cmd: curl ...", "--seed", "1",
    ]  # fmt: skip


def test_the_command_that_resumes_names_variables_and_not_what_is_in_them(monkeypatch):
    monkeypatch.setenv("NTFY", "json://hunter2")
    typed = {"notify": "$NTFY ${NTFY}", "seed": 1}
    notify.Outside(typed, {})
    words = ["--seed", "1", "--notify", "$NTFY", "--notify", "${NTFY}"]
    assert words_of(typed, Config) == words


@pytest.mark.parametrize(
    "target",
    [
        "cmd: TOKEN=hunter2 curl x",
        "cmd: echo>/hunter2",
        "cmd: a/hunter2/send",
        "$A/hunter2",
        "hunter2",
    ],
)
def test_no_part_that_may_be_a_secret_is_printed(target):
    assert "hunter2" not in notify.redacted(target)


def test_heartbeats_come_once_a_minute_and_in_each_service_s_words(server):
    service, now = server(), [0.0]
    url = f"http://127.0.0.1:{service.port}/ping/abc"
    beat = notify.Heartbeat(url, print, clock=lambda: now[0])
    beat.start()
    wait_until(lambda: len(service.requests) == 1)
    for second in range(181):
        now[0] = float(second)
        beat.step()
        if second % 60 == 0:
            wait_until(lambda n=second // 60: len(service.requests) == 2 + n)
    beat.end(well=False)
    paths = [path for path, _, _ in service.requests]
    assert paths == ["/ping/abc/start", *["/ping/abc"] * 4, "/ping/abc/fail"]
    kuma = notify.Heartbeat("http://kuma:3001/api/push/KEY?status=up&msg=OK&ping=", print)
    assert "status=up" in kuma.address("step") and "status=down" in kuma.address("fail")
    other = notify.Heartbeat("http://host/any?x=1", print)
    assert [other.address(e) for e in ("start", "step", "fail", "finish")] == [
        None, "http://host/any?x=1", None, "http://host/any?x=1",
    ]  # fmt: skip


def test_a_hanging_heartbeat_gets_no_second_one(server):
    service, now = server("hangs"), [0.0]
    beat = notify.Heartbeat(f"http://127.0.0.1:{service.port}/x", print, clock=lambda: now[0])
    start = time.monotonic()
    for second in range(0, 600, 10):
        now[0] = float(second)
        beat.step()
    assert time.monotonic() - start < 1
    wait_until(lambda: service.requests)
    assert len(service.requests) == 1


def test_systemd_s_watchdog_is_fed(tmp_path, monkeypatch):
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        systemd.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        beat = notify.Heartbeat(None, print)
        beat.start()
        beat.step()
        beat.end(well=True)
        words = [systemd.recv(100) for _ in range(3)]
    assert words == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]


def test_a_slowdown_is_told_when_it_begins_and_when_it_is_over():
    """Also where most steps are as fast as ever and the machine does nothing in between."""
    slow, told = notify.Slowdown(), []
    stalled = [10.0, 10.0, 30.0] * 40
    for seconds in [10.0] * 120 + [13.0] * 120 + stalled + [10.0] * 120:
        told.append(slow.step(seconds))
    said = [text for text in told if text]
    assert len(said) == 2 and "are 60% of the best" in said[0] and said[1].startswith("over")


def test_a_digest_has_numbers_bests_and_a_chart(server):
    service, now = server(), [0.0]
    target = f"ntfy://127.0.0.1:{service.port}/topic"
    outside, _ = opened(target, clock=lambda: now[0], notify_every="24h")
    outside.best("validation loss", 4000, 3.21)
    for step in range(1, 5001):
        now[0] = 86_400 * step / 4900  # due after step 4900, for the first time
        outside.step(step, 5 - step / 2000, 0.1, lambda s=step: f"step {s:,} of 9,000")
    now[0] += 86_400
    outside.step(5001, 2.5, 0.1, lambda: "the next")
    wait_until(lambda: len(service.requests) == 2)
    texts = [parse_qs(urlsplit(path).query)["message"] for path, _, _ in service.requests]
    bests = "new best validation loss: 3.2100 at step 4,000"
    assert texts == [[f"step 4,900 of 9,000\n{bests}"], ["the next"]]
    assert all(body.startswith(b"\x89PNG") for _, _, body in service.requests)


def test_a_digest_that_was_held_back_leaves_the_bests_for_the_next(server):
    service, now = server(), [0.0]
    target = f"json://127.0.0.1:{service.port}/"
    outside, _ = opened(target, clock=lambda: now[0], notify_every="1m")
    for minute in range(1, 13):  # sent after 1 and after 11; what is best at 2 waits for 11
        now[0] = 60.0 * minute
        if minute == 2:
            outside.best("HellaSwag", 7, 0.3)
        outside.step(minute, 3.0, 0.1, lambda: "numbers")
    wait_until(lambda: len(service.requests) == 2)
    first, second = (json.loads(body)["message"] for _, _, body in service.requests)
    assert "HellaSwag" not in first and "new best HellaSwag: 0.3000 at step 7" in second


@pytest.mark.parametrize("text", ["", "24", "0h", "1w", "-1h", "h"])
def test_periods_that_mean_nothing_are_refused(text):
    with pytest.raises(ValueError, match="--notify_every"):
        notify.seconds_of("--notify_every", text)


# --- Whole runs -----------------------------------------------------------------------------------


def topics(service: Server) -> list[str]:
    return [json.loads(body)["title"].split(": ", 1)[1] for _, _, body in service.requests]


def test_a_run_tells_how_it_goes_and_writes_no_secret(tmp_path, data, server):
    """Every file of the run, and all it says, is searched for the address."""
    service, beats, out = server(), server(), tmp_path / "told"
    flags = "--max_steps 4 --eval_freq 2 --sample_freq 0 --use_tensorboard --log_jsonl".split()
    secret = f"ntfy://127.0.0.1:{service.port}/hunter2"
    command = f"cmd: cat >> {out} # hunter2"
    heartbeat = f"http://127.0.0.1:{beats.port}/ping/hunter2"
    said = run(
        *flags, "--run_name", "a", "--notify", secret, "--notify", command,
        "--heartbeat", heartbeat, cwd=tmp_path, data=data,
    )  # fmt: skip
    assert topics(service) == ["started", "finished"]
    assert "finished at step 4 of 4" in out.read_text() and "4 steps of 256" in out.read_text()
    assert [path for path, _, _ in beats.requests] == [
        "/ping/hunter2/start", "/ping/hunter2", "/ping/hunter2",
    ]  # fmt: skip
    files = [p for d in ("runs", "checkpoints") for p in (tmp_path / d).rglob("*") if p.is_file()]
    assert len(files) >= 4
    for path in files:
        assert b"hunter2" not in path.read_bytes(), path
    assert "hunter2" not in "".join(said) and "--notify --heartbeat again" in said[0]
    out.unlink()
    (tmp_path / "my.toml").write_text(f'notify = ["{secret}"]\nnotify_every = "12h"\n')
    resume = ["--resume", "latest", "--run_name", "a", "--max_steps", "6", "--config", "my.toml"]
    said = run(*resume, cwd=tmp_path, small=False)
    assert topics(service)[2:] == ["resumed", "finished"]
    assert "hunter2" not in "".join(said)
    body = json.loads(service.requests[2][2])["message"]
    assert "from step 4 of checkpoints/a/step_00000004.pt, saved" in body


def test_skipped_updates_roll_backs_and_giving_up_are_told(tmp_path, data, server):
    service = server()
    address = f"ntfy://127.0.0.1:{service.port}/topic"
    flags = "--max_steps 20 --eval_freq 0 --sample_freq 0 --checkpoint_freq 5 --max_skips 3"
    flags += f" --max_rollbacks 1 --run_name a --notify {address}"
    argv = [sys.executable, FAULTY, "loss", "8", "99", *SMALL, *flags.split()]
    argv += ["--data_dir", data]
    ended = subprocess.run(
        [str(a) for a in argv], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 1, ended.stderr
    assert topics(service) == ["started", "updates skipped", "rolled back", "gave up"]
    last = json.loads(service.requests[-1][2])["message"]
    assert "3 updates in a row were skipped" in last and "stopped at step" in last


def test_memory_that_runs_out_and_what_the_disk_does_not_take_are_told(tmp_path, data, server):
    """No file may be as large as a checkpoint: the last message says that the work is not saved."""
    service = server()
    flags = "--max_steps 8 --eval_freq 0 --sample_freq 0 --micro_batch_size 8 --run_name a"
    flags += f" --notify ntfy://127.0.0.1:{service.port}/topic"
    argv = [sys.executable, FAULTY, "memory", "3", "4", *SMALL, *flags.split(), "--data_dir", data]
    argv = ["prlimit", "--fsize=9000000", *argv]
    ended = subprocess.run(
        [str(a) for a in argv], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 1, ended.stderr
    assert topics(service) == ["started", "out of memory", "not saved", "finished"]
    assert "is NOT SAVED (File too large)" in json.loads(service.requests[-1][2])["message"]
    told = []
    of_log = Monitor.of_log.__get__(SimpleNamespace(tell=lambda *a: told.append(a), say=print))
    of_log("logging to x stopped (No space left on device); training goes on")
    of_log("logging to x is back at step 261; 3162 values of steps 19 to 260 are missing")
    of_log("x held 2 event files of an earlier attempt")
    assert [event for event, _ in told] == ["logging paused", "over: logging paused"]


def test_kill_9_is_noticed_by_silence(tmp_path, data, server):
    """What was pinged stops; nothing says that all is well."""
    beats = server()
    flags = "--max_steps 100000 --eval_freq 0 --sample_freq 0 --run_name a"
    heartbeat = f"http://127.0.0.1:{beats.port}/ping/x"
    process = start(*flags.split(), "--heartbeat", heartbeat, cwd=tmp_path, data=data)
    wait_until(lambda: len(beats.requests) >= 2, seconds=120)
    process.kill()
    process.wait()
    count = len(beats.requests)
    time.sleep(1)
    assert [path for path, _, _ in beats.requests] == ["/ping/x/start", "/ping/x"]
    assert len(beats.requests) == count


def test_a_wrong_target_is_refused_before_anything_is_made(tmp_path, data):
    for flags, words in (
        (["--notify", "nosuch://hunter2"], "--notify nosuch://...: Apprise knows no service"),
        (["--notify", "$NOT_SET_HERE"], "--notify $NOT_SET_HERE: the environment has no"),
        (["--heartbeat", "hunter2"], "--heartbeat ...: give a URL"),
        (["--notify_every", "soon"], "--notify_every soon: give minutes"),
    ):
        process = start("--max_steps", "2", *flags, cwd=tmp_path, data=data)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and words in err and "hunter2" not in err, err
        assert not (tmp_path / "runs").exists()
