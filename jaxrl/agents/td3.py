"""What the descendants of TD3 share: a deterministic actor, twin critics, and targets that follow them.

Paper: Fujimoto, van Hoof, Meger, "Addressing Function Approximation Error in Actor-Critic Methods", arXiv 1802.09477.
TD3+BC, ReBRAC, PRDC and A2PR differ in what holds the actor near the data, and say so in files of their own. They hand
themselves over as `agent`, whose fields these functions read.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import common
from jaxrl.agents.common import Draws, State
from jaxrl.networks import Critic, Policy, apply
from jaxrl.ops import losses
from jaxrl.replay.ring import Rings, windows
from jaxrl.types import Batch, PyTree, Scalar, Spec

if TYPE_CHECKING:
    from jaxrl.agents import A2PR, PRDC, TD3BC, ReBRAC

    TD3: TypeAlias = A2PR | PRDC | TD3BC | ReBRAC
else:
    TD3 = Any
"""An agent of this family."""


def check(agent: TD3) -> None:
    """Raises UserError where a value is out of range."""
    common.check_range(agent, **dict.fromkeys(("actor_hidden", "critic_hidden", "batch_size", "delay"), (1, None)))
    rates = ("actor_lr", "critic_lr", "target_noise", "noise_clip", "exploration")
    common.check_range(agent, **dict.fromkeys(rates, (0, None)), discount=(0, 1), tau=(0, 1))
    agent.goals.check()


def policy(agent: TD3, spec: Spec) -> Policy:
    """Returns pi(s)."""
    return Policy(spec.action, agent.actor_hidden, agent.actor_norm, agent.activation, initial=agent.initial)


def critics(agent: TD3, heads: int = 2) -> Critic:
    """Returns the twins Q_1(s, a) and Q_2(s, a)."""
    return Critic(heads, agent.critic_hidden, agent.critic_norm, agent.activation, agent.initial)


def init(agent: TD3, key: jax.Array, spec: Spec, **more: tuple[PyTree, Scalar]) -> State:
    """Returns the initial state; `more` are further networks of the agent, parameters and learning rate by name."""
    key_actor, key_critic = jax.random.split(key)
    obs, action = jnp.zeros(spec.observation), jnp.zeros(spec.action)
    nets = {
        "actor": (policy(agent, spec).init(key_actor, obs), agent.actor_lr),
        "critic": (critics(agent).init(key_critic, obs, action), agent.critic_lr),
        **more,
    }
    params = {name: net for name, (net, _) in nets.items()}
    return common.start_each(spec, params, {name: optax.adam(lr) for name, (_, lr) in nets.items()}, "actor", "critic")


def fit(agent: TD3, state: State, data: Rings) -> State:
    """Returns the state with the data's normaliser, where observations are to be normalised."""
    return common.fit(state, data) if agent.normalize else state


def sample(agent: TD3, data: Rings, key: jax.Array) -> Batch:
    """Returns a batch of transitions."""
    return windows(data, key, agent.batch_size, 1, agent.goals)


def draw(spec: Spec, batch: Batch, key: jax.Array) -> Draws:
    """Returns the random numbers of one update: the noise of the target actions."""
    return {"target_noise": jax.random.normal(key, (len(batch.obs), spec.action))}


def noisy(agent: TD3, action: jax.Array, noise: jax.Array, scale: Scalar) -> jax.Array:
    """Returns actions [B, A] with standard normal noise, scaled and clipped; within the box again."""
    return jnp.clip(action + jnp.clip(scale * noise, -agent.noise_clip, agent.noise_clip), -1, 1)


def target_action(agent: TD3, state: State, batch: Batch, draws: Draws) -> jax.Array:
    """Returns a' [B, A], the slow actor's action at the next state with clipped noise (section 5.3)."""
    action = apply(policy(agent, state.spec), state.target["actor"], batch.next_obs)
    return noisy(agent, action, draws["target_noise"], agent.target_noise)


def td_target(
    agent: TD3, critic: PyTree, batch: Batch, action: jax.Array, penalty: jax.Array | float = 0.0
) -> jax.Array:
    """Returns y [B]: the reward, and what the lower of two critics says of the next action, less a penalty."""
    next_value = apply(critics(agent), critic, batch.next_obs, action).min(axis=0) - penalty
    y = losses.td_target(batch.rewards, batch.steps, batch.terminated, next_value, agent.discount)
    return jax.lax.stop_gradient(y)


def critic_loss(agent: TD3, critic: PyTree, batch: Batch, y: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Returns the mean squared error of both critics against y [B], summed over the two (section 4.2)."""
    q = apply(critics(agent), critic, batch.obs, batch.actions[:, 0])
    weight = batch.valid[:, 0] if weight is None else weight
    return losses.masked_mean(jnp.square(q - y[None]).sum(axis=0), weight)


def first_q(agent: TD3, critic: PyTree, obs: jax.Array, action: jax.Array) -> jax.Array:
    """Returns Q_1(s, a) [B], without computing the other."""
    return apply(critics(agent, 1), jax.tree.map(lambda x: x[:1], critic), obs, action)[0]


def climb(q: jax.Array, alpha: Scalar, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the loss -lambda mean Q of values [B], and lambda = alpha / mean |Q|, which carries no gradient.

    So normalised, the weight between climbing and staying does not depend on the rewards' scale (Fujimoto and Gu,
    arXiv 2106.06860, equation 5).
    """
    weight = jax.lax.stop_gradient(alpha / jnp.abs(q).mean())
    return -weight * losses.masked_mean(q, batch.valid[:, 0]), weight


def choose(agent: TD3, state: State, obs: jax.Array) -> jax.Array:
    """Returns the actor's actions [B, A] for raw observations."""
    assert state.normalizer is not None
    return apply(policy(agent, state.spec), state.params["actor"], state.normalizer(obs))


def act(agent: TD3, state: State, obs: jax.Array, key: jax.Array, greedy: bool) -> jax.Array:
    """Returns actions as chunks [B, 1, A], with the noise of exploration unless `greedy`."""
    action = choose(agent, state, obs)
    if not greedy:
        action = noisy(agent, action, jax.random.normal(key, action.shape), agent.exploration)
    return action[:, None]
