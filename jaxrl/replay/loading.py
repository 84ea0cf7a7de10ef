"""A dataset as a task needs it: sizes held against the environment's, rewards and goals added, laid out as a ring."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.data import files
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.replay.hindsight import Hindsight
from jaxrl.replay.kdtree import bare
from jaxrl.replay.neighbours import with_forest
from jaxrl.replay.ring import Ring, empty
from jaxrl.replay.weighting import UNIFORM, Weighting, Weights, trajectory_weights, weights_of


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is known of a dataset without its content."""

    path: str
    entries: Mapping[str, tuple[int, ...]]  # the shape of one row of each column
    rows: int
    episodes: int
    longest: int  # steps of the longest episode


def sizes_of(dataset: Dataset) -> Sizes:
    """Returns the sizes of a dataset in memory."""
    first, last = files.episodes(dataset)
    entries = {name: column.shape[1:] for name, column in files.to_columns(dataset).items()}
    return Sizes(dataset.path, entries, len(dataset.terminals), len(last), int((last - first).max()))


def check_fits(sizes: Sizes, env: Any) -> None:
    """Raises UserError where a dataset's sizes are not the environment's, or it lacks what nothing supplies."""
    spec, where = env.spec, f"dataset {sizes.path}"
    (entries,), (actions,) = sizes.entries["observations"], sizes.entries["actions"]
    states = spec.observation - spec.goal
    if entries not in (spec.observation, states):
        without = f", {states} without the goal" if spec.goal else ""
        raise UserError(
            f"{where}: observations have {entries} entries, the environment has {spec.observation}{without}"
        )
    if actions != spec.action:
        raise UserError(f"{where}: actions have {actions} entries, the environment has {spec.action}")
    if spec.goal:
        goal_source(sizes, env)
    elif "rewards" not in sizes.entries and not hasattr(env, "relabel"):
        raise UserError(f"{where}: has no rewards, and the environment cannot relabel it")


def goal_source(sizes: Sizes, env: Any) -> Literal["environment", "file", "states"]:
    """Returns where it is said what a dataset's states are as goals: in the environment's `goal_of`, in the file's
    column oracle_reps, or nowhere, where a goal is a whole state. Raises UserError where it has to be said.
    """
    goal = env.spec.goal
    if hasattr(env, "goal_of"):
        return "environment"
    if sizes.entries.get("oracle_reps") == (goal,):
        return "file"
    if env.spec.observation == 2 * goal:
        return "states"
    raise UserError(
        f"dataset {sizes.path}: nothing says what its states are as goals, which have {goal} entries in the "
        f"environment: it has no column 'oracle_reps' [rows, {goal}], and the environment no goal_of(states)"
    )


def window_of(agent: Any) -> int:
    """Returns how many steps the windows have that an agent learns from: its chunk's, or its backup's."""
    return max(agent.chunk, getattr(agent, "backup", 0))


def check_window(sizes: Sizes, window: int) -> None:
    """Raises UserError where no episode is as long as the windows that the agent learns from."""
    if sizes.longest < window:
        raise UserError(
            f"dataset {sizes.path}: its longest episode has {sizes.longest} steps, the agent's windows have {window}: "
            "lower agent.chunk, or agent.backup where there is one"
        )


def to_ring(
    dataset: Dataset,
    env: Any,
    scale: float = 1.0,
    shift: float = 0.0,
    room: tuple[int, int] = (0, 0),
    probabilities: bool = False,
    weighting: Weighting = UNIFORM,
    searched: bool = False,
) -> Ring:
    """Returns the dataset in device memory, with the environment's own rewards where it can relabel.

    Rewards r become scale * r + shift; with `probabilities`, UserError where they then leave [0, 1]. In a
    goal-conditioned environment goals are drawn in hindsight, and rewards with them. `room` is the rows and the
    episodes that there is place for, so that datasets of several sizes are alike. `weighting` says which episodes are
    drawn more often. With `searched`, the host can look for neighbours among the rows.
    """
    check_weighting(weighting, env)
    finish = with_forest if searched else lambda ring: ring
    if env.spec.goal:
        states, goals = states_and_goals(dataset, env)
        none, dataset = np.zeros(len(states), bool), dataclasses.replace(dataset, observations=states)
        return finish(from_dataset(dataset, none, none, goals=goals, room=room))
    if hasattr(env, "relabel"):
        dataset = files.relabelled(dataset, env.relabel)
    assert dataset.rewards is not None
    ended = np.zeros(len(dataset.rewards), bool) if dataset.masks is None else dataset.masks == 0
    rewards = scale * dataset.rewards + shift
    if probabilities:
        check_probabilities(rewards[~dataset.terminals], dataset.path)
    weights = weigh(dataset, weighting, room[1])
    ring = from_dataset(dataset, rewards, ended, room=room)
    return finish(dataclasses.replace(ring, weights=weights))


def check_weighting(weighting: Weighting, env: Any) -> None:
    """Raises UserError where trajectories are to be weighted, but goals in hindsight give each of them many returns."""
    if weighting.kind != "uniform" and env.spec.goal:
        raise UserError(
            f"weighting.kind = {weighting.kind!r}: goals are drawn in hindsight here, so that no trajectory has one "
            "return; only 'uniform' is possible"
        )


