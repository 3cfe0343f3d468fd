"""A dataclass whose fields are the command line's flags and the keys of a configuration file."""

import argparse
import dataclasses
import json
import os
import shlex
import tomllib

from basics import inputs, terminal

# Where a resume takes the value of a flag from that is not given again.
CHECKPOINT = "the checkpoint"
SAME_MACHINE = "the checkpoint, if device type and number of processes are the same"
COMMAND = "the command"  # so: the default
BELOW = 2**63  # whole numbers: what files, tensors and random number generators hold


def flag(
    default,
    help,
    *,
    group=None,
    choices=None,
    resume=CHECKPOINT,
    learned=None,
    derived_from="",
    least=0,
    above=None,
    several=False,
    path=False,
    in_file=True,
    overrides=(),
):
    """Return a field that is a flag; its annotation (int, float, str, bool, `| None`) is its type.

    group: opens a new group in --help with this field. resume: where a resume takes the value from
    when the flag is not given again. learned: the value changes what the model learns; unless said
    otherwise that is so for what a resume does not take from the command. derived_from: names of
    the flags that decide the value when it is not given; a resume derives it again when one of
    them changes. Numbers must be at least `least`, or more than `above` where that is given
    (`out_of_range`). several: may be given as several words, or as a list in the file; "again": the
    flag also several times, where otherwise the last one counts. Kept as words of a shell. path: ~
    is a home folder. Without in_file it is for the command line only. overrides: names of what a
    file, or the checkpoint of a resume, no longer decides when this flag is on the command line,
    or a function (the file's values, the flag's value) -> the file's values.
    """
    metadata = {"help": help, "group": group, "choices": choices, "resume": resume}
    metadata["learned"] = resume != COMMAND if learned is None else learned
    metadata |= {"derived_from": set(derived_from.split()), "least": least, "above": above}
    metadata |= {"several": several, "path": path, "in_file": in_file, "overrides": overrides}
    return dataclasses.field(default=default, metadata=metadata)


def kind_of(field) -> type:
    """Return int, float, str or bool."""
    return getattr(field.type, "__args__", (field.type,))[0]


def under_recipe(recipes: dict):
    """Return what --recipe overrides in a file: a function (its values, another recipe) -> values
    with that one's flags, and its length and rate in the proportion of the two."""

    def change(values: dict, name: str) -> dict:
        before, after = recipes[values.get("recipe", "reference")], recipes[name]
        if before is after:
            return values
        decided = {*before["flags"], *after["flags"], "min_lr", "warmup_steps"}
        values = {k: v for k, v in values.items() if k not in decided}
        for key, part in (("max_lr", "max_lr"), ("epochs", "length"), ("max_steps", "length")):
            if key in values:
                scaled = values[key] * after[part] / before[part]
                values[key] = round(scaled) if key == "max_steps" else float(f"{scaled:.6g}")
        return values

    return change


# --- The command line -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What was typed, and what stood in the file of --config: each read once, {name: value}."""

    config_class: type
    typed: dict
    in_file: dict

    def values(self, **more) -> dict:
        """Return what was given: flags, and `more` like them, over the file."""
        typed, from_file = self.typed | more, self.in_file
        for field in dataclasses.fields(self.config_class):
            if field.name in typed:
                overrides = field.metadata["overrides"]
                if callable(overrides):
                    from_file = overrides(from_file, typed[field.name])
                else:
                    from_file = {k: v for k, v in from_file.items() if k not in overrides}
        return from_file | typed


def parse_flags(config_class, description: str, argv: list[str]) -> dict:
    """Return what was given, {name: value}. A mistake ends the program, with exit code 2."""
    return read_command_line(config_class, description, argv).values()


