"""AWAC: advantage-weighted actor-critic, which imitates the data's actions the more, the better the critic finds them.

Paper: Nair, Gupta, Dalal, Levine, "AWAC: Accelerating Online Reinforcement Learning with Offline Datasets",
arXiv 2006.09359.

The critics learn the value of the policy itself (Eq. 4). The policy, a Gaussian, maximises the likelihood of the
data's actions weighted by exp(advantage / temperature), which is the nearest policy to the data of a given improvement
(Eq. 13). The same update serves offline and online.

The advantage is measured against one sample of the policy, as in CORL's code, whose settings are the defaults.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import common
from jaxrl.agents.common import Draws, State
from jaxrl.networks import Activation, Critic, Gaussian, Norm, apply
from jaxrl.ops import losses
from jaxrl.replay.hindsight import Goals
from jaxrl.replay.ring import Rings, windows
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree


@pytree
class AWAC:
    """Imitation of the data weighted by exponential advantages, on a critic of the policy's own value."""

    chunk: ClassVar[int] = 1

    actor_hidden: tuple[int, ...] = (256, 256, 256)  # widths of the actor
    critic_hidden: tuple[int, ...] = (256, 256, 256)  # widths of each critic
    activation: Activation = "relu"  # of all networks
    actor_norm: Norm = "none"  # layer norm in the actor
    critic_norm: Norm = "none"  # layer norm in the critics
    batch_size: int = 256  # transitions per update
    actor_lr: Scalar = 3e-4  # learning rate of Adam
    critic_lr: Scalar = 3e-4  # learning rate of Adam
    discount: Scalar = 0.99  # gamma, per environment step
    tau: Scalar = 0.005  # polyak rate of the target critics
    temperature: Scalar = 1 / 3  # of the advantage; 0.1 where rewards are sparse
    max_weight: Scalar = 100.0  # bound of the weights
    normalize: bool = True  # whether observations are normalised by the data's mean and spread
    goals: Goals = Goals()  # how goals are drawn where the task has some

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        common.check_range(self, **dict.fromkeys(("actor_hidden", "critic_hidden", "batch_size"), (1, None)))
        common.check_range(self, **dict.fromkeys(("actor_lr", "critic_lr", "max_weight"), (0, None)))
        common.check_range(self, discount=(0, 1), tau=(0, 1), temperature=(1e-6, None))
        self.goals.check()

    def actor(self, spec: Spec) -> Gaussian:
        """Returns pi(a | s)."""
        return Gaussian(spec.action, self.actor_hidden, self.actor_norm, self.activation, False, "torch")

    def critic(self) -> Critic:
        """Returns the twins Q_1(s, a) and Q_2(s, a)."""
        return Critic(2, self.critic_hidden, self.critic_norm, self.activation, "torch")

    def q(self, params: PyTree, obs: jax.Array, action: jax.Array) -> jax.Array:
        """Returns the lower critic's value, [B]."""
        return apply(self.critic(), params, obs, action).min(axis=0)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_actor, key_critic = jax.random.split(key)
        obs, action = jnp.zeros(spec.observation), jnp.zeros(spec.action)
        params = {
            "actor": self.actor(spec).init(key_actor, obs),
            "critic": self.critic().init(key_critic, obs, action),
        }
        optimizers = {"actor": optax.adam(self.actor_lr), "critic": optax.adam(self.critic_lr)}
        return common.start_each(spec, params, optimizers, "critic")

    def fit(self, state: State, data: Rings) -> State:
        """Returns the initial state with the data's normaliser."""
        return common.fit(state, data) if self.normalize else state

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of transitions."""
        return windows(data, key, self.batch_size, 1, self.goals)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after a step of the critics, then of the actor, then of the target."""
        return self.learn(state, batch, self.draw(state.spec, batch, key))

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: the noise of the policy at the next states, and at the states."""
        key_next, key_here = jax.random.split(key)
        shape = (len(batch.obs), spec.action)
        return {"next_noise": jax.random.normal(key_next, shape), "noise": jax.random.normal(key_here, shape)}

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        batch = common.normalized(state, batch)
        loss = lambda critic: self.critic_loss(critic, state, batch, draws)  # noqa: E731
        after, metrics = common.step(state, "critic", loss, optax.adam(self.critic_lr))
        loss = lambda actor: self.actor_loss(actor, after, batch, draws)  # noqa: E731
        improved, more = common.step(after, "actor", loss, optax.adam(self.actor_lr))
        return common.counted(common.follow(improved, self.tau, "critic")), {**metrics, **more}

    def sampled(self, spec: Spec, actor: PyTree, obs: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns clipped samples of the policy [B, A]."""
        mean, log_std = apply(self.actor(spec), actor, obs)
        return jnp.clip(mean + jnp.exp(log_std) * noise, -1, 1)

    def td_target(self, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns y [B], the reward and what the lower target critic says of the policy's next action."""
        action = self.sampled(state.spec, state.params["actor"], batch.next_obs, draws["next_noise"])
        next_value = self.q(state.target["critic"], batch.next_obs, action)
        return losses.td_target(batch.rewards, batch.steps, batch.terminated, next_value, self.discount)

    def critic_loss(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the TD loss, summed over the critics (Eq. 4)."""
        error = apply(self.critic(), critic, batch.obs, batch.actions[:, 0]) - self.td_target(state, batch, draws)[None]
        loss = losses.masked_mean(jnp.square(error).sum(axis=0), batch.valid[:, 0])
        return loss, {"critic/loss": loss}

    def advantage_weight(self, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns min(exp((Q(s, a) - Q(s, a_pi)) / temperature), max_weight), [B], without gradient."""
        own = self.sampled(state.spec, state.params["actor"], batch.obs, draws["noise"])
        critic = state.params["critic"]
        advantage = self.q(critic, batch.obs, batch.actions[:, 0]) - self.q(critic, batch.obs, own)
        return jax.lax.stop_gradient(jnp.minimum(jnp.exp(advantage / self.temperature), self.max_weight))

    def actor_loss(self, actor: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the weighted imitation's loss (Eq. 13)."""
        mean, log_std = apply(self.actor(state.spec), actor, batch.obs)
        density = losses.gaussian_log_density(batch.actions[:, 0], mean, log_std)
        weight = self.advantage_weight(state, batch, draws)
        loss = -losses.masked_mean(weight * density, batch.valid[:, 0])
        return loss, {"actor/loss": loss, "actor/weight": weight.mean()}

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A]: samples of the policy, clipped; its mean in evaluation (`greedy`)."""
        assert state.normalizer is not None
        noise = jax.random.normal(key, (len(obs), state.spec.action)) * (0.0 if greedy else 1.0)
        return self.sampled(state.spec, state.params["actor"], state.normalizer(obs), noise)[:, None]
