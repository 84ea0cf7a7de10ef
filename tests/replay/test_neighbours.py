"""Facts about jaxrl.replay.neighbours and jaxrl.replay.kdtree: every search gives what all pairs give."""

import concurrent.futures
import dataclasses
import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from experiments.neighbours import ways
from jaxrl.data import files
from jaxrl.errors import UserError
from jaxrl.replay import loading, neighbours
from jaxrl.replay import ring as rings
from jaxrl.replay.kdtree import Forest, size_of_tree
from jaxrl.replay.neighbours import Index
from jaxrl.runs import memory
from jaxrl.runs.config import Config
from jaxrl.runs.datasets import in_memory, load_data
from jaxrl.types import Leaf, Requirements, Spec
from tests.known import quick_to_compile

EXACT = ("blocks", "tree")
jitted = jax.jit(neighbours.nearest, static_argnames=("k", "method", "block"))
known_of = jax.jit(ways.known_of, static_argnames=("count", "batch", "block"))
nearest_known = jax.jit(ways.nearest_known, static_argnames=("k", "method", "block"))


@pytest.fixture(autouse=True, scope="module")
def quick():
    with quick_to_compile():
        yield


def index(states, actions, mean=0.0, weight=1.0, valid=None) -> Index:
    """Returns the index of rows given as numbers, and the forest of the same rows."""
    states, actions = np.asarray(states, np.float32), np.asarray(actions, np.float32)
    valid = np.ones(len(states), bool) if valid is None else np.asarray(valid)
    mean, weight = (np.full(states.shape[1], x, np.float32) for x in (mean, weight))
    leaves = map(jnp.asarray, (states, actions, valid, mean, weight))
    return Index(*leaves, Forest(states, actions, valid))


def random_index(rows: int, seed: int = 0, **fields) -> Index:
    rng = np.random.default_rng(seed)
    return index(rng.normal(3, 2, (rows, 3)), rng.uniform(-1, 1, (rows, 2)), mean=3.0, weight=0.5, **fields)


def queries(count: int, seed: int = 1) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(3, 2, (count, 3)), jnp.float32), jnp.asarray(rng.uniform(-1, 1, (count, 2)))


