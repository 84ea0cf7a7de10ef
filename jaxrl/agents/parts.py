"""The parts that agents are built from: frozen settings with `init` and pure functions of parameters.

A part has no fixed sizes: `init` takes examples, as in flax, and later calls take parameters. Observations and actions
may have any leading axes. The caller selects which part of an observation a network sees, see `types.Spec`.
"""

import dataclasses
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

from jaxrl import networks
from jaxrl.errors import UserError
from jaxrl.networks import TIME_FEATURES, Activation, Init, Norm, TimeFeatures, apply
from jaxrl.ops import flow, losses
from jaxrl.ops.closed_form import Mixture
from jaxrl.ranges import Count, Fraction, Natural, NonNegative, Range, Widths, check_at_least
from jaxrl.replay.hindsight import Goals
from jaxrl.replay.ring import Rings, windows
from jaxrl.types import Batch, Observation, PyTree, Requirements, Scalar, pytree

FEWEST_FEATURES = {"fourier": 4, "sinusoidal": 2, "raw": 1}
"""Minimum number of time features of each kind: Fourier features include both ends of the frequency range."""

T = TypeVar("T")

CutWindows: TypeAlias = Literal["keep", "drop"]
"""Whether windows shortened by an episode's end train the critic."""


@pytree
class Net:
    """Layers of a network."""

    hidden: Widths = (512, 512, 512, 512)  # widths of the hidden layers
    activation: Activation = "gelu"  # between layers
    norm: Norm = "none"  # position of LayerNorm
    initial: Init = "glorot"  # initialization of weights


@pytree
class Adam:
    """The Adam optimizer."""

    lr: NonNegative = 3e-4  # learning rate

    def transformation(self) -> optax.GradientTransformation:
        """Returns the optax optimizer."""
        return optax.adam(self.lr)


@pytree
class AdamW:
    """Adam with decoupled weight decay."""

    lr: NonNegative = 3e-4  # learning rate
    weight_decay: NonNegative = 0.0  # weight decay, multiplied by the learning rate

    def transformation(self) -> optax.GradientTransformation:
        """Returns the optax optimizer."""
        return optax.adamw(self.lr, weight_decay=self.weight_decay)


# Data


@pytree
class Windows:
    """The training data of one update: windows of the data, and their returns."""

    chunk: Count = 1  # H: actions per decision, executed open loop
    backup: Count = 1  # steps of a window and of the return in the TD target, at least `chunk`
    batch: Count = 256  # windows per update
    discount: Fraction = 0.99  # gamma, per environment step
    cut: CutWindows = "keep"  # whether windows shortened by termination train the critic
    goals: Goals = Goals()  # how goals are sampled, if the task has goals

    def check(self) -> None:
        """Raises UserError if the return is shorter than a chunk."""
        check_at_least(self, backup=self.chunk)

    def requires(self, head: losses.Head = "mse") -> Requirements:
        """Returns the requirements on the data for a type of value head."""
        return Requirements(window=self.backup, unit_rewards=head == "bce", batch=self.batch)

    def sample(self, data: Rings, key: jax.Array, share: Scalar | None = None) -> Batch:
        """Returns a batch of windows, uniform over the rows of all rings, or with a fraction `share` from the first."""
        return windows(data, key, self.batch, self.backup, self.goals, share)

    def actions(self, batch: Batch) -> jax.Array:
        """Returns the first `chunk` actions of each window as flat chunks [B, H * A]."""
        return batch.actions[:, : self.chunk].reshape(len(batch.actions), -1)

    def mask(self, batch: Batch) -> jax.Array:
        """Returns 1 for the entries of `actions(batch)` that were executed and 0 for the others, [B, H * A]."""
        return jnp.repeat(batch.valid[:, : self.chunk], batch.actions.shape[-1], axis=-1)

    def weight(self, batch: Batch) -> jax.Array:
        """Returns the weight [B] of each window in the critic's loss.

        "keep": 1 if all `chunk` actions of the critic's input were executed, or the task ended within them. "drop": 1
        if the whole window was executed, as in the official code of QC and related methods.
        """
        if self.cut == "drop":
            return batch.valid[:, -1]
        return jnp.maximum(batch.valid[:, self.chunk - 1], batch.terminated)

    def target(self, batch: Batch, next_value: jax.Array) -> jax.Array:
        """Returns the TD target [B]: the discounted return of each window plus the discounted value [B] after it."""
        return losses.td_target(batch.rewards, batch.steps, batch.terminated, next_value, self.discount)


