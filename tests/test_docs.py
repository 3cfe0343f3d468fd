"""The documents say what the code does: flags, tags, paths, defaults, messages and commands."""

import ast
import configparser
import contextlib
import functools
import inspect
import io
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_improved as ti
from monitoring import summary
from runtime import flags

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "QUICK_START.md", "TENSORBOARD_GUIDE.md", "LAB_NOTES.md")
NAMES += tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
DOCS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
COMMANDS = ("src/train_improved", "src/prepare_data", "src/hellaswag", "src/data_shards")
COMMANDS += ("src/checkpoint_files", "src/report", "src/sample", "src/export")

# Flags of other programs that the documents use: a new one is looked up first, then added here.
FOREIGN = {
    "tensorboard": {"--logdir", "--port", "--bind_all", "--samples_per_plugin", "--load_fast"},
    "torchrun": {"--standalone", "--nproc_per_node", "--max-restarts", "--nnodes", "--local_addr"}
    | {"--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--rdzv_conf"},
    "python": {"-m", "-c"},
    "python3": {"-m"},
    "pip": {"-r"},
    "ruff": {"--check"},
    "ssh": {"-L"},
    "kill": {"-USR1"},
    "curl": {"-d"},
    "export": set(),
    "hostname": {"-I"},
    "systemctl": {"--now"},
    "journalctl": {"-u", "-f"},
    "sbatch": set(),
    "zcat": set(),
    "lm_eval": {"--model", "--model_args", "--tasks"},
    "nvidia-smi": set(),
    "srun": {"--kill-on-bad-exit", "--cpus-per-task"},
    "activate-global-python-argcomplete": set(),
    "wandb": set(),
    "top": set(),
    "pgrep": {"-af"},
    ".": set(),
    "echo": set(),
    "for": set(),
}
SBATCH = {
    "--mail-type",
    "--mail-user",
    "--job-name",
    "--gres",
    "--cpus-per-task",
    "--time",
    "--dependency",
    "--signal",
    "--requeue",
}
SBATCH |= {"--open-mode", "--output", "--nodes", "--ntasks-per-node", "--gpus-per-node"}


# --- What the documents contain -------------------------------------------------------------------


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_blocks(text))


def command_lines() -> list[tuple[str, str]]:
    """(document, line) of every command: bash blocks, a unit's ExecStart, code within sentences."""
    lines = []
    for name, text in DOCS.items():
        for language, content in blocks(text):
            if language == "bash":
                lines += [(name, line) for line in content.splitlines()]
            elif language == "ini":
                lines += [(name, line) for line in re.findall(r"^ExecStart=(.*)$", content, re.M)]
        for code in inline_code(text):
            if code.split()[0] in FOREIGN and " " in code:
                lines.append((name, code))
    return [(name, line) for name, line in lines if line.strip() and not line.startswith("#")]


def calls(line: str) -> list[tuple[str, list[str]]]:
    """[(program, its arguments)] of a command line; `python src/x.py` is program "src/x"."""
    words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
    found, first = [], True
    for word in words:
        script = re.fullmatch(r"((?:src|benchmarks|tests)/\w+)\.py", word)
        if script:
            found.append((script[1], []))
        elif word in ("sudo", "exec", "nohup", "do", "done", "|", "&"):
            first = True
            continue
        elif first:
            found.append((word.rsplit("/", 1)[-1], []))
        else:
            found[-1][1].append(word)
        first = word.endswith(";")
    return found


@functools.cache
def our_flags() -> dict[str, set[str]]:
    """Program -> its flags, as its --help says (each run as the command it is, in this process)."""
    found = {}
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    for name in COMMANDS:
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO()))
            patch.setattr(sys, "argv", [f"{name}.py", "--help"])
            patch.setenv("COLUMNS", "200")
            with pytest.raises(SystemExit) as stop:
                runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        for number, handler in handlers.items():
            signal.signal(number, handler)
        out.seek(0)
        text = out.read()
        assert stop.value.code in (0, None), name
        found[name] = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.M))
        found[name] |= set(re.findall(r", (--no-[\w-]+)", text))
    return found


# --- Commands, flags, paths -----------------------------------------------------------------------


