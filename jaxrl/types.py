"""The vocabulary shared by every part of jaxrl: sizes, states, batches, and the two protocols.

Nothing here computes. An agent or an environment belongs to jaxrl by having the right shape, never by
inheriting from a class of ours.
"""

import dataclasses
import types
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
import tyro

if TYPE_CHECKING:
    Scalar: TypeAlias = float | jax.Array
else:
    Scalar = Annotated[
        Any,
        tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="FLOAT",
            instance_from_str=lambda words: float(words[0]),
            is_instance=lambda value: isinstance(value, int | float | jax.Array),
            str_from_instance=lambda value: [str(value)],
        ),
    ]
"""A hyper-parameter that may be swept without compiling again: a leaf of its agent.

A float or an array to the type checker and to the program, a float to the command line.
"""

PyTree: TypeAlias = Any
Metrics: TypeAlias = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Spec:
    """The sizes that an agent is built for."""

    observation: int
    action: int
    goal: int = 0
    """How many trailing entries of the observation are the goal (0: a single-task environment)."""


def _shapes_the_program(hint: Any) -> bool:
    """True for annotations whose values select code: int, bool, str, None, Literal, Spec, and compounds of these.

    And for classes that say of themselves, by an attribute `by_identity`, that the program calls their objects on the
    host: two of them are two programs.
    """
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        return True
    if get_origin(hint) in (tuple, Union, types.UnionType):
        return all(_shapes_the_program(part) for part in get_args(hint) if part is not Ellipsis)
    return hint in (int, bool, str, type(None), Spec) or getattr(hint, "by_identity", False)


T = TypeVar("T")
State = TypeVar("State")


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Returns `cls` as a frozen dataclass registered with JAX.

    Fields annotated `int`, `bool`, `str`, `Spec`, `Literal`, by a class that is `by_identity`, or by tuples and unions
    of these, are static: they shape the program. Every other field, `Scalar` included, is a leaf or a subtree.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)
    static = [field.name for field in fields if _shapes_the_program(field.type)]
    leaves = [field.name for field in fields if field.name not in static]
    return jax.tree_util.register_dataclass(cls, data_fields=leaves, meta_fields=static)


@pytree
class EnvState:
    """One environment at one time. `reset` and `step` return the same tree, so it can be scanned and vmapped."""

    physics: PyTree  # whatever the simulator carries
    obs: jax.Array  # [O]
    reward: jax.Array  # [], of the step that led here
    terminated: jax.Array  # [] bool: the task ended here, the future is worth nothing
    truncated: jax.Array  # [] bool: the clock ran out here, the future would have gone on
    success: jax.Array  # [] bool: the task is solved, now or earlier in this episode
    steps: jax.Array  # [] int32, since the reset
    info: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@pytree
class Batch:
    """B windows of H steps, none of which leaves its episode: what was done, and what came of it within k steps."""

    obs: jax.Array  # [B, O] at the first step
    actions: jax.Array  # [B, H, A]; where an episode ended, its last action is repeated
    rewards: jax.Array  # [B, H], 0 where they do not count
    valid: jax.Array  # [B, H] float, 1 for the steps that happened
    terminated: jax.Array  # [B] bool: the task was over after k steps, no bootstrap
    next_obs: jax.Array  # [B, O] after k steps, never from another episode
    steps: jax.Array  # [B] int32: k, the steps that happened, or fewer where a goal was reached on the way
    next_action: jax.Array | None = None  # [B, A] that the data take at next_obs; means nothing where none is taken
    followed: jax.Array | None = None  # [B] float, 1 where one is
    extra: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # [B, ...] at the first step, `Ring.extra`
    rings: PyTree = ()  # what the windows were cut from, for agents that look things up in all of the data


@runtime_checkable
class Agent(Protocol[State]):
    """A method: a frozen dataclass of hyper-parameters with pure methods."""

    @property
    def chunk(self) -> int:
        """How many actions one decision holds (H)."""
        ...

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state: parameters, optimiser, counters."""
        ...

    def sample(self, data: Any, key: jax.Array) -> Batch:
        """Returns the batch that one update learns from."""
        ...

    def update(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """Returns the state after one gradient step, and its scalar metrics."""
        ...

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns action chunks [B, H, A] in [-1, 1] for observations [B, O]; `greedy` acts as in evaluation."""
        ...


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
    """A simulator that steps on the CPU in worker processes, such as Gymnasium's: many are run by `jaxrl.rollout.host`."""

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
        """Returns what makes one simulator, see `jaxrl.rollout.workers`; with `picture`, one that renders in so many pixels.

        It is pickled and called in worker processes, so it is a function of a module that imports no JAX.
        """
        ...


def on_host(env: Any) -> bool:
    """Whether an environment is a `HostEnv` rather than an `Env`."""
    return hasattr(env, "builder")


class Behaviour(Protocol):
    """A scripted policy that acts inside the program; what it must remember is its `memory`."""

    def start(self, state: EnvState, key: jax.Array) -> PyTree:
        """Returns the memory at the start of an episode."""
        ...

    def act(self, memory: PyTree, state: EnvState, key: jax.Array) -> tuple[PyTree, jax.Array]:
        """Returns the new memory and one action [A]."""
        ...
