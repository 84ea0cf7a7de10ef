"""FMQ: a one-step flow-map policy, pre-trained offline and aligned online by optimal Q-guidance.

Paper: Ziakas, Russo, Bose, "Aligning Flow Map Policies with Optimal Q-Guidance", arXiv 2605.12416. Equation and
algorithm numbers below are the paper's.

Offline, the actor learns the data's action chunks as a flow map (diagonal flow matching plus a self-distillation
loss) and a chunked critic learns their values (Eq. 8). `start_online` freezes that actor as the anchor. Online, the
actor regresses onto the anchor's velocity moved by a bounded step along the normalised critic gradient (Theorem 3.2,
Eq. 12). Actions are the best of N one-step samples; beam search (Algorithm 2) is a test-time option that no TD target
ever sees.

Deliberate differences from the official code:
- A window that termination cuts short trains the critic too (`cut_windows="keep"`), as nothing after it matters; the
  official code drops it ("drop"). Windows cut by truncation are dropped by both: their chunk was not executed.
- After a window's end its last action is repeated, where the official code reads on into the next episode.
- The heads are aggregated by mean offline and by min online, as the official scripts (not their agent file) do.
- The radius is `eta`, also in the adaptive case, where the official code fixes it at 1.
- Beam search completes with X_{t',1}, which online training keeps exact; the code's is `beam.completion="euler"`.
- LSD pulls the map towards the diagonal velocity (Boffi et al.); the official direction is `"lsd_reverse"`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl.agents.common import CutWindows, check_range, critic_weight, flat_actions, step_mask, unflatten
from jaxrl.errors import UserError
from jaxrl.networks import Critic, Velocity, apply, repeat_for
from jaxrl.ops import flow, guidance, losses
from jaxrl.ops.flow import AverageVelocity
from jaxrl.replay.ring import Rings, windows
from jaxrl.types import Batch, Metrics, Phase, PyTree, Scalar, Spec, pytree


@pytree
class FMQState:
    """Everything that an update changes. The phase is in the tree: offline there is no anchor."""

    spec: Spec
    params: dict[str, PyTree]  # actor, critic
    target: PyTree  # the critic's slow copy
    opt: PyTree
    step: jax.Array  # [] int32
    anchor: PyTree | None = None  # the actor as it was at the end of the offline phase


@pytree
class FMQ:
    """Flow-map policy with Q-guidance, offline to online."""

    chunk: int = 5  # H: actions per decision, executed open loop
    actor_hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of the flow map's network
    critic_hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of each critic head
    critics: int = 2  # number of critic heads
    batch_size: int = 256  # windows per update
    lr: Scalar = 3e-4  # learning rate of Adam, for actor and critic together
    weight_decay: Scalar = 0.0  # decoupled weight decay (AdamW)
    discount: Scalar = 0.99  # gamma, per environment step
    tau: Scalar = 0.005  # polyak rate of the target critic
    num_samples: int = 32  # N: one-step samples of which the best is acted on
    target_samples: int = 32  # N in the TD target
    offline_agg: losses.Aggregate = "mean"  # how the heads are combined offline
    online_agg: losses.Aggregate = "min"  # how the heads are combined online
    cut_windows: CutWindows = "keep"  # whether windows that termination cuts short train the critic

    offline_loss: Literal["esd", "lsd", "lsd_reverse", "psd"] = "esd"  # self-distillation off the diagonal
    velocity: Literal["sample", "diagonal"] = "sample"  # along which velocity ESD differentiates
    warmup: int = 5_000  # updates with the diagonal loss alone
    curriculum: int = 50_000  # update at which the intervals [r, t] have reached their full width

    eta: Scalar = 1.0  # trust-region radius, in units of velocity over the flat chunk
    adaptive: bool = True  # whether the radius shrinks where the critics disagree (Eq. 13)
    beta: Scalar = 0.3  # how strongly it shrinks
    gradient_of: guidance.GradientOf = "first"  # which aggregate of the heads is climbed in training
    flow_losses_online: bool = False  # whether the two flow losses below are added online
    esd_weight: Scalar = 0.0  # weight of the self-distillation loss online
    diagonal_weight: Scalar = 0.0  # weight of the diagonal loss online

    test_sampler: Literal["best_of_n", "beam_search"] = "best_of_n"  # how actions are chosen in evaluation
    beam: guidance.BeamSearch = guidance.BeamSearch()  # Algorithm 2, if chosen

    def check(self) -> None:
        """Raises UserError where a value is out of range or has no effect."""
        counts = ("chunk", "actor_hidden", "critic_hidden", "critics", "batch_size", "num_samples", "target_samples")
        weights = ("lr", "weight_decay", "eta", "beta", "esd_weight", "diagonal_weight", "warmup")
        check_range(self, **dict.fromkeys(counts, (1, None)), **dict.fromkeys(weights, (0, None)))
        check_range(self, discount=(0, 1), tau=(0, 1), curriculum=(self.warmup, None))
        check_range(self.beam, width=(1, None), rounds=(0, None), branches=(1, None), eta=(0, None), snr=(0, None))
        for weight in ("esd_weight", "diagonal_weight"):
            if not self.flow_losses_online and np.any(np.asarray(getattr(self, weight)) > 0):
                raise UserError(f"FMQ.{weight} = {getattr(self, weight)}: has no effect unless flow_losses_online")

    def actor(self, spec: Spec) -> Velocity:
        """Returns the average velocity u(s, a_r, r, t)."""
        return Velocity(self.chunk * spec.action, self.actor_hidden)

    def critic(self) -> Critic:
        """Returns the heads Q_j(s, chunk)."""
        return Critic(self.critics, self.critic_hidden)

    def optimizer(self) -> optax.GradientTransformation:
        """Returns Adam with decoupled weight decay."""
        return optax.adamw(self.lr, weight_decay=self.weight_decay)

    def u(self, spec: Spec, params: PyTree, obs: jax.Array) -> AverageVelocity:
        """Returns the actor as a function u(x, r, t) of flat chunks, its observations closed over."""
        return lambda x, r, t: apply(self.actor(spec), params, obs, x, r, t)

    def heads(self, params: PyTree, obs: jax.Array) -> guidance.Heads:
        """Returns the critic as a function of flat chunks, its observations closed over."""
        return lambda action: apply(self.critic(), params, obs, action)

    def agg(self, state: FMQState) -> losses.Aggregate:
        """Returns how the heads are combined in the state's phase."""
        return self.offline_agg if state.anchor is None else self.online_agg

    def init(self, key: jax.Array, spec: Spec) -> FMQState:
        """Returns the initial, offline state."""
        key_actor, key_critic = jax.random.split(key)
        obs, chunk, time = jnp.zeros(spec.observation), jnp.zeros(self.chunk * spec.action), jnp.zeros(1)
        params = {
            "actor": self.actor(spec).init(key_actor, obs, chunk, time, time),
            "critic": self.critic().init(key_critic, obs, chunk),
        }
        target = jax.tree.map(jnp.copy, params["critic"])
        return FMQState(spec, params, target, self.optimizer().init(params), jnp.zeros((), jnp.int32))

    def enter(self, state: FMQState, phase: Phase) -> FMQState:
        """Returns the state in a phase: online the actor is copied to the anchor, once, and all else goes on (Eq. 11)."""
        if not phase.collects or state.anchor is not None:
            return state
        return dataclasses.replace(state, anchor=jax.tree.map(jnp.copy, state.params["actor"]))

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of H-step windows, uniform over data and replay together."""
        return windows(data, key, self.batch_size, self.chunk)

    def update(self, state: FMQState, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[FMQState, Metrics]:
        """Returns the state after one joint gradient step on actor and critic, then one Polyak step."""
        key_critic, key_actor = jax.random.split(key)
        actor_loss = self.cloning_loss if state.anchor is None else self.guided_loss

        def loss(params: dict[str, PyTree]) -> tuple[jax.Array, Metrics]:
            critic, critic_metrics = self.critic_loss(params["critic"], state, batch, key_critic)
            actor, actor_metrics = actor_loss(params["actor"], state, batch, key_actor)
            return critic + actor, {**critic_metrics, **actor_metrics}

        gradient, metrics = jax.grad(loss, has_aux=True)(state.params)
        updates, opt = self.optimizer().update(gradient, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        target = losses.polyak(state.params["critic"], state.target, self.tau)
        return dataclasses.replace(state, params=params, target=target, opt=opt, step=state.step + 1), metrics

    def critic_loss(self, critic: PyTree, state: FMQState, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns the chunked TD loss (Eq. 8) and its metrics."""
        agg = self.agg(state)
        next_action = self.best_of_n(state, batch.next_obs, key, self.target_samples)
        next_value = losses.aggregate(self.heads(state.target, batch.next_obs)(next_action), agg)
        y = losses.td_target(batch.rewards, batch.steps, batch.terminated, next_value, self.discount)
        whole = critic_weight(batch, self.chunk, self.cut_windows)
        q = self.heads(critic, batch.obs)(flat_actions(batch))
        loss = losses.masked_mean(jnp.square(q - y[None]), jnp.broadcast_to(whole[None], q.shape))
        return loss, {"critic/loss": loss, "critic/q": q.mean(), "critic/target_max": y.max()}

    def flow_losses(self, actor: PyTree, state: FMQState, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the diagonal loss and the self-distillation loss of a flow map (Eqs. 3 and 5)."""
        key_x0, key_t, key_y0, key_rt, key_split = jax.random.split(key, 5)
        u = self.u(state.spec, actor, batch.obs)
        x1, mask = flat_actions(batch), step_mask(batch)
        x0, t = jax.random.normal(key_x0, x1.shape), jax.random.uniform(key_t, (len(x1), 1))
        diagonal = flow.matching_error(u, x0, x1, t)

        y0 = jax.random.normal(key_y0, x1.shape)
        progress = jnp.clip((state.step - self.warmup) / max(self.curriculum - self.warmup, 1), 0, 1)
        r, t = flow.widen(*flow.uniform_times(key_rt, len(x1)), progress)
        if self.offline_loss == "esd":
            off = flow.esd_error(u, y0, x1, r, t, self.velocity)
        elif self.offline_loss == "psd":
            off = flow.psd_error(u, y0, x1, r, t, jax.random.uniform(key_split, r.shape))
        else:
            off = flow.lsd_error(u, y0, x1, r, t, reverse=self.offline_loss == "lsd_reverse")
        return losses.masked_mean(diagonal, mask), losses.masked_mean(off, mask)

    def cloning_loss(self, actor: PyTree, state: FMQState, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns the offline actor loss L_diag + w L_off, with w = 1 once the warm-up is over."""
        diagonal, off = self.flow_losses(actor, state, batch, key)
        loss = diagonal + (state.step > self.warmup) * off
        return loss, {"actor/diagonal_loss": diagonal, "actor/distillation_loss": off}

    def guided_loss(self, actor: PyTree, state: FMQState, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns the online actor loss: regression onto the anchor moved along grad Q (Eq. 12, Algorithm 1)."""
        key_r, key_x0, key_flow = jax.random.split(key, 3)
        a = flat_actions(batch)
        r = jax.random.uniform(key_r, (len(a), 1))
        a_r = flow.interpolate(jax.random.normal(key_x0, a.shape), a, r)
        end = jnp.ones_like(r)

        u_off = self.u(state.spec, state.anchor, batch.obs)(a_r, r, end)
        a_off = jnp.clip(a_r + (1 - r) * u_off, -1, 1)
        heads = self.heads(state.params["critic"], batch.obs)
        direction = guidance.ascent_direction(heads, a_off, self.gradient_of)
        radius = jnp.full(len(a), self.eta)
        if self.adaptive:
            radius = guidance.adaptive_radius(self.eta, self.beta, heads(a_off))
        u_star = guidance.trust_region_target(u_off, direction, radius)

        u = self.u(state.spec, actor, batch.obs)(a_r, r, end)
        loss = losses.masked_mean(jnp.square(u - u_star), step_mask(batch))
        drift = jnp.linalg.norm(u - u_off, axis=-1).mean()
        metrics = {"actor/fmq_loss": loss, "actor/drift": drift, "actor/radius": radius.mean()}
        if self.flow_losses_online:
            diagonal, off = self.flow_losses(actor, state, batch, key_flow)
            loss = loss + self.diagonal_weight * diagonal + self.esd_weight * off
        return loss, metrics

    def best_of_n(self, state: FMQState, obs: jax.Array, key: jax.Array, samples: int) -> jax.Array:
        """Returns [B, H * A]: of N one-step samples the one that the online critic values most."""
        candidates = self.one_step(state, obs, key, samples)
        scores = self.heads(state.params["critic"], repeat_for(candidates, obs))(candidates)
        return guidance.best_of(candidates, losses.aggregate(scores, self.agg(state)))

    def one_step(self, state: FMQState, obs: jax.Array, key: jax.Array, samples: int) -> jax.Array:
        """Returns N samples [B, N, H * A] of the one-step map X_{0,1} from fresh noise, clipped (Eq. 7)."""
        noise = jax.random.normal(key, (len(obs), samples, self.chunk * state.spec.action))
        u = self.u(state.spec, state.params["actor"], repeat_for(noise, obs))
        return jnp.clip(flow.jump(u, noise), -1, 1)

    def beam_search(self, state: FMQState, obs: jax.Array, key: jax.Array) -> jax.Array:
        """Returns [B, H * A] from Q-guided beam search (Algorithm 2)."""
        key_beams, key_search = jax.random.split(key)
        beams = self.one_step(state, obs, key_beams, self.beam.width)

        return self.beam.search(
            key_search,
            beams,
            lambda action: self.heads(state.params["critic"], repeat_for(action, obs))(action),
            lambda x, r, t: self.u(state.spec, state.params["actor"], repeat_for(x, obs))(x, r, t),
        )

    def act(self, state: FMQState, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, H, A]: best-of-N, or in evaluation (`greedy`) whatever `test_sampler` says."""
        if greedy and self.test_sampler == "beam_search":
            chunk = self.beam_search(state, obs, key)
        else:
            chunk = self.best_of_n(state, obs, key, self.num_samples)
        return unflatten(chunk, state.spec.action)
