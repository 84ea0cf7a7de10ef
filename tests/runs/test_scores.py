"""The score of evaluations: success, or return in environments without success."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs.point import Point
from jaxrl import cli, stats
from jaxrl.rollout.device import Episodes
from jaxrl.runs.evaluation import evaluation
from jaxrl.runs.logging import evaluation_line
from jaxrl.runs.scores import score_of_row, scored
from jaxrl.types import score_of
from tests import tiny


@dataclasses.dataclass(frozen=True, eq=False)
class Rewarding(Point):
    """`point` as an environment without success."""

    score: str = "return"


def make(horizon: int = 12) -> Rewarding:
    return Rewarding(horizon=horizon)


def episodes(returns: list[float]) -> Episodes:
    count = len(returns)
    no, lengths = jnp.zeros(count, bool), jnp.full(count, 7)
    return Episodes(no, np.array(returns, np.float32), lengths, no, ())


def test_the_score_is_success_unless_the_environment_says_otherwise():
    assert score_of(envs.make("point")) == "success" and score_of(make()) == "return"
    assert score_of(envs.make("brax/fast")) == "return"


def test_without_success_a_row_holds_the_return_with_its_interval():
    row = evaluation(episodes([1.0, 2.0, 6.0, 7.0]), "return")
    assert sorted(row) == ["eval/broken", "eval/length", "eval/return", "eval/return_high", "eval/return_low"]
    assert scored(row) == (4.0, *stats.mean_interval([1.0, 2.0, 6.0, 7.0])) and row["eval/return_low"] < 4.0
    line = evaluation_line(row | {"phase": "online", "epoch": 1, "updates": 2, "steps": 3})
    assert "return 4.0 [" in line and "success" not in line


@pytest.mark.parametrize("returns", [[3.0], [3.0, np.inf]])
def test_without_an_interval_its_ends_are_not_numbers(returns):
    row = evaluation(episodes(returns), "return")
    assert np.isnan([row["eval/return_low"], row["eval/return_high"]]).all()


def test_success_comes_first_where_both_are_known():
    assert score_of_row(evaluation(episodes([1.0, 2.0]))) == "success"
    assert score_of_row({"epoch": 1}) is None


def test_a_run_without_success_shows_its_return(tmp_path, monkeypatch, capsys, quick):
    monkeypatch.chdir(tmp_path)
    flags = "--data-steps 60 --schedule.offline-updates 4 --schedule.updates-per-epoch 2 --schedule.online-steps 0"
    small = "--schedule.eval-every 1 --schedule.eval-episodes 3 --agent.td3.transitions.batch 8"
    nets = "--agent.td3.actor.net.hidden 4 --agent.td3.critic.net.hidden 4"
    argv = ["train", "td3bc", f"{__name__}:make", *flags.split(), *small.split(), *nets.split(), "--out", "run"]
    assert cli.main([*argv, "--behaviour", "random"]) == 0
    out, rows = capsys.readouterr().out, tiny.rows(tmp_path / "run")
    assert {score_of_row(row) for row in rows} - {None} == {"return"}
    assert "success" not in out and f"return {rows[-1]['eval/return']:.1f} [" in out
    assert (tmp_path / "run" / "curves.png").exists()
