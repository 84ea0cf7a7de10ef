"""DQC: decoupled Q-chunking, a critic over long chunks for a policy over short ones.

Paper: Li, Park, Levine, "Decoupled Q-Chunking", arXiv 2512.10926. A chunk critic over h actions passes rewards far in
one backup. It is distilled, with optimism `kappa_d` about how the chunk will go on, into a critic over its first h_a
actions, and that, with optimism `kappa_b` about the action, into a state value, which is what the chunk critic
bootstraps from. The policy is the best of N proposals of a behaviour flow over h_a actions.

All values are probabilities of success, discounted; the networks say their logits, and rewards are 0 or 1. Special
cases of the same code, `jaxrl train dqc --variant NAME`: without the chunk critic and with h = h_a, `qc`
is Q-chunking (QC); with h > h_a it is `qc-ns`; with h_a = 1 `ns` (n-step returns); with h = h_a = 1 `os` (one step).

Deliberate differences from the official code:
- It works on single tasks as well (`jaxrl train dqc ENV --reward-shift 1` where rewards are -1 before success).
- What a window's cut leaves undone has no weight, step by step. The official code looks up this mask at an index of
  flat actions instead of steps (`valid_index="flat"`); on the starts that it samples both are 1.
- Targets stay 1e-6 away from 0 and 1 before their logit is taken, where the official value loss can become infinite.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import common
from jaxrl.agents.common import CutWindows, Draws, State
from jaxrl.networks import Activation, Critic, Norm, TimeFeatures, Value, Velocity, apply, repeat_for
from jaxrl.ops import flow, guidance, losses
from jaxrl.replay.hindsight import Goals
from jaxrl.replay.ring import Rings, windows
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree

Tilt = Literal["expectile", "quantile"]


@pytree
class DQC:
    """Decoupled Q-chunking: long critic, short policy."""

    chunk: int = 5  # h_a: actions per decision, executed open loop
    backup: int = 25  # h: actions that the chunk critic sees, steps of the return
    chunk_critic: bool = True  # whether there is a critic over all h actions
    actor_hidden: tuple[int, ...] = (1024, 1024, 1024, 1024)  # widths of the flow
    critic_hidden: tuple[int, ...] = (1024, 1024, 1024, 1024)  # widths of each critic head and of the value
    activation: Activation = "gelu"  # of all networks
    actor_norm: Norm = "after"  # layer norm in the flow
    critic_norm: Norm = "after"  # layer norm in critics and value
    time: TimeFeatures = "raw"  # how the flow sees the time
    time_size: int = 64  # number of time features, unless raw
    critics: int = 2  # number of heads of each critic
    agg: losses.Aggregate = "min"  # how the heads are combined
    batch_size: int = 4096  # windows per update
    lr: Scalar = 3e-4  # learning rate of Adam
    discount: Scalar = 0.999  # gamma, per environment step
    tau: Scalar = 0.005  # polyak rate of the target action critic
    kappa_d: Scalar = 0.8  # optimism about how a chunk goes on
    distill: Tilt = "expectile"  # which statistic kappa_d is a level of
    kappa_b: Scalar = 0.93  # optimism about the action
    implicit_backup: Tilt = "quantile"  # which statistic kappa_b is a level of
    flow_steps: int = 10  # euler steps from noise to action
    num_samples: int = 32  # N: proposals of which the best is acted on
    cut_windows: CutWindows = "keep"  # whether windows that termination cuts short train the critics
    valid_index: Literal["step", "flat"] = "step"  # where the mask is looked up
    goals: Goals = Goals()  # how goals are drawn where the task has some

    @property
    def head(self) -> losses.Head:
        """All values are probabilities."""
        return "bce"

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        counts = ("chunk", "actor_hidden", "critic_hidden", "critics", "batch_size", "flow_steps", "num_samples")
        common.check_range(self, **dict.fromkeys(counts, (1, None)), backup=(self.chunk, None), time_size=(4, None))
        common.check_range(self, lr=(0, None), discount=(0, 1), tau=(0, 1), kappa_d=(0, 1), kappa_b=(0, 1))
        common.check_goals(self)

    def actor(self, spec: Spec) -> Velocity:
        """Returns the behaviour flow's velocity v(s, a_t, t), which never sees the goal."""
        size = self.chunk * spec.action
        return Velocity(size, self.actor_hidden, self.actor_norm, self.activation, self.time, self.time_size)

    def critic(self) -> Critic:
        """Returns the heads of a critic, over h or over h_a actions."""
        return Critic(self.critics, self.critic_hidden, self.critic_norm, self.activation)

    def value(self) -> Value:
        """Returns V(s, g)."""
        return Value(self.critic_hidden, self.critic_norm, self.activation)

    def velocity(self, spec: Spec, params: PyTree, obs: jax.Array) -> flow.AverageVelocity:
        """Returns the flow as a function v(x, r, t) of flat chunks, at time t; its observations are closed over."""
        states = common.without_goal(obs, spec)
        return lambda x, r, t: apply(self.actor(spec), params, states, x, t)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_actor, key_critic, key_value, key_chunk = jax.random.split(key, 4)
        obs, short = jnp.zeros(spec.observation), jnp.zeros(self.chunk * spec.action)
        params = {
            "actor": self.actor(spec).init(key_actor, common.without_goal(obs, spec), short, jnp.zeros(1)),
            "critic": self.critic().init(key_critic, obs, short),
            "value": self.value().init(key_value, obs),
        }
        if self.chunk_critic:
            params["chunk_critic"] = self.critic().init(key_chunk, obs, jnp.zeros(self.backup * spec.action))
        return common.start(spec, params, optax.adam(self.lr))

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of windows, their goals relabelled where the task has goals (section 4 of the paper)."""
        return windows(data, key, self.batch_size, self.backup, self.goals)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after one joint gradient step and one Polyak step."""
        return self.learn(state, batch, self.draw(state.spec, batch, key))

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: the flow's noise and times."""
        key_noise, key_time = jax.random.split(key)
        noise = jax.random.normal(key_noise, (len(batch.obs), self.chunk * spec.action))
        return {"x0": noise, "t": jax.random.uniform(key_time, (len(noise), 1))}

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        return common.descend(state, lambda p: self.loss(p, state, batch, draws), optax.adam(self.lr), self.tau)

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the sum of all losses and what each of them is."""
        critic = self.distillation_loss(params["critic"], state, batch)
        value = self.value_loss(params["value"], state, batch)
        actor = self.cloning_loss(params["actor"], state.spec, batch, draws)
        total = critic + value + actor
        metrics = {"critic/loss": critic, "value/loss": value, "actor/flow_loss": actor}
        if self.chunk_critic:
            metrics["chunk_critic/loss"] = self.chunk_critic_loss(params["chunk_critic"], state, batch)
            total += metrics["chunk_critic/loss"]
        return total, metrics

    def whole_weight(self, batch: Batch) -> jax.Array:
        """Returns the weight [B] of windows where all h actions matter."""
        if self.valid_index == "flat":
            return jnp.ones(len(batch.valid))
        return common.critic_weight(batch, self.backup, self.cut_windows)

    def short_weight(self, batch: Batch) -> jax.Array:
        """Returns the weight [B] of windows where the first h_a actions matter."""
        if self.valid_index == "flat":
            return batch.valid[:, min(self.chunk * batch.actions.shape[-1], self.backup) - 1]
        return common.critic_weight(batch, self.chunk, self.cut_windows)

    def td_target(self, state: State, batch: Batch) -> jax.Array:
        """Returns y [B]: the return within the window and the online value after it, a probability."""
        next_value = losses.value_of(apply(self.value(), state.params["value"], batch.next_obs), self.head)
        y = losses.td_target(batch.rewards, batch.steps, batch.terminated, next_value, self.discount)
        return losses.bounded(y, self.head)

    def chunk_critic_loss(self, params: PyTree, state: State, batch: Batch) -> jax.Array:
        """Returns the TD loss of the critic over h actions."""
        output = apply(self.critic(), params, batch.obs, common.flat_actions(batch))
        error = losses.regression(output, self.td_target(state, batch)[None], self.head)
        return losses.masked_mean(error.mean(axis=0), self.whole_weight(batch))

    def distillation_target(self, state: State, batch: Batch) -> jax.Array:
        """Returns what each head of the short critic learns, [K, B]: its own chunk head, or the TD target."""
        if not self.chunk_critic:
            return jnp.broadcast_to(self.td_target(state, batch)[None], (self.critics, len(batch.obs)))
        output = apply(self.critic(), state.params["chunk_critic"], batch.obs, common.flat_actions(batch))
        return losses.value_of(output, self.head)

    def distillation_loss(self, critic: PyTree, state: State, batch: Batch) -> jax.Array:
        """Returns the loss of the critic over h_a actions, an optimistic summary of how chunks go on."""
        output = apply(self.critic(), critic, batch.obs, common.flat_actions(batch, self.chunk))
        target = self.distillation_target(state, batch)
        error = losses.tilted(output, target, self.kappa_d, self.head, self.distill, margin=1e-5)
        weight = self.short_weight(batch)
        if self.chunk_critic and self.valid_index == "step":
            weight = self.whole_weight(batch)  # the target has seen the whole chunk
        return losses.masked_mean(error.mean(axis=0), weight)

    def backup_target(self, state: State, batch: Batch) -> jax.Array:
        """Returns the slow short critic's aggregate [B], a probability."""
        output = apply(self.critic(), state.target, batch.obs, common.flat_actions(batch, self.chunk))
        return losses.aggregate(losses.value_of(output, self.head), self.agg)

    def value_loss(self, value: PyTree, state: State, batch: Batch) -> jax.Array:
        """Returns the implicit backup: V becomes an optimistic summary over the data's actions."""
        output = apply(self.value(), value, batch.obs)
        target = self.backup_target(state, batch)
        error = losses.tilted(output, target, self.kappa_b, self.head, self.implicit_backup)
        return losses.masked_mean(error, self.short_weight(batch))

    def cloning_loss(self, actor: PyTree, spec: Spec, batch: Batch, draws: Draws) -> jax.Array:
        """Returns the flow-matching loss of the behaviour over h_a actions."""
        x1 = common.flat_actions(batch, self.chunk)
        error = flow.matching_error(self.velocity(spec, actor, batch.obs), draws["x0"], x1, draws["t"])
        if self.valid_index == "flat":
            return losses.masked_mean(error.mean(axis=-1), self.short_weight(batch))
        return losses.masked_mean(error, common.step_mask(batch, self.chunk))

    def proposals(self, state: State, obs: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns the behaviour flow's chunks from this noise, clipped; of the noise's shape."""
        velocity = self.velocity(state.spec, state.params["actor"], obs)
        return jnp.clip(flow.euler(velocity, noise, self.flow_steps), -1, 1)

    def scores(self, state: State, obs: jax.Array, chunks: jax.Array) -> jax.Array:
        """Returns the aggregate of the online short critic's logits for each chunk [..., D]."""
        return losses.aggregate(apply(self.critic(), state.params["critic"], obs, chunks), self.agg)

    def choose(self, state: State, obs: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns the best [B, D] of the N proposals that the noise [B, N, D] gives."""
        obs = repeat_for(noise, obs)
        candidates = self.proposals(state, obs, noise)
        return guidance.best_of(candidates, self.scores(state, obs, candidates))

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, h_a, A] from fresh noise; `greedy` changes nothing."""
        noise = jax.random.normal(key, (len(obs), self.num_samples, self.chunk * state.spec.action))
        return common.unflatten(self.choose(state, obs, noise), state.spec.action)
