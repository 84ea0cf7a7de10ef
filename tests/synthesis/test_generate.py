"""Facts about jaxrl.synthesis.generate: a small model of known dynamics, its folder, and the command."""

import dataclasses
import math
import re
import shutil
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import cli
from jaxrl.data import files
from jaxrl.errors import UserError
from jaxrl.ops.diffusion import Sampler
from jaxrl.runs import directory
from jaxrl.runs.signals import StopRequested
from jaxrl.synthesis import generate
from jaxrl.synthesis.model import Generator
from jaxrl.types import Spec, pytree
from tests import tiny
from tests.known import KEY, quick_to_compile, same


@pytest.fixture(autouse=True)
def quick():
    with quick_to_compile():
        yield


# A small model of a known linear system: s' = A s + B a


DYNAMICS = np.array([[0.9, 0.3], [-0.3, 0.9]], np.float32)
CONTROL = np.array([[0.0], [0.6]], np.float32)


def linear_system(count: int = 150, steps: int = 12) -> files.Dataset:
    """Returns episodes of random actions in the system, with rewards that are the first entry of the state."""
    random = np.random.default_rng(0)
    actions = random.uniform(-0.9, 0.9, (count, steps + 1, 1)).astype(np.float32)
    state, states = random.normal(size=(count, 2)).astype(np.float32), []
    for t in range(steps + 1):
        states.append(state)
        state = state @ DYNAMICS.T + actions[:, t] @ CONTROL.T
    obs = np.stack(states, axis=1)
    columns = {
        "observations": obs.reshape(-1, 2),
        "actions": actions.reshape(-1, 1),
        "rewards": obs[..., 0].ravel(),
        "terminals": np.tile(np.arange(steps + 1) == steps, count),
    }
    return files.from_columns(columns)


def surprise(dataset: files.Dataset, shuffled: bool = False) -> float:
    """Returns the mean distance of next states from what the system would have made of the state and the action."""
    rows = np.flatnonzero(~dataset.terminals)
    following = dataset.observations[np.random.default_rng(1).permutation(rows) + 1 if shuffled else rows + 1]
    expected = dataset.observations[rows] @ DYNAMICS.T + dataset.actions[rows] @ CONTROL.T
    return np.linalg.norm(following - expected, axis=-1).mean()


@pytree
class Steady:
    """An agent that always does 0.8."""

    chunk: int = 1

    def act(self, state, obs, key, *, greedy=False):
        assert greedy
        return jnp.full((len(obs), 1, 1), 0.8)


MODEL = Generator(length=8, stride=2, widths=(32,), updates=600, ema_every=1)


