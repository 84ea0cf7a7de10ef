"""FQL: a behaviour flow, and a one-step policy that is distilled from it while it climbs the critic.

Paper: Park, Li, Levine, "Flow Q-Learning", arXiv 2502.02538. The flow v(s, a_t, t) clones the data. The one-step
policy mu(s, z) stays near the flow's ten-step solution F(s, z) of the same noise, which bounds a Wasserstein distance
to the behaviour, and maximises Q: no gradient passes through the flow's steps, and acting takes one network call.

Deliberate differences from the official code:
- Chunks of actions and n-step returns, as in Q-chunking; with chunk = backup = 1 it is FQL as published.
- In goal-conditioned tasks the flow does not see the goal, the policy and the critic do.
- `head="bce"` learns probabilities of success instead of values.
"""

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import common
from jaxrl.agents.common import CutWindows, Draws, State
from jaxrl.networks import Activation, Critic, Norm, TimeFeatures, Velocity, apply
from jaxrl.ops import flow, losses
from jaxrl.replay.hindsight import Goals
from jaxrl.replay.ring import Rings, windows
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree


@pytree
class FQL:
    """Flow Q-learning: a one-step policy between a behaviour flow and a critic."""

    chunk: int = 1  # H: actions per decision, executed open loop
    backup: int = 1  # steps of the return in the TD target, at least `chunk`
    actor_hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of flow and policy
    critic_hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of each critic head
    activation: Activation = "gelu"  # of all networks
    actor_norm: Norm = "none"  # layer norm in flow and policy
    critic_norm: Norm = "after"  # layer norm in the critic
    time: TimeFeatures = "raw"  # how the flow sees the time
    time_size: int = 64  # number of time features, unless raw
    critics: int = 2  # number of critic heads
    head: losses.Head = "mse"  # whether the critic says values, or logits of probabilities
    agg: losses.Aggregate = "mean"  # how the heads are combined in the TD target
    batch_size: int = 256  # windows per update
    lr: Scalar = 3e-4  # learning rate of Adam
    discount: Scalar = 0.99  # gamma, per environment step
    tau: Scalar = 0.005  # polyak rate of the target critic
    flow_steps: int = 10  # euler steps from noise to action
    alpha: Scalar = 10.0  # weight of the distillation; to be tuned per task
    normalize_q: bool = False  # whether the critic's scale is divided out of the policy's loss
    cut_windows: CutWindows = "keep"  # whether windows that termination cuts short train the critic
    goals: Goals = Goals()  # how goals are drawn where the task has some

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        counts = ("chunk", "actor_hidden", "critic_hidden", "critics", "batch_size", "flow_steps")
        common.check_range(self, **dict.fromkeys(counts, (1, None)), backup=(self.chunk, None), time_size=(4, None))
        common.check_range(self, lr=(0, None), alpha=(0, None), discount=(0, 1), tau=(0, 1))
        common.check_goals(self)

    def behaviour(self, spec: Spec) -> Velocity:
        """Returns the behaviour flow's velocity v(s, a_t, t)."""
        size = self.chunk * spec.action
        return Velocity(size, self.actor_hidden, self.actor_norm, self.activation, self.time, self.time_size)

    def policy(self, spec: Spec) -> Velocity:
        """Returns the one-step policy mu(s, z)."""
        return Velocity(self.chunk * spec.action, self.actor_hidden, self.actor_norm, self.activation)

    def critic(self) -> Critic:
        """Returns the heads Q_j(s, a)."""
        return Critic(self.critics, self.critic_hidden, self.critic_norm, self.activation)

    def q(self, params: PyTree, obs: jax.Array, action: jax.Array) -> jax.Array:
        """Returns the heads' values, [K, B]."""
        return losses.value_of(apply(self.critic(), params, obs, action), self.head)

    def velocity(self, spec: Spec, params: PyTree, obs: jax.Array) -> flow.AverageVelocity:
        """Returns the flow as a function v(x, r, t) of flat chunks, at time t; its observations are closed over."""
        states = common.without_goal(obs, spec)
        return lambda x, r, t: apply(self.behaviour(spec), params, states, x, t)

    def one_step(self, spec: Spec, params: PyTree, obs: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns the one-step policy's chunks mu(s, z) [B, D], not clipped."""
        return apply(self.policy(spec), params, obs, noise)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_flow, key_policy, key_critic = jax.random.split(key, 3)
        obs, action = jnp.zeros(spec.observation), jnp.zeros(self.chunk * spec.action)
        params = {
            "flow": self.behaviour(spec).init(key_flow, common.without_goal(obs, spec), action, jnp.zeros(1)),
            "policy": self.policy(spec).init(key_policy, obs, action),
            "critic": self.critic().init(key_critic, obs, action),
        }
        return common.start(spec, params, optax.adam(self.lr))

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of windows."""
        return windows(data, key, self.batch_size, self.backup, self.goals)

    def update(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """Returns the state after one joint gradient step and one Polyak step."""
        return self.learn(state, batch, self.draw(state.spec, batch, key))

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update."""
        key_next, key_noise, key_time, key_distill = jax.random.split(key, 4)
        shape = (len(batch.obs), self.chunk * spec.action)
        return {
            "next_noise": jax.random.normal(key_next, shape),
            "x0": jax.random.normal(key_noise, shape),
            "t": jax.random.uniform(key_time, (len(batch.obs), 1)),
            "distill_noise": jax.random.normal(key_distill, shape),
        }

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        return common.descend(state, lambda p: self.loss(p, state, batch, draws), optax.adam(self.lr), self.tau)

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the sum of all losses and what each of them is."""
        critic = self.critic_loss(params["critic"], state, batch, draws)
        cloning = self.cloning_loss(params["flow"], state.spec, batch, draws)
        distillation, climb = self.policy_losses(params["policy"], state, batch, draws)
        metrics = {"critic/loss": critic, "actor/flow_loss": cloning}
        metrics |= {"actor/distillation_loss": distillation, "actor/q_loss": climb}
        return critic + cloning + self.alpha * distillation + climb, metrics

    def td_target(self, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns y [B], the return of the window and what the policy's action is worth after it."""
        action = self.choose(state, batch.next_obs, draws["next_noise"])
        next_value = losses.aggregate(self.q(state.target, batch.next_obs, action), self.agg)
        y = losses.td_target(batch.rewards, batch.steps, batch.terminated, next_value, self.discount)
        return losses.bounded(y, self.head)

    def critic_loss(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns the TD loss, averaged over the heads."""
        output = apply(self.critic(), critic, batch.obs, common.flat_actions(batch, self.chunk))
        error = losses.regression(output, self.td_target(state, batch, draws)[None], self.head)
        return losses.masked_mean(error.mean(axis=0), common.critic_weight(batch, self.chunk, self.cut_windows))

    def cloning_loss(self, params: PyTree, spec: Spec, batch: Batch, draws: Draws) -> jax.Array:
        """Returns the flow-matching loss of the behaviour."""
        x1 = common.flat_actions(batch, self.chunk)
        error = flow.matching_error(self.velocity(spec, params, batch.obs), draws["x0"], x1, draws["t"])
        return losses.masked_mean(error, common.step_mask(batch, self.chunk))

    def policy_losses(self, params: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, jax.Array]:
        """Returns the distance of mu(s, z) to F(s, z), and minus the value of mu(s, z) clipped."""
        noise, happened = draws["distill_noise"], batch.valid[:, 0]
        action = self.one_step(state.spec, params, batch.obs, noise)
        distance = jnp.square(action - jax.lax.stop_gradient(self.flow_actions(state, batch.obs, noise))).mean(axis=-1)
        q = self.q(state.params["critic"], batch.obs, jnp.clip(action, -1, 1)).mean(axis=0)
        scale = jax.lax.stop_gradient(1 / jnp.abs(q).mean()) if self.normalize_q else 1.0
        return losses.masked_mean(distance, happened), -scale * losses.masked_mean(q, happened)

    def flow_actions(self, state: State, obs: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns F(s, z) [B, D], the behaviour flow's actions from this noise, clipped."""
        return jnp.clip(flow.euler(self.velocity(state.spec, state.params["flow"], obs), noise, self.flow_steps), -1, 1)

    def choose(self, state: State, obs: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns the policy's actions [B, D] from this noise, clipped."""
        return jnp.clip(self.one_step(state.spec, state.params["policy"], obs, noise), -1, 1)

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, H, A] from fresh noise; `greedy` changes nothing."""
        noise = jax.random.normal(key, (len(obs), self.chunk * state.spec.action))
        return common.unflatten(self.choose(state, obs, noise), state.spec.action)
