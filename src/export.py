"""A checkpoint as a Hugging Face folder: for transformers, vLLM, llama.cpp, lm-evaluation-harness.

    python src/export.py latest exported/fineweb
    python src/export.py checkpoints/fineweb exported/fineweb
    python src/export.py checkpoints/fineweb/step_00095365.pt exported/fineweb

CHECKPOINT is a file, a run's folder (its newest file that is whole) or latest (the newest of all
runs under checkpoints/). OUT then holds config.json, model.safetensors (float32, 50,257 rows,
linear weights transposed as Hugging Face's Conv1D has them), GPT-2's tokenizer,
generation_config.json, README.md with the facts of the run, and export.json, which lists them all
with their SHA-256. It appears whole or not at all; a folder that is there already is replaced only
if this program wrote it and nothing in it was changed or added since.

Sections: model, tokenizer, model card, the folder, the command.
"""

import dataclasses
import hashlib
import json
import math
import shlex
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from basics import durable, terminal, words
from checkpointing import files as checkpoint_files
from checkpointing import pretrained
from tokens import tokenizer
from tokens.tokenizer import EOT, VOCAB_SIZE

# --- Model ----------------------------------------------------------------------------------------


def model_config(shape: dict) -> dict:
    """Return config.json: GPT-2 as published, without dropout (it was trained without)."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "n_positions": shape["seq_len"],
        "n_ctx": shape["seq_len"],
        "n_embd": shape["n_embd"],
        "n_layer": shape["n_layer"],
        "n_head": shape["n_head"],
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": EOT,
        "eos_token_id": EOT,
        "dtype": "float32",
        "torch_dtype": "float32",  # the same, for transformers before version 5
    }


def generation_config(shape: dict) -> dict:
    config = {"bos_token_id": EOT, "eos_token_id": EOT, "pad_token_id": EOT}
    if shape["seq_len"] < 512:
        # A transformers pipeline writes 256 tokens unless told: here it would run out of positions.
        config["max_new_tokens"] = shape["seq_len"] // 2
    return config


def write_weights(path: Path, shape: dict, weights: dict) -> None:
    """Write model.safetensors; lm_head.weight is the embedding and not written twice."""
    from safetensors.torch import save

    tensors = {}
    for name in pretrained.parameter_shapes(**shape):
        tensor = weights[name].float()
        tensors[name] = (tensor.T if name.endswith(pretrained.TRANSPOSED) else tensor).contiguous()
    durable.write(path, save(tensors, metadata={"format": "pt"}))


# --- Tokenizer ------------------------------------------------------------------------------------


def tokenizer_files(seq_len: int) -> dict[str, bytes]:
    """Return GPT-2's tokenizer as transformers and the tokenizers library read it."""
    merges = tokenizer.vocabulary_file("vocab.bpe").read_bytes()
    end = tokenizer.get_tokenizer().decode([EOT])
    rules = [line.split(" ") for line in merges.decode().splitlines()[1:] if line]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    byte_level["use_regex"] = True
    special = {"id": EOT, "content": end, "special": True, "normalized": False}
    special |= {"single_word": False, "lstrip": False, "rstrip": False}
    fast = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": tokenizer.vocabulary(),
            "merges": rules,
        },
    }
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    config = names | {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
    }
    return {
        "vocab.json": tokenizer.vocabulary_file("encoder.json").read_bytes(),
        "merges.txt": merges,
        "tokenizer.json": json.dumps(fast, ensure_ascii=False).encode(),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(names),
    }


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


# --- Model card -----------------------------------------------------------------------------------


def run_facts(checkpoint: dict) -> dict[str, str]:
    """Return what a checkpoint knows of its run, as a table of the model card."""
    config, state, data = checkpoint["config"], checkpoint["state"], checkpoint["data"]
    seen = state.get("tokens", checkpoint["step"] * config["total_batch_size"])  # kept since 2026
    made_on, epochs = checkpoint["machine"], state["position"] * config["seq_len"] / data["tokens"]
    facts = {
        "steps": f"{checkpoint['step']:,} of {config['max_steps']:,}",
        "tokens seen": f"{seen:,} ({epochs:.2f} epochs of the training data)",
        "training data": f"{config['data_dir']}: {data['tokens']:,} tokens, fingerprint "
        f"{data['fingerprint']}",
        "first weights": config.get("init_from") or "random, as GPT-2's",
        "training time": f"{words.duration(state['train_seconds'])} on {made_on['world_size']} x "
        f"{made_on['device_type']}, {config['dtype']}",
    }
    if joules := state.get("watt_seconds"):
        facts["energy"] = f"{joules / 3.6e6:.3g} kWh, of the devices"
    if state.get("changes"):
        facts["changed on the way"] = "; ".join(state["changes"])
    if math.isfinite(state["validation_loss"]):
        loss = state["validation_loss"]
        facts["validation loss"] = (
            f"{loss:.4f} nats per token at step {state['evaluated_step']:,} (perplexity "
            f"{math.exp(loss):.2f}); the lowest was {state['best_loss']:.4f}"
        )
    if state["hellaswag"] >= 0:
        facts["HellaSwag"] = (
            f"{state['hellaswag']:.4f} at step {state['evaluated_step']:,} (mean loss per token; "
            "GPT-2 124M 0.2955, chance 0.25)"
        )
    return facts


def hyperparameters(config: dict) -> dict[str, str]:
    """Return the part of the configuration that the weights depend on."""
    from train_improved import Config

    learned = [f.name for f in dataclasses.fields(Config) if f.metadata["learned"]]
    values = {name: config[name] for name in learned if config.get(name) is not None}
    return {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in values.items()}


