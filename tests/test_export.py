"""Export: transformers loads the folder offline and computes the same; nothing is overwritten."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import export
import train_improved as ti
from checkpointing import files, pretrained
from conftest import ROOT, environment, run, write_data
from tokens.tokenizer import VOCAB_SIZE, get_tokenizer
from training import generation

transformers = pytest.importorskip("transformers")

STEPS = 6
FLAGS = f"--max_steps {STEPS} --eval_freq {STEPS} --run_name a --weight_decay 0.05".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder in which a short run was made, with its data in data/walk.

    Its weights are then made so large that each of them matters to what the model says.
    """
    cwd = tmp_path_factory.mktemp("trained")
    write_data(cwd / "data" / "walk")
    run(*FLAGS, "--data_dir", "data/walk", "--no-skip_spikes", cwd=cwd)
    path = cwd / "checkpoints" / "a" / f"step_{STEPS:08d}.pt"
    saved = torch.load(path, weights_only=True)
    torch.manual_seed(0)
    for name, weight in saved["model"].items():
        if weight.dim() == 2:
            weight.normal_(std=0.1 if name in ("transformer.wte.weight", "lm_head.weight") else 0.5)
        else:
            weight.add_(0.1 * torch.randn_like(weight))
    files.save(path, saved)
    return cwd


@pytest.fixture(scope="module")
def checkpoint(trained) -> Path:
    return trained / "checkpoints" / "a" / f"step_{STEPS:08d}.pt"


@pytest.fixture(scope="module")
def exported(trained, checkpoint) -> Path:
    """What the command writes, as a user calls it."""
    done = subprocess.run(
        [sys.executable, ROOT / "src" / "export.py", "latest", "exported/a"],
        cwd=trained,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    out = trained / "exported" / "a"
    for name in os.listdir(out):  # each file with its size
        assert f"{(out / name).stat().st_size:,} bytes  exported/a/{name}" in done.stdout
    total = sum(p.stat().st_size for p in out.iterdir())
    assert f"{total:,} bytes  in all" in done.stdout
    return out


@pytest.fixture(scope="module")
def ours(checkpoint) -> ti.GPT:
    shape, weights, _ = pretrained.read_pretrained(str(checkpoint))
    model = ti.GPT(**shape)
    model.load_state_dict(weights)
    return model.eval()


@pytest.fixture(scope="module")
def theirs(exported):
    return transformers.AutoModelForCausalLM.from_pretrained(exported, local_files_only=True).eval()


# --- The same model -------------------------------------------------------------------------------


def test_transformers_loads_every_weight_and_nothing_else(exported):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        exported, local_files_only=True, output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(model) is transformers.GPT2LMHeadModel
    assert model.get_input_embeddings().weight.shape == (VOCAB_SIZE, 16)
    assert model.get_output_embeddings().weight.shape == (VOCAB_SIZE, 16)
    assert model.dtype == torch.float32
    assert model.config.n_positions == 32 and model.config.attn_pdrop == 0


def test_logits_are_equal(ours, theirs):
    torch.manual_seed(0)
    ids = torch.randint(0, VOCAB_SIZE, (4, 32))
    with torch.no_grad():
        difference = ours.logits(ours.features(ids)) - theirs(ids).logits
    assert difference.abs().max() < 1e-4


def test_greedy_generation_is_equal(ours, theirs):
    for seed in range(3):
        prompt = torch.randint(256, 556, (6,), generator=torch.Generator().manual_seed(seed))
        here = generation.generate(ours, [prompt.tolist()], 20, torch.Generator(), temperature=0)
        there = theirs.generate(prompt[None], do_sample=False, max_new_tokens=20)
        assert there[0, 6:].tolist() == here[0]
        assert len(here[0]) == 20 and len(set(here[0])) > 5, "it says something"


def test_the_tokenizer_is_ours(exported):
    auto = transformers.AutoTokenizer.from_pretrained(exported, local_files_only=True)
    alone = Tokenizer.from_file(str(exported / "tokenizer.json"))
    slow = transformers.GPT2Tokenizer.from_pretrained(exported, local_files_only=True)
    encoding = get_tokenizer()
    assert len(auto) == VOCAB_SIZE and auto.eos_token_id == 50256
    assert auto.model_max_length == 32
    texts = [
        "Hello, I'm a language model,",
        "  two  spaces\n\n\ttabs  ",
        "caffè, 蓝色, \U0001f600 don't I'LL 12345 ¼ \x00 _x__y_",
        "a text<|endoftext|>another",
    ]
    for text in texts:
        ids = encoding.encode(text, allowed_special="all")
        assert auto(text).input_ids == ids
        assert slow(text).input_ids == ids
        assert alone.encode(text).ids == ids
        assert auto.decode(ids) == text


def test_a_pipeline_without_any_option_stays_within_the_positions(exported, capfd):
    write = transformers.pipeline("text-generation", model=str(exported))
    assert write("Hello, I'm a language model,")[0]["generated_text"].startswith("Hello, I'm")


# --- Model card -----------------------------------------------------------------------------------


def test_card_states_the_facts_of_the_run(exported, checkpoint):
    state = torch.load(checkpoint, weights_only=True)["state"]
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n# a\n" in card
    for fact in (
        f"| steps | {STEPS} of {STEPS} |",
        f"| tokens seen | {STEPS * 256:,} (",
        "| training data | data/walk: 20,000 tokens, fingerprint ",
        "| first weights | random",
        f"| validation loss | {state['validation_loss']:.4f} nats per token at step {STEPS} ",
        "| max_lr | 0.01 |",
        "| weight_decay | 0.05 |",
        "2 layers, 2 heads",
        "on 1 x cpu, float32",
    ):
        assert fact in card, fact
    assert "HellaSwag" not in card, "it was not scored"
    assert "checkpoint_freq" not in card and str(exported.parents[1]) not in card


def test_cards_command_gives_the_same_configuration(exported, checkpoint):
    from runtime.flags import parse_flags

    card = (exported / "README.md").read_text()
    command = card.split("```bash\npython src/train_improved.py ")[1].split("\n")[0]
    given = parse_flags(ti.Config, "", command.split())
    saved = torch.load(checkpoint, weights_only=True)
    assert given["skip_spikes"] is False and given["data_dir"] == "data/walk"
    assert given == {name: saved["config"][name] for name in given}
    machine = {"device", "run_name", "checkpoint_dir", "tensorboard_dir"}
    assert set(saved["asked"]) - set(given) <= machine


def test_hellaswag_and_its_step_are_on_the_card(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    saved["state"] |= {"hellaswag": 0.2713, "evaluated_step": 4}
    facts = export.run_facts(saved)
    assert facts["HellaSwag"].startswith("0.2713 at step 4 ")


# --- The folder -----------------------------------------------------------------------------------


def refuse(capsys, *arguments) -> str:
    assert export.main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def contents(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_export_is_replaced_only_if_nothing_in_it_changed(checkpoint, tmp_path, capsys):
    out = tmp_path / "deep" / "er"
    assert export.export(checkpoint, out) is None
    before = contents(out)
    capsys.readouterr()
    assert export.main([str(checkpoint), str(out)]) == 0
    assert f"this replaced the export that was there: of run a, step {STEPS}" in (
        capsys.readouterr().out
    )
    assert contents(out) == before
    assert os.listdir(out.parent) == ["er"], "nothing temporary is left"
    (out / "notes.txt").write_text("mine")
    assert "notes.txt was changed or added" in refuse(capsys, checkpoint, out)
    (out / "notes.txt").unlink()
    (out / "README.md").write_text("my own card")
    assert "README.md was changed" in refuse(capsys, checkpoint, out)
    assert contents(out) == before | {"README.md": b"my own card"}


def test_files_are_as_readable_as_other_files(checkpoint, tmp_path):
    umask = os.umask(0o027)
    try:
        export.export(checkpoint, tmp_path / "a")
    finally:
        os.umask(umask)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "a").iterdir()}
    assert set(modes.values()) == {0o640}, modes


def test_other_folders_and_files_are_never_replaced(checkpoint, exported, tmp_path, capsys):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "config.json").write_text("{}")
    assert "not written by this program" in refuse(capsys, checkpoint, thesis)
    assert "is no folder" in refuse(capsys, checkpoint, thesis / "config.json")
    (tmp_path / "link").symlink_to(exported)
    assert "is no folder" in refuse(capsys, checkpoint, tmp_path / "link")
    assert contents(thesis) == {"config.json": b"{}"}
    empty = tmp_path / "empty"
    empty.mkdir()
    export.export(checkpoint, empty)
    assert contents(empty).keys() == contents(exported).keys()