def fit(folder, requested: bool = False):
    """Returns the scale and the parameters of the small model, trained on in a folder, or stops where that is asked."""
    parts = generate.prepare(MODEL, linear_system(), folder)
    stop: Any = types.SimpleNamespace(requested=requested)
    params, error = generate.fitted(MODEL, parts, folder, KEY, stop)
    return parts[0].scale, params, error


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of the small model, its scale and its parameters."""
    folder = tmp_path_factory.mktemp("model")
    with quick_to_compile():
        return folder, *fit(folder)


def test_training_that_was_stopped_goes_on_bit_for_bit_and_a_finished_one_is_used_again(model, tmp_path):
    folder, _, params, error = model
    with pytest.raises(StopRequested):
        fit(tmp_path, requested=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["1"]
    _, again, said = fit(tmp_path)
    assert same(again, params) and said == error
    _, again, said = fit(folder)
    assert same(again, params) and said == "trained before"


def generated(model, guidance: float, policy=None) -> files.Dataset:
    _, scale, params, _ = model
    sampler = Sampler(denoising_steps=24, guidance=guidance)
    return generate.generate(MODEL, sampler, params, scale, KEY, 100, policy)


def test_generated_trajectories_follow_the_system_and_guided_actions_the_policy(model):
    free, none = generated(model, 0.0), generated(model, 0.0, (Steady(), ()))
    assert same(files.to_columns(free), files.to_columns(none))  # guidance of strength 0
    guided = generated(model, 1.0, (Steady(), ()))
    for dataset in (free, guided):
        first, last = files.episodes(dataset)
        np.testing.assert_array_equal(last - first, [7] * 100)  # 8 states each
        assert surprise(dataset) < 0.5 * surprise(dataset, shuffled=True)
        rewards = dataset.rewards - dataset.observations[:, 0]
        assert np.abs(rewards[~dataset.terminals]).mean() < 0.3 * dataset.observations[:, 0].std()
    distance = lambda dataset: np.abs(dataset.actions[~dataset.terminals] - 0.8).mean()  # noqa: E731
    assert distance(guided) < 0.5 * distance(free)


# The command


def mistake(line: str, capsys) -> str:
    """Returns the one line that a mistake is answered with, having written nothing."""
    before = tiny.tree(Path.cwd())
    assert cli.main(["synthesize", *line.split()]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n"), tiny.tree(Path.cwd())) == ("", 1, before)
    return error.removeprefix("jaxrl: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "synthesize: name a dataset, for example `jaxrl synthesize DATA.npz --out new.npz`"),
        ("ok.npz", "--out: name the file to write"),
        ("okk.npz --out new.npz", "no file okk.npz: did you mean 'ok.npz'?"),
        ("ok.npz --out new.txt", "new.txt: the name of a dataset file ends in .npz"),
        ("ok.npz --out ok.npz", "ok.npz exists: name another file"),
        ("ok.npz --out new.npz --guidence 1", "unknown flag --guidence: did you mean --guidance? --help lists all"),
        ("ok.npz --out new.npz --guidance -1", "Sampler.guidance = -1.0: must be at least 0"),
        ("ok.npz --out new.npz --guidance nan", "Sampler.guidance = nan: must be finite"),
        ("ok.npz --out new.npz --denoising-steps 1", "Sampler.denoising_steps = 1: must be at least 2"),
        ("ok.npz --out new.npz --trajectories 0", "trajectories = 0: must be at least 1 and below 2^63"),
        ("ok.npz --out new.npz --updates 0", "Generator.updates = 0: must be at least 1"),
        ("ok.npz --out new.npz --lr 0", "Generator.lr = 0.0: must be at least 1e-06"),
        ("ok.npz --out new.npz --ema 1", "Generator.ema = 1.0: must be in [0, 0.999999]"),
        ("ok.npz --out new.npz --widths 20", "Generator.widths = (20,): must be multiples of 8, the first at least 16"),
        (
            "ok.npz --out new.npz --length 2 --widths 16 16 16",
            "Generator.length = 2: must be at least 4, since each of 3",
        ),
        ("ok.npz --out new.npz --length 13", "dataset ok.npz: no episode has 13 consecutive steps without"),
        (
            "bare.npz --out new.npz",
            "dataset bare.npz: has no rewards: name the environment that defines them with --env",
        ),
        ("ok.npz --out new.npz --env pont", "unknown environment 'pont': did you mean 'point'?"),
        ("ok.npz --out new.npz --policy nothing", "nothing is not a run directory: config.json is missing"),
        ("ok.npz --out new.npz --length 8 --model other", "other exists, but holds no diffusion model: name another"),
        ("ok.npz --out new.npz --length 8 --model ok.npz", "ok.npz exists, but holds no diffusion model: name another"),
        ("ok.npz --out new.npz --length 16 --model model", "length = 16: the model in model has 8; omit it, or"),
        ("less.npz --out new.npz --model model", "the model in model was trained on other data or rewards: name"),
        ("ok.npz --out new.npz --model cut", "cut/generator.json is damaged: 'generator' or 'dataset_digest' is miss"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(model, tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    data = linear_system()
    files.save("ok.npz", data)
    files.save("bare.npz", dataclasses.replace(data, rewards=None))
    files.save("less.npz", dataclasses.replace(data, rewards=data.rewards - 1))
    for name, file in (("other", "file"), ("cut", "generator.json")):
        Path(name).mkdir()
        Path(name, file).write_text("{}")
    shutil.copytree(model[0], "model")
    assert mistake(line, capsys).startswith(message)


def test_observations_that_are_no_vectors_are_refused():
    data = dataclasses.replace(linear_system(), path="x.npz")
    generate.check(data)
    with pytest.raises(UserError, match=r"x\.npz: observations are a dict \(state\); only vectors can be generated"):
        generate.check(dataclasses.replace(data, observations={"state": data.observations}))
    with pytest.raises(UserError, match=r"x\.npz: observations are images; only vectors can be generated"):
        generate.check(dataclasses.replace(data, observations=np.zeros((len(data.terminals), 2, 2, 3), np.uint8)))


def test_a_policy_of_other_sizes_is_refused():
    env = types.SimpleNamespace(spec=Spec(observation=4, action=1))
    config: Any = types.SimpleNamespace(agent=Steady())
    with pytest.raises(UserError, match=r"have 4 entries and its actions 1; those of dataset x\.npz have 2 and 1"):
        generate.policy_for(dataclasses.replace(linear_system(), path="x.npz"), config, env, Path("run"))


def test_one_model_gives_datasets_with_guidance_and_without(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files.save("data.npz", linear_system())
    monkeypatch.setattr(directory, "read_config", lambda path: types.SimpleNamespace(env=str(path)))
    monkeypatch.setattr("jaxrl.cli.flags.make", lambda name: None)
    monkeypatch.setattr(generate, "policy_for", lambda *arguments: (Steady(), ()))
    likely = {}
    for guidance in ("0", "1"):
        flags = f"--out new/{guidance}.npz --model {model[0]} --denoising-steps 24 --trajectories 100".split()
        assert cli.main(["synthesize", "data.npz", *flags, "--policy", "run", "--guidance", guidance]) == 0
        out, _ = capsys.readouterr()
        lines = dict(re.findall(r"^(\S.*?)  +(.+)$", out, re.M))
        assert lines["episodes"] == "100 (800 rows, 700 steps)"
        assert out.endswith(f"model in {model[0]}: trained before\n")
        data, likely[guidance] = map(float, lines["log pi(a | s), mean"].split())
        written = files.load(f"new/{guidance}.npz")
        actions = written.actions[~written.terminals]
        exact = -np.square(actions - 0.8).mean() / 2 - math.log(2 * math.pi) / 2
        np.testing.assert_allclose(likely[guidance], exact, atol=0.01)
        exact = -np.square(linear_system().actions - 0.8).mean() / 2 - math.log(2 * math.pi) / 2
        np.testing.assert_allclose(data, exact, atol=0.03)
        assert float(lines["step length, median"].split()[1]) > 0
    assert likely["1"] > likely["0"] + 0.1


def test_a_stop_is_told_and_exits_with_its_own_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files.save("data.npz", linear_system())

    def stopped(*arguments):
        raise StopRequested

    monkeypatch.setattr(generate, "fitted", stopped)
    assert cli.main(["synthesize", "data.npz", "--out=new.npz", "--length=8"]) == 75
    assert capsys.readouterr().err == "stopped and saved in new-model; repeat the command to resume\n"
