"""The command line, `jaxrl COMMAND ...`. Flags are fields of dataclasses; a usage error prints one line, exit code 2.

Slow imports are deferred to the commands that need them, so that help and usage errors return quickly.
"""

import contextlib
import dataclasses
import os
import sys
from pathlib import Path

import jax

from jaxrl.agents import AGENTS
from jaxrl.cli import datasets, report, runs, sweep
from jaxrl.cli import flags as fl
from jaxrl.errors import UserError, unknown
from jaxrl.runs.presets import PRESETS, VARIANTS
from jaxrl.runs.signals import ABORTED
from jaxrl.system import jax_setting


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
    options = fl.parse("jaxrl doctor", DoctorOptions, DoctorOptions(), args)
    if options.env is None:
        from jaxrl.cli import doctor

        lines = doctor.installation()
    else:
        from envs.checker import check

        lines = [str(finding) for finding in check(fl.make(options.env))]
    print("\n".join(lines))
    return int(any(line.startswith("FAIL") for line in lines))


def catalogue(args: list[str]) -> int:
    """Returns the exit code of `jaxrl list`."""
    import envs

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
    "train": (runs.train, "train an agent, or resume a run"),
    "sweep": (sweep.sweep, "train many settings and seeds as one program, or resume a sweep"),
    "eval": (runs.evaluate, "evaluate a run's latest checkpoint"),
    "collect": (runs.collect, "record a scripted behavior as a dataset"),
    "render": (runs.render, "render an episode of a run"),
    "replay": (runs.replay, "repeat a run's first epochs and compare bit for bit"),
    "report": (report.report, "compare runs and sweeps: curves, scores with intervals, tables, one page"),
    "data": (datasets.data, "describe, convert and mix dataset files"),
    "synthesize": (datasets.synthesize, "generate a dataset with a diffusion model, optionally guided by a policy"),
    "doctor": (examine, "check the installation, or a custom environment"),
    "list": (catalogue, "list agents, environments, behaviors and presets"),
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 a check failed, 2 usage error, 75 stopped and saved, 130 stopped by Ctrl-C."""
    args = sys.argv[1:] if argv is None else argv
    try:
        code = _command(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"jaxrl: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # file system errors: full, read-only, no permission
        print(f"jaxrl: {': '.join(str(part) for part in (error.filename, error.strerror) if part)}", file=sys.stderr)
    except KeyboardInterrupt:
        return ABORTED
    return 2


def _command(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print("jaxrl: reinforcement learning with generative policies, as one XLA program\n")
        print("usage: jaxrl COMMAND ...\n")
        for name, (_, line) in COMMANDS.items():
            print(f"  {name:<10} {line}")
        print("\n`jaxrl COMMAND --help` explains a command. Start with: jaxrl train")
        return 0 if args else 2
    if args[0] not in COMMANDS:
        raise unknown("command", args[0], COMMANDS)
    use_compilation_cache()
    with contextlib.suppress(SystemExit):  # raised by --help after printing
        return COMMANDS[args[0]][0](args[1:])
    return 0


def use_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache, unless JAX's cache setting is already configured."""
    if jax_setting("compilation_cache_dir") is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "jaxrl" / "xla"))
