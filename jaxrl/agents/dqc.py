"""DQC: decoupled Q-chunking, a critic over long chunks for a policy over short ones.

Paper: Li, Park, Levine, "Decoupled Q-Chunking", arXiv 2512.10926. A chunk critic over h actions propagates rewards over
h steps in one backup. It is distilled, with optimism `kappa_d` about the chunk's continuation, into a critic over its
first h_a actions, which is distilled, with optimism `kappa_b` about the action, into a state value, from which the
chunk critic bootstraps. The policy is the best of N proposals of a behavior flow over h_a actions.

As published, all values are discounted probabilities of success, the networks output their logits, and rewards are 0 or
1. Special cases of the same code, `jaxrl train dqc --variant NAME`: without the chunk critic and with h = h_a, `qc` is
Q-chunking (QC); with h > h_a it is `qc-ns`; with h_a = 1 `ns` (n-step returns); with h = h_a = 1 `os` (one step).

Deliberate differences from the official code:
- It also supports single tasks (`jaxrl train dqc ENV --reward-shift 1` if rewards are -1 before success).
- Steps of a window that were not executed have no weight. The official code indexes this mask by flat actions instead
  of steps (`valid_index="flat"`); on the starts that it samples both are 1.
- Targets are kept 1e-6 away from 0 and 1 before the logit; the official value loss can become infinite.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import Adam, Critic, FlowPolicy, Net, Value, Windows, check_heads
from jaxrl.networks import repeat_for
from jaxrl.ops import guidance, losses
from jaxrl.ranges import Count, Fraction
from jaxrl.types import Batch, Metrics, Observation, PyTree, Spec, count_of, pytree

Tilt = Literal["expectile", "quantile"]

_NET = Net((1024, 1024, 1024, 1024), norm="after")


@pytree
class DQC:
    """Decoupled Q-chunking: long critic, short policy."""

    windows: Windows = Windows(chunk=5, backup=25, batch=4096, discount=0.999)
    flow: FlowPolicy = FlowPolicy(_NET)  # the behavior, v(s, a_t, t)
    critic: Critic = Critic(_NET, agg="min", head="bce")  # Q_j(s, a) over h_a actions, and the chunk critic over h
    value: Value = Value(_NET, head="bce")  # V(s)
    chunk_critic: bool = True  # whether there is a critic over all h actions
    adam: Adam = Adam()
    kappa_d: Fraction = 0.8  # optimism about the chunk's continuation
    distill: Tilt = "expectile"  # statistic of which kappa_d is the level
    kappa_b: Fraction = 0.93  # optimism about the action
    implicit_backup: Tilt = "quantile"  # statistic of which kappa_b is the level
    num_samples: Count = 32  # N: number of proposals, of which the best is executed
    valid_index: Literal["step", "flat"] = "step"  # how the mask is indexed

    chunk, requires, sample = shared.chunk, shared.requires, shared.sample
    draw, td_target, learn, update = shared.draw, shared.td_target, shared.learn, shared.update
    proposals, scores = shared.proposals, shared.scores

    @property
    def whole(self) -> Windows:
        """The windows for the chunk critic: with all h actions."""
        return dataclasses.replace(self.windows, chunk=self.windows.backup)

    def check(self) -> None:
        """Raises UserError for inconsistent settings."""
        check_heads("DQC", self.critic, self.value)
        self.windows.goals.check_head(self.critic.head)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_flow, key_critic, key_value, key_chunk = jax.random.split(key, 4)
        obs, short = spec.example(), jnp.zeros(self.chunk * spec.action)
        params = {
            "flow": self.flow.init(key_flow, spec.behaviour(obs), short),
            "critic": self.critic.init(key_critic, spec.critic(obs), short),
            "value": self.value.init(key_value, spec.critic(obs)),
        }
        if self.chunk_critic:
            params["chunk_critic"] = self.critic.init(
                key_chunk, spec.critic(obs), jnp.zeros(self.windows.backup * spec.action)
            )
        return learner.create(spec, params, self.adam.transformation(), "critic")

    def distillation_target(self, state: State, batch: Batch) -> jax.Array:
        """Returns the target of each head of the short critic, [K, B]: its chunk head, or the TD target."""
        if not self.chunk_critic:
            return jnp.broadcast_to(self.td_target(state, batch)[None], (self.critic.heads, len(batch.actions)))
        chunk = self.whole.actions(batch)
        return self.critic.values(state.params["chunk_critic"], state.spec.critic(batch.obs), chunk)

    def weights(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the weights [B] of windows in losses that depend on all h actions, and on the first h_a."""
        if self.valid_index == "flat":
            short = batch.valid[:, min(self.chunk * batch.actions.shape[-1], self.windows.backup) - 1]
            return jnp.ones(len(batch.valid)), short
        return self.whole.weight(batch), self.windows.weight(batch)

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the sum of all losses and the individual losses, in the paper's order."""
        seen, a, head = state.spec.critic(batch.obs), self.windows.actions(batch), self.critic.head
        whole, short = self.weights(batch)
        metrics = {}

        # the chunk critic: the cross entropy of Q(s, a) over all h actions against y
        if self.chunk_critic:
            y = self.td_target(state, batch)
            error = self.critic.error(params["chunk_critic"], seen, self.whole.actions(batch), y)
            metrics["chunk_critic/loss"] = losses.masked_mean(error.mean(axis=0), whole)

        # the short critic: an optimistic statistic of the chunk critic over continuations of the chunk
        output, target = self.critic.outputs(params["critic"], seen, a), self.distillation_target(state, batch)
        error = losses.tilted(output, target, self.kappa_d, head, self.distill, margin=1e-5)
        weight = whole if self.chunk_critic and self.valid_index == "step" else short
        metrics["critic/loss"] = losses.masked_mean(error.mean(axis=0), weight)

        # the value, the implicit backup: an optimistic statistic of the target critic over the data's actions
        output, target = self.value.output(params["value"], seen), self.critic.value(state.target["critic"], seen, a)
        error = losses.tilted(output, target, self.kappa_b, head, self.implicit_backup)
        metrics["value/loss"] = losses.masked_mean(error, short)

        # the flow clones the behavior: |v(s, a_t, t) - (a - z)|^2
        behaviour = state.spec.behaviour(batch.obs)
        error = self.flow.matching_error(params["flow"], behaviour, draws["x0"], a, draws["t"])
        if self.valid_index == "flat":
            metrics["actor/flow_loss"] = losses.masked_mean(error.mean(axis=-1), short)
        else:
            metrics["actor/flow_loss"] = losses.masked_mean(error, self.windows.mask(batch))

        return sum(metrics.values(), jnp.zeros(())), metrics

    def choose(self, state: State, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns the best [B, D] of the N proposals from the noise [B, N, D]."""
        obs = repeat_for(noise, obs)
        candidates = self.proposals(state, obs, noise)
        return guidance.best_of(candidates, self.scores(state, obs, candidates))

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, h_a, A] from new noise; `greedy` has no effect."""
        noise = jax.random.normal(key, (count_of(obs), self.num_samples, self.chunk * state.spec.action))
        return learner.unflatten(self.choose(state, obs, noise), state.spec.action)