def test_every_flag_of_every_command_exists():
    known, checked = FOREIGN | our_flags(), 0
    for name in [*(ROOT / "benchmarks").glob("*.py"), ROOT / "tests" / "random_kills.py"]:
        known[f"{name.parent.name}/{name.stem}"] = set(
            re.findall(r'"(--[\w-]+)"', name.read_text(encoding="utf-8"))
        )
    for document, line in command_lines():
        for program, arguments in calls(line):
            assert program in known, f"{document}: {program} in {line}"
            given = {a.split("=")[0] for a in arguments if re.match(r"--?[A-Za-z]", a)}
            assert given <= known[program], f"{document}: {given - known[program]} in {line}"
            checked += program in COMMANDS
    assert checked > 40


def test_every_flag_in_a_sentence_exists():
    known = SBATCH.union(*FOREIGN.values(), *our_flags().values(), {"--print", "--help"})
    script = (ROOT / "tests" / "random_kills.py").read_text(encoding="utf-8")
    known |= set(re.findall(r'"(--[\w-]+)"', script))
    for document, text in DOCS.items():
        for code in inline_code(text):
            for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", code):
                assert flag in known, f"{document}: {flag}"


def test_training_commands_are_accepted():
    """Values too: each is parsed, filled in and validated, as for a run on a GPU."""
    count = 0
    for document, line in command_lines():
        for program, arguments in calls(line):
            if program != "src/train_improved":
                continue
            # A file that the reader makes: any recipe stands for it.
            arguments = [a.replace("my.toml", "configs/laptop-tiny.toml") for a in arguments]
            if ">" in arguments:
                arguments = arguments[: arguments.index(">")]
            with contextlib.chdir(ROOT):
                cfg = ti.Config(**flags.parse_flags(ti.Config, "", arguments))
            ti.resolve_model(cfg, "cuda")
            ti.validate(cfg, 1)
            stops = cfg.dry_run or cfg.doctor or cfg.print_config
            assert cfg.use_tensorboard or stops, f"{document}: nothing to watch in {line}"
            count += 1
    assert count > 20


def test_scripts_in_the_documents_are_well_formed():
    for document, text in DOCS.items():
        for language, content in blocks(text):
            assert language in ("bash", "ini", "python", "text"), f"{document}: {content}"
            if language == "bash":
                check = subprocess.run(
                    ["bash", "-n"], input=content, capture_output=True, text=True
                )
                assert check.returncode == 0 and check.stderr == "", f"{document}: {check.stderr}"
                for flag in re.findall(r"^#SBATCH (--[\w-]+)", content, re.M):
                    assert flag in SBATCH, flag
            elif language == "python":
                compile(content, document, "exec")
            elif language == "ini":
                unit = configparser.ConfigParser(interpolation=None)
                unit.optionxform = str
                unit.read_string(content)
                service = unit["Service"]
                assert (
                    service.get("Type") == "oneshot" or service["RestartPreventExitStatus"] == "2"
                )


def test_every_path_exists():
    count = 0
    for document, text in DOCS.items():
        paths = re.findall(r"(?<![\w/.-])(?:src|tests|benchmarks|docs|configs|\.ci)/[\w./-]*", text)
        paths += re.findall(r"(?<![\w/.-])(?:[A-Z_]{4,}\.md|LICENSE|requirements\.txt)", text)
        for path in paths:
            places = (ROOT, (ROOT / document).parent)
            assert any((p / path.rstrip(".")).exists() for p in places), f"{document}: {path}"
            count += 1
    assert count > 60


def test_every_link_leads_somewhere():
    def anchors(text: str) -> set[str]:  # as GitHub makes them
        heads = re.findall(r"^#+ (.*)$", without_blocks(text), re.M)
        return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}

    count = 0
    for document, text in DOCS.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / document).parent / path if path else ROOT / document
            assert file.exists(), f"{document}: {target}"
            if anchor:
                assert anchor in anchors(file.read_text(encoding="utf-8")), f"{document}: {target}"
            count += 1
    assert count > 25


# --- TensorBoard ----------------------------------------------------------------------------------


