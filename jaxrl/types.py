"""The vocabulary shared by every part of jaxrl: sizes, states, batches, phases, and the Protocols.

Nothing here computes. An agent or an environment belongs to jaxrl by having the right shape, never by inheriting from
a class of ours. What only some of them have is a Protocol of its own, and `isinstance` asks for it.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Protocol,
    TypeAlias,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    runtime_checkable,
)

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    Scalar: TypeAlias = float | jax.Array
else:

    class _Number(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, int | float | np.number | np.ndarray | jax.Array | jax.ShapeDtypeStruct)

    class Scalar(metaclass=_Number):
        """A hyper-parameter that may be swept without compiling again: a leaf of its agent.

        A float or an array to the type checker and to the program, a float to the command line.
        """


PyTree: TypeAlias = Any
Metrics: TypeAlias = Mapping[str, jax.Array]
Observation: TypeAlias = Any
"""An array [..., O], or a dict of arrays, each with a dtype of its own; those of uint8 are images [..., H, W, C]."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One named array of an observation that is a dict: the shape and the dtype of one of them."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Spec:
    """The sizes that an agent is built for, and which part of an observation each of its networks sees.

    An observation is an array of `observation` entries, of which the last `goal` are the goal. Or it is a dict of the
    arrays that `observation` lists; then its goal, if it has one, is the key "goal", with `goal` entries.
    """

    observation: int | tuple[Leaf, ...]
    action: int
    goal: int = 0
    actor_keys: tuple[str, ...] = ()
    """Keys of a dict that policies see; empty: all of them."""
    critic_keys: tuple[str, ...] = ()
    """Keys of a dict that critics and values see; empty: all of them."""

    def actor(self, obs: Observation) -> Observation:
        """Returns what policies see of observations [..., O], the arrays of a dict as vectors [..., n] or images."""
        return self._seen(obs, self.actor_keys)

    def critic(self, obs: Observation) -> Observation:
        """Returns what critics and values see of observations [..., O], in the same form."""
        return self._seen(obs, self.critic_keys)

    def behaviour(self, obs: Observation) -> Observation:
        """Returns what a model of the data's behaviour sees: what policies see, but for the goal."""
        obs = self.actor(obs)
        if not self.goal:
            return obs
        if isinstance(obs, Mapping):
            return {name: leaf for name, leaf in obs.items() if name != "goal"}
        return obs[..., : obs.shape[-1] - self.goal]

    def without_goal(self) -> "Spec":
        """Returns the sizes of the same observations without the goal, as datasets hold them."""
        if isinstance(self.observation, int):
            return dataclasses.replace(self, observation=self.observation - self.goal, goal=0)
        keys = (tuple(name for name in chosen if name != "goal") for chosen in (self.actor_keys, self.critic_keys))
        leaves = tuple(leaf for leaf in self.observation if leaf.name != "goal")
        return Spec(leaves, self.action, 0, *keys)

    def example(self) -> Observation:
        """Returns one observation of zeros, to initialise networks with."""
        if isinstance(self.observation, int):
            return jnp.zeros(self.observation)
        return {leaf.name: jnp.zeros(leaf.shape, leaf.dtype) for leaf in self.observation}

    def _seen(self, obs: Observation, keys: tuple[str, ...]) -> Observation:
        if isinstance(self.observation, int):
            return obs
        return {leaf.name: _flat(obs[leaf.name], leaf) for leaf in self.observation if not keys or leaf.name in keys}


def _flat(x: jax.Array, leaf: Leaf) -> jax.Array:
    """Returns one array of an observation as vectors [..., n]; an image stays [..., H, W, C]."""
    if leaf.dtype == "uint8" or len(leaf.shape) == 1:
        return x
    return x.reshape(*x.shape[: x.ndim - len(leaf.shape)], -1)


def count_of(tree: PyTree) -> int:
    """Returns the length of the leading axis, which all leaves of a tree share."""
    return len(jax.tree.leaves(tree)[0])


class Static:
    """A base class for objects that a program calls on the host: static fields, compared by identity.

    Each instance compiles separately.
    """


