"""What the project promises about itself: layering, sizes, docstrings, packaging, pinned versions."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import jaxrl

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))
TREES = {
    path: ast.parse(path.read_text()) for name in ("jaxrl", "envs") for path in sorted((ROOT / name).rglob("*.py"))
}
SIMULATORS = {"brax", "gymnasium", "mujoco", "mujoco_playground", "ogbench"}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yields the dotted name of everything imported, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(package: str) -> dict[str, set[str]]:
    """Returns, for each file of a package, the names that it imports."""
    files = [path for path in TREES if path.is_relative_to(ROOT / package)]
    return {str(path.relative_to(ROOT)): set(imported(TREES[path])) for path in files}


def definitions(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Yields the public functions and classes of a module, and the public methods of those classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node)


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns the number of lines after the signature and the docstring."""
    body = function.body[ast.get_docstring(function) is not None :]
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def depth(node: ast.AST) -> int:
    """Returns how many functions are nested inside each other below this node."""
    inner = max((depth(child) for child in ast.iter_child_nodes(node)), default=0)
    return inner + isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def test_the_library_imports_no_simulator_and_no_environment():
    outside = SIMULATORS | {"envs", "experiments"}
    found = {
        file: {name for name in names if name.split(".")[0] in outside} for file, names in imports_of("jaxrl").items()
    }
    found.pop("jaxrl/cli/__init__.py", None)
    found.pop("jaxrl/cli/flags.py", None)
    assert {file: names for file, names in found.items() if names} == {}


def test_environments_import_no_experiment_and_nothing_of_brax_training():
    outside = ("experiments", "brax.training")
    found = {file: {name for name in names if name.startswith(outside)} for file, names in imports_of("envs").items()}
    assert {file: names for file, names in found.items() if names} == {}


ORDER = (
    ("errors", "types"),
    ("ranges", "system", "stats"),
    ("ops", "networks", "sharding"),
    ("data",),
    ("replay",),
    ("agents",),
    ("rollout",),
    ("training",),
    ("runs",),
    ("report", "synthesis"),
    ("sweeps",),
    ("cli",),
)
"""The packages and modules of jaxrl from the bottom up: each imports only from its own row and from those above it."""


def test_no_import_runs_upwards():
    row_of = {name: row for row, names in enumerate(ORDER) for name in names}
    upwards = []
    for file, names in imports_of("jaxrl").items():
        own = Path(file).with_suffix("").parts[1]
        for name in names:
            root, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if root == "jaxrl" and own != "__init__" and other in row_of and row_of[other] > row_of[own]:
                upwards.append(f"{file} imports {name}")
    assert upwards == []


def test_every_package_has_its_place_in_the_order():
    found = {path.stem if path.is_file() else path.name for path in (ROOT / "jaxrl").iterdir()}
    assert found - {"__init__", "__pycache__", "py"} == {name for names in ORDER for name in names}


def test_everything_public_has_a_docstring():
    public = [(path, node) for path, tree in TREES.items() for node in definitions(tree)]
    missing = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}" for path, node in public if not ast.get_docstring(node)
    ]
    missing += [str(path.relative_to(ROOT)) for path, tree in TREES.items() if not ast.get_docstring(tree)]
    assert missing == []


def test_functions_are_short_and_shallow():
    nodes = [(path, node) for path, tree in TREES.items() for node in ast.walk(tree)]
    functions = [(path, node) for path, node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [f"{path.relative_to(ROOT)}:{node.lineno} {node.name}" for path, node in functions if body_lines(node) > 40]
    deep = [f"{path.relative_to(ROOT)}:{node.lineno} {node.name}" for path, node in functions if depth(node) > 3]
    assert (long, deep) == ([], [])


def test_agents_fit_in_one_read():
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "jaxrl" / "agents").rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > 250} == {}


def test_every_folder_with_code_is_a_package_that_gets_installed():
    assert {path.parent for path in TREES if not (path.parent / "__init__.py").exists()} == set()


def test_the_command_is_a_function_of_the_package():
    module, name = PROJECT["scripts"]["jaxrl"].split(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_the_changelog_opens_with_the_current_version():
    assert re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == jaxrl.__version__


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_are_names_and_versions_within_the_declared_bounds(path):
    lines = path.read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==\d[\w.]*", line)] == []

    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    declared = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    needed = [need for need in map(Requirement, declared) if need.name != "jaxrl"]
    outside = [str(need) for need in needed if pinned.get(canonicalize_name(need.name), "") not in need.specifier]
    assert outside == []


def test_the_public_surface_is_there_and_is_imported_when_it_is_used():
    assert all(getattr(jaxrl, name) is not None for name in jaxrl.__all__)
    assert set(jaxrl.__all__) <= set(dir(jaxrl))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it has Batch, Config"):
        jaxrl.nothing  # noqa: B018
    light = "import sys, jaxrl; print(sorted({'jax', 'flax', 'tyro', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", light], capture_output=True, text=True).stdout == "[]\n"


def test_agents_need_no_dataset_readers_pictures_checkpoints_or_command_line():
    code = (
        "import sys, jaxrl.agents; heavy = ('matplotlib', 'tyro', 'orbax', 'h5py', 'PIL', 'jaxrl.data');"
        "print(sorted(name for name in sys.modules if name.startswith(heavy)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