def test_guide_and_code_have_the_same_tags():
    in_code = set(re.findall(r'"([A-Z]\w*/[a-z]\w*)"', inspect.getsource(ti.Monitor)))
    contract = {"Loss/train", "Performance/mfu", "Generated_Samples/text", "Training/rollbacks"}
    assert contract <= in_code  # the pattern finds them
    in_guide = set()
    for code in inline_code(DOCS["TENSORBOARD_GUIDE.md"]):
        in_guide |= set(re.findall(r"^[A-Z]\w*/[a-z]\w*$", code))
    assert in_guide == in_code


def test_guide_and_code_have_the_same_groups_of_tags():
    in_code = set(re.findall(r'f"([A-Z]\w*)/\{', inspect.getsource(ti.Monitor)))
    in_guide = set(re.findall(r"`([A-Z]\w*)/\*`", DOCS["TENSORBOARD_GUIDE.md"]))
    assert in_guide == in_code and {"Update_Ratio", "Loss_by_Position"} < in_code


def test_guide_and_code_have_the_same_histograms():
    source = inspect.getsource(ti.Monitor.histograms)
    groups = re.findall(r'f"(\w+)/\{name\}"', source)
    assert len(groups) == 2
    guide = DOCS["TENSORBOARD_GUIDE.md"]
    for group in groups:
        assert f"`{group}/*`" in guide
    names = dict(ti.GPT(12, 2, 16, 32).named_parameters())  # as in 124M, whatever the width
    shown = re.findall(r"`Parameters/(transformer[\w.]+)`", guide)
    assert shown and set(shown) <= names.keys()
    assert f"{len(names)} weights and {len(names)} gradients" in guide


def test_dashboard_and_metrics_are_in_the_guide():
    guide = DOCS["TENSORBOARD_GUIDE.md"]
    dashboard = guide.split("## Both losses on one chart")[1].split("\n## ")[0]
    for group in ti.Monitor.LAYOUT:
        assert group in dashboard
    hparams = guide.split("## HParams")[1].split("\n## ")[0]
    for tag in ti.Monitor.METRICS:
        assert f"`{tag}`" in hparams


# --- README and .ci/run ---------------------------------------------------------------------------


def test_the_first_two_blocks_train_and_test():
    (first, one), (second, two) = blocks(DOCS["README.md"])[:2]
    assert first == second == "bash"
    for block in (one, two):
        assert block.startswith("python3 -m venv .venv\n. .venv/bin/activate\npip install -r ")
    assert one.endswith("python src/train_improved.py --use_tensorboard\n")
    assert "-r tests/requirements.txt\n" in two
    assert two.endswith("python -m pytest\n")


def test_ci_runs_exactly_the_second_block():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    out = subprocess.run([script, "--print"], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout == blocks(DOCS["README.md"])[1][1]


def test_readme_maps_every_module():
    rows = dict(re.findall(r"^\| `(src/\S+)` \| (.*) \|$", DOCS["README.md"], re.M))
    commands = {f"src/{path.name}" for path in (ROOT / "src").glob("*.py")}
    rooms = {path.parent for path in (ROOT / "src").glob("*/*.py")}
    assert rows.keys() == commands | {f"src/{room.name}/" for room in rooms}
    for room in rooms:
        modules = {path.stem for path in room.glob("*.py")} - {"__init__"}
        assert set(re.findall(r"`(\w+)`", rows[f"src/{room.name}/"])) == modules


def test_pictures_are_shown():
    for picture in (ROOT / "docs").glob("*.png"):
        assert any(f"docs/{picture.name}" in text for text in DOCS.values()), picture.name


# --- Numbers and messages -------------------------------------------------------------------------


def reference_run() -> ti.Config:
    cfg = ti.Config(model="gpt2", data_dir=ti.FINEWEB_DIR)
    ti.resolve_model(cfg, "cuda")
    ti.resolve_length(cfg, 10_000_000_000)
    return cfg


def test_quoted_defaults_are_the_defaults():
    cfg, text = reference_run(), DOCS["QUICK_START.md"]
    assert cfg.max_steps == 95_365 and "`--max_steps`" in text
    for name in ("max_skips", "max_rollbacks"):
        assert re.search(rf"\b{getattr(cfg, name)}\b[^.;|]*\(`--{name}`\)", text), name
    assert f"`--hang_timeout {cfg.hang_timeout:g}`" in text
    assert f"`--histogram_freq` steps ({cfg.histogram_freq})" in DOCS["TENSORBOARD_GUIDE.md"]


def test_computed_sizes_and_times():
    cfg, text = reference_run(), DOCS["QUICK_START.md"]
    with torch.device("meta"):
        model = ti.GPT(cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.seq_len)
    assert f"{model.num_params():,} for GPT-2 small" in text
    size = summary.checkpoint_bytes(SimpleNamespace(cfg=cfg, model=model)) / 1e9
    assert f"{size:.2f} GB" in text
    assert f"{(cfg.keep_checkpoints + 2) * size:.1f} GB" in text
    assert f"{cfg.max_steps // 5000 * size:.1f} GB" in text
    tokens = cfg.max_steps * cfg.total_batch_size
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) (days|hours) \| ([\d.]+) \|", text, re.M)
    assert len(rows) == 5
    for rate, duration, unit, step in rows:
        rate = float(rate.replace(",", ""))
        expected = tokens / rate / {"days": 86400, "hours": 3600}[unit]
        assert float(duration) == pytest.approx(expected, abs=0.06), rate
        assert float(step) == pytest.approx(cfg.total_batch_size / rate, abs=0.06), rate


