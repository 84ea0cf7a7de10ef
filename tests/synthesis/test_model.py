"""Facts about jaxrl.synthesis.model: the learner, its learning rate and average, and the densities of policies."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import ranges
from jaxrl.errors import UserError
from jaxrl.ops.diffusion import Sampler, Scale
from jaxrl.synthesis.model import Generator, State, log_density_of
from jaxrl.synthesis.segments import Segments
from jaxrl.types import Learner, Spec, pytree
from tests.known import KEY, quick_to_compile, same


@pytest.fixture(autouse=True)
def quick():
    with quick_to_compile():
        yield


# Training


@pytree
class Slope(Generator):
    """A generator whose error has the gradient 1, so that Adam moves the parameter by the learning rate."""

    def error(self, params, tau, key):
        return params


def test_a_generator_is_a_learner_of_trajectories_of_states_actions_rewards_and_ends():
    generator = Generator(length=8, widths=(16,), batch_size=4)
    assert isinstance(generator, Learner)
    rows = jnp.tile(jnp.arange(30.0)[:, None], (1, 6))
    data = Segments(8, rows, jnp.array([3, 20]), Scale(3, 1, jnp.zeros(6), jnp.ones(6)))
    state = jax.jit(Generator.init, static_argnames="spec")(generator, KEY, Spec(3, 1))
    batch = generator.sample(data, KEY)
    assert batch.shape == (4, 8, 6) and set(np.asarray(batch[:, 0, 0])) == {3.0, 20.0}
    after, metrics = jax.jit(generator.update)(state, batch, KEY, data)
    assert int(after.step) == 1 and metrics.keys() == {"error"}
    again, _ = jax.jit(generator.update)(state, batch, KEY)
    assert same(after.params, again.params) and not same(after.params, state.params)


def test_the_learning_rate_rises_and_falls_and_the_average_follows_slowly():
    generator = Slope(updates=100, lr=1e-2, ema=0.6, ema_every=10)
    start = jnp.float32(1)
    state = State(start, start, generator.optimizer.init(start), jnp.zeros((), jnp.int32), KEY)

    @jax.jit
    def train(state):
        def step(state, _):
            state, _ = generator.update(state, jnp.zeros((1, 8, 5)), KEY)
            return state, state

        return jax.lax.scan(step, state, None, 100)[1]

    states = train(state)
    moves = -np.diff(np.concatenate([[1.0], states.params]))
    rise = 1e-3 + np.arange(10) / 10 * 9e-3
    fall = 1e-2 * (1 + np.cos(np.pi * np.arange(90) / 90)) / 2
    np.testing.assert_allclose(moves, [*rise, *fall], atol=1e-6)
    average = 1.0
    for i in range(1, 11):  # a tenth, two elevenths, ... of the old one is kept, at most 0.6
        average += (1 - min(i / (i + 9), 0.6)) * (states.params[10 * i - 1] - average)
        np.testing.assert_allclose(states.ema[10 * i - 1 : 10 * i + 9], average, rtol=1e-5)


def test_updates_are_split_into_epochs_that_a_stop_need_not_wait_long_for():
    assert [Generator(updates=count).epochs for count in (1, 500, 501, 10_000)] == [
        (1, 1),
        (1, 500),
        (2, 251),
        (20, 500),
    ]


# The density of a policy


@pytree
class Still:
    """An agent that does the same everywhere: what its state says."""

    chunk: int = 1

    def act(self, state, obs, key, *, greedy=False):
        assert greedy
        return jnp.full((len(obs), 2, 1), state).at[:, 1:].set(7.0)  # only the first action of a chunk counts


@pytree
class Known(Still):
    """An agent that knows its density."""

    def log_density(self, state, obs, action):
        return state * obs[:, 0] + action[:, 0]


def test_an_agents_own_density_counts_else_a_unit_gaussian_around_its_first_greedy_action():
    obs, action = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0.1], [0.9]])
    density = log_density_of(Still(), jnp.float32(0.4))(obs, action)
    np.testing.assert_allclose(
        density, [-(0.3**2) / 2 - math.log(2 * math.pi) / 2, -(0.5**2) / 2 - 0.9189385], rtol=1e-5
    )
    np.testing.assert_allclose(log_density_of(Known(), jnp.float32(2.0))(obs, action), [2.1, 6.9], rtol=1e-6)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Generator(length=1), "Generator.length = 1: must be at least 2"),
        (Generator(stride=0), "Generator.stride = 0: must be at least 1"),
        (Generator(ema_every=0), "Generator.ema_every = 0: must be at least 1"),
        (Generator(lr=float("inf")), "Generator.lr = inf: must be finite"),
        (Generator(ema=1.0), r"Generator.ema = 1.0: must be in \[0, 0.999999\]"),
        (Generator(widths=()), r"Generator.widths = \(\): must be multiples of 8, the first at least 16"),
        (Generator(widths=(8, 16)), r"Generator.widths = \(8, 16\): must be multiples of 8, the first at least 16"),
        (Generator(widths=(64, 20)), r"Generator.widths = \(64, 20\): must be multiples of 8"),
        (Generator(widths=(16, 4)), r"Generator.widths = \(16, 4\): must be at least 8"),
        (Generator(length=3, widths=(16, 16, 16)), "Generator.length = 3: must be at least 4, since each of 3 widths"),
        (Sampler(denoising_steps=1), "Sampler.denoising_steps = 1: must be at least 2"),
        (Sampler(churn=-0.1), "Sampler.churn = -0.1: must be at least 0"),
        (Sampler(guidance=float("nan")), "Sampler.guidance = nan: must be finite"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ranges.check(settings)


def test_the_defaults_are_in_range():
    ranges.check(Generator())
    ranges.check(Sampler())