def command(checkpoint: dict) -> str:
    """Return what starts such a run: its flags as they were given."""
    from runtime import flags
    from train_improved import Config

    kept = [f.name for f in dataclasses.fields(Config) if f.metadata["resume"] != flags.COMMAND]
    given = {n: checkpoint["config"].get(n) for n in kept if n in checkpoint["asked"]}
    return shlex.join(["python", "src/train_improved.py", *flags.words(given, Config)])


def model_card(checkpoint: dict, shape: dict, name: str, out: Path) -> str:
    parameters = sum(math.prod(s) for s in pretrained.parameter_shapes(**shape).values())
    prompt = checkpoint["config"]["sample_prompt"]
    tokens = min(64, shape["seq_len"] // 2)

    def table(rows: dict) -> str:
        lines = (f"| {key} | {value.replace('|', ' ')} |" for key, value in rows.items())
        return "\n".join(["| | |", "|---|---|", *lines])

    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
---

# {name}

GPT-2 with {parameters:,} parameters: {shape["n_layer"]} layers, {shape["n_head"]} heads, width
{shape["n_embd"]}, context {shape["seq_len"]}. A base model: it goes on with a text, follows no
instructions, and knows only its training data.

```python
from transformers import pipeline

generate = pipeline("text-generation", model={json.dumps(str(out))})
out = generate({json.dumps(prompt)}, max_new_tokens={tokens}, do_sample=True, top_k=50)
print(out[0]["generated_text"])
```

## The run

{table(run_facts(checkpoint))}

```bash
{command(checkpoint)}
```

## Hyperparameters

{table(hyperparameters(checkpoint["config"]))}
"""


# --- The folder -----------------------------------------------------------------------------------

MANIFEST = "export.json"


def check_replaceable(out: Path) -> dict | None:
    """Return what export.json says of an export that is there, exactly as it was written; None if
    nothing is there or an empty folder. Raise ValueError for everything else."""
    if not out.exists() and not out.is_symlink():
        return None
    if not out.is_dir() or out.is_symlink():
        raise ValueError(f"{out} is there and is no folder: choose another name")
    there = {str(p.relative_to(out)) for p in out.rglob("*") if not p.is_dir()}
    if not there:
        return None
    try:
        record = json.loads((out / MANIFEST).read_bytes())
        written = dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{out} is there and was not written by this program: choose another name"
        ) from None
    for name in sorted(there - {MANIFEST}):
        if name not in written or _sha256(out / name) != written[name]:
            raise ValueError(
                f"{out} is an export, but {name} was changed or added since: choose another name, "
                "or remove that folder"
            )
    return record


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export(path: Path, out: Path) -> dict | None:
    """Write the checkpoint in `path` as the folder `out`; return what that replaced.

    Beside `out`, as .OUT.partial, until it is complete and flushed to the disk. Raise ValueError if
    it is not a checkpoint, `out` must not be replaced, or cannot be written (disk full ...).
    """
    checkpoint = checkpoint_files.load(path)
    shape, weights = pretrained.from_checkpoint(checkpoint, path)
    partial = out.with_name(f".{out.name}.partial")
    old = out.with_name(f".{out.name}.old")
    name = checkpoint["run_name"]
    try:
        if old.exists() and not out.exists():  # killed between the two renames below
            old.rename(out)
        replaced = check_replaceable(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in (partial, old):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir()
        contents = {
            "README.md": model_card(checkpoint, shape, name, out).encode(),
            "config.json": _json(model_config(shape)),
            "generation_config.json": _json(generation_config(shape)),
            **tokenizer_files(shape["seq_len"]),
        }
        for file, content in contents.items():
            durable.write(partial / file, content)
        write_weights(partial / "model.safetensors", shape, weights)
        record = {
            "format": 1,
            "checkpoint": str(path),
            "run_name": name,
            "step": checkpoint["step"],
            "files": {p.name: _sha256(p) for p in sorted(partial.iterdir())},
        }
        durable.write(partial / MANIFEST, _json(record))
        if out.exists():
            out.rename(old)
        partial.rename(out)
        durable.flush_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise ValueError(f"cannot write {out}: {e.strerror or e}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
    return replaced


# --- The command ----------------------------------------------------------------------------------


@terminal.command
def main(argv: list[str] | None = None) -> int:
    parser = terminal.Parser(description=(__doc__ or "").split("\n\nSections")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file, run's folder, or latest")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    args = parser.parse_args(argv)
    if not args.out.name:
        raise ValueError(f"OUT {args.out}: name a folder that can be made")
    path, skipped = pretrained.find_here(args.checkpoint)
    for damaged, reason in skipped:
        print(f"skipped {damaged}: {reason}", file=sys.stderr)
    if pretrained.is_hugging_face(path):
        raise ValueError(f"CHECKPOINT {path}: is a Hugging Face folder already")
    out = args.out.expanduser()
    replaced = export(path, out)
    print(f"{path} as a Hugging Face folder:")
    sizes = {file: file.stat().st_size for file in sorted(out.iterdir())}
    for file, size in sizes.items():
        print(f"{size:>15,} bytes  {file}")
    print(f"{sum(sizes.values()):>15,} bytes  in all; how to use it: {out / 'README.md'}")
    if replaced is not None:
        was = f"run {replaced.get('run_name')}, step {replaced.get('step')}"
        print(f"this replaced the export that was there: of {was}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
