"""GPT-2 weights from wherever they are: our checkpoints, Hugging Face folders, the hub.

    shape, weights, notes = read_pretrained("gpt2")                    the hub, or what is cached
    shape, weights, notes = read_pretrained("exported/fineweb")        a Hugging Face folder
    shape, weights, notes = read_pretrained("checkpoints/fineweb")     the newest file of a run

Used by train_improved.py (--init_from), hellaswag.py and export.py. The model here is GPT-2 as
published and nothing else, so what would compute something else is refused, and what is left out
without changing a result (buffers, dropout, added rows of the vocabulary) is listed in the notes.
Nothing in a file is ever executed. PyTorch is imported where tensors are touched only.

Sections: finding, the hub, shapes and names, our checkpoints, Hugging Face folders, for training.
"""

import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

from basics import words
from checkpointing import files, run_folders
from tokens.tokenizer import VOCAB_SIZE, fingerprint, vocabulary

# OpenAI's models, as GPT-2's users call them.
ALIASES = {f"gpt2{s}": f"openai-community/gpt2{s}" for s in ("", "-medium", "-large", "-xl")}
SHAPE = ("n_layer", "n_head", "n_embd", "seq_len")


def read_pretrained(source: str, checkpoint_dir="checkpoints") -> tuple[dict, dict, list[str]]:
    """Return (shape, weights, notes) of a model, on the CPU in float32.

    source: "latest" (of `checkpoint_dir`), a checkpoint file, a run's folder of them, a Hugging
    Face folder or a .safetensors file in one, an alias or an id of the hub. What is here on disk
    goes before the hub. shape: n_layer, n_head, n_embd, seq_len. weights: a state dict with the
    names and layout of train_improved.GPT; tensors may share memory. notes: sentences, where it is
    from and what did not fit. Raise ValueError for what is not found, damaged, not reachable, or
    another kind of model.
    """
    path, notes = find(source, checkpoint_dir)
    read = _from_hugging_face if is_hugging_face(path) else _from_checkpoint_file
    shape, weights, more = read(path)
    return shape, weights, notes + more


def load_model(model_class, source: str, device, checkpoint_dir="checkpoints", dtype=None):
    """Return (the train_improved.GPT that `source` means, for evaluation; notes about it)."""
    import torch

    shape, weights, notes = read_pretrained(source, checkpoint_dir)
    with torch.device("meta"):  # no time for initial weights
        model = model_class(**shape)
    model.load_state_dict(weights, assign=True)
    model.lm_head.weight = model.transformer.wte.weight  # one matrix again, as it was made
    return model.to(device, dtype).eval(), notes


# --- Finding --------------------------------------------------------------------------------------


def find(source: str, checkpoint_dir="checkpoints") -> tuple[Path, list[str]]:
    """Return the checkpoint, folder or file that `source` means, and notes; maybe downloaded."""
    if source == "latest" or Path(source).expanduser().exists():
        path, skipped = find_here(source, checkpoint_dir)
        notes = [f"skipped {bad}: {reason}" for bad, reason in skipped]
        return path, notes + [f"{path}, a Hugging Face folder"] * path.is_dir()
    repository = ALIASES.get(source, source)
    if not re.fullmatch(r"[\w.-]*\w(/\w[\w.-]*)?", repository) or repository.endswith(".pt"):
        raise ValueError(f"{source} does not exist")
    return from_hub(source, repository)


def find_here(source: str, checkpoint_dir="checkpoints") -> tuple[Path, list[tuple[Path, str]]]:
    """Return (path, [(damaged file, reason), ...]) for "latest", a file, a run's or HF folder."""
    if source == "latest":
        path, skipped = run_folders.find_latest_anywhere(checkpoint_dir)
        if path is None:
            raise ValueError(f"no checkpoint under {checkpoint_dir}/ yet: train, or name a file")
        return path, skipped
    path = Path(source).expanduser()
    if not path.is_dir() or is_hugging_face(path):
        return path, []
    newest, skipped = run_folders.find_latest(path)
    if newest is None:
        raise ValueError(_nothing_in(path))
    return newest, skipped


def is_hugging_face(path: Path) -> bool:
    """Return whether this is a folder with weights in safetensors, or such a file."""
    return any(path.glob("*.safetensors")) if path.is_dir() else path.suffix == ".safetensors"


OTHER_WEIGHTS = {  # files, and how transformers is told of them
    "pytorch_model*.bin": "",
    "tf_model.h5": ", from_tf=True",
    "flax_model.msgpack": ", from_flax=True",
}


