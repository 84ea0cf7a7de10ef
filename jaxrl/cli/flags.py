"""Command-line parsing into dataclasses: positional names first, then flags; usage errors are one-line UserErrors."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
from pathlib import Path
from typing import Any, get_args

import tyro

import jaxrl
from jaxrl import system
from jaxrl.agents import AGENTS
from jaxrl.errors import UserError
from jaxrl.types import Env, HostEnv, Scalar

RULES = tyro.constructors.ConstructorRegistry()


@RULES.primitive_rule
def _scalar(kind: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Returns the parser of a Scalar: a float."""
    if kind.type is not Scalar:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda words: float(words[0]),
        is_instance=lambda value: isinstance(value, Scalar),
        str_from_instance=lambda value: [str(value)],
    )


@RULES.primitive_rule
def _widths(kind: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Returns the parser of a tuple of numbers: separated by commas or spaces."""
    if kind.type_origin is not tuple or get_args(kind.type) not in ((int, ...), (float, ...)):
        return None
    number = get_args(kind.type)[0]
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{number.__name__.upper()},...",
        instance_from_str=lambda words: tuple(number(word) for part in words for word in part.split(",") if word),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(entry, number) for entry in value),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


Flat = tyro.conf.arg(name="")  # for nested dataclasses whose fields become flags without a prefix
FLAT_FIELDS = ("config", "generator", "sampler", "settings")  # the fields annotated with Flat
SETTINGS = (tyro.conf.DisallowNone,)  # omitted flags may default to None, but the word "None" is not parsed as None


class HelpShown(Exception):  # noqa: N818  (not an error)
    """Raised when help was asked for and printed."""


def make(name: str) -> Env | HostEnv:
    """Returns the environment with a name; one of the user's own has passed the checks that compile nothing.

    Raises UserError if it cannot be made or a check fails.
    """
    env = made(name)
    if ":" in name:
        from envs import checker

        if failed := [finding for finding in checker.before_running(env) if not finding.ok]:
            raise UserError(
                f"environment {name!r}: {failed[0].rule}: {failed[0].problem}; see jaxrl doctor --env {name}"
            )
    return env


def made(name: str) -> Env | HostEnv:
    """Returns the environment with a name, unchecked. Raises UserError if its module or function fails."""
    import envs

    system.check_precision()
    ours = Path(jaxrl.__file__).resolve().parents[1] / "envs"
    if (found := Path(next(iter(envs.__path__))).resolve()) != ours:
        raise UserError(
            f"the folder {found} hides jaxrl's package of the name envs: rename it, or use the command `jaxrl` instead "
            "of `python -m`"
        )
    try:
        return envs.make(name)
    except UserError:
        raise
    except SystemExit as error:
        raise UserError(f"environment {name!r}: its module called sys.exit({error.code!r})") from error
    except Exception as error:
        if ":" not in name:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"environment {name!r} cannot be made: {reason}; --debug shows the trace") from error


def positionals(args: list[str], most: int) -> tuple[list[str], list[str]]:
    """Returns the leading positional arguments, at most `most`, and the rest."""
    leading = list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))
    if len(leading) > most:
        raise UserError(f"unexpected argument {args[most]!r}")
    return leading, args[len(leading) :]


def of_agent(options: Any, agent: type) -> Any:
    """Returns the option class of a command, parametrized by an agent class."""
    return options[agent]


def run_directory(command: str, args: list[str]) -> tuple[Any, list[str]]:
    """Returns the run directory argument of a command, and its flags; None for help without a run."""
    names, flags = positionals(args, 1)
    if not names and not wants_help(flags):
        raise UserError(f"{command}: name a run directory, for example `jaxrl {command} runs/NAME`")
    return Path(names[0]) if names else None, flags


def peek(args: list[str], flag: str) -> str | None:
    """Returns a flag's value if given, before full parsing, whose defaults depend on it."""
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(f"{flag}="):
            return arg.split("=", 1)[1]
    return None


def wants_help(flags: list[str]) -> bool:
    """Returns whether help is requested."""
    return bool({"-h", "--help"} & set(flags))


def parse(usage: str, kind: Any, default: Any, args: list[str]) -> Any:
    """Returns the parsed options. Raises a one-line UserError for an unknown flag or an invalid value."""
    if wants_help(args):
        print(inspect.cleandoc(type(default).__doc__ or "").replace("{agents}", ", ".join(AGENTS)) + "\n")
        with contextlib.suppress(SystemExit):
            tyro.cli(
                kind, default=default, args=["--help"], prog=usage, description="", config=SETTINGS, registry=RULES
            )
        raise HelpShown
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            options, left = tyro.cli(
                kind, default=default, args=args, return_unknown_args=True, config=SETTINGS, registry=RULES
            )
    except SystemExit as error:
        raise UserError(_complaint(complaint.getvalue())) from error
    if left and not left[0].startswith("-"):
        raise UserError(f"unexpected argument {left[0]!r}: names must come before flags, and a switch takes no value")
    if left:
        flag = left[0].split("=")[0]
        raise UserError(f"unknown flag {flag}{nearest(flag, _flags(default)) or ':'} --help lists all")
    return options


def nearest(flag: str, flags: list[str]) -> str:
    """Returns a "did you mean" suggestion of the most similar flag; empty if none is similar."""
    near = difflib.get_close_matches(flag, flags, n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else ""


def _complaint(text: str) -> str:
    """Returns the message in tyro's error box as one line: from the title to the next horizontal rule."""
    lines = [line.strip("│╭╮╰╯─- ") for line in text.splitlines()]
    message = itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines[1:]))
    return " ".join(message) or "cannot read the flags"


def _flags(options: Any, prefix: str = "--") -> list[str]:
    """Returns the flags for a dataclass's fields."""
    result = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        name = "" if field.name in FLAT_FIELDS else field.name.replace("_", "-")
        nested = prefix + (f"{name}." if name else "")
        result += _flags(value, nested) if dataclasses.is_dataclass(value) else [prefix + name]
    return result
