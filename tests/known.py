"""What tests of agents are written with: networks that are formulas, and small batches of which every number is known.

An agent is built from parts, so one with `formula` parts has losses that are known by hand.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl.agents import learner
from jaxrl.agents.learner import State
from jaxrl.agents.parts import Adam
from jaxrl.agents.parts import with_fields as with_fields
from jaxrl.data.files import Dataset
from jaxrl.ops import normalizer
from jaxrl.replay.loading import from_dataset
from jaxrl.replay.ring import Ring
from jaxrl.types import Batch, PyTree, Spec, pytree

KEY = jax.random.key(0)
NARROW = Spec(observation=1, action=1)
WIDE = Spec(observation=3, action=2)

T = TypeVar("T")


def values_of(settings: Any, name: str) -> list[Any]:
    """Returns the values of all fields of this name, in settings and their parts."""
    found = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name == name:
            found.append(value)
        elif dataclasses.is_dataclass(value):
            found += values_of(value, name)
    return found


@dataclasses.dataclass(frozen=True)
class Formula:
    """A network whose output is a function of its parameters and its inputs."""

    of: Callable[..., Any]

    def apply(self, params: PyTree, *inputs: jax.Array) -> Any:
        """Returns the output."""
        return self.of(params, *inputs)


def formula(part: T, of: Callable[..., Any], method: str = "network") -> T:
    """Returns a part of an agent whose network is a function of its parameters and its inputs.

    Or one of its methods is that function, such as `moments` or `action` of policies that read the size of an action
    off their parameters. Call it once per formula: each result is a class of its own, and compiles separately.
    """

    def network(_: T, *size: int) -> Formula:
        return Formula(of)

    def outputs(_: T, *inputs: Any) -> Any:
        return of(*inputs)

    replacement: Any = network if method == "network" else outputs
    if isinstance(inspect.getattr_static(part, method), property):
        replacement = property(replacement)
    return pytree(type(type(part).__name__, (type(part),), {method: replacement}))(**vars(part))


def linear_heads(bias: jax.Array, slope: jax.Array, x: jax.Array) -> jax.Array:
    """Returns bias_j + slope_j x of shape [K, ...]."""
    return jnp.stack([b + c * x for b, c in zip(bias, slope, strict=True)])


def lines(p: PyTree, s: jax.Array, a: jax.Array) -> jax.Array:
    """Returns critics b_j + c_j (sum of the action) + s, for a `formula`."""
    return linear_heads(p["bias"], p["slope"], a.sum(axis=-1)) + s[None, ..., 0]


def leaning(p: PyTree, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a mean m + l s and the logarithm w of the standard deviation, for a `formula`; m is one per entry."""
    mean = jnp.broadcast_to(p["mean"], (*s.shape[:-1], p["mean"].size)) + p["lean"] * s[..., :1]
    return mean, jnp.broadcast_to(p["width"], mean.shape)


@pytree
class Descent(Adam):
    """Plain gradient descent, instead of Adam."""

    def transformation(self) -> optax.GradientTransformation:
        """Returns it as optax has it."""
        return optax.sgd(self.lr)


def batch_of(rewards, valid=None, terminated=None, **fields) -> Batch:
    """Returns windows with rewards [B, H], one observation and one action; what is not said is 0, valid and goes on."""
    rewards = jnp.asarray(rewards, jnp.float32)
    count, length = rewards.shape
    valid = jnp.ones_like(rewards) if valid is None else jnp.asarray(valid, jnp.float32)
    empty = Batch(
        obs=jnp.zeros((count, 1)),
        actions=jnp.zeros((count, length, 1)),
        rewards=rewards * valid,
        valid=valid,
        terminated=jnp.zeros(count, bool) if terminated is None else jnp.asarray(terminated, bool),
        next_obs=jnp.zeros((count, 1)),
        steps=valid.sum(axis=1).astype(jnp.int32),
    )
    return dataclasses.replace(empty, **{name: jnp.asarray(value, jnp.float32) for name, value in fields.items()})


def random_batch(seed: int, count: int = 16, length: int = 3, spec: Spec = WIDE, probabilities=False) -> Batch:
    """Returns windows of random content; some were cut by termination, some by truncation."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, length + 1, count)
    valid = np.arange(length) < steps[:, None]
    rewards = rng.random((count, length)) / length if probabilities else rng.normal(size=(count, length))
    columns = {
        "obs": rng.normal(size=(count, spec.observation)),
        "actions": rng.uniform(-1, 1, (count, length, spec.action)),
        "rewards": rewards * valid,
        "valid": valid,
        "next_obs": rng.normal(size=(count, spec.observation)),
    }
    columns = {key: jnp.asarray(value, jnp.float32) for key, value in columns.items()}
    terminated = jnp.asarray(rng.random(count) < 0.3)
    following = {
        "next_action": jnp.asarray(rng.uniform(-1, 1, (count, spec.action)), jnp.float32),
        "followed": 1.0 - terminated,
    }
    return Batch(**columns, **following, terminated=terminated, steps=jnp.asarray(steps, jnp.int32))


@functools.cache
def some_data(spec: Spec) -> Ring:
    """Returns 20 random transitions in two episodes, whose states lack the goal."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(22, spec.observation - spec.goal)).astype(np.float32)
    actions = rng.uniform(-1, 1, (22, spec.action)).astype(np.float32)
    data = Dataset(states, actions, np.arange(22) % 11 == 10)
    return from_dataset(data, np.zeros(22), np.zeros(22, bool))


