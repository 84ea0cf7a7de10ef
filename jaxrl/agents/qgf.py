"""QGF: a behavior flow and an IQL critic, trained independently; at test time the critic guides the flow.

Paper: "Q-Guided Flow", arXiv 2606.11087. The flow learns the data's chunks, the critic learns with IQL (Kostrikov et
al., arXiv 2110.06169), both from the same batch. All improvement happens in `act`: see `guidance.QGuidance`, whose
weight is a Scalar, so that a grid of weights is one vmapped evaluation of one state.

Deliberate differences from the official code:
- The flow does not learn the actions after an episode's end (`mask_actor`); the official code does.
- Windows shortened by termination train the critic ("keep"), with the return and the discount of their steps; the
  official code drops them ("drop").
- The Jacobian is applied as one vector-Jacobian product; the official code builds the matrix. Equal, and cheaper.
- In goal-conditioned tasks the flow does not see the goal: it models the behavior, and the critic guides it.
"""

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import Adam, Critic, FlowPolicy, Net, Value, Windows, check_heads
from jaxrl.networks import repeat_for
from jaxrl.ops import flow, guidance, losses
from jaxrl.ops.flow import AverageVelocity
from jaxrl.ranges import Count, Fraction
from jaxrl.types import Batch, Metrics, Observation, PyTree, Spec, count_of, pytree


@pytree
class QGF:
    """Q-guided flow: behavior cloning and IQL, combined at test time."""

    windows: Windows = Windows(chunk=5, backup=5)
    flow: FlowPolicy = FlowPolicy(Net(norm="before_but_last"), "sinusoidal", 16)  # the behavior, v(s, a_t, t)
    critic: Critic = Critic(Net(norm="before"), agg="min")  # Q_j(s, chunk)
    value: Value = Value(Net(norm="before"))  # V(s)
    flow_adam: Adam = Adam()
    critic_adam: Adam = Adam()
    value_adam: Adam = Adam()
    expectile: Fraction = 0.9  # level of the value's expectile
    guide: guidance.QGuidance = guidance.QGuidance()  # how the critic guides the flow's Euler steps
    num_samples: Count = 1  # N: number of guided samples, of which the best is executed (QGF+BFN)
    mask_actor: bool = True  # whether the flow ignores actions after an episode's end

    chunk, requires, sample = shared.chunk, shared.requires, shared.sample
    td_target, update = shared.td_target, shared.update

    def check(self) -> None:
        """Raises UserError for inconsistent settings."""
        check_heads("QGF", self.critic, self.value)
        self.windows.goals.check_head(self.critic.head)

    def optimizer(self) -> optax.GradientTransformation:
        """Returns one Adam per network."""
        adams = {"flow": self.flow_adam, "critic": self.critic_adam, "value": self.value_adam}
        return optax.partition({name: adam.transformation() for name, adam in adams.items()}, {x: x for x in adams})

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_flow, key_critic, key_value = jax.random.split(key, 3)
        obs, chunk = spec.example(), jnp.zeros(self.chunk * spec.action)
        params = {
            "flow": self.flow.init(key_flow, spec.behaviour(obs), chunk),
            "critic": self.critic.init(key_critic, spec.critic(obs), chunk),
            "value": self.value.init(key_value, spec.critic(obs)),
        }
        return learner.create(spec, params, self.optimizer(), "critic")

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: the flow's noise, and its times on the grid {0, 1/T, ..., 1}."""
        key_noise, key_time = jax.random.split(key)
        noise = jax.random.normal(key_noise, (len(batch.actions), self.chunk * spec.action))
        times = jax.random.randint(key_time, (len(noise), 1), 0, self.flow.steps + 1) / self.flow.steps
        return {"x0": noise, "t": times}

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        loss = lambda params: self.loss(params, state, batch, draws)  # noqa: E731
        return learner.descend(state, loss, self.optimizer(), self.critic.tau, "critic")

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the sum of the three losses, which share no parameters, and the individual losses."""
        velocity = self.flow.velocity(params["flow"], state.spec.behaviour(batch.obs))
        cloning, (critic, value) = self.cloning(velocity, batch, draws), self.value_losses(params, state, batch)
        return cloning + critic + value, {"actor/flow_loss": cloning, "critic/loss": critic, "value/loss": value}

    def cloning(self, velocity: AverageVelocity, batch: Batch, draws: Draws) -> jax.Array:
        """Returns the loss of a flow that clones the behavior, |v(s, a_t, t) - (a - z)|^2."""
        matching = flow.matching_error(velocity, draws["x0"], self.windows.actions(batch), draws["t"])
        mask = self.windows.mask(batch)
        return losses.masked_mean(matching, mask if self.mask_actor else jnp.ones_like(mask))

    def value_losses(self, params: dict[str, PyTree], state: State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the losses of critic and value, as in IQL."""
        a, seen, whole = self.windows.actions(batch), state.spec.critic(batch.obs), self.windows.weight(batch)

        # the critic: (Q(s, a) - y)^2, averaged over the heads
        error = self.critic.error(params["critic"], seen, a, self.td_target(state, batch))
        critic = losses.masked_mean(error.mean(axis=0), whole)

        # the value is an expectile of the target critic at the data's chunks
        q = self.critic.value(state.target["critic"], seen, a)
        tilted = losses.tilted(self.value.output(params["value"], seen), q, self.expectile, self.value.head)
        return critic, losses.masked_mean(tilted, whole)

    def score(self, state: State, obs: Observation) -> guidance.Value:
        """Returns the target critic's score as a function of flat chunks, used for guidance and selection."""
        return lambda chunk: self.critic.score(state.target["critic"], state.spec.critic(obs), chunk)

    def choose(self, state: State, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns the best [B, D] of the N guided samples from this noise [B, N, D] (Algorithm 1)."""
        obs = repeat_for(noise, obs)
        velocity = self.flow.velocity(state.params["flow"], state.spec.behaviour(obs))
        candidates = self.guide.sample(velocity, self.score(state, obs), noise, self.flow.steps)
        return guidance.best_of(candidates, self.score(state, obs)(candidates))

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, H, A] of the guided flow; `greedy` has no effect."""
        noise = jax.random.normal(key, (count_of(obs), self.num_samples, self.chunk * state.spec.action))
        return learner.unflatten(self.choose(state, obs, noise), state.spec.action)
