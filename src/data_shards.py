"""Look at a folder of token shards and verify it.

    python src/data_shards.py DIR            what is in a folder of shards, and what is wrong
    python src/data_shards.py DIR --verify   the same, and recompute every shard's SHA-256

The files themselves: tokens/shards.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from basics import terminal  # says what is not installed

# isort: split
import itertools
from collections.abc import Iterator

import numpy as np

from basics import inputs
from tokens.shards import DTYPE, MANIFEST, Shard, list_shards, open_shard, verify
from tokens.tokenizer import EOT, VOCAB_SIZE, get_tokenizer

LOOK_BLOCK = 1 << 20  # tokens per piece that the summary reads
LOOK_BLOCKS = 64  # pieces per split; where there are more, these are spread evenly and it says so
ZERO_RUN = 1024  # ids 0 ("!") in a row; text never has two, since "!!" is a token of its own


def look(folder: str | Path) -> list[str]:
    """Print what a folder of shards holds; return the problems found, each a sentence."""
    problems: list[str] = []
    for split in ("train", "val"):
        try:
            found = list_shards(folder, split)
        except ValueError as error:
            if str(error) not in problems:
                problems.append(str(error))
            continue
        shards = []
        for path, entry in found:
            try:
                shards.append(open_shard(path, entry))
            except ValueError as error:
                problems.append(str(error))
        if shards:
            _look_at_split(split, shards, problems)
    return problems


def _look_at_split(split: str, shards: list[Shard], problems: list[str]) -> None:
    total = sum(shard.tokens for shard in shards)
    print(f"{split}: {total:,} tokens in {_count(len(shards), 'shard')}")
    for kind in sorted({shard.format for shard in shards}):
        mine = [shard for shard in shards if shard.format == kind]
        names = mine[0].path.name + (f" ... {mine[-1].path.name}" if len(mine) > 1 else "")
        sizes = sorted({shard.tokens for shard in mine})
        spread = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
        print(f"  files       {names}: {kind}, {spread} tokens each")
    for a, b in itertools.pairwise(shards):
        if a.sha256 is not None and a.sha256 == b.sha256:
            problems.append(f"shards {a.path} and {b.path.name} have the same content")

    # Read all of it, or pieces spread evenly.
    pieces = [(s, begin) for s in shards for begin in range(0, s.tokens, LOOK_BLOCK)]
    everything = len(pieces) <= LOOK_BLOCKS
    if not everything:
        picks = [i * (len(pieces) - 1) // (LOOK_BLOCKS - 1) for i in range(LOOK_BLOCKS)]
        pieces = [pieces[i] for i in picks]
    seen = np.zeros(1 << 16, np.int64)
    texts = []
    accused = set()  # shards with a problem already named
    for shard, begin in pieces:
        count = min(LOOK_BLOCK, shard.tokens - begin)
        tokens = np.fromfile(shard.path, DTYPE, count, offset=shard.offset + 2 * begin)
        seen += np.bincount(tokens, minlength=len(seen))
        for what in _wrong_tokens(tokens, begin):
            if shard.path not in accused:
                accused.add(shard.path)
                problems.append(f"shard {shard.path}: {what}; prepare or fetch it again")
        texts.append(tokens)
    if everything:  # the last document has no <|endoftext|> after it
        texts = [np.append(np.concatenate(texts), DTYPE.type(EOT))]
    lengths = np.concatenate([np.diff(np.flatnonzero(text == EOT)) - 1 for text in texts])

    read = int(seen.sum())
    if not everything:
        print(
            f"  sampled     {LOOK_BLOCKS} pieces of {LOOK_BLOCK:,} tokens, {read / total:.1%} of "
            "the split; what follows was seen there"
        )
    recorded = [shard.documents for shard in shards]
    documents, about = int(seen[EOT]), ""
    if None not in recorded:
        documents = sum(recorded)
    elif not everything:
        documents, about = round(documents / read * total), "about "
    line = f"  documents   {about}{documents:,}"
    if len(lengths):
        low, middle, high = np.quantile(lengths, (0.05, 0.5, 0.95)).astype(int).tolist()
        line += (
            f"; tokens in one: median {middle:,}, from {low:,} (5%) to {high:,} (95%), "
            f"longest {lengths.max():,}"
        )
    elif not seen[EOT]:
        line += ": no <|endoftext|> anywhere, documents run into each other"
    print(line)
    used = int(np.count_nonzero(seen[:VOCAB_SIZE]))
    decode = get_tokenizer().decode_single_token_bytes
    top = [i for i in np.argsort(-seen[:VOCAB_SIZE], kind="stable")[:8].tolist() if seen[i]]
    often = ", ".join(f"'{_safe(decode(i))}' {seen[i] / read:.1%}" for i in top)
    print(f"  vocabulary  {used:,} of {VOCAB_SIZE:,} ids; most frequent: {often}")
    for at in (0, total // 3, 2 * total // 3):  # snippets: the next document from there
        for shard in shards:
            if at < shard.tokens:
                break
            at -= shard.tokens
        tokens = np.fromfile(shard.path, DTYPE, 1 << 14, offset=shard.offset + 2 * at)
        ends = np.flatnonzero(tokens[:-60] == EOT)
        first = int(ends[0]) + 1 if len(ends) else 0
        tokens = tokens[first : first + 60]
        text = get_tokenizer().decode_bytes(tokens[tokens < VOCAB_SIZE].tolist())
        print(f"  {shard.path.name}, from token {at + first:,}:\n    {_safe(text)}")


def _wrong_tokens(tokens: np.ndarray, begin: int) -> Iterator[str]:
    if tokens.max() >= VOCAB_SIZE:
        at = int((tokens >= VOCAB_SIZE).argmax())
        yield f"token {begin + at:,} is {tokens[at]}, beyond GPT-2's last id {EOT}"
    rows = tokens[: len(tokens) // ZERO_RUN * ZERO_RUN].reshape(-1, ZERO_RUN)
    zero = ~rows.any(axis=1)
    if zero.any():
        at = begin + int(zero.argmax()) * ZERO_RUN
        yield f"nothing but zeros from token {at:,} on, as after a power cut or a sparse copy"


def _safe(text: bytes) -> str:
    """Return bytes of a corpus as one line that no terminal takes for a command."""
    decoded = text.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in decoded)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


@terminal.command
def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 nothing wrong, 1 problems found, 2 wrong usage."""
    parser = terminal.Parser(
        description="Say what is in a folder of token shards, and what is wrong with it."
    )
    parser.add_argument("folder", metavar="DIR", type=inputs.path, help="folder of shards")
    text = "read every shard in full: SHA-256 against the manifest, and every token id"
    parser.add_argument("--verify", action="store_true", help=text)
    args = parser.parse_args(argv)
    folder = Path(args.folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}: give a folder of shards")
    problems = look(folder)
    if args.verify and not problems:
        try:
            verify([str(folder)])
        except ValueError as error:
            problems = [str(error)]
        else:
            said = f"every token id is GPT-2's; there is no {MANIFEST} to compare checksums with"
            if (folder / MANIFEST).exists():
                said = f"every shard has the SHA-256 of its {MANIFEST}"
            print(said)
    for problem in problems:
        print(f"PROBLEM {problem}")
    if not problems:
        print("no problem found")
    terminal.check_output()
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
