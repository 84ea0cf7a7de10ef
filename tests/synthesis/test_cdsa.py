"""Facts about the correction towards dense data: closed forms of the score and the correction, and what is learned."""

import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from jaxrl import ranges
from jaxrl.agents.parts import Critic, DeterministicPolicy, Net
from jaxrl.agents.td3 import TD3
from jaxrl.agents.td3bc import TD3BC
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.replay import ring as rings
from jaxrl.replay.loading import from_dataset
from jaxrl.rollout import device as rollout
from jaxrl.synthesis import cdsa
from jaxrl.synthesis.cdsa import Correction, Training
from jaxrl.training import loop
from jaxrl.types import Fitting, Leaf, Learner, Spec
from tests.known import KEY, fitted

pytestmark = pytest.mark.usefixtures("quick")

SPEC = Spec(observation=2, action=2)
kernel_score = jax.jit(cdsa.kernel_score)


# The score


def test_the_score_of_two_points_points_to_the_nearer_and_vanishes_halfway():
    points = jnp.array([[0.0, 0.0], [1.0, 0.0]])
    halfway, near = kernel_score(jnp.array([[0.5, 0.3], [0.1, 0.3]]), points, 0.2)
    np.testing.assert_allclose(halfway, [0.0, -0.3 / 0.04], rtol=1e-4, atol=1e-4)
    weight = 1 / (1 + np.exp((0.01 - 0.81) / 0.08))
    np.testing.assert_allclose(near, [(1 - weight - 0.1) / 0.04, -0.3 / 0.04], rtol=1e-4)
    assert near[0] < 0  # to the first


def test_the_score_is_the_gradient_of_the_log_density_of_the_noisy_data():
    rng = np.random.default_rng(0)
    data, x = (jnp.asarray(rng.normal(size=(n, 3)), jnp.float32) for n in (20, 7))

    def log_density(x):
        return jax.nn.logsumexp(jax.scipy.stats.norm.logpdf(x[None], data, 0.5).sum(axis=-1))

    np.testing.assert_allclose(
        kernel_score(x, data, 0.5), jax.jit(jax.vmap(jax.grad(log_density)))(x), rtol=1e-3, atol=1e-4
    )


def test_tweedies_formula_is_the_mean_of_the_clean_points():
    data = jnp.array([[0.0], [2.0], [3.0]])
    x = jnp.array([[1.2]])
    weight = np.exp(-np.square(np.asarray(data)[:, 0] - 1.2) / (2 * 0.49))
    mean = np.sum(weight * np.asarray(data)[:, 0]) / weight.sum()
    assert float(x[0, 0] + 0.49 * kernel_score(x, data, 0.7)[0, 0]) == pytest.approx(mean, rel=1e-5)


def test_a_linear_score_learns_that_of_a_gaussian():
    rng = np.random.default_rng(1)
    mixing, centre, sigma = np.array([[0.6, 0.0], [0.5, 0.3]]), np.array([0.4, -0.2]), 0.5
    x = rng.normal(size=(512, 2)) @ mixing.T + centre
    noise = rng.normal(size=(512, 2))
    noise = np.concatenate([noise, -noise])
    noisy = jnp.asarray(np.concatenate([x, x]) + sigma * noise, jnp.float32)
    level = jnp.full((1024, 1), sigma)

    def loss(params):
        return (
            jnp.square(cdsa.denoised_noise((), params, noisy, level) - jnp.asarray(noise, jnp.float32)).sum(-1).mean()
        )

    params = {"params": {"Dense_0": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}}
    params = fitted(loss, params, 600)
    at = jnp.array([[0.4, -0.2], [1.0, 0.0], [0.0, 0.5]])
    score = -cdsa.denoised_noise((), params, at, jnp.full((3, 1), sigma)) / sigma
    covariance = mixing @ mixing.T + sigma**2 * np.eye(2)
    known = -(np.asarray(at) - centre) @ np.linalg.inv(covariance)
    np.testing.assert_allclose(score, known, atol=0.25)  # of 512 points
    empirical = np.linalg.lstsq(np.column_stack([noisy, np.ones(1024)]), noise, rcond=None)[0]
    np.testing.assert_allclose(score, -np.column_stack([at, np.ones(3)]) @ empirical / sigma, atol=2e-3)


# The correction

B = np.array([[0.5, 0.2], [-0.1, 0.4]])


def inverse(states, change):
    """The inverse of s' = s + B a."""
    del states
    return change @ jnp.asarray(np.linalg.inv(B).T, jnp.float32)


