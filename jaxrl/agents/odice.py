"""O-DICE: distribution correction with orthogonal gradients: learns a state value and a weighted imitation policy.

Paper: Mao, Xu, Zhang, Zhan, "ODICE: Revealing the Mystery of Distribution Correction Estimation via Orthogonal-gradient
Update", arXiv 2402.00348.

The dual of return maximization near the data is a loss of a state value V only. Its Bellman residual has a forward
gradient, through V(s), and a backward one, through V(s'), which often conflict. O-DICE uses only the component of the
backward gradient that is orthogonal to the forward one. A Gaussian policy then imitates actions with positive
residuals. Values of out-of-distribution actions are never needed.

As published: the projection is over all parameters of both values together, the policy's weight is max(residual, 0),
and its weight decay is added to the gradient. Scale rewards as in the paper, since `trade` depends on them.
"""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import State
from jaxrl.agents.parts import Adam, Critic, GaussianPolicy, Net, Transitions
from jaxrl.ranges import Fraction, NonNegative
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, Observation, PyTree, Scalar, Spec, pytree


@pytree
class ODICE:
    """Dual reinforcement learning of a state value, with orthogonalized gradients."""

    chunk: ClassVar[int] = 1

    transitions: Transitions = Transitions()
    actor: GaussianPolicy = GaussianPolicy(Net((1024, 1024), "relu", "none", "torch"), std="learned")  # pi(a | s)
    # V_k(s); without layer norm on the antmazes, and with one head on the harder ones
    value: Critic = Critic(Net((256, 256), "relu", "before", "torch"), agg="min", epsilon="1e-5")
    actor_adam: Adam = Adam(2e-4)
    value_adam: Adam = Adam(2e-4)
    weight_decay: NonNegative = 1e-4  # of the policy, as part of its gradient
    gradient: Literal["orthogonal", "semi", "true"] = "orthogonal"  # type of the residual's gradient
    trade: Fraction = 0.6  # lambda: weight of residuals relative to the mean value; to be tuned per task
    eta: NonNegative = 1.0  # weight of the backward gradient; to be tuned per task
    divergence: Literal["chi_square", "reverse_kl"] = "chi_square"  # between visitations of policy and data
    max_weight: NonNegative = 100.0  # bound of the policy's weights

    requires, sample = shared.requires_transitions, shared.sample_transitions

    def optimizers(self) -> dict[str, optax.GradientTransformation]:
        """Returns each network's optimizer."""
        decay = optax.add_decayed_weights(self.weight_decay)
        actor = optax.chain(decay, self.actor_adam.transformation())
        return {"value": self.value_adam.transformation(), "actor": actor}

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_actor, key_value = jax.random.split(key)
        obs = spec.example()
        params = {
            "actor": self.actor.init(key_actor, spec.actor(obs), jnp.zeros(spec.action)),
            "value": self.value.init(key_value, spec.critic(obs)),
        }
        return learner.create(spec, params, self.optimizers(), "value")

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after a step of the values, of their targets, and of the policy; deterministic."""
        return self.learn(state, batch)

    def learn(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """Returns the state after the update."""
        optimizers, residual = self.optimizers(), self.residual(state.params["value"], state, batch)
        gradient, metrics = self.value_gradient(state, batch)
        state = learner.step_along(state, "value", gradient, optimizers["value"])
        state = learner.follow(state, self.value.tau, "value")
        loss = lambda actor: self.actor_loss(actor, state, batch, residual)  # noqa: E731
        state, more = learner.step(state, "actor", loss, optimizers["actor"])
        return learner.counted(state), {**metrics, **more}

    # The values

    def conjugate(self, y: jax.Array) -> jax.Array:
        """Returns f*(y); for chi-square from its derivative omega(y) = max(y / 2 + 1, 0)."""
        if self.divergence == "reverse_kl":
            return jnp.exp(y - 1)
        omega = jnp.maximum(y / 2 + 1, 0)
        return y * omega - jnp.square(omega - 1)

    def bellman(self, value: jax.Array, next_value: jax.Array, batch: Batch) -> jax.Array:
        """Returns r + gamma V(s') - V(s), of shape [K, B]."""
        bootstrap = jnp.where(batch.terminated[None], 0.0, self.transitions.discount * next_value)
        return batch.rewards[:, :1].T + bootstrap - value

    def residual(self, params: PyTree, state: State, batch: Batch) -> jax.Array:
        """Returns the forward residual of each value [K, B], with the target's next value ("true": each value's own).

        It also weights the policy's imitation.
        """
        next_obs = state.spec.critic(batch.next_obs)
        if self.gradient == "true":
            next_value = self.value.values(params, next_obs)
        else:
            next_value = self.value.value(state.target["value"], next_obs)[None]
        return self.bellman(self.value.values(params, state.spec.critic(batch.obs)), next_value, batch)

    def backward_residual(self, params: PyTree, state: State, batch: Batch) -> jax.Array:
        """Returns the residual [K, B] with each value's own next value, and the target's current value."""
        value = self.value.value(state.target["value"], state.spec.critic(batch.obs))[None]
        return self.bellman(value, self.value.values(params, state.spec.critic(batch.next_obs)), batch)

    def level(self, params: PyTree, state: State, batch: Batch) -> jax.Array:
        """Returns (1 - lambda) times the mean value."""
        values = self.value.values(params, state.spec.critic(batch.obs))
        return (1 - self.trade) * jnp.mean(values * batch.valid[:, :1].T)

    def penalty(self, residual: jax.Array, batch: Batch, weight: Scalar) -> jax.Array:
        """Returns the weighted mean of f*(residual)."""
        return weight * jnp.mean(self.conjugate(residual) * batch.valid[:, :1].T)

    def value_gradient(self, state: State, batch: Batch) -> tuple[PyTree, Metrics]:
        """Returns the gradient for the values, and metrics; for semi and true gradients it is the loss's gradient.

        The orthogonal one is g_0 + g_f + (g_b - kappa g_f) with kappa = <g_f, g_b> / <g_f, g_f>, over all parameters:
        g_0 of the mean value, g_f and g_b of the forward and backward residuals (section 3.2).
        """
        params, back = state.params["value"], self.trade * self.eta
        forward = lambda params: self.penalty(self.residual(params, state, batch), batch, self.trade)  # noqa: E731
        backward = lambda params: self.penalty(self.backward_residual(params, state, batch), batch, back)  # noqa: E731
        low, g_0 = jax.value_and_grad(self.level)(params, state, batch)
        loss, g_f = jax.value_and_grad(forward)(params)
        metrics = {"value/level": low, "value/loss": loss}
        if self.gradient != "orthogonal":
            return jax.tree.map(jnp.add, g_0, g_f), metrics
        g_b = jax.grad(backward)(params)
        kappa = optax.tree.vdot(g_f, g_b) / jnp.maximum(optax.tree.vdot(g_f, g_f), 1e-10)
        orthogonal = jax.tree.map(lambda b, f: b - kappa * f, g_b, g_f)
        return jax.tree.map(lambda *parts: sum(parts), g_0, g_f, orthogonal), metrics | {"value/kappa": kappa}

    # The policy

    def weight(self, residual: jax.Array) -> jax.Array:
        """Returns the imitation weight: max(y, 0), or exp(y - 1) for the reverse KL, at most `max_weight`."""
        weight = jnp.exp(residual - 1) if self.divergence == "reverse_kl" else jnp.maximum(residual, 0)
        return jnp.minimum(weight, self.max_weight)

    def actor_loss(self, actor: PyTree, state: State, batch: Batch, residual: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns the loss of the weighted imitation, the mean over values and batch."""
        density = self.actor.log_density(actor, state.spec.actor(batch.obs), batch.actions[:, 0])
        weight = jax.lax.stop_gradient(self.weight(residual))
        loss = -jnp.mean(weight * (density * batch.valid[:, 0])[None])
        return loss, {"actor/loss": loss, "actor/weight": weight.mean()}

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A]: samples of the policy, clipped; its mean in evaluation (`greedy`)."""
        mean, log_std = self.actor.moments(state.params["actor"], state.spec.actor(obs))
        noise = 0.0 if greedy else jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        return jnp.clip(mean + noise, -1, 1)[:, None]
