"""Which of the recorded updates move the actor is what a file says."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests import golden

pytestmark = pytest.mark.usefixtures("quick")

FOLDER = Path(golden.__file__).parent


def replay(name: str, whole: list[bool], folder: Path) -> golden.Outcome:
    """Returns the outcome of a copy of a file that says this of its updates."""
    with np.load(FOLDER / name) as file:
        content = {key: file[key] for key in file.files}
    hparams = json.loads(str(content["hparams"])) | {"full_update_per_step": whole}
    np.savez(folder / name, **content | {"hparams": json.dumps(hparams)})
    return golden.replay(folder / name)


@pytest.mark.parametrize(
    ("name", "said", "other"),
    [
        ("rebrac_actor_first.npz", [True, False, True], [True, True, False]),
        ("td3bc_default.npz", [False, True, False, True], [False, True, True, True]),
    ],
)
def test_another_order_of_updates_than_the_recorded_one_fails(name, said, other, tmp_path):
    assert replay(name, said, tmp_path).passed
    outcome = replay(name, other, tmp_path)
    assert not outcome.passed and ("actor" in outcome.where or outcome.missing)