def test_what_cannot_be_exported(exported, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Hugging Face folder already" in refuse(capsys, exported, "x")
    assert "none.pt" in refuse(capsys, "none.pt", "x")
    assert "no checkpoint under checkpoints/" in refuse(capsys, "latest", "x")
    assert "neither a checkpoint" in refuse(capsys, ".", "x")
    assert "name a folder" in refuse(capsys, checkpoint, "/")
    assert "cannot write" in refuse(capsys, checkpoint, checkpoint / "x")
    files.save("foreign.pt", {"weights": torch.zeros(3)})
    assert "not a checkpoint of train_improved.py" in refuse(capsys, "foreign.pt", "x")
    assert not Path("x").exists()


def test_a_runs_folder_means_its_newest_whole_file(checkpoint, tmp_path, capsys):
    shutil.copy(checkpoint, tmp_path)
    (tmp_path / "step_00000099.pt").write_bytes(checkpoint.read_bytes()[:-1000])
    assert export.main([str(tmp_path), str(tmp_path / "x")]) == 0
    captured = capsys.readouterr()
    assert "skipped" in captured.err and "step_00000099.pt" in captured.err
    assert json.loads((tmp_path / "x" / "export.json").read_text())["step"] == STEPS


def limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails (27), as on a full disk (28)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_500_000, 2_500_000))


def test_a_failed_write_leaves_the_old_export(checkpoint, tmp_path):
    out = tmp_path / "a"
    export.export(checkpoint, out)
    before = contents(out)
    done = subprocess.run(
        [sys.executable, ROOT / "src" / "export.py", checkpoint, out],
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
    )
    assert done.returncode == 2, done.stderr
    assert f"cannot write {out}: " in done.stderr and "Traceback" not in done.stderr
    assert os.strerror(errno.EFBIG) in done.stderr
    assert os.listdir(tmp_path) == ["a"] and contents(out) == before


def test_an_export_that_was_killed_is_cleaned_up_or_taken_back(checkpoint, tmp_path):
    out, partial, old = (tmp_path / name for name in ("a", ".a.partial", ".a.old"))
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    export.export(checkpoint, out)
    assert os.listdir(tmp_path) == ["a"]
    (out / "mine.txt").write_text("")
    out.rename(old)  # as between the two renames
    with pytest.raises(ValueError, match=r"mine\.txt"):
        export.export(checkpoint, out)
    assert os.listdir(tmp_path) == ["a"] and (out / "mine.txt").exists()
