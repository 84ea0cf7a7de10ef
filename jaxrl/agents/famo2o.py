"""FamO2O: a family of policies, of which another policy chooses in every state how much to trust the critic.

Paper: Wang et al., "Train Once, Get a Family: State-Adaptive Balances for Offline-to-Online Reinforcement Learning",
arXiv 2310.17966, in its instantiation on IQL.

IQL weights imitation by exp(b A) with one inverse temperature b. Here the policy is told b, and trained offline on b
drawn from a whole range: a family. A second policy chooses b in each state so as to please the critic. Online, the
family is trained on those choices.

Order and losses are those of the official code, except that every draw has a random key of its own; its initial
weights are not copied.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl.agents import common
from jaxrl.agents.common import Draws, State
from jaxrl.networks import Activation, Critic, Gaussian, Norm, Value, apply
from jaxrl.ops import losses
from jaxrl.replay.hindsight import Goals
from jaxrl.replay.ring import Rings, windows
from jaxrl.types import Batch, Metrics, Phase, PyTree, Scalar, Spec, pytree

FEATURES = 6  # of the balance, as the family sees it


@pytree
class FamO2O:
    """Implicit Q-learning of a family of policies and of the choice among them."""

    chunk: ClassVar[int] = 1

    actor_hidden: tuple[int, ...] = (256, 256)  # widths of the family and of the choice
    critic_hidden: tuple[int, ...] = (256, 256)  # widths of each critic and of the value
    activation: Activation = "relu"  # of all networks
    critic_norm: Norm = "none"  # layer norm in critics and value
    batch_size: int = 256  # transitions per update
    lr: Scalar = 3e-4  # learning rate of Adam, of all networks
    discount: Scalar = 0.99  # gamma, per environment step
    tau: Scalar = 0.005  # polyak rate of the target critics
    expectile: Scalar = 0.9  # level of the value's expectile
    lowest: Scalar = 8.0  # the least inverse temperature of the advantage in the family
    highest: Scalar = 14.0  # and the greatest
    max_weight: Scalar = 100.0  # bound of the imitation's weights
    goals: Goals = Goals()  # how goals are drawn where the task has some

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        common.check_range(self, **dict.fromkeys(("actor_hidden", "critic_hidden", "batch_size"), (1, None)))
        common.check_range(self, lr=(0, None), max_weight=(0, None), lowest=(0, None))
        common.check_range(self, highest=(float(np.max(np.asarray(self.lowest))), None))
        common.check_range(self, discount=(0, 1), tau=(0, 1), expectile=(0, 1))
        self.goals.check()

    def family(self, spec: Spec) -> Gaussian:
        """Returns pi_u(a | s, e(b)), its mean still to be squashed."""
        return Gaussian(spec.action, self.actor_hidden, "none", self.activation, False)

    def balance(self) -> Gaussian:
        """Returns pi_b(x | s), of a number still to be squashed."""
        return Gaussian(1, self.actor_hidden, "none", self.activation, False)

    def critic(self) -> Critic:
        """Returns the twins Q_1(s, a) and Q_2(s, a)."""
        return Critic(2, self.critic_hidden, self.critic_norm, self.activation)

    def value(self) -> Value:
        """Returns V(s)."""
        return Value(self.critic_hidden, self.critic_norm, self.activation)

    def q(self, params: PyTree, obs: jax.Array, action: jax.Array) -> jax.Array:
        """Returns the lower critic's value, [B]."""
        return apply(self.critic(), params, obs, action).min(axis=0)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_family, key_balance, key_critic, key_value = jax.random.split(key, 4)
        obs, action = jnp.zeros(spec.observation), jnp.zeros(spec.action)
        params = {
            "family": self.family(spec).init(key_family, jnp.zeros(spec.observation + FEATURES)),
            "balance": self.balance().init(key_balance, obs),
            "entropy": jnp.zeros(()),  # the logarithm of its weight in the choice
            "critic": self.critic().init(key_critic, obs, action),
            "value": self.value().init(key_value, obs),
        }
        return common.start_each(spec, params, dict.fromkeys(params, optax.adam(self.lr)), "critic")

    def enter(self, state: State, phase: Phase) -> State:
        """Returns the state in a phase: online the family is trained on the balances that are chosen."""
        return dataclasses.replace(state, online=state.online or phase.collects)

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of transitions."""
        return windows(data, key, self.batch_size, 1, self.goals)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after a step of each network in turn, and of the target critics."""
        return self.learn(state, batch, self.draw(state.spec, batch, key))

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: of choosing a balance, acting on it, and one to train."""
        key_choice, key_action, key_uniform, key_online = jax.random.split(key, 4)
        count = len(batch.obs)
        return {
            "choice": jax.random.normal(key_choice, (count, 1)),
            "action": jax.random.normal(key_action, (count, spec.action)),
            "uniform": jax.random.uniform(key_uniform, (count, 1), minval=-1),
            "online": jax.random.normal(key_online, (count, 1)),
        }

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers: V, choice, family, Q, target."""
        stages = (
            {"value": self.value_loss},
            {"balance": self.balance_loss, "entropy": self.entropy_loss},  # the entropy of the choice before its step
            {"family": self.family_loss},
            {"critic": self.critic_loss},
        )
        metrics: dict[str, jax.Array] = {}
        for stage in stages:
            before = state
            for name, of in stage.items():
                loss = lambda params, of=of, before=before: of(params, before, batch, draws)  # noqa: E731
                state, more = common.step(state, name, loss, optax.adam(self.lr))
                metrics |= more
        return common.counted(common.follow(state, self.tau, "critic")), metrics

    # The critics

    def value_loss(self, value: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the expectile loss of V against the target critics."""
        q = self.q(state.target["critic"], batch.obs, batch.actions[:, 0])
        error = losses.expectile(q - apply(self.value(), value, batch.obs), self.expectile)
        loss = losses.masked_mean(error, batch.valid[:, 0])
        return loss, {"value/loss": loss}

    def td_target(self, state: State, batch: Batch) -> jax.Array:
        """Returns y [B], the reward and the value after it."""
        next_value = apply(self.value(), state.params["value"], batch.next_obs)
        return losses.td_target(batch.rewards, batch.steps, batch.terminated, next_value, self.discount)

    def critic_loss(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the TD loss, summed over the critics."""
        error = apply(self.critic(), critic, batch.obs, batch.actions[:, 0]) - self.td_target(state, batch)[None]
        loss = losses.masked_mean(jnp.square(error).sum(axis=0), batch.valid[:, 0])
        return loss, {"critic/loss": loss}

    # The choice

    def scaled(self, x: jax.Array) -> jax.Array:
        """Returns balances for numbers in [-1, 1]."""
        return self.lowest + (x + 1) / 2 * (self.highest - self.lowest)

    def chosen(self, balance: PyTree, obs: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns numbers x [B, 1] in (-1, 1) that the choice samples, and their log density [B]."""
        mean, log_std = apply(self.balance(), balance, obs)
        u = mean + jnp.exp(log_std) * noise
        return jnp.tanh(u), losses.tanh_log_density(u, mean, log_std)

    def balance_loss(self, balance: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns tau_b log pi_b(x | s) less the target critics' value of what the family does with b(x)."""
        x, density = self.chosen(balance, batch.obs, draws["choice"])
        mean, log_std = self.member(state.spec, state.params["family"], batch.obs, self.scaled(x))
        action = mean + jnp.exp(log_std) * draws["action"]
        q = self.q(state.target["critic"], batch.obs, action)
        loss = losses.masked_mean(jnp.exp(state.params["entropy"]) * density - q, batch.valid[:, 0])
        return loss, {"balance/loss": loss, "balance/mean": self.scaled(x).mean()}

    def entropy_loss(self, entropy: jax.Array, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns tau_b (H - H*), with H* = -1/2, which keeps the choice's entropy H there."""
        _, density = self.chosen(state.params["balance"], batch.obs, draws["choice"])
        excess = jax.lax.stop_gradient(losses.masked_mean(0.5 - density, batch.valid[:, 0]))
        return jnp.exp(entropy) * excess, {"balance/entropy_weight": jnp.exp(entropy)}

    # The family

    def member(self, spec: Spec, family: PyTree, obs: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log deviation [B, A] of the policy that balances by b [B, 1]."""
        mean, log_std = apply(self.family(spec), family, jnp.concatenate([obs, features(b)], axis=-1))
        return jnp.tanh(mean), log_std

    def trained_balance(self, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns the balances [B, 1] that the family is trained on: of the whole range, online those chosen."""
        if not state.online:
            return self.scaled(draws["uniform"])
        return jax.lax.stop_gradient(self.scaled(self.chosen(state.params["balance"], batch.obs, draws["online"])[0]))

    def family_loss(self, family: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the imitation's loss, weighted by min(exp(b (Q - V)), max_weight)."""
        b = self.trained_balance(state, batch, draws)
        q = self.q(state.target["critic"], batch.obs, batch.actions[:, 0])
        advantage = q - apply(self.value(), state.params["value"], batch.obs)
        weight = jnp.minimum(jnp.exp(b[:, 0] * advantage), self.max_weight)
        mean, log_std = self.member(state.spec, family, batch.obs, b)
        density = losses.gaussian_log_density(batch.actions[:, 0], mean, log_std)
        loss = -losses.masked_mean(weight * density, batch.valid[:, 0])
        return loss, {"actor/loss": loss, "actor/weight": weight.mean()}

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A] at the choice's median balance: samples, the mean in evaluation (`greedy`)."""
        x, _ = self.chosen(state.params["balance"], obs, jnp.zeros((len(obs), 1)))
        mean, log_std = self.member(state.spec, state.params["family"], obs, self.scaled(x))
        noise = 0.0 if greedy else jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        return jnp.clip(mean + noise, -1, 1)[:, None]


def features(b: jax.Array) -> jax.Array:
    """Returns sines and cosines [B, 6] of balances [B, 1], in pairs of falling frequency."""
    frequency = 10_000.0 ** (-2 * jnp.arange(FEATURES // 2) / FEATURES)
    angle = b * frequency[None]
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(len(b), FEATURES)