def _shapes_the_program(hint: Any) -> bool:
    """Returns whether the values of an annotation select code: int, bool, str, None, Literal, and compounds of these.

    So do `Spec`, and classes derived from `Static`.
    """
    if get_origin(hint) is Annotated:
        return _shapes_the_program(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return True
    if get_origin(hint) in (tuple, Union, types.UnionType):
        return all(_shapes_the_program(part) for part in get_args(hint) if part is not Ellipsis)
    return isinstance(hint, type) and issubclass(hint, (int, str, type(None), Spec, Leaf, Static))


T = TypeVar("T")
State = TypeVar("State")
GivenState = TypeVar("GivenState", contravariant=True)


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Returns `cls` as a frozen dataclass registered with JAX.

    Fields annotated `int`, `bool`, `str`, `Spec`, `Literal`, by a class derived from `Static`, or by tuples and unions
    of these, are static: they shape the program. Every other field, `Scalar` included, is a leaf or a subtree.
    Annotations may be strings, as `from __future__ import annotations` makes them. Raises TypeError for one that
    cannot be resolved.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"{cls.__name__}: an annotation names {error.name!r}, which its module does not define at the top"
        ) from error
    names = [field.name for field in dataclasses.fields(cls)]
    static = [name for name in names if _shapes_the_program(hints[name])]
    leaves = [name for name in names if name not in static]
    return jax.tree_util.register_dataclass(cls, data_fields=leaves, meta_fields=static)


@pytree
class EnvState:
    """One environment at one time. `reset` and `step` return the same tree, so it can be scanned and vmapped."""

    physics: PyTree  # whatever the simulator carries
    obs: Observation  # [O], or a dict of arrays
    reward: jax.Array  # [], of the step that led here
    terminated: jax.Array  # [] bool: the task ended here, the future is worth nothing
    truncated: jax.Array  # [] bool: the clock ran out here, the future would have gone on
    success: jax.Array  # [] bool: the task is solved, now or earlier in this episode
    steps: jax.Array  # [] int32, since the reset
    info: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@pytree
class History:
    """The k steps before each of B windows, the oldest first; none of them is from another episode."""

    obs: Observation  # [B, k, ...]
    actions: jax.Array  # [B, k, A]
    rewards: jax.Array  # [B, k]
    valid: jax.Array  # [B, k] float, 0 where the episode had not begun yet, or is no longer stored


@pytree
class Batch:
    """B windows of H steps, none of which leaves its episode: what was done, and what came of it within k steps."""

    obs: Observation  # [B, O] at the first step
    actions: jax.Array  # [B, H, A]; where an episode ended, its last action is repeated
    rewards: jax.Array  # [B, H], 0 where they do not count
    valid: jax.Array  # [B, H] float, 1 for the steps that happened
    terminated: jax.Array  # [B] bool: the task was over after k steps, no bootstrap
    next_obs: Observation  # [B, O] after k steps, never from another episode
    steps: jax.Array  # [B] int32: k, the steps that happened, or fewer where a goal was reached on the way
    next_action: jax.Array | None = None  # [B, A] that the data take at next_obs; means nothing where none is taken
    followed: jax.Array | None = None  # [B] float, 1 where one is
    extra: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # [B, ...] at the first step, `Ring.extra`
    history: History | None = None  # of the steps before, where the agent asks for some


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of equal epochs: what each of their iterations does.

    An iteration executes one decision in every environment if it `collects`, and then makes `updates` gradient steps
    on windows of the `data`: the dataset, the replay, both, or none, as on-policy agents do, which learn from what was
    just collected.
    """

    name: str
    epochs: int
    iterations: int  # per epoch
    collects: bool
    updates: int  # gradient steps per iteration
    reward: tuple[float, float] = (1.0, 0.0)  # (scale, shift) of rewards on their way into the replay
    data: Literal["dataset", "replay", "both", "none"] = "both"
    evaluated: bool = True  # whether the agent is evaluated in and after this phase


@dataclasses.dataclass(frozen=True)
class Requirements:
    """What an agent needs of its data; checked before anything is built."""

    window: int = 1  # steps of a window; an episode is to be at least as long
    history: int = 0  # steps before a window
    columns: tuple[str, ...] = ()  # further columns of the dataset
    unit_rewards: bool = False  # rewards in [0, 1], as values are probabilities
    dataset: bool = False  # a dataset beside or instead of the replay, as every update looks something up in it
    kdtree: bool = False  # KD-trees of the dataset's rows, where the device is a CPU
    batch: int | None = None  # windows per update, which are divided among devices; None: it does not say


@runtime_checkable
class Checks(Protocol):
    """Settings that are to fit each other."""

    def check(self) -> None:
        """Raises UserError where they do not, before anything is built."""
        ...


# Agents


@runtime_checkable
class Learner(Protocol[State]):
    """What is trained: agents, models of dynamics or of data. A frozen dataclass of settings with pure methods."""

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state: parameters, optimiser, counters."""
        ...

    def sample(self, data: Any, key: jax.Array) -> Any:
        """Returns the batch that one update learns from."""
        ...

    def update(self, state: State, batch: Any, key: jax.Array, data: Any = ()) -> tuple[State, Metrics]:
        """Returns the state after one gradient step, and its scalar metrics; `data` serves lookups in all of them."""
        ...


