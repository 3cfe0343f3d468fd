"""Sampling: the cache changes no token, choices have their probabilities, the command's screens."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import export
import sample
import train_improved as ti
from conftest import ROOT, environment, run
from runtime.flags import parse_flags
from tokens import shards, tokenizer
from tokens.tokenizer import EOT
from training import generation

COMMAND = ROOT / "src" / "sample.py"


def small_model(seq_len=32, scale=1.0):
    """`scale` above 1: a model with opinions, whose likely tokens are few."""
    torch.manual_seed(0)
    model = ti.GPT(n_layer=2, n_head=2, n_embd=32, seq_len=seq_len)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale).add_(0.02 * torch.randn_like(p))
    return model.eval()


# --- Generation -----------------------------------------------------------------------------------


def test_cached_features_equal_uncached():
    model = small_model()
    ids = torch.randint(0, 50257, (3, 32))
    with torch.no_grad():
        whole = model.features(ids)
        cache = generation.KVCache(32)
        parts = [model.features(ids[:, :20], cache=cache)]
        parts += [model.features(ids[:, t : t + 1], cache=cache) for t in range(20, 32)]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


def uncached(model, prompt, enough, draws, temperature=0.8, top_k=50, top_p=1.0):
    """One text the plain way: all positions again for each token, torch's own filters."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for t in range(min(enough, model.seq_len - len(prompt))):
            logits = model.logits(model.features(ids)[:, -1])
            if temperature == 0:
                token = logits.argmax()
            else:
                probs, order = torch.softmax(logits[0] / temperature, 0).sort(descending=True)
                if top_k:
                    probs[top_k:] = 0
                    probs /= probs.sum()
                probs[probs.cumsum(0) - probs >= top_p] = 0
                if not top_k and top_p == 1:  # nothing is left out: in the order of the ids
                    probs, order = probs[order.argsort()], torch.arange(len(probs))
                token = order[(probs.cumsum(0) > draws[t] * probs.sum()).nonzero()[0, 0]]
            if token == EOT:
                break
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return ids[0, len(prompt) :].tolist()


PROMPTS = [[1, 2, 3], [40], [5, 6, 7, 8, 9, 10, 11, 12], [100, 200, 300]]


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0},
        {},
        {"temperature": 1.3, "top_k": 0},
        {"top_k": 0, "top_p": 0.7},
        {"top_k": 20, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "several"])
def test_tokens_are_those_of_the_uncached_way(how, prompts):
    model, generator = small_model(scale=3.0), torch.Generator().manual_seed(5)
    got = generation.generate(model, prompts, 20, generator, count=2, **how)
    generator.manual_seed(5)
    expected = [
        uncached(model, prompt, 20, torch.rand(model.seq_len, generator=generator), **how)
        for prompt in prompts
        for _ in range(2)
    ]
    assert got == expected
    assert len(set(map(tuple, got))) == (len(prompts) if how.get("temperature") == 0 else len(got))


def test_a_row_says_the_same_whatever_is_beside_it():
    model = small_model(scale=3.0)
    together = generation.generate(model, PROMPTS, 12, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    assert together == [generation.generate(model, [p], 12, generator)[0] for p in PROMPTS]
    longer = generation.generate(model, PROMPTS, 20, torch.Generator().manual_seed(2))
    assert [row[:12] for row in longer] == together


def test_texts_end_with_the_context_or_with_end_of_text():
    model = small_model()
    rows = generation.generate(model, PROMPTS, 1000, torch.Generator())
    assert [len(p) + len(row) for p, row in zip(PROMPTS, rows, strict=True)] == [32] * 4
    with torch.no_grad():  # <|endoftext|> gets a share of about a third
        w = model.transformer.wte.weight
        model.transformer.ln_f.bias += 10 * w[EOT] / w[EOT].norm() ** 2
    rows = generation.generate(model, [[1, 2]], 1000, torch.Generator(), count=50, top_k=0)
    lengths = {len(row) for row in rows}
    assert {0, 1, 2} <= lengths and max(lengths) < 30, lengths
    assert not any(EOT in row for row in rows)
    steps = list(generation.stream(model, [[1, 2]], 1000, torch.Generator(), count=50, top_k=0))
    assert len(steps) == max(lengths) + 1, "ends when the last row does"


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (7, 1.0), (0, 0.6), (7, 0.8), (1, 1.0)])
def test_each_token_is_chosen_with_its_probability(top_k, top_p):
    """Draws on a fine grid: the share of a token among the choices is its probability."""
    torch.manual_seed(0)
    logits, N = torch.randn(100), 20_000
    probs = torch.softmax(logits / 0.7, 0)
    keep = probs >= probs.topk(top_k or 100).values[-1]
    probs = probs * keep / probs[keep].sum()
    order = probs.argsort(descending=True)
    beyond = order[(probs[order].cumsum(0) < top_p).sum() + 1 :] if top_p < 1 else []
    probs[beyond] = 0
    probs /= probs.sum()
    draws = (torch.arange(N) + 0.5) / N
    chosen = generation.choose(logits.expand(N, -1), draws, 0.7, top_k, top_p)
    shares = torch.bincount(chosen, minlength=100) / N
    assert (shares - probs).abs().max() < 2 / N
    ends = torch.tensor([0.0, 1 - 2**-24])  # the first and the last number that rand can give
    assert (probs[generation.choose(logits.expand(2, -1), ends, 0.7, top_k, top_p)] > 0).all()


