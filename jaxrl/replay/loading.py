"""A dataset prepared for a task: sizes checked against the environment's, rewards and goals added, as a ring."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.data import files
from jaxrl.data.files import Dataset, Observations
from jaxrl.errors import UserError, unknown
from jaxrl.replay.hindsight import Hindsight
from jaxrl.replay.kdtree import bare
from jaxrl.replay.neighbours import with_forest
from jaxrl.replay.ring import Ring, empty
from jaxrl.replay.weighting import UNIFORM, Weighting, Weights, trajectory_weights, weights_of
from jaxrl.types import Env, HostEnv, Leaf, NamesGoals, Relabels, Spec

AnyEnv: TypeAlias = Env | HostEnv


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a dataset, without its content."""

    path: str
    entries: Mapping[str, tuple[int, ...]]  # the shape of one row of each column
    rows: int
    episodes: int
    longest: int  # steps of the longest episode
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of columns; of those not named, float32

    def row(self, name: str) -> jax.ShapeDtypeStruct:
        """Returns the shape and dtype of one row of a column in device memory, where no number has 64 bits."""
        dtype = np.dtype(self.dtypes.get(name, "float32"))
        wide = {"f": np.float32, "i": np.int32, "u": np.uint32}
        return jax.ShapeDtypeStruct(self.entries[name], wide[dtype.kind] if dtype.itemsize == 8 else dtype)


def sizes_of(dataset: Dataset) -> Sizes:
    """Returns the sizes of a dataset in memory."""
    first, last = files.episodes(dataset)
    columns = files.to_columns(dataset)
    entries = {name: column.shape[1:] for name, column in columns.items()}
    dtypes = {name: column.dtype.name for name, column in columns.items()}
    return Sizes(dataset.path, entries, len(dataset.terminals), len(last), int((last - first).max()), dtypes)


def check_fits(sizes: Sizes, env: AnyEnv) -> None:
    """Raises UserError where a dataset's sizes are not the environment's, or rewards or goals are missing."""
    spec, where, (actions,) = env.spec, f"dataset {sizes.path}", sizes.entries["actions"]
    if isinstance(spec.observation, int):
        _check_vectors(sizes, spec.observation, spec.goal)
    else:
        _check_leaves(sizes, spec.without_goal())
    if actions != spec.action:
        raise UserError(f"{where}: actions have {actions} entries, the environment has {spec.action}")
    if spec.goal:
        goal_source(sizes, env)
    elif "rewards" not in sizes.entries and not isinstance(env, Relabels):
        raise UserError(f"{where}: has no rewards, and the environment cannot relabel it")


def _check_vectors(sizes: Sizes, size: int, goal: int) -> None:
    """Raises UserError where observations are not vectors of `size` entries, or without the goal's."""
    wanted = f"the environment has {size}" + (f", {size - goal} without the goal" if goal else "")
    names = {name for name in sizes.entries if files.kind_of(name) == "observations"}
    if names != {"observations"} or len(sizes.entries["observations"]) != 1:
        found = "; ".join(f"{name} {list(sizes.entries[name])}" for name in sorted(names))
        raise UserError(f"dataset {sizes.path}: observations are {found}, vectors of numbers are needed: {wanted}")
    (entries,) = sizes.entries["observations"]
    if entries not in (size, size - goal):
        raise UserError(f"dataset {sizes.path}: observations have {entries} entries, {wanted}")


def _check_leaves(sizes: Sizes, spec: Spec) -> None:
    """Raises UserError where a dataset lacks an array that the environment observes, or it is another one there."""
    leaves = spec.observation
    assert isinstance(leaves, tuple)
    for leaf in leaves:
        name = column_of(leaf, leaves, sizes.entries)
        if name not in sizes.entries:
            found = ", ".join(sorted(name for name in sizes.entries if files.kind_of(name) == "observations"))
            raise UserError(
                f"dataset {sizes.path}: has no column 'observations/{leaf.name}', which the environment observes: "
                f"found {found}"
            )
        found, wanted = sizes.row(name), jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype))
        if found != wanted:
            raise UserError(
                f"dataset {sizes.path}: a row of column {name!r} is {found.dtype}{list(found.shape)}, the environment "
                f"has {wanted.dtype}{list(wanted.shape)}"
            )


