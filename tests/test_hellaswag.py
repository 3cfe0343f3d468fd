"""HellaSwag: scores against the slow and obvious way, file checks, download, the command."""

import contextlib
import http.server
import json
import os
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hellaswag
from checkpointing import files
from tokens.tokenizer import get_tokenizer
from train_improved import GPT
from training import scoring

SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "hellaswag_val_1k.jsonl"

# The fields, the marks and the odd corners of the official file; the texts are our own.
RECORDS = [
    {
        "ind": 24,
        "activity_label": "Mending a net",
        "ctx_a": "An old man sits on the quay with a torn net.",
        "ctx_b": "the old man",
        "ctx": "An old man sits on the quay with a torn net. the old man",
        "label": 3,
        "endings": [
            "throws the quay into the sea.",
            "is a net.",
            "plays the violin while the boats burn, one after the other, until morning.",
            "knots the torn threads together.",
        ],
    },
    {
        "ind": 92,
        "activity_label": "How to boil an egg",
        "ctx_a": "[header] How to boil an egg [title] Choose an egg. [step] Fresh eggs sink. ",
        "ctx_b": "",
        "ctx": "[header] How to boil an egg [title] Choose an egg. [step] Fresh eggs sink. ",
        "label": "0",  # as the hub's copy has it
        "endings": [
            "[substeps] Lower it into boiling water. [title] Wait six minutes.",
            "Paint it  blue – très bleu, 蓝色.",
            "Ask the hen.",
            "Break it.",
        ],
    },
    {
        "ind": 106,
        "activity_label": "Skiing",
        "ctx_a": "A skier",
        "ctx_b": "McTavish",
        "ctx": "A skier McTavish",
        "label": 1,
        "endings": ["sings.", "goes down the hill.", "melts.", "it."],
    },
]


def write_items(path: Path, records=RECORDS) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model(seq_len=256)


def make_model(seq_len: int) -> GPT:
    """Weights so large that every position and every token looked at matters to the losses."""
    torch.manual_seed(0)
    model = GPT(n_layer=3, n_head=4, n_embd=32, seq_len=seq_len).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.25)
    return model


@torch.no_grad()
def one_at_a_time(logits, item, seq_len: int) -> list[tuple[float, float]]:
    """(sum, mean) of each ending's loss: the whole text, all logits, nothing shared or padded."""
    longest = max(len(ending) for ending in item.endings)
    context = item.context[-(seq_len + 1 - longest) :] if longest <= seq_len else item.context[-1:]
    losses = []
    for ending in item.endings:
        tokens = torch.tensor(context + ending[:seq_len])
        per_token = F.cross_entropy(logits(tokens[None, :-1])[0], tokens[1:], reduction="none")
        ending_only = per_token[len(context) - 1 :].double()
        losses.append((ending_only.sum().item(), ending_only.mean().item()))
    return losses


def assert_same_scores(results, items, logits, seq_len: int) -> None:
    assert len(results) == len(items)
    for result, item in zip(results, items, strict=True):
        sums, means = zip(*one_at_a_time(logits, item, seq_len), strict=True)
        assert (result.ind, result.label) == (item.ind, item.label)
        assert result.losses == pytest.approx(means, abs=2e-5)
        assert result.sums == pytest.approx(sums, rel=1e-5, abs=1e-4)
        assert result.predicted == means.index(min(means))
        assert result.predicted_acc == sums.index(min(sums))
        per_char = [s / n for s, n in zip(sums, item.ending_chars, strict=True)]
        assert result.predicted_acc_norm == per_char.index(min(per_char))


def full_logits(model):
    return lambda idx: model.logits(model.features(idx))


# --- Items ----------------------------------------------------------------------------------------


def test_gpt2_convention_takes_the_text_as_it_is(tmp_path):
    items = scoring.load_items(write_items(tmp_path / "items.jsonl"))
    encoding = get_tokenizer()
    for item, record in zip(items, RECORDS, strict=True):
        assert encoding.decode(item.context) == record["ctx"]
        assert [encoding.decode(e) for e in item.endings] == [" " + e for e in record["endings"]]
        assert item.ending_chars == [len(e) for e in record["endings"]]
    assert (items[1].ind, items[1].label) == (92, 0)