def test_temperature_towards_zero_is_greedy():
    logits = torch.randn(5, 1000)
    for temperature in (0, 1e-6, 1e-40):
        chosen = generation.choose(logits, torch.rand(5), temperature, 0, 1.0)
        assert chosen.tolist() == logits.argmax(1).tolist()


def test_poll_at_every_token_and_outside_inference_mode():
    calls = []

    def poll():  # in training it may save a checkpoint
        calls.append(torch.is_inference_mode_enabled() or not torch.is_grad_enabled())

    generation.generate(small_model(), [[1]], 9, torch.Generator(), poll=poll)
    assert calls == [False] * 9


def test_sampling_recompiles_nothing():
    model = small_model()
    train_model = torch.compile(model, backend="eager")
    ids = torch.randint(0, 50257, (2, 33))
    train_model(ids[:, :-1], ids[:, 1:]).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        frames = dict(torch._dynamo.utils.counters["frames"])
        for n in (1, 5):
            with torch.autocast("cpu", torch.bfloat16):
                generation.generate(model, PROMPTS[:n], 8, torch.Generator(), count=2)
            train_model(ids[:, :-1], ids[:, 1:]).backward()
        assert dict(torch._dynamo.utils.counters["frames"]) == frames, "nothing was compiled anew"


# --- Text -----------------------------------------------------------------------------------------


def test_half_a_character_is_held_back():
    enc, text = tokenizer.get_tokenizer(), "naïve 🤖 ≠ 東京 — ok"
    ids = enc.encode(text)
    assert any("\ufffd" in enc.decode([i]) for i in ids), "some tokens are parts of characters"
    grown = sample.Text()
    for token in ids:
        before = grown.text
        grown.add(token)
        assert grown.text.startswith(before) and text.startswith(grown.text)
    grown.end("max_tokens")
    assert grown.text == text
    cut = sample.Text()
    for token in enc.encode("a🤖")[:-1]:
        cut.add(token)
    assert cut.text == "a"
    cut.end("max_tokens")
    assert cut.text == "a\ufffd", "what never became whole is shown as such at the end"


