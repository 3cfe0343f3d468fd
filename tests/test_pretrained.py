"""Weights from elsewhere: what is read, what is refused, --init_from in real runs, the hub."""

import contextlib
import copy
import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

import hellaswag
import train_improved as ti
from checkpointing import pretrained
from conftest import ROOT, environment, run
from tokens.stream import open_source
from tokens.tokenizer import VOCAB_SIZE
from training import scoring

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "seq_len": 32}
CONFIG = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}


@pytest.fixture(scope="module")
def model() -> ti.GPT:
    torch.manual_seed(0)
    model = ti.GPT(**SHAPE).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def openai_tensors(model: ti.GPT) -> dict:
    """As on the hub: no prefix, no lm_head, buffers, linear weights (in, out)."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        if name != "lm_head.weight":
            tensors[name.removeprefix("transformer.")] = tensor.T if transposed else tensor
    for i in range(model.n_layer):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def write_folder(folder: Path, tensors: dict, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_equal_weights(weights: dict, model: ti.GPT):
    expected = model.state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


# --- Hugging Face folders -------------------------------------------------------------------------


def test_shapes_are_those_of_the_model():
    with torch.device("meta"):
        expected = {n: tuple(p.shape) for n, p in ti.GPT(**SHAPE).named_parameters()}
    assert pretrained.parameter_shapes(**SHAPE) == expected


def test_openais_files_as_they_are_on_the_hub(model, tmp_path):
    folder = write_folder(tmp_path / "a", openai_tensors(model), resid_pdrop=0.1)
    shape, weights, notes = pretrained.read_pretrained(str(folder))
    assert shape == SHAPE
    assert_equal_weights(weights, model)
    assert weights["lm_head.weight"] is weights["transformer.wte.weight"]
    text = "\n".join(notes)
    assert "h.*.attn.bias (2 x) is not used: a causal mask" in text
    assert "dropout (0.1" in text and "no tokenizer files" in text


# What other programs write of one and the same model: (folder, theirs) -> None. The next report is
# one more line.


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = {name: value for name, value in CONFIG.items() if name != "model_type"}
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config).eval()


def renamed(rename, **config):
    """A writer: tensors as safetensors' users save a state dict, their names changed."""

    def write(folder: Path, theirs):
        tensors = {rename(name): t.clone() for name, t in theirs.state_dict().items()}
        write_folder(folder, {n: t for n, t in tensors.items() if "lm_head" not in n}, **config)

    return write


def without(file: str):
    """A writer: two parts, one file left out of what transformers writes."""

    def write(folder: Path, theirs):
        theirs.save_pretrained(folder, max_shard_size="3MB")
        (folder / file).unlink()

    return write


def as_file(name: str):
    """A writer: the file of another name."""

    def write(folder: Path, theirs):
        theirs.save_pretrained(folder)
        (folder / "model.safetensors").rename(folder / name)

    return write


def saved_by_save_model(folder: Path, theirs):
    """safetensors keeps one of two tied names, and not the one that transformers keeps."""
    theirs.config.save_pretrained(folder)
    save_model(theirs, str(folder / "model.safetensors"))
    assert "transformer.wte.weight" not in load_file(folder / "model.safetensors")


def resized(**how):
    def write(folder: Path, theirs):
        larger = copy.deepcopy(theirs)
        larger.resize_token_embeddings(**how)
        larger.save_pretrained(folder)

    return write


def both_matrices(folder: Path, theirs):
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    write_folder(folder, tensors, tie_word_embeddings=False)


def as_nn_linear(folder: Path, theirs):
    """A GPT-2 written with nn.Linear, as nanoGPT's: matrices (out, in)."""
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = {n: t.T if n.endswith(ends) else t for n, t in theirs.state_dict().items()}
    write_folder(folder, {n: t.contiguous().clone() for n, t in tensors.items()})


def config_as(change):
    def write(folder: Path, theirs):
        theirs.save_pretrained(folder)
        path = folder / "config.json"
        path.write_bytes(change(json.loads(path.read_bytes())))

    return write


