"""Environments by name. Importing this module imports no simulator; `make` imports those it needs."""

import ast
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import io
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union, get_args, get_origin

from jaxrl.errors import UserError, unknown

if TYPE_CHECKING:  # modules of this package are also imported in worker processes, which must not import JAX
    from jaxrl.types import Env, HostEnv

AnyEnv: TypeAlias = "Env | HostEnv"

PARTS, HOST_PARTS = ("spec", "horizon", "reset", "step"), ("spec", "horizon", "tasks", "builder")


@dataclasses.dataclass(frozen=True)
class _Entry:
    target: str  # "module:attribute" of the environment's builder
    about: str
    named: bool = False  # the builder takes the environment's name as its first argument


_SHIPPED = {
    "point": _Entry("envs.point:Point", "a disc in an empty box, no simulator; best values in closed form, for tests"),
    "bandit": _Entry("envs.point:Bandit", "one step, two good actions of unequal reward, for tests"),
    "push": _Entry("envs.push:Push", "a round pusher moves a disc on a table to a goal (MJX)"),
} | {
    f"{kind}-{size}": _Entry("envs.maze:make_maze", f"{about} in OGBench's {size} maze (MJX)", named=True)
    for kind, sizes, about in (
        ("maze", ("umaze", "medium", "large", "giant"), "a ball with momentum rolls to a far goal"),
        ("pointmaze", ("medium", "large", "giant"), "OGBench's point, for its data files, moves to a far goal"),
    )
    for size in sizes
}
_ALIASES = {"maze": "maze-medium", "pointmaze": "pointmaze-medium"}
_FAMILIES = {
    "brax": _Entry("envs.adapters:brax_env", "any environment of Brax, such as brax/ant?backend=mjx", named=True),
    "playground": _Entry(
        "envs.adapters:playground_env", "any task of MuJoCo Playground, such as playground/CartpoleBalance", named=True
    ),
    "ogbench": _Entry("envs.ogbench:make", "OGBench on the CPU, such as ogbench/cube-single-play-singletask-v0", True),
}
_EXTRAS = {"mujoco_playground": "playground", "ogbench": "ogbench", "gymnasium": "ogbench"}


def names() -> list[tuple[str, str]]:
    """Returns (name, one-line description) of everything that `make` builds, custom environments last."""
    aliases = [(alias, f"short for {name}") for alias, name in _ALIASES.items()]
    shipped = [(name, entry.about) for name, entry in _SHIPPED.items()]
    families = [(f"{family}/NAME", entry.about) for family, entry in _FAMILIES.items()]
    return [*shipped, *aliases, *families, ("package.module:make", "custom: what the function `make` returns")]


def make(name: str) -> AnyEnv:
    """Returns the environment called `name`, with options after a question mark: `push?reward=dense&horizon=50`.

    Names are those of `names()`, `brax/NAME`, `playground/NAME`, or `package.module:make` for custom environments.
    Raises UserError for an unknown name or option, or a missing package.
    """
    base, _, query = name.partition("?")
    options = read_options(query)
    family, _, member = base.partition("/")
    base = _ALIASES.get(base, base)
    if ":" in base:
        env = _own(base, options)
    elif family in _FAMILIES and member:
        env = _build(name, _FAMILIES[family], member, options)
    elif base in _SHIPPED:
        env = _build(name, _SHIPPED[base], base, options)
    else:
        raise unknown("environment", base, [shown for shown, _ in names()])
    if env.horizon < 1:
        raise UserError(f"environment {name!r}: horizon is {env.horizon}, must be 1 or more")
    return env


def read_options(query: str) -> dict[str, Any]:
    """Returns the options in `key=value&key=value`, values read as int, float, bool or else str."""
    options = {}
    for part in filter(None, query.split("&")):
        key, equals, text = part.partition("=")
        if not (key and equals and text):
            raise UserError(f"environment option {part!r}: write options as key=value&key=value")
        options[key] = _value(text)
    return options


def _value(text: str) -> int | float | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, (int, float, str)) else text


def _build(name: str, entry: _Entry, member: str, options: dict[str, Any]) -> AnyEnv:
    module, attribute = entry.target.split(":")
    try:
        # on import, MJX prints that an optional backend is missing
        with contextlib.redirect_stdout(io.StringIO()):
            builder = getattr(importlib.import_module(module), attribute)
            return _call(name, builder, (member,) if entry.named else (), options)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = f"jaxrl[{_EXTRAS[package]}]" if package in _EXTRAS else package
        raise UserError(f"environment {name!r} needs the package {package!r}: pip install '{extra}'") from error


def _look_beside() -> None:
    """Puts the working directory last on the import path, and its folder `envs`, if there is one, into this package.

    So modules of a user's own folder of that name are found, and hide none of these.
    """
    if "" not in sys.path:
        sys.path.append("")
    if (own := Path.cwd() / "envs").is_dir() and str(own) not in __path__:
        __path__.append(str(own))


def _own(target: str, options: dict[str, Any]) -> AnyEnv:
    """Returns the environment built by a user's function."""
    module_name, _, attribute = target.partition(":")
    _look_beside()
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"environment {target!r}: cannot import {module_name!r} ({error})") from error
    builder = getattr(module, attribute, None)
    if not callable(builder):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown(f"function of module {module_name!r}", attribute, callables)
    env = _call(target, builder, (), options)
    if missing := missing_parts(env):
        raise UserError(
            f"environment {target!r}: {attribute} returned {type(env).__name__}, which lacks {', '.join(missing)}; "
            "an environment has spec, horizon, reset(key) and step(state, action), "
            "or, if it steps on the CPU, spec, horizon, tasks and builder()"
        )
    return env


def missing_parts(env: object) -> list[str]:
    """Returns the missing attributes of an environment (of a `HostEnv` if it has a `builder`)."""
    has = dir(env)
    return [part for part in (HOST_PARTS if "builder" in has else PARTS) if part not in has]


def _call(name: str, builder: Callable[..., AnyEnv], args: tuple, options: dict[str, Any]) -> AnyEnv:
    """Returns `builder(*args, **options)`, after checking names and types of the options against its signature."""
    signature = inspect.signature(builder)
    parameters = {parameter.name: parameter for parameter in list(signature.parameters.values())[len(args) :]}
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if anything and dataclasses.is_dataclass(signature.return_annotation):
        # `**options` of a builder are the fields of the dataclass that it builds
        parameters, anything = dict(inspect.signature(signature.return_annotation).parameters), False
    for option, value in options.items():
        if option not in parameters:
            if anything:
                continue
            near = difflib.get_close_matches(option, parameters, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = f"known are {', '.join(parameters)}" if parameters else "it takes none"
            raise UserError(f"environment {name!r}: unknown option {option!r}: {hint}{known}")
        hint = parameters[option].annotation
        if not _fits(value, hint):
            wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise UserError(f"environment {name!r}: option {option} is {value!r}, must be {wanted}")
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        raise UserError(f"environment {name!r}: {error}, give it as an option: {name}?key=value") from error
    return builder(*args, **options)


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether the annotation allows the value; unknown annotations allow anything."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, type(None)) else True


_look_beside()  # in worker processes as well, whose simulators may come from there
