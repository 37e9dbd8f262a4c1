"""Command-line flags from dataclasses, by tyro; short forms, and errors as one line."""

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from typing import Any

import tyro

from cm3jax.types import UserError

FLAT = tyro.conf.arg(name="")
"""Marks a nested dataclass whose flags have no prefix of its own: --decoder.model.width, not --recipe.decoder..."""


def blank(cls, **values) -> Any:
    """Return a `cls` with these values, else its defaults, and tyro's MISSING where it has none of either."""
    new = object.__new__(cls)  # __init__ would check types, and MISSING has none of them
    for field in dataclasses.fields(cls):
        default = tyro.MISSING if field.default is dataclasses.MISSING else field.default
        object.__setattr__(new, field.name, values.get(field.name, default))
    return new


def parse(cls, argv: list[str], prog: str, default) -> Any:
    """Return the `cls` that the arguments describe.

    Args:
      default: A `cls` with the values of all flags that are not given.

    Raises:
      UserError: for an unknown flag, a value of the wrong type, or one outside its limits.
      SystemExit: after printing the help, if asked for.
    """
    argv = expand(argv, names(default), prog)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(cls, args=argv, prog=prog, default=default)
    except SystemExit as e:
        if not e.code:
            raise
        raise UserError(f"{one_line(errors.getvalue())}; see {prog} --help") from None
    except ValueError as e:  # a value outside its limits, in what tyro builds last
        raise UserError(f"{e}; see {prog} --help") from None


def names(value, prefix: str = "") -> list[str]:
    """Return the full names of all flags of a dataclass, such as "decoder.training.steps"."""
    hints = typing.get_type_hints(type(value), include_extras=True)
    found = []
    for field in dataclasses.fields(value):
        child, notes = getattr(value, field.name), getattr(hints[field.name], "__metadata__", ())
        own = next((note.name for note in notes if getattr(note, "name", None)), field.name)
        name = prefix if FLAT in notes else f"{prefix}{own}."
        if dataclasses.is_dataclass(child):
            found += names(child, name)
        elif isinstance(child, tuple) and child and dataclasses.is_dataclass(child[0]):
            found += [n for i, item in enumerate(child) for n in names(item, f"{name}{i}.")]
        else:
            found.append(name[:-1])
    return found


def expand(argv: list[str], known: list[str], prog: str) -> list[str]:
    """Return the arguments with every flag's name in full.

    A flag may leave out the middle of its name: --decoder.steps is --decoder.training.steps, as no other name begins
    with "decoder" and ends with "steps". After "--" nothing is a flag.

    Raises:
      UserError: if no flag, or more than one, has the name.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    return [full(a, known, prog) if is_flag(a) else a for a in argv[:end]] + argv[end:]


def is_flag(argument: str) -> bool:
    return argument.startswith("--") and argument != "--help"


def full(argument: str, known: list[str], prog: str) -> str:
    """Return one argument, "--name" or "--name=value", with its name in full."""
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    found, no = candidates(name, known), ""
    if not found and (last := name.rpartition(".")[2]).startswith("no_"):
        found, no = candidates(name[: -len(last)] + last[3:], known), "no_"
    if len(found) == 1:
        head, dot, last = found[0].rpartition(".")
        return f"--{head}{dot}{no}{last}{equals}{value}"
    if found:
        raise UserError(f"--{name}: may mean --{', --'.join(found[:6])}; write one of them in full")
    near = nearest(name, known)
    raise UserError(f"--{name}: no such flag; {f'did you mean --{near}?' if near else f'see {prog} --help'}")


def nearest(name: str, known: list[str]) -> str:
    """Return the flag that a wrong name was probably meant to be, "" if none is near."""
    short = {re.sub(r"\..*\.", ".", k): k for k in reversed(known)}  # decoder.steps: decoder.training.steps
    last = {k.rpartition(".")[2]: k for k in reversed(known)}
    forms = last | short | {k: k for k in known}
    near = difflib.get_close_matches(name, forms, 1)
    return forms[near[0]] if near else ""


def candidates(name: str, known: list[str]) -> list[str]:
    """Return the names that `name` is, or abbreviates: the same first word, and the same last ones."""
    if name in known:
        return [name]
    first, dot, rest = name.partition(".")
    return [k for k in known if dot and k.startswith(f"{first}.") and k.endswith(f".{rest}")]


def one_line(box: str) -> str:
    """Return the message in tyro's box of several lines, as one."""
    lines = [line.strip("│ \t") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    lines = [line for line in lines if not line.startswith(("╭", "╰"))]
    end = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
    text = " ".join(" ".join(lines[:end]).split()).rstrip(".")
    return re.sub(r"^Error parsing (recipe|prepare|sampling)[\w.]*: ", "", text) or "wrong arguments"
