"""What a person typed: paths with a ~, and how it is said that something in it is wrong."""

import contextlib
import difflib
import os
import re
import shlex

# What other programs call our flags; for the suggestion after a typo.
OTHER_NAMES = {
    "learning_rate": "max_lr",
    "lr": "max_lr",
    "max_iters": "max_steps",
    "num_train_epochs": "epochs",
    "block_size": "seq_len",
    "batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "total_batch_size",
    "warmup_iters": "warmup_steps",
    "eval_interval": "eval_freq",
    "out_dir": "checkpoint_dir",
    "output_dir": "checkpoint_dir",
    "resume_from_checkpoint": "resume",
    "logdir": "tensorboard_dir",
    "log_dir": "tensorboard_dir",
}


def path(text: str) -> str:
    """Return `text` with ~ and ~name as home folders, wherever the shell left them alone.

    Raise ValueError where ~ means nothing: no HOME, and no such user.
    """
    expanded = os.path.expanduser(text)
    if expanded == text and re.match("~(/|$)", text):
        raise ValueError("~ means nothing here, HOME is not set: write the whole path")
    return expanded


def paths(text: str) -> str:
    """Do as `path` for a text of several: "~/a:0.7 ~/b:0.3"."""
    return re.sub(r"(?<!\S)~[^/\s:]*", lambda tilde: path(tilde[0]), text)


def shown(value) -> str:
    """Return a value as one would type it in a shell."""
    return shlex.quote(str(value))


def wrong(name: str, value, problem) -> ValueError:
    """Return the error that says it of --name: first the flag and its value, then the problem."""
    return ValueError(f"--{name} {shown(value)}: {problem}")


@contextlib.contextmanager
def about(name: str, value):
    """Say of --name what goes wrong inside, unless that speaks of a flag already."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
        if text.startswith("--"):
            raise
        for begin in (f"{value}: ", f"{value} "):
            text = text.removeprefix(begin)
        raise wrong(name, value, text) from None


def nearest(word: str, known) -> str:
    """Return "; did you mean X?" with the most similar of the names, "" where none is near."""

    def bare(name: str) -> str:
        return name.strip("-").lower().replace("-", "_")

    names = {bare(name): name for name in known}
    if OTHER_NAMES.get(bare(word)) in names:
        near = [OTHER_NAMES[bare(word)]]
    else:
        ratio = {n: difflib.SequenceMatcher(None, bare(word), n).ratio() for n in names}
        limit = max(0.6, max(ratio.values()) - 0.03)
        near = [n for n in names if ratio[n] >= limit]
    return f"; did you mean {' or '.join(names[n] for n in near)}?" if near else ""