def naive(index: Index, states, actions, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns distances and rows of the k nearest, from all pairs in float64."""
    index = jax.tree.map(lambda x: np.asarray(x, bool if x.dtype == bool else float), index)
    of = lambda s, a: np.concatenate([(np.asarray(s, float) - index.mean) * index.weight, a], axis=1)  # noqa: E731
    apart = of(states, actions)[:, None] - of(index.states, index.actions)[None]
    distance = np.where(index.valid, np.square(apart).sum(axis=-1), np.inf)
    rows = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, rows, 1), rows


def assert_nearest(found, index: Index, states, actions, k: int = 1):
    distance, rows = naive(index, states, actions, k)
    np.testing.assert_array_equal(found[1], rows)
    np.testing.assert_allclose(found[0], distance, rtol=2e-6)


# Against all pairs


@pytest.mark.parametrize("method", ["blocks", "tree", "approximate", "auto"])
def test_the_nearest_of_three_pairs_by_hand(method):
    three = index([[0.0], [1.0], [3.0]], [[0.0], [1.0], [-1.0]], mean=1.0, weight=2.0)
    distance, row = jitted(three, jnp.array([[0.5], [2.0], [3.0]]), jnp.array([[1.0], [-1.0], [-0.5]]), method=method)
    np.testing.assert_array_equal(row[:, 0], [1, 2, 2])  # (2 * .5)^2 = 1 < 1 + 1, (2 * 1)^2 = 4 < 4 + 4, .5^2
    np.testing.assert_array_equal(distance[:, 0], [1.0, 4.0, 0.25])


@pytest.mark.parametrize(("rows", "k", "block"), [(50, 1, 1), (50, 3, 7), (50, 9, 16), (50, 3, 50), (50, 3, 1000)])
def test_blocks_find_what_comparing_all_pairs_finds(rows, k, block):
    data, asked = random_index(rows), queries(20)
    found = jitted(data, *asked, k=k, method="blocks", block=block)
    assert_nearest(found, data, *asked, k)
    assert (np.diff(found[0], axis=1) > 0).all()


def test_many_rows_in_groups_and_in_blocks_that_do_not_divide_them():
    data, asked = random_index(20_011), queries(64)
    for k in (1, 5):
        for method in EXACT:
            assert_nearest(jitted(data, *asked, k=k, method=method, block=3000), data, *asked, k)


@pytest.mark.parametrize("method", EXACT)
def test_all_rows_in_order_where_as_many_are_asked_for_as_there_are(method):
    data, asked = random_index(13), queries(4)
    assert_nearest(jitted(data, *asked, k=13, method=method, block=13), data, *asked, 13)


def test_approximate_neighbours_have_true_distances_and_are_mostly_the_nearest():
    data, asked = random_index(5000), queries(64)
    distance, row = jitted(data, *asked, k=2, method="approximate", block=1000)
    gap = np.square((asked[0][:, None] - data.states[row]) * 0.5).sum(-1)
    gap += np.square(asked[1][:, None] - data.actions[row]).sum(-1)
    np.testing.assert_allclose(distance, gap, rtol=1e-5)
    assert (row == naive(data, *asked, 2)[1]).mean() > 0.9


@pytest.mark.parametrize("method", EXACT)
def test_without_weight_the_nearest_action_with_much_the_same_state(method):
    rng = np.random.default_rng(2)
    states, actions = rng.permutation(40)[:, None] * [0.01, 0.02], rng.uniform(-1, 1, (40, 2))
    own = jnp.asarray(rng.permutation(40))
    other = jnp.asarray(rng.uniform(-1, 1, (40, 2)), jnp.float32)
    blind, strict = index(states, actions, weight=0.0), index(states, actions, weight=1e4)
    _, row = jitted(blind, blind.states[own], other, method=method)
    nearest_action = np.square(np.asarray(other)[:, None] - actions[None]).sum(-1).argmin(1)
    np.testing.assert_array_equal(row[:, 0], nearest_action)
    distance, row = jitted(strict, strict.states[own], other, method=method)
    np.testing.assert_array_equal(row[:, 0], own)  # whatever the action
    np.testing.assert_allclose(distance[:, 0], np.square(other - strict.actions[own]).sum(-1), rtol=1e-6)


def test_of_equal_rows_one_is_returned():
    data = index(np.zeros((100, 2)), np.tile([[0.25], [0.5]], (50, 1)))
    for method in EXACT:
        distance, row = jitted(data, jnp.zeros((3, 2)), jnp.full((3, 1), 0.5), k=4, method=method, block=30)
        np.testing.assert_array_equal(distance, 0)
        assert (row % 2 == 1).all() and all(len(set(each)) == 4 for each in row.tolist())


# What does not count, or is not a number


@pytest.mark.parametrize("method", [*EXACT, "approximate"])
def test_rows_that_do_not_count_are_never_returned(method):
    valid = np.arange(60) % 10 == 3
    data = random_index(60, valid=valid)
    distance, row = jitted(data, data.states, data.actions, k=6, method=method, block=25)
    assert valid[row].all() and np.isfinite(distance).all()
    assert_nearest((distance, row), data, data.states, data.actions, 6)


@pytest.mark.parametrize("method", EXACT)
def test_what_is_not_finite_harms_nothing_else(method):
    data, (states, actions) = random_index(60), queries(5)
    broken = data.states.at[7].set(jnp.nan).at[8].set(jnp.inf)
    data = dataclasses.replace(data, states=broken, forest=Forest(*map(np.asarray, (broken, data.actions, data.valid))))
    states = states.at[1, 0].set(jnp.nan).at[2].set(1e30)
    distance, row = jitted(data, states, actions, method=method, block=25)
    assert np.isinf(distance[1:3]).all() and (row[1:3] >= 0).all() and (row[1:3] < 60).all()
    fine = np.array([0, 3, 4])
    sound = dataclasses.replace(data, valid=data.valid.at[7:9].set(False))
    assert_nearest((distance[fine], row[fine]), sound, states[fine], actions[fine])


def test_rows_beyond_those_that_count_are_infinitely_far():
    data = random_index(30, valid=np.arange(30) < 2)
    distance, row = jitted(data, *queries(3), k=4, method="blocks", block=8)
    assert np.isfinite(distance[:, :2]).all() and np.isinf(distance[:, 2:]).all()
    assert (row[:, :2] < 2).all() and (row >= 0).all() and (row < 30).all()


# Rounding


def rounded(query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the products with both factors in bfloat16, as an accelerator multiplies by default."""
    query, key = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (query, key))
    return query @ key.T


