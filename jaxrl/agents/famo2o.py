"""FamO2O: a family of policies, and a second policy that selects the policy-improvement strength in every state.

Paper: Wang et al., "Train Once, Get a Family: State-Adaptive Balances for Offline-to-Online Reinforcement Learning",
arXiv 2310.17966, in its instantiation on IQL.

IQL weights imitation by exp(b A) with one inverse temperature b. Here b is an input of the policy, which is trained
offline on b sampled from a range: a family. A second policy selects b in each state to maximize the critic. Online, the
family is trained on the selected b. Order and losses are those of the official code.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import Adam, Critic, GaussianPolicy, Net, Transitions, Value
from jaxrl.ops import losses
from jaxrl.ranges import Fraction, NonNegative, check_at_least
from jaxrl.types import Batch, Metrics, Observation, Phase, PyTree, Spec, count_of, pytree

FEATURES = 6  # number of features of the balance, an input of the family

_NET = Net((256, 256), "relu")


@pytree
class FamO2O:
    """Implicit Q-learning of a family of policies and of the selection among them."""

    chunk: ClassVar[int] = 1

    transitions: Transitions = Transitions()
    family: GaussianPolicy = GaussianPolicy(_NET, std="learned")  # pi_u(a | s, e(b)), its mean before squashing
    balance: GaussianPolicy = GaussianPolicy(_NET, std="learned")  # pi_b(x | s), of a number before squashing
    critic: Critic = Critic(_NET, agg="min")  # Q_1(s, a) and Q_2(s, a)
    value: Value = Value(_NET)  # V(s)
    adam: Adam = Adam()  # of each network
    expectile: Fraction = 0.9  # level of the value's expectile
    lowest: NonNegative = 8.0  # lowest inverse temperature of the advantage in the family
    highest: NonNegative = 14.0  # highest inverse temperature
    max_weight: NonNegative = 100.0  # bound of the imitation's weights

    requires, sample, update = shared.requires_transitions, shared.sample_transitions, shared.update

    def check(self) -> None:
        """Raises UserError for inconsistent settings."""
        check_at_least(self, highest=self.lowest)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_family, key_balance, key_critic, key_value = jax.random.split(key, 4)
        obs, action = spec.example(), jnp.zeros(spec.action)
        params = {
            "family": self.family.init(key_family, spec.actor(obs), action, jnp.zeros(FEATURES)),
            "balance": self.balance.init(key_balance, spec.actor(obs), jnp.zeros(1)),
            "entropy": jnp.zeros(()),  # the logarithm of its weight in the choice
            "critic": self.critic.init(key_critic, spec.critic(obs), action),
            "value": self.value.init(key_value, spec.critic(obs)),
        }
        return learner.create(spec, params, dict.fromkeys(params, self.adam.transformation()), "critic")

    def enter(self, state: State, phase: Phase) -> State:
        """Returns the state in a phase: online, the family is trained on the selected balances."""
        return dataclasses.replace(state, online=state.online or phase.collects)

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: for selecting a balance, acting with it, and for training."""
        key_choice, key_action, key_uniform, key_online = jax.random.split(key, 4)
        one, many = (len(batch.actions), 1), (len(batch.actions), spec.action)
        return {
            "choice": jax.random.normal(key_choice, one),
            "action": jax.random.normal(key_action, many),
            "uniform": jax.random.uniform(key_uniform, one, minval=-1),
            "online": jax.random.normal(key_online, one),
        }

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers: V, choice, family, Q, target."""
        metrics: dict[str, jax.Array] = {}
        stages = {("value",): self.value_loss, ("balance", "entropy"): self.choice_loss}
        stages |= {("family",): self.family_loss, ("critic",): self.critic_loss}
        for names, loss in stages.items():
            gradient, more = jax.grad(loss, has_aux=True)(state.params, state, batch, draws)
            for name in names:
                state = learner.step_along(state, name, gradient[name], self.adam.transformation())
            metrics |= more
        return learner.counted(learner.follow(state, self.critic.tau, "critic")), metrics

    def q(self, state: State, batch: Batch, action: jax.Array) -> jax.Array:
        """Returns the lower target critic's value [B] of actions [B, A]."""
        return self.critic.value(state.target["critic"], state.spec.critic(batch.obs), action)

    def value_loss(self, params: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the expectile loss of V against the target critics."""
        v = self.value.value(params["value"], state.spec.critic(batch.obs))
        error = losses.expectile(self.q(state, batch, batch.actions[:, 0]) - v, self.expectile)
        loss = losses.masked_mean(error, batch.valid[:, 0])
        return loss, {"value/loss": loss}

    def td_target(self, state: State, batch: Batch) -> jax.Array:
        """Returns y [B], the reward plus the discounted next value."""
        next_value = self.value.value(state.params["value"], state.spec.critic(batch.next_obs))
        return self.transitions.target(batch, next_value)

    def critic_loss(self, params: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the TD loss, summed over the critics."""
        obs, y = state.spec.critic(batch.obs), self.td_target(state, batch)
        error = self.critic.error(params["critic"], obs, batch.actions[:, 0], y)
        loss = losses.masked_mean(error.sum(axis=0), batch.valid[:, 0])
        return loss, {"critic/loss": loss}

    def scaled(self, x: jax.Array) -> jax.Array:
        """Returns balances for numbers in [-1, 1]."""
        return self.lowest + (x + 1) / 2 * (self.highest - self.lowest)

    def choice_loss(self, params: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns tau_b log pi_b(x | s) - Q(s, pi_u(s, b(x))) for the choice, and tau_b (H + 1/2) for tau_b."""
        obs, happened = state.spec.actor(batch.obs), batch.valid[:, 0]
        x, density = self.balance.squashed(params["balance"], obs, draws["choice"])
        mean, log_std = self.member(state.params["family"], obs, self.scaled(x))
        q = self.q(state, batch, mean + jnp.exp(log_std) * draws["action"])
        choice = losses.masked_mean(jnp.exp(state.params["entropy"]) * density - q, happened)
        weight = jnp.exp(params["entropy"])
        entropy = weight * jax.lax.stop_gradient(losses.masked_mean(0.5 - density, happened))
        metrics = {"balance/loss": choice, "balance/mean": self.scaled(x).mean(), "balance/entropy_weight": weight}
        return choice + entropy, metrics

    def member(self, family: PyTree, obs: Observation, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log standard deviation [B, A] of the family's policy for balances b [B, 1]."""
        mean, log_std = self.family.moments(family, obs, features(b))
        return jnp.tanh(mean), log_std

    def trained_balance(self, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns the balances [B, 1] for training the family: uniform in the range, online the selected ones."""
        if not state.online:
            return self.scaled(draws["uniform"])
        x, _ = self.balance.squashed(state.params["balance"], state.spec.actor(batch.obs), draws["online"])
        return self.scaled(x)

    def family_loss(self, params: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the imitation's loss, weighted by min(exp(b (Q - V)), max_weight)."""
        b, action = self.trained_balance(state, batch, draws), batch.actions[:, 0]
        v = self.value.value(state.params["value"], state.spec.critic(batch.obs))
        weight = jnp.minimum(jnp.exp(b[:, 0] * (self.q(state, batch, action) - v)), self.max_weight)
        moments = self.member(params["family"], state.spec.actor(batch.obs), b)
        loss = -losses.masked_mean(weight * losses.gaussian_log_density(action, *moments), batch.valid[:, 0])
        return loss, {"actor/loss": loss, "actor/weight": weight.mean()}

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A] at the selected median balance: samples, or the mean in evaluation (`greedy`)."""
        obs = state.spec.actor(obs)
        x, _ = self.balance.squashed(state.params["balance"], obs, jnp.zeros((count_of(obs), 1)))
        mean, log_std = self.member(state.params["family"], obs, self.scaled(x))
        noise = 0.0 if greedy else jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        return jnp.clip(mean + noise, -1, 1)[:, None]


def features(b: jax.Array) -> jax.Array:
    """Returns sines and cosines [B, 6] of balances [B, 1], in pairs of decreasing frequency."""
    frequency = 10_000.0 ** (-2 * jnp.arange(FEATURES // 2) / FEATURES)
    angle = b * frequency[None]
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(len(b), FEATURES)
