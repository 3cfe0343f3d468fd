"""A small corpus from text that every Python installation carries."""

import ast
import importlib.util
import re
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from basics.durable import flush_folder
from tokens.shards import DTYPE, MANIFEST, write_manifest, write_shard
from tokens.tokenizer import EOT, VOCAB_SIZE, fingerprint, get_tokenizer

# --- Sample corpus --------------------------------------------------------------------------------

SAMPLE_PACKAGES = ("numpy", "torch", "networkx")  # torch needs the last: all three are there
SAMPLE_SKIPS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages"}
SAMPLE_LEAST = 200_000  # tokens below which there is no point in training


def sample_corpus(folder: str | Path, roots: list[Path] | None = None) -> None:
    """Build a small English corpus from the documentation in this Python installation: the language
    reference that help() shows, and the docstrings of the standard library and a few packages.

    The same for the same versions. A document is a topic or a module; every 20th is validation.
    The folder appears whole or not at all; one that another process built meanwhile is kept.
    roots: folders of Python files, the standard library first (default: those installed).
    ValueError if there is too little text (a stripped distribution).
    """
    folder = Path(folder)
    roots = roots or _documentation()
    splits: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    encode = get_tokenizer().encode_ordinary
    for number, text in enumerate(_sample_documents(roots)):
        tokens = np.array([EOT, *encode(text)], DTYPE)
        splits["val" if number % 20 == 19 else "train"].append(tokens)
    total = sum(len(tokens) for documents in splits.values() for tokens in documents)
    if total < SAMPLE_LEAST:
        raise ValueError(
            f"no data prepared, and this Python installation carries only {total:,} tokens of "
            f"documentation, too little for a sample corpus ({SAMPLE_LEAST:,}): prepare data with "
            "python src/prepare_data.py --source FILES, and give it as --data_dir"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            building = Path(temporary, folder.name)
            building.mkdir()
            shards = []
            for split, documents in splits.items():
                path = building / f"sample_{split}_000000.bin"
                entry = write_shard(path, np.concatenate(documents))
                shards.append({**entry, "split": split, "documents": len(documents)})
            manifest = {
                "version": 1,
                "tokenizer": "gpt2",
                "tokenizer_fingerprint": fingerprint(),
                "vocab_size": VOCAB_SIZE,
                "source": f"documentation in Python {sys.version.split()[0]} and its packages",
                "shards": shards,
            }
            write_manifest(building, manifest)
            building.rename(folder)
            flush_folder(folder.parent)
    except OSError as error:
        if not (folder / MANIFEST).exists():  # else another process was faster
            raise ValueError(
                f"the sample corpus cannot be written to {folder} ({error.strerror}): make room "
                "there, or give another --data_dir"
            ) from None


def _documentation() -> list[Path]:
    """Folders of the standard library and of SAMPLE_PACKAGES; found, not imported."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in SAMPLE_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots.append(Path(spec.submodule_search_locations[0]))
    return roots


def _sample_documents(roots: list[Path]) -> Iterator[str]:
    """Documents of the sample corpus in a fixed order. Files are parsed, nothing of them is run."""
    topics = roots[0] / "pydoc_data" / "topics.py"
    if topics.exists():
        for node in ast.parse(topics.read_bytes()).body:
            if isinstance(node, ast.Assign):
                for _, text in sorted(ast.literal_eval(node.value).items()):
                    yield _prose(text)
    seen = set()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if SAMPLE_SKIPS.intersection(parts) or any(re.match("_(?!_init_)", p) for p in parts):
                continue  # tests, installed packages, private modules
            names = [*([] if root == roots[0] else [root.name]), *parts[:-1], path.stem]
            module = ".".join(name for name in names if name != "__init__")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old escape sequences in other people's code
                try:
                    tree = ast.parse(path.read_bytes())
                except (SyntaxError, ValueError, OSError):
                    continue
            texts = []
            for name, doc in _docstrings(tree, module):
                prose = _prose(doc)
                if len(prose) >= 80 and prose not in seen:
                    seen.add(prose)
                    texts.append(f"{name}\n\n{prose}")
            if sum(map(len, texts)) >= 400:
                yield "\n\n\n".join(texts)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module or class and what is defined in it, in source order."""
    doc = ast.get_docstring(node)
    if doc:
        yield name, doc
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child, f"{name}.{child.name}")


def _prose(text: str) -> str:
    """The paragraphs that are sentences, their lines unindented and joined; no interpreter
    sessions, tables, code or grammar."""
    kept = [p for p in re.split(r"\n\s*\n", text.strip("\n")) if _is_prose(p)]
    text = re.sub(r"(?m)^[ \t]+|[ \t]+$", "", "\n\n".join(kept))
    return re.sub(r"(?m)^(.{40,})\n(?=\w)", r"\1 ", text)


def _is_prose(paragraph: str) -> bool:
    words = paragraph.strip()
    if re.match(r">>>|\.\. |\+-|\|", words):
        return False
    return sum(c.isalpha() or c == " " for c in words) >= 0.85 * len(words) > 0
