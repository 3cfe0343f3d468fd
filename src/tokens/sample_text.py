"""A small corpus to begin with: Charles Dickens, David Copperfield, as sample_book.jsonl.gz.

One chapter a line; quotation marks and dashes are written in ASCII, as most typed text has them.
The book is in the public domain (NOTICE).
"""

import gzip
import json
import tempfile
from pathlib import Path

import numpy as np

from basics.durable import flush_folder
from tokens.shards import DTYPE, MANIFEST, write_manifest, write_shard
from tokens.tokenizer import EOT, VOCAB_SIZE, fingerprint, get_tokenizer

SAMPLE_BOOK = Path(__file__).with_name("sample_book.jsonl.gz")
HELD_OUT = 15  # every 15th chapter is validation


def sample_corpus(folder: str | Path) -> None:
    """Make `folder` with the sample book's tokens, a document for each chapter; always the same.

    The folder appears whole or not at all; one that another process built meanwhile is kept.
    Raise ValueError if it cannot be written.
    """
    folder = Path(folder)
    encode = get_tokenizer().encode_ordinary
    with gzip.open(SAMPLE_BOOK) as lines:
        chapters = [json.loads(line)["text"] for line in lines]
    documents = [np.array([EOT, *encode(text)], DTYPE) for text in chapters]
    val = documents[HELD_OUT - 1 :: HELD_OUT]
    del documents[HELD_OUT - 1 :: HELD_OUT]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            building = Path(temporary, folder.name)
            building.mkdir()
            shards = []
            for split, mine in (("train", documents), ("val", val)):
                path = building / f"sample_{split}_000000.bin"
                entry = write_shard(path, np.concatenate(mine))
                shards.append({**entry, "split": split, "documents": len(mine)})
            manifest = {
                "version": 1,
                "tokenizer": "gpt2",
                "tokenizer_fingerprint": fingerprint(),
                "vocab_size": VOCAB_SIZE,
                "source": "Charles Dickens, David Copperfield",
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
