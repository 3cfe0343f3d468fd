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
import sys
from collections import Counter
from pathlib import Path

from checkpointing import files, run_folders
from tokens.tokenizer import VOCAB_SIZE, fingerprint, vocabulary

# OpenAI's models, as GPT-2's users call them.
ALIASES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
SHAPE = ("n_layer", "n_head", "n_embd", "seq_len")


def read_pretrained(source: str, checkpoint_dir="checkpoints") -> tuple[dict, dict, list[str]]:
    """(shape, weights, notes) of a model, on the CPU in float32.

    source: "latest" (of `checkpoint_dir`), a checkpoint file, a run's folder of them, a Hugging
    Face folder, an alias or an id of the hub. What is here on disk goes before the hub.
    shape: n_layer, n_head, n_embd, seq_len. weights: a state dict with the names and layout of
    train_improved.GPT; tensors may share memory. notes: sentences, where it is from and what did
    not fit. ValueError: not found, damaged, not reachable, or another kind of model.
    """
    path, notes = find(source, checkpoint_dir)
    read = _from_hugging_face if path.is_dir() else _from_checkpoint_file
    shape, weights, more = read(path)
    return shape, weights, notes + more


# --- Finding --------------------------------------------------------------------------------------


def find(source: str, checkpoint_dir="checkpoints") -> tuple[Path, list[str]]:
    """The checkpoint file or Hugging Face folder that `source` means, downloaded if need be."""
    if source == "latest" or Path(source).exists():
        path, skipped = find_here(source, checkpoint_dir)
        notes = [f"skipped {bad}: {reason}" for bad, reason in skipped]
        return path, notes + [f"{path}, a Hugging Face folder"] * path.is_dir()
    repository = ALIASES.get(source, source)
    if not re.fullmatch(r"[\w.-]*\w(/\w[\w.-]*)?", repository) or repository.endswith(".pt"):
        raise ValueError(f"{source} does not exist")
    return from_hub(source, repository)


def find_here(source: str, checkpoint_dir="checkpoints") -> tuple[Path, list[tuple[Path, str]]]:
    """(path, [(damaged file, reason), ...]) for "latest", a file, a run's or an HF folder."""
    if source == "latest":
        path, skipped = run_folders.find_latest_anywhere(checkpoint_dir)
        if path is None:
            raise ValueError(f"no checkpoint under {checkpoint_dir}/ yet: train, or name a file")
        return path, skipped
    path = Path(source)
    if not path.is_dir() or is_hugging_face(path):
        return path, []
    newest, skipped = run_folders.find_latest(path)
    if newest is None:
        raise ValueError(
            f"{source} holds neither a checkpoint (step_*.pt) that is whole nor a Hugging Face "
            "model (config.json and model.safetensors)"
        )
    return newest, skipped


