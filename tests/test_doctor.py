"""--doctor: a healthy machine, and each thing that can be wrong with one."""

import re
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_improved as ti
from basics import words
from conftest import SMALL, write_data
from runtime import doctor, flags
from tokens import shards as token_shards
from training import scoring

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "seq_len": 32}  # SMALL's


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """A folder with data to run in, and measurements that take moments."""
    write_data(tmp_path / "data" / "walk")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "MEASURE_SECONDS", 0.05)
    monkeypatch.setattr(doctor, "DISK_TEST_BYTES", 1 << 20)
    return tmp_path


@pytest.fixture
def report():
    return doctor.Report()


def for_doctor(given: dict):
    """Return what --doctor plans and tries with these flags."""
    return ti.program(flags.CommandLine(ti.Config, given, {}))


def given(*argv) -> dict:
    argv = [*SMALL, "--data_dir", "data/walk", "--max_steps", "9", *map(str, argv)]
    return flags.parse_flags(ti.Config, "", argv)


def planned(*argv):
    """The run that these flags plan."""
    return ti.set_up(given(*argv) | {"dry_run": True}, ti.Distributed("cpu", 60.0))[0]


def test_a_whole_look_leaves_nothing_behind(capsys, cwd, monkeypatch):
    monkeypatch.setitem(ti.PRESETS, "gpt2", SHAPE)  # the reference model, for a moment's measuring
    before = sorted(cwd.rglob("*"))
    argv = [*SMALL, "--data_dir", "data/walk", "--max_steps", "9", "--doctor"]
    monkeypatch.setattr(sys, "argv", ["train_improved.py", *argv])
    assert ti.main() == 0
    out = capsys.readouterr().out
    assert sorted(cwd.rglob("*")) == before
    lines = re.findall(r"^ +(ok|note|PROBLEM)  (\w+(?: \w+)?)  +", out, re.M)
    names = ["versions", "CPU", "products", "compiler", "memory", "disk", "space"]
    names += ["data", "HellaSwag", "ports", "speed", "this plan", "reference"]
    assert [name for _, name in lines] == names, out
    assert "PROBLEM" not in out and out.endswith("nothing here stops the run\n")
    rate = int(re.search(r"([\d,]+) tokens/s", out)[1].replace(",", ""))
    plan, reference = re.findall(r"steps of [\d,]+ tokens: ([\d,.]+ \w+)", out)
    for said, tokens in ((plan, 9 * 256), (reference, 95_365 * 524_288)):
        shares = np.linspace(0.99, 1.01, 2001)  # the rate on the screen is rounded
        assert said in {words.duration(share * tokens / rate) for share in shares}


def test_a_plan_that_fails_is_a_problem_among_others(capsys, cwd):
    wrong = given("--no-compile") | {"data_dir": "data/none"}
    assert doctor.examine(for_doctor(wrong)) == 2
    out = capsys.readouterr().out
    assert re.search(r"PROBLEM  plan +.*data/none", out)
    for name in ("versions", "products", "disk", "ports"):
        assert f"  {name} " in out
    assert "to fix before the run: plan" in out


def test_a_device_that_is_not_there(capsys, cwd):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert doctor.examine(for_doctor(given("--no-compile") | {"device": "cuda"})) == 2
    assert "--device cuda: not available" in capsys.readouterr().out


def test_several_processes_are_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert doctor.examine(for_doctor({})) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_versions(capsys, report, tmp_path, monkeypatch):
    doctor.check_versions(report, True)
    assert "note" not in capsys.readouterr().out, "the installed versions are the pinned ones"
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(
        f"# pinned\ntorch=={torch.__version__.split('+')[0]}\nnumpy==1.0\ntensorboard-none==2\n"
    )
    monkeypatch.setattr(doctor, "REQUIREMENTS", requirements)
    doctor.check_versions(report, False)
    out = capsys.readouterr().out
    assert re.search(r"note  versions +numpy [\d.]+, pinned is 1.0", out)
    assert re.search(r"PROBLEM  versions +tensorboard-none is not installed", out)
    assert "fix: pip install -r requirements.txt" in out


def test_a_missing_compiler(capsys, report):
    import torch._inductor.config

    for asked, level in ((None, "note"), (True, "PROBLEM")):
        torch._dynamo.reset()
        with torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/c++",)}):
            doctor.check_compiler(report, torch.device("cpu"), asked)
        out = capsys.readouterr().out
        assert re.search(rf"{level}  compiler +torch.compile does not work", out) and "g++" in out
    assert report.problems == ["compiler"]


def test_memory(capsys, report, cwd):
    assert doctor.check_memory(report, planned())
    sequences = 2**30
    run = planned("--total_batch_size", 32 * sequences, "--micro_batch_size", sequences)
    assert not doctor.check_memory(report, run)
    assert report.problems == ["memory"]
    assert "--micro_batch_size" in capsys.readouterr().out