def column_of(leaf: Leaf, leaves: Sequence[Leaf], columns: Mapping[str, Any]) -> str:
    """Returns the name of the column that holds an array of observations.

    That of the only array that an environment observes may be `observations`.
    """
    alone = len(leaves) == 1 and "observations" in columns
    return "observations" if alone else f"observations/{leaf.name}"


def observed(dataset: Dataset, spec: Spec) -> Observations:
    """Returns a dataset's observations as an environment has them: of a dict the arrays that it observes."""
    if isinstance(spec.observation, int):
        return dataset.observations
    columns = files.observation_columns(dataset.observations)
    return {leaf.name: columns[column_of(leaf, spec.observation, columns)] for leaf in spec.observation}


def goal_source(sizes: Sizes, env: AnyEnv) -> Literal["environment", "file", "states"]:
    """Returns what maps a dataset's states to goals: the environment's `goal_of`, the file's column oracle_reps, or
    nothing, where a goal is a whole state. Raises UserError where none of them applies.
    """
    goal = goal_of(env.spec)
    if isinstance(env, NamesGoals):
        return "environment"
    if sizes.entries.get("oracle_reps") == goal.shape:
        return "file"
    states = env.spec.without_goal().observation
    alone = states if isinstance(states, tuple) else (Leaf("", (states,)),)
    if len(alone) == 1 and (alone[0].shape, alone[0].dtype) == (goal.shape, goal.dtype):
        return "states"
    raise UserError(
        f"dataset {sizes.path}: nothing says what its states are as goals, which have {_entries(goal)} entries in the "
        f"environment: it has no column 'oracle_reps' [rows, {_entries(goal)}], and the environment no goal_of(states)"
    )


def goal_of(spec: Spec) -> Leaf:
    """Returns the shape and dtype of one goal of a task that has goals."""
    if isinstance(spec.observation, int):
        return Leaf("goal", (spec.goal,))
    return next(leaf for leaf in spec.observation if leaf.name == "goal")


def _entries(leaf: Leaf) -> str:
    return ", ".join(map(str, leaf.shape))


def check_window(sizes: Sizes, window: int) -> None:
    """Raises UserError where no episode is as long as the windows that the agent learns from."""
    if sizes.longest < window:
        raise UserError(
            f"dataset {sizes.path}: its longest episode has {sizes.longest} steps, the agent's windows have {window}: "
            "lower agent.windows.backup and agent.windows.chunk"
        )


def to_ring(
    dataset: Dataset,
    env: AnyEnv,
    scale: float = 1.0,
    shift: float = 0.0,
    room: tuple[int, int] = (0, 0),
    probabilities: bool = False,
    weighting: Weighting = UNIFORM,
    searched: bool = False,
    columns: Sequence[str] = (),
) -> Ring:
    """Returns the dataset in device memory, with the environment's own rewards where it can relabel.

    Rewards r become scale * r + shift; with `probabilities`, UserError where they then leave [0, 1]. In a
    goal-conditioned environment goals are drawn in hindsight, and rewards with them. `room` is the least number of rows
    and episodes to allocate, so that datasets of several sizes have the same layout. `weighting` says which episodes
    are drawn more often. With `searched`, the host can search for neighbors among the rows. `columns` are the dataset's
    further columns that are kept in `Ring.extra`.
    """
    check_weighting(weighting, env)
    check_columns(sizes_of(dataset), columns)
    finish = with_forest if searched else lambda ring: ring
    if env.spec.goal:
        states, goals = states_and_goals(dataset, env)
        none, dataset = np.zeros(len(dataset.terminals), bool), dataclasses.replace(dataset, observations=states)
        return finish(from_dataset(dataset, none, none, goals=goals, room=room, columns=columns))
    dataset = dataclasses.replace(dataset, observations=observed(dataset, env.spec))
    if isinstance(env, Relabels):
        dataset = files.relabelled(dataset, env.relabel)
    assert dataset.rewards is not None
    ended = np.zeros(len(dataset.rewards), bool) if dataset.masks is None else dataset.masks == 0
    rewards = scale * dataset.rewards + shift
    if probabilities:
        check_probabilities(rewards[~dataset.terminals], dataset.path)
    weights = weigh(dataset, weighting, room[1])
    ring = from_dataset(dataset, rewards, ended, room=room, columns=columns)
    return finish(dataclasses.replace(ring, weights=weights))


