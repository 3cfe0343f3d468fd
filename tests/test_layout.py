"""The layout of src/ is the architecture: imports only point down, and nothing goes in a circle.

Commands (files directly in src/) may import the script and every room; the script every room; a
room those below it. Rooms on one line do not know each other.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, environment

SRC = ROOT / "src"
SCRIPT = "train_improved"
LEVELS = [["basics"], ["tokens"], ["checkpointing", "training"], ["monitoring"], ["runtime"]]
HEIGHT = {room: height for height, rooms in enumerate(LEVELS) for room in rooms}
HEIGHT[SCRIPT] = len(LEVELS)
COMMANDS = sorted({path.stem for path in SRC.glob("*.py")} - {SCRIPT})
HEIGHT |= dict.fromkeys(COMMANDS, len(LEVELS) + 1)


def modules() -> dict[str, Path]:
    """{dotted name: file} of everything in src/."""
    return {
        ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SRC.rglob("*.py")
    }


def imports(path: Path, known) -> set[str]:
    """The modules of src/ that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & known) or {node.module}
    return found & known


GRAPH = {name: imports(path, set(modules())) for name, path in modules().items()}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_folder_is_a_room_with_a_docstring():
    folders = {path.name for path in SRC.iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert folders == {room for rooms in LEVELS for room in rooms}
    for name in folders:
        assert ast.get_docstring(ast.parse((SRC / name / "__init__.py").read_text()))


def test_imports_only_point_down():
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if room(name) != room(other)
        and HEIGHT[room(other)] >= HEIGHT[room(name)]
        # a command may use another command, nothing else may
        and not (room(name) in COMMANDS and room(other) in COMMANDS)
    ]
    assert upward == []


def test_no_circles():
    done: set[str] = set()

    def visit(name: str, way: list[str]):
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in GRAPH[name]:
                visit(other, [*way, name])
            done.add(name)

    for name in GRAPH:
        visit(name, [])


@pytest.mark.parametrize("command", [SCRIPT, *COMMANDS])
def test_every_command_says_help_from_any_folder(tmp_path, command):
    for optimized in ("-O", "-OO"):  # no docstrings, as PYTHONOPTIMIZE=2 in an image
        argv = [sys.executable, optimized, str(SRC / f"{command}.py"), "--help"]
        said = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert said.returncode == 0 and "usage:" in said.stdout, said.stderr


def test_the_script_runs_once_in_a_process(tmp_path, data):
    """Nothing imports the file that is running as __main__: it would be there twice."""
    spy = "import sys, runpy; sys.argv = ['train_improved.py', '--device', 'cpu', *sys.argv[1:]]"
    spy += f"; sys.path.insert(0, {str(SRC)!r}); import runtime.supervisor as s"
    spy += "; s.end = lambda code: print('twice' if 'train_improved' in sys.modules else 'once')"
    spy += f"; runpy.run_path({str(SRC / 'train_improved.py')!r}, run_name='__main__')"
    argv = [sys.executable, "-c", spy, "--model", "tiny", "--max_steps", "2", "--dry_run"]
    argv += ["--data_dir", str(data)]
    said = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert said.stdout.endswith("once\n"), said.stderr
