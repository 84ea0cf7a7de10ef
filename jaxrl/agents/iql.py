"""IQL: implicit Q-learning, which never asks the critic about an action that the data does not hold.

Paper: Kostrikov, Nair, Levine, "Offline Reinforcement Learning with Implicit Q-Learning", arXiv 2110.06169. Equation
numbers are the paper's.

A value V learns an upper expectile of the critic over the data's actions (Eq. 5), the critic learns from V (Eq. 6),
and a Gaussian actor imitates the data weighted by the advantage (Eq. 7), or climbs the critic next to imitating
(DDPG+BC, Park et al., arXiv 2406.09329).

Deliberate differences from the official code (the one of FQL's authors, which the recorded values are from):
- Chunks of actions and n-step returns, as in Q-chunking; with chunk = backup = 1 it is plain IQL.
- Windows train where the chunk's actions happened, or the task ended within them; "drop" asks for the whole window.
- One joint step on losses that all see the parameters from before it, as there; Kostrikov's own code goes V, actor, Q.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import common
from jaxrl.agents.common import CutWindows, Draws, State
from jaxrl.networks import Activation, Critic, Gaussian, Norm, Value, apply, repeat_for
from jaxrl.ops import guidance, losses
from jaxrl.replay.hindsight import Goals
from jaxrl.replay.ring import Rings, windows
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree


@pytree
class IQL:
    """Implicit Q-learning with a Gaussian actor."""

    chunk: int = 1  # H: actions per decision, executed open loop
    backup: int = 1  # steps of the return in the TD target, at least `chunk`
    actor_hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of the actor
    critic_hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of each critic head and of the value
    activation: Activation = "gelu"  # of all networks
    actor_norm: Norm = "none"  # layer norm in the actor
    critic_norm: Norm = "after"  # layer norm in critic and value
    critics: int = 2  # number of critic heads
    head: losses.Head = "mse"  # whether critic and value say values, or logits of probabilities
    batch_size: int = 256  # windows per update
    lr: Scalar = 3e-4  # learning rate of Adam
    discount: Scalar = 0.99  # gamma, per environment step
    tau: Scalar = 0.005  # polyak rate of the target critic
    expectile: Scalar = 0.9  # level of the value's expectile
    extraction: Literal["awr", "ddpgbc"] = "awr"  # imitate by advantage, or climb the critic and imitate
    alpha: Scalar = 10.0  # inverse temperature of the advantage, or weight of the imitation
    unit_width: bool = True  # whether the actor's standard deviation is 1, not learned
    advantage_of: Literal["online", "target"] = "online"  # which critic judges the advantage
    num_samples: int = 1  # N: samples of which the best is acted on
    eval_temperature: Scalar = 0.0  # scale of the actor's noise in evaluation
    cut_windows: CutWindows = "keep"  # whether windows that termination cuts short train
    goals: Goals = Goals()  # how goals are drawn where the task has some

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        counts = ("chunk", "actor_hidden", "critic_hidden", "critics", "batch_size", "num_samples")
        common.check_range(self, **dict.fromkeys(counts, (1, None)), backup=(self.chunk, None))
        common.check_range(self, lr=(0, None), alpha=(0, None), eval_temperature=(0, None))
        common.check_range(self, discount=(0, 1), tau=(0, 1), expectile=(0, 1))
        common.check_goals(self)

    def actor(self, spec: Spec) -> Gaussian:
        """Returns pi(a | s)."""
        return Gaussian(self.chunk * spec.action, self.actor_hidden, self.actor_norm, self.activation, self.unit_width)

    def critic(self) -> Critic:
        """Returns the heads Q_j(s, a)."""
        return Critic(self.critics, self.critic_hidden, self.critic_norm, self.activation)

    def value(self) -> Value:
        """Returns V(s)."""
        return Value(self.critic_hidden, self.critic_norm, self.activation)

    def q(self, params: PyTree, obs: jax.Array, action: jax.Array) -> jax.Array:
        """Returns the lowest head's value, [B]."""
        return losses.value_of(apply(self.critic(), params, obs, action), self.head).min(axis=0)

    def v(self, params: PyTree, obs: jax.Array) -> jax.Array:
        """Returns the state's value, [B]."""
        return losses.value_of(apply(self.value(), params, obs), self.head)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_actor, key_critic, key_value = jax.random.split(key, 3)
        obs, action = jnp.zeros(spec.observation), jnp.zeros(self.chunk * spec.action)
        params = {
            "actor": self.actor(spec).init(key_actor, obs),
            "critic": self.critic().init(key_critic, obs, action),
            "value": self.value().init(key_value, obs),
        }
        return common.start(spec, params, optax.adam(self.lr))

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of windows."""
        return windows(data, key, self.batch_size, self.backup, self.goals)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after one joint gradient step and one Polyak step."""
        return self.learn(state, batch, self.draw(state.spec, batch, key))

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: the noise of the actor's samples."""
        return {"actor_noise": jax.random.normal(key, (len(batch.obs), self.chunk * spec.action))}

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        return common.descend(state, lambda p: self.loss(p, state, batch, draws), optax.adam(self.lr), self.tau)

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the sum of the three losses and what each of them is."""
        value = self.value_loss(params["value"], state, batch)
        critic = self.critic_loss(params["critic"], state, batch)
        imitation, climb = self.actor_losses(params["actor"], state, batch, draws["actor_noise"])
        metrics = {"value/loss": value, "critic/loss": critic, "actor/bc_loss": imitation, "actor/q_loss": climb}
        return value + critic + imitation + climb, metrics

    def weight(self, batch: Batch) -> jax.Array:
        """Returns the weight [B] of the windows in all three losses."""
        return common.critic_weight(batch, self.chunk, self.cut_windows)

    def value_loss(self, value: PyTree, state: State, batch: Batch) -> jax.Array:
        """Returns the expectile loss of V against the target critic (Eq. 5)."""
        q = self.q(state.target, batch.obs, common.flat_actions(batch, self.chunk))
        output = apply(self.value(), value, batch.obs)
        return losses.masked_mean(losses.tilted(output, q, self.expectile, self.head), self.weight(batch))

    def td_target(self, state: State, batch: Batch) -> jax.Array:
        """Returns y [B], the return of the window and the value after it (Eq. 6)."""
        next_value = self.v(state.params["value"], batch.next_obs)
        y = losses.td_target(batch.rewards, batch.steps, batch.terminated, next_value, self.discount)
        return losses.bounded(y, self.head)

    def critic_loss(self, critic: PyTree, state: State, batch: Batch) -> jax.Array:
        """Returns the TD loss, summed over the heads (Eq. 6)."""
        output = apply(self.critic(), critic, batch.obs, common.flat_actions(batch, self.chunk))
        error = losses.regression(output, self.td_target(state, batch)[None], self.head)
        return losses.masked_mean(error.sum(axis=0), self.weight(batch))

    def advantage_weight(self, state: State, batch: Batch) -> jax.Array:
        """Returns min(exp(alpha (Q - V)), 100), [B]."""
        judge = state.params["critic"] if self.advantage_of == "online" else state.target
        q = self.q(judge, batch.obs, common.flat_actions(batch, self.chunk))
        return jnp.minimum(jnp.exp(self.alpha * (q - self.v(state.params["value"], batch.obs))), 100.0)

    def actor_losses(self, actor: PyTree, state: State, batch: Batch, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the loss of imitating, for "awr" weighted by advantage (Eq. 7), and that of climbing the critic."""
        mean, log_std = apply(self.actor(state.spec), actor, batch.obs)
        density = losses.gaussian_log_density(common.flat_actions(batch, self.chunk), mean, log_std)
        density = density * self.weight(batch)
        if self.extraction == "awr":
            return -jnp.mean(self.advantage_weight(state, batch) * density), jnp.zeros(())
        action = jnp.clip(mean if self.unit_width else mean + jnp.exp(log_std) * noise, -1, 1)
        q = self.q(state.params["critic"], batch.obs, action)
        climb = losses.masked_mean(q, batch.valid[:, 0]) / jax.lax.stop_gradient(jnp.abs(q).mean())
        return -self.alpha * density.mean(), -climb

    def choose(self, state: State, obs: jax.Array, noise: jax.Array, temperature: Scalar = 1.0) -> jax.Array:
        """Returns the best [B, D] of the N clipped samples that the noise [B, N, D] gives."""
        mean, log_std = apply(self.actor(state.spec), state.params["actor"], repeat_for(noise, obs))
        candidates = jnp.clip(mean + temperature * jnp.exp(log_std) * noise, -1, 1)
        scores = apply(self.critic(), state.params["critic"], repeat_for(noise, obs), candidates).min(axis=0)
        return guidance.best_of(candidates, scores)

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, H, A]: samples of the actor, at `eval_temperature` in evaluation (`greedy`)."""
        noise = jax.random.normal(key, (len(obs), self.num_samples, self.chunk * state.spec.action))
        action = self.choose(state, obs, noise, self.eval_temperature if greedy else 1.0)
        return common.unflatten(action, state.spec.action)
