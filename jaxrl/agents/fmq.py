"""FMQ: a one-step flow-map policy, pre-trained offline and aligned online by optimal Q-guidance.

Paper: Ziakas, Russo, Bose, "Aligning Flow Map Policies with Optimal Q-Guidance", arXiv 2605.12416. Equation and
algorithm numbers below are the paper's.

Offline, the actor learns the data's action chunks as a flow map (diagonal flow matching plus a self-distillation
loss) and a chunked critic learns their values (Eq. 8). The online phase freezes that actor as the anchor; the actor
then regresses onto the anchor's velocity moved by a bounded step along the normalized critic gradient (Theorem 3.2,
Eq. 12). Actions are the best of N one-step samples, or in evaluation those of a beam search (Algorithm 2).

Deliberate differences from the official code:
- Windows shortened by termination also train the critic (`windows.cut="keep"`), since there is no bootstrap; the
  official code drops them ("drop"). Windows shortened by truncation are dropped by both: their chunk was not executed.
- After a window's end its last action is repeated; the official code reads on into the next episode.
- The heads are aggregated by mean offline and by min online, as in the official scripts (not their agent file).
- The radius scale is `eta` also with the disagreement-adaptive radius; the official code fixes it at 1 there.
- Beam search completes with X_{t',1}, which online training keeps exact; the code's is `beam.completion="euler"`.
- LSD trains the map toward the diagonal velocity (Boffi et al.); the official direction is `"lsd_reverse"`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import AdamW, Critic, FlowMapPolicy, SelfDistillation, Windows
from jaxrl.errors import UserError
from jaxrl.networks import repeat_for
from jaxrl.ops import flow, guidance, losses
from jaxrl.ops.flow import AverageVelocity
from jaxrl.ranges import Count, NonNegative
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, Observation, Phase, PyTree, Spec, count_of, pytree


@pytree
class FMQ:
    """Flow-map policy with Q-guidance, offline to online."""

    windows: Windows = Windows(chunk=5, backup=5)
    actor: FlowMapPolicy = FlowMapPolicy()  # u(s, a_r, r, t)
    distillation: SelfDistillation = SelfDistillation()  # the actor's offline losses
    critic: Critic = Critic()  # Q_j(s, a); its `agg` applies offline
    adam: AdamW = AdamW()
    num_samples: Count = 32  # N: number of one-step samples, of which the best is executed
    target_samples: Count = 32  # N in the TD target
    online_agg: losses.Aggregate = "min"  # how the critics are combined online
    eta: NonNegative = 1.0  # trust-region radius, in units of velocity over the flat chunk
    beta: NonNegative = 0.3  # how strongly the radius shrinks with the critics' disagreement (Eq. 13); 0: not at all
    gradient_of: guidance.GradientOf = "first"  # aggregate of the critics whose gradient is used in training
    flow_losses_online: bool = False  # whether the two flow losses below are added online
    esd_weight: NonNegative = 0.0  # weight of the self-distillation loss online
    diagonal_weight: NonNegative = 0.0  # weight of the diagonal loss online
    test_sampler: Literal["best_of_n", "beam_search"] = "best_of_n"  # how actions are selected in evaluation
    beam: guidance.BeamSearch = guidance.BeamSearch()  # Algorithm 2, if selected

    chunk, requires, sample, learn = shared.chunk, shared.requires, shared.sample, shared.learn

    def check(self) -> None:
        """Raises UserError for inconsistent settings, or settings without effect."""
        for name, weight in (("esd_weight", self.esd_weight), ("diagonal_weight", self.diagonal_weight)):
            if not self.flow_losses_online and np.any(np.asarray(weight) > 0):
                raise UserError(f"FMQ.{name} = {weight}: has no effect unless flow_losses_online")

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial, offline state."""
        key_actor, key_critic = jax.random.split(key)
        obs, chunk = spec.example(), jnp.zeros(self.chunk * spec.action)
        params = {
            "actor": self.actor.init(key_actor, spec.actor(obs), chunk),
            "critic": self.critic.init(key_critic, spec.critic(obs), chunk),
        }
        return learner.create(spec, params, self.adam.transformation(), "critic")

    def enter(self, state: State, phase: Phase) -> State:
        """Returns the state in a phase: the actor is copied to the anchor once, on going online (Eq. 11)."""
        first = phase.collects and state.anchor is None
        anchor = jax.tree.map(jnp.copy, state.params["actor"]) if first else state.anchor
        return dataclasses.replace(state, anchor=anchor)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after one joint gradient step on actor and critic, then one Polyak step."""
        return self.learn(state, batch, self.draw(state, batch, key))

    def draw(self, state: State, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update in the state's phase."""
        key_critic, key_flow = jax.random.split(key)
        count, size = len(batch.actions), self.chunk * state.spec.action
        draws = {"next_noise": jax.random.normal(key_critic, (count, self.target_samples, size))}
        if state.anchor is not None:
            key_r, key_x0, key_flow = jax.random.split(key_flow, 3)
            draws["guided_r"] = jax.random.uniform(key_r, (count, 1))
            draws["guided_x0"] = jax.random.normal(key_x0, (count, size))
        return draws | self.distillation.draw(key_flow, count, size)

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the sum of the losses of critic and actor in the state's phase, and metrics."""
        critic, metrics = self.critic_loss(params["critic"], state, batch, draws)
        u, a = self.actor.velocity(params["actor"], state.spec.actor(batch.obs)), self.windows.actions(batch)
        # offline the actor learns the data as a flow map, on the diagonal and, once the warm-up is over, off it
        if state.anchor is None:
            diagonal, off = self.distillation.losses(u, a, self.windows.mask(batch), draws, state.step)
            actor = diagonal + (state.step > self.distillation.warmup) * off
            return critic + actor, {**metrics, "actor/diagonal_loss": diagonal, "actor/distillation_loss": off}
        # online it regresses onto the anchor moved along grad Q
        actor, more = self.guided_loss(u, state, batch, draws)
        if self.flow_losses_online:
            diagonal, off = self.distillation.losses(u, a, self.windows.mask(batch), draws, state.step)
            actor = actor + self.diagonal_weight * diagonal + self.esd_weight * off
        return critic + actor, {**metrics, **more}

    def judge(self, state: State) -> Critic:
        """Returns the critic with the aggregation of the state's phase."""
        return self.critic if state.anchor is None else dataclasses.replace(self.critic, agg=self.online_agg)

    def critic_loss(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the chunked TD loss (Eq. 8) and its metrics."""
        obs, next_obs, a = state.spec.critic(batch.obs), state.spec.critic(batch.next_obs), self.windows.actions(batch)
        next_action = self.choose(state, batch.next_obs, draws["next_noise"])
        next_value = self.judge(state).value(state.target["critic"], next_obs, next_action)
        y = self.windows.target(batch, next_value)
        y, output = losses.bounded(y, self.critic.head), self.critic.outputs(critic, obs, a)
        error = losses.regression(output, y[None], self.critic.head)
        whole = self.windows.weight(batch)
        loss = losses.masked_mean(error, jnp.broadcast_to(whole[None], error.shape))
        q = losses.value_of(output, self.critic.head).mean()
        return loss, {"critic/loss": loss, "critic/q": q, "critic/target_max": y.max()}

    def guided_loss(self, u: AverageVelocity, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the regression loss of u onto the anchor's velocity moved along grad Q (Eq. 12, Algorithm 1)."""
        a, r, heads = self.windows.actions(batch), draws["guided_r"], self.heads(state, batch.obs)
        a_r, end = flow.interpolate(draws["guided_x0"], a, r), jnp.ones_like(r)
        u_off = self.actor.velocity(state.anchor, state.spec.actor(batch.obs))(a_r, r, end)
        a_off = jnp.clip(a_r + (1 - r) * u_off, -1, 1)
        radius = guidance.adaptive_radius(self.eta, self.beta, heads(a_off))
        direction = guidance.ascent_direction(heads, a_off, self.gradient_of)
        u_star, u_now = guidance.trust_region_target(u_off, direction, radius), u(a_r, r, end)
        loss = losses.masked_mean(jnp.square(u_now - u_star), self.windows.mask(batch))
        drift = jnp.linalg.norm(u_now - u_off, axis=-1).mean()
        return loss, {"actor/fmq_loss": loss, "actor/drift": drift, "actor/radius": radius.mean()}

    def heads(self, state: State, obs: Observation) -> guidance.Heads:
        """Returns the online critic as a function of flat chunks."""
        return lambda action: self.critic.outputs(state.params["critic"], state.spec.critic(obs), action)

    def one_step(self, state: State, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns samples [B, N, D] of the one-step map X_{0,1} from noise, clipped (Eq. 7)."""
        return self.actor.sample(state.params["actor"], state.spec.actor(repeat_for(noise, obs)), noise)

    def choose(self, state: State, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns the best [B, D] of N one-step samples from noise [B, N, D] by the online critic."""
        candidates, seen = self.one_step(state, obs, noise), state.spec.critic(repeat_for(noise, obs))
        return guidance.best_of(candidates, self.judge(state).score(state.params["critic"], seen, candidates))

    def beam_search(self, state: State, obs: Observation, noise: jax.Array, key: jax.Array) -> jax.Array:
        """Returns [B, D] from Q-guided beam search (Algorithm 2) among samples from noise [B, M, D]."""
        actor = lambda x: self.actor.velocity(state.params["actor"], state.spec.actor(repeat_for(x, obs)))  # noqa: E731
        heads = lambda action: self.heads(state, repeat_for(action, obs))(action)  # noqa: E731
        return self.beam.search(key, self.one_step(state, obs, noise), heads, lambda x, r, t: actor(x)(x, r, t))

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, H, A]: best-of-N, or in evaluation (`greedy`) by `test_sampler`."""
        count, size = count_of(obs), self.chunk * state.spec.action
        if greedy and self.test_sampler == "beam_search":
            key_beams, key_search = jax.random.split(key)
            noise = jax.random.normal(key_beams, (count, self.beam.width, size))
            return learner.unflatten(self.beam_search(state, obs, noise, key_search), state.spec.action)
        noise = jax.random.normal(key, (count, self.num_samples, size))
        return learner.unflatten(self.choose(state, obs, noise), state.spec.action)