@pytree
class Transitions:
    """The training data of one update of a one-step method: transitions of the data."""

    batch: Count = 256  # transitions per update
    discount: Fraction = 0.99  # gamma, per environment step
    goals: Goals = Goals()  # how goals are sampled, if the task has goals

    def requires(self, head: losses.Head = "mse") -> Requirements:
        """Returns the requirements on the data for a type of value head."""
        return Requirements(unit_rewards=head == "bce", batch=self.batch)

    def sample(self, data: Rings, key: jax.Array, share: Scalar | None = None) -> Batch:
        """Returns a batch of transitions, uniform over all rings, or with a fraction `share` from the first."""
        return windows(data, key, self.batch, 1, self.goals, share)

    def target(self, batch: Batch, next_value: jax.Array) -> jax.Array:
        """Returns the TD target [B]: the reward plus the discounted value [B] after it."""
        return losses.td_target(batch.rewards, batch.steps, batch.terminated, next_value, self.discount)


# Policies


@pytree
class FlowPolicy:
    """A flow over action chunks: the velocity v(s, x, t), integrated by Euler steps."""

    net: Net = Net()
    time: TimeFeatures = "raw"  # encoding of the time
    time_size: Count = TIME_FEATURES  # number of time features, unless raw
    steps: Count = 10  # Euler steps from noise to action

    def check(self) -> None:
        """Raises UserError for fewer time features than their kind requires."""
        check_at_least(self, time_size=FEWEST_FEATURES[self.time])

    def network(self, size: int) -> networks.Velocity:
        """Returns the network of chunks of `size` numbers."""
        return networks.Velocity(size, *_layers(self.net), self.time, self.time_size, self.net.initial)

    def init(self, key: jax.Array, obs: Observation, chunk: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [D]."""
        return self.network(chunk.shape[-1]).init(key, obs, chunk, jnp.zeros(1))

    def velocity(self, params: PyTree, obs: Observation) -> flow.AverageVelocity:
        """Returns the velocity at time t as a function (x, r, t) of flat chunks [..., D]; r is ignored."""
        return lambda x, r, t: apply(self.network(x.shape[-1]), params, obs, x, t)

    def sample(self, params: PyTree, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns chunks [..., D] from noise [..., D], clipped to [-1, 1]."""
        return jnp.clip(flow.euler(self.velocity(params, obs), noise, self.steps), -1, 1)

    def matching_error(self, params: PyTree, obs: Observation, x0: jax.Array, x1: jax.Array, t: jax.Array) -> jax.Array:
        """Returns the flow-matching error [B, D] of data x1 [B, D] under noise x0 [B, D] at times [B, 1]."""
        return flow.matching_error(self.velocity(params, obs), x0, x1, t)


@pytree
class FlowMapPolicy:
    """A flow map over action chunks: the average velocity u(s, x, r, t) over [r, t], for one-step jumps."""

    net: Net = Net()
    time: TimeFeatures = "fourier"  # encoding of the times; derivatives of "sinusoidal" are too large
    time_size: Count = TIME_FEATURES  # number of features of each time, unless raw

    def check(self) -> None:
        """Raises UserError for fewer time features than their kind requires."""
        check_at_least(self, time_size=FEWEST_FEATURES[self.time])

    def network(self, size: int) -> networks.Velocity:
        """Returns the network of chunks of `size` numbers."""
        return networks.Velocity(size, *_layers(self.net), self.time, self.time_size, self.net.initial)

    def init(self, key: jax.Array, obs: Observation, chunk: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [D]."""
        return self.network(chunk.shape[-1]).init(key, obs, chunk, jnp.zeros(1), jnp.zeros(1))

    def velocity(self, params: PyTree, obs: Observation) -> flow.AverageVelocity:
        """Returns u as a function (x, r, t) of flat chunks [..., D], for observations [..., O]."""
        return lambda x, r, t: apply(self.network(x.shape[-1]), params, obs, x, r, t)

    def sample(self, params: PyTree, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns chunks [..., D], the jump X_{0,1} from noise [..., D], clipped to [-1, 1]."""
        return jnp.clip(flow.jump(self.velocity(params, obs), noise), -1, 1)


@pytree
class SelfDistillation:
    """The losses of a flow map: flow matching on the diagonal r = t, and self-distillation off it."""

    kind: Literal["esd", "lsd", "lsd_reverse", "psd"] = "esd"  # the loss off the diagonal
    velocity: Literal["sample", "diagonal"] = "sample"  # velocity along which ESD differentiates
    warmup: Natural = 5_000  # updates with only the diagonal loss
    curriculum: Natural = 50_000  # update at which the intervals [r, t] reach their full width

    def check(self) -> None:
        """Raises UserError for inconsistent settings."""
        check_at_least(self, curriculum=self.warmup)

    def draw(self, key: jax.Array, count: int, size: int) -> dict[str, jax.Array]:
        """Returns the random numbers of one update with `count` chunks of `size` numbers."""
        key_x0, key_t, key_y0, key_rt, key_split = jax.random.split(key, 5)
        off_r, off_t = flow.uniform_times(key_rt, count)
        return {
            "x0": jax.random.normal(key_x0, (count, size)),
            "t": jax.random.uniform(key_t, (count, 1)),
            "off_x0": jax.random.normal(key_y0, (count, size)),
            "off_r": off_r,
            "off_t": off_t,
            "off_split": jax.random.uniform(key_split, (count, 1)),
        }

    def losses(
        self, u: flow.AverageVelocity, x1: jax.Array, mask: jax.Array, draws: dict[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the losses on and off the diagonal at an update number, for data x1 [B, D] with a mask [B, D]."""
        diagonal = flow.matching_error(u, draws["x0"], x1, draws["t"])
        progress = jnp.clip((step - self.warmup) / max(self.curriculum - self.warmup, 1), 0, 1)
        r, t = flow.widen(draws["off_r"], draws["off_t"], progress)
        if self.kind == "esd":
            off = flow.esd_error(u, draws["off_x0"], x1, r, t, self.velocity)
        elif self.kind == "psd":
            off = flow.psd_error(u, draws["off_x0"], x1, r, t, draws["off_split"])
        else:
            off = flow.lsd_error(u, draws["off_x0"], x1, r, t, reverse=self.kind == "lsd_reverse")
        return losses.masked_mean(diagonal, mask), losses.masked_mean(off, mask)


@pytree
class OneStepPolicy:
    """A map of noise to action chunks, mu(s, z)."""

    net: Net = Net()

    def network(self, size: int) -> networks.Velocity:
        """Returns the network of chunks of `size` numbers."""
        return networks.Velocity(size, *_layers(self.net), initial=self.net.initial)

    def init(self, key: jax.Array, obs: Observation, chunk: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [D]."""
        return self.network(chunk.shape[-1]).init(key, obs, chunk)

    def sample(self, params: PyTree, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns chunks [..., D] from noise [..., D], not clipped."""
        return apply(self.network(noise.shape[-1]), params, obs, noise)


@pytree
class DeterministicPolicy:
    """A deterministic policy pi(s) of one action, squashed to [-1, 1] by tanh."""

    net: Net = Net((256, 256), "relu", "none", "torch")

    def network(self, size: int) -> networks.Deterministic:
        """Returns the network of actions of `size` numbers."""
        return networks.Deterministic(size, *_layers(self.net), initial=self.net.initial)

    def init(self, key: jax.Array, obs: Observation, action: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [A]."""
        return self.network(action.shape[-1]).init(key, obs)

    def action(self, params: PyTree, obs: Observation) -> jax.Array:
        """Returns actions [..., A] in [-1, 1]."""
        return apply(self.network(networks.outputs_of(params)), params, obs)


@pytree
class GaussianPolicy:
    """A diagonal Gaussian over flat action chunks with state-dependent mean."""

    net: Net = Net()
    std: Literal["unit", "learned"] = "unit"  # standard deviation 1, or one learned number per entry

    def network(self, size: int) -> networks.Gaussian:
        """Returns the network of chunks of `size` numbers."""
        return networks.Gaussian(size, *_layers(self.net), self.std == "unit", self.net.initial)

    def init(self, key: jax.Array, obs: Observation, chunk: jax.Array, *more: jax.Array) -> PyTree:
        """Returns parameters, for examples [O] and [D], and of further inputs of the mean."""
        return self.network(chunk.shape[-1]).init(key, obs, *more)

    def moments(self, params: PyTree, obs: Observation, *more: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log standard deviation, [..., D] each."""
        return apply(self.network(networks.outputs_of(params)), params, obs, *more)  # ty: ignore[invalid-explicit-return]

    def log_density(self, params: PyTree, obs: Observation, chunk: jax.Array) -> jax.Array:
        """Returns the log density [...] of chunks [..., D]."""
        return losses.gaussian_log_density(chunk, *self.moments(params, obs))

    def sample(self, params: PyTree, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns mean + std * noise, clipped to [-1, 1], [..., D]."""
        mean, log_std = self.moments(params, obs)
        return jnp.clip(mean + jnp.exp(log_std) * noise, -1, 1)

    def squashed(self, params: PyTree, obs: Observation, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns tanh(mean + std * noise) [..., D] and its log density [...]."""
        return _squashed(*self.moments(params, obs), noise)


@pytree
class SquashedGaussianPolicy:
    """The tanh of a diagonal Gaussian with state-dependent mean and width."""

    net: Net = Net((256, 256), "relu", "none", "torch")

    def network(self, size: int) -> networks.Squashed:
        """Returns the network of actions of `size` numbers."""
        return networks.Squashed(size, *_layers(self.net), self.net.initial)

    def init(self, key: jax.Array, obs: Observation, action: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [A]."""
        return self.network(action.shape[-1]).init(key, obs)

    def moments(self, params: PyTree, obs: Observation) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log standard deviation before tanh, [..., A] each."""
        network = self.network(networks.outputs_of(params) // 2)
        return apply(network, params, obs)  # ty: ignore[invalid-explicit-return]

    def sample(self, params: PyTree, obs: Observation, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns actions [..., A] in [-1, 1] and their log density [...]."""
        return _squashed(*self.moments(params, obs), noise)


@pytree
class Autoencoder:
    """A variational autoencoder of actions, G(s, a), with latents of twice the action size."""

    hidden: Widths = (750, 750)  # widths of the hidden layers of its encoder, and of its decoder

    def init(self, key_encoder: jax.Array, key_decoder: jax.Array, obs: Observation, action: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [A]."""
        size, latent = action.shape[-1], jnp.zeros(2 * action.shape[-1])
        return {
            "encoder": networks.Encoder(2 * size, self.hidden).init(key_encoder, obs, action),
            "decoder": networks.Deterministic(size, self.hidden).init(key_decoder, obs, latent),
        }

    def rebuild(
        self, params: PyTree, obs: Observation, action: jax.Array, noise: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns G(s, a) [..., A] from noise [..., 2 A]; mean and log standard deviation of q(z | s, a)."""
        size = action.shape[-1]
        mean, log_std = apply(networks.Encoder(2 * size, self.hidden), params["encoder"], obs, action)
        latent = mean + jnp.exp(log_std) * noise
        return apply(networks.Deterministic(size, self.hidden), params["decoder"], obs, latent), mean, log_std


@pytree
class MixturePolicy:
    """The tanh of a mixture of diagonal Gaussians with state-dependent weights, means and widths."""

    net: Net = Net((256, 256, 256), "relu", "none", "torch")
    components: Count = 4  # M: number of Gaussians

    def network(self, outputs: int) -> networks.MLP:
        """Returns the network with `outputs` outputs."""
        return networks.MLP((*self.net.hidden, outputs), self.net.norm, self.net.activation, initial=self.net.initial)

    def init(self, key: jax.Array, obs: Observation, action: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [A]."""
        return self.network(self.components * (1 + 2 * action.shape[-1])).init(key, obs)

    def density(self, params: PyTree, obs: Observation) -> Mixture:
        """Returns the density of actions at observations [B, O]; standard deviations lie in [exp(-5), exp(2)]."""
        output = apply(self.network(networks.outputs_of(params)), params, obs)
        logits, rest = output[:, : self.components], output[:, self.components :]
        mean, log_std = jnp.split(rest.reshape(len(output), self.components, -1), 2, axis=-1)
        return Mixture(jax.nn.log_softmax(logits), mean, jnp.exp(jnp.clip(log_std, -5, 2)))


# Critics


@pytree
class Critic:
    """An ensemble of critics Q_j(s, a), or state values V_j(s), aggregated by mean or minimum."""

    net: Net = Net(norm="after")
    heads: Count = 2  # number of critics
    agg: losses.Aggregate = "mean"  # how they are aggregated
    head: losses.Head = "mse"  # whether their outputs are values, or logits of probabilities
    tau: Fraction = 0.005  # Polyak rate of their targets
    epsilon: Literal["1e-6", "1e-5"] = "1e-6"  # LayerNorm's epsilon: the defaults of flax and of PyTorch

    @property
    def network(self) -> networks.Critic:
        """The network."""
        return networks.Critic(self.heads, *_layers(self.net), self.net.initial, float(self.epsilon))

    def init(self, key: jax.Array, obs: Observation, action: jax.Array | None = None) -> PyTree:
        """Returns parameters, for an example [O] and [D]."""
        return self.network.init(key, *_given(obs, action))

    def outputs(self, params: PyTree, obs: Observation, action: jax.Array | None = None) -> jax.Array:
        """Returns the networks' outputs [K, ...] for actions [..., D]: values or logits."""
        return apply(self.network, params, *_given(obs, action))

    def values(self, params: PyTree, obs: Observation, action: jax.Array | None = None) -> jax.Array:
        """Returns each critic's value [K, ...] of actions [..., D]."""
        return losses.value_of(self.outputs(params, obs, action), self.head)

    def value(self, params: PyTree, obs: Observation, action: jax.Array | None = None) -> jax.Array:
        """Returns the aggregated value [...] of actions [..., D]."""
        return losses.aggregate(self.values(params, obs, action), self.agg)

    def score(self, params: PyTree, obs: Observation, action: jax.Array | None = None) -> jax.Array:
        """Returns the aggregated output [...] of actions [..., D], values or logits, for ranking and gradients."""
        return losses.aggregate(self.outputs(params, obs, action), self.agg)

    def first(self, params: PyTree, obs: Observation, action: jax.Array | None = None) -> jax.Array:
        """Returns the first critic's value [...], without computing the others."""
        alone = dataclasses.replace(self, heads=1)
        return alone.values(networks.first_of(params), obs, action)[0]

    def error(self, params: PyTree, obs: Observation, action: jax.Array | None, target: jax.Array) -> jax.Array:
        """Returns each critic's error [K, B] against targets [B]: squared, or the cross entropy of its logit."""
        return losses.regression(self.outputs(params, obs, action), target[None], self.head)


@pytree
class QuantileCritic:
    """An ensemble of critics Z_k(s, a, level) that learn quantiles of the return (IQN, arXiv 1806.06923)."""

    hidden: Widths = (256, 256)  # widths of each critic's layers before the level is input
    heads: Annotated[int, Range(2)] = 2  # number of critics
    levels: Count = 32  # number of levels averaged in a value
    train_levels: Count = 8  # number of random levels per transition in the loss
    tau: Fraction = 0.005  # Polyak rate of their targets

    @property
    def network(self) -> networks.QuantileCritic:
        """The network."""
        return networks.QuantileCritic(self.heads, self.hidden)

    def init(self, key: jax.Array, obs: Observation, action: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [D]."""
        return self.network.init(key, obs, action, jnp.zeros(1))

    def quantiles(self, params: PyTree, obs: Observation, action: jax.Array, level: jax.Array) -> jax.Array:
        """Returns quantiles [K, ..., N] of actions [..., D] at levels [..., N] in [0, 1]."""
        return apply(self.network, params, obs, action, level)

    def values(self, params: PyTree, obs: Observation, action: jax.Array) -> jax.Array:
        """Returns each critic's value [K, ...] of actions [..., D], the mean of equally spaced quantiles."""
        middles = (jnp.arange(self.levels) + 0.5) / self.levels
        level = jnp.broadcast_to(middles, (*action.shape[:-1], self.levels))
        return self.quantiles(params, obs, action, level).mean(axis=-1)


@pytree
class Value:
    """A state value V(s)."""

    net: Net = Net(norm="after")
    head: losses.Head = "mse"  # whether its output is a value, or the logit of a probability

    @property
    def network(self) -> networks.Value:
        """The network."""
        return networks.Value(*_layers(self.net), self.net.initial)

    def init(self, key: jax.Array, obs: Observation) -> PyTree:
        """Returns parameters, for an example [O]."""
        return self.network.init(key, obs)

    def output(self, params: PyTree, obs: Observation) -> jax.Array:
        """Returns the network's output [...]: values or logits."""
        return apply(self.network, params, obs)

    def value(self, params: PyTree, obs: Observation) -> jax.Array:
        """Returns values [...]."""
        return losses.value_of(self.output(params, obs), self.head)


def check_heads(agent: str, critic: Critic, value: Value, name: str = "the critic") -> None:
    """Raises UserError unless an agent's critic and value both learn values, or both probabilities."""
    if critic.head != value.head:
        raise UserError(f"{agent}.value.head = {value.head!r}: must be that of {name}, {critic.head!r}")


def _layers(net: Net) -> tuple[tuple[int, ...], Norm, Activation]:
    return net.hidden, net.norm, net.activation


def _squashed(mean: jax.Array, log_std: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns tanh(mean + std * noise) and its log density."""
    u = mean + jnp.exp(log_std) * noise
    return jnp.tanh(u), losses.tanh_log_density(u, mean, log_std)


def _given(obs: Observation, action: jax.Array | None) -> tuple[Observation, ...]:
    return (obs,) if action is None else (obs, action)


# Fields of nested settings


def with_fields(settings: T, **values: Any) -> T:
    """Returns settings in which every field with one of these names has the given value, including fields of parts.

    So `with_fields(agent, hidden=(64, 64), lr=1e-3)` changes all networks and all optimizers. Raises TypeError for an
    unknown name.
    """
    found: set[str] = set()
    changed = _replaced(settings, values, found)
    if missing := values.keys() - found:
        raise TypeError(f"no field in {type(settings).__name__} is called {', '.join(sorted(missing))}")
    return changed


def _replaced(settings: Any, values: dict[str, Any], found: set[str]) -> Any:
    """Returns settings with these values, and adds the names of replaced fields to `found`."""
    changed = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in values:
            found.add(field.name)
            changed[field.name] = values[field.name]
        elif dataclasses.is_dataclass(value):
            changed[field.name] = _replaced(value, values, found)
    return dataclasses.replace(settings, **changed)