def weigh(dataset: Dataset, weighting: Weighting, room: int = 0) -> Weights | None:
    """Returns how often each episode of a dataset with rewards is drawn, None where all transitions are alike.

    `room` is the episodes that there is place for, where that is more than the dataset has.
    """
    if weighting.kind == "uniform":
        return None
    first, last = files.episodes(dataset)
    returns = np.add.reduceat(np.where(dataset.terminals, 0.0, np.asarray(dataset.rewards)), first, dtype=np.float64)
    law = (weighting.kind, weighting.temperature, weighting.fraction)
    log_weights = trajectory_weights(returns, last - first, dataset.observations[first], *law)
    return weights_of(log_weights, first, last - first, room)


def check_probabilities(rewards: np.ndarray, path: str) -> None:
    """Raises UserError where rewards leave [0, 1], for agents whose values are probabilities of success."""
    low, high = rewards.min(), rewards.max()
    if low < 0 or high > 1:
        hint = ": give --reward-shift 1" if (low, high) == (-1, 0) else ""
        raise UserError(
            f"dataset {path}: rewards lie in [{low:g}, {high:g}], the agent's values are probabilities of success and "
            f"need rewards in [0, 1]{hint}"
        )


def states_and_goals(dataset: Dataset, env: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns (states [N, S], what they are as goals [N, G]); the same array where a goal is a whole state.

    Observations that hold the goal that was pursued lose it.
    """
    size, states = env.spec.observation - env.spec.goal, dataset.observations
    if states.shape[1] > size:
        states = states[:, :size]
    source = goal_source(sizes_of(dataset), env)
    if source == "environment":
        return states, np.asarray(env.goal_of(states), np.float32)
    return states, np.asarray(dataset.extra["oracle_reps"], np.float32) if source == "file" else states


def abstract_ring(sizes: Sizes, env: Any, weighting: Weighting = UNIFORM, searched: bool = False) -> Ring:
    """Returns the shapes of what `to_ring` makes of a dataset of these sizes; its trees, if any, have no rows."""
    check_weighting(weighting, env)
    spec, rows = env.spec, sizes.rows + 1

    def build() -> Ring:
        ring, episodes = empty(1, rows, spec.observation - spec.goal, spec.action), jnp.zeros(sizes.episodes, jnp.int32)
        if weighting.kind != "uniform":
            weights = Weights(episodes, episodes, episodes.astype(jnp.uint32), episodes)
            ring = dataclasses.replace(ring, weights=weights)
        if not spec.goal:
            return ring
        goals = None if goal_source(sizes, env) == "states" else jnp.zeros((rows, spec.goal))
        return dataclasses.replace(ring, hindsight=Hindsight(goals, episodes, episodes))

    return dataclasses.replace(jax.eval_shape(build), forest=bare() if searched else None)


def from_dataset(
    dataset: Dataset,
    rewards: np.ndarray,
    terminated: np.ndarray,
    lanes: int = 1,
    goals: np.ndarray | None = None,
    room: tuple[int, int] = (0, 0),
) -> Ring:
    """Returns a dataset as a full ring. `rewards` [N] and `terminated` [N] belong to the transition leaving each row.

    Whole episodes are dealt to the lanes, the longest first, each to the lane that is shortest so far. A row that
    closes an episode keeps its observation and loses its action.

    With `goals` [N, G], what stands for each row as a goal, they are drawn in hindsight, from one lane; the same array
    as the observations is not stored again. `room` is the rows and the episodes that there is place for, where that
    is more than the dataset has.
    """
    if not dataset.terminals[-1:].any():
        raise UserError("dataset: the last row must close an episode (terminals[-1] is False)")
    first, last = files.episodes(dataset)
    dealt = _deal(first, last, lanes)
    filled = [len(pile) for pile in dealt]
    rows = max(max(filled), room[0]) + 1  # the head's row stays free
    valid = ~dataset.terminals
    truncated = np.roll(dataset.terminals, -1) & valid & ~terminated
    columns = {
        "obs": dataset.observations,
        "actions": dataset.actions,
        "rewards": np.where(valid, rewards, 0).astype(np.float32),
        "terminated": terminated & valid,
        "truncated": truncated,
        "valid": valid,
    }

    def lay(column: np.ndarray) -> jax.Array:
        laid = np.zeros((lanes, rows, *column.shape[1:]), column.dtype)
        for lane, pile in enumerate(dealt):
            laid[lane, : len(pile)] = column[pile]
        return jnp.asarray(laid)

    hindsight = None
    if goals is not None:
        none = max(room[1] - len(last), 0)  # episodes without steps
        begin, steps = (np.pad(x, (0, none)).astype(np.int32) for x in (first, last - first))
        own = None if goals is dataset.observations else lay(goals)[0]
        hindsight = Hindsight(own, jnp.asarray(begin), jnp.asarray(steps))
    count = jnp.asarray(filled, jnp.int32)
    fields: dict[str, Any] = {name: lay(column) for name, column in columns.items()}
    return Ring(**fields, head=count, count=count, hindsight=hindsight)


def _deal(first: np.ndarray, last: np.ndarray, lanes: int) -> list[np.ndarray]:
    """Returns the rows of each lane: of whole episodes, the longest first, each in the lane that is shortest so far."""
    if lanes == 1:
        return [np.arange(last[-1] + 1)]
    piles = [[np.zeros(0, np.int64)] for _ in range(lanes)]
    filled = np.zeros(lanes, np.int64)
    for episode in np.argsort(first - last, kind="stable"):
        shortest = int(np.argmin(filled))
        piles[shortest].append(np.arange(first[episode], last[episode] + 1))
        filled[shortest] += len(piles[shortest][-1])
    return [np.concatenate(pile) for pile in piles]
