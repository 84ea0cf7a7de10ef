"""The catalogue, jaxrl/agents/README.md, is true of every agent."""

import inspect
import re
from pathlib import Path

import pytest

from jaxrl import agents, types
from jaxrl.agents import AGENTS
from jaxrl.types import requirements
from tests.known import values_of

FOLDER = Path(inspect.getfile(agents)).parent
TEXT = (FOLDER / "README.md").read_text()
HEAD, _, *ROWS = (
    [cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line[:1] == "|"
)
CAPABILITIES = (
    types.ChecksData,
    types.Deriving,
    types.Fitting,
    types.OnPolicy,
    types.Remembering,
    types.Scheduling,
    types.Staged,
)


def row(name: str) -> dict[str, str]:
    """Returns the cells of an agent's row, by the head of their column."""
    (cells,) = (cells for cells in ROWS if cells[0] == f"`{name}`")
    return dict(zip(HEAD, cells, strict=True))


def test_every_agent_has_one_row():
    assert sorted(cells[0].strip("`") for cells in ROWS) == sorted(AGENTS)


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\((?!https:)([^)]+)\)", TEXT)
    assert len(links) > len(AGENTS) and [link for link in links if not (FOLDER / link).exists()] == []


def test_its_example_changes_all_networks_and_all_optimizers():
    (block,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    exec(block, found := {})
    assert values_of(found["agent"], "hidden") == [(64, 64)] * 2 and values_of(found["agent"], "lr") == [1e-3] * 2
    assert found["agent"].alpha == 1


@pytest.mark.parametrize("name", AGENTS)
def test_a_row_names_the_file_and_its_papers(name):
    file = inspect.getfile(AGENTS[name])
    assert f"]({Path(file).name})" in row(name)["file"] and Path(file).stem == name
    papers = re.findall(r"arxiv.org/abs/(\d{4}\.\d{5})", row(name)["paper"] + row(name)["method"])
    assert papers and all(paper in inspect.getmodule(AGENTS[name]).__doc__ for paper in papers)


@pytest.mark.parametrize("name", AGENTS)
def test_a_row_says_what_the_agent_needs_and_declares(name):
    agent = AGENTS[name]()
    needs, windows = requirements(agent), bool(values_of(agent, "windows"))
    wanted = [f"windows of {needs.window}" if windows else "transitions"]
    wanted += ["rewards in [0, 1]"] * needs.unit_rewards + ["a dataset"] * needs.dataset + ["KD-trees"] * needs.kdtree
    assert row(name)["needs"] == ", ".join(wanted)
    assert needs.window == 1 or windows
    declared = {kind.__name__ for kind in CAPABILITIES if isinstance(agent, kind)}
    assert set(re.findall(r"`(\w+)`", row(name)["declares"])) == declared


@pytest.mark.parametrize("name", AGENTS)
def test_a_row_says_whether_there_are_recordings(name):
    here = Path(__file__).parent
    recorded = any((here.parent / "golden").glob(f"{name}_*.npz"))
    assert row(name)["verified by"].startswith("recordings") == recorded
    assert (here / f"test_{name}.py").exists()
