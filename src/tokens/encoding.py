"""Documents to tokens: exact and fast, in bounded memory whatever a text looks like."""

import functools
import re
from collections import Counter

import numpy as np
import tiktoken

from tokens.tokenizer import EOT, get_tokenizer

EOT_TEXT = "<|endoftext|>"
NO_TOKENS = np.empty(0, np.uint16)
BATCH = 1 << 15  # characters of text that are encoded in one call, about
LONG_RUN = 1 << 17  # characters without a place to cut, from which a text is encoded in windows
SEAM = 256  # tokens that are encoded again where two windows meet

# GPT-2's pattern is '(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s
# and its look-ahead costs 40% of the time. It matters to runs of three or more white spaces and to
# two or more at the end of a text: the pattern's last three parts take all of a run at the end, and
# all but its last character elsewhere, which for runs of one or two is one character at a time.
SIMPLE_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"
ASCII_SPACE = bytes(c in b" \t\n\v\f\r" for c in range(256))
OTHER_SPACE = (  # the rest of Unicode's White_Space, which is \s to tiktoken
    "\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029"
    "\u202f\u205f\u3000"
)
PLACE_TO_CUT = re.compile(r"(?<=\S)[ \n]")


@functools.cache
def encoders() -> tuple[tiktoken.Encoding, tiktoken.Encoding]:
    """Return GPT-2's encoding, and a faster one for texts for which `is_simple` holds."""
    exact = get_tokenizer()
    fast = tiktoken.Encoding(
        "gpt2 for simple texts",
        pat_str=SIMPLE_PATTERN,
        mergeable_ranks=exact._mergeable_ranks,  # as tiktoken's README does it
        special_tokens={EOT_TEXT: EOT},
    )
    return exact, fast


def is_simple(text: str) -> bool:
    """Say if there are no more than two white spaces in a row, and not two at the end.

    Takes a tenth of the encoding's time. Raise UnicodeEncodeError for lone surrogates.
    """
    if b"\1\1\1" in text.encode().translate(ASCII_SPACE):
        return False
    if len(text) > 1 and text[-2:].isspace():
        return False
    if text.isascii() or not any(c in text for c in OTHER_SPACE):
        return True
    return not re.search(r"\s{3}", text)


def encode_documents(texts: list[str], counts: Counter) -> np.ndarray:
    """Return `<|endoftext|>` + encode_ordinary(text) of each document in turn, as uint16."""
    counts["documents"] += len(texts)
    try:
        return _encode_documents(texts)
    except UnicodeEncodeError:  # a lone surrogate: JSON can spell one
        counts["invalid_utf8"] += sum(map(_has_surrogate, texts))
        # what tiktoken itself does in encode_ordinary
        mended = [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
        return _encode_documents(mended)


def _encode_documents(texts: list[str]) -> np.ndarray:
    """Join short documents by the special token and encode them in one call, which saves the cost
    of a call for each. No `<|endoftext|>` can arise between a document and a separator, since that
    string does not overlap itself; a document that contains it is encoded alone, with no special
    token allowed.
    """
    arrays, batch, size = [], [], 0
    for text in texts:
        alone = len(text) >= BATCH or EOT_TEXT in text or not is_simple(text)
        if batch and (alone or size >= BATCH):
            arrays.append(_encode_batch(batch))
            batch, size = [], 0
        if alone:
            arrays += [np.array([EOT], np.uint16), encode_text(text)]
        else:
            batch.append(text)
            size += len(text)
    if batch:
        arrays.append(_encode_batch(batch))
    return np.concatenate(arrays) if arrays else NO_TOKENS


def _encode_batch(texts: list[str]) -> np.ndarray:
    joined = EOT_TEXT + EOT_TEXT.join(texts)
    return encoders()[1].encode_to_numpy(joined, allowed_special={EOT_TEXT}).astype(np.uint16)


def encode_text(text: str) -> np.ndarray:
    """Return encode_ordinary(text) as uint16, in bounded memory and time whatever the text is."""
    arrays, begin = [], 0
    # A piece of GPT-2's pattern always begins before a space that follows something else, and the
    # pattern never looks back: cutting there changes no token.
    while cut := PLACE_TO_CUT.search(text, begin + BATCH):
        arrays.append(_encode_piece(text[begin : cut.start()]))
        begin = cut.start()
    arrays.append(_encode_piece(text[begin:]))
    return np.concatenate(arrays)


def _encode_piece(text: str) -> np.ndarray:
    """Encode a text that has no place to cut, however long.

    tiktoken takes 47 bytes of memory per byte of a "word" of megabytes (2.3 GB for 50 MB of "a")
    and fails on a million spaces before a letter (its regular expression runs out of stack). So
    runs of letters, digits, spaces or signs longer than LONG_RUN are encoded in windows. Still
    exact: a sequence of tokens is the encoding of its bytes if and only if each pair of neighbours
    is the encoding of theirs (shown in the README of GitHub's `bpe` crate), so the encodings of two
    overlapping windows may be joined at any token they share. Each window begins where a token of
    the one before begins, and must begin with that token; otherwise it is made longer.
    """
    windows = []  # of those finished: (begin, the token it had to begin with, tokens)
    begin, expected = 0, None
    for end in _window_ends(text) if len(text) >= LONG_RUN else ():
        tokens = _encode_ordinary(text[begin:end])
        seam, overlap = _seam(tokens)
        if seam and (expected is None or tokens[0] == expected):
            windows.append((begin, expected, tokens[:seam]))
            begin, expected = end - overlap, tokens[seam]
    tokens = _encode_ordinary(text[begin:])
    while expected is not None and tokens[0] != expected:
        begin, expected, _ = windows.pop()
        tokens = _encode_ordinary(text[begin:])
    return np.concatenate([*(window for _, _, window in windows), tokens])


def _encode_ordinary(text: str) -> np.ndarray:
    encoder = encoders()[is_simple(text)]
    return encoder.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)


def _window_ends(text: str):
    """Yield places well inside of long runs of one kind of character (of GPT-2's pattern)."""
    import regex  # comes with tiktoken; the standard library's re does not know \p{L}

    kind = regex.compile(r"\p{L}++|\p{N}++|\p{White_Space}++|[^\p{White_Space}\p{L}\p{N}]++")
    step, run_end = LONG_RUN // 2, 0
    for position in range(0, len(text) - step + 1, step):
        if position + step > run_end:
            run_end = kind.match(text, position).end()
        if position + step < run_end:
            yield position + step


def _seam(tokens: np.ndarray) -> tuple[int, int]:
    """Find a token near the end that begins with a character: (its index, characters from there).

    Return (0, 0) if there is none: all of the last tokens begin inside of a character.
    """
    last = get_tokenizer().decode_tokens_bytes(tokens[-SEAM:].tolist())
    for i, token in enumerate(last):
        if token[0] & 0xC0 != 0x80:  # not a continuation byte of UTF-8
            return len(tokens) - len(last) + i, len(b"".join(last[i:]).decode())
    return 0, 0


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)
