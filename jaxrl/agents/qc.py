"""QC: Q-learning on chunks of actions, with a policy that stays as coherent as the data.

Paper: Li, Zhou, Levine, "Reinforcement Learning with Action Chunking", arXiv 2507.07969. The critic values whole
chunks of H actions, so that H rewards pass in one unbiased backup; a behaviour flow proposes chunks.

`actor="best_of_n"` (QC) acts on the best of N proposals, in the environment and in the TD target. `actor="distill"`
(QC-FQL) trains FQL's one-step policy instead. With chunk 1 and backup n they are BFN-n and FQL-n.

Deliberate differences from the official code:
- Windows that termination cuts short train the critic ("keep"); the official code drops them ("drop").
- The action after an episode's end repeats the last one instead of reading on into the next episode.
- In goal-conditioned tasks the flow does not see the goal. `head="bce"` learns probabilities of success.
- The best-of-N agent has no one-step policy; the official one initialises it and leaves it alone.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import common
from jaxrl.agents.common import CutWindows, Draws, State
from jaxrl.networks import Activation, Critic, Norm, TimeFeatures, Velocity, apply, repeat_for
from jaxrl.ops import flow, guidance, losses
from jaxrl.replay.hindsight import Goals
from jaxrl.replay.ring import Rings, windows
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree


@pytree
class QC:
    """Q-chunking: a chunked critic over a behaviour flow, best-of-N or distilled."""

    chunk: int = 5  # H: actions per decision, executed open loop
    backup: int = 5  # steps of the return in the TD target, at least `chunk`
    actor: Literal["best_of_n", "distill"] = "best_of_n"  # how actions come from the flow and the critic
    actor_hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of flow and policy
    critic_hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of each critic head
    activation: Activation = "gelu"  # of all networks
    actor_norm: Norm = "none"  # layer norm in flow and policy
    critic_norm: Norm = "after"  # layer norm in the critic
    time: TimeFeatures = "raw"  # how the flow sees the time
    time_size: int = 64  # number of time features, unless raw
    critics: int = 2  # number of critic heads
    head: losses.Head = "mse"  # whether the critic says values, or logits of probabilities
    agg: losses.Aggregate = "mean"  # how the heads are combined
    batch_size: int = 256  # windows per update
    lr: Scalar = 3e-4  # learning rate of Adam
    weight_decay: Scalar = 0.0  # decoupled weight decay (AdamW)
    discount: Scalar = 0.99  # gamma, per environment step
    tau: Scalar = 0.005  # polyak rate of the target critic
    flow_steps: int = 10  # euler steps from noise to action
    num_samples: int = 32  # N: proposals of which the best is acted on
    alpha: Scalar = 100.0  # weight of the distillation; to be tuned per task
    cut_windows: CutWindows = "keep"  # whether windows that termination cuts short train the critic
    goals: Goals = Goals()  # how goals are drawn where the task has some

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        counts = ("chunk", "actor_hidden", "critic_hidden", "critics", "batch_size", "flow_steps", "num_samples")
        common.check_range(self, **dict.fromkeys(counts, (1, None)), backup=(self.chunk, None), time_size=(4, None))
        common.check_range(self, lr=(0, None), weight_decay=(0, None), alpha=(0, None), discount=(0, 1), tau=(0, 1))
        common.check_goals(self)

    def behaviour(self, spec: Spec) -> Velocity:
        """Returns the behaviour flow's velocity v(s, a_t, t)."""
        size = self.chunk * spec.action
        return Velocity(size, self.actor_hidden, self.actor_norm, self.activation, self.time, self.time_size)

    def policy(self, spec: Spec) -> Velocity:
        """Returns the one-step policy mu(s, z) of "distill"."""
        return Velocity(self.chunk * spec.action, self.actor_hidden, self.actor_norm, self.activation)

    def critic(self) -> Critic:
        """Returns the heads Q_j(s, chunk)."""
        return Critic(self.critics, self.critic_hidden, self.critic_norm, self.activation)

    def optimizer(self) -> optax.GradientTransformation:
        """Returns Adam with decoupled weight decay."""
        return optax.adamw(self.lr, weight_decay=self.weight_decay)

    def velocity(self, spec: Spec, params: PyTree, obs: jax.Array) -> flow.AverageVelocity:
        """Returns the flow as a function v(x, r, t) of flat chunks, at time t; its observations are closed over."""
        states = common.without_goal(obs, spec)
        return lambda x, r, t: apply(self.behaviour(spec), params, states, x, t)

    def one_step(self, spec: Spec, params: PyTree, obs: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns the one-step policy's chunks mu(s, z) [B, D], not clipped."""
        return apply(self.policy(spec), params, obs, noise)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_flow, key_critic, key_policy = jax.random.split(key, 3)
        obs, chunk = jnp.zeros(spec.observation), jnp.zeros(self.chunk * spec.action)
        params = {
            "flow": self.behaviour(spec).init(key_flow, common.without_goal(obs, spec), chunk, jnp.zeros(1)),
            "critic": self.critic().init(key_critic, obs, chunk),
        }
        if self.actor == "distill":
            params["policy"] = self.policy(spec).init(key_policy, obs, chunk)
        return common.start(spec, params, self.optimizer())

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of windows, uniform over data and replay together."""
        return windows(data, key, self.batch_size, self.backup, self.goals)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after one joint gradient step and one Polyak step."""
        return self.learn(state, batch, self.draw(state.spec, batch, key))

    def noise(self, spec: Spec, key: jax.Array, count: int) -> jax.Array:
        """Returns the noise that `choose` needs for so many observations: [B, N, D], or [B, 1, D] when distilled."""
        return jax.random.normal(
            key, (count, self.num_samples if self.actor == "best_of_n" else 1, self.chunk * spec.action)
        )

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update."""
        key_next, key_noise, key_time, key_distill = jax.random.split(key, 4)
        count, size = len(batch.obs), self.chunk * spec.action
        return {
            "next_noise": self.noise(spec, key_next, count),
            "x0": jax.random.normal(key_noise, (count, size)),
            "t": jax.random.uniform(key_time, (count, 1)),
            "distill_noise": jax.random.normal(key_distill, (count, size)),
        }

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        return common.descend(state, lambda p: self.loss(p, state, batch, draws), self.optimizer(), self.tau)

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the sum of all losses and what each of them is."""
        critic = self.critic_loss(params["critic"], state, batch, draws)
        cloning = self.cloning_loss(params["flow"], state.spec, batch, draws)
        total, metrics = critic + cloning, {"critic/loss": critic, "actor/flow_loss": cloning}
        if self.actor == "distill":
            distillation, climb = self.policy_losses(params["policy"], state, batch, draws["distill_noise"])
            total += self.alpha * distillation + climb
            metrics |= {"actor/distillation_loss": distillation, "actor/q_loss": climb}
        return total, metrics

    def td_target(self, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns y [B]: the return of the window and what the policy's chunk is worth after it (Eq. 7)."""
        action = self.choose(state, batch.next_obs, draws["next_noise"])
        heads = apply(self.critic(), state.target, batch.next_obs, action)
        next_value = losses.aggregate(losses.value_of(heads, self.head), self.agg)
        y = losses.td_target(batch.rewards, batch.steps, batch.terminated, next_value, self.discount)
        return losses.bounded(y, self.head)

    def critic_loss(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns the chunked TD loss, averaged over the heads."""
        output = apply(self.critic(), critic, batch.obs, common.flat_actions(batch, self.chunk))
        error = losses.regression(output, self.td_target(state, batch, draws)[None], self.head)
        return losses.masked_mean(error.mean(axis=0), common.critic_weight(batch, self.chunk, self.cut_windows))

    def cloning_loss(self, params: PyTree, spec: Spec, batch: Batch, draws: Draws) -> jax.Array:
        """Returns the flow-matching loss of the behaviour."""
        x1 = common.flat_actions(batch, self.chunk)
        error = flow.matching_error(self.velocity(spec, params, batch.obs), draws["x0"], x1, draws["t"])
        return losses.masked_mean(error, common.step_mask(batch, self.chunk))

    def policy_losses(
        self, params: PyTree, state: State, batch: Batch, noise: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns FQL's two losses of the one-step policy: its distance to the flow, and minus its value."""
        action, happened = self.one_step(state.spec, params, batch.obs, noise), batch.valid[:, 0]
        distance = jnp.square(action - jax.lax.stop_gradient(self.proposals(state, batch.obs, noise))).mean(axis=-1)
        heads = apply(self.critic(), state.params["critic"], batch.obs, jnp.clip(action, -1, 1))
        q = losses.value_of(heads, self.head).mean(axis=0)
        return losses.masked_mean(distance, happened), -losses.masked_mean(q, happened)

    def proposals(self, state: State, obs: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns the behaviour flow's chunks from this noise, clipped; of the noise's shape."""
        return jnp.clip(flow.euler(self.velocity(state.spec, state.params["flow"], obs), noise, self.flow_steps), -1, 1)

    def scores(self, state: State, obs: jax.Array, chunks: jax.Array) -> jax.Array:
        """Returns the online critic's aggregate for each chunk [..., D]."""
        return losses.aggregate(apply(self.critic(), state.params["critic"], obs, chunks), self.agg)

    def choose(self, state: State, obs: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns the policy's chunks [B, D] from this noise [B, N, D]."""
        if self.actor == "distill":
            return jnp.clip(self.one_step(state.spec, state.params["policy"], obs, noise[:, 0]), -1, 1)
        obs = repeat_for(noise, obs)
        candidates = self.proposals(state, obs, noise)
        return guidance.best_of(candidates, self.scores(state, obs, candidates))

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, H, A] from fresh noise; `greedy` changes nothing."""
        chunk = self.choose(state, obs, self.noise(state.spec, key, len(obs)))
        return common.unflatten(chunk, state.spec.action)