def test_coarse_products_nominate_but_do_not_choose(monkeypatch):
    # 125 places, far apart for bfloat16, of six rows each, which it cannot tell apart; consecutive rows are elsewhere.
    rng = np.random.default_rng(3)
    places = np.stack(np.meshgrid(*[np.arange(-10.0, 11, 5)] * 3), axis=-1).reshape(-1, 3)
    states = rng.permutation(np.repeat(places, 6, axis=0)) + rng.normal(0, 0.02, (750, 3))
    data = index(states, np.zeros((750, 1)))
    asked = data.states + jnp.asarray(rng.normal(0, 0.005, (750, 3)), jnp.float32), data.actions
    _, truth = naive(data, *asked)
    norms = np.square(np.asarray(data.states)).sum(1)
    alone = np.argmin(norms - 2 * np.asarray(rounded(asked[0], data.states)), axis=1)
    assert (alone != truth[:, 0]).mean() > 0.5
    monkeypatch.setattr(neighbours, "product", rounded)
    assert_nearest(neighbours.nearest(data, *asked, method="blocks", block=200), data, *asked)


# Inside programs


@pytest.mark.parametrize("method", EXACT)
def test_nothing_is_differentiated_through_a_search(method):
    data, (states, actions) = random_index(30), queries(4)

    def pull(actions, keys, weight):
        searched = dataclasses.replace(data, actions=keys, weight=weight)
        distance, row = neighbours.nearest(searched, states, actions, method=method)
        return distance.sum() + jnp.square(actions - keys[row[:, 0]]).sum()

    along, through, scale = jax.jit(jax.grad(pull, argnums=(0, 1, 2)))(actions, data.actions, data.weight)
    row = naive(data, states, actions)[1][:, 0]
    np.testing.assert_allclose(along, 2 * (actions - data.actions[row]), rtol=1e-6)
    np.testing.assert_allclose(
        through, jnp.zeros_like(data.actions).at[row].add(-along), rtol=1e-5
    )  # of the rows taken
    np.testing.assert_array_equal(scale, 0)


@pytest.mark.parametrize("method", EXACT)
def test_searches_work_in_scans_and_side_by_side_with_scalings_of_their_own(method):
    data = random_index(300)
    weights = jnp.array([[0.1], [2.0]]) * jnp.ones((2, 3))
    several = [queries(6, seed) for seed in range(3)]
    states, actions = (jnp.stack(each) for each in zip(*several, strict=True))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    def run(weight, states, actions):
        scaled = dataclasses.replace(data, weight=weight)
        search = functools.partial(neighbours.nearest, scaled, k=2, method=method, block=70)
        return jax.lax.scan(lambda _, asked: (None, search(*asked)), None, (states, actions))[1]

    distance, row = run(weights, states, actions)
    for v, weight in enumerate(weights):
        scaled = dataclasses.replace(data, weight=weight)
        for i, asked in enumerate(several):
            assert_nearest((distance[v, i], row[v, i]), scaled, *asked, 2)