def _nothing_in(folder: Path) -> str:
    """Return a sentence about a folder with nothing to load, and the way out where there is one."""
    for pattern, how in OTHER_WEIGHTS.items():
        for file in folder.glob(pattern):
            old = " (with transformers before version 5)" * bool(how)
            return (
                f"{folder} has its weights in {file.name}, a kind that is never opened here; make "
                f"them safetensors{old}: {to_safetensors(str(folder), folder, how)}"
            )
    said = (
        f"{folder} holds neither a checkpoint (step_*.pt) that is whole nor a Hugging Face model "
        "(config.json and model.safetensors)"
    )
    inside_it = [*folder.glob("*/*"), *folder.glob("*/*/*")]  # an output folder, a hub's cache
    for inside in sorted(inside_it, reverse=True):
        if inside.suffix == ".safetensors" or files.STEP_NAME.fullmatch(inside.name):
            return f"{said}; {inside.parent} does"
    hub = ALIASES.get(str(folder))
    return said + f"; OpenAI's model of the hub is {hub}" * bool(hub)


def to_safetensors(source: str, folder: Path, how: str = "") -> str:
    """Return the command that makes transformers load `source` and write it to `folder`."""
    load = f"t.GPT2LMHeadModel.from_pretrained({source!r}{how})"
    return _python(f"import transformers as t; {load}.save_pretrained({str(folder)!r})")


def _python(code: str) -> str:
    """Return a command that can be pasted into a shell."""
    special = re.search(r'["$`\\!]', code)
    return f"python -c {shlex.quote(code)}" if special else f'python -c "{code}"'


# --- The hub --------------------------------------------------------------------------------------

FILES = ("config.json", "vocab.json", "model.safetensors")


def from_hub(source: str, repository: str) -> tuple[Path, list[str]]:
    """Return the folder of a model of the hub in its cache (HF_HOME), maybe fetched, and notes.

    Says how much it downloads before it does. Without a connection what is cached is used.
    """
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    nothing_here = f"{source}: there is no such file or folder here, and"
    try:
        found = huggingface_hub.HfApi().model_info(repository, files_metadata=True, timeout=30)
    except RepositoryNotFoundError:
        raise ValueError(f"{nothing_here} no public model of this name on the hub") from None
    except Exception as e:  # httpx and the hub's client share no ancestor
        try:
            folder = huggingface_hub.snapshot_download(
                repository, local_files_only=True, allow_patterns=[*FILES]
            )
            _weight_files(Path(folder))
        except Exception:
            raise ValueError(
                f"{nothing_here} the Hugging Face hub cannot be reached ({_short(e)}): connect "
                "this machine, or bring the model's folder here and name it"
            ) from None
        return Path(folder), [f"{repository}: the hub cannot be reached, the cached copy is used"]
    sizes = {file.rfilename: file.size or 0 for file in found.siblings}
    wanted = [name for name in FILES if name in sizes]
    if "model.safetensors" not in sizes:  # in several files, with an index, or of another name
        kinds = (".safetensors", ".safetensors.index.json")
        wanted += [name for name in sizes if name.endswith(kinds) and "/" not in name]
    if "config.json" not in wanted or not any(n.endswith(".safetensors") for n in wanted):
        command = to_safetensors(repository, Path(repository.split("/")[-1]))
        raise ValueError(
            f"{repository} has no config.json and model.safetensors on the hub: make them with "
            f"{command}, and name that folder"
        )
    find_cached = huggingface_hub.try_to_load_from_cache
    cached = {n for n in wanted if isinstance(find_cached(repository, n, revision=found.sha), str)}
    if missing := sum(sizes[name] for name in wanted if name not in cached):
        said = f"downloading {repository} from the hub: {words.size(missing)}"
        print(said, file=sys.stderr, flush=True)
    try:
        folder = huggingface_hub.snapshot_download(repository, allow_patterns=wanted)
    except Exception as e:  # cut off, no space...
        raise ValueError(
            f"{repository} could not be downloaded ({_short(e)}): try again, what has arrived is "
            "kept"
        ) from None
    return Path(folder), [f"{repository} on the Hugging Face hub, revision {Path(folder).name}"]


def _short(e: Exception) -> str:
    return f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}"


# --- Shapes and names -----------------------------------------------------------------------------

