"""The types shared by all parts of jaxrl: sizes, states, batches, phases, and the Protocols.

Nothing here computes. Agents and environments are structurally typed and need not inherit from a jaxrl class. Optional
capabilities are separate Protocols, checked with `isinstance`.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from fractions import Fraction
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
        """A hyperparameter that can be swept without recompiling: a leaf of its agent.

        A float or an array for the type checker and the program, a float on the command line.
        """


PyTree: TypeAlias = Any
Metrics: TypeAlias = Mapping[str, jax.Array]
Observation: TypeAlias = Any
"""An array [..., O], or a dict of arrays of different dtypes; uint8 arrays are images [..., H, W, C]."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Name, shape and dtype of one array of a dict observation."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Spec:
    """The sizes that an agent is built for, and the part of an observation that each of its networks sees.

    An observation is an array of `observation` entries, of which the last `goal` are the goal. Or it is a dict of the
    arrays listed in `observation`; then its goal, if it has one, is the key "goal", with `goal` entries.
    """

    observation: int | tuple[Leaf, ...]
    action: int
    goal: int = 0
    actor_keys: tuple[str, ...] = ()
    """Keys of a dict observation that policies see; empty: all."""
    critic_keys: tuple[str, ...] = ()
    """Keys of a dict observation that critics and values see; empty: all."""

    def actor(self, obs: Observation) -> Observation:
        """Returns the part of observations [..., O] that policies see, dict arrays as vectors [..., n] or images."""
        return self._seen(obs, self.actor_keys)

    def critic(self, obs: Observation) -> Observation:
        """Returns the part of observations [..., O] that critics and values see, in the same form."""
        return self._seen(obs, self.critic_keys)

    def behaviour(self, obs: Observation) -> Observation:
        """Returns the part that a behavior model of the data sees: that of policies without the goal."""
        obs = self.actor(obs)
        if not self.goal:
            return obs
        if isinstance(obs, Mapping):
            return {name: leaf for name, leaf in obs.items() if name != "goal"}
        return obs[..., : obs.shape[-1] - self.goal]

    def without_goal(self) -> "Spec":
        """Returns the sizes of the observations without the goal, as stored in datasets."""
        if isinstance(self.observation, int):
            return dataclasses.replace(self, observation=self.observation - self.goal, goal=0)
        keys = (tuple(name for name in chosen if name != "goal") for chosen in (self.actor_keys, self.critic_keys))
        leaves = tuple(leaf for leaf in self.observation if leaf.name != "goal")
        return Spec(leaves, self.action, 0, *keys)

    def example(self) -> Observation:
        """Returns one observation of zeros, for initializing networks."""
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
    """Returns the length of the leading axis shared by all leaves of a tree."""
    return len(jax.tree.leaves(tree)[0])


class Static:
    """A base class for objects that a program calls on the host: static fields, compared by identity.

    Each instance compiles separately.
    """