NULL = dict.fromkeys(("vocab_size", "attn_pdrop", "n_inner", "n_positions", "n_layer"))
OTHER_NAMES = {"n_embd": "hidden_size", "n_head": "num_attention_heads"}
WRITERS = {
    "transformers": lambda folder, theirs: theirs.save_pretrained(folder),
    "two parts and an index": lambda folder, t: t.save_pretrained(folder, max_shard_size="3MB"),
    "parts without an index": without("model.safetensors.index.json"),
    "a variant": lambda folder, t: t.save_pretrained(folder, variant="fp16"),
    "a variant in parts": lambda f, t: t.save_pretrained(f, variant="fp16", max_shard_size="3MB"),
    "bfloat16": lambda f, t: copy.deepcopy(t).to(torch.bfloat16).save_pretrained(f),
    "float64": lambda f, t: copy.deepcopy(t).double().save_pretrained(f),
    "without the head's class": lambda folder, t: t.transformer.save_pretrained(folder),
    "safetensors.save_model": saved_by_save_model,
    "torch.compile": renamed(lambda name: f"_orig_mod.{name}"),
    "DDP": renamed(lambda name: f"module.{name}"),
    "DDP of a compiled model": renamed(lambda name: f"module._orig_mod.{name}"),
    "compiled blocks": renamed(lambda name: re.sub(r"(h\.\d+)\.", r"\1._orig_mod.", name)),
    "FSDP and checkpointing": renamed(
        lambda name: (
            "_fsdp_wrapped_module." + name.replace(".attn", "._checkpoint_wrapped_module.attn")
        )
    ),
    "a module around it": renamed(lambda name: f"model.{name}"),
    "vocabulary padded to 128": resized(pad_to_multiple_of=128),
    "one token added": resized(new_num_tokens=VOCAB_SIZE + 1),
    "both matrices, equal": both_matrices,
    "nn.Linear": as_nn_linear,
    "another file name": as_file("weights.safetensors"),
    "null in config.json": config_as(lambda c: json.dumps(c | NULL).encode()),
    "other names in config.json": config_as(
        lambda c: json.dumps({OTHER_NAMES.get(name, name): v for name, v in c.items()}).encode()
    ),
    "a BOM in config.json": config_as(lambda c: b"\xef\xbb\xbf" + json.dumps(c).encode()),
    "no model_type": config_as(
        lambda c: json.dumps({n: v for n, v in c.items() if n != "model_type"}).encode()
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_others_write_loads_with_equal_logits(writer, theirs, tmp_path):
    WRITERS[writer](tmp_path, theirs)
    shape, weights, _ = pretrained.read_pretrained(str(tmp_path))
    assert shape == SHAPE
    ours = ti.GPT(**shape).eval()
    ours.load_state_dict(weights)
    ids = torch.arange(64).view(2, 32) * 700
    rounded = {"bfloat16": torch.bfloat16}.get(writer, torch.float32)
    with torch.no_grad():
        expected = copy.deepcopy(theirs).to(rounded).float()(ids).logits
        assert torch.allclose(ours.logits(ours.features(ids)), expected, atol=1e-5)


def test_a_file_in_a_folder_is_a_name_too(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"several models.* a\.safetensors, b\.safetensors"):
        pretrained.read_pretrained(str(tmp_path))
    assert pretrained.read_pretrained(str(tmp_path / "b.safetensors"))[0] == SHAPE


def as_pytorch_bin(folder: Path, theirs):
    theirs.config.save_pretrained(folder)
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")


def without_config(folder: Path, theirs):
    """As accelerate's save_model and save_state."""
    save_model(theirs, str(folder / "model.safetensors"))


def run_code_of(command: str) -> None:
    """What `python -c CODE` at the end of a message would do, in this process."""
    exec(shlex.split(command[command.index("python -c") :])[2], {})


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (as_pytorch_bin, "has its weights in pytorch_model.bin"),
        (without_config, "has no config.json"),
    ],
)
def test_what_cannot_be_read_comes_with_the_command_that_helps(write, words, theirs, tmp_path):
    folder = tmp_path / "it's here"
    folder.mkdir()
    write(folder, theirs)
    with pytest.raises(ValueError, match=words) as error:
        pretrained.read_pretrained(str(folder))
    run_code_of(str(error.value).replace("n_head=1)", "n_head=2)"))
    _, weights, _ = pretrained.read_pretrained(str(folder))
    assert torch.equal(weights["lm_head.weight"], theirs.lm_head.weight)


