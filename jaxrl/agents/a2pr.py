"""A2PR: adaptive advantage-guided policy regularization, TD3 regularized only toward actions with an advantage.

Paper: Liu, Li, Lan, Gao, Pan, Xu, "Adaptive Advantage-Guided Policy Regularization for Offline Reinforcement Learning",
arXiv 2405.19909.

A variational autoencoder G clones the data's actions with positive advantage. The actor is regularized toward G's
action or the data's, whichever has the higher Q-value, and only where one of the two has an advantage.

Where the released code and the paper's equations differ, the released code is followed, since it produced the published
numbers: the value is regressed by least squares to the lower of two targets, the gate is 0 or `mask` and never twice
that, and the gradient passes through G's action, which depends on pi(s) (`detach_target` stops it, as in the paper).
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import Adam, Autoencoder, Critic, DeterministicPolicy, Net, Value, check_heads
from jaxrl.agents.td3 import TD3, climb
from jaxrl.ops import losses
from jaxrl.ranges import NonNegative
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, Observation, PyTree, Requirements, Spec, pytree


@pytree
class A2PR:
    """TD3 regularized toward actions with positive advantage, from the data or an autoencoder."""

    chunk: ClassVar[int] = 1

    td3: TD3 = TD3(
        DeterministicPolicy(Net((256, 256, 256), "relu", "none", "torch")),
        Critic(Net((256, 256, 256, 256), "relu", "none", "torch"), agg="min"),
        normalize=True,
    )
    value: Value = Value(Net((256, 256, 256, 256), "relu", "none", "torch"))  # V(s)
    vae: Autoencoder = Autoencoder()  # G(s, a)
    value_adam: Adam = Adam()
    vae_adam: Adam = Adam(1e-3)
    alpha: NonNegative = 2.5  # weight of the critic against the regularization
    mask: NonNegative = 0.5  # weight of the regularization where there is an advantage
    vae_weight: NonNegative = 1.0  # weight of the autoencoder's reconstruction
    detach_target: bool = False  # whether the gradient stops at the autoencoder's action

    def check(self) -> None:
        """Raises UserError for inconsistent settings."""
        check_heads("A2PR", self.td3.critic, self.value, "td3.critic.head")

    def requires(self) -> Requirements:
        """Returns the requirements on its data."""
        return self.td3.requires()

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key, key_value, *keys_vae = jax.random.split(key, 4)
        obs = spec.example()
        value = self.value.init(key_value, spec.critic(obs))
        vae = self.vae.init(*keys_vae, spec.actor(obs), jnp.zeros(spec.action))
        adams = self.value_adam.transformation(), self.vae_adam.transformation()
        return self.td3.init(key, spec, value=(value, adams[0]), vae=(vae, adams[1]))

    def fit(self, state: State, data: Rings) -> State:
        """Returns the initial state with the data's normalizer."""
        return self.td3.fit(state, data)

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of transitions."""
        return self.td3.sample(data, key)

    update = shared.update

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: noise of the target actions and of the autoencoder's latents."""
        key, key_vae, key_actor = jax.random.split(key, 3)
        shape = (len(batch.actions), 2 * spec.action)
        noise = {"vae_noise": jax.random.normal(key_vae, shape), "actor_noise": jax.random.normal(key_actor, shape)}
        return self.td3.draw(spec, batch, key) | noise

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        batch = learner.normalized(state, batch)
        action = self.td3.target_action(state, batch, draws)
        y = self.td3.td_target(state, state.target["critic"], batch, action)
        v = self.v(state, batch)  # from before the value's step, for all losses
        state, critic = self.td3.learn_critic(state, batch, y, batch.valid[:, 0])
        lower = self.lower_target(state, batch, y, action)
        loss = lambda value: self.value_loss(value, state, batch, lower)  # noqa: E731
        state, value = learner.step(state, "value", loss, self.value_adam.transformation())
        loss = lambda vae: self.vae_loss(vae, state, batch, v, draws)  # noqa: E731
        state, vae = learner.step(state, "vae", loss, self.vae_adam.transformation())
        state, actor = self.td3.learn_actor(state, lambda actor, state: self.actor_loss(actor, state, batch, v, draws))
        return learner.counted(state), {**critic, **value, **vae, **actor}

    def v(self, state: State, batch: Batch) -> jax.Array:
        """Returns the states' values [B]."""
        return self.value.value(state.params["value"], state.spec.critic(batch.obs))

    def lower_target(self, state: State, batch: Batch, y: jax.Array, action: jax.Array) -> jax.Array:
        """Returns the minimum of y [B], the target critics' TD target at the next actions [B, A], and the critics'."""
        return jnp.minimum(self.td3.td_target(state, state.params["critic"], batch, action), y)

    def value_loss(self, value: PyTree, state: State, batch: Batch, y: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns (V - y)^2, or the cross entropy of V's logit."""
        output = self.value.output(value, state.spec.critic(batch.obs))
        loss = losses.masked_mean(losses.regression(output, y, self.value.head), batch.valid[:, 0])
        return loss, {"value/loss": loss}

    def vae_loss(
        self, vae: PyTree, state: State, batch: Batch, v: jax.Array, draws: Draws
    ) -> tuple[jax.Array, Metrics]:
        """Returns the VAE loss: reconstruction where Q_1(s, a) > v, plus half the divergence everywhere."""
        action, happened = batch.actions[:, 0], batch.valid[:, 0]
        rebuilt, mean, log_std = self.vae.rebuild(vae, state.spec.actor(batch.obs), action, draws["vae_noise"])
        better = happened * (self.td3.first_q(state, batch, action) > v)
        reconstruction = self.vae_weight * losses.masked_mean(jnp.square(rebuilt - action).mean(axis=-1), better)
        divergence = -0.5 * (1 + 2 * log_std - jnp.square(mean) - jnp.exp(2 * log_std)).mean(axis=-1)
        divergence = losses.masked_mean(divergence, happened)
        metrics = {"vae/reconstruction": reconstruction, "vae/divergence": divergence, "vae/share": better.mean()}
        return reconstruction + 0.5 * divergence, metrics

    def held_to(
        self, state: State, batch: Batch, action: jax.Array, v: jax.Array, draws: Draws
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the action [B, A] that pi(s) is regularized toward, and the weight [B] of that term."""
        obs, noise = state.spec.actor(batch.obs), draws["actor_noise"]
        imitated, *_ = self.vae.rebuild(state.params["vae"], obs, action, noise)
        imitated = jax.lax.stop_gradient(imitated) if self.detach_target else imitated
        q_data = self.td3.first_q(state, batch, batch.actions[:, 0])
        q_imitated = jax.lax.stop_gradient(self.td3.first_q(state, batch, imitated))
        goal = jnp.where((q_imitated >= q_data)[:, None], imitated, batch.actions[:, 0])
        return goal, self.mask * ((q_imitated >= v) | (q_data > v))

    def actor_loss(
        self, actor: PyTree, state: State, batch: Batch, v: jax.Array, draws: Draws
    ) -> tuple[jax.Array, Metrics]:
        """Returns -lambda Q_1(s, pi(s)) + the gated squared distance to the better of two actions."""
        action = self.td3.actor.action(actor, state.spec.actor(batch.obs))
        climbing, weight = climb(self.td3.first_q(state, batch, action), self.alpha, batch)
        goal, gate = self.held_to(state, batch, action, v, draws)
        pull = losses.masked_mean(jnp.square(action - goal).mean(axis=-1), gate * batch.valid[:, 0])
        metrics = {"actor/q_loss": climbing, "actor/bc_loss": pull, "actor/lambda": weight, "actor/gate": gate.mean()}
        return climbing + pull, metrics

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A], with the noise of exploration unless `greedy`."""
        return self.td3.act(state, obs, key, greedy=greedy)