def read_command_line(config_class, description: str, argv: list[str]) -> CommandLine:
    """Read the flags, and the file of --config. A mistake ends the program, with exit code 2."""
    parser = terminal.Parser(
        description=description,
        epilog="[in brackets]: what is decided when the flag is not given",
        usage="%(prog)s [--FLAG VALUE ...]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    group = parser
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
            action = argparse.BooleanOptionalAction if negatable(field) else "store_true"
            group.add_argument(f"--{name}", action=action, help=text)
        elif meta["several"]:
            action = "extend" if meta["several"] == "again" else "store"
            many = {"nargs": "+", "action": action, "metavar": "STR"}
            group.add_argument(f"--{name}", **many, help=text)
        elif meta["choices"]:
            choices = meta["choices"]
            group.add_argument(f"--{name}", type=_choice(choices), choices=choices, help=text)
        else:
            metavar = kind.__name__.upper()
            group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions: answer, and never train
        import argcomplete

        argcomplete.autocomplete(parser)
    typed, in_file, problems = {}, {}, []
    for name, value in vars(parser.parse_args(argv)).items():
        try:
            typed[name] = _as_text(fields[name], value)
        except ValueError as error:
            problems.append(str(inputs.wrong(name, value, error)))
    if "config" in typed:
        try:
            in_file = read_config(config_class, typed["config"])
        except ValueError as error:
            problems.append(str(error))
    if problems:
        parser.error("\n".join(problems))
    return CommandLine(config_class, typed, in_file)


def negatable(field) -> bool:
    """Return whether there is a --no-X: where a file or a checkpoint may have said X."""
    return field.default is None or field.metadata["resume"] != COMMAND


def words(values: dict, config_class) -> list[str]:
    """Return the values as the words of a command line, in the order of --help."""
    found = []
    for field in dataclasses.fields(config_class):
        value = values.get(field.name)
        if value is True or (value is False and negatable(field)):
            found.append(f"--{field.name}" if value else f"--no-{field.name}")
        elif value is not None and value is not False:
            again = field.metadata["several"] == "again"
            for one in shlex.split(value) if again else [str(value)]:
                found += [f"--{field.name}", one]
    return found


def _as_text(field, value):
    """Join several words to one text, and put in home folders where they are paths.

    Paths and what may be given again are kept as words of a shell, other texts as they were typed.
    """
    meta = field.metadata
    if isinstance(value, list) and len(value) > 1:
        if not meta["path"] and meta["several"] != "again":
            return " ".join(value)
        return shlex.join(map(inputs.path if meta["path"] else str, value))
    value = value[0] if isinstance(value, list) else value
    if not meta["path"] or not isinstance(value, str):
        return value
    return inputs.paths(value) if meta["several"] else inputs.path(value)


def _choice(choices):
    def choice(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(
                f"{text!r} is none of {', '.join(choices)}{inputs.nearest(text, choices)}"
            )
        return text

    return choice


# --- The configuration file -----------------------------------------------------------------------


def read_config(config_class, path: str) -> dict:
    """Return the flags in a TOML file, {name: value}.

    Raise ValueError with a line for each mistake: file, key, value, and what is wrong with it.
    """
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise inputs.wrong("config", path, f"cannot be read ({error.strerror})") from None
    except ValueError as error:  # also bytes that are no UTF-8
        raise inputs.wrong("config", path, f"is not TOML ({error})") from None
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    known = [name for name, field in fields.items() if field.metadata["in_file"]]
    problems = []
    for name, value in values.items():
        if name in known:
            try:
                values[name] = _checked(fields[name], value)
            except ValueError as error:
                problems.append(f"{name} = {_literal(value):.80}: {error}")
        elif name in fields:
            problems.append(f"{name} is for the command line only")
        else:
            what = "keys are flags, without [tables]" if isinstance(value, dict) else "no such key"
            problems.append(f"{name}: {what}{inputs.nearest(name, known)}")
    if problems:
        raise ValueError("\n".join(str(inputs.wrong("config", path, text)) for text in problems))
    return values


def _checked(field, value):
    """Return a value of TOML as the field's type; ValueError says what it must be."""
    kind, meta = kind_of(field), field.metadata
    if kind is float and type(value) is int and abs(value) < BELOW:
        value = float(value)
    if meta["several"] and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return _as_text(field, value)
    names = {int: "a whole number", float: "a number", str: "a text in quotes"}
    if type(value) is not kind:
        raise ValueError(f"must be {names.get(kind, 'true or false')}")
    choices = meta["choices"]
    if choices and value not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}{inputs.nearest(value, choices)}")
    if problem := out_of_range(field, value):
        raise ValueError(problem)
    return _as_text(field, value)


def _literal(value) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but for the one character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else str(value)  # 6e-05, 600


def to_toml(config, given, title: str) -> str:
    """Return a configuration as a file for --config: what was given as keys, the rest as comments.

    So that what was decided for this machine and this data is decided again where it is read.
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
            comment = "" if field.name in given else "# "
            lines.append(f"{comment}{field.name} = {_literal(value)}")
    return "\n".join(lines) + "\n"


# --- Values ---------------------------------------------------------------------------------------


def merge(config_class, given: dict, saved: dict, asked: set, same_machine: bool):
    """Return (flags over checkpoint over defaults as a configuration, names ever asked for).

    given: flags of this command. saved: the checkpoint's configuration. asked: names in it that
    somebody gave; the others were derived, and are again where what they come from has changed.
    """
    fields = {f.name: f for f in dataclasses.fields(config_class) if f.name in saved}
    sources = (CHECKPOINT, SAME_MACHINE) if same_machine else (CHECKPOINT,)
    changed = {name for name in fields if name in given and given[name] != saved[name]}
    overridden = (fields[name].metadata["overrides"] for name in changed)
    asked = asked.difference(*(names for names in overridden if not callable(names))) | {*given}
    again = derived(config_class, changed, asked)
    kept = {n: saved[n] for n in fields.keys() - again if fields[n].metadata["resume"] in sources}
    return config_class(**kept | given), asked


def derived(config_class, changed: set[str], asked: set[str]) -> set[str]:
    """Return the names of what nobody asked for and follows from the changed flags, near or far."""
    fields = [f for f in dataclasses.fields(config_class) if f.name not in asked]
    found = set(changed)
    while more := {f.name for f in fields if f.metadata["derived_from"] & found} - found:
        found |= more
    return found - changed


def changes(config, saved: dict, given) -> list[tuple[str, bool]]:
    """Return [(what a resume changes of the saved configuration, does it change learning)]."""
    found = []
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        before = value if saved.get(name) is None else saved[name]  # None: not decided
        if field.metadata["resume"] != COMMAND and value != before:
            text = f"--{name}: {_plain(before)} -> {_plain(value)}"
            text += "" if name in given else ", derived again"
            found.append((text, field.metadata["learned"]))
    return found


def _plain(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_ranges(config) -> None:
    """Raise ValueError with a line for each number that is out of range; None passes."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if problem := out_of_range(field, value):
            found.append(str(inputs.wrong(field.name, value, problem)))
    if found:
        raise ValueError("\n".join(found))


def out_of_range(field, value) -> str | None:
    """Return what a number must be, if it is not; None if it is."""
    meta = field.metadata
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if meta["above"] is not None and not value > meta["above"]:
        return f"must be more than {meta['above']}"
    if not value >= meta["least"] or value == float("inf"):
        return f"must be a number of {meta['least']} or more"
    if isinstance(value, int) and value >= BELOW:
        return f"must be below {BELOW} (2 to the power of 63)"
    return None
