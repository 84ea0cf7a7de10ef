"""Facts about jaxrl.ops.guidance: normalised ascent, the trust region's closed form, and the cost of beam search."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.ops import flow, guidance
from jaxrl.ops.guidance import BeamSearch, QGuidance

NEAR = jnp.array([0.3, -0.2])


def two_heads(actions):
    """Returns Q_1 = 3 a_0 + 4 a_1 and Q_2 = -5 a_0 + 12 a_1, which is the lower one where 8 a_0 > 8 a_1."""
    return jnp.stack([3 * actions[..., 0] + 4 * actions[..., 1], -5 * actions[..., 0] + 12 * actions[..., 1]])


def bowl(actions):
    """Returns two heads with one maximum, at NEAR."""
    value = -jnp.square(actions - NEAR[(None,) * (actions.ndim - 1)]).sum(axis=-1)
    return jnp.stack([value, value + 0.01])


def test_best_of_takes_each_rows_highest_scored_candidate():
    candidates = jnp.arange(12.0).reshape(2, 3, 2)
    scores = jnp.array([[0.0, 5.0, -1.0], [-3.0, -2.0, -1.0]])
    np.testing.assert_array_equal(guidance.best_of(candidates, scores), [[2, 3], [10, 11]])


def test_best_of_is_nearest_where_the_critic_is_a_distance():
    candidates = jax.random.normal(jax.random.key(0), (7, 32, 2))
    best = guidance.best_of(candidates, bowl(candidates)[0])
    distance = np.linalg.norm(np.asarray(candidates) - np.asarray(NEAR), axis=-1)
    np.testing.assert_array_equal(best, np.asarray(candidates)[np.arange(7), distance.argmin(axis=1)])


@pytest.mark.parametrize(
    ("of", "low", "high"),
    [
        ("first", [0.6, 0.8], [0.6, 0.8]),
        ("min", [-5 / 13, 12 / 13], [0.6, 0.8]),
        ("mean", [-1 / np.sqrt(65), 8 / np.sqrt(65)], [-1 / np.sqrt(65), 8 / np.sqrt(65)]),
    ],
)
def test_ascent_is_the_unit_gradient_of_the_chosen_aggregate(of, low, high):
    actions = jnp.array([[0.5, -0.5], [-0.5, 0.5]])  # the second head is the lower one in the first row only
    np.testing.assert_allclose(guidance.ascent_direction(two_heads, actions, of), [low, high], rtol=1e-6)


def test_the_first_head_is_climbed_unless_told_otherwise():
    np.testing.assert_allclose(guidance.ascent_direction(two_heads, jnp.array([0.5, -0.5])), [0.6, 0.8], rtol=1e-6)


def test_ascent_stands_still_where_the_critic_is_flat_and_where_it_almost_is():
    flat = guidance.ascent_direction(lambda a: jnp.zeros((2, len(a))), jnp.ones((3, 4)))
    np.testing.assert_array_equal(flat, np.zeros((3, 4)))
    slope = guidance.ascent_direction(lambda a: 1e-8 * a.sum(axis=-1)[None], jnp.ones((1, 1)))
    np.testing.assert_allclose(slope, [[0.5]], rtol=1e-5)  # g / (|g| + 1e-8) with |g| = 1e-8


# The trust region


def test_the_radius_shrinks_with_disagreement_relative_to_its_mean():
    middle = jnp.array([5.0, -1.0, 0.0, 2.0])
    apart = jnp.array([0.0, 1.0, 2.0, 5.0])  # mean 2
    heads = jnp.stack([middle - apart, middle + apart])
    wanted = 0.7 / (1 + 0.3 * np.array([0, 0.5, 1, 2.5]))
    np.testing.assert_allclose(guidance.adaptive_radius(0.7, 0.3, heads), wanted, rtol=1e-6)
    doubled = jnp.stack([middle - 2 * apart, middle + 2 * apart])
    np.testing.assert_allclose(guidance.adaptive_radius(0.7, 0.3, doubled), wanted, rtol=1e-6)
    np.testing.assert_allclose(guidance.adaptive_radius(0.7, 0.0, heads), np.full(4, 0.7), rtol=1e-6)
    equal = jnp.stack([middle, middle])
    np.testing.assert_allclose(guidance.adaptive_radius(0.7, 0.3, equal), np.full(4, 0.7), rtol=1e-6)


def test_a_row_of_mean_disagreement_gets_eta_over_one_plus_beta():
    heads = jnp.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    np.testing.assert_allclose(guidance.adaptive_radius(1.0, 0.3, heads)[1], 1 / 1.3, rtol=1e-6)


def test_the_target_lies_on_the_trust_regions_edge_and_is_its_best_point():
    key_anchor, key_c, key_points = jax.random.split(jax.random.key(1), 3)
    anchor, c = jax.random.normal(key_anchor, (5, 3)), jax.random.normal(key_c, (3,))
    radius = jnp.array([0.1, 0.5, 1.0, 2.0, 0.0])
    heads = lambda a: (a @ c)[None]  # noqa: E731
    target = guidance.trust_region_target(anchor, guidance.ascent_direction(heads, anchor), radius)
    np.testing.assert_allclose(jnp.linalg.norm(target - anchor, axis=-1), radius, atol=1e-5)
    exact = np.asarray(anchor) + np.asarray(radius)[:, None] * np.asarray(c / jnp.linalg.norm(c))
    np.testing.assert_allclose(target, exact, atol=1e-6)

    offset = jax.random.normal(key_points, (10_000, 3))
    offset = np.asarray(offset / jnp.linalg.norm(offset, axis=-1, keepdims=True))
    offset = offset * np.random.default_rng(0).random((10_000, 1)) ** (1 / 3)  # uniform in the ball
    for row in range(4):
        feasible = (np.asarray(anchor[row]) + float(radius[row]) * offset) @ np.asarray(c)
        best = float(target[row] @ c)
        assert feasible.max() <= best + 1e-5 and best - feasible.max() < 0.1 * float(radius[row])


def test_a_flat_critic_leaves_the_anchor():
    anchor = jnp.array([[1.0, 2.0]])
    direction = guidance.ascent_direction(lambda a: jnp.zeros((2, len(a))), anchor)
    np.testing.assert_array_equal(guidance.trust_region_target(anchor, direction, jnp.ones(1)), anchor)


@pytest.mark.parametrize("r", [0.0, 0.4, 0.9])
def test_an_action_moves_by_the_time_left_times_the_radius(r):
    a_r, u_off, radius = jnp.array([[0.2, -0.1]]), jnp.array([[1.0, 0.5]]), jnp.array([0.3])
    u = guidance.trust_region_target(u_off, guidance.ascent_direction(two_heads, a_r), radius)
    moved = (a_r + (1 - r) * u) - (a_r + (1 - r) * u_off)
    assert float(jnp.linalg.norm(moved)) == pytest.approx((1 - r) * 0.3, rel=1e-5)


def test_the_target_takes_no_gradient():
    total = lambda *args: guidance.trust_region_target(*args).sum()  # noqa: E731
    for gradient in jax.grad(total, argnums=(0, 1, 2))(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones(2)):
        np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))


# Q-guided flow

WAYS = ("one_step", "jacobian", "noisy", "bptt")
START = jax.random.normal(jax.random.key(5), (40, 2))
SLOPE = np.array([0.3, -0.5], np.float32)
TURN = np.array([[-0.6, 0.5], [0.2, -0.9]], np.float32)


def field(x, r, t):
    """Returns a velocity that bends space and time."""
    return jnp.tanh(x @ TURN.T) * (1 - 0.5 * t) - 0.4 * x


def bump(actions):
    """Returns a value whose gradient differs from place to place."""
    return -jnp.square(actions - NEAR[(None,) * (actions.ndim - 1)]).sum(axis=-1)


def plane(actions):
    return actions @ SLOPE


def slope_of(guide, v, value, x, t, steps=10):
    """Returns g [B, D] at points x and time t."""
    times = jnp.full((len(x), 1), t)
    return guide.ascent(v, value, x, times, v(x, times, times), steps)


@pytest.mark.parametrize("gradient", WAYS)
def test_no_weight_is_the_behaviour_flow_bit_for_bit(gradient):
    guided = jax.jit(lambda weight: QGuidance(weight, gradient).sample(field, bump, START, 10))
    plain = jax.jit(lambda: jnp.clip(flow.euler(field, START, 10), -1, 1))()
    np.testing.assert_array_equal(guided(0.0), plain)
    assert float(jnp.abs(guided(0.3) - plain).max()) > 0.01


def test_one_step_is_worked_out_by_hand():
    x = 3 * np.asarray(START)
    arrived = x + np.tanh(x @ TURN.T) - 0.4 * x
    wanted = np.clip(arrived + 0.2 * 2 * (np.asarray(NEAR) - np.clip(arrived, -1, 1)), -1, 1)
    np.testing.assert_allclose(QGuidance(0.2).sample(field, bump, jnp.asarray(x), 1), wanted, atol=2e-6)
    assert 0.1 < (np.abs(arrived) > 1).mean() < 0.9


@pytest.mark.parametrize("gradient", WAYS)
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_a_linear_critic_moves_the_whole_path_by_the_weight_times_its_slope(gradient, steps):
    away = lambda x, r, t: jnp.broadcast_to(0.2 * t - 0.1, x.shape)  # noqa: E731  # does not depend on x
    x = 0.1 * START
    plain = flow.euler(away, x, steps)
    moved = flow.euler(QGuidance(0.5, gradient).guided(away, plane, steps), x, steps)
    np.testing.assert_allclose(moved - plain, np.tile(0.5 * SLOPE, (40, 1)), atol=1e-6)
    assert float(jnp.abs(moved).max()) < 1


def test_a_point_of_data_gives_way_by_one_step_of_guidance_only():
    p, m, k = 0.2, 0.9, 1.0
    v = lambda x, r, t: (p - x) / (1 - t)  # noqa: E731
    value = lambda a: -k / 2 * jnp.square(a - m).sum(axis=-1)  # noqa: E731
    for steps, wanted in ((10, 0.235), (5, 0.27), (70, 0.205)):
        found = QGuidance(0.5).sample(v, value, 2 * START, steps)
        np.testing.assert_allclose(found, np.full((40, 2), wanted), atol=2e-5)
        assert wanted == pytest.approx(p + 0.5 * k * (m - p) / steps)


@pytest.mark.parametrize("gradient", ["one_step", "jacobian", "noisy"])
def test_gaussian_data_and_a_quadratic_critic_are_affine_in_the_noise(gradient):
    mu, s, m, k, w, steps = 0.1, 0.12, 0.4, 1.5, 0.3, 10
    noise = jax.random.normal(jax.random.key(6), (20_000, 1))

    def pull(t):
        return (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2)  # v = mu + pull(t) (x - t mu)

    found = QGuidance(w, gradient).sample(
        lambda x, r, t: mu + pull(t) * (x - t * mu), lambda a: -k / 2 * jnp.square(a - m).sum(axis=-1), noise, steps
    )
    offset, factor = 0.0, 1.0  # x = offset + factor * noise
    for t in np.arange(steps) / steps:
        b = pull(t)
        seen = {"noisy": (0.0, 1.0)}.get(gradient, ((1 - t) * (mu - b * t * mu), 1 + (1 - t) * b))
        back = seen[1] if gradient == "jacobian" else 1.0  # g = back * k (m - seen_0 - seen_1 x)
        change = 1 + (b - w * back * k * seen[1]) / steps
        offset = change * offset + (mu - b * t * mu + w * back * k * (m - seen[0])) / steps
        factor = change * factor
    np.testing.assert_allclose(found, offset + factor * np.asarray(noise), atol=2e-5)
    assert float(found.mean()) == pytest.approx(offset, abs=4 * factor / np.sqrt(20_000))
    assert float(found.std()) == pytest.approx(factor, rel=0.03)


def linear(x, r, t):
    """Returns a velocity that is linear in x."""
    return x @ TURN.T + 0.1


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_the_jacobian_pulls_the_gradient_back_through_the_jump(t):
    x = 0.2 * START
    plain = slope_of(QGuidance(), linear, bump, x, t)
    jacobian = np.eye(2) + (1 - t) * TURN
    pulled = slope_of(QGuidance(gradient="jacobian"), linear, bump, x, t)
    np.testing.assert_allclose(pulled, np.asarray(plain) @ jacobian, atol=1e-6)


def test_bptt_pulls_it_back_through_every_step_that_is_left():
    x = 0.2 * START
    for i in (0, 3, 9):
        end = x
        for _ in range(i, 10):
            end = end + linear(end, None, None) / 10
        whole = np.linalg.matrix_power(np.eye(2) + TURN / 10, 10 - i)
        wanted = 2 * (np.asarray(NEAR) - np.asarray(end)) @ whole
        found = slope_of(QGuidance(gradient="bptt"), linear, bump, x, i / 10)
        np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_a_clipped_guess_is_still_pushed_except_through_the_jacobian():
    x, still = jnp.array([[3.0, 0.2]]), lambda x, r, t: 0 * x
    np.testing.assert_allclose(slope_of(QGuidance(), still, plane, x, 0.5), [SLOPE])
    for gradient in ("jacobian", "bptt"):
        np.testing.assert_allclose(slope_of(QGuidance(gradient=gradient), still, plane, x, 0.5), [[0, SLOPE[1]]])
    bent = slope_of(QGuidance(), still, bump, x, 0.5)
    np.testing.assert_allclose(bent, 2 * (NEAR[None] - jnp.array([[1.0, 0.2]])), atol=1e-6)  # seen where it is clipped


def test_the_noisy_gradient_is_the_default_at_time_1_or_where_nothing_moves():
    x, noisy, still = 0.3 * START, QGuidance(gradient="noisy"), lambda x, r, t: 0 * x
    at = lambda guide, v, t: np.asarray(slope_of(guide, v, bump, x, t))  # noqa: E731
    np.testing.assert_array_equal(at(noisy, field, 1.0), at(QGuidance(), field, 1.0))
    assert np.abs(at(noisy, field, 0.9) - at(QGuidance(), field, 0.9)).max() > 0.01
    np.testing.assert_array_equal(at(noisy, still, 0.3), at(QGuidance(), still, 0.3))


def test_guidance_is_not_normalised_and_leaves_the_box_only_on_the_way():
    still = lambda x, r, t: 0 * x  # noqa: E731
    ascent = QGuidance(3.0)
    steep = lambda a: 10 * plane(a)  # noqa: E731
    path = flow.euler(ascent.guided(still, steep, 10), jnp.zeros((1, 2)), 10)
    np.testing.assert_allclose(path, [30 * SLOPE], rtol=1e-5)
    np.testing.assert_array_equal(ascent.sample(still, steep, jnp.zeros((1, 2)), 10), [[1, -1]])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ascent_afterwards_takes_clipped_steps_from_the_finished_action(count):
    guide = QGuidance(weight=9.0, gradient="after", ascent_steps=count, ascent_size=0.4)
    wanted = np.clip(flow.euler(field, 2 * START, 10), -1, 1)
    for _ in range(count):
        wanted = np.clip(wanted + 0.4 * 3 * SLOPE, -1, 1)
    found = guide.sample(field, lambda a: 3 * plane(a), 2 * START, 10)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_a_grid_of_weights_is_one_program_of_one_set_of_actions():
    @jax.jit
    def played(weights):
        return jax.vmap(lambda weight: QGuidance(weight).sample(field, bump, START, 10))(weights)

    weights = jnp.array([0.0, 0.2, 0.8])
    grid = played(weights)
    for row, weight in zip(grid, weights, strict=True):
        np.testing.assert_allclose(row, QGuidance(weight).sample(field, bump, START, 10), atol=1e-6)
    distance = np.linalg.norm(grid - NEAR[None, None], axis=-1).mean(axis=1)
    assert distance[0] > distance[1] > distance[2]


# Beam search


class Actor:
    """A map that counts the rows it is asked for: its jump to time 1 lands on the noisy point, drawn in by half."""

    def __init__(self):
        self.calls = 0
        self.asked = []

    def __call__(self, x, r, t):
        self.calls += x.shape[1]
        self.asked.append((x, r, t))
        return -0.5 * x / (1 - r)

    def one_step(self, noise):
        return jnp.clip(noise + self(noise, jnp.zeros_like(noise[..., :1]), jnp.ones_like(noise[..., :1])), -1, 1)


NOISE = jax.random.normal(jax.random.key(2), (3, 4, 2))  # three observations, four beams


@pytest.mark.parametrize(("width", "rounds", "branches"), [(4, 0, 4), (4, 1, 4), (2, 1, 8), (1, 1, 16), (4, 2, 16)])
def test_beam_search_calls_the_actor_as_often_as_it_says(width, rounds, branches):
    actor = Actor()
    beams = actor.one_step(jnp.repeat(NOISE, 4, axis=1)[:, :width])
    result = BeamSearch(width, rounds, branches).search(jax.random.key(0), beams, bowl, actor)
    assert actor.calls == width * (1 + rounds * branches)
    assert result.shape == (3, 2) and float(jnp.abs(result).max()) <= 1


def test_without_rounds_and_step_it_is_best_of_n():
    beams = Actor().one_step(NOISE)
    found = BeamSearch(width=4, rounds=0, eta=0.0).search(jax.random.key(0), beams, two_heads, Actor())
    np.testing.assert_array_equal(found, guidance.best_of(beams, two_heads(beams).min(axis=0)))


def test_without_rounds_the_beams_are_moved_once():
    search = BeamSearch(width=4, rounds=0, eta=0.1)
    beams = Actor().one_step(NOISE)
    moved = jnp.clip(beams + 0.1 * guidance.ascent_direction(two_heads, beams, "min"), -1, 1)
    np.testing.assert_allclose(search.climb(beams, two_heads), moved, rtol=1e-6)
    found = search.search(jax.random.key(0), beams, two_heads, Actor())
    np.testing.assert_allclose(found, guidance.best_of(moved, two_heads(moved).min(axis=0)), rtol=1e-6)


@pytest.mark.parametrize(("rounds", "climbs"), [(0, 1), (1, 1), (3, 3)])
def test_beams_climb_once_per_round(rounds, climbs):
    search = BeamSearch(
        width=1, rounds=rounds, branches=1, eta=0.1, snr=1e9
    )  # no noise: the beam stays, but for climbs
    heads = lambda a: two_heads(a)[:1]  # noqa: E731
    found = search.search(jax.random.key(0), jnp.zeros((1, 1, 2)), heads, lambda x, r, t: 0 * x)
    np.testing.assert_allclose(found, [[0.06 * climbs, 0.08 * climbs]], rtol=1e-5)


def test_climbing_is_by_the_lowest_head_and_stops_at_the_box():
    search = BeamSearch(eta=0.5)
    actions = jnp.array([[[0.1, 0.0], [0.9, 0.8]]])  # the second head is the lower one in both
    step = 0.5 * np.array([-5, 12]) / 13
    np.testing.assert_allclose(
        search.climb(actions, two_heads), [[[0.1 + step[0], step[1]], [0.9 + step[0], 1]]], rtol=1e-5
    )


@pytest.mark.parametrize(("snr", "time"), [(1.5, 0.6), (1.0, 0.5), (0.0, 0.0), (1e9, 1.0)])
def test_branches_start_over_at_the_time_of_their_signal_to_noise_ratio(snr, time):
    actor, actions = Actor(), jnp.zeros((1, 2000, 2))
    BeamSearch(snr=snr).renoise(jax.random.key(3), actions + 0.5, actor)
    x, r, t = actor.asked[0]
    np.testing.assert_allclose(r, np.full((1, 2000, 1), time), rtol=1e-6)
    np.testing.assert_array_equal(t, np.ones((1, 2000, 1)))
    np.testing.assert_allclose(x.mean(axis=1), np.full((1, 2), time * 0.5), atol=4 * (1 - time) / np.sqrt(2000) + 1e-7)
    np.testing.assert_allclose(x.std(axis=1), np.full((1, 2), 1 - time), atol=0.05 * (1 - time) + 1e-7)


def test_no_noise_gives_the_actions_back():
    actions = jnp.clip(NOISE, -1, 1)
    np.testing.assert_array_equal(BeamSearch(snr=1e9).renoise(jax.random.key(0), actions, lambda x, r, t: x), actions)


def test_branches_are_completed_by_a_jump_or_along_the_diagonal_and_clipped():
    actions = jnp.full((1, 50, 2), 0.5)
    u = lambda x, r, t: 10 * t + r + 0 * x  # noqa: E731
    kept = {}
    for completion, velocity in (("jump", 10 + 0.6), ("euler", 11 * 0.6)):
        seen = []
        spy = lambda x, r, t, seen=seen: seen.append(x) or u(x, r, t) - 10  # noqa: E731
        kept[completion] = BeamSearch(completion=completion).renoise(jax.random.key(4), actions, spy)
        np.testing.assert_allclose(kept[completion], np.clip(seen[0] + 0.4 * (velocity - 10), -1, 1), atol=1e-6)
    assert float(kept["jump"].max()) == 1 and float(kept["euler"].min()) == -1


def test_every_branch_of_every_round_has_noise_of_its_own():
    asked = []

    def to_zero(x, r, t):  # so that every round starts from zero, and asks for 0.4 times its noise
        asked.append(np.asarray(x).ravel())
        return -x / (1 - r)

    BeamSearch(width=4, rounds=3, branches=4, eta=0.0).search(jax.random.key(0), jnp.zeros((3, 4, 2)), bowl, to_zero)
    assert len(np.unique(asked)) == 3 * (3 * 16 * 2)
    np.testing.assert_allclose(np.std(asked, axis=1), 0.4, rtol=0.25)


def test_the_best_of_all_branches_are_kept_whatever_beam_they_come_from():
    beams = jnp.array([[[0.9, 0.9], [0.3, -0.2], [-0.9, -0.9]]])
    search = BeamSearch(width=3, rounds=1, branches=2, eta=0.0, snr=1e9)
    still = lambda x, r, t: 0 * x  # noqa: E731
    heads = []

    def watched(actions):
        heads.append(actions)
        return bowl(actions)

    np.testing.assert_allclose(search.search(jax.random.key(0), beams, watched, still), [[0.3, -0.2]], atol=1e-6)
    pool, *_, final = heads
    assert pool.shape == (1, 6, 2)
    # both copies of the good beam and one of the next best: a copy of the first (distance 1.25 against 1.39)
    np.testing.assert_allclose(final, [[[0.3, -0.2], [0.3, -0.2], [0.9, 0.9]]], atol=1e-6)


@pytest.mark.parametrize("rounds", [0, 1])
def test_beams_are_scored_by_their_lowest_head(rounds):
    beams = jnp.array([[[0.0, 0.5], [0.5, 0.0]]])
    heads = lambda a: jnp.stack([a[..., 1], a[..., 1] + 100 * a[..., 0]])  # noqa: E731  # (.5, .5) and (0, 50)
    for width in (1, 2):
        search = BeamSearch(width=width, rounds=rounds, branches=1, eta=0.0, snr=1e9)
        found = search.search(jax.random.key(0), beams, heads, lambda x, r, t: 0 * x)
        np.testing.assert_allclose(found, [[0.0, 0.5]], atol=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_kept_parents_never_lose_and_discarded_ones_may(seed):
    beams = Actor().one_step(jax.random.normal(jax.random.key(seed), (40, 4, 2)))
    start = bowl(beams).min(axis=0).max(axis=1)
    base = BeamSearch(rounds=3, branches=2, eta=0.0)
    kept, free = (
        bowl(dataclasses.replace(base, keep_parents=keep).search(jax.random.key(seed), beams, bowl, Actor())).min(
            axis=0
        )
        for keep in (True, False)
    )
    assert bool((kept >= start).all()) and bool((kept > start).any())
    assert bool((free < start).any())


def test_climbing_after_each_round_finds_what_the_critic_likes():
    beams = Actor().one_step(NOISE)
    search = BeamSearch(width=4, rounds=3, branches=4, eta=0.05)
    found = jax.jit(lambda beams: search.search(jax.random.key(0), beams, bowl, Actor()))(beams)
    assert float(jnp.linalg.norm(found - NEAR[None], axis=-1).max()) < 0.15