def quantized(folder: Path, theirs):
    tensors = {n: t.to(torch.int8) for n, t in theirs.state_dict().items() if n != "lm_head.weight"}
    write_folder(folder, tensors)


def adapter(folder: Path, theirs):
    write_folder(folder, {"base_model.model.h.0.lora_A.weight": torch.ones(2, 2)})
    (folder / "adapter_config.json").write_text("{}")


def two_models(folder: Path, theirs):
    tensors = {f"{who}.{n}": t.clone() for who in "ab" for n, t in theirs.state_dict().items()}
    tensors["b.transformer.wpe.weight"] += 1
    write_folder(folder, tensors)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (without("model-00001-of-00002.safetensors"), "has no model-00001-of-00002.safetensors"),
        (quantized, "is quantized"),
        (adapter, "is an adapter"),
        (two_models, "two different tensors that may be transformer.wpe.weight"),
        (lambda folder, t: t.save_pretrained(folder / "checkpoint-5"), "checkpoint-5 does"),
        (config_as(lambda c: json.dumps(c | {"n_head": 5}).encode()), "no multiple of n_head 5"),
        (config_as(lambda c: json.dumps(c | {"resid_pdrop": "x"}).encode()), "does not say"),
        (config_as(lambda c: b"[]"), "not a JSON object"),
    ],
)
def test_what_is_no_whole_gpt2_is_a_sentence(write, words, theirs, tmp_path):
    write(tmp_path, theirs)
    with pytest.raises(ValueError, match=words) as error:
        pretrained.read_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_a_foreign_checkpoint_says_what_makes_it_readable(key, model, tmp_path):
    """nanoGPT's ckpt.pt (compiled, with nn.Linear's layout), Lightning's, a bare dict."""
    weights = {f"_orig_mod.{name}": t for name, t in model.state_dict().items()}
    path = tmp_path / "my ckpt.pt"
    torch.save({key: weights, "iter_num": 5} if key else weights, path)
    with pytest.raises(ValueError, match="another program wrote it; if it is nanoGPT's") as error:
        pretrained.read_pretrained(str(path))
    command, into = re.search("Lightning's: (.*), then name (.*)", str(error.value)).groups()
    python = command.replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(python, shell=True, check=True)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert_equal_weights(pretrained.read_pretrained(into)[1], model)


def test_added_rows_and_foreign_tensors_are_left_out_and_listed(model, tmp_path):
    tensors = {f"transformer.{k}": v for k, v in openai_tensors(model).items()}
    wte = torch.cat([tensors["transformer.wte.weight"], torch.ones(47, 16)])
    tensors |= {"transformer.wte.weight": wte, "lm_head.weight": wte.clone()}
    tensors["transformer.score.weight"] = torch.ones(3, 16)
    folder = write_folder(tmp_path, tensors, vocab_size=50304, attn_pdrop=0.0)
    _, weights, notes = pretrained.read_pretrained(str(folder))
    assert_equal_weights(weights, model)
    text = "\n".join(notes)
    assert "47 rows of the vocabulary beyond 50,257: left out" in text
    assert "transformer.score.weight (1 x) is not used: no such weight in GPT-2" in text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, ["model_type is 'llama'", "'gpt2'"]),
        ({"activation_function": "gelu"}, ["activation_function is 'gelu' and not 'gelu_new'"]),
        ({"layer_norm_epsilon": 1e-6, "n_inner": 48}, ["layer_norm_epsilon is 1e-06", "n_inner"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ({"vocab_size": 21128}, ["vocab_size is 21128 and not 50257"]),
        ({"n_layer": 3}, ["12 weights are missing", "transformer.h.2.ln_1.weight"]),
        ({"n_embd": 32, "n_inner": None}, ["has shape", "(50257, 32)"]),
        ({"n_positions": "many"}, ["config.json does not say"]),
    ],
)
def test_another_kind_of_model_is_refused(model, tmp_path, config, words):
    folder = write_folder(tmp_path, openai_tensors(model), **config)
    with pytest.raises(ValueError) as error:
        pretrained.read_pretrained(str(folder))
    for word in (*words, str(folder)):
        assert word in str(error.value)


