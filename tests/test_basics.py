"""basics: words that never raise, files that are whole, streams that end nothing."""

import errno
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from basics import durable, terminal, words

SRC = Path(words.__file__).parents[1]

# --- Words ----------------------------------------------------------------------------------------

NUMBERS = [0, 1, -5, 0.004, 999.4, 59.97, 3599, 86399, 10**15, 10**400, -(10**400), 2**63 - 1]
NUMBERS += [1e15, 1e300, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("say", [words.duration, words.size, words.count])
def test_no_number_is_too_much_to_be_said(say, number):
    assert 0 < len(say(number)) < 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (words.duration(0), "0 s"),
        (words.duration(-3), "0 s"),
        (words.duration(0.42), "0.4 s"),
        (words.duration(9.96), "10 s"),
        (words.duration(59.6), "1.0 min"),
        (words.duration(5025), "1.4 h"),
        (words.duration(34 * 86400), "34.0 d"),
        (words.duration(1e15 * 0.03), "950,643 years"),
        (words.duration(1e300), "for ever"),
        (words.duration(10**400), "for ever"),
        (words.duration(math.nan), "unknown"),
        (words.size(0), "0 bytes"),
        (words.size(999), "999 bytes"),
        (words.size(999.7), "1 kB"),
        (words.size(1_490_000_000), "1.49 GB"),
        (words.size(2e18), "2e+03 PB"),
        (words.count(50_257), "50.3k"),
        (words.count(9_953_989_344), "9.95B"),
    ],
)
def test_numbers_as_people_say_them(text, expected):
    assert text == expected


# --- Durable files --------------------------------------------------------------------------------


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.umask(umask := os.umask(0))
    with durable.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert Path(file.name).read_bytes() == b"new"
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with durable.replacing(path, "w") as file:
        file.write("ü\n")
    assert path.read_bytes() == "ü\n".encode()
    durable.write(path, b"head", memoryview(b"body"))
    assert path.read_bytes() == b"headbody"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(errno.EIO, "?")])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as raised, durable.replacing(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    if isinstance(error, OSError):
        assert raised.value.filename == str(path)


def test_a_temporary_is_never_written_through_a_link(tmp_path):
    (tmp_path / f".tmp-file-{os.getpid()}").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"):
        durable.write(tmp_path / "file", b"x")
    assert not (tmp_path / "victim").exists()


# --- The terminal ---------------------------------------------------------------------------------


def start(body: str, *more: str, **how) -> subprocess.Popen:
    """A command whose main has this body, as a process."""
    lines = "\n    ".join(body.strip().splitlines())
    code = (
        "import os, sys, time\nfrom basics import terminal\n"
        f"@terminal.command\ndef main():\n    {lines}\nsys.exit(main())"
    )
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | how
    return subprocess.Popen([sys.executable, "-c", code, *more], cwd=SRC, **how)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("ValueError('--flag 3: too much')", 2, "error: --flag 3: too much\n"),
        ("OSError(28, 'No space left', 'x.bin')", 2, "error: x.bin: No space left\n"),
        ("OSError('told so')", 2, "error: told so\n"),
        ("KeyboardInterrupt", 130, ""),
        ("SystemExit(7)", 7, ""),
    ],
)  # fmt: skip
def test_what_an_exception_becomes(raised, code, said, capsys):
    @terminal.command
    def main():
        raise eval(raised)

    if "SystemExit" in raised:
        with pytest.raises(SystemExit, match="7"):
            main()
    else:
        assert main() == code
    assert capsys.readouterr().err == said


WORK = """
for i in range(20000):
    print("something that is only said", i)
print("also here", file=sys.stderr)
open(sys.argv[1], "w").write("done")
return 3
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_who_leaves_ends_nothing(tmp_path, stream):
    process = start(WORK, str(tmp_path / "work"))
    getattr(process, stream).close()
    other = process.stderr if stream == "stdout" else process.stdout
    said = other.read()
    assert process.wait() == 3
    assert (tmp_path / "work").read_text() == "done"
    assert "Traceback" not in said and "Exception ignored" not in said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_behind_the_output_ends_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        process = start(WORK, str(tmp_path / "work"), stdout=full)
        said = process.communicate()[1]
    assert (process.returncode, said) == (3, "also here\n")
    assert (tmp_path / "work").read_text() == "done"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("command", ["train_improved.py --print_config", "checkpoint_files.py"])
def test_what_is_there_to_be_printed_is_not_lost_in_silence(tmp_path, command):
    (tmp_path / "checkpoints").mkdir()
    script, *words = command.split()
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, SRC / script, *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: standard output: No space left on device"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_not_mistaken_for_files(tmp_path, closed):
    code = (
        "import sys\nfrom basics import terminal\n"
        "with open(sys.argv[1], 'w') as file:\n"
        "    assert file.fileno() > 2\n"
        "    print('said'); print('said', file=sys.stderr); assert sys.stdin.read() == ''\n"
        "    import subprocess; subprocess.run(['sh', '-c', 'echo a; echo b >&2'], check=True)\n"
        "    file.write('whole')\n"
    )
    command = ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-c", code, tmp_path / "file"]
    done = subprocess.run(command, cwd=SRC, capture_output=True, input=b"")
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "whole"


def test_ctrl_c_is_130_without_a_traceback():
    process = start("print('here', flush=True)\ntime.sleep(60)")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 130


def test_an_output_that_knows_only_ascii():
    process = start("print('ü')\nreturn 0", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert process.communicate()[0] == "\\xfc\n"
    assert process.returncode == 0


COMMANDS = sorted(path.stem for path in SRC.glob("*.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_same_manners(command, tmp_path):
    """A reader who has left, no output at all, and a wrong flag."""
    program = [sys.executable, SRC / f"{command}.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    process = subprocess.Popen([*program, "--help"], **pipes)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    closed = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *program, "--help"]
    assert subprocess.run(closed, **pipes).returncode == 0
    wrong = subprocess.run([*program, "--no_such_flag"], **pipes)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: "), wrong.stderr
    assert "Traceback" not in wrong.stderr and wrong.stdout == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_find_their_modules_and_miss_their_folder(command, tmp_path):
    """With PYTHONSAFEPATH the script's own folder is not on the path; a working folder can go."""
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    env.pop("PYTHONPATH", None)
    program = [sys.executable, SRC / f"{command}.py", "--help"]
    assert subprocess.run(program, env=env, capture_output=True).returncode == 0
    gone = ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", *program]
    done = subprocess.run(gone, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the working folder is not there any more: cd to another one\n"


def test_a_package_that_is_not_installed_is_a_sentence():
    """As after a git clone, or with another Python than the one of the environment."""
    for command in set(COMMANDS) - {"checkpoint_files", "hellaswag"}:  # whose --help needs none
        flag = "--dry_run" if command == "train_improved" else "--help"
        program = [sys.executable, "-S", SRC / f"{command}.py", flag]  # without site-packages
        done = subprocess.run(program, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: No module named"), command
        assert "pip install -r requirements.txt" in done.stderr and "Traceback" not in done.stderr