TRANSPOSED = ("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face's Conv1D


def parameter_shapes(n_layer: int, n_head: int, n_embd: int, seq_len: int) -> dict[str, tuple]:
    """Return every parameter's shape in train_improved.GPT but lm_head.weight's, which is wte."""
    C = n_embd
    layers = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
    layers |= {"mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    shapes = {"transformer.wte.weight": (VOCAB_SIZE, C), "transformer.wpe.weight": (seq_len, C)}
    for i in range(n_layer):
        for name in ("ln_1", "ln_2"):
            shapes |= {f"transformer.h.{i}.{name}.{part}": (C,) for part in ("weight", "bias")}
        for name, (rows, columns) in layers.items():
            shapes[f"transformer.h.{i}.{name}.weight"] = (rows, columns)
            shapes[f"transformer.h.{i}.{name}.bias"] = (rows,)
    return shapes | {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}


def _check_tensors(found: dict, shape: dict) -> None:
    """Raise ValueError unless `found` {name: shape} has all parameters in their shapes."""
    expected = parameter_shapes(**shape)
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, first {missing[0]}")
    for name, wanted in expected.items():
        if tuple(found[name]) != wanted:
            raise ValueError(f"{name} has shape {tuple(found[name])} instead of {wanted}")


# --- Our checkpoints ------------------------------------------------------------------------------


def _from_checkpoint_file(path: Path) -> tuple[dict, dict, list[str]]:
    try:
        checkpoint = files.load(path)
    except files.CheckpointError as e:
        if e.reason != files.FOREIGN:
            raise
        into = str(path.with_suffix(".safetensors"))
        raise ValueError(f"{e}; if it is nanoGPT's or Lightning's: {_rewritten(path, into)}, then "
                         f"name {into}") from None  # fmt: skip
    shape, weights = from_checkpoint(checkpoint, path)
    return shape, weights, [f"{path}, step {checkpoint['step']:,}"]


def from_checkpoint(checkpoint: dict, path) -> tuple[dict, dict]:
    """Return (shape, weights) of a loaded checkpoint; raise ValueError if it is not ours."""
    try:
        shape = {name: int(checkpoint["config"][name]) for name in SHAPE}
        weights = dict(checkpoint["model"])
        _check_tensors({name: t.shape for name, t in weights.items()}, shape)
        int(checkpoint["step"])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        reason = f"it has no {e}" if isinstance(e, KeyError) else e
        raise ValueError(f"{path} is not a checkpoint of train_improved.py: {reason}") from None
    if checkpoint.get("tokenizer", fingerprint()) != fingerprint():
        raise ValueError(f"{path} was trained with another tokenizer: ids would mean other text")
    return shape, weights


def _rewritten(path: Path, into: str) -> str:
    """Return the command that writes the tensors of torch.save's file as safetensors."""
    return _python(
        "import torch, safetensors.torch as s; "
        f"d = torch.load({str(path)!r}, map_location='cpu', weights_only=True); "
        "d = d.get('model', d.get('state_dict', d)); "
        f"s.save_file({{k: v.clone().contiguous() for k, v in d.items()}}, {into!r})"
    )


# --- Hugging Face folders -------------------------------------------------------------------------

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
# What torch.compile, DDP, FSDP and activation checkpointing put into names.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def _from_hugging_face(path: Path) -> tuple[dict, dict, list[str]]:
    """Read a folder with config.json and weights in safetensors, or one such file in it."""
    import torch

    folder = path if path.is_dir() else path.parent
    stored = _read_tensors(_weight_files(path))
    tensors = {}
    for name, tensor in stored.items():
        ours = _our_name(name)
        if ours in tensors and not torch.equal(tensors[ours], tensor):
            raise ValueError(f"{path} holds two different tensors that may be {ours}")
        tensors[ours] = tensor
    shape, notes = _check_config(folder, tensors)
    notes += _check_vocabulary(folder)
    expected = parameter_shapes(**shape)
    unused = [name for name in stored if _our_name(name) not in (*expected, HEAD)]
    tensors = {name: t for name, t in tensors.items() if name in (*expected, HEAD)}
    if whole := [name for name, t in tensors.items() if not t.is_floating_point()]:
        raise ValueError(
            f"{path} is quantized ({whole[0]} is {tensors[whole[0]].dtype}): load it with "
            "transformers, dequantize() and save_pretrained() it, and name that folder"
        )

    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    notes += [f"{n} tensors in {d}: made float32" for d, n in dtypes.items() if d != "float32"]
    head = tensors.pop(HEAD, None)
    wte = tensors.setdefault(WTE, head)  # tied: some writers keep the one name, some the other
    if wte is None:
        del tensors[WTE]
    elif head is not None and not torch.equal(head[:VOCAB_SIZE], wte[:VOCAB_SIZE]):
        raise ValueError(
            f"{path}: its output matrix (lm_head.weight) differs from its embedding, in GPT-2 "
            "they are one matrix: it cannot be loaded here"
        )
    elif len(wte) > VOCAB_SIZE:
        notes.append(f"{len(wte) - VOCAB_SIZE} rows of the vocabulary beyond {VOCAB_SIZE:,}: "
                     "left out")  # fmt: skip
        tensors[WTE] = wte[:VOCAB_SIZE].clone()
    qkv = tensors.get("transformer.h.0.attn.c_attn.weight")
    linear = qkv is not None and tuple(qkv.shape) == expected["transformer.h.0.attn.c_attn.weight"]
    for name, tensor in tensors.items():  # else as Hugging Face's Conv1D has them, (in, out)
        turned = tensor.T if name.endswith(TRANSPOSED) and not linear else tensor
        tensors[name] = turned.to(torch.float32).contiguous()
    try:
        _check_tensors({name: t.shape for name, t in tensors.items()}, shape)
    except ValueError as e:
        raise ValueError(f"{path} is not a whole GPT-2: {e}") from None
    return shape, tensors | {HEAD: tensors[WTE]}, notes + _unused(unused)


def _our_name(stored: str) -> str:
    """Return a stored tensor's name in train_improved.GPT, without what others put around it:
    "module._orig_mod.h.0.ln_1.bias" -> "transformer.h.0.ln_1.bias"."""
    parts = [part for part in stored.split(".") if part not in WRAPPERS]
    for i, part in enumerate(parts):
        if part in ("wte", "wpe", "h", "ln_f"):
            return ".".join(["transformer", *parts[i:]])
        if part == "lm_head":
            return ".".join(parts[i:])
    return stored


def _read_tensors(paths: list[Path]) -> dict:
    import safetensors

    found = {}
    for path in paths:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as e:
            raise ValueError(f"{path} is damaged or cannot be read: {_short(e)}") from None
    return found


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def _weight_files(path: Path) -> list[Path]:
    """Return the safetensors files that are one model; raise ValueError if that is not clear."""
    if not path.is_dir():
        return [path]
    if (path / "adapter_config.json").exists():
        raise ValueError(
            f"{path} is an adapter (PEFT): merge_and_unload() it into its model, save_pretrained() "
            "that, and name that folder"
        )
    names = {p.name for p in path.glob("*.safetensors")}
    if "model.safetensors" in names:
        return [path / "model.safetensors"]
    parts = [re.search(r"-\d+-of-(\d+)", name) for name in names]
    wanted = names
    if index := sorted(path.glob("*.safetensors.index*.json")):
        weight_map = _read_json(index[0]).get("weight_map")
        wanted = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        if not wanted or any(Path(name).name != name for name in wanted):
            raise ValueError(f"{index[0]} is damaged: no names of parts")
    elif len(names) > 1 and not all(parts):
        several = ", ".join(sorted(names))
        raise ValueError(f"{path} holds several models, name one of the files: {several}")
    elif parts[0] and int(parts[0][1]) != len(names):
        raise ValueError(f"{path} has {len(names)} of the {int(parts[0][1])} parts of its model")
    if missing := sorted(wanted - names):
        raise ValueError(f"{path} has no {missing[0]}, a part of its model")
    return [path / name for name in sorted(wanted)]


# Other names of what a configuration says, as transformers knows them.
CONFIG_NAMES = {
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_embd": ("n_embd", "hidden_size"),
    "seq_len": ("n_positions", "max_position_embeddings", "n_ctx"),
}


def _read_config(folder: Path, shape: dict) -> dict:
    """Return config.json without what it leaves open (null). shape: as the tensors have it."""
    if not (folder / "config.json").exists():
        sizes = f"n_layer={shape['n_layer']}, n_embd={shape['n_embd']}, n_positions="
        sizes += f"{shape['seq_len']}, n_head={max(1, shape['n_embd'] // 64)}"
        code = f"import transformers as t; t.GPT2Config({sizes}).save_pretrained({str(folder)!r})"
        raise ValueError(
            f"{folder} has no config.json, which says how many heads the model has; write it with "
            f"your number in: {_python(code)}"
        )
    content = _read_json(folder / "config.json")
    return {name: value for name, value in content.items() if value is not None}


def _check_config(folder: Path, tensors: dict) -> tuple[dict, list[str]]:
    """Return shape and notes; raise ValueError with all that makes it another model."""
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.h.")}
    rows, columns = getattr(tensors.get("transformer.wpe.weight"), "shape", (1024, 768))
    shape = {"n_layer": len(layers), "n_head": 12, "n_embd": columns, "seq_len": rows}
    config = _read_config(folder, shape)
    named = config.get("architectures")
    guess = "gpt2" if named and str(named[0]).startswith("GPT2") else None
    if config.get("model_type", guess) != "gpt2":
        raise ValueError(
            f"{folder}: its model_type is {config.get('model_type')!r}, only 'gpt2' can be loaded"
        )
    try:
        for name, names in CONFIG_NAMES.items():
            said = [config[other] for other in names if other in config]
            shape[name] = int(said[0]) if said else shape[name]
        rates = [float(config.get(f"{part}_pdrop", 0.1)) for part in ("resid", "embd", "attn")]
        vocab_size = int(config.get("vocab_size", VOCAB_SIZE))
    except (TypeError, ValueError):
        raise ValueError(f"{folder}/config.json does not say n_layer, n_head ...") from None
    tanh = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of one function
    allowed = {  # what transformers takes where the file is silent comes first
        "activation_function": tanh,
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "n_inner": (None, 4 * shape["n_embd"]),
    }
    wrong = [
        f"{name} is {config[name]!r} and not {values[0]!r}"
        for name, values in allowed.items()
        if config.get(name, values[0]) not in values
    ]
    if vocab_size < VOCAB_SIZE:
        wrong.append(f"vocab_size is {vocab_size} and not {VOCAB_SIZE}")
    if shape["n_head"] < 1 or shape["n_embd"] % shape["n_head"]:
        wrong.append(f"n_embd {shape['n_embd']} is no multiple of n_head {shape['n_head']}")
    if wrong:
        raise ValueError(f"{folder} is not GPT-2 as published: {', '.join(wrong)}")
    if any(rates):
        return shape, [f"dropout ({max(rates):g} in its config.json): there is none here"]
    return shape, []


def _check_vocabulary(folder: Path) -> list[str]:
    """Raise ValueError if the tokenizer is not GPT-2's: ids would stand for other text."""
    tokens = None
    if (folder / "vocab.json").exists():
        tokens = _read_json(folder / "vocab.json")
    elif (folder / "tokenizer.json").exists():
        model = _read_json(folder / "tokenizer.json").get("model")
        tokens = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(tokens, dict):
        return ["it has no tokenizer files: taken to be GPT-2's"]
    for token, number in vocabulary().items():
        if tokens.get(token) != number:
            raise ValueError(
                f"{folder}: its tokenizer is not GPT-2's ({token!r} has id {tokens.get(token)} and "
                f"not {number}): its token ids would mean other text"
            )
    return []


def _unused(names: list[str]) -> list[str]:
    """Return a sentence for each kind of tensor without a place here, layers counted together."""
    kinds = Counter(re.sub(r"(^|\.)h\.\d+\.", r"\1h.*.", name) for name in names)
    notes = []
    for kind, count in kinds.items():
        mask = kind.endswith(("attn.bias", "attn.masked_bias"))
        why = "a causal mask, made on the fly here" if mask else "no such weight in GPT-2"
        notes.append(f"{kind} ({count} x) is not used: {why}")
    return notes


# --- For training ---------------------------------------------------------------------------------


def for_training(source: str, given: dict, preset: dict, checkpoint_dir) -> tuple[dict, dict]:
    """Return (shape, weights) for a run with the flags in `given`; print what was noted.

    preset: the shape that --model stands for, {} if it was not given. A shorter seq_len crops the
    positions; raise ValueError with both values for what else differs from the source.
    """
    shape, weights, notes = read_pretrained(source, checkpoint_dir)
    for name, value in (preset | {n: given[n] for n in SHAPE if n in given}).items():
        if name == "seq_len" and value < shape[name]:
            positions = weights["transformer.wpe.weight"]
            weights["transformer.wpe.weight"] = positions[:value].clone()
            notes.append(f"{shape[name] - value} of {shape[name]} positions: left out")
            shape = shape | {name: value}
        elif value != shape[name]:
            flag = f"--{name} {value}"
            if name not in given:
                flag = f"--model {given['model']}, with {name} {value},"
            raise ValueError(
                f"{flag} does not fit --init_from {source}, whose model has {name} {shape[name]}: "
                "leave the flag out" + " or lower it" * (name == "seq_len")
            )
    print("\n  ".join([f"--init_from {source}:", *notes]), flush=True)
    return shape, weights