def check_columns(sizes: Sizes, columns: Sequence[str]) -> None:
    """Raises UserError where a dataset lacks one of the further columns that an agent learns from."""
    further = {name for name in sizes.entries if files.kind_of(name) not in files.RANKS}
    for name in columns:
        if name not in further:
            error = unknown("column", name, further or {"none"})
            raise UserError(f"dataset {sizes.path}: the agent learns from a column that it lacks: {error}")


def check_weighting(weighting: Weighting, env: AnyEnv) -> None:
    """Raises UserError where trajectories are to be weighted in a task whose goals are drawn in hindsight."""
    if weighting.kind != "uniform" and env.spec.goal:
        raise UserError(
            f"weighting.kind = {weighting.kind!r}: goals are drawn in hindsight here, so that no trajectory has one "
            "return; only 'uniform' is possible"
        )


def weigh(dataset: Dataset, weighting: Weighting, room: int = 0) -> Weights | None:
    """Returns how often each episode of a dataset with rewards is drawn; None where transitions are drawn uniformly.

    `room` is the least number of episodes to allocate.
    """
    if weighting.kind == "uniform":
        return None
    first, last = files.episodes(dataset)
    law = (weighting.kind, weighting.temperature, weighting.fraction)
    initial = files.vectors(files.mapped(lambda x: x[first], dataset.observations))
    log_weights = trajectory_weights(files.episode_returns(dataset), last - first, initial, *law)
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


def states_and_goals(dataset: Dataset, env: AnyEnv) -> tuple[Observations, np.ndarray]:
    """Returns states [N, ...] and the goals [N, ...] that they are; the same array where a goal is a whole state.

    The goal that was pursued is dropped from observations that include it.
    """
    spec = env.spec.without_goal()
    states = observed(dataset, spec)
    if isinstance(spec.observation, int) and states.shape[1] > spec.observation:
        states = states[:, : spec.observation]
    source, dtype = goal_source(sizes_of(dataset), env), goal_of(env.spec).dtype
    if source == "states":
        (whole,) = jax.tree.leaves(states)
        return states, whole
    said = env.goal_of(states) if isinstance(env, NamesGoals) else dataset.extra["oracle_reps"]
    return states, np.asarray(said, dtype)


def abstract_ring(
    sizes: Sizes,
    env: AnyEnv,
    weighting: Weighting = UNIFORM,
    searched: bool = False,
    columns: Sequence[str] = (),
) -> Ring:
    """Returns the shapes of the ring that `to_ring` makes of a dataset of these sizes; KD-trees, if any, are empty."""
    check_weighting(weighting, env)
    check_columns(sizes, columns)
    spec, rows = env.spec, sizes.rows + 1

    def build() -> Ring:
        ring = empty(1, rows, spec.without_goal(), {name: sizes.row(name) for name in columns})
        episodes = jnp.zeros(sizes.episodes, jnp.int32)
        if weighting.kind != "uniform":
            weights = Weights(episodes, episodes, episodes.astype(jnp.uint32), episodes)
            ring = dataclasses.replace(ring, weights=weights)
        if not spec.goal:
            return ring
        goal = goal_of(spec)
        goals = None if goal_source(sizes, env) == "states" else jnp.zeros((rows, *goal.shape), goal.dtype)
        return dataclasses.replace(ring, hindsight=Hindsight(goals, episodes, episodes))

    return dataclasses.replace(jax.eval_shape(build), forest=bare() if searched else None)