def state_of(
    params: dict[str, PyTree], target: dict[str, PyTree] | None = None, optimizer=None, spec: Spec = NARROW
) -> State:
    """Returns the state with these parameters, for raw observations.

    The target is a copy of the critic, if there is one, unless given. `optimizer` is one for all networks, or those of
    each network by its name.
    """
    params, target = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for tree in (params, target))
    state = learner.create(spec, params, optimizer or optax.adam(0.0), *{"critic"} & params.keys(), normalized=True)
    return state if target is None else dataclasses.replace(state, target=target)


def one_layer_each(agent: Any, spec: Spec = NARROW, target: dict | None = None, **layers) -> State:
    """Returns the state of an agent whose networks have no hidden layer, for raw observations.

    `layers` are (kernel, bias) by network, repeated to fill theirs, zero where not given; `target` those of the slow
    copies that differ.
    """

    def filled(nets: dict[str, PyTree], layers: dict) -> dict[str, PyTree]:
        return {
            name: _layer(net, *layers.get(name, (0, 0))) if "params" in net else filled(net, layers)
            for name, net in nets.items()
        }

    shapes = jax.eval_shape(lambda: agent.init(KEY, spec))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    unchanged = normalizer.identity(spec.example())
    params, slow = filled(zero.params, layers), filled(zero.target, layers | (target or {}))
    return dataclasses.replace(zero, params=params, target=slow, normalizer=unchanged)


def metrics_of(agent: Any, state: State, batch: Batch, draws: dict) -> dict[str, float]:
    """Returns what an agent's joint loss consists of."""
    return {
        name: float(value)
        for name, value in jitted(type(agent).loss)(agent, state.params, state, batch, draws)[1].items()
    }


def slopes_of(agent: Any, state: State, batch: Batch, draws: dict, through_state: bool = True) -> dict[str, dict]:
    """Returns the gradients of each part of an agent's joint loss, by metric and network.

    With `through_state` a gradient also passes through the parameters that the state holds, unless it is stopped.
    """

    def parts(params: dict[str, PyTree]) -> Any:
        held = dataclasses.replace(state, params=params) if through_state else state
        return agent.loss(params, held, batch, draws)[1]

    return jax.jit(jax.jacrev(parts))(state.params)


def reached(slopes: dict[str, PyTree]) -> set[str]:
    """Returns the networks whose gradient is not 0 everywhere."""
    return {name for name, leaves in slopes.items() if any(np.any(leaf) for leaf in jax.tree.leaves(leaves))}


def bias_of(net: PyTree) -> np.ndarray:
    """Returns the bias of a network's one layer, or its slope."""
    return np.asarray(net["params"]["MLP_0"]["Dense_0"]["bias"])


def _layer(net: PyTree, kernel: Any, bias: Any) -> PyTree:
    values = {"kernel": kernel, "bias": bias}
    fill = lambda path, leaf: jnp.asarray(np.resize(values[path[-1].key], leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree_util.tree_map_with_path(fill, net)


@contextlib.contextmanager
def quick_to_compile() -> Iterator[None]:
    """Has programs compiled without most optimisations, for those that run once or twice."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def fitted(loss: Callable[[PyTree], jax.Array], params: PyTree, updates: int = 1000, lr: float = 0.1) -> PyTree:
    """Returns the parameters after so many steps of Adam on a loss, ever smaller ones."""
    optimizer = optax.adam(optax.cosine_decay_schedule(lr, updates))

    @jax.jit
    def train(params: PyTree) -> PyTree:
        def step(carry: tuple, _: None) -> tuple[tuple, None]:
            params, opt = carry
            updates, opt = optimizer.update(jax.grad(loss)(params), opt)
            return (optax.apply_updates(params, updates), opt), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, updates)[0][0]

    return train(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))


def pull_of(agent: Any, state: State, batch: Batch, draws: dict) -> dict[str, PyTree]:
    """Returns the gradient of the joint loss, by network."""
    return jax.grad(lambda params: agent.loss(params, state, batch, draws)[0])(state.params)


@functools.cache
def jitted(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method of a pytree class compiled, one program for all agents that differ in numbers only."""
    return jax.jit(method)


@functools.cache
def gradient_of(loss: Callable[..., Any]) -> Callable[..., PyTree]:
    """Returns what gives the gradient of a method `loss(agent, params, ...)`, which returns a loss and metrics."""
    return jax.jit(lambda *arguments: jax.grad(loss, argnums=1, has_aux=True)(*arguments)[0])


def same(a: PyTree, b: PyTree) -> bool:
    """Returns whether two trees are equal, bit for bit."""
    equal = lambda x, y: np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True)  # noqa: E731
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(equal, a, b))
