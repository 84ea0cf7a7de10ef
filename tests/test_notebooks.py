"""The quickstart runs from top to bottom, small, and shows what it says; its stored outputs are those of a full run."""

import ast
import base64
import io
import json
import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image, ImageSequence

QUICKSTART = Path(__file__).parents[1] / "notebooks" / "01_quickstart.ipynb"
PICTURES = ["data-picture", "curves", "flow-picture", "guidance", "radius"]  # the cells that draw one

PROGRAM = """\
offline: 2 epochs, each a
    scan of length 100
online: 2 epochs, each a
    scan of length 8
        scan of length 5
        scan of length 4
"""


@pytest.fixture(scope="module")
def stored():
    """The notebook as it is kept."""
    return nbformat.read(QUICKSTART, as_version=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The empty folder that the notebook runs in."""
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def executed(folder):
    """The notebook after a small run; a cell that fails raises here."""
    notebook = nbformat.read(QUICKSTART, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXRL_SMALL", "1")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # nearly all of a small run is compiling
        client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}})
        client.execute()
    return notebook


def printed(notebook):
    """Returns what each cell printed, by the cell's id."""
    return {
        cell.id: "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def shown(notebook, kind):
    """Returns what cells showed as a MIME type, by the cell's id."""
    outputs = [(cell.id, output.get("data", {})) for cell in notebook.cells for output in cell.get("outputs", [])]
    return {name: data[kind] for name, data in outputs if kind in data}


def success(notebook):
    """Returns the success rates that the notebook printed last."""
    return json.loads(printed(notebook)["curves"].removeprefix("success: "))


def check_pictures(notebook):
    """Every picture is a PNG in colour, and the episode an animation that moves."""
    pictures = shown(notebook, "image/png")
    assert list(pictures) == PICTURES
    for data in pictures.values():
        picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 50
    (gif,) = re.findall(r"data:image/gif;base64,([^\"]+)", shown(notebook, "text/html")["video"])
    frames = ImageSequence.all_frames(Image.open(io.BytesIO(base64.b64decode(gif))))
    assert len({frame.tobytes() for frame in frames}) > 10


def test_one_compiled_call_holds_an_epoch(executed):
    """The loops of the program are the iterations, the chunk's steps and the updates of the small schedule."""
    assert printed(executed)["program"] == PROGRAM


def test_every_epoch_has_a_line(executed):
    lines = re.findall(
        r"(\w+) +(\d+) updates +([\d,]+) steps +[\d.]+ s +success (\d\.\d\d)", printed(executed)["train"]
    )
    assert [line[:3] for line in lines] == [
        ("offline", "100", "0"),
        ("offline", "200", "0"),
        ("online", "232", "640"),
        ("online", "264", "1,280"),
    ]
    last = success(executed)
    assert (float(lines[1][3]), float(lines[3][3])) == (last["offline"], last["online"])


def test_success_rates_are_of_ten_episodes(executed):
    rates = success(executed)
    assert list(rates) == ["behaviour", "offline", "online"]
    assert all(rate in [n / 10 for n in range(11)] for rate in rates.values())


def test_pictures_are_drawn(executed):
    check_pictures(executed)


def test_update_runs_in_a_scan_of_ones_own(executed):
    metrics = ast.literal_eval(printed(executed)["next"])
    assert {"critic/loss", "actor/diagonal_loss"} < set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())


def test_files_stay_in_the_working_directory(executed, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["datasets", "rollout.gif"]


def test_stored_outputs_are_complete_and_clean(stored):
    """They are of one run from top to bottom, at full size, without errors, warnings, or a machine's paths."""
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert cell.metadata == {}
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
    text = QUICKSTART.read_text()
    assert not re.search(r"site-packages|ipykernel_\d|/(home|Users|root|tmp|work)/", text)
    assert len(text) < 2_500_000
    check_pictures(stored)


def test_stored_run_learned(stored):
    rates = success(stored)
    assert rates["behaviour"] < rates["offline"] < rates["online"]
