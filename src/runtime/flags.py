"""A dataclass whose fields are the command line's flags and the keys of a configuration file."""

import argparse
import dataclasses
import difflib
import json
import os
import tomllib

from basics import terminal

# What other training programs call them; for the suggestion after a typo.
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
}


def flag(
    default,
    help,
    *,
    group=None,
    choices=None,
    resume="hyper",
    least=0,
    above=None,
    several=False,
    in_file=True,
    overrides=(),
):
    """A field that is a flag; its annotation (int, float, str, bool, or one `| None`) is its type.

    `resume` says where a resumed run takes the value from when the flag is not given: "hyper" the
    checkpoint; "exact" the checkpoint, if device type and process count are the same; "machine"
    the default. `group` opens a new group in --help with this field. Numbers must be at least
    `least`, or more than `above` where that is given (`check_ranges`). A text with `several` may
    be given as several words; they are joined by blanks. Without `in_file` it is for the command
    line only. `overrides` names what a configuration file no longer decides when this flag is on
    the command line, or is a function (the file's values, the flag's value) -> the file's values.
    """
    metadata = {"help": help, "group": group, "choices": choices, "resume": resume}
    metadata |= {"least": least, "above": above, "several": several}
    metadata |= {"in_file": in_file, "overrides": overrides}
    return dataclasses.field(default=default, metadata=metadata)


def kind_of(field) -> type:
    """int, float, str or bool."""
    return getattr(field.type, "__args__", (field.type,))[0]


# --- The command line -----------------------------------------------------------------------------


def parse_flags(config_class, description: str, argv: list[str]) -> dict:
    """What was given, {name: value}: flags over the file of --config.

    A wrong one ends the program with exit code 2 and a sentence.
    """
    parser = terminal.Parser(
        description=description,
        epilog="[in brackets]: what is decided when the flag is not given",
        usage="%(prog)s [--FLAG VALUE ...]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    group, known = parser, ["--help"]
    for name, field in fields.items():
        meta = field.metadata
        if meta["group"]:
            group = parser.add_argument_group(meta["group"])
        kind = kind_of(field)
        text = meta["help"].replace("%", "%%")
        if field.default is False:
            text += " [off]"
        elif field.default is not None:
            text += f" [{field.default}]"
        if kind is bool:
            negatable = field.default is None or meta["resume"] == "hyper"
            action = argparse.BooleanOptionalAction if negatable else "store_true"
            added = group.add_argument(f"--{name}", action=action, help=text)
        elif meta["several"]:
            added = group.add_argument(f"--{name}", nargs="+", metavar="STR", help=text)
        elif meta["choices"]:
            choices = meta["choices"]
            added = group.add_argument(
                f"--{name}", type=_choice(choices), choices=choices, help=text
            )
        else:
            metavar = kind.__name__.upper()
            added = group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
        known += added.option_strings
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions: answer, and never train
        import argcomplete

        argcomplete.autocomplete(parser)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        words = [word.split("=")[0] for word in unknown if word.startswith("-")] or unknown
        parser.error(f"unrecognized argument: {' '.join(words)}{nearest(words[0], known)}")
    given = vars(namespace)
    given = {name: " ".join(v) if isinstance(v, list) else v for name, v in given.items()}
    if "config" in given:
        try:
            from_file = read_config(config_class, given["config"])
        except ValueError as error:
            parser.error(str(error))
        for name, value in given.items():
            overrides = fields[name].metadata["overrides"]
            if callable(overrides):
                from_file = overrides(from_file, value)
            else:
                from_file = {k: v for k, v in from_file.items() if k not in overrides}
        given = from_file | given
    return given


def _choice(choices):
    def choice(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(
                f"{text!r} is none of {', '.join(choices)}{nearest(text, choices)}"
            )
        return text

    return choice


def nearest(word: str, known) -> str:
    """ "; did you mean X?" with the most similar of the names, "" where none is near."""

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


# --- The configuration file -----------------------------------------------------------------------


def read_config(config_class, path: str) -> dict:
    """The flags in a TOML file, {name: value}; ValueError names file, key and value."""
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # also bytes that are no UTF-8
        raise ValueError(f"--config {path}: is not TOML ({error})") from None
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    known = [name for name, field in fields.items() if field.metadata["in_file"]]
    for name, value in values.items():
        if name in fields and name not in known:
            raise ValueError(f"--config {path}: {name} is for the command line only")
        if name not in fields:
            what = "keys are flags, without [tables]" if isinstance(value, dict) else "no such key"
            raise ValueError(f"--config {path}: {name}: {what}{nearest(name, known)}")
        try:
            values[name] = _checked(fields[name], value)
        except ValueError as error:
            raise ValueError(f"--config {path}: {name} = {_literal(value):.80}: {error}") from None
    return values


def _checked(field, value):
    """A value of TOML as the field's type; ValueError says what it must be."""
    kind, meta = kind_of(field), field.metadata
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if meta["several"] and isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = " ".join(value)
    names = {int: "a whole number", float: "a number", str: "a text in quotes"}
    if type(value) is not kind:
        raise ValueError(f"must be {names.get(kind, 'true or false')}")
    choices = meta["choices"]
    if choices and value not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}{nearest(value, choices)}")
    if wrong := _out_of_range(field, value):
        raise ValueError(wrong)
    return value


def _literal(value) -> str:
    """A value as TOML writes it."""
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but for the one character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else str(value)  # 6e-05, 600


def to_toml(config, title: str) -> str:
    """A configuration as a file that `read_config` reads back to the same values.

    What is None stands there as a comment: TOML has no None, and a key left out means the same.
    """
    lines = [f"# {title}"]
    for field in dataclasses.fields(config):
        value, meta = getattr(config, field.name), field.metadata
        if not meta["in_file"]:
            continue
        if meta["group"]:
            lines += ["", f"# {meta['group']}"]
        if value is None:
            lines.append(f"# {field.name}: {meta['help']}")
        else:
            lines.append(f"{field.name} = {_literal(value)}")
    return "\n".join(lines) + "\n"


# --- Values ---------------------------------------------------------------------------------------


def merge(config_class, given: dict, saved: dict | None, same_machine: bool, stale: set[str]):
    """Flags over checkpoint over defaults -> (config, sentences that say what changed).

    given: flags of this command. saved: the checkpoint's config, or None. stale: names whose saved
    value was derived from something that is given anew.
    """
    fields = dataclasses.fields(config_class)
    values, changes = {f.name: f.default for f in fields}, []
    for field in fields if saved is not None else ():
        name, resume = field.name, field.metadata["resume"]
        if name in saved and (resume == "hyper" or (resume == "exact" and same_machine)):
            if name not in stale:
                values[name] = saved[name]
            if name in given and given[name] != saved[name]:
                changes.append(f"--{name}: {saved[name]} -> {given[name]}")
    return config_class(**(values | given)), changes


def check_ranges(config) -> None:
    """ValueError naming the flag, its value and what it may be; undecided (None) values pass."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if wrong := _out_of_range(field, value):
            raise ValueError(f"--{field.name} {value}: {wrong}")


def _out_of_range(field, value) -> str | None:
    meta = field.metadata
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if meta["above"] is not None and not value > meta["above"]:
        return f"must be more than {meta['above']}"
    if not value >= meta["least"] or value == float("inf"):
        return f"must be a number of {meta['least']} or more"
    return None