def test_damaged_and_incomplete_folders(model, tmp_path):
    def refused() -> str:
        with pytest.raises(ValueError) as error:
            pretrained.read_pretrained(str(tmp_path))
        return str(error.value)

    assert "neither a checkpoint" in refused()
    write_folder(tmp_path, openai_tensors(model))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    assert "tokenizer is not GPT-2's" in refused()
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in refused()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    assert "is damaged or cannot be read" in refused()
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    assert "has 1 of the 2 parts" in refused()
    index = {"weight_map": {"wte.weight": "../../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "index.json is damaged" in refused()


def test_an_untied_output_matrix_is_refused(model, tmp_path):
    tensors = openai_tensors(model) | {"lm_head.weight": torch.zeros(VOCAB_SIZE, 16)}
    with pytest.raises(ValueError, match="output matrix"):
        pretrained.read_pretrained(str(write_folder(tmp_path, tensors)))


def test_hellaswag_scores_a_folder_as_the_model_itself(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "hf", openai_tensors(model))
    record = {"ind": 1, "activity_label": "Skiing", "ctx": "A skier", "label": 1}
    record["endings"] = ["sings.", "goes down the hill.", "melts.", "it."]
    Path("items.jsonl").write_text((json.dumps(record) + "\n") * 2)
    command = "--checkpoint hf --file items.jsonl --out results.jsonl --device cpu"
    assert hellaswag.main(command.split()) == 0
    out = capsys.readouterr().out
    for word in ("hf, a Hugging Face folder", "attn.bias", "0.2955", "0.2892", "0.3114"):
        assert word in out, word
    expected = scoring.score(model, scoring.load_items("items.jsonl"))
    lines = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    for line, result in zip(lines, expected, strict=True):
        assert line["losses"] == pytest.approx(result.losses, abs=1e-6)


# --- --init_from ----------------------------------------------------------------------------------

OPTIONS = "--max_steps 4 --eval_freq 2 --checkpoint_freq 2 --total_batch_size 256 --val_tokens 512"
OPTIONS += " --dtype float32 --device cpu --sample_freq 0"
WITHOUT_SHAPE = OPTIONS.split()


def saved(cwd: Path, name: str, step: int) -> dict:
    path = cwd / "checkpoints" / name / f"step_{step:08d}.pt"
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def workplace(model, data, tmp_path_factory) -> Path:
    """A folder with the model as `hf` and a run `first` of two processes that began with it."""
    cwd = tmp_path_factory.mktemp("init")
    write_folder(cwd / "hf", openai_tensors(model))
    flags = [*WITHOUT_SHAPE, "--init_from", "hf", "--run_name", "first", "--keep_checkpoints", "9"]
    out, _ = run(*flags, "--checkpoint_freq", "1", cwd=cwd, data=data, small=False, nproc=2)
    (cwd / "out.txt").write_text(out)
    return cwd


def first_loss(out: str) -> str:
    return re.search(r"step +0: validation loss ([\d.]+)", out)[1]


def test_training_begins_with_the_weights_on_every_rank(workplace, model, data, tmp_path):
    out = (workplace / "out.txt").read_text()
    assert "--init_from hf:\n  hf, a Hugging Face folder\n" in out
    assert out.count("h.*.attn.bias (2 x) is not used") == 1, "said once, not by every process"
    assert "2 layers, 2 heads, width 16, context 32" in out and "first weights from hf" in out
    alone, _ = run(
        *WITHOUT_SHAPE, "--init_from", "hf", "--run_name", "alone", "--log_jsonl", cwd=workplace,
        data=data, small=False,
    )  # fmt: skip
    assert first_loss(alone) == first_loss(out)
    with open(workplace / "runs" / "alone" / "metrics.jsonl") as lines:
        first = json.loads(lines.readline())
    assert first["step"] == 0, "what the source scores is worth a point"
    assert f"{first['Loss/validation']:.4f}" == first_loss(out)
    source = open_source(str(data), "val", 32, 0)
    val = torch.from_numpy(source.windows_in_order(range(16)).astype("int64"))
    with torch.no_grad():
        assert f"{model(val[:, :-1], val[:, 1:]):.4f}" == first_loss(out)
    one, two = saved(workplace, "first", 1), saved(workplace, "alone", 4)
    assert one["config"]["init_from"] == "hf" and one["config"]["seq_len"] == 32
    rate = ti.TRAINING["tiny"]["max_lr"]
    assert one["config"]["max_lr"] == pytest.approx(0.1 * rate), "a tenth of the preset's"
    for name, weight in model.state_dict().items():
        assert (one["model"][name] - weight).abs().max() < 1e-3, name
    for name, weight in saved(workplace, "first", 4)["model"].items():
        assert torch.allclose(weight, two["model"][name], atol=2e-4), name


def test_a_resume_goes_on_without_the_source(workplace, data, tmp_path):
    """Also with the very same command under --resume auto, as a scheduler repeats it."""
    write = tmp_path / "checkpoints" / "first"
    write.mkdir(parents=True)
    name = "step_00000002.pt"
    (write / name).write_bytes((workplace / "checkpoints" / "first" / name).read_bytes())
    assert not (tmp_path / "hf").exists()
    out, _ = run("--resume", "latest", cwd=tmp_path, small=False)
    assert "--init_from" not in out and "first weights from hf" in out
    again = [*WITHOUT_SHAPE[2:], "--max_steps", "5", "--resume", "auto", "--init_from", "hf"]
    out, _ = run(*again, "--run_name", "first", cwd=tmp_path, data=data, small=False)
    assert "resuming from checkpoints/first/step_00000004.pt" in out
    assert saved(tmp_path, "first", 5)["config"]["init_from"] == "hf"


def test_a_shorter_context_and_our_own_checkpoint(workplace, data, tmp_path):
    source = workplace / "checkpoints" / "first"
    flags = [*WITHOUT_SHAPE, "--init_from", source, "--seq_len", "16", "--run_name", "short"]
    out, _ = run(*flags, "--max_lr", "1e-9", cwd=tmp_path, data=data, small=False)
    assert "step_00000004.pt, step 4" in out and "16 of 32 positions: left out" in out
    before, after = saved(workplace, "first", 4)["model"], saved(tmp_path, "short", 4)["model"]
    for name, weight in after.items():
        assert torch.allclose(weight, before[name][: len(weight)], atol=1e-6), name
    assert after["transformer.wpe.weight"].shape == (16, 16)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--init_from", "hf", "--n_layer", "3"], ["--n_layer 3", "has n_layer 2"]),
        (["--init_from", "hf", "--model", "gpt2"], ["--model gpt2, with n_layer 12", "n_layer 2"]),
        (["--init_from", "hf", "--seq_len", "64"], ["--seq_len 64", "seq_len 32", "lower it"]),
        (["--init_from", "./none"], ["--init_from ./none: does not exist"]),
        (["--init_from", "none.pt"], ["--init_from none.pt: does not exist"]),
        (["--init_from", "data"], ["--init_from data: holds neither"]),
        (["--resume", "latest", "--init_from", "gpt2"], ["--init_from gpt2", "has init_from hf"]),
    ],
)
def test_what_does_not_fit_is_named(capsys, monkeypatch, workplace, data, flags, words):
    monkeypatch.chdir(workplace)
    Path("data").mkdir(exist_ok=True)
    monkeypatch.setattr(
        sys, "argv", ["train_improved.py", *WITHOUT_SHAPE, "--data_dir", str(data), *flags]
    )
    assert ti.main() == 2
    captured = capsys.readouterr()
    for word in words:
        assert word in captured.err, captured.err
    assert captured.err.count("\n") == 1