def score_of(g_s, g_a):
    def score(states, actions, sigma):
        return jnp.broadcast_to(jnp.asarray(g_s), states.shape), jnp.broadcast_to(jnp.asarray(g_a), actions.shape)

    return score


def corrected(actions, score, correction, states=None):
    act = cdsa.correct(lambda obs, key: actions[:, None], score, inverse, correction, SPEC)
    return act(jnp.zeros_like(actions) if states is None else states, KEY)[:, 0]


def test_the_states_gradient_becomes_the_action_that_moves_the_next_state_along_it():
    g_s = np.array([0.8, -0.5])
    found = corrected(jnp.zeros((1, 2)), score_of(g_s[None], [[5.0, 5.0]]), Correction(0.0, 0.5, kappa=0.3))
    np.testing.assert_allclose(found[0], 0.5 * 0.3 * np.linalg.inv(B) @ g_s, rtol=1e-5)


def test_with_strength_one_the_action_is_denoised():
    data = np.array([[0.0, 0.0, 0.5, -0.5], [0.1, 0.0, -0.9, 0.9]])

    def score(states, actions, sigma):
        gradient = cdsa.kernel_score(jnp.concatenate([states, actions], axis=1), jnp.asarray(data, jnp.float32), sigma)
        return gradient[:, :2], gradient[:, 2:]

    x = np.array([0.05, 0.0, 0.2, 0.0])
    weight = np.exp(-np.square(data - x).sum(axis=1) / (2 * 0.25))
    clean = (weight[:, None] * data).sum(axis=0) / weight.sum()
    states, actions = jnp.asarray(x[None, :2], jnp.float32), jnp.asarray(x[None, 2:], jnp.float32)
    found = corrected(actions, score, Correction(1.0, 0.0, sigma=0.5), states)
    np.testing.assert_allclose(found[0], clean[2:], rtol=1e-4)
    again = corrected(found, score, Correction(1.0, 0.0, sigma=0.5), states)
    twice = corrected(actions, score, Correction(1.0, 0.0, sigma=0.5, steps=2), states)
    np.testing.assert_allclose(twice, again, rtol=1e-5)


def test_without_strength_a_policy_is_left_as_it_is_bit_for_bit():
    actions = jnp.array([[0.3, -0.0], [-1.0, 1.0]])
    found = corrected(actions, score_of([[jnp.nan, jnp.inf]], [[jnp.inf, 1.0]]), Correction(0.0, 0.0))
    assert np.asarray(found).tobytes() == np.asarray(actions).tobytes()


def test_corrected_actions_stay_in_the_box():
    actions = jax.random.uniform(KEY, (50, 2), minval=-1)
    found = corrected(actions, score_of([[30.0, 5.0]], [[900.0, -900.0]]), Correction(1.0, 1.0, steps=3))
    assert float(jnp.abs(found).max()) == 1


def test_a_corrected_policy_is_pure_and_many_strengths_are_one_program():
    actions, score = jnp.zeros((3, 2)), score_of([[1.0, 0.0]], [[0.0, 2.0]])
    sweep = jax.jit(jax.vmap(lambda w: cdsa.moved(actions, actions, score, inverse, Correction(w, 0.0))))
    np.testing.assert_allclose(sweep(jnp.array([0.0, 0.5, 1.0]))[:, 0, 1], [0, 0.01, 0.02], rtol=1e-5)


# What is learned


def walk() -> tuple[Dataset, rings.Ring]:
    """Returns episodes of s' = s + B a with actions near those that a linear policy takes."""
    rng, states, actions = np.random.default_rng(2), [], []
    for _ in range(40):
        s = rng.uniform(-1, 1, 2)
        for _ in range(21):
            a = np.clip(-0.5 * s + 0.1 * rng.normal(size=2), -1, 1)
            states.append(s)
            actions.append(a)
            s = s + B @ a
    columns = (np.array(x, np.float32) for x in (states, actions))
    data = Dataset(*columns, np.arange(40 * 21) % 21 == 20)
    return data, from_dataset(data, np.zeros(840), np.zeros(840, bool))


