"""The notebooks run from top to bottom, small, and show what they say; their stored outputs are those of a full run."""

import ast
import base64
import functools
import io
import json
import math
import re
import types
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image, ImageSequence

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
QUICKSTART, STEP, PICTURES = "01_quickstart", "02_import_a_step", "03_flow_maps_and_guidance"
SWEEP = "04_sweep_and_report"
DRAWN = {  # the cells that draw a picture
    QUICKSTART: ["data-picture", "curves", "flow-picture", "guidance", "radius"],
    STEP: ["curves", "online-picture", "weight-picture"],
    PICTURES: ["flow", "chords", "steps", "errors", "critic", "guidance", "strength", "policy"],
    SWEEP: ["curves", "slices", "map", "improvement", "draws"],
}
WRITTEN = {  # files that are left behind
    QUICKSTART: ["datasets", "rollout.gif"],
    STEP: ["state.npz"],
    PICTURES: [],
    SWEEP: ["datasets", "runs"],
}

PROGRAM = """\
offline: 2 epochs, each a
    scan of length 100
online: 2 epochs, each a
    scan of length 8
        scan of length 5
        scan of length 4
"""


@functools.cache
def stored(name):
    """Returns a notebook as it is kept."""
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module", params=DRAWN)
def executed(request, tmp_path_factory):
    """A notebook after a small run in an empty folder; a cell that fails raises here."""
    run = types.SimpleNamespace(name=request.param, folder=tmp_path_factory.mktemp(request.param))
    run.notebook = nbformat.read(NOTEBOOKS / f"{run.name}.ipynb", as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXRL_SMALL", "1")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # nearly all of a small run is compiling
        resources = {"metadata": {"path": run.folder}}
        NotebookClient(run.notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    return run


def of(name):
    """Has a test look at the small run of one notebook."""
    return pytest.mark.parametrize("executed", [name], indirect=True)


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


def results(notebook, cell):
    """Returns what a cell printed as JSON, by the words before it."""
    lines = [line.partition(": {") for line in printed(notebook)[cell].splitlines()]
    return {words: json.loads("{" + numbers) for words, _, numbers in lines if numbers.endswith("}")}


def success(notebook):
    """Returns the success rates that the quickstart printed last."""
    return results(notebook, "curves")["success"]


def check_pictures(name, notebook):
    """Every picture is a PNG in colour, and the quickstart's episode an animation that moves."""
    pictures = shown(notebook, "image/png")
    assert list(pictures) == DRAWN[name]
    for data in pictures.values():
        picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 50
    if name == QUICKSTART:
        (gif,) = re.findall(r"data:image/gif;base64,([^\"]+)", shown(notebook, "text/html")["video"])
        frames = ImageSequence.all_frames(Image.open(io.BytesIO(base64.b64decode(gif))))
        assert len({frame.tobytes() for frame in frames}) > 10


def test_pictures_are_drawn(executed):
    check_pictures(executed.name, executed.notebook)


def test_files_stay_in_the_working_directory(executed):
    assert sorted(path.name for path in executed.folder.iterdir()) == WRITTEN[executed.name]


@pytest.mark.parametrize("name", DRAWN)
def test_stored_outputs_are_complete_and_clean(name):
    """They are of one run from top to bottom, at full size, without errors, warnings, or a machine's paths."""
    code = [cell for cell in stored(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert cell.metadata == {}
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
    text = (NOTEBOOKS / f"{name}.ipynb").read_text()
    assert not re.search(r"site-packages|ipykernel_\d|/(home|Users|root|tmp|work)/|widget", text)
    assert len(text) < 1_000_000
    check_pictures(name, stored(name))


# 01_quickstart


@of(QUICKSTART)
def test_one_compiled_call_holds_an_epoch(executed):
    """The loops of the program are the iterations, the chunk's steps and the updates of the small schedule."""
    assert printed(executed.notebook)["program"] == PROGRAM


@of(QUICKSTART)
def test_every_epoch_has_a_line(executed):
    lines = re.findall(
        r"(\w+) +(\d+) updates +([\d,]+) steps +[\d.]+ s +success (\d\.\d\d)", printed(executed.notebook)["train"]
    )
    assert [line[:3] for line in lines] == [
        ("offline", "100", "0"),
        ("offline", "200", "0"),
        ("online", "232", "640"),
        ("online", "264", "1,280"),
    ]
    last = success(executed.notebook)
    assert (float(lines[1][3]), float(lines[3][3])) == (last["offline"], last["online"])


@of(QUICKSTART)
def test_success_rates_are_of_ten_episodes(executed):
    rates = success(executed.notebook)
    assert list(rates) == ["behaviour", "offline", "online"]
    assert all(rate in [n / 10 for n in range(11)] for rate in rates.values())


@of(QUICKSTART)
def test_update_runs_in_a_scan_of_ones_own(executed):
    metrics = ast.literal_eval(printed(executed.notebook)["next"])
    assert {"critic/loss", "actor/diagonal_loss"} < set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())


def test_stored_quickstart_learned():
    rates = success(stored(QUICKSTART))
    assert rates["behaviour"] < rates["offline"] < rates["online"]


# 02_import_a_step


@of(STEP)
def test_learning_rates_share_one_compilation(executed):
    lines = printed(executed.notebook)["train"].splitlines()
    assert lines[0].startswith("traced 1 time, compiled once")
    assert lines[1].startswith("5 members, 10 updates each")


@of(STEP)
def test_restored_state_goes_on_bit_for_bit(executed):
    assert printed(executed.notebook)["state"] == "equal after another update: True\n"


@of(STEP)
def test_guidance_of_weight_zero_is_the_flow(executed):
    assert printed(executed.notebook)["weight"].startswith("weight 0 is the flow, bit for bit: True\n")


@of(STEP)
def test_guidance_moves_samples_to_the_better_mode(executed):
    for notebook in (executed.notebook, stored(STEP)):
        shares = list(results(notebook, "weight")["better mode"].values())
        assert shares == sorted(shares) and shares[0] < 0.6 and shares[-1] > 0.95


def test_stored_loops_learned():
    arrived = results(stored(STEP), "curves")["arrived"].values()
    assert min(arrived) < 0.1 and max(arrived) > 0.9
    steps = results(stored(STEP), "online-picture")["steps"]
    assert steps["last"] < 0.7 * steps["first"]


# 03_flow_maps_and_guidance


@of(PICTURES)
def test_euler_in_the_exact_field_gains_by_every_step(executed):
    exact = results(executed.notebook, "errors")["errors"]["exact"]
    assert exact == sorted(exact, reverse=True) and exact[3] < exact[0] / 5


@of(PICTURES)
def test_more_guidance_never_lowers_what_the_critic_promises(executed):
    for notebook in (executed.notebook, stored(PICTURES)):
        operators = results(notebook, "strength")
        assert len(operators) == 3
        for numbers in operators.values():
            assert numbers["critic"] == sorted(numbers["critic"])


@of(PICTURES)
def test_no_step_is_the_first_jump_alone(executed):
    choice, step, _ = results(executed.notebook, "strength").values()
    assert [choice[name][0] for name in ("critic", "truth", "land")] == [
        step[name][0] for name in ("critic", "truth", "land")
    ]


def test_stored_map_needs_one_step_where_euler_needs_many():
    errors = results(stored(PICTURES), "errors")["errors"]
    assert errors["euler"] == sorted(errors["euler"], reverse=True)
    assert errors["Lagrangian"][0] < errors["euler"][3]


def test_stored_guidance_is_right_for_a_while_and_then_leaves_the_data():
    _, *operators = results(stored(PICTURES), "strength").values()
    for numbers in operators:
        best = int(np.argmax(numbers["truth"]))
        assert numbers["truth"][0] < numbers["truth"][best] > numbers["truth"][-1] + 0.5
        assert numbers["land"][best] > 0.9 and numbers["land"][-1] < 0.2


def test_stored_policy_moved_by_the_radius():
    for eta, moved in results(stored(PICTURES), "policy")["moved by"].items():
        assert moved == pytest.approx(float(eta), rel=0.1)


# 04_sweep_and_report


@of(SWEEP)
def test_scalars_alone_keep_the_program(executed):
    lines = printed(executed.notebook)["scalars"].splitlines()
    assert "alpha" in lines[0] and "batch" not in lines[0]
    assert lines[1:] == ["another alpha, the same program: True", "another batch size, the same program: False"]


@of(SWEEP)
def test_an_interrupted_sweep_goes_on_by_the_same_command(executed):
    for notebook, epochs in ((executed.notebook, 4), (stored(SWEEP), 8)):
        parts = [printed(notebook)[cell] for cell in ("interrupt", "again")]
        assert "with: jaxrl sweep --resume runs/alpha\nexit code 75\n" in parts[0]
        assert parts[1].endswith("exit code 0\n")
        seen = [[int(epoch) for epoch in re.findall(r"^program.* epoch +(\d+)", part, re.MULTILINE)] for part in parts]
        assert seen[0] and seen[1] and seen[0] + seen[1] == list(range(1, epochs + 1))
        assert "metrics of the run alone and of the member are equal: True" in printed(notebook)["alone"]


@of(SWEEP)
def test_the_absurd_learning_rate_diverges_and_harms_no_other(executed):
    for notebook, diverged, members in ((executed.notebook, 4, 8), (stored(SWEEP), 20, 60)):
        result = json.loads(printed(notebook)["again"].splitlines()[-2].removeprefix("result: "))
        assert (result["members"], result["diverged"]) == (members, diverged)
        assert result["finished"] == members - diverged
        assert result["best"]["values"]["agent.td3.critic_adam.lr"] < 1


@of(SWEEP)
def test_halving_halves_twice(executed):
    for notebook in (executed.notebook, stored(SWEEP)):
        assert printed(notebook)["draws"].endswith("share of the full budget: 0.5\n")


def test_stored_sweep_found_the_ridge_between_critic_and_data():
    scores = re.findall(r"alpha=(\d+) lr=\S+ +(\d\.\d\d) \[", printed(stored(SWEEP))["report"])
    assert scores[0][0] == "30" and float(scores[0][1]) > 0.8
    rates = re.findall(r"alpha +(\S+): success of its seeds (\d\.\d\d) (\d\.\d\d)", printed(stored(SWEEP))["run"])
    means = {alpha: (float(one) + float(other)) / 2 for alpha, one, other in rates}
    assert means["2.5"] < means["1000"] < means["30"]


def test_stored_choice_is_overrated():
    for scores in results(stored(SWEEP), "honest").values():
        assert scores["chosen on"] >= scores["separate"]