def _shapes_the_program(hint: Any) -> bool:
    """Returns whether an annotation's values are static: int, bool, str, None, Literal, and compounds of these.

    `Spec` and subclasses of `Static` are static too.
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

    Fields annotated with `int`, `bool`, `str`, `Spec`, `Literal`, a subclass of `Static`, or tuples and unions of these
    are static: they determine the program. All other fields, including `Scalar`, are leaves or subtrees. Annotations
    may be strings, as with `from __future__ import annotations`. Raises TypeError for one that cannot be resolved.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"{cls.__name__}: an annotation names {error.name!r}, which is not defined at module level"
        ) from error
    names = [field.name for field in dataclasses.fields(cls)]
    static = [name for name in names if _shapes_the_program(hints[name])]
    leaves = [name for name in names if name not in static]
    return jax.tree_util.register_dataclass(cls, data_fields=leaves, meta_fields=static)


@pytree
class EnvState:
    """The state of one environment. `reset` and `step` return the same tree, so it can be scanned and vmapped."""

    physics: PyTree  # the simulator's state
    obs: Observation  # [O], or a dict of arrays
    reward: jax.Array  # [], of the step that led here
    terminated: jax.Array  # [] bool: the task ended here, no bootstrap
    truncated: jax.Array  # [] bool: the time limit was reached here, bootstrap
    success: jax.Array  # [] bool: the task is solved, now or earlier in this episode
    steps: jax.Array  # [] int32, since the reset
    info: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@pytree
class History:
    """The k steps before each of B windows, oldest first, from the same episode."""

    obs: Observation  # [B, k, ...]
    actions: jax.Array  # [B, k, A]
    rewards: jax.Array  # [B, k]
    valid: jax.Array  # [B, k] float, 0 before the episode's start, and for steps no longer stored


@pytree
class Batch:
    """B windows of H steps, each within one episode: actions, and the outcome after k steps."""

    obs: Observation  # [B, O] at the first step
    actions: jax.Array  # [B, H, A]; after the end of an episode, its last action is repeated
    rewards: jax.Array  # [B, H], 0 for steps that do not count
    valid: jax.Array  # [B, H] float, 1 for executed steps
    terminated: jax.Array  # [B] bool: the task was over after k steps, no bootstrap
    next_obs: Observation  # [B, O] after k steps, never from another episode
    steps: jax.Array  # [B] int32: k, the number of executed steps, or fewer if a goal was reached earlier
    next_action: jax.Array | None = None  # [B, A] of the data at next_obs; undefined if there is none
    followed: jax.Array | None = None  # [B] float, 1 if there is a next action
    extra: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # [B, ...] at the first step, `Ring.extra`
    history: History | None = None  # of the previous steps, if the agent requires them


@dataclasses.dataclass(frozen=True)
class Phase:
    """A sequence of equal epochs, of which the last may be shorter, defined by what each iteration does.

    An iteration executes one decision in every environment if the phase `collects`, and then makes `updates` gradient
    steps on windows of the `data`: the dataset, the replay, both, or none, for on-policy agents, which learn from the
    steps just collected. A fraction u of updates is kept on average: the first n iterations make floor(n u) updates.
    """

    name: str
    epochs: int
    iterations: int  # per epoch
    collects: bool
    updates: int | Fraction  # gradient steps per iteration
    reward: tuple[float, float] = (1.0, 0.0)  # (scale, shift) of rewards written to the replay
    data: Literal["dataset", "replay", "both", "none"] = "both"
    evaluated: bool = True  # whether the agent is evaluated in and after this phase
    last: int = 0  # iterations of the last epoch, if fewer than of the others; 0: as many
    start: int = 0  # epochs of the phases before, set by `training.schedule.phases`

    @property
    def total(self) -> int:
        """The number of iterations of all epochs."""
        return self.epochs * self.iterations - (self.iterations - self.last if self.last else 0)

    def size(self, before: int) -> int:
        """Returns the number of iterations of the epoch that follows `before` others of this phase."""
        return self.last if self.last and before + 1 == self.epochs else self.iterations


@dataclasses.dataclass(frozen=True)
class Requirements:
    """An agent's requirements on its data; checked before anything is built."""

    window: int = 1  # steps of a window; episodes must be at least as long
    history: int = 0  # steps before a window
    columns: tuple[str, ...] = ()  # further columns of the dataset
    unit_rewards: bool = False  # rewards in [0, 1], because values are probabilities
    dataset: bool = False  # a dataset in addition to or instead of the replay, because every update looks it up
    kdtree: bool = False  # KD-trees of the dataset's rows, if the device is a CPU
    batch: int | None = None  # windows per update, which are sharded over devices; None: unspecified


@runtime_checkable
class Checks(Protocol):
    """Settings with constraints between fields."""

    def check(self) -> None:
        """Raises UserError if a constraint is violated, before anything is built."""
        ...


# Agents


@runtime_checkable
class Learner(Protocol[State]):
    """Anything trainable: agents, dynamics models, models of data. A frozen dataclass of settings with pure methods."""

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state: parameters, optimizer, counters."""
        ...

    def sample(self, data: Any, key: jax.Array) -> Any:
        """Returns the batch that one update learns from."""
        ...

    def update(self, state: State, batch: Any, key: jax.Array, data: Any = ()) -> tuple[State, Metrics]:
        """Returns the state after one gradient step, and its scalar metrics; `data` allows lookups in the full data."""
        ...


@runtime_checkable
class Agent(Learner[State], Protocol[State]):
    """A method: a learner that acts."""

    @property
    def chunk(self) -> int:
        """Number of actions per decision (H)."""
        ...

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns action chunks [B, H, A] in [-1, 1] for observations [B, O]; `greedy` is for evaluation."""
        ...


@runtime_checkable
class Requires(Protocol):
    """An agent with requirements on its data. The default is a window of one chunk."""

    def requires(self) -> Requirements:
        """Returns the requirements."""
        ...


def requirements(agent: Agent) -> Requirements:
    """Returns an agent's requirements on its data: its own (`Requires`), else windows of one chunk."""
    return agent.requires() if isinstance(agent, Requires) else Requirements(window=agent.chunk)


@runtime_checkable
class ChecksData(Protocol):
    """An agent for which a dataset can be too small or too large."""

    def check_data(self, transitions: int) -> None:
        """Raises UserError if a dataset of `transitions` transitions does not fit the agent's settings."""
        ...


@runtime_checkable
class Fitting(Protocol[State]):
    """An agent whose initial state depends on the dataset, such as on the spread of its observations."""

    def fit(self, state: State, data: Any) -> State:
        """Returns the initial state fitted to the data."""
        ...


