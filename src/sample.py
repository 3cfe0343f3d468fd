"""Talk to a model: it goes on from a prompt, and the text appears while it is written.

    python src/sample.py --prompt "The meaning of life is"     with the newest checkpoint
    python src/sample.py --run_name fineweb                    one prompt after the other
    python src/sample.py --file prompts.txt --out texts.jsonl  a prompt a line, many at once

PyTorch is imported where it is used, so that --help comes at once. How text is generated:
training/generation.py.
"""

import codecs
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from basics import terminal
from checkpointing import run_folders
from runtime.flags import check_ranges, flag, parse_flags
from tokens.tokenizer import EOT, get_tokenizer
from training.generation import stream

# --- Text -----------------------------------------------------------------------------------------


@dataclass
class Options:
    """The fields are the flags; see runtime/flags.py."""

    # fmt: off
    checkpoint: str | None = flag(None,
        "a checkpoint, a run's folder of them, a Hugging Face folder, or a model of the hub as "
        "gpt2 [the newest under checkpoint_dir]", group="model")
    run_name: str | None = flag(None, "the newest checkpoint of this run")
    checkpoint_dir: str = flag("checkpoints", "where runs save")
    device: str | None = flag(None, "cuda, cuda:1, mps or cpu [the best there is]")
    dtype: str = flag("auto", "precision; auto is bfloat16 where the device has it",
        choices=("auto", "float32", "bfloat16", "float16"))

    prompt: str | None = flag(None,
        "what to go on from; '' begins a new document [what is piped in; on a terminal you are "
        "asked]", group="text", several=True)
    file: str | None = flag(None, "a file with a prompt on each line, UTF-8; - is standard input")
    out: str | None = flag(None, "with --file: JSON lines go here, a text each [standard output]")
    num_samples: int = flag(1, "texts for each prompt", least=1)
    max_tokens: int = flag(256, "longest text, in tokens, as far as the context goes", least=1)
    temperature: float = flag(0.8, "below 1 the likely gets likelier; 0 = always the likeliest")
    top_k: int = flag(50, "only the so many likeliest tokens; 0 = all")
    top_p: float = flag(1.0, "only the likeliest tokens that have this share together; 1 = all",
        above=0)
    seed: int = flag(1337, "the same seed, the same texts")
    batch_size: int = flag(16, "with --file: texts written at a time", least=1)
    # fmt: on


class Text:
    """What one row says, as it grows."""

    def __init__(self):
        self.text, self.tokens = "", 0
        self.stop = None  # when it is complete: "endoftext", "max_tokens" or "context"
        self._enc = get_tokenizer()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> None:
        """Append it; of a character that takes several tokens nothing is shown before the last."""
        self.tokens += 1
        self.text += self._decoder.decode(self._enc.decode_single_token_bytes(token))

    def end(self, stop: str) -> None:
        self.text += self._decoder.decode(b"", final=True)
        self.stop = stop


def write(
    model,
    prompts: list[list[int]],
    options: Options,
    generator,
    show: Callable[[list[Text]], None] = lambda texts: None,
) -> list[Text]:
    """Return num_samples texts for each prompt, in their order; `show` sees them grow."""
    lengths = [len(prompt) for prompt in prompts for _ in range(options.num_samples)]
    texts = [Text() for _ in lengths]
    how = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    count, longest = options.num_samples, options.max_tokens
    for tokens in stream(model, prompts, longest, generator, count=count, **how):
        for text, length, token in zip(texts, lengths, tokens, strict=True):
            if token == EOT:
                text.end("endoftext")
            elif token is not None:
                text.add(token)
                if text.tokens == options.max_tokens:
                    text.end("max_tokens")
                elif length + text.tokens == model.seq_len:
                    text.end("context")
        show(texts)
    return texts