def test_disk(capsys, report, cwd):
    run = planned("--checkpoint_dir", "new/folder")
    doctor.check_disk(report, run.cfg, run)
    out = capsys.readouterr().out
    assert re.search(r"ok  disk +new/folder writes [\d,]+ MB/s", out)
    assert not (cwd / "new").exists() and report.problems == []
    run = planned("--keep_checkpoints", 10**9)
    doctor.check_disk(report, run.cfg, run)
    assert report.problems == ["space"]
    (cwd / "file").write_text("")
    run.cfg.checkpoint_dir = "file/x"
    doctor.check_disk(report, run.cfg, None)
    assert report.problems == ["space"]  # a folder above it can be written: training will say more


def test_a_folder_that_cannot_be_written(capsys, report, cwd):
    run = planned("--tensorboard_dir", "/proc/x")
    doctor.check_disk(report, run.cfg, run)
    assert report.problems == ["disk"]
    assert "--tensorboard_dir /proc/x: cannot write in /proc" in capsys.readouterr().out


def test_a_name_that_has_checkpoints(capsys, cwd):
    folder = cwd / "checkpoints" / "a"
    folder.mkdir(parents=True)
    (folder / "step_00000004.pt").write_bytes(b"")
    assert doctor.examine(for_doctor(given("--run_name", "a", "--no-compile"))) == 2
    assert re.search(r"PROBLEM  plan +--run_name a: .* already", capsys.readouterr().out)


def test_data(capsys, report, cwd):
    run = planned()
    doctor.check_data(report, run, ti.SAMPLE_DIR)
    out = capsys.readouterr().out
    assert re.search(r"ok  data +data/walk: 20,000 training tokens", out)
    assert "no manifest" in out
    shards = []
    for path in sorted((cwd / "data" / "walk").iterdir()):
        tokens = token_shards.open_shard(path).tokens
        content = path.read_bytes()
        entry = token_shards.write_shard(path, torch.arange(tokens).numpy() % 999)
        shards.append(entry | {"split": "val" if "_val_" in path.name else "train"})
        assert len(content) == entry["bytes"]
    token_shards.write_manifest(cwd / "data" / "walk", {"version": 1, "shards": shards})
    doctor.check_data(report, planned(), ti.SAMPLE_DIR)
    assert "checksums as in the manifest" in capsys.readouterr().out
    shard = bytearray(path.read_bytes())
    shard[2000] ^= 1
    path.write_bytes(shard)
    doctor.check_data(report, planned(), ti.SAMPLE_DIR)
    assert report.problems == ["data"]
    assert f"{path.name}: SHA-256 differs" in capsys.readouterr().out


def test_the_sample_corpus_and_too_many_epochs_are_notes(capsys, report, cwd):
    doctor.check_data(report, planned(), "data/walk")
    assert re.search(r"note  data .*FineWeb-Edu takes 20 GB", capsys.readouterr().out)
    doctor.check_data(report, planned("--max_steps", 9999), ti.SAMPLE_DIR)
    assert "more than 20 times" in capsys.readouterr().out and report.problems == []


def test_hellaswag(capsys, report, cwd):
    doctor.check_hellaswag(report, planned())
    assert "hellaswag.py --download" in capsys.readouterr().out
    run = planned()
    run.hellaswag_items = [scoring.Item] * 7
    doctor.check_hellaswag(report, run)
    assert "7 questions" in capsys.readouterr().out


def test_a_taken_port(capsys, report, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {port: ("TensorBoard's", "another")})
        doctor.check_ports(report)
    assert f"{port}, TensorBoard's, is taken" in capsys.readouterr().out
    doctor.check_ports(report)
    assert re.search(rf"ok  ports +{port}", capsys.readouterr().out)


def test_a_step_that_fails_is_a_problem(capsys, report, cwd):
    run = planned()
    run.cfg.seq_len = 16  # the batch has this many tokens, the ids below do not fit the model
    run.cfg.n_head = 3  # 16 channels do not divide
    assert doctor.measure(report, for_doctor({}), run) is None
    assert report.problems == ["speed"]
    assert "a training step failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "steps, batch, rate, watts, device, sentence",
    [
        (95_365, 524_288, 17_000, 0, "cpu", "ok  reference .* 34.0 d without"),
        (95_365, 524_288, 1e6, 400, "cuda", "13.9 h without.* 13.9 GPU-hours.* 5.6 kWh"),
        (600, 1024, 1024, 0, "cpu", "10.0 min without"),
        (95_365, 524_288, 319, 0, "cpu", "note  reference .* 5.0 years"),  # never "ok"
    ],
)
def test_how_long_a_run_takes(capsys, report, steps, batch, rate, watts, device, sentence):
    cfg = ti.Config(max_steps=steps, total_batch_size=batch)
    run = SimpleNamespace(cfg=cfg, dist=SimpleNamespace(device=torch.device(device)))
    doctor.report_duration(report, "reference", run, rate, watts)
    assert re.search(sentence, capsys.readouterr().out.replace("\n", " "))


def test_an_unreadable_data_folder_is_a_problem_not_a_traceback(capsys, cwd):
    name = "a" * 300  # no file system has that
    assert doctor.examine(for_doctor(given("--no-compile") | {"data_dir": name})) == 2
    assert f"PROBLEM  plan       --data_dir {name}: File name too long" in capsys.readouterr().out
