"""O-DICE: distribution correction with orthogonal gradients, which learns a value of states and imitates by weight.

Paper: Mao, Xu, Zhang, Zhan, "ODICE: Revealing the Mystery of Distribution Correction Estimation via Orthogonal-gradient
Update", arXiv 2402.00348.

The dual of return maximisation near the data is a loss of a state value V alone. Its Bellman residual has a forward
gradient, through V(s), and a backward one, through V(s'), which often quarrel. O-DICE takes from the backward gradient
what is orthogonal to the forward one. A Gaussian policy then imitates actions with positive residuals. No action is
ever asked about that the data do not hold.

As published: the projection is over all parameters of both values together, the policy's weight is max(residual, 0),
and its weight decay is added to the gradient. Rewards are to be scaled as the paper's, for `trade` depends on them.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import common
from jaxrl.agents.common import State
from jaxrl.networks import Critic, Gaussian, Norm, apply
from jaxrl.ops import losses
from jaxrl.replay.hindsight import Goals
from jaxrl.replay.ring import Rings, windows
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree


@pytree
class ODICE:
    """Dual reinforcement learning by a state value, its two gradients made orthogonal."""

    chunk: ClassVar[int] = 1

    actor_hidden: tuple[int, ...] = (1024, 1024)  # widths of the policy
    value_hidden: tuple[int, ...] = (256, 256)  # widths of each value
    value_norm: Norm = "before"  # layer norm in the values; none on the antmazes
    values: int = 2  # number of values, of which the lowest counts; one on the harder antmazes
    batch_size: int = 256  # transitions per update
    actor_lr: Scalar = 2e-4  # learning rate of Adam
    value_lr: Scalar = 2e-4  # learning rate of Adam
    weight_decay: Scalar = 1e-4  # of the policy, as part of its gradient
    discount: Scalar = 0.99  # gamma, per environment step
    tau: Scalar = 0.005  # polyak rate of the target value
    gradient: Literal["orthogonal", "semi", "true"] = "orthogonal"  # which gradient the residual has
    trade: Scalar = 0.6  # lambda: residuals against the mean value; to be tuned per task
    eta: Scalar = 1.0  # weight of the backward gradient; to be tuned per task
    divergence: Literal["chi_square", "reverse_kl"] = "chi_square"  # between the policy's visits and the data's
    max_weight: Scalar = 100.0  # bound of the policy's weights
    goals: Goals = Goals()  # how goals are drawn where the task has some

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        counts = ("actor_hidden", "value_hidden", "values", "batch_size")
        common.check_range(self, **dict.fromkeys(counts, (1, None)))
        rates = ("actor_lr", "value_lr", "weight_decay", "eta", "max_weight")
        common.check_range(self, **dict.fromkeys(rates, (0, None)))
        common.check_range(self, **dict.fromkeys(("discount", "tau", "trade"), (0, 1)))
        self.goals.check()

    def actor(self, spec: Spec) -> Gaussian:
        """Returns pi(a | s)."""
        return Gaussian(spec.action, self.actor_hidden, "none", "relu", unit_width=False, initial="torch")

    def value(self) -> Critic:
        """Returns the values V_k(s)."""
        return Critic(self.values, self.value_hidden, self.value_norm, "relu", "torch", 1e-5)

    def optimizers(self) -> dict[str, optax.GradientTransformation]:
        """Returns each network's optimiser."""
        decayed = optax.chain(optax.add_decayed_weights(self.weight_decay), optax.adam(self.actor_lr))
        return {"value": optax.adam(self.value_lr), "actor": decayed}

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_actor, key_value = jax.random.split(key)
        obs = jnp.zeros(spec.observation)
        params = {"actor": self.actor(spec).init(key_actor, obs), "value": self.value().init(key_value, obs)}
        return common.start_each(spec, params, self.optimizers(), "value")

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of transitions."""
        return windows(data, key, self.batch_size, 1, self.goals)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after a step of the value, of its target, and of the policy; nothing is left to chance."""
        return self.learn(state, batch)

    def learn(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """Returns the state after the update."""
        optimizers, residual = self.optimizers(), self.residual(state.params["value"], state, batch)
        gradient, metrics = self.value_gradient(state, batch)
        updates, opt = optimizers["value"].update(gradient, state.opt["value"], state.params["value"])
        params = state.params | {"value": optax.apply_updates(state.params["value"], updates)}
        state = dataclasses.replace(state, params=params, opt=state.opt | {"value": opt})
        state = common.follow(state, self.tau, "value")
        loss = lambda actor: self.actor_loss(actor, state, batch, residual)  # noqa: E731
        state, more = common.step(state, "actor", loss, optimizers["actor"])
        return common.counted(state), {**metrics, **more}

    # The value

    def conjugate(self, y: jax.Array) -> jax.Array:
        """Returns f*(y), for chi-square from omega(y) = max(y / 2 + 1, 0), which is its derivative."""
        if self.divergence == "reverse_kl":
            return jnp.exp(y - 1)
        omega = jnp.maximum(y / 2 + 1, 0)
        return y * omega - jnp.square(omega - 1)

    def bellman(self, value: jax.Array, next_value: jax.Array, batch: Batch) -> jax.Array:
        """Returns r + gamma V(s') - V(s), of shape [K, B]."""
        bootstrap = jnp.where(batch.terminated[None], 0.0, self.discount * next_value)
        return batch.rewards[:, :1].T + bootstrap - value

    def residual(self, params: PyTree, state: State, batch: Batch) -> jax.Array:
        """Returns the forward residual of each value [K, B], the next value the target's; of the true gradient its own.

        The policy is weighted by it.
        """
        slow = params if self.gradient == "true" else state.target["value"]
        next_value = apply(self.value(), slow, batch.next_obs)
        next_value = next_value if self.gradient == "true" else next_value.min(axis=0, keepdims=True)
        return self.bellman(apply(self.value(), params, batch.obs), next_value, batch)

    def backward_residual(self, params: PyTree, state: State, batch: Batch) -> jax.Array:
        """Returns the residual [K, B] in which the next value is each value's own, and the value the target's."""
        value = apply(self.value(), state.target["value"], batch.obs).min(axis=0, keepdims=True)
        return self.bellman(value, apply(self.value(), params, batch.next_obs), batch)

    def value_gradient(self, state: State, batch: Batch) -> tuple[PyTree, Metrics]:
        """Returns the gradient that the values descend, and metrics: of semi and true gradients simply the loss's.

        The orthogonal one is g_0 + g_f + (g_b - kappa g_f) with kappa = <g_f, g_b> / <g_f, g_f>, over all parameters:
        g_0 of the mean value, g_f and g_b of the forward and backward residuals (section 3.2).
        """
        happened = batch.valid[:, :1].T

        def mean(x: jax.Array) -> jax.Array:
            return jnp.mean(x * happened)

        def level(params: PyTree) -> jax.Array:
            return (1 - self.trade) * mean(apply(self.value(), params, batch.obs))

        def forward(params: PyTree) -> jax.Array:
            return self.trade * mean(self.conjugate(self.residual(params, state, batch)))

        def backward(params: PyTree) -> jax.Array:
            return self.trade * self.eta * mean(self.conjugate(self.backward_residual(params, state, batch)))

        params = state.params["value"]
        low, g_0 = jax.value_and_grad(level)(params)
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
        """Returns the weight of imitation: max(y, 0), of the reverse divergence exp(y - 1), at most `max_weight`."""
        weight = jnp.exp(residual - 1) if self.divergence == "reverse_kl" else jnp.maximum(residual, 0)
        return jnp.minimum(weight, self.max_weight)

    def actor_loss(self, actor: PyTree, state: State, batch: Batch, residual: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns the weighted imitation's loss, the mean over values and batch."""
        mean, log_std = apply(self.actor(state.spec), actor, batch.obs)
        density = losses.gaussian_log_density(batch.actions[:, 0], mean, log_std)
        weight = jax.lax.stop_gradient(self.weight(residual))
        loss = -jnp.mean(weight * (density * batch.valid[:, 0])[None])
        return loss, {"actor/loss": loss, "actor/weight": weight.mean()}

    # Acting

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A]: samples of the policy, clipped; its mean in evaluation (`greedy`)."""
        mean, log_std = apply(self.actor(state.spec), state.params["actor"], obs)
        noise = 0.0 if greedy else jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        return jnp.clip(mean + noise, -1, 1)[:, None]
