"""CFPI, one step: a behaviour and its value are learned, and every action is improved in closed form when it is taken.

Paper: Li, Zhang, Yin, Bai, Wang, Wang, "Offline Reinforcement Learning with Closed-Form Policy Improvement Operators",
arXiv 2211.15956; the operators are in `jaxrl.ops.closed_form`.

The behaviour is a mixture of Gaussians before tanh, by maximum likelihood. Two quantile critics (IQN, Dabney et al.,
arXiv 1806.06923) learn the behaviour's own value from the action that the data take next. No policy is trained.

Deliberate differences from the official code:
- Behaviour and critics learn side by side, an update of each at a time, and the last critics are used; there they are
  trained apart, and the critics' checkpoint is chosen per dataset.
- Actions are clipped to 0.999 before atanh. Outside evaluation there is noise on actions.
- The iterative version, in which the operator also chooses the critics' next actions, is left out.

Many actions at the bounds of the box make narrow components there, against whose density all others are too thin to
move in: a single Gaussian (variant `single`) serves such data better than the published mixture (`mixture`).
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import common
from jaxrl.agents.common import Draws, State
from jaxrl.errors import UserError
from jaxrl.networks import MLP, QuantileCritic, apply, repeat_for
from jaxrl.ops import closed_form, losses
from jaxrl.ops.closed_form import ClosedForm, Mixture
from jaxrl.replay.hindsight import Goals
from jaxrl.replay.ring import Rings, windows
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree


@pytree
class CFPI:
    """Closed-form policy improvement of a behaviour by its own value."""

    chunk: ClassVar[int] = 1

    components: int = 4  # M: Gaussians of the behaviour
    actor_hidden: tuple[int, ...] = (256, 256, 256)  # widths of the behaviour
    critic_hidden: tuple[int, ...] = (256, 256)  # widths of each critic, before it sees the level
    batch_size: int = 256  # transitions per update
    actor_lr: Scalar = 1e-4  # learning rate of Adam
    critic_lr: Scalar = 3e-4  # learning rate of Adam
    discount: Scalar = 0.99  # gamma, per environment step
    tau: Scalar = 0.005  # polyak rate of the target critics
    train_quantiles: int = 8  # levels per transition in the loss, random
    quantiles: int = 32  # levels of which a value is the mean
    pessimism: Scalar = 1.0  # beta_LB: standard deviations between the critics' mean and the value
    operator: ClosedForm = ClosedForm()  # how actions are improved
    exploration: Scalar = 0.1  # standard deviation of the noise on actions, but in evaluation
    normalize: bool = True  # whether observations are normalised by the data's mean and spread
    goals: Goals = Goals()  # how goals are drawn where the task has some

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        counts = ("components", "actor_hidden", "critic_hidden", "batch_size", "train_quantiles", "quantiles")
        common.check_range(self, **dict.fromkeys(counts, (1, None)), discount=(0, 1), tau=(0, 1))
        common.check_range(self, **dict.fromkeys(("actor_lr", "critic_lr", "pessimism", "exploration"), (0, None)))
        form = self.operator
        common.check_range(form, draws=(1, None), delta=(0, None), delta_high=(form.delta, None))
        common.check_range(form, stretch=(0, None), threshold=(0, 1))
        self.goals.check()

    def actor(self, spec: Spec) -> MLP:
        """Returns the network of the behaviour's weights, means and widths."""
        return MLP((*self.actor_hidden, self.components * (1 + 2 * spec.action)), "none", "relu", 1.0, "torch")

    def critic(self) -> QuantileCritic:
        """Returns the two critics Z_k(s, a, level)."""
        return QuantileCritic(2, self.critic_hidden)

    def behaviour(self, actor: PyTree, obs: jax.Array, spec: Spec) -> Mixture:
        """Returns the behaviour's density, which does not depend on the goal."""
        output = apply(self.actor(spec), actor, common.without_goal(obs, spec))
        logits, rest = output[:, : self.components], output[:, self.components :]
        mean, log_std = jnp.split(rest.reshape(len(obs), self.components, -1), 2, axis=-1)
        return Mixture(jax.nn.log_softmax(logits), mean, jnp.exp(jnp.clip(log_std, -5, 2)))

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_actor, key_critic = jax.random.split(key)
        obs, action = jnp.zeros(spec.observation), jnp.zeros(spec.action)
        params = {
            "actor": self.actor(spec).init(key_actor, common.without_goal(obs, spec)),
            "critic": self.critic().init(key_critic, obs, action, jnp.zeros(1)),
        }
        optimizers = {"actor": optax.adam(self.actor_lr), "critic": optax.adam(self.critic_lr)}
        return common.start_each(spec, params, optimizers, "critic")

    def fit(self, state: State, data: Rings) -> State:
        """Returns the initial state with the data's normaliser, where observations are to be normalised."""
        return common.fit(state, data) if self.normalize else state

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of transitions, with the actions that follow them."""
        return windows(data, key, self.batch_size, 1, self.goals)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after a step of the behaviour and one of the critics."""
        return self.learn(state, batch, self.draw(state.spec, batch, key))

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update, which become the levels here and at the next state."""
        here, there = jax.random.uniform(key, (2, len(batch.obs), self.train_quantiles))
        return {"levels": here, "target_levels": there}

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        batch = common.normalized(state, batch)
        imitate = lambda actor: self.actor_loss(actor, state, batch)  # noqa: E731
        evaluate = lambda critic: self.critic_loss(critic, state, batch, draws)  # noqa: E731
        state, metrics = common.step(state, "actor", imitate, optax.adam(self.actor_lr))
        state, more = common.step(state, "critic", evaluate, optax.adam(self.critic_lr))
        return common.counted(common.follow(state, self.tau, "critic")), {**metrics, **more}

    def actor_loss(self, actor: PyTree, state: State, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Returns -log p(a | s)."""
        density = self.behaviour(actor, batch.obs, state.spec).log_density(batch.actions[:, 0])
        loss = -losses.masked_mean(density, batch.valid[:, 0])
        return loss, {"actor/bc_loss": loss}

    def critic_loss(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the quantile loss of both critics, each against its own slow copy at the action that the data take.

        A transition after which the data take no action counts only where it ended the task.
        """
        if batch.next_action is None or batch.followed is None:
            raise UserError("CFPI: a batch needs next_action and followed, the action that the data take next")
        level, _ = levels(draws["levels"])
        next_level, share = levels(draws["target_levels"])
        next_z = apply(self.critic(), state.target["critic"], batch.next_obs, batch.next_action, next_level)
        reward, factor = losses.chunk_return(batch.rewards, batch.steps, self.discount)
        target = reward[None, :, None] + (factor * (1 - batch.terminated))[None, :, None] * next_z
        z = apply(self.critic(), critic, batch.obs, batch.actions[:, 0], level)
        loss = jax.vmap(losses.quantile_huber, (0, 0, None, None))(z, target, level, share)
        weight = batch.valid[:, 0] * jnp.maximum(batch.followed, batch.terminated)
        loss = losses.masked_mean(loss.sum(axis=0), weight)
        return loss, {"critic/loss": loss, "critic/value": losses.masked_mean(z.mean(axis=(0, 2)), weight)}

    def heads(self, critic: PyTree, obs: jax.Array, actions: jax.Array) -> jax.Array:
        """Returns both critics' values [2, B, N] of actions [B, N, A] at normalised observations [B, O]."""
        middles = (jnp.arange(self.quantiles) + 0.5) / self.quantiles
        level = jnp.broadcast_to(middles, (*actions.shape[:-1], self.quantiles))
        return apply(self.critic(), critic, repeat_for(actions, obs), actions, level).mean(axis=-1)

    def choose(self, state: State, obs: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the improved actions [B, A]; the key chooses how far to go, where that is random."""
        assert state.normalizer is not None
        obs = state.normalizer(obs)
        value = lambda actions: closed_form.lower_bound(  # noqa: E731
            self.heads(state.params["critic"], obs, actions), self.pessimism
        )
        return self.operator.improve(key, self.behaviour(state.params["actor"], obs, state.spec), value)

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A], with the noise of exploration unless `greedy`."""
        key_delta, key_noise = jax.random.split(key)
        action = self.choose(state, obs, key_delta)
        if not greedy:
            action = jnp.clip(action + self.exploration * jax.random.normal(key_noise, action.shape), -1, 1)
        return action[:, None]


def levels(uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ascending levels [B, N] in the middles of random shares of [0, 1], and these shares."""
    share = (uniform + 0.1) / (uniform + 0.1).sum(axis=-1, keepdims=True)
    return jnp.cumsum(share, axis=-1) - share / 2, share