def test_harness_convention_cleans_the_text(tmp_path):
    # Expected texts by hand, from the rules in lm-evaluation-harness 0.4.13, tasks/hellaswag.
    items = scoring.load_items(write_items(tmp_path / "items.jsonl"), convention="harness")
    decode = get_tokenizer().decode
    assert [decode(i.context) for i in items] == [
        "Mending a net: An old man sits on the quay with a torn net. The old man",
        "How to boil an egg: How to boil an egg. Choose an egg. Fresh eggs sink.",
        "Skiing: A skier Mctavish",
    ]
    assert [decode(e) for e in items[1].endings] == [
        "  Lower it into boiling water.. Wait six minutes.",
        " Paint it blue – très bleu, 蓝色.",
        " Ask the hen.",
        " Break it.",
    ]
    assert items[1].ending_chars == [48, 30, 12, 9]
    assert all(item.exact for item in items)


def test_harness_convention_without_the_two_halves_of_the_context(tmp_path):
    halves = ("ctx_a", "ctx_b")
    records = [{k: v for k, v in r.items() if k not in halves} for r in RECORDS]
    path = write_items(tmp_path / "items.jsonl", records)
    items = scoring.load_items(path, convention="harness")
    assert not any(item.exact for item in items)
    assert get_tokenizer().decode(items[2].context) == "Skiing: A skier McTavish"


GOOD = json.dumps(RECORDS[0])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (GOOD[:-20], "is not JSON"),
        ("\0" * 100, "is not JSON"),
        ("[1, 2]", "is not a JSON object"),
        (json.dumps({k: v for k, v in RECORDS[0].items() if k != "ctx"}), "has no field 'ctx'"),
        (json.dumps(RECORDS[0] | {"label": 4}), "label is 4 and not 0, 1, 2 or 3"),
        (json.dumps(RECORDS[0] | {"label": True}), "label is True"),
        (json.dumps(RECORDS[0] | {"ind": "x"}), "ind is 'x'"),
        (json.dumps(RECORDS[0] | {"endings": ["a", "b", "c"]}), "not a list of four texts"),
        (json.dumps(RECORDS[0] | {"endings": ["a", "b", "c", " "]}), r"endings\[3\] is ' '"),
        (json.dumps(RECORDS[0] | {"ctx": ""}), "ctx is ''"),
        (json.dumps(RECORDS[0] | {"ctx_b": 7}), "ctx_b is 7"),
        (json.dumps({k: v for k, v in RECORDS[0].items() if k != "ctx_b"}), "ctx_a and ctx_b"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, reason):
    path = tmp_path / "items.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError, match=f"items.jsonl, line 2: .*{reason}"):
        scoring.load_items(path)