def is_hugging_face(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


# --- The hub --------------------------------------------------------------------------------------

FILES = ("config.json", "vocab.json", "model.safetensors")
INDEX = "model.safetensors.index.json"  # of a model in several files:
PARTS = re.compile(r"model-\d+-of-\d+\.safetensors")


def from_hub(source: str, repository: str) -> tuple[Path, list[str]]:
    """The folder of a model of the Hugging Face hub in its cache (HF_HOME), fetched if need be.

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
            assert is_hugging_face(Path(folder))
        except Exception:
            reason = next(iter(str(e).splitlines()), "")
            raise ValueError(
                f"{nothing_here} the Hugging Face hub cannot be reached ({type(e).__name__}: "
                f"{reason}): connect this machine, or bring the model's folder here and name it"
            ) from None
        return Path(folder), [f"{repository}: the hub cannot be reached, the cached copy is used"]
    wanted = {
        file.rfilename: file.size or 0
        for file in found.siblings
        if file.rfilename in (*FILES, INDEX) or PARTS.fullmatch(file.rfilename)
    }
    if "model.safetensors" in wanted:
        wanted = {name: size for name, size in wanted.items() if name in FILES}
    if "config.json" not in wanted or not any(n.endswith(".safetensors") for n in wanted):
        raise ValueError(
            f"{repository} has no config.json and model.safetensors on the hub: load it with "
            "transformers, save_pretrained it to a folder, and name that"
        )
    missing = sum(
        size
        for name, size in wanted.items()
        if not isinstance(
            huggingface_hub.try_to_load_from_cache(repository, name, revision=found.sha), str
        )
    )
    if missing:
        print(
            f"downloading {repository} from the hub: {missing / 1e6:,.1f} MB",
            file=sys.stderr,
            flush=True,
        )
    try:
        folder = huggingface_hub.snapshot_download(repository, allow_patterns=list(wanted))
    except Exception as e:  # cut off, no space...
        reason = next(iter(str(e).splitlines()), "")
        raise ValueError(
            f"{repository} could not be downloaded ({type(e).__name__}: {reason}): try again, what "
            "has arrived is kept"
        ) from None
    return Path(folder), [f"{repository} on the Hugging Face hub, revision {Path(folder).name}"]


# --- Shapes and names -----------------------------------------------------------------------------

TRANSPOSED = ("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face's Conv1D


def parameter_shapes(n_layer: int, n_head: int, n_embd: int, seq_len: int) -> dict[str, tuple]:
    """Every parameter of train_improved.GPT but lm_head.weight, which is wte's."""
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
    """ValueError unless `found` {name: shape} has all parameters in their shapes."""
    expected = parameter_shapes(**shape)
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, first {missing[0]}")
    for name, wanted in expected.items():
        if tuple(found[name]) != wanted:
            raise ValueError(f"{name} has shape {tuple(found[name])} instead of {wanted}")


# --- Our checkpoints ------------------------------------------------------------------------------


def _from_checkpoint_file(path: Path) -> tuple[dict, dict, list[str]]:
    checkpoint = files.load(path)
    shape, weights = from_checkpoint(checkpoint, path)
    return shape, weights, [f"{path}, step {checkpoint['step']:,}"]


def from_checkpoint(checkpoint: dict, path) -> tuple[dict, dict]:
    """(shape, weights) of a loaded checkpoint of train_improved.py; ValueError if it is none."""
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


# --- Hugging Face folders -------------------------------------------------------------------------


def _from_hugging_face(folder: Path) -> tuple[dict, dict, list[str]]:
    """A folder with config.json and model.safetensors, as transformers writes it."""
    import safetensors
    import torch

    config = _read_json(folder / "config.json")
    shape, notes = _check_config(folder, config)
    notes += _check_vocabulary(folder)
    tensors, unused, dtypes = {}, [], Counter()
    expected = parameter_shapes(**shape)
    try:
        for part in _weight_files(folder):
            with safetensors.safe_open(part, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118 (it is no dict)
                    name = stored
                    if not stored.startswith(("transformer.", "lm_head.")):
                        name = f"transformer.{stored}"  # OpenAI's own, on the hub
                    if name not in expected and name != "lm_head.weight":
                        unused.append(stored)
                        continue
                    tensor = file.get_tensor(stored)
                    dtypes[str(tensor.dtype).removeprefix("torch.")] += 1
                    if name.endswith(TRANSPOSED):
                        tensor = tensor.T
                    tensors[name] = tensor.to(torch.float32).contiguous()
    except (safetensors.SafetensorError, OSError) as e:
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise ValueError(f"{folder} is damaged or cannot be read: {reason}") from None

    wte = "transformer.wte.weight"
    head = tensors.pop("lm_head.weight", None)
    if head is not None and wte in tensors and not torch.equal(head, tensors[wte]):
        raise ValueError(
            f"{folder}: its output matrix (lm_head.weight) differs from its embedding, in GPT-2 "
            "they are one matrix: it cannot be loaded here"
        )
    rows = len(tensors[wte]) if wte in tensors else VOCAB_SIZE
    if rows > VOCAB_SIZE:
        tensors[wte] = tensors[wte][:VOCAB_SIZE].clone()
        notes.append(f"{rows - VOCAB_SIZE} rows of the vocabulary beyond {VOCAB_SIZE:,}: left out")
    try:
        _check_tensors({name: t.shape for name, t in tensors.items()}, shape)
    except ValueError as e:
        raise ValueError(f"{folder} is not a whole GPT-2: {e}") from None
    for dtype, count in dtypes.items():
        if dtype != "float32":
            notes.append(f"{count} tensors in {dtype}: made float32")
    notes += _unused(unused)
    return shape, tensors | {"lm_head.weight": tensors[wte]}, notes


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the parts that the index of a larger model names."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / INDEX
    if not index.exists():
        raise ValueError(f"{folder} has parts of a model, but no {index.name} that names them")
    names = sorted({str(name) for name in _read_json(index).get("weight_map", {}).values()})
    if not names or not all(PARTS.fullmatch(name) for name in names):
        raise ValueError(f"{index} is damaged: no names of parts")
    return [folder / name for name in names]


def _check_config(folder: Path, config: dict) -> tuple[dict, list[str]]:
    """Shape and notes; ValueError names everything that makes it another model than GPT-2."""
    if config.get("model_type") != "gpt2":
        raise ValueError(
            f"{folder}: its model_type is {config.get('model_type')!r}, only 'gpt2' can be loaded"
        )
    try:
        shape = {name: int(config[name]) for name in ("n_layer", "n_head", "n_embd")}
        shape["seq_len"] = int(config["n_positions"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{folder}/config.json does not say n_layer, n_head ...") from None
    tanh = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of one function
    allowed = {  # what transformers takes where the file is silent comes first
        "activation_function": tanh,
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "n_inner": (None, 4 * shape["n_embd"]),
    }
    wrong = [
        f"{name} is {config[name]!r} and not {values[0]!r}"
        for name, values in allowed.items()
        if config.get(name, values[0]) not in values
    ]
    if config.get("vocab_size", VOCAB_SIZE) < VOCAB_SIZE:
        wrong.append(f"vocab_size is {config['vocab_size']} and not {VOCAB_SIZE}")
    if wrong:
        raise ValueError(f"{folder} is not GPT-2 as published: {', '.join(wrong)}")
    rates = [config.get(f"{part}_pdrop", 0.1) for part in ("resid", "embd", "attn")]
    if any(rates):
        return shape, [f"dropout ({max(rates):g} in its config.json): there is none here"]
    return shape, []


def _check_vocabulary(folder: Path) -> list[str]:
    """ValueError if the folder's tokenizer is not GPT-2's: ids would stand for other text."""
    tokens = None
    if (folder / "vocab.json").exists():
        tokens = _read_json(folder / "vocab.json")
    elif (folder / "tokenizer.json").exists():
        tokens = _read_json(folder / "tokenizer.json").get("model", {}).get("vocab")
    if tokens is None:
        return ["it has no tokenizer files: taken to be GPT-2's"]
    for token, number in vocabulary().items():
        if tokens.get(token) != number:
            raise ValueError(
                f"{folder}: its tokenizer is not GPT-2's ({token!r} has id {tokens.get(token)} and "
                f"not {number}): its token ids would mean other text"
            )
    return []


def _unused(names: list[str]) -> list[str]:
    """A sentence for each kind of tensor that has no place here, layers counted together."""
    kinds = Counter(re.sub(r"(^|\.)h\.\d+\.", r"\1h.*.", name) for name in names)
    notes = []
    for kind, count in kinds.items():
        mask = kind.endswith(("attn.bias", "attn.masked_bias"))
        why = "a causal mask, made on the fly here" if mask else "no such weight in GPT-2"
        notes.append(f"{kind} ({count} x) is not used: {why}")
    return notes


# --- For training ---------------------------------------------------------------------------------


def for_training(source: str, given: dict, preset: dict, checkpoint_dir) -> tuple[dict, dict]:
    """(shape, weights) for a run with the flags in `given`; prints what `read_pretrained` notes.

    preset: the shape that --model stands for, {} if it was not given. A shorter seq_len crops the
    positions; what else differs from the source is a ValueError that names both values.
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
