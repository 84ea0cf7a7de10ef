"""A2PR: adaptive advantage-guided policy regularisation, TD3 held only where there is something good to hold to.

Paper: Liu, Li, Lan, Gao, Pan, Xu, "Adaptive Advantage-Guided Policy Regularization for Offline Reinforcement Learning",
arXiv 2405.19909.

A variational autoencoder G clones the data's actions of positive advantage. The actor is pulled to G's action or to the
data's, whichever the critic values more, and only where one of the two has an advantage; elsewhere it is free.

Where the released code and the paper's equations differ, the released code is followed, for it made the published
numbers: the value is regressed by plain least squares to the lower of two targets, the gate is 0 or `mask` and never
twice that, and the gradient passes through G's action, which depends on pi(s) (`detach_target` stops it, as the paper
reads).
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import common, td3
from jaxrl.agents.common import Draws, State
from jaxrl.networks import Activation, Deterministic, Encoder, Init, Norm, Value, apply
from jaxrl.ops import losses
from jaxrl.replay.hindsight import Goals
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree


@pytree
class A2PR:
    """TD3 regularised towards actions of positive advantage, of the data or of an autoencoder."""

    chunk: ClassVar[int] = 1

    actor_hidden: tuple[int, ...] = (256, 256, 256)  # widths of the actor
    critic_hidden: tuple[int, ...] = (256, 256, 256, 256)  # widths of each critic and of the value
    vae_hidden: tuple[int, ...] = (750, 750)  # widths of the autoencoder's halves
    activation: Activation = "relu"  # of all networks but the autoencoder
    initial: Init = "torch"  # how layers begin
    actor_norm: Norm = "none"  # layer norm in the actor
    critic_norm: Norm = "none"  # layer norm in the critics and the value
    batch_size: int = 256  # transitions per update
    actor_lr: Scalar = 3e-4  # learning rate of Adam
    critic_lr: Scalar = 3e-4  # learning rate of Adam
    value_lr: Scalar = 3e-4  # learning rate of Adam
    vae_lr: Scalar = 1e-3  # learning rate of Adam
    discount: Scalar = 0.99  # gamma, per environment step
    tau: Scalar = 0.005  # polyak rate of the targets
    delay: int = 2  # critic updates per actor update
    target_noise: Scalar = 0.2  # standard deviation of the noise on target actions
    noise_clip: Scalar = 0.5  # bound of that noise, and of exploration's
    alpha: Scalar = 2.5  # weight of the critic against the regularisation
    mask: Scalar = 0.5  # weight of the regularisation where there is an advantage
    vae_weight: Scalar = 1.0  # weight of the autoencoder's reconstruction
    detach_target: bool = False  # whether the gradient stops at the autoencoder's action
    exploration: Scalar = 0.1  # standard deviation of the noise on actions, but in evaluation
    normalize: bool = True  # whether observations are normalised by the data's mean and spread
    goals: Goals = Goals()  # how goals are drawn where the task has some

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        td3.check(self)
        common.check_range(self, vae_hidden=(1, None))
        common.check_range(self, **dict.fromkeys(("alpha", "mask", "vae_weight", "value_lr", "vae_lr"), (0, None)))

    def value(self) -> Value:
        """Returns V(s)."""
        return Value(self.critic_hidden, self.critic_norm, self.activation, self.initial)

    def encoder(self, spec: Spec) -> Encoder:
        """Returns q(z | s, a)."""
        return Encoder(2 * spec.action, self.vae_hidden)

    def decoder(self, spec: Spec) -> Deterministic:
        """Returns the action of (s, z)."""
        return Deterministic(spec.action, self.vae_hidden)

    def v(self, state: State, obs: jax.Array) -> jax.Array:
        """Returns the state's value, [B]."""
        return apply(self.value(), state.params["value"], obs)

    def q1(self, state: State, obs: jax.Array, action: jax.Array) -> jax.Array:
        """Returns the first critic's value, [B]."""
        return td3.first_q(self, state.params["critic"], obs, action)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key, key_value, key_encoder, key_decoder = jax.random.split(key, 4)
        obs, action, latent = jnp.zeros(spec.observation), jnp.zeros(spec.action), jnp.zeros(2 * spec.action)
        vae = {
            "encoder": self.encoder(spec).init(key_encoder, obs, action),
            "decoder": self.decoder(spec).init(key_decoder, obs, latent),
        }
        value = self.value().init(key_value, obs)
        return td3.init(self, key, spec, value=(value, self.value_lr), vae=(vae, self.vae_lr))

    def fit(self, state: State, data: Rings) -> State:
        """Returns the initial state with the data's normaliser."""
        return td3.fit(self, state, data)

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of transitions."""
        return td3.sample(self, data, key)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after a step of critic, value and autoencoder and, every `delay`-th time, of the actor."""
        return self.learn(state, batch, self.draw(state.spec, batch, key))

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: noise of the target actions and of the autoencoder's latents."""
        key, key_vae, key_actor = jax.random.split(key, 3)
        shape = (len(batch.obs), 2 * spec.action)
        noise = {"vae_noise": jax.random.normal(key_vae, shape), "actor_noise": jax.random.normal(key_actor, shape)}
        return td3.draw(spec, batch, key) | noise

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        batch = common.normalized(state, batch)
        next_action = td3.target_action(self, state, batch, draws)
        y = td3.td_target(self, state.target["critic"], batch, next_action)
        v = self.v(state, batch.obs)  # is not looked up again after the value's step
        loss = lambda critic: self.critic_loss(critic, batch, y)  # noqa: E731
        state, metrics = common.step(state, "critic", loss, optax.adam(self.critic_lr))
        loss = lambda value: self.value_loss(value, state, batch, y, next_action)  # noqa: E731
        state, more = common.step(state, "value", loss, optax.adam(self.value_lr))
        metrics = {**metrics, **more}
        loss = lambda vae: self.vae_loss(vae, state, batch, v, draws)  # noqa: E731
        state, more = common.step(state, "vae", loss, optax.adam(self.vae_lr))
        metrics = {**metrics, **more}

        def improve(state: State) -> tuple[State, Metrics]:
            loss = lambda actor: self.actor_loss(actor, state, batch, v, draws)  # noqa: E731
            state, metrics = common.step(state, "actor", loss, optax.adam(self.actor_lr))
            return common.follow(state, self.tau, "actor", "critic"), metrics

        state, more = common.every(self.delay, state, improve)
        return common.counted(state), {**metrics, **more}

    def critic_loss(self, critic: PyTree, batch: Batch, y: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns the TD loss of both critics."""
        loss = td3.critic_loss(self, critic, batch, y)
        return loss, {"critic/loss": loss}

    def value_loss(
        self, value: PyTree, state: State, batch: Batch, y: jax.Array, next_action: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Returns (V - min(y, y'))^2, with y' as y from the critics that have just been updated."""
        online = td3.td_target(self, state.params["critic"], batch, next_action)
        error = jnp.square(apply(self.value(), value, batch.obs) - jnp.minimum(online, y))
        loss = losses.masked_mean(error, batch.valid[:, 0])
        return loss, {"value/loss": loss}

    def imitated(self, spec: Spec, vae: PyTree, obs: jax.Array, action: jax.Array, noise: jax.Array):
        """Returns G(s, a) [B, A], and mean and logarithm of the deviation of its latent."""
        mean, log_std = apply(self.encoder(spec), vae["encoder"], obs, action)
        return apply(self.decoder(spec), vae["decoder"], obs, mean + jnp.exp(log_std) * noise), mean, log_std

    def vae_loss(
        self, vae: PyTree, state: State, batch: Batch, v: jax.Array, draws: Draws
    ) -> tuple[jax.Array, Metrics]:
        """Returns the evidence bound's loss: reconstruction where Q_1(s, a) > v, and half the divergence everywhere."""
        action, happened = batch.actions[:, 0], batch.valid[:, 0]
        rebuilt, mean, log_std = self.imitated(state.spec, vae, batch.obs, action, draws["vae_noise"])
        better = happened * (self.q1(state, batch.obs, action) > v)
        reconstruction = self.vae_weight * losses.masked_mean(jnp.square(rebuilt - action).mean(axis=-1), better)
        divergence = -0.5 * (1 + 2 * log_std - jnp.square(mean) - jnp.exp(2 * log_std)).mean(axis=-1)
        divergence = losses.masked_mean(divergence, happened)
        metrics = {"vae/reconstruction": reconstruction, "vae/divergence": divergence, "vae/share": better.mean()}
        return reconstruction + 0.5 * divergence, metrics

    def held_to(self, state: State, batch: Batch, action: jax.Array, v: jax.Array, draws: Draws):
        """Returns the action [B, A] that pi(s) is pulled to, and the weight [B] of the pull."""
        imitated, *_ = self.imitated(state.spec, state.params["vae"], batch.obs, action, draws["actor_noise"])
        imitated = jax.lax.stop_gradient(imitated) if self.detach_target else imitated
        q_data = self.q1(state, batch.obs, batch.actions[:, 0])
        q_imitated = jax.lax.stop_gradient(self.q1(state, batch.obs, imitated))
        goal = jnp.where((q_imitated >= q_data)[:, None], imitated, batch.actions[:, 0])
        return goal, self.mask * ((q_imitated >= v) | (q_data > v))

    def actor_loss(
        self, actor: PyTree, state: State, batch: Batch, v: jax.Array, draws: Draws
    ) -> tuple[jax.Array, Metrics]:
        """Returns -lambda Q_1(s, pi(s)) + the gated squared distance to the better of two actions."""
        action = apply(td3.policy(self, state.spec), actor, batch.obs)
        climb, weight = td3.climb(self.q1(state, batch.obs, action), self.alpha, batch)
        goal, gate = self.held_to(state, batch, action, v, draws)
        pull = losses.masked_mean(jnp.square(action - goal).mean(axis=-1), gate * batch.valid[:, 0])
        metrics = {"actor/q_loss": climb, "actor/bc_loss": pull, "actor/lambda": weight, "actor/gate": gate.mean()}
        return climb + pull, metrics

    def choose(self, state: State, obs: jax.Array) -> jax.Array:
        """Returns the actor's actions [B, A]."""
        return td3.choose(self, state, obs)

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A], with the noise of exploration unless `greedy`."""
        return td3.act(self, state, obs, key, greedy)
