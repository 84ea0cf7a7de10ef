"""Recording of datasets: a scripted behavior, executed on the device, in the compact layout of OGBench's files."""

import dataclasses

import jax
import numpy as np

from jaxrl.data.files import Dataset, from_columns, observation_columns
from jaxrl.errors import UserError
from jaxrl.replay import ring as rings
from jaxrl.replay.ring import Ring
from jaxrl.rollout import device as ro
from jaxrl.types import Behaviour, Env, EnvState, Explorable, HasBehaviours

LANES = 256  # environments recorded in parallel


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The random behavior, available for any environment: actions uniform in [-1, 1]."""

    size: int

    def start(self, state: EnvState, key: jax.Array) -> tuple[()]:
        """Returns an empty memory."""
        return ()

    def act(self, memory: tuple[()], state: EnvState, key: jax.Array) -> tuple[tuple[()], jax.Array]:
        """Returns one uniform action."""
        return memory, jax.random.uniform(key, (self.size,), minval=-1, maxval=1)


def behaviour_of(env: Env, level: str) -> Behaviour:
    """Returns the environment's scripted behavior; "random" exists for every environment."""
    if isinstance(env, HasBehaviours):
        return env.behaviour(level)
    if level == "random":
        return Uniform(env.spec.action)
    raise UserError(
        f"behaviour = {level!r}: {type(env).__name__} has no scripted behaviour, only 'random'; or give a data file"
    )


def record(env: Env, level: str, steps: int, seed: int) -> Dataset:
    """Returns at least `steps` transitions of a behavior, recorded in up to 256 parallel environments.

    For `types.Explorable` environments, the version for recording is used: episodes start anywhere and last for the
    horizon. In others, episodes can end early, and the last episode of each is truncated when the recording stops.
    """
    return to_dataset(recording(*arguments(env, level, steps), jax.random.key(seed)))


def arguments(env: Env, level: str, steps: int) -> tuple[Env, ro.Policy, int, int, int]:
    """Returns the arguments of `recording`, without the key."""
    each, lanes = lanes_of(steps, env.horizon)
    explored, episodes = (env.explore(), each // env.horizon) if isinstance(env, Explorable) else (env, each)
    rows = each + episodes + 2  # one per step, and one per episode for its last observation
    return explored, ro.scripted(behaviour_of(explored, level)), lanes, each, rows


def lanes_of(steps: int, horizon: int) -> tuple[int, int]:
    """Returns (steps per environment, environments) that record at least `steps` in whole episodes."""
    episodes = -(-steps // horizon)
    each = -(-episodes // LANES)
    return each * horizon, -(-episodes // each)


def _record(env: Env, policy: ro.Policy, lanes: int, steps: int, rows: int, key: jax.Array) -> Ring:
    key_start, key_bank, key_steps = jax.random.split(key, 3)
    rollout, bank = ro.start(env, policy, key_start, lanes), ro.resets(env, key_bank, lanes)
    ring = rings.empty(lanes, rows, env.spec)

    def body(carry: tuple[ro.Rollout, Ring], key: jax.Array) -> tuple[tuple[ro.Rollout, Ring], None]:
        rollout, step, _ = ro.advance(env, policy, carry[0], bank, key)
        return (rollout, rings.add(carry[1], step)), None

    (_, ring), _ = jax.lax.scan(body, (rollout, ring), jax.random.split(key_steps, steps))
    return ring


recording = jax.jit(_record, static_argnames=("env", "policy", "lanes", "steps", "rows"))


def to_dataset(ring: Ring) -> Dataset:
    """Returns the history of a ring that has not wrapped, lane by lane; unfinished episodes are truncated."""
    host = jax.tree.map(np.asarray, ring)
    parts = []
    for lane, count in enumerate(host.count):
        # The row at the head holds the newest observation, unless the row before it closed an episode.
        rows = count + 1 if count and host.valid[lane, count - 1] else count
        parts.append((lane, np.arange(rows)))
    columns = observation_columns(host.obs) | {
        "actions": host.actions,
        "terminals": ~host.valid,
        "rewards": host.rewards,
        "masks": 1 - host.terminated.astype(np.float32),
    }
    flat = {name: np.concatenate([column[part] for part in parts]) for name, column in columns.items()}
    # A non-finite step ends an episode; a single row directly after such an end is not an episode.
    alone = flat["terminals"] & np.concatenate([[True], flat["terminals"][:-1]])
    return from_columns({name: column[~alone] for name, column in flat.items()})
