"""The command line, `jaxrl COMMAND ...`. Flags are fields of dataclasses; a usage error prints one line, exit code 2.

Slow imports, JAX's among them, are deferred to the commands that need them: help and usage errors return quickly, and
Ctrl-C is answered from the first moment on.
"""

import dataclasses
import importlib
import os
import sys
import traceback
from pathlib import Path

from jaxrl.cli import streams
from jaxrl.errors import UserError, unknown
from jaxrl.runs.signals import ABORTED, stopping_at_once

INTERNAL = 70  # exit code of an error that nobody foresaw (EX_SOFTWARE)


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
    """Check this installation, or a custom environment. Exit code 1: at least one check, marked FAIL, did not pass.

    jaxrl doctor --env my_package.my_module:make
    """

    env: str | None = None
    """Environment to check: a name from `jaxrl list` or my_package.my_module:make."""


@dataclasses.dataclass(frozen=True)
class ListOptions:
    """List the available agents, environments, behaviors and presets."""


def examine(args: list[str]) -> int:
    """Returns the exit code of `jaxrl doctor`: 1 if a check fails."""
    from jaxrl.cli import flags as fl

    options = fl.parse("jaxrl doctor", DoctorOptions, DoctorOptions(), args)
    if options.env is None:
        from jaxrl.cli import doctor

        lines = doctor.installation()
    else:
        from envs.checker import check

        lines = [str(finding) for finding in check(fl.made(options.env))]
    print("\n".join(lines))
    return int(any(line.startswith("FAIL") for line in lines))


def catalogue(args: list[str]) -> int:
    """Returns the exit code of `jaxrl list`."""
    import envs
    from jaxrl.agents import AGENTS
    from jaxrl.cli import flags as fl
    from jaxrl.runs.presets import PRESETS, VARIANTS

    fl.parse("jaxrl list", ListOptions, ListOptions(), args)
    print("agents")
    for name, kind in AGENTS.items():
        print(f"  {name:<20} {(kind.__doc__ or '').splitlines()[0]}")
        if name in VARIANTS:
            print(f"  {'':<20} variants: {', '.join(VARIANTS[name])}")
    print("environments")
    for name, line in envs.names():
        print(f"  {name:<20} {line}")
    print(f"behaviours\n  good, medium, bad, random, mixed\npresets\n  {', '.join(PRESETS)}")
    return 0


COMMANDS = {
    "train": ("runs.train", "train an agent, or resume a run"),
    "sweep": ("sweep.sweep", "train many settings and seeds as one program, or resume a sweep"),
    "eval": ("runs.evaluate", "evaluate a run's latest checkpoint"),
    "collect": ("runs.collect", "record a scripted behavior as a dataset"),
    "render": ("runs.render", "render an episode of a run"),
    "replay": ("runs.replay", "repeat a run's first epochs and compare bit for bit"),
    "report": ("report.report", "compare runs and sweeps: curves, scores with intervals, tables, one page"),
    "data": ("datasets.data", "describe, convert and mix dataset files"),
    "synthesize": ("datasets.synthesize", "generate a dataset with a diffusion model, optionally guided by a policy"),
    "doctor": (".examine", "check the installation, or a custom environment"),
    "list": (".catalogue", "list agents, environments, behaviors and presets"),
}
"""Module within this package, its function and a line of help for every command."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code. Without arguments, as the process's own command, it ends the process after an error.

    0 done, 1 a check failed, 2 usage error, 3 parameters not finite, 70 internal error, 75 stopped, saved, 130 Ctrl-C
    """
    with streams.lasting():
        if argv is not None:
            return _answer(argv)
        with stopping_at_once():
            code = _answer(sys.argv[1:])
        if code in (2, INTERNAL, ABORTED):
            sys.stdout.flush()
            os._exit(code)  # at a regular exit Python waits for threads, some of which wait for what never comes
        return code


def _answer(args: list[str]) -> int:
    """Returns the exit code of a command; whatever goes wrong is one line on stderr, after its trace with --debug."""
    try:
        return _command([arg for arg in args if arg != "--debug"])
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if "--debug" in args:
            traceback.print_exc()
        code, line = _explained(error)
        print(f"jaxrl: {line}", file=sys.stderr, flush=True)
        return code


def _explained(error: BaseException) -> tuple[int, str]:
    """Returns the exit code and the line for an error."""
    if isinstance(error, KeyboardInterrupt):
        return ABORTED, "stopped at once"
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, OSError):  # file system errors: full, read-only, no permission
        return 2, ": ".join(str(part) for part in (error.filename, error.strerror) if part) or repr(error)
    if isinstance(error, SystemExit):
        return 2, f"a module of one's own called sys.exit({error.code!r})"
    place, what = traceback.extract_tb(error.__traceback__)[-1], " ".join(str(error).split())[:300]
    where = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
    return INTERNAL, f"internal error, {where}: {what}; --debug shows the trace"


def _command(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print("jaxrl: reinforcement learning with generative policies, as one XLA program\n")
        print("usage: jaxrl COMMAND ...\n")
        for name, (_, line) in COMMANDS.items():
            print(f"  {name:<10} {line}")
        print("\n`jaxrl COMMAND --help` explains a command. Start with: jaxrl train")
        print("`--debug` shows the trace of an error, which is exit code 70 if it is not the user's.")
        return 0 if args else 2
    if args[0] not in COMMANDS:
        raise unknown("command", args[0], COMMANDS)
    from jaxrl.cli import flags as fl

    use_compilation_cache()
    module, _, function = COMMANDS[args[0]][0].rpartition(".")
    place = importlib.import_module(f"jaxrl.cli.{module}" if module else "jaxrl.cli")
    try:
        return getattr(place, function)(args[1:])
    except fl.HelpShown:
        return 0


def use_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache, unless JAX's cache setting is already configured."""
    import jax

    from jaxrl.system import jax_setting

    if jax_setting("compilation_cache_dir") is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "jaxrl" / "xla"))