def test_the_tree_is_asked_on_the_cpu_where_there_is_one():
    data, asked = random_index(50), queries(3)
    without = dataclasses.replace(data, forest=None)
    program = {name: str(jax.make_jaxpr(neighbours.nearest)(x, *asked)) for name, x in (("a", data), ("b", without))}
    assert "pure_callback" in program["a"] and "pure_callback" not in program["b"]
    with pytest.raises(UserError, match="method = 'tree': there are no trees"):
        neighbours.nearest(without, *asked, method="tree")


# With what is known beforehand


def test_the_nearest_states_and_their_radius_by_hand():
    line = index([[0.0], [1.0], [3.0], [7.0]], np.zeros((4, 1)), weight=2.0, valid=[True, True, True, False])
    two = known_of(line, jnp.array([2, 0, 3]), count=2, batch=2, block=3)
    np.testing.assert_array_equal(two.rows, [[2, 1], [0, 1], [2, 1]])
    np.testing.assert_allclose(two.radius, [16.0, 4.0, 144.0], rtol=2e-5)
    assert (two.radius < np.array([16.0, 4.0, 144.0])).all()
    four = known_of(line, jnp.arange(2), count=4, batch=2)  # only three count: all others are infinitely far
    np.testing.assert_array_equal(four.rows, [[0, 1, 2, -1], [1, 0, 2, -1]])
    assert np.isinf(four.radius).all()


@pytest.mark.parametrize("k", [1, 3])
def test_what_is_known_answers_exactly_near_the_data_and_far_from_them(k):
    data = random_index(400, valid=np.arange(400) % 5 > 0)
    own = jnp.flatnonzero(data.valid)[:64]
    known = known_of(data, own, count=12, batch=64)
    answered = []
    for noise in (0.01, 1.0):
        actions = data.actions[own] + noise * queries(64)[1]
        found = nearest_known(data, known, data.states[own], actions, k=k, method="blocks", block=90)
        assert_nearest(found, data, data.states[own], actions, k)
        answered.append(np.mean(found[0][:, -1] <= known.radius))
    assert answered[1] < 1 and answered[1] < answered[0]
    assert answered[0] == 1 or k > 1
    with pytest.raises(UserError, match="k = 13: the dataset has 12 rows"):
        nearest_known(data, known, data.states[own], data.actions[own], k=13)


def test_known_rows_alone_are_compared_where_they_are_enough():
    data = random_index(100)
    known = known_of(data, jnp.arange(20), count=8, batch=20)
    asked = data.states[:20], data.actions[:20]
    wrong = dataclasses.replace(known, rows=jnp.full_like(known.rows, 99))
    _, row = nearest_known(data, dataclasses.replace(wrong, radius=jnp.full(20, jnp.inf)), *asked)
    assert (row == 99).all()  # trusted
    _, row = nearest_known(data, dataclasses.replace(wrong, radius=jnp.zeros(20)), *asked)
    np.testing.assert_array_equal(row[:, 0], np.arange(20))  # not trusted


# Trees