@runtime_checkable
class Agent(Learner[State], Protocol[State]):
    """A method: a learner that acts."""

    @property
    def chunk(self) -> int:
        """How many actions one decision holds (H)."""
        ...

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns action chunks [B, H, A] in [-1, 1] for observations [B, O]; `greedy` acts as in evaluation."""
        ...


@runtime_checkable
class Requires(Protocol):
    """An agent with requirements of its data. Those of the others are a window of one chunk."""

    def requires(self) -> Requirements:
        """Returns what its data must have."""
        ...


def requirements(agent: Agent) -> Requirements:
    """Returns what an agent needs of its data: what it says (`Requires`), else windows of one chunk."""
    return agent.requires() if isinstance(agent, Requires) else Requirements(window=agent.chunk)


@runtime_checkable
class ChecksData(Protocol):
    """An agent for which a dataset can be too small or too large."""

    def check_data(self, transitions: int) -> None:
        """Raises UserError where a dataset of so many transitions does not fit the agent's settings."""
        ...


@runtime_checkable
class Fitting(Protocol[State]):
    """An agent whose initial state depends on the dataset, such as on the spread of its observations."""

    def fit(self, state: State, data: Any) -> State:
        """Returns the initial state, knowing the data."""
        ...


@runtime_checkable
class Deriving(Protocol):
    """An agent that learns from columns which follow from others, such as returns to go."""

    def derive_columns(self, data: Any) -> Any:
        """Returns the data with these columns in `Ring.extra`."""
        ...


@runtime_checkable
class Staged(Protocol[State]):
    """An agent that learns differently in different phases."""

    def enter(self, state: State, phase: Phase) -> State:
        """Returns the state at the start of a phase."""
        ...


@runtime_checkable
class Scheduling(Protocol):
    """An agent that names phases of its own, instead of offline and then online ones."""

    def phases(self, schedule: Any, length: int, reward: tuple[float, float]) -> tuple[Phase, ...]:
        """Returns the phases of a `training.schedule.Schedule`, in order.

        A decision executes `length` actions; `reward` is for the phases that collect.
        """
        ...


@runtime_checkable
class Remembering(Protocol[GivenState]):
    """An agent that acts with a memory per environment, or whose decisions leave more behind than actions.

    `extras` such as log-probabilities, values, raw actions or denoising chains are stored with the steps.
    """

    def start(self, state: GivenState, obs: Observation, key: jax.Array) -> PyTree:
        """Returns the memory at the start of episodes, leaves [B, ...]."""
        ...

    def decide(
        self, state: GivenState, memory: PyTree, obs: Observation, key: jax.Array, *, greedy: bool = False
    ) -> tuple[PyTree, jax.Array, dict[str, jax.Array]]:
        """Returns the new memory, chunks [B, H, A] in [-1, 1], and extras [B, ...] by name."""
        ...


@runtime_checkable
class OnPolicy(Protocol[State]):
    """An agent that learns from what it has just done, in phases that collect and whose data is "none"."""

    @property
    def unroll(self) -> int:
        """How many decisions per environment it learns from at a time."""
        ...

    def learn_from(self, state: State, unroll: Any, key: jax.Array) -> tuple[State, Metrics]:
        """Returns the state after learning from a `rollout.device.Unroll` [T, N], and its metrics."""
        ...