# --- The hub --------------------------------------------------------------------------------------


@contextlib.contextmanager
def hub(folder: Path, repository: str):
    """A server that answers as the hub does, with one model; yields its address."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            requests.append(self.path)
            path, headers, body, status = self.path.split("?")[0], {}, b"{}", 404
            files = {p.name: p.read_bytes() for p in folder.iterdir()}
            if path.startswith(f"/api/models/{repository}/tree/"):
                tree = [
                    {"type": "file", "path": n, "size": len(c), "oid": f"{len(c):040x}"}
                    for n, c in files.items()
                ]
                body, status = json.dumps(tree).encode(), 200
            elif path.startswith(f"/api/models/{repository}"):
                siblings = [{"rfilename": n, "size": len(c)} for n, c in files.items()]
                answer = {"id": repository, "sha": commit, "siblings": siblings}
                body, status = json.dumps(answer).encode(), 200
            elif path.startswith(f"/{repository}/resolve/") and path.rsplit("/", 1)[1] in files:
                body, status = files[path.rsplit("/", 1)[1]], 200
                headers = {"ETag": f'"{len(body):040x}"', "X-Repo-Commit": commit}
            else:
                headers = {"X-Error-Code": "RepoNotFound"}
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = answer

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", requests
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def read_from_hub(source: str, endpoint: str, cache: Path) -> subprocess.CompletedProcess:
    program = (
        "import sys, torch; from checkpointing import pretrained\n"
        "try:\n"
        "    shape, weights, notes = pretrained.read_pretrained(sys.argv[1])\n"
        "except ValueError as e: sys.exit(f'refused {e}')\n"
        "print(shape, float(weights['transformer.h.1.mlp.c_fc.weight'].double().sum()), notes)\n"
    )
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    env = {k: v for k, v in environment().items() if k not in offline}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-c", program, source], env=env, capture_output=True, text=True
    )


def test_the_hub_its_cache_and_no_connection(model, tmp_path):
    write_folder(tmp_path / "remote", openai_tensors(model))
    (tmp_path / "remote" / "tf_model.h5").write_bytes(bytes(1000))
    total = float(model.state_dict()["transformer.h.1.mlp.c_fc.weight"].double().sum())
    size = sum((tmp_path / "remote" / n).stat().st_size for n in os.listdir(tmp_path / "remote"))
    with hub(tmp_path / "remote", "openai-community/gpt2") as (endpoint, requests):
        first = read_from_hub("gpt2", endpoint, tmp_path / "cache")  # the alias
        assert first.returncode == 0, first.stderr
        assert f"downloading openai-community/gpt2 from the hub: {(size - 1000) / 1e6:.2f} MB" in (
            first.stderr
        )
        assert str(SHAPE) in first.stdout and str(total)[:12] in first.stdout
        assert "revision 0123456789abcdef" in first.stdout and "attn.bias (2 x)" in first.stdout
        assert not any("tf_model" in path for path in requests), "only what is needed"
        missing = read_from_hub("some/model", endpoint, tmp_path / "cache")
        assert missing.returncode == 1
        assert "refused some/model: there is no such file or folder here" in missing.stderr
        assert "no public model of this name" in missing.stderr
    cached = read_from_hub("gpt2", endpoint, tmp_path / "cache")  # nobody answers any more
    assert cached.returncode == 0, cached.stderr
    assert str(total)[:12] in cached.stdout and "the cached copy is used" in cached.stdout
    nothing = read_from_hub("gpt2-xl", endpoint, tmp_path / "cache")
    assert nothing.returncode == 1
    assert "cannot be reached" in nothing.stderr and "bring the model's folder" in nothing.stderr
    assert nothing.stderr.count("\n") == 1