def encode(prompt: str, seq_len: int, max_tokens: int) -> tuple[list[int], str | None]:
    """Return token ids that leave room for a text, and a sentence if the prompt was cut for that.

    An empty prompt is <|endoftext|>, after which a document begins; so is that word in a prompt.
    """
    ids = get_tokenizer().encode(prompt, allowed_special="all") or [EOT]
    if len(ids) < seq_len:
        return ids, None
    kept = seq_len - min(max_tokens, seq_len // 2)
    return ids[-kept:], (
        f"the prompt has {len(ids):,} tokens and the model's context {seq_len:,}: only its last "
        f"{kept:,} are read"
    )


# --- The model ------------------------------------------------------------------------------------


def load_model(options: Options):
    """Return (the model that the flags mean, ready to write; sentences about where it is from)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train_improved.py, before torch
    import torch

    import train_improved
    from checkpointing import pretrained
    from runtime import machine

    device = machine.choose_device(options.device)
    dtype = machine.best_dtype(device) if options.dtype == "auto" else options.dtype
    source = options.checkpoint or "latest"
    if options.run_name is not None:
        source = str(run_folder(options))
    # Cast once, instead of at every product: what is read at every token is the weights.
    precision = getattr(torch, dtype)
    model, notes = pretrained.load_model(
        train_improved.GPT, source, device, options.checkpoint_dir, precision
    )
    if model.seq_len < 2:
        raise ValueError(f"{source}: a context of one token leaves no room to write")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"{source}: some weights are not finite in {dtype}, it says nothing")
    return model, [*notes, f"{model.num_params():,} parameters, {dtype} on {device}"]


def run_folder(options: Options) -> Path:
    """Return the folder of --run_name; raise ValueError with the runs that there are."""
    if options.checkpoint is not None:
        raise ValueError("--run_name and --checkpoint both name a model: leave one out")
    folder = run_folders.run_folder(options.checkpoint_dir, options.run_name)
    if not run_folders.list_checkpoints(folder):
        runs = run_folders.run_folders(options.checkpoint_dir)
        names = [run.name for run in runs if run_folders.list_checkpoints(run)]
        there = f"there are: {', '.join(names)}" if names else "there is none of any run"
        raise ValueError(
            f"--run_name {options.run_name}: no checkpoint in {folder}; under "
            f"{options.checkpoint_dir} {there}"
        )
    return folder


# --- The command ----------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print beside the texts, which go to standard output."""
    print(text, file=sys.stderr, flush=True)


def screen(prompt: str, count: int) -> Callable[[list[Text]], None]:
    """Return what shows the texts one below the other, each while it is written: `show` of `write`.

    While the first is written the others grow unseen beside it.
    """
    shown = 0

    def show(texts: list[Text]) -> None:
        nonlocal shown
        said = ""
        for number, text in enumerate(texts, start=1):
            said += f"--- {number} of {count} ---\n" * (count > 1) + prompt + text.text
            if text.stop is None:
                break
            said += "\n"
        sys.stdout.write(said[shown:])
        shown = len(said)
        terminal.check_output()

    return show


def answer(model, prompt: str, options: Options, generator) -> None:
    """Show the texts for one prompt, then say a line about them."""
    ids, cut = encode(prompt, model.seq_len, options.max_tokens)
    if cut:
        say(cut)
    start = time.monotonic()
    texts = write(model, [ids], options, generator, screen(prompt, options.num_samples))
    say(account(texts, time.monotonic() - start, model.seq_len))


def account(texts: list[Text], seconds: float, seq_len: int) -> str:
    """Return how much was written, how fast, and why it ends."""
    reasons = {
        "endoftext": "<|endoftext|>",
        "max_tokens": "--max_tokens",
        "context": f"the context of {seq_len:,} tokens is full",
    }
    stops = [reasons[name] for name in reasons if any(text.stop == name for text in texts)]
    tokens = sum(text.tokens for text in texts)
    return f"[{tokens:,} tokens, {tokens / seconds:.1f} a second; stopped: {', '.join(stops)}]"


def converse(model, options: Options, generator) -> None:
    """Take a prompt from the terminal, write a text, take the next: until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() gets editing keys and a history from it)
    say("Type how a text begins, and Enter. Ctrl-C stops a text, Ctrl-D leaves.")
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not prompt.strip():
            continue
        try:
            answer(model, prompt, options, generator)
        except KeyboardInterrupt:
            print(flush=True)


def read_prompts(path: str) -> list[tuple[int, str]]:
    """Return [(line number, prompt), ...] of the lines that are not blank."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(f"--file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--file {path}: is no UTF-8 text at byte {error.start}") from None
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1)]
    prompts = [(number, line) for number, line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--file {path}: has no line with a prompt")
    return prompts


def open_out(options: Options):
    """Open the file that the JSON lines go to."""
    if options.out is None:
        return contextlib.nullcontext(sys.stdout)
    out = Path(options.out)
    if options.file != "-" and out.exists() and out.samefile(options.file):
        raise ValueError(f"--out {out}: is the file with the prompts, name another")
    try:
        return open(out, "w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror})") from None


def write_file(model, prompts: list[tuple[int, str]], options: Options, generator, out) -> None:
    """Write JSON lines for all prompts of a file, each batch as soon as it is complete."""
    from tqdm import tqdm

    utf8 = out.encoding.lower().startswith("utf")
    size = max(1, options.batch_size // options.num_samples)
    start, all_texts = time.monotonic(), []
    with tqdm(total=len(prompts), unit="prompt", disable=not sys.stderr.isatty()) as bar:
        for first in range(0, len(prompts), size):
            batch, ids = prompts[first : first + size], []
            for number, prompt in batch:
                tokens, cut = encode(prompt, model.seq_len, options.max_tokens)
                ids.append(tokens)
                if cut:
                    tqdm.write(f"line {number}: {cut}", file=sys.stderr)
            texts = write(model, ids, options, generator)
            for i, text in enumerate(texts):
                number, prompt = batch[i // options.num_samples]
                record = {"line": number, "prompt": prompt, "sample": i % options.num_samples}
                record |= {"text": text.text, "tokens": text.tokens, "stop": text.stop}
                out.write(json.dumps(record, ensure_ascii=not utf8) + "\n")
            out.flush()
            terminal.check_output()
            all_texts += texts
            bar.update(len(batch))
    say(account(all_texts, time.monotonic() - start, model.seq_len))


def run(options: Options) -> None:
    """Do what the flags ask for; raise ValueError for what the user has to change."""
    check_ranges(options)
    if options.top_p > 1:
        raise ValueError(f"--top_p {options.top_p}: is a share, at most 1")
    if options.file is not None and options.prompt is not None:
        raise ValueError("--prompt and --file both say what to go on from: leave one out")
    if options.out is not None and options.file is None:
        raise ValueError("--out is for --file: redirect the output of --prompt with >")
    prompts, prompt = None, options.prompt
    if options.file is not None:
        prompts = read_prompts(options.file)
    elif prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n")
        if not prompt:
            raise ValueError("no prompt: give --prompt TEXT or --file FILE, or start on a terminal")
    model, notes = load_model(options)
    for note in notes:
        say(note)

    import torch

    generator = torch.Generator().manual_seed(options.seed)
    if prompts is not None:
        with open_out(options) as out:
            write_file(model, prompts, options, generator, out)
    elif prompt is not None:
        answer(model, prompt, options, generator)
    else:
        converse(model, options, generator)


@terminal.command
def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 2 wrong input, 130 stopped by Ctrl-C."""
    description = (__doc__ or "").rsplit("\n\n", 1)[0]
    run(Options(**parse_flags(Options, description, sys.argv[1:] if argv is None else argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
