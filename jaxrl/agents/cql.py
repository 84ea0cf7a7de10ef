"""CQL: conservative Q-learning, which penalizes Q-values of out-of-distribution actions.

Papers: Kumar, Zhou, Tucker, Levine, "Conservative Q-Learning for Offline Reinforcement Learning", arXiv 2006.04779;
Nakamoto et al., "Cal-QL: Calibrated Offline RL Pre-Training for Efficient Online Fine-Tuning", arXiv 2303.05479.

A soft actor-critic whose critics also minimize the soft maximum of Q over actions, sampled uniformly and from the
policy here and at the next state, less Q of the data's action: CQL(H), with importance weights (Appendix F).

`calibrated` is Cal-QL: Q-values of the policy's actions are penalized only above the return of the data's episode
(Eq. 3.2), see `jaxrl.replay.returns`. Online, a transition is calibrated once its episode is over.

All losses see the parameters from before the update, as in CORL's code, whose settings for locomotion are the defaults.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import Adam, Critic, Net, SquashedGaussianPolicy, Transitions
from jaxrl.errors import UserError
from jaxrl.networks import repeat_for
from jaxrl.ops import losses
from jaxrl.ranges import Count, Fraction, NonNegative, Positive
from jaxrl.replay.returns import returns_to_go
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, Observation, PyTree, Scalar, Spec, count_of, pytree

RETURN = "return_to_go"  # column that Cal-QL adds to data and replay
_NET = Net((256, 256, 256), "relu", "none", "torch")


@pytree
class CQL:
    """Soft actor-critic with conservative, optionally calibrated critics."""

    chunk: ClassVar[int] = 1

    transitions: Transitions = Transitions()
    actor: SquashedGaussianPolicy = SquashedGaussianPolicy(_NET)  # pi(a | s)
    critic: Critic = Critic(_NET, agg="min")  # Q_1(s, a) and Q_2(s, a)
    actor_adam: Adam = Adam(3e-5)  # of the policy and the entropy's weight
    critic_adam: Adam = Adam()  # of the critics and the conservative term's weight
    conservatism: NonNegative = 10.0  # weight of the conservative term
    samples: Count = 10  # actions of each kind in that term
    soft: Positive = 1.0  # temperature of its soft maximum
    lowest_gap: Scalar = -1e9  # bound of the term from below; -200 on the antmazes
    lagrange: bool = False  # whether the term's weight is learned, so that the term meets `gap`
    gap: Scalar = 5.0  # target value of the term, with `lagrange`
    max_target: bool = False  # whether the target uses the best of several policy actions, not one sample
    calibrated: bool = False  # Cal-QL
    mixing: Fraction = 0.5  # fraction of a batch from the dataset, if there is a replay as well
    normalize: bool = True  # whether observations are normalized by the data's mean and standard deviation

    requires, fit, update = shared.requires_transitions, shared.fit, shared.update

    def optimizers(self) -> dict[str, optax.GradientTransformation]:
        """Returns each network's optimizer."""
        actor, critic = self.actor_adam.transformation(), self.critic_adam.transformation()
        return {"actor": actor, "entropy": actor, "critic": critic} | ({"lagrange": critic} if self.lagrange else {})

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state. Raises UserError for Cal-QL in tasks with goals."""
        if self.calibrated and spec.goal:
            raise UserError("CQL.calibrated = True: goals are drawn in hindsight here, rows have no return to go")
        key_actor, key_critic = jax.random.split(key)
        obs, action = spec.example(), jnp.zeros(spec.action)
        params = {
            "actor": self.actor.init(key_actor, spec.actor(obs), action),
            "entropy": jnp.zeros(()),  # the logarithm of its weight
            "critic": self.critic.init(key_critic, spec.critic(obs), action),
        }
        if self.lagrange:
            params["lagrange"] = jnp.ones(())  # the logarithm of the conservative term's weight
        return learner.create(spec, params, self.optimizers(), "critic", normalized=True)

    def derive_columns(self, data: Rings) -> Rings:
        """Returns the data with return-to-go columns for Cal-QL, if missing."""
        columns = lambda ring: {**ring.extra, RETURN: returns_to_go(ring, self.transitions.discount)}  # noqa: E731
        missing = [self.calibrated and RETURN not in ring.extra for ring in data]
        return tuple(dataclasses.replace(r, extra=columns(r)) if m else r for r, m in zip(data, missing, strict=True))

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of transitions."""
        return self.transitions.sample(data, key, self.mixing)

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: uniform actions, and noise of the policy's."""
        key_uniform, key_here, key_next, key_policy, key_target = jax.random.split(key, 5)
        count, many = len(batch.actions), (len(batch.actions), self.samples, spec.action)
        return {
            "uniform": jax.random.uniform(key_uniform, many, minval=-1),
            "here": jax.random.normal(key_here, many),
            "next": jax.random.normal(key_next, many),
            "policy": jax.random.normal(key_policy, (count, spec.action)),
            "target": jax.random.normal(key_target, many if self.max_target else (count, 1, spec.action)),
        }

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        batch = learner.normalized(state, batch)
        gradient, metrics = jax.grad(self.loss, has_aux=True)(state.params, state, batch, draws)
        for name, optimizer in self.optimizers().items():
            state = learner.step_along(state, name, gradient[name], optimizer)
        return learner.counted(learner.follow(state, self.critic.tau, "critic")), metrics

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the sum of all losses, each of which trains one network, and metrics."""
        obs, seen, happened = state.spec.actor(batch.obs), state.spec.critic(batch.obs), batch.valid[:, 0]

        # the policy maximizes the lower critic plus weighted entropy; the weight targets an entropy of -A
        action, density = self.actor.sample(params["actor"], obs, draws["policy"])
        q = self.critic.value(state.params["critic"], seen, action)
        actor = losses.masked_mean(jnp.exp(state.params["entropy"]) * density - q, happened)
        lack = jax.lax.stop_gradient(losses.masked_mean(density - state.spec.action, happened))

        # the critics: (Q(s, a) - y)^2 and the excess, summed; the weight of the excess rises if it is above `gap`
        y = self.td_target(state, batch, draws)
        error = self.critic.error(params["critic"], seen, batch.actions[:, 0], y).sum(axis=0)
        td, excess = losses.masked_mean(error, happened), self.excess(params["critic"], state, batch, draws)
        weight, gap = jnp.ones(()), 0.0
        if self.lagrange:
            weight, gap = jnp.clip(jnp.exp(params["lagrange"]), 0, 1e6), self.gap
        conservative = excess.sum() - self.critic.heads * gap
        critic = td + self.conservatism * jax.lax.stop_gradient(weight) * conservative
        lagrange = -weight * self.conservatism * jax.lax.stop_gradient(excess - gap).sum()
        metrics = {"actor/loss": actor, "actor/log_density": density.mean(), "critic/loss": td}
        metrics |= {"critic/conservative": conservative, "entropy/weight": jnp.exp(params["entropy"])}
        metrics |= {"lagrange/weight": weight} if self.lagrange else {}
        return actor - params["entropy"] * lack + critic + lagrange, metrics

    def sampled(self, state: State, obs: Observation, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the policy's actions [B, N, A] from this noise, and their log density [B, N]."""
        return self.actor.sample(state.params["actor"], state.spec.actor(repeat_for(noise, obs)), noise)

    def td_target(self, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns y [B], the TD target with the lower target critic's value of the policy's next (or best) action."""
        action, _ = self.sampled(state, batch.next_obs, draws["target"])
        next_obs = state.spec.critic(repeat_for(action, batch.next_obs))
        next_value = self.critic.value(state.target["critic"], next_obs, action).max(axis=-1)
        return self.transitions.target(batch, next_value)

    def soft_maximum(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns the soft maximum of each critic [2, B] over sampled actions, with importance weights."""
        here, here_density = self.sampled(state, batch.obs, draws["here"])
        after, after_density = self.sampled(state, batch.next_obs, draws["next"])
        actions = jax.lax.stop_gradient(jnp.concatenate([draws["uniform"], after, here], axis=1))  # one call for all
        q = self.critic.values(critic, state.spec.critic(repeat_for(actions, batch.obs)), actions)
        flat = jnp.full(here_density.shape, state.spec.action * math.log(0.5))
        density = jax.lax.stop_gradient(jnp.concatenate([flat, after_density, here_density], axis=1))
        if self.calibrated and RETURN in batch.extra:
            floor = jnp.where(jnp.isnan(batch.extra[RETURN]), -jnp.inf, batch.extra[RETURN])
            q = jnp.concatenate([q[..., : self.samples], jnp.maximum(q[..., self.samples :], floor[None, :, None])], -1)
        return self.soft * jax.nn.logsumexp((q - density[None]) / self.soft, axis=-1)

    def excess(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns the mean excess of each critic's soft maximum over its value of the data's action, [2]."""
        data = self.critic.values(critic, state.spec.critic(batch.obs), batch.actions[:, 0])
        excess = jnp.maximum(self.soft_maximum(critic, state, batch, draws) - data, self.lowest_gap)
        return (excess * batch.valid[:, :1].T).mean(axis=1)

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A]: samples of the policy; the squashed mean in evaluation (`greedy`)."""
        assert state.normalizer is not None
        noise = jax.random.normal(key, (count_of(obs), state.spec.action)) * (0.0 if greedy else 1.0)
        action, _ = self.actor.sample(state.params["actor"], state.spec.actor(state.normalizer(obs)), noise)
        return action[:, None]