def test_every_line_of_the_summary_is_explained():
    tree = ast.parse(inspect.getsource(summary.plan))
    dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    names = [key.value for key in max(dicts, key=lambda d: len(d.keys)).keys]
    added = [node.targets[0] for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    names += [target.slice.value for target in added if isinstance(target, ast.Subscript)]
    section = DOCS["QUICK_START.md"].split("## 4. Look at the plan")[1].split("\n## ")[0]
    sample = next(content for language, content in blocks(section) if language == "text")
    assert [line.split()[0] for line in sample.splitlines()] == names
    assert re.findall(r"^\| `(\w+)` \|", section, re.M) == names
    cfg = ti.Config()
    ti.resolve_model(cfg, "cpu")
    ti.resolve_length(cfg, 1_279_529)
    batch, steps = cfg.total_batch_size, cfg.max_steps
    assert f" {batch:,} tokens a step = " in sample
    assert f" {steps:,} steps = {steps * batch:,} tokens = " in sample
    assert f"warm-up {cfg.warmup_steps} steps to {cfg.max_lr:g}, then cosine to" in sample
    assert f"the first {cfg.val_tokens:,} of" in sample
    assert f"{batch:,} tokens a step: minutes" in DOCS["docs/EXPERIMENTS.md"]


def test_quoted_messages_are_in_the_code():
    source = " ".join(p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)  # sentences that go over two lines
    foreign = ("Port 6006 is in use", "TensorFlow installation not found")
    count = 0
    for name in ("QUICK_START.md", "TENSORBOARD_GUIDE.md"):
        table = re.split(r"## (?:\d+\. )?Troubleshooting\n", DOCS[name])[1]
        for symptom in re.findall(r"^\| (.*?) \|", table, re.M):
            for message in re.findall(r"`([^`]+)`", symptom):
                for part in message.split("FILE" if "FILE" in message else "…"):
                    part = part.strip(" :…")
                    assert part in source or part in foreign, f"{name}: {part}"
                    count += 1
    assert count > 10


def test_every_fault_has_a_test_that_exists():
    rows = re.findall(r"^\| (.*) \| .* \| (.*) \|$", DOCS["docs/FAULTS.md"], re.M)
    rows = [row for row in rows if row[0] != "fault"]
    assert len(rows) > 40
    for fault, tests in rows:
        named = re.findall(r"`(\w+)::(\w+)`", tests)
        assert named and len(named) == tests.count("`") // 2, fault
        for file, function in named:
            source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
            assert re.search(rf"^def {function}\(", source, re.M), f"{file}::{function}"


def test_nothing_of_one_machine_is_in_the_documents():
    for name, text in DOCS.items():
        assert not re.search(r"/(?:work|tmp|root)/", text), name
