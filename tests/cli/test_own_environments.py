"""Environments of one's own at the command line: mistakes in them are a line before training, wherever they are."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from envs.checker import before_running
from jaxrl import cli, system
from jaxrl.errors import UserError

ROOT = Path(__file__).parents[2]
HEAD = "import dataclasses, jax, jax.numpy as jnp\nfrom envs.point import Point\n"
OWN = (
    HEAD
    + "@dataclasses.dataclass(frozen=True, eq=False)\nclass Own(Point):\n{body}\ndef make(): return Own(horizon=9)\n"
)
STEP = "    def step(self, state, action): return dataclasses.replace(super().step(state, action), {})"
numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Returns a function that writes a module into the working directory and returns its name, a new one each time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str) -> str:
        name = f"own_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            OWN.format(body=STEP.format("obs=jnp.zeros(3)")),
            "step returns the tree that reset returns: .obs is float32[2]",
        ),
        (OWN.format(body=STEP.format("terminated=jnp.zeros(())")), ".terminated is bool[], then float32[]"),
        (
            OWN.format(body="    def reset(self, key): raise RuntimeError('no key')"),
            "reset(key) can be traced: RuntimeError",
        ),
        (
            OWN.format(body="    def step(self, state, action): return state.nothing"),
            "step(state, action) can be traced",
        ),
        (OWN.format(body="    @property\n    def spec(self): return 3"), "must be a jaxrl.types.Spec"),
        ("def make(): raise RuntimeError('no\\nlicense')", "cannot be made: RuntimeError: no license; --debug"),
        ("def make(: pass", "cannot be made: SyntaxError"),
        ("import sys\ndef make(): sys.exit(0)", "its module called sys.exit(0)"),
    ],
)
def test_a_mistake_in_an_own_environment_is_a_line_before_anything_is_written(module, text, says, capsys):
    name = f"{module(text)}:make"
    assert cli.main(["train", "td3bc", name, "--out", "run"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"jaxrl: environment {name!r}") and says in error and "\n" not in error
    assert not Path("run").exists()


def test_an_environment_without_mistakes_passes():
    from envs.template import make

    assert before_running(make()) and all(finding.ok for finding in before_running(make()))


def test_64_bit_numbers_are_refused(monkeypatch):
    system.check_precision()
    monkeypatch.setattr(system, "jax_setting", lambda name: name == "enable_x64")
    with pytest.raises(UserError, match="JAX_ENABLE_X64 is on"):
        system.check_precision()


def listed(folder: Path, *command: str) -> subprocess.CompletedProcess:
    path = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=os.environ | path, capture_output=True, text=True)


def test_a_folder_of_the_same_name_is_found_beside_the_package_or_named_where_it_hides_it(tmp_path):
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "mine.py").write_text("from envs.template import make\n")
    done = listed(tmp_path, "-c", "import envs; print(envs.make('envs.mine:make').horizon)")
    assert done.stdout.strip() == "100", done.stderr
    (tmp_path / "envs" / "__init__.py").touch()
    done = listed(tmp_path, "-P", "-c", "import envs; print(envs.make('envs.mine:make').horizon)")
    assert done.stdout.strip() == "100", done.stderr
    done = listed(tmp_path, "-m", "jaxrl.cli", "train", "td3bc", "point")
    assert done.returncode == 2 and "hides jaxrl's package of the name envs: rename it" in done.stderr
    assert len(done.stderr.splitlines()) == 1