def test_what_is_learned_moves_actions_to_the_data_and_inverts_the_dynamics():
    data, ring = walk()
    training = Training(score_hidden=(32, 32), inverse_hidden=(32,), lr=3e-3, batch_size=128, sigma_low=0.1)
    models, _ = jax.jit(cdsa.train, static_argnames=("spec", "updates"))(training, SPEC, ring, KEY, updates=900)
    more = jax.jit(loop.updates, static_argnames="count")
    models, losses = more(training, models, (ring,), jax.random.key(1), count=100)
    inside = ~data.terminals
    np.testing.assert_allclose(models.normalizer.mean, data.observations[inside].mean(axis=0), atol=1e-5)
    change = np.diff(data.observations, axis=0, append=0)[inside] / data.observations[inside].std(axis=0)
    np.testing.assert_allclose(models.change, np.sqrt(np.square(change).mean(axis=0)), rtol=1e-2)
    assert float(losses["score/loss"]) < 0.9 * 4 and float(losses["inverse/loss"]) < 0.01

    states = jnp.asarray(data.observations[inside][::20])
    wild = jnp.asarray(np.clip(data.actions[inside][::20] + 0.4, -1, 1))

    @jax.jit
    def better(states, wild):
        act = cdsa.correct(
            lambda obs, key: wild[:, None], models.score, models.inverse, Correction(1.0, 0.0, sigma=0.3), SPEC
        )
        return act(states, KEY)[:, 0]

    before, after = (np.abs(np.asarray(a) + 0.5 * np.asarray(states)).mean() for a in (wild, better(states, wild)))
    assert after < 0.6 * before


def test_the_example_of_the_documentation_runs():
    example = (
        textwrap.dedent(inspect.getdoc(cdsa).split("ring:\n\n")[1]).replace("100_000", "3").replace(", 100)", ", 2)")
    )
    assert "correct" in example
    small = Net((4,), "relu", "none", "torch")
    env, agent = envs.make("point?horizon=5"), TD3BC(TD3(DeterministicPolicy(small), Critic(small, agg="min")))
    _, ring = walk()
    known = {
        "jax": jax,
        "rollout": rollout,
        "env": env,
        "agent": agent,
        "state": agent.init(KEY, env.spec),
        "ring": ring,
    }
    example = example.replace("cdsa.Training()", "cdsa.Training(score_hidden=(4,), inverse_hidden=(4,), batch_size=8)")
    exec(example, known)
    assert known["before"].lengths.shape == known["after"].lengths.shape == (2,)
    assert not np.array_equal(known["before"].track, known["after"].track)


def test_the_models_learn_in_the_one_loop_of_updates_after_they_have_seen_the_data():
    _, ring = walk()
    training = Training(score_hidden=(4,), inverse_hidden=(4,), batch_size=8)
    assert isinstance(training, Learner) and isinstance(training, Fitting)
    key_init, key_updates = jax.random.split(KEY)
    begun = training.init(key_init, SPEC)
    np.testing.assert_array_equal([begun.normalizer.std, begun.change], 1)
    models, _ = jax.jit(cdsa.train, static_argnames=("spec", "updates"))(training, SPEC, ring, KEY, updates=3)
    count = jax.jit(loop.updates, static_argnames="count")
    again, _ = count(training, jax.jit(training.fit)(begun, (ring,)), (ring,), key_updates, count=3)
    np.testing.assert_allclose(
        models.params["score"]["params"]["Dense_0"]["kernel"],
        again.params["score"]["params"]["Dense_0"]["kernel"],
        rtol=1e-5,
        atol=1e-7,
    )


# What is refused


def test_observations_in_a_dict_are_refused():
    with pytest.raises(UserError, match="these observations are a dict of arrays"):
        Training().init(KEY, Spec((Leaf("state", (2,)),), 2))


def test_chunks_are_refused():
    act = cdsa.correct(
        lambda obs, key: jnp.zeros((1, 3, 2)), score_of([[0.0] * 2], [[0.0] * 2]), inverse, Correction(1, 1), SPEC
    )
    with pytest.raises(UserError, match="the policy has chunks of 3: train chunk = 1"):
        act(jnp.zeros((1, 2)), KEY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Correction(-0.1, 0.0), "Correction.action = -0.1: must be at least 0"),
        (Correction(0.0, -1.0), "Correction.state = -1.0"),
        (Correction(0.0, 0.0, steps=0), "Correction.steps = 0: must be at least 1"),
        (Training(sigma_low=0.0), "Training.sigma_low = 0.0"),
        (Training(sigma_low=0.5, sigma_high=0.1), "Training.sigma_high = 0.1: must be at least 0.5"),
        (Training(score_hidden=(8, 0)), r"Training.score_hidden = \(8, 0\): must be at least 1"),
        (Training(lr=float("nan")), "Training.lr = nan: must be finite"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ranges.check(settings)