def from_dataset(
    dataset: Dataset,
    rewards: np.ndarray,
    terminated: np.ndarray,
    lanes: int = 1,
    goals: np.ndarray | None = None,
    room: tuple[int, int] = (0, 0),
    columns: Sequence[str] = (),
) -> Ring:
    """Returns a dataset as a full ring. `rewards` [N] and `terminated` [N] belong to the transition leaving each row.

    Whole episodes are distributed over the lanes, the longest first, each to the lane that is shortest so far. The
    action in the last row of an episode has no meaning.

    With `goals` [N, ...], the goal that each row is, goals are drawn in hindsight, from one lane; an array that is the
    observations themselves is not stored again. `room` is the least number of rows and episodes to allocate. `columns`
    are the columns of `Dataset.extra` that are kept.
    """
    if not dataset.terminals[-1:].any():
        raise UserError("dataset: the last row must close an episode (terminals[-1] is False)")
    first, last = files.episodes(dataset)
    dealt = _deal(first, last, lanes)
    count = jnp.asarray([len(pile) for pile in dealt], jnp.int32)
    rows = max(*map(len, dealt), room[0]) + 1  # the head's row stays free
    valid = ~dataset.terminals
    truncated = np.roll(dataset.terminals, -1) & valid & ~terminated

    lay = functools.partial(_lay, dealt=dealt, rows=rows)
    return Ring(
        obs=jax.tree.map(lay, dataset.observations),
        actions=lay(dataset.actions),
        rewards=lay(np.where(valid, rewards, 0).astype(np.float32)),
        terminated=lay(terminated & valid),
        truncated=lay(truncated),
        valid=lay(valid),
        head=count,
        count=count,
        hindsight=None if goals is None else _hindsight(goals, dataset, lay, room[1]),
        extra={name: lay(dataset.extra[name]) for name in columns},
    )


def _hindsight(goals: np.ndarray, dataset: Dataset, lay: Callable[[np.ndarray], jax.Array], episodes: int) -> Hindsight:
    """Returns the goals, not stored again where they are the observations, and at least so many episodes."""
    leaves, (first, last) = jax.tree.leaves(dataset.observations), files.episodes(dataset)
    own = None if len(leaves) == 1 and goals is leaves[0] else lay(goals)[0]
    none = max(episodes - len(last), 0)  # episodes without steps
    return Hindsight(own, *(jnp.asarray(np.pad(x, (0, none)), jnp.int32) for x in (first, last - first)))


def _lay(column: np.ndarray, dealt: list[np.ndarray], rows: int) -> jax.Array:
    """Returns a column [N, ...] as lanes [L, rows, ...] of the rows dealt to each, zero beyond them."""
    laid = np.zeros((len(dealt), rows, *column.shape[1:]), column.dtype.newbyteorder("="))
    for lane, pile in enumerate(dealt):
        laid[lane, : len(pile)] = column[pile]
    return jnp.asarray(laid)


def _deal(first: np.ndarray, last: np.ndarray, lanes: int) -> list[np.ndarray]:
    """Returns the rows of each lane: whole episodes, the longest first, each in the lane that is shortest so far."""
    if lanes == 1:
        return [np.arange(last[-1] + 1)]
    piles = [[np.zeros(0, np.int64)] for _ in range(lanes)]
    filled = np.zeros(lanes, np.int64)
    for episode in np.argsort(first - last, kind="stable"):
        shortest = int(np.argmin(filled))
        piles[shortest].append(np.arange(first[episode], last[episode] + 1))
        filled[shortest] += len(piles[shortest][-1])
    return [np.concatenate(pile) for pile in piles]