def test_prompts_that_do_not_fit_are_cut_and_said():
    assert sample.encode("one two", 32, 10) == (tokenizer.get_tokenizer().encode("one two"), None)
    ids, cut = sample.encode("one" + " two" * 31, 32, 10)
    assert len(ids) == 22 and "32 tokens" in cut and "last 22" in cut
    assert len(sample.encode("one" + " two" * 31, 32, 10_000)[0]) == 16
    assert sample.encode("", 32, 10) == ([EOT], None)
    assert sample.encode("a<|endoftext|>", 32, 10)[0][-1] == EOT


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with the checkpoints of a very small run named a, on text that never ends."""
    cwd = tmp_path_factory.mktemp("trained")
    data, rng = cwd / "data" / "endless", np.random.default_rng(0)
    data.mkdir(parents=True)
    for split, count in (("train", 20_000), ("val", 2_000)):
        tokens = rng.integers(256, 556, count).astype(np.uint16)
        shards.write_shard(data / f"endless_{split}_000000.bin", tokens)
    flags = "--max_steps 8 --checkpoint_freq 4 --eval_freq 0 --run_name a --seq_len 64"
    run(*flags.split(), cwd=cwd, data=data)
    return cwd


@pytest.fixture
def talk(trained, monkeypatch, capsys):
    """Runs the command in this process -> (standard output, standard error)."""
    monkeypatch.chdir(trained)

    def command(*flags, expect=0):
        code = sample.main(["--dtype", "float32", "--device", "cpu", *map(str, flags)])
        out, err = capsys.readouterr()
        assert code == expect and "Traceback" not in err, err
        return out, err

    return command


def test_a_prompt_is_continued(talk):
    out, err = talk("--prompt", "Hello there", "--max_tokens", "20")
    assert out.startswith("Hello there") and out.endswith("\n")
    assert "checkpoints/a/step_00000008.pt" in err and "20 tokens" in err
    again, _ = talk("--prompt", "Hello there", "--max_tokens", "20", "--run_name", "a")
    other, _ = talk("--prompt", "Hello there", "--max_tokens", "20", "--seed", "7")
    assert again == out != other
    older = "checkpoints/a/step_00000004.pt"
    assert older in talk("--checkpoint", older, "--prompt", "Hi")[1]
    assert "step_00000008.pt" in talk("--checkpoint", "checkpoints/a", "--prompt", "Hi")[1]


def test_an_exported_folder_talks_the_same(talk):
    ours = talk("--prompt", "Hello there", "--max_tokens", "20")
    assert export.main(["checkpoints/a/step_00000008.pt", "exported"]) == 0
    flags = ["--prompt", "Hello there", "--max_tokens", "20"]
    theirs = talk(*flags, "--checkpoint", "exported")  # after what the export said
    assert theirs[0].endswith("\n" + ours[0]) and "a Hugging Face folder" in theirs[1]


def test_several_samples_under_titles(talk):
    out, err = talk("--prompt", "One", "--num_samples", "3", "--max_tokens", "9")
    titles = [line for line in out.splitlines() if line.startswith("--- ")]
    assert titles == ["--- 1 of 3 ---", "--- 2 of 3 ---", "--- 3 of 3 ---"]
    assert out.count("One") == 3 and "27 tokens" in err
    first = talk("--prompt", "One", "--max_tokens", "9")[0]
    assert out.startswith("--- 1 of 3 ---\n" + first), "the first is the one that comes alone"


def test_the_end_of_the_context_is_said(talk):
    _, err = talk("--prompt", "One", "--max_tokens", "500")
    assert "63 tokens" in err and "the context of 64 tokens is full" in err
    _, err = talk("--prompt", "One" + " two" * 99, "--max_tokens", "10")
    assert "the prompt has 100 tokens" in err and "last 54 are read" in err


def test_a_file_of_prompts(talk, trained):
    Path("prompts.txt").write_text("Once upon\n\nA longer prompt, in which more is said\nØre\n")
    flags = ["--file", "prompts.txt", "--num_samples", "2", "--max_tokens", "12"]
    out, err = talk(*flags, "--out", "texts.jsonl")
    assert out == "" and "72 tokens" in err
    written = Path("texts.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in written.splitlines()]
    assert [(r["line"], r["sample"]) for r in records] == [
        (n, i) for n in (1, 3, 4) for i in (0, 1)
    ]
    assert records[4]["prompt"] == "Øre" and "Øre" in written
    assert all(r["tokens"] == 12 and r["stop"] == "max_tokens" and r["text"] for r in records)
    assert talk(*flags, "--batch_size", "2")[0] == written, "the size of a batch changes no text"
    alone, _ = talk("--prompt", "Once upon", "--num_samples", "2", "--max_tokens", "12")
    assert alone.split("---\n")[1] == f"Once upon{records[0]['text']}\n--- 2 of 2 "


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--temperature", "-1"], ["--temperature -1", "0 or more"]),
        (["--top_p", "1.5"], ["--top_p 1.5", "at most 1"]),
        (["--top_p", "0"], ["--top_p 0", "more than 0"]),
        (["--max_tokens", "0"], ["--max_tokens 0"]),
        (["--prompt", "a", "--file", "b"], ["--prompt and --file"]),
        (["--prompt", "a", "--out", "b"], ["--out is for --file"]),
        (["--file", "nowhere.txt"], ["--file nowhere.txt", "No such file"]),
        (["--file", "empty.txt"], ["--file empty.txt", "no line"]),
        (["--file", "latin1.txt"], ["--file latin1.txt", "UTF-8", "byte 1"]),
        (["--file", "one.txt", "--out", "./one.txt"], ["--out one.txt", "name another"]),
        (["--file", "one.txt", "--out", "no/where"], ["--out no/where", "No such file"]),
        (["--prompt", "a", "--run_name", "b"], ["--run_name b", "there are: a"]),
        (["--prompt", "a", "--run_name", "../b"], ["../b"]),
        (["--prompt", "a", "--run_name", "a", "--checkpoint", "x"], ["leave one out"]),
        (["--prompt", "a", "--checkpoint", "nowhere.pt"], ["nowhere.pt", "does not exist"]),
        (["--prompt", "a", "--checkpoint_dir", "nowhere"], ["no checkpoint under nowhere"]),
        (["--prompt", "a", "--device", "abacus"], ["--device abacus"]),
    ],
)
def test_what_a_user_can_get_wrong(talk, flags, words):
    Path("empty.txt").write_text("\n  \n")
    Path("latin1.txt").write_bytes(b"a\xd8b")
    Path("one.txt").write_text("one\n")
    out, err = talk(*flags, expect=2)
    sentence = err.strip().splitlines()[-1]
    assert sentence.startswith("error: ") and all(word in sentence for word in words), sentence
    assert out == "" and Path("one.txt").read_text() == "one\n"


def test_a_damaged_newest_checkpoint_is_passed_over(talk, trained):
    newest = trained / "checkpoints" / "b" / "step_00000009.pt"
    newest.parent.mkdir()
    newest.write_bytes((trained / "checkpoints/a/step_00000008.pt").read_bytes()[:-1000])
    try:
        _, err = talk("--prompt", "Hi", "--max_tokens", "2")
        assert f"skipped {newest.relative_to(trained)}" in err and "a/step_00000008.pt" in err
    finally:
        newest.unlink()


def start(*flags, cwd, **options):
    command = [sys.executable, str(COMMAND), "--device", "cpu", *flags]
    return subprocess.Popen(command, cwd=cwd, env=environment(), **options)


def test_piped_prompt_and_a_reader_that_has_seen_enough(trained):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start("--num_samples", "400", "--max_tokens", "60", cwd=trained, **pipes)
    process.stdin.write("Zwei Fäden\n".encode())
    process.stdin.close()
    assert process.stdout.readline() == b"--- 1 of 400 ---\n"
    assert process.stdout.read(11).decode() == "Zwei Fäden"
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(300) == 0 and "Traceback" not in err and "Exception" not in err, err


def test_interactive_on_a_terminal(trained):
    master, slave = pty.openpty()
    process = start("--max_tokens", "5", cwd=trained, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    unread = ""

    def read_until(text, timeout=300):
        nonlocal unread
        end = time.monotonic() + timeout
        while text not in unread:
            assert time.monotonic() < end and select.select([master], [], [], timeout)[0], unread
            unread += os.read(master, 4096).decode(errors="replace")
        seen, _, unread = unread.partition(text)
        return seen

    read_until("Ctrl-D leaves")
    read_until("> ")
    os.write(master, b"\n")  # nothing typed: asks again
    read_until("> ")
    os.write(master, b"Once more\n")
    assert read_until("5 tokens").count("Once more") == 2, "as typed, and where the text begins"
    read_until("> ")
    os.write(master, b"\x04")
    assert process.wait(300) == 0
    os.close(master)


def test_help_comes_without_torch():
    code = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(COMMAND)!r}, "
    code += "run_name='__main__')\nexcept SystemExit: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "src"
    )
    assert done.returncode == 0 and "--top_p" in done.stdout, done.stderr


@pytest.mark.parametrize("words", [["It was the", "best"], ["It was the best"]])
def test_a_prompt_is_the_words_as_typed(words):
    """Several words are joined by blanks; nothing of them is quoted or taken for a home folder."""
    read = parse_flags(sample.Options, "", ["--prompt", *words, "~"])
    assert read["prompt"] == "It was the best ~"
