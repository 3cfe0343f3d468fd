"""A dataclass whose fields are the command line's flags; where a resume takes them from."""

import argparse
import dataclasses


def flag(default, help, *, group=None, choices=None, resume="hyper", least=0, above=None):
    """A field that is a flag; its annotation (int, float, str, bool, or one `| None`) is its type.

    `resume` says where a resumed run takes the value from when the flag is not given: "hyper" the
    checkpoint; "exact" the checkpoint, if device type and process count are the same; "machine"
    the default. `group` opens a new group in --help with this field. Numbers must be at least
    `least`, or more than `above` where that is given (`check_ranges`).
    """
    metadata = {"help": help, "group": group, "choices": choices, "resume": resume}
    metadata |= {"least": least, "above": above}
    return dataclasses.field(default=default, metadata=metadata)


def parse_flags(config_class, description: str, argv: list[str]) -> dict:
    """The flags that were given, {name: value}; a wrong one ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="[in brackets]: what is decided when the flag is not given",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--FLAG VALUE ...]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    group = parser
    for field in dataclasses.fields(config_class):
        meta = field.metadata
        if meta["group"]:
            group = parser.add_argument_group(meta["group"])
        kind = getattr(field.type, "__args__", (field.type,))[0]
        text = meta["help"].replace("%", "%%")
        if field.default not in (None, False):
            text += f" [{field.default}]"
        if kind is bool:
            negatable = field.default is None or meta["resume"] == "hyper"
            action = argparse.BooleanOptionalAction if negatable else "store_true"
            group.add_argument(f"--{field.name}", action=action, help=text)
        else:
            metavar = None if meta["choices"] else kind.__name__.upper()
            group.add_argument(
                f"--{field.name}", type=kind, choices=meta["choices"], metavar=metavar, help=text
            )
    return vars(parser.parse_args(argv))


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
        value, meta = getattr(config, field.name), field.metadata
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if meta["above"] is not None and not value > meta["above"]:
            raise ValueError(f"--{field.name} {value}: must be more than {meta['above']}")
        if not value >= meta["least"] or value == float("inf"):
            raise ValueError(f"--{field.name} {value}: must be a number of {meta['least']} or more")
