"""CQL: conservative Q-learning, which pushes down what the critics say of actions that the data do not hold.

Papers: Kumar, Zhou, Tucker, Levine, "Conservative Q-Learning for Offline Reinforcement Learning", arXiv 2006.04779;
Nakamoto et al., "Cal-QL: Calibrated Offline RL Pre-Training for Efficient Online Fine-Tuning", arXiv 2303.05479.

A soft actor-critic whose critics also minimise the soft maximum of Q over actions, sampled uniformly and from the
policy here and at the next state, less Q of the data's action: CQL(H), with importance weights (Appendix F).

`calibrated` is Cal-QL: the policy's actions are not pushed below the return that the data went on to earn (Eq. 3.2).
Where the clock cut an episode in which the reward never changed, as when the goal was never reached, that return goes
on forever at that reward. Online, a transition is calibrated as soon as its episode is over, and a batch has a share
of the data and a share of the replay, whatever their sizes.

The temperature, the policy and the critics step on losses that all see the parameters from before, as in CORL's code,
whose settings for locomotion are the defaults; only its initial weights are not copied.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import common
from jaxrl.agents.common import Draws, State
from jaxrl.errors import UserError
from jaxrl.networks import Activation, Critic, Norm, Squashed, apply, repeat_for
from jaxrl.ops import losses
from jaxrl.replay.hindsight import Goals
from jaxrl.replay.returns import returns_to_go
from jaxrl.replay.ring import Ring, Rings, windows
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree

RETURN = "return_to_go"  # the column that Cal-QL adds to data and replay


@pytree
class CQL:
    """Soft actor-critic with conservative critics, calibrated or not."""

    chunk: ClassVar[int] = 1

    actor_hidden: tuple[int, ...] = (256, 256, 256)  # widths of the policy
    critic_hidden: tuple[int, ...] = (256, 256, 256)  # widths of each critic
    activation: Activation = "relu"  # of all networks
    critic_norm: Norm = "none"  # layer norm in the critics
    batch_size: int = 256  # transitions per update
    actor_lr: Scalar = 3e-5  # learning rate of Adam, of policy and entropy weight
    critic_lr: Scalar = 3e-4  # learning rate of Adam
    discount: Scalar = 0.99  # gamma, per environment step
    tau: Scalar = 0.005  # polyak rate of the target critics
    conservatism: Scalar = 10.0  # weight of the conservative term
    samples: int = 10  # actions of each kind in that term
    soft: Scalar = 1.0  # temperature of its soft maximum
    lowest_gap: Scalar = -1e9  # bound of the term from below; -200 on the antmazes
    lagrange: bool = False  # whether the term's weight is learned, so that it meets `gap`
    gap: Scalar = 5.0  # what the term may be, then
    max_target: bool = False  # whether the best of the policy's actions is the target's, not one of them
    calibrated: bool = False  # Cal-QL
    mixing: Scalar = 0.5  # share of a batch that comes from the dataset, where there is a replay as well
    normalize: bool = True  # whether observations are normalised by the data's mean and spread
    goals: Goals = Goals()  # how goals are drawn where the task has some

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        counts = ("actor_hidden", "critic_hidden", "batch_size", "samples")
        common.check_range(self, **dict.fromkeys(counts, (1, None)), soft=(1e-6, None))
        common.check_range(self, **dict.fromkeys(("actor_lr", "critic_lr", "conservatism"), (0, None)))
        common.check_range(self, discount=(0, 1), tau=(0, 1), mixing=(0, 1))
        self.goals.check()

    def actor(self, spec: Spec) -> Squashed:
        """Returns pi(a | s)."""
        return Squashed(spec.action, self.actor_hidden, self.activation)

    def critic(self) -> Critic:
        """Returns the twins Q_1(s, a) and Q_2(s, a)."""
        return Critic(2, self.critic_hidden, self.critic_norm, self.activation, "torch")

    def optimizers(self) -> dict[str, optax.GradientTransformation]:
        """Returns each network's optimiser."""
        rates = {"actor": self.actor_lr, "entropy": self.actor_lr, "critic": self.critic_lr, "lagrange": self.critic_lr}
        return {name: optax.adam(rate) for name, rate in rates.items()}

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state. Raises UserError for Cal-QL in tasks with goals."""
        if self.calibrated and spec.goal:
            raise UserError("CQL.calibrated = True: goals are drawn in hindsight here, rows have no return to go")
        key_actor, key_critic = jax.random.split(key)
        obs, action = jnp.zeros(spec.observation), jnp.zeros(spec.action)
        params = {
            "actor": self.actor(spec).init(key_actor, obs),
            "entropy": jnp.zeros(()),  # the logarithm of its weight
            "critic": self.critic().init(key_critic, obs, action),
            "lagrange": jnp.ones(()),  # the logarithm of the conservative term's
        }
        return common.start_each(spec, params, self.optimizers(), "critic")

    def fit(self, state: State, data: Rings) -> State:
        """Returns the initial state with the data's normaliser."""
        return common.fit(state, data) if self.normalize else state

    def derive_columns(self, data: Rings) -> Rings:
        """Returns the data with their rows' returns to go, for Cal-QL; where they have these already, as they are."""

        def annotated(ring: Ring) -> Ring:
            return dataclasses.replace(ring, extra={**ring.extra, RETURN: returns_to_go(ring, self.discount)})

        missing = [self.calibrated and RETURN not in ring.extra for ring in data]
        return tuple(annotated(ring) if lacks else ring for ring, lacks in zip(data, missing, strict=True))

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of transitions."""
        return windows(data, key, self.batch_size, 1, self.goals, self.mixing)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after a step of each network, and of the target critics."""
        return self.learn(state, batch, self.draw(state.spec, batch, key))

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: uniform actions, and noise of the policy's."""
        key_uniform, key_here, key_next, key_policy, key_target = jax.random.split(key, 5)
        one = (len(batch.obs), spec.action)
        many = (len(batch.obs), self.samples, spec.action)
        return {
            "uniform": jax.random.uniform(key_uniform, many, minval=-1),
            "here": jax.random.normal(key_here, many),
            "next": jax.random.normal(key_next, many),
            "policy": jax.random.normal(key_policy, one),
            "target": jax.random.normal(key_target, many if self.max_target else (one[0], 1, one[1])),
        }

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        batch, optimizers = common.normalized(state, batch), self.optimizers()
        before, metrics = state, {}
        named: dict[str, Callable[..., tuple[jax.Array, Metrics]]] = {
            "entropy": self.entropy_loss,
            "actor": self.actor_loss,
            "critic": self.critic_loss,
        }
        if self.lagrange:
            named["lagrange"] = self.lagrange_loss
        for name, of in named.items():
            loss = lambda params, of=of: of(params, before, batch, draws)  # noqa: E731
            state, more = common.step(state, name, loss, optimizers[name])
            metrics |= more
        return common.counted(common.follow(state, self.tau, "critic")), metrics

    # Policy and entropy

    def sampled(self, spec: Spec, actor: PyTree, obs: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns actions [..., A] of the policy and their log density [...]."""
        mean, log_std = apply(self.actor(spec), actor, obs)
        u = mean + jnp.exp(log_std) * noise
        return jnp.tanh(u), losses.tanh_log_density(u, mean, log_std)

    def entropy_loss(self, entropy: jax.Array, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the loss that keeps the policy's entropy at minus the number of its actions' entries."""
        _, density = self.sampled(state.spec, state.params["actor"], batch.obs, draws["policy"])
        loss = -entropy * losses.masked_mean(density - state.spec.action, batch.valid[:, 0])
        return loss, {"entropy/weight": jnp.exp(entropy)}

    def actor_loss(self, actor: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the entropy's weight times the log density, less the lower critic's value."""
        action, density = self.sampled(state.spec, actor, batch.obs, draws["policy"])
        q = apply(self.critic(), state.params["critic"], batch.obs, action).min(axis=0)
        loss = losses.masked_mean(jnp.exp(state.params["entropy"]) * density - q, batch.valid[:, 0])
        return loss, {"actor/loss": loss, "actor/log_density": density.mean()}

    # Critics

    def td_target(self, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns y [B], the reward and what the lower target critic says of the policy's next action, or its best."""
        noise = draws["target"]
        next_obs = repeat_for(noise, batch.next_obs)
        action, _ = self.sampled(state.spec, state.params["actor"], next_obs, noise)
        next_value = apply(self.critic(), state.target["critic"], next_obs, action).min(axis=0).max(axis=-1)
        return losses.td_target(batch.rewards, batch.steps, batch.terminated, next_value, self.discount)

    def out_of_data(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns the soft maximum of each critic [2, B] over actions here, weighted by how they were sampled."""
        spec, actor, uniform = state.spec, state.params["actor"], draws["uniform"]
        here, here_density = self.sampled(spec, actor, repeat_for(uniform, batch.obs), draws["here"])
        after, after_density = self.sampled(spec, actor, repeat_for(uniform, batch.next_obs), draws["next"])
        actions = jax.lax.stop_gradient(jnp.concatenate([uniform, after, here], axis=1))  # one call for all
        q = apply(self.critic(), critic, repeat_for(actions, batch.obs), actions)
        flat = jnp.full(uniform.shape[:2], spec.action * math.log(0.5))
        density = jax.lax.stop_gradient(jnp.concatenate([flat, after_density, here_density], axis=1))
        if self.calibrated and RETURN in batch.extra:
            floor = jnp.where(jnp.isnan(batch.extra[RETURN]), -jnp.inf, batch.extra[RETURN])
            q = jnp.concatenate([q[..., : self.samples], jnp.maximum(q[..., self.samples :], floor[None, :, None])], -1)
        return self.soft * jax.nn.logsumexp((q - density[None]) / self.soft, axis=-1)

    def excess(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns by how much each critic's soft maximum exceeds its value of the data, in the mean; [2]."""
        data = apply(self.critic(), critic, batch.obs, batch.actions[:, 0])
        excess = jnp.maximum(self.out_of_data(critic, state, batch, draws) - data, self.lowest_gap)
        return (excess * batch.valid[:, :1].T).mean(axis=1)

    def critic_loss(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the TD loss plus the weighted excess, both summed over the critics."""
        y = self.td_target(state, batch, draws)
        error = jnp.square(apply(self.critic(), critic, batch.obs, batch.actions[:, 0]) - y[None]).sum(axis=0)
        loss, excess = losses.masked_mean(error, batch.valid[:, 0]), self.excess(critic, state, batch, draws).sum()
        weight = self.conservatism
        if self.lagrange:
            weight = weight * multiplier(state.params["lagrange"])
            excess = excess - 2 * self.gap
        return loss + weight * excess, {"critic/loss": loss, "critic/conservative": excess}

    def lagrange_loss(self, lagrange: jax.Array, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the loss that raises the term's weight where the excess is above `gap`."""
        excess = self.excess(state.params["critic"], state, batch, draws) - self.gap
        weight = multiplier(lagrange)
        return -weight * self.conservatism * excess.sum(), {"lagrange/weight": weight}

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A]: samples of the policy; the squashed mean in evaluation (`greedy`)."""
        assert state.normalizer is not None
        noise = jax.random.normal(key, (len(obs), state.spec.action)) * (0.0 if greedy else 1.0)
        action, _ = self.sampled(state.spec, state.params["actor"], state.normalizer(obs), noise)
        return action[:, None]


def multiplier(log: jax.Array) -> jax.Array:
    """Returns the multiplier whose logarithm is learned, within [0, 1e6]."""
    return jnp.clip(jnp.exp(log), 0, 1e6)
