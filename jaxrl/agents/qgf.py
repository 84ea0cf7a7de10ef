"""QGF: a behaviour flow and an IQL critic that never meet in training; the critic steers the flow while it denoises.

Paper: "Q-Guided Flow", arXiv 2606.11087. The flow learns the data's chunks, the critic learns with IQL (Kostrikov et
al., arXiv 2110.06169), both from the same batch. All improvement happens in `act`: see `guidance.QGuidance`, whose
weight is a number, so that a grid of weights is one vmapped evaluation of one state.

Deliberate differences from the official code:
- The flow does not learn the actions after an episode's end (`mask_actor`); the official code does.
- Windows that termination cuts short train the critic ("keep"), with the return and the discount of the steps that
  they have; the official code drops them ("drop").
- The Jacobian is pulled back by one reverse pass, where the official code builds the matrix. Equal, and cheaper.
- In goal-conditioned tasks the flow does not see the goal: it is a behaviour, and the critic gives it direction.
"""

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


@pytree
class QGF:
    """Q-guided flow: behaviour cloning and IQL, joined at test time."""

    chunk: int = 5  # H: actions per decision, executed open loop
    backup: int = 5  # steps of the return in the TD target, at least `chunk`
    actor_hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of the flow
    critic_hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of each critic head and of the value
    activation: Activation = "gelu"  # of all networks
    actor_norm: Norm = "before_but_last"  # layer norm in the flow
    critic_norm: Norm = "before"  # layer norm in critic and value
    time: TimeFeatures = "sinusoidal"  # how the flow sees the time
    time_size: int = 16  # number of time features
    critics: int = 2  # number of critic heads
    head: losses.Head = "mse"  # whether critic and value say values, or logits of probabilities
    agg: losses.Aggregate = "min"  # how the heads are combined
    batch_size: int = 256  # windows per update
    actor_lr: Scalar = 3e-4  # learning rate of the flow
    critic_lr: Scalar = 3e-4  # learning rate of the critic
    value_lr: Scalar = 3e-4  # learning rate of the value
    discount: Scalar = 0.99  # gamma, per environment step
    tau: Scalar = 0.005  # polyak rate of the target critic
    expectile: Scalar = 0.9  # level of the value's expectile
    flow_steps: int = 10  # T: euler steps from noise to action
    guide: guidance.QGuidance = guidance.QGuidance()  # how the critic steers them
    num_samples: int = 1  # N: guided samples of which the best is acted on (QGF+BFN)
    cut_windows: CutWindows = "keep"  # whether windows that termination cuts short train the critic
    mask_actor: bool = True  # whether the flow ignores what follows an episode's end
    goals: Goals = Goals()  # how goals are drawn where the task has some

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        counts = ("chunk", "actor_hidden", "critic_hidden", "critics", "batch_size", "flow_steps", "num_samples")
        common.check_range(self, **dict.fromkeys(counts, (1, None)), backup=(self.chunk, None), time_size=(2, None))
        common.check_range(self, actor_lr=(0, None), critic_lr=(0, None), value_lr=(0, None))
        common.check_range(self, discount=(0, 1), tau=(0, 1), expectile=(0, 1))
        common.check_range(self.guide, weight=(0, None), ascent_steps=(0, None), ascent_size=(0, None))
        common.check_goals(self)

    def actor(self, spec: Spec) -> Velocity:
        """Returns the behaviour flow's velocity v(s, a_t, t)."""
        size = self.chunk * spec.action
        return Velocity(size, self.actor_hidden, self.actor_norm, self.activation, self.time, self.time_size)

    def critic(self) -> Critic:
        """Returns the heads Q_j(s, chunk)."""
        return Critic(self.critics, self.critic_hidden, self.critic_norm, self.activation)

    def value(self) -> Value:
        """Returns V(s)."""
        return Value(self.critic_hidden, self.critic_norm, self.activation)

    def optimizer(self) -> optax.GradientTransformation:
        """Returns one Adam per network."""
        rates = {"actor": self.actor_lr, "critic": self.critic_lr, "value": self.value_lr}
        return optax.partition({name: optax.adam(rate) for name, rate in rates.items()}, {name: name for name in rates})

    def velocity(self, spec: Spec, params: PyTree, obs: jax.Array) -> flow.AverageVelocity:
        """Returns the flow as a function v(x, r, t) of flat chunks, at time t; its observations are closed over."""
        states = common.without_goal(obs, spec)
        return lambda x, r, t: apply(self.actor(spec), params, states, x, t)

    def heads(self, params: PyTree, obs: jax.Array) -> guidance.Heads:
        """Returns the critic's outputs as a function of flat chunks, its observations closed over."""
        return lambda action: apply(self.critic(), params, obs, action)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_actor, key_critic, key_value = jax.random.split(key, 3)
        obs, chunk = jnp.zeros(spec.observation), jnp.zeros(self.chunk * spec.action)
        params = {
            "actor": self.actor(spec).init(key_actor, common.without_goal(obs, spec), chunk, jnp.zeros(1)),
            "critic": self.critic().init(key_critic, obs, chunk),
            "value": self.value().init(key_value, obs),
        }
        return common.start(spec, params, self.optimizer())

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of windows."""
        return windows(data, key, self.batch_size, self.backup, self.goals)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after one gradient step of each network and one Polyak step."""
        return self.learn(state, batch, self.draw(state.spec, batch, key))

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: the flow's noise, and its times on the grid {0, 1/T, ..., 1}."""
        key_noise, key_time = jax.random.split(key)
        noise = jax.random.normal(key_noise, (len(batch.obs), self.chunk * spec.action))
        times = jax.random.randint(key_time, (len(noise), 1), 0, self.flow_steps + 1) / self.flow_steps
        return {"x0": noise, "t": times}

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        return common.descend(state, lambda p: self.loss(p, state, batch, draws), self.optimizer(), self.tau)

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the sum of the three losses, which share no parameter, and what each of them is."""
        actor = self.cloning_loss(params["actor"], state.spec, batch, draws)
        critic = self.critic_loss(params["critic"], state, batch)
        value = self.value_loss(params["value"], state, batch)
        return actor + critic + value, {"actor/flow_loss": actor, "critic/loss": critic, "value/loss": value}

    def cloning_loss(self, actor: PyTree, spec: Spec, batch: Batch, draws: Draws) -> jax.Array:
        """Returns the flow-matching loss of the behaviour."""
        x1 = common.flat_actions(batch, self.chunk)
        error = flow.matching_error(self.velocity(spec, actor, batch.obs), draws["x0"], x1, draws["t"])
        mask = common.step_mask(batch, self.chunk)
        return losses.masked_mean(error, mask if self.mask_actor else jnp.ones_like(mask))

    def td_target(self, state: State, batch: Batch) -> jax.Array:
        """Returns y [B], the return of the window and the online value after it."""
        next_value = losses.value_of(apply(self.value(), state.params["value"], batch.next_obs), self.head)
        y = losses.td_target(batch.rewards, batch.steps, batch.terminated, next_value, self.discount)
        return losses.bounded(y, self.head)

    def critic_loss(self, critic: PyTree, state: State, batch: Batch) -> jax.Array:
        """Returns the TD loss, averaged over the heads."""
        output = self.heads(critic, batch.obs)(common.flat_actions(batch, self.chunk))
        error = losses.regression(output, self.td_target(state, batch)[None], self.head)
        return losses.masked_mean(error.mean(axis=0), common.critic_weight(batch, self.chunk, self.cut_windows))

    def value_loss(self, value: PyTree, state: State, batch: Batch) -> jax.Array:
        """Returns the expectile loss of V against the target critic from before this update."""
        heads = self.heads(state.target, batch.obs)(common.flat_actions(batch, self.chunk))
        q = losses.aggregate(losses.value_of(heads, self.head), self.agg)
        error = losses.tilted(apply(self.value(), value, batch.obs), q, self.expectile, self.head)
        return losses.masked_mean(error, common.critic_weight(batch, self.chunk, self.cut_windows))

    def score(self, state: State, obs: jax.Array) -> guidance.Value:
        """Returns the slow critic's aggregate (of logits, if it says those) by chunk: what guides, and what chooses."""
        return lambda action: losses.aggregate(self.heads(state.target, obs)(action), self.agg)

    def choose(self, state: State, obs: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns the best [B, D] of the N guided samples that the noise [B, N, D] gives (Algorithm 1)."""
        obs = repeat_for(noise, obs)
        velocity = self.velocity(state.spec, state.params["actor"], obs)
        candidates = self.guide.sample(velocity, self.score(state, obs), noise, self.flow_steps)
        return guidance.best_of(candidates, self.score(state, obs)(candidates))

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, H, A] of the guided flow; `greedy` changes nothing."""
        noise = jax.random.normal(key, (len(obs), self.num_samples, self.chunk * state.spec.action))
        return common.unflatten(self.choose(state, obs, noise), state.spec.action)