def test_files_that_are_no_item_files(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, reason in [("empty", "is empty"), ("binary", "cannot read"), ("none", "cannot read")]:
        with pytest.raises(ValueError, match=reason):
            scoring.load_items(tmp_path / name)


# --- Scoring --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("convention", "every"), [("gpt2", 25), ("harness", 100)])
def test_scores_of_real_items_equal_one_ending_at_a_time(model, convention, every):
    if not SHARED.exists():
        pytest.skip(f"needs {SHARED.name} in ../shared/data")
    items = scoring.load_items(SHARED, convention)[::every]
    assert_same_scores(scoring.score(model, items), items, full_logits(model), model.seq_len)


@pytest.mark.parametrize("batch_tokens", [None, 1, 150, 100_000])
def test_an_items_result_does_not_depend_on_its_batch(model, tmp_path, batch_tokens):
    items = scoring.load_items(write_items(tmp_path / "items.jsonl")) * 2
    results = scoring.score(model, items, batch_tokens)
    assert_same_scores(results, items, full_logits(model), model.seq_len)
    assert not any(r.cut for r in results)


def test_scores_equal_those_of_transformers(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=3, n_head=4, n_embd=32, n_positions=256, attn_implementation="eager"
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    state = model.state_dict()
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # theirs are (in, out)
    theirs.load_state_dict({k: v.T if k.endswith(linear) else v for k, v in state.items()})
    items = scoring.load_items(write_items(tmp_path / "items.jsonl"))
    results = scoring.score(model, items)
    assert_same_scores(results, items, lambda idx: theirs(idx).logits, model.seq_len)


@pytest.mark.parametrize("seq_len", [24, 12, 3])
def test_items_too_long_for_the_model_lose_the_beginning_of_the_context(tmp_path, seq_len):
    # 24: a context is cut. 12: one ending is longer than the model. 3: all of them nearly are.
    small = make_model(seq_len)
    items = scoring.load_items(write_items(tmp_path / "items.jsonl"))
    results = scoring.score(small, items)
    assert_same_scores(results, items, full_logits(small), seq_len)
    for result, item in zip(results, items, strict=True):
        longest = max(len(e) for e in item.endings)
        assert result.cut == (len(item.context) + longest - 1 > seq_len)
    assert any(r.cut for r in results)


def test_autocast_is_used_and_left(model, tmp_path):
    items = scoring.load_items(write_items(tmp_path / "items.jsonl"))
    exact = scoring.score(model, items)
    half = scoring.score(model, items, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    for a, b in zip(exact, half, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=0.1)
        assert a.losses != b.losses
    assert not torch.is_autocast_enabled("cpu")
    assert scoring.score(model, items)[0].losses == exact[0].losses


def test_poll_comes_before_each_pass_and_may_stop_it(model, tmp_path):
    items = scoring.load_items(write_items(tmp_path / "items.jsonl"))
    done = []

    class Stop(Exception):
        pass

    def poll():
        if len(done) == 2:
            raise Stop

    with pytest.raises(Stop):
        scoring.score(model, items, batch_tokens=1, poll=poll, progress=done.append)
    assert done == [1, 1]
    done.clear()
    scoring.score(model, items, batch_tokens=100_000, progress=done.append)
    assert done == [3]


def test_scoring_leaves_training_alone(model, tmp_path):
    items = scoring.load_items(write_items(tmp_path / "items.jsonl"))
    before = torch.get_rng_state()
    scoring.score(model, items)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_accuracy_and_an_empty_share_of_the_items(model):
    result = scoring.Result(0, 2, [8.0, 9.0, 6.0, 5.0], [2.0, 3.0, 1.0, 5.0], [1, 9, 1, 0], False)
    assert (result.predicted, result.predicted_acc, result.predicted_acc_norm) == (2, 3, 1)
    wrong = scoring.Result(1, 0, [2.0, 1.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0], [1] * 4, False)
    assert scoring.accuracy([result, wrong]) == 0.5
    assert scoring.accuracy([result, wrong], "predicted_acc") == 0.0
    assert scoring.score(model, []) == []  # more processes than items


# --- Download -------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(body: bytes, cuts=(), status=200):
    """An HTTP server that sends `body` cut to cuts[0] bytes the first time, and so on; then whole.

    It yields the file's URL and the list of requests it got.
    """
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            cut = cuts[len(requests) - 1] if len(requests) <= len(cuts) else len(body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:cut])  # then the connection is closed

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/hellaswag_val.jsonl", requests
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


BODY = "".join(json.dumps(r) + "\n" for r in RECORDS).encode()


def test_download_survives_a_cut_transfer(tmp_path, capsys):
    path = tmp_path / "data" / "hellaswag" / "val.jsonl"
    with server(BODY, cuts=[0, len(BODY) // 2]) as (url, requests):
        hellaswag.download(path, url)
        assert len(requests) == 3
        assert path.read_bytes() == BODY
        assert [p.name for p in path.parent.iterdir()] == ["val.jsonl"]
        said = capsys.readouterr().out.splitlines()
        assert "983 bytes" in said[0] and url in said[0]  # the size, before the data
        assert "3 items" in said[-1]
        hellaswag.download(path, url)
        assert len(requests) == 3 and "already there" in capsys.readouterr().out


@pytest.mark.parametrize("cut", [0, 100, len(BODY) - 1])
def test_download_that_never_completes_leaves_nothing(tmp_path, cut):
    path = tmp_path / "val.jsonl"
    with server(BODY, cuts=[cut] * 99) as (url, requests):
        with pytest.raises(ValueError, match=f"ended after {cut} of {len(BODY)} bytes"):
            hellaswag.download(path, url)
        assert len(requests) == hellaswag.ATTEMPTS
    assert list(tmp_path.iterdir()) == []


def test_download_begins_again_where_a_killed_one_left_a_part(tmp_path):
    (tmp_path / f".tmp-val.jsonl-{os.getpid()}").write_bytes(b"\0" * 10_000)
    with server(BODY) as (url, _):
        hellaswag.download(tmp_path / "val.jsonl", url)
    assert (tmp_path / "val.jsonl").read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["val.jsonl"]


def test_download_refuses_other_content(tmp_path, monkeypatch):
    path = tmp_path / "val.jsonl"

    def refused(url: str) -> str:
        with pytest.raises(ValueError) as error:
            hellaswag.download(path, url)
        return str(error.value)

    with server(b"<html>Sign in to this network</html>") as (url, _):
        assert "not a HellaSwag file" in refused(url)
    with server(BODY, status=404) as (url, requests):
        assert "404" in refused(url)
        assert len(requests) == 1  # trying again would not help
    with server(BODY) as (url, _):  # a good file, but not the official one
        monkeypatch.setattr(hellaswag, "URL", url)
        assert "SHA-256" in refused(url)
    assert list(tmp_path.iterdir()) == []


def test_download_never_replaces_what_is_there(tmp_path):
    path = tmp_path / "thesis.txt"
    path.write_text("Chapter 1")
    with server(BODY) as (url, requests):
        with pytest.raises(ValueError, match=r"thesis.txt, line 1: is not JSON"):
            hellaswag.download(path, url)
        assert requests == []
    assert path.read_text() == "Chapter 1"


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path, monkeypatch, model):
    """A folder with items at the default place and a checkpoint, and this process in it."""
    monkeypatch.chdir(tmp_path)
    Path("data/hellaswag").mkdir(parents=True)
    write_items(tmp_path / hellaswag.DEFAULT_FILE)
    config = {"n_layer": 3, "n_head": 4, "n_embd": 32, "seq_len": 256}
    Path("checkpoints/run").mkdir(parents=True)
    state = {"model": model.state_dict(), "config": config, "step": 7}
    files.save("checkpoints/run/step_00000007.pt", state)
    return tmp_path


def test_command_scores_the_latest_checkpoint(workplace, model, capsys):
    out = workplace / "out" / "results.jsonl"
    assert hellaswag.main(["--out", str(out), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    items = scoring.load_items(hellaswag.DEFAULT_FILE)
    expected = scoring.score(model, items)
    harness = scoring.score(model, scoring.load_items(hellaswag.DEFAULT_FILE, "harness"))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line, a, b in zip(lines, expected, harness, strict=True):
        assert line == {
            "ind": a.ind,
            "label": a.label,
            "predicted": a.predicted,
            "losses": a.losses,
            "harness_acc": b.predicted_acc,
            "harness_acc_norm": b.predicted_acc_norm,
        }
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert f"{scoring.accuracy(expected):.4f}" in rows["gpt2: mean loss"]
    assert {"0.2955", "0.337", "0.25"} <= set(rows["gpt2: mean loss"])
    assert f"{scoring.accuracy(harness, 'predicted_acc'):.4f}" in rows["harness: acc"]
    assert "0.2892" in rows["harness: acc"]
    assert "0.3114" in rows["harness: acc_norm"]
    assert "step 7" in text and "3 items" in text and "of all 10,042" in text


def test_command_says_when_figures_are_not_comparable(workplace, capsys):
    records = [{k: v for k, v in r.items() if k not in ("ctx_a", "ctx_b")} for r in RECORDS]
    write_items(workplace / "other.jsonl", records)
    assert hellaswag.main(["--file", "other.jsonl", "--limit", "2", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "\n2 items in" in text and "no ctx_a and ctx_b" in text


def test_command_downloads_and_then_says_what_next(workplace, capsys):
    with server(BODY) as (url, _):
        assert hellaswag.main(["--download", "--file", "new.jsonl", "--url", url]) == 0
    assert Path("new.jsonl").read_bytes() == BODY
    assert "python src/hellaswag.py --checkpoint latest" in capsys.readouterr().out


def test_command_refuses_bad_input_in_one_sentence(workplace, capsys):
    checkpoint = "checkpoints/run/step_00000007.pt"
    Path("torn.pt").write_bytes(Path(checkpoint).read_bytes()[:-100])
    files.save("foreign.pt", {"weights": torch.zeros(3)})
    wide = torch.load(checkpoint, weights_only=True)
    files.save("wide.pt", wide | {"config": wide["config"] | {"n_embd": 64}})
    sick = {k: v * float("nan") for k, v in wide["model"].items()}
    files.save("sick.pt", wide | {"model": sick})
    Path("broken.jsonl").write_text(GOOD + "\n{\n")
    cases = {
        ("--checkpoint", "torn.pt"): "torn.pt",
        ("--checkpoint", "none.pt"): "none.pt",
        ("--checkpoint", "foreign.pt"): "not a checkpoint of train_improved.py",
        ("--checkpoint", "wide.pt"): "not a checkpoint of train_improved.py",
        ("--checkpoint", "sick.pt"): "not finite",
        ("--file", "none.jsonl"): "--download",
        ("--file", "broken.jsonl"): "line 2",
        ("--limit", "0"): "--limit 0",
        ("--device", "gpu"): "--device gpu",
        ("--out", f"{checkpoint}/x"): "cannot write",
        ("--download", "--url", "http://127.0.0.1:9/x", "--file", "n.jsonl"): "cannot download",
    }
    for arguments, reason in cases.items():
        assert hellaswag.main(list(arguments)) == 2, arguments
        error = capsys.readouterr().err.strip()
        assert reason in error and "\n" not in error, (arguments, error)
    Path(checkpoint).unlink()
    assert hellaswag.main([]) == 2
    assert "no checkpoint" in capsys.readouterr().err
