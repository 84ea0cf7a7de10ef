"""Replays `dataset_*`: how training batches are cut out of trajectories, by DQC, QC and QGF.

The official windows of QC run on past an episode's end and those of QGF freeze there; ours stop. All are equal where
a step is valid, and where it is not nothing else is compared.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.data.files import from_columns
from jaxrl.ops.losses import chunk_return
from jaxrl.replay import hindsight, ring
from jaxrl.replay.loading import from_dataset
from jaxrl.types import Batch
from tests.golden.recorded import Recorded

returns = jax.jit(chunk_return)
window_at = jax.jit(ring.window_at, static_argnums=3)


def replay(r: Recorded) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns pairs of what we make and what the official code made."""
    cases = {"dqc": _towards_goals, "qc": _along_episodes, "qgf": _along_episodes}[r.meta["variant"]]
    expected, columns, inputs = (
        {name.removeprefix(prefix): value for name, value in r.below(prefix).items()}
        for prefix in ("expected/batch/", "dataset/", "inputs/")
    )
    found = cases(columns, inputs, expected, r.hparams["horizon"], r.hparams["discount"])
    return {f"expected/batch/{name}" if name in expected else name: pair for name, pair in found}


def _towards_goals(columns: dict, inputs: dict, expected: dict, horizon: int, discount: float) -> Iterator[Any]:
    """Yields the cases of DQC: windows towards given goals, and every row where one may start."""
    data = from_columns(columns)
    nothing = np.zeros(len(data.terminals), bool)
    laid = from_dataset(data, nothing, nothing, goals=data.extra.get("oracle_reps", data.observations))
    assert laid.hindsight is not None
    start, goal = jnp.asarray(inputs["idxs"]), jnp.asarray(inputs["goal_idxs"])
    law = hindsight.DEFAULT
    batch = hindsight.window_at(laid.obs[0], laid.actions[0], laid.hindsight, start, goal, horizon, law)
    size = data.observations.shape[1]
    ours = {
        "observations": batch.obs[:, :size],
        "actions": batch.actions[:, 0],
        "high_value_action_chunks": batch.actions.reshape(len(start), -1),
        "high_value_next_observations": batch.next_obs[:, :size],
        "high_value_goals": batch.obs[:, size:],
        "high_value_rewards": returns(batch.rewards, batch.steps, discount)[0],
        "high_value_masks": 1 - batch.terminated,
        "high_value_backup_horizon": batch.steps,
        "valids": batch.valid,
    }
    assert ours.keys() == expected.keys()
    yield from ((name, (np.asarray(ours[name]), expected[name])) for name in expected)
    yield "goals of the next states", (np.asarray(batch.next_obs[:, size:]), expected["high_value_goals"])
    drawn, last = hindsight.starts(laid.hindsight, jax.random.key(0), 50 * len(start), horizon)
    found, at = np.unique(drawn, return_index=True)
    yield "idxs", (found, inputs["idxs"])
    yield "final_idxs", (np.asarray(last)[at], inputs["final_idxs"])


def _along_episodes(columns: dict, inputs: dict, expected: dict, horizon: int, discount: float) -> Iterator[Any]:
    """Yields the cases of QC and QGF: windows of 1 to `horizon` steps, each compared with the entry at its last step.

    The recorded next observations are not those of the following rows, so a row holds both: its own observation and,
    beside it, what the step before led to. One step of the record has mask 0 although its episode goes on; ours ends
    there, so a step is valid for us where it is valid for them and no mask was 0 before it.
    """
    before = np.roll(columns["next_observations"], 1, axis=0)
    wide = {
        "observations": np.concatenate([columns["observations"], before], axis=1),
        "next_observations": np.concatenate(
            [np.roll(columns["observations"], -1, axis=0), columns["next_observations"]], axis=1
        ),
    }
    data = from_columns(columns | wide)
    assert data.rewards is not None and data.masks is not None
    laid = from_dataset(data, data.rewards, data.masks == 0)
    row = np.flatnonzero(~data.terminals)[inputs["idxs"]]  # an episode's last observation has a row of its own

    def windows(length: int) -> Batch:
        return window_at(laid, jnp.zeros(len(row), int), jnp.asarray(row), length)

    by_length = [windows(length) for length in range(1, horizon + 2)]
    whole, size = by_length[-1], columns["observations"].shape[1]
    goes_on = np.cumprod(np.pad(expected["masks"], ((0, 0), (1, 0)), constant_values=1), axis=1)[:, :-1]
    valid = expected["valid"] * goes_on
    ours = {
        "rewards": [returns(batch.rewards, batch.steps, discount)[0] for batch in by_length[:-1]],
        "masks": [1 - batch.terminated for batch in by_length[:-1]],
        "terminals": [1 - whole.valid[:, j] for j in range(1, horizon + 1)],
        "next_observations": [batch.next_obs[:, size:] for batch in by_length[:-1]],
        "actions": [whole.actions[:, j] for j in range(horizon)],
    }
    yield "observations", (np.asarray(whole.obs[:, :size]), expected["observations"])
    yield "valid", (np.asarray(whole.valid[:, :-1]), valid)
    expected = expected | {"terminals": np.maximum(expected["terminals"], expected["masks"] == 0)}
    for name, steps in ours.items():
        found = np.stack([np.asarray(step) for step in steps], axis=1)
        yield name, (found[valid > 0], expected[name][valid > 0])