def test_a_forest_keeps_one_tree_per_scaling_and_lets_the_oldest_go():
    forest = random_index(40).forest
    mean, weights = np.zeros(3, np.float32), [np.full(3, x, np.float32) for x in range(10)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        grown = list(threads.map(lambda _: forest.tree(mean, weights[0])[0], range(16)))
    assert len({id(tree) for tree in grown}) == 1
    for weight in weights[1:8]:
        forest.tree(mean, weight)
    assert forest.tree(mean, weights[0])[0] is grown[0]  # asked again, so no longer the oldest
    second = forest.tree(mean, weights[2])[0]
    forest.tree(mean, weights[8])
    assert len(forest.trees) == 8
    assert forest.tree(mean, weights[0])[0] is grown[0] and forest.tree(mean, weights[2])[0] is second
    assert weights[1].tobytes() not in {name[len(mean.tobytes()) :] for name in forest.trees}


def test_a_tree_of_too_few_rows_says_so():
    forest = random_index(40, valid=np.arange(40) < 2).forest
    with pytest.raises(UserError, match="2 rows of the dataset can be searched, 3 neighbors"):
        forest.nearest(*[np.zeros(3, np.float32)] * 2, np.zeros((1, 3)), np.zeros((1, 2)), k=3)


# Errors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, "k = 0: must be at least 1"),
        ({"k": 11}, "k = 11: the dataset has 10 rows"),
        ({"k": 3, "block": 2}, "block = 2: must be at least k = 3"),
        ({"block": 0}, "block = 0: must be at least k = 1"),
        ({"method": "kd"}, "method = 'kd': must be one of auto, blocks, tree, approximate"),
        ({"rows": 10**6, "batch": 10**4}, "block = 65536: with 10000 queries its distances take 2.4 GiB"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_words(values, message):
    neighbours.check(**{"rows": 10, "batch": 10**4})  # a block is never longer than the rows
    with pytest.raises(UserError, match=message):
        neighbours.check(**{"rows": 10, "batch": 4} | values)


def test_a_search_refuses_before_it_is_traced():
    with pytest.raises(UserError, match="k = 6: the dataset has 5 rows"):
        jax.jit(functools.partial(neighbours.nearest, k=6))(random_index(5), *queries(2))


def test_observations_in_a_dict_are_refused():
    ring = rings.empty(1, 4, Spec((Leaf("a", (2,)), Leaf("b", (3,))), 1))
    for search in (neighbours.with_forest, lambda ring: neighbours.index_of((ring,), 0.0, 1.0)):
        with pytest.raises(UserError, match=r"observations are a dict \(a, b\); only vectors can be searched"):
            search(ring)


# Rings and runs


@dataclasses.dataclass(frozen=True)
class Searching:
    """All that a run asks of an agent before it begins, and that it searches."""

    kdtree: bool = True
    chunk: int = 1

    def requires(self) -> Requirements:
        """Returns what its data must have."""
        return Requirements(kdtree=self.kdtree)


def walk(path, episodes: int = 4, steps: int = 6):
    """Returns episodes on `point`, written to a file and read from it."""
    rng = np.random.default_rng(5)
    count = episodes * (steps + 1)
    columns = {
        "observations": rng.uniform(-1, 1, (count, 2)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (count, 2)).astype(np.float32),
        "terminals": np.arange(count) % (steps + 1) == steps,
    }
    files.save(path, files.from_columns(columns))
    return files.load(path)


def test_the_rows_of_an_index_are_the_transitions_of_the_dataset(tmp_path):
    dataset, env = walk(tmp_path / "data.npz"), envs.make("point")
    ring = loading.to_ring(dataset, env, searched=True)
    replay = rings.empty(2, 5, Spec(2, 2))
    data = neighbours.index_of((ring, replay), 0.0, jnp.array([2.0, 3.0]))
    assert data.forest is ring.forest is not None and replay.forest is None
    np.testing.assert_array_equal(np.flatnonzero(data.valid), np.flatnonzero(~dataset.terminals))
    np.testing.assert_array_equal(data.mean, [0, 0])
    steps = ~dataset.terminals
    for method in EXACT:
        _, row = jitted(data, dataset.observations[steps], dataset.actions[steps], method=method)
        np.testing.assert_array_equal(dataset.observations[row[:, 0]], dataset.observations[steps])
        _, row = jitted(data, dataset.observations[~steps], dataset.actions[~steps], method=method)
        assert steps[row].all()
    assert neighbours.index_of((replay,), 0.0, 1.0).states.shape == (10, 2)
    assert loading.to_ring(dataset, env).forest is None


def test_a_ring_is_one_program_for_each_forest_and_has_it_through_transformations():
    ring = rings.empty(1, 4, Spec(1, 1))
    one, other = (dataclasses.replace(ring, forest=random_index(3, seed=seed).forest) for seed in (0, 1))
    assert len(jax.tree.leaves(one)) == len(jax.tree.leaves(ring))
    assert jax.tree.map(jnp.copy, one).forest is one.forest
    assert jax.tree.structure(one) == jax.tree.structure(jax.tree.map(jnp.copy, one)) != jax.tree.structure(other)


def test_a_run_grows_trees_for_agents_that_search_a_single_file_on_the_cpu(tmp_path, monkeypatch):
    env = envs.make("point")
    walk(tmp_path / "one.npz")
    walk(tmp_path / "two.npz")
    base = Config(env="point", agent=Searching(), data=str(tmp_path / "one.npz"))

    def laid(config: Config):
        return in_memory(config, env, load_data(config, env), 1)

    ring = laid(base)
    assert ring.forest is not None and ring.forest.trees == {}
    assert laid(dataclasses.replace(base, agent=Searching(kdtree=False))).forest is None
    stream = laid(dataclasses.replace(base, data=str(tmp_path)))
    assert stream.at(0).forest is None  # each file would be a program of its own
    planned, copies = memory.abstract_data(base, env)
    assert planned.forest is not None and copies == 1
    assert jax.tree.map(jnp.shape, jax.tree.leaves(planned)) == jax.tree.map(jnp.shape, jax.tree.leaves(ring))
    world = SimpleNamespace(agent=(), world=None)
    monkeypatch.setattr(memory, "abstract", lambda config, env: (None, None, world))
    assert memory.held(base, env)["search trees"] == size_of_tree(29, 4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert laid(base).forest is None


# Over several devices

SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jaxrl.replay import neighbours
from jaxrl.replay.neighbours import Index
assert jax.device_count() == 4
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
mesh, axes = jax.make_mesh((2, 2), ("x", "y")), ("x", "y")
rng = np.random.default_rng(0)
for rows, k in ((103, 40), (2, 2)):
    states, actions, asked, wanted = (jnp.asarray(rng.normal(size=(n, 2)), jnp.float32) for n in (rows, rows, 9, 9))
    valid = jnp.arange(rows) >= rows - 73  # of 103 rows, none that the first device gets
    data = Index(states, actions, valid, jnp.zeros(2), jnp.ones(2))
    padded = (jnp.pad(x, ((0, -rows % 4), *((0, 0),) * (x.ndim - 1))) for x in (states, actions, valid))
    dealt = Index(*(jax.device_put(x, jax.NamedSharding(mesh, P(axes))) for x in padded), data.mean, data.weight)
    assert len(dealt.states) % 4 == 0 and len(dealt.states.sharding.device_set) == 4
    share = len(dealt.states) // 4
    few = min(k, share)

    def own(index, states, actions):
        distance, row = neighbours.nearest(index, states, actions, few, "blocks", max(40, few))
        found = distance, row + jax.lax.axis_index(axes).astype(jnp.int32) * share
        return neighbours.smallest(*(jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in found), k)

    parts = Index(P(axes), P(axes), P(axes), P(), P())
    search = jax.shard_map(own, mesh=mesh, in_specs=(parts, P(), P()), out_specs=(P(), P()), check_vma=False)
    alone = jax.jit(lambda index, s, a: neighbours.nearest(index, s, a, k=k, block=40))
    found, expected = jax.jit(search)(dealt, asked, wanted), alone(data, asked, wanted)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
print("the same")
"""


def test_keys_that_are_dealt_to_devices_give_the_same_neighbours():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    answer = subprocess.run([sys.executable, "-c", SHARDED], env=os.environ | flags, capture_output=True, text=True)
    assert answer.stdout == "the same\n", answer.stderr