@runtime_checkable
class Density(Protocol[GivenState]):
    """An agent that knows how likely its actions are."""

    def log_density(self, state: GivenState, obs: Observation, action: jax.Array) -> jax.Array:
        """Returns log pi(a | s) [N] of observations [N, O] and actions [N, A]."""
        ...


# Environments


@runtime_checkable
class Env(Protocol):
    """A simulator as two pure functions of one environment; `vmap` makes it many.

    `step` never resets and may be called with actions in [-1, 1] only.
    """

    @property
    def spec(self) -> Spec:
        """Sizes of observation, action and goal."""
        ...

    @property
    def horizon(self) -> int:
        """Steps after which an episode is truncated."""
        ...

    def reset(self, key: jax.Array) -> EnvState:
        """Returns a fresh episode."""
        ...

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        """Returns the environment after one action [A]."""
        ...


@runtime_checkable
class HostEnv(Protocol):
    """A simulator that steps on the CPU in worker processes, such as Gymnasium's: see `jaxrl.rollout.host`."""

    @property
    def spec(self) -> Spec:
        """Sizes of observation, action and goal."""
        ...

    @property
    def horizon(self) -> int:
        """Steps after which an episode is truncated."""
        ...

    @property
    def tasks(self) -> int:
        """How many tasks the episodes go through, numbered from 1; 0: the simulator has only one."""
        ...

    def builder(self, picture: int = 0) -> Callable[[], Any]:
        """Returns what makes one simulator, see `jaxrl.rollout.workers`; with `picture`, one that renders so large.

        It is pickled and called in worker processes, so it is a function of a module that imports no JAX.
        """
        ...


@runtime_checkable
class NamesDataset(Protocol):
    """An environment that a published dataset belongs to."""

    @property
    def dataset(self) -> str:
        """Name of the dataset's file, without its ending."""
        ...


@runtime_checkable
class Relabels(Protocol):
    """An environment that knows the rewards of data recorded in it."""

    def relabel(self, observations: Any, actions: Any, next_observations: Any) -> tuple[Any, Any]:
        """Returns rewards [N] and whether the task ended [N], of transitions."""
        ...


@runtime_checkable
class NamesGoals(Protocol):
    """An environment that knows what states are as goals."""

    def goal_of(self, states: Any) -> Any:
        """Returns goals [N, G] of states [N, S]."""
        ...


@runtime_checkable
class Drawable(Protocol):
    """An environment whose observations can be drawn."""

    def draw(self, obs: Any, size: int) -> Any:
        """Returns a picture of an observation, `size` pixels high."""
        ...


@runtime_checkable
class HasBehaviours(Protocol):
    """An environment with scripted behaviours of several levels."""

    def behaviour(self, level: str) -> "Behaviour":
        """Returns the scripted policy of a level."""
        ...


@runtime_checkable
class Explorable(Protocol):
    """An environment that has a version of itself for recording, such as one that does not end at success."""

    def explore(self) -> Env:
        """Returns that version."""
        ...


class Script(Protocol):
    """A scripted behaviour that a worker process records. It can be pickled."""

    @property
    def dataset(self) -> str:
        """The name of what it records."""
        ...

    def __call__(self, job: tuple[int, int]) -> dict[str, np.ndarray]:
        """Returns the columns of the episode (seed, number)."""
        ...


@runtime_checkable
class Recordable(Protocol):
    """A `HostEnv` with scripted behaviours."""

    def recording(self, behaviour: str | None, steps: int) -> tuple[Script, int]:
        """Returns a behaviour's script, and how many of its episodes have so many steps."""
        ...


class Behaviour(Protocol):
    """A scripted policy that acts inside the program; what it must remember is its `memory`."""

    def start(self, state: EnvState, key: jax.Array) -> PyTree:
        """Returns the memory at the start of an episode."""
        ...

    def act(self, memory: PyTree, state: EnvState, key: jax.Array) -> tuple[PyTree, jax.Array]:
        """Returns the new memory and one action [A]."""
        ...