@runtime_checkable
class Deriving(Protocol):
    """An agent that learns from derived columns, such as returns-to-go."""

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
    """An agent that defines its own phases, instead of offline, then online."""

    def phases(self, schedule: Any, length: int, reward: tuple[float, float]) -> tuple[Phase, ...]:
        """Returns the phases of a `training.schedule.Schedule`, in order.

        A decision executes `length` actions; `reward` is for the phases that collect.
        """
        ...


@runtime_checkable
class Remembering(Protocol[GivenState]):
    """An agent that acts with a memory per environment, or whose decisions store more than actions.

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
    """An agent that learns from the steps just collected, in phases that collect and have data "none"."""

    @property
    def unroll(self) -> int:
        """Number of decisions per environment for one update."""
        ...

    def learn_from(self, state: State, unroll: Any, key: jax.Array) -> tuple[State, Metrics]:
        """Returns the state after learning from a `rollout.device.Unroll` [T, N], and its metrics."""
        ...


@runtime_checkable
class Density(Protocol[GivenState]):
    """An agent with a tractable action density."""

    def log_density(self, state: GivenState, obs: Observation, action: jax.Array) -> jax.Array:
        """Returns log pi(a | s) [N] of observations [N, O] and actions [N, A]."""
        ...


# Environments


@runtime_checkable
class Env(Protocol):
    """A simulator as two pure functions of a single environment, to be vmapped.

    `step` never resets; actions must be in [-1, 1].
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
        """Number of tasks that the episodes cycle through, numbered from 1; 0: the simulator has only one."""
        ...

    def builder(self, picture: int = 0) -> Callable[[], Any]:
        """Returns a factory of simulators, see `jaxrl.rollout.workers`; `picture` is the render size in pixels.

        It is pickled and called in worker processes, so it must be a function of a module that imports no JAX.
        """
        ...


Score = Literal["success", "return"]
"""What evaluated episodes are compared by."""


@runtime_checkable
class Scored(Protocol):
    """An environment that names its score. The default is success; environments without success declare "return"."""

    @property
    def score(self) -> Score:
        """What episodes are compared by."""
        ...


def score_of(env: Env | HostEnv) -> Score:
    """Returns what an environment's episodes are compared by: its own declaration (`Scored`), else success."""
    return env.score if isinstance(env, Scored) else "success"


@runtime_checkable
class NamesDataset(Protocol):
    """An environment with a published dataset."""

    @property
    def dataset(self) -> str:
        """Name of the dataset's file, without extension."""
        ...


@runtime_checkable
class Relabels(Protocol):
    """An environment that can compute the rewards of data recorded in it."""

    def relabel(self, observations: Any, actions: Any, next_observations: Any) -> tuple[Any, Any]:
        """Returns rewards [N] and whether the task ended [N], of transitions."""
        ...


@runtime_checkable
class NamesGoals(Protocol):
    """An environment that maps states to goals."""

    def goal_of(self, states: Any) -> Any:
        """Returns goals [N, G] of states [N, S]."""
        ...


@runtime_checkable
class Drawable(Protocol):
    """An environment whose observations can be drawn."""

    def draw(self, obs: Any, size: int) -> Any:
        """Returns an image of an observation, `size` pixels high."""
        ...


@runtime_checkable
class HasBehaviours(Protocol):
    """An environment with scripted behaviors of several levels."""

    def behaviour(self, level: str) -> "Behaviour":
        """Returns the scripted policy of a level."""
        ...


@runtime_checkable
class Explorable(Protocol):
    """An environment with a variant for recording, such as one that does not end at success."""

    def explore(self) -> Env:
        """Returns the variant for recording."""
        ...


class Script(Protocol):
    """A picklable scripted behavior that a worker process records."""

    @property
    def dataset(self) -> str:
        """The name of the recorded dataset."""
        ...

    def __call__(self, job: tuple[int, int]) -> dict[str, np.ndarray]:
        """Returns the columns of the episode with this (seed, number)."""
        ...


@runtime_checkable
class Recordable(Protocol):
    """A `HostEnv` with scripted behaviors."""

    def recording(self, behaviour: str | None, steps: int) -> tuple[Script, int]:
        """Returns a behavior's script, and the number of its episodes for at least `steps` steps."""
        ...


class Behaviour(Protocol):
    """A scripted policy that acts inside the program, with a `memory`."""

    def start(self, state: EnvState, key: jax.Array) -> PyTree:
        """Returns the memory at the start of an episode."""
        ...

    def act(self, memory: PyTree, state: EnvState, key: jax.Array) -> tuple[PyTree, jax.Array]:
        """Returns the new memory and one action [A]."""
        ...
