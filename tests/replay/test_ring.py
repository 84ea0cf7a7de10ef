"""Facts about jaxrl.replay.ring. Every field of a row tells the row's own id, so that a window proves its alignment."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.ops import losses
from jaxrl.replay import ring as rings
from jaxrl.replay.kdtree import Forest
from jaxrl.replay.loading import from_dataset
from jaxrl.replay.ring import Steps
from jaxrl.replay.weighting import weights_of
from jaxrl.types import Leaf, Spec

add = jax.jit(rings.add)
window_at = jax.jit(rings.window_at, static_argnums=(3, 4))
windows = jax.jit(rings.windows, static_argnames=("batch", "length", "history"))

PAIR = Spec(observation=1, action=2)
ODDS = (0.12, 0.08, 0.05)  # of a step that terminates, that truncates, that is not finite
POISON = 7e5  # fills what did not happen
LANE = 10_000  # ids of lane l start at l * LANE


@dataclasses.dataclass(frozen=True)
class Transition:
    """What the reference remembers of one step: ids instead of arrays."""

    obs: int
    next_obs: int
    terminated: bool
    truncated: bool
    valid: bool

    @property
    def ends(self) -> bool:
        return self.terminated or self.truncated


class Reference:
    """The history of one lane as a plain list; None is the row of an episode's last observation."""

    def __init__(self, lane: int):
        self.rows: list[Transition | None] = []
        self.id = lane * LANE

    def chunk(
        self, length: int, rng: np.random.Generator, odds: tuple[float, ...] = ODDS
    ) -> tuple[list[Transition], bool]:
        """Returns the steps of a random chunk, and whether it ended the episode; the history remembers them."""
        steps = []
        for _ in range(length):
            terminated, truncated, broken = rng.random(3) < odds
            step = Transition(
                self.id, self.id + (not broken), terminated and not broken, truncated and not broken, not broken
            )
            steps.append(step)
            self.id = step.next_obs
            if step.ends or broken:
                break
        ended = steps[-1].ends or not steps[-1].valid
        self.rows += steps + [None] * ended
        self.id += ended  # the next episode starts with an observation of its own
        return steps, ended

    def window(self, start: int, length: int, kept: int) -> list[Transition]:
        """Returns the steps of the window that begins at the start-th of the last `kept` rows."""
        history, steps = self.rows[len(self.rows) - kept :], []
        for row in history[start : start + length]:
            if row is None or not row.valid:
                break
            steps.append(row)
            if row.ends:
                break
        return steps

    def before(self, start: int, length: int, kept: int) -> list[Transition]:
        """Returns the steps of the same episode before the start-th of the last `kept` rows, at most `length`."""
        history, steps = self.rows[len(self.rows) - kept :], []
        for row in reversed(history[max(start - length, 0) : start]):
            if row is None or not row.valid or row.ends:
                break
            steps.insert(0, row)
        return steps


def steps_of(chunks: list[tuple[list[Transition], bool]], length: int) -> Steps:
    """Returns random chunks as what a rollout hands over; what did not happen is poisoned, its flags all true."""
    count = len(chunks)
    obs = np.full((count, length + 1, 1), POISON)
    flags = {name: np.ones((count, length), bool) for name in ("terminated", "truncated", "valid")}
    taken, ended = np.zeros((count, length), bool), np.zeros(count, bool)
    for lane, (steps, over) in enumerate(chunks):
        ended[lane] = over
        obs[lane, 0] = steps[0].obs
        for j, step in enumerate(steps):
            taken[lane, j] = True
            obs[lane, j + 1] = step.next_obs
            for name, flag in flags.items():
                flag[lane, j] = getattr(step, name)
    ids = np.where(taken, obs[:, :length, 0], POISON)
    columns = {"obs": obs, "actions": np.stack([ids + 0.25, -ids], -1), "rewards": ids + 0.5}
    columns = {name: jnp.asarray(column, jnp.float32) for name, column in columns.items()}
    flags = {name: jnp.asarray(flag) for name, flag in {**flags, "taken": taken, "ended": ended}.items()}
    return Steps(**columns, **flags)


def expect(batch, row: int, steps: list[Transition], length: int) -> None:
    """Asserts that a row of a batch is the window that the reference gives."""
    k = len(steps)
    ids = np.array([step.obs for step in steps])
    repeated = np.append(ids, [ids[-1]] * (length - k))
    np.testing.assert_array_equal(batch.valid[row], np.arange(length) < k)
    np.testing.assert_array_equal(batch.obs[row], ids[:1])
    np.testing.assert_array_equal(batch.actions[row], np.stack([repeated + 0.25, -repeated], -1))
    np.testing.assert_array_equal(batch.rewards[row], np.append(ids + 0.5, np.zeros(length - k)))
    np.testing.assert_array_equal(batch.next_obs[row], [steps[-1].next_obs])
    assert batch.terminated[row] == steps[-1].terminated


@pytest.mark.parametrize(("chunk", "length", "rows"), [(4, 5, 23), (1, 3, 7), (5, 1, 12)])
def test_every_window_of_a_random_history_is_the_one_of_a_plain_list(chunk, length, rows):
    rng = np.random.default_rng(chunk)
    lanes = [Reference(lane) for lane in range(3)]
    ring = rings.empty(len(lanes), rows, PAIR)
    lane, start = (jnp.asarray(x.ravel()) for x in np.indices((len(lanes), rows)))
    whole = cut = 0
    for _ in range(60):
        ring = add(ring, steps_of([reference.chunk(chunk, rng) for reference in lanes], chunk))
        kept = [min(len(reference.rows), rows - 1) for reference in lanes]
        np.testing.assert_array_equal(ring.count, kept)
        assert not ((ring.terminated | ring.truncated) & ~ring.valid).any()  # flags are of steps that happened
        batch = jax.tree.map(np.asarray, window_at(ring, lane, start, length))
        for i, (at, age) in enumerate(zip(np.asarray(lane), np.asarray(start), strict=True)):
            steps = lanes[at].window(age, length, kept[at])
            if steps:
                expect(batch, i, steps, length)
            else:
                np.testing.assert_array_equal(batch.valid[i], np.zeros(length))
                np.testing.assert_array_equal(batch.rewards[i], np.zeros(length))
                assert not batch.terminated[i]
            whole, cut = whole + (len(steps) == length), cut + (0 < len(steps) < length)
    assert min(len(reference.rows) for reference in lanes) > 3 * rows  # every lane went round, several times
    assert whole > 250 and (cut > 250 or length == 1)


def history(*ends: str) -> Steps:
    """Returns one environment's steps 0, 1, ... where a letter says how each went: . e(nd) t(runcated) b(oth) n(an)."""
    steps = [Transition(i, i + (how != "n"), how in "eb", how in "tb", how != "n") for i, how in enumerate(ends)]
    return steps_of([(steps, steps[-1].ends or not steps[-1].valid)], len(steps))


def window(steps: Steps, start: int, length: int):
    ring = add(rings.empty(1, 20, PAIR), steps)
    return window_at(ring, jnp.array([0]), jnp.array([start]), length)


@pytest.mark.parametrize(
    ("how", "valid", "weight"),
    [
        (".....", (1, 1, 1, 1, 1), 1),
        (".e", (1, 1, 0, 0, 0), 0),
        (".t", (1, 1, 0, 0, 0), 1),
        (".b", (1, 1, 0, 0, 0), 0),
        ("....e", (1, 1, 1, 1, 1), 0),
        ("....t", (1, 1, 1, 1, 1), 1),
        ("....b", (1, 1, 1, 1, 1), 0),
        ("..n", (1, 1, 0, 0, 0), 1),
        ("...", (1, 1, 1, 0, 0), 1),
    ],
)
def test_termination_stops_the_bootstrap_and_nothing_else_does(how, valid, weight):
    batch = window(history(*how), 0, 5)
    np.testing.assert_array_equal(batch.valid[0], valid)
    k = sum(valid)
    np.testing.assert_array_equal(batch.next_obs[0], [k])
    target = losses.td_target(batch.rewards, batch.steps, batch.terminated, jnp.array([1024.0]), 0.5)
    rewards = sum(0.5**i * (i + 0.5) for i in range(k))
    np.testing.assert_allclose(target, [rewards + weight * 1024 * 0.5**k], rtol=1e-6)


def test_a_window_from_an_invalid_step_on_is_empty():
    batch = window(history(*"..n"), 2, 4)
    np.testing.assert_array_equal(batch.valid, np.zeros((1, 4)))
    np.testing.assert_array_equal(batch.rewards, np.zeros((1, 4)))


@pytest.mark.parametrize("flag", ["terminated", "truncated"])
def test_a_window_stops_at_a_flag_also_where_the_rows_go_on(flag):
    ring = add(rings.empty(1, 20, PAIR), history(*"......"))
    ring = dataclasses.replace(ring, **{flag: ring.valid & (jnp.arange(20) == 2)[None]})
    batch = window_at(ring, jnp.array([0, 0]), jnp.array([1, 3]), 3)
    np.testing.assert_array_equal(batch.valid, [[1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(batch.next_obs, [[3], [6]])
    np.testing.assert_array_equal(batch.terminated, [flag == "terminated", False])


def test_the_last_action_is_repeated_after_the_end():
    np.testing.assert_array_equal(window(history(*"..e"), 1, 5).actions[0, :, 0], [1.25, 2.25, 2.25, 2.25, 2.25])


def test_an_episode_goes_on_over_many_chunks():
    ring = rings.empty(1, 20, PAIR)
    reference, rng = Reference(0), np.random.default_rng(0)
    for _ in range(3):
        ring = add(ring, steps_of([reference.chunk(2, rng, odds=(0, 0, 0))], 2))
    assert (int(ring.head[0]), int(ring.count[0])) == (6, 6)
    batch = window_at(ring, jnp.array([0]), jnp.array([0]), 6)
    np.testing.assert_array_equal(batch.rewards[0], np.arange(6) + 0.5)
    np.testing.assert_array_equal(batch.next_obs[0], [6])


# Observations that are dicts


TREE = Spec((Leaf("id", (1,)), Leaf("image", (2, 1, 3), "uint8")), action=2)


def tree_of(obs: jax.Array) -> dict[str, jax.Array]:
    """Returns observations [..., 1] as dicts with an image of six bytes that are the id's, and those after it."""
    image = (obs[..., None, None].astype(jnp.int32) + jnp.arange(6).reshape(1, 1, 2, 1, 3)) % 256
    return {"id": obs, "image": image.astype(jnp.uint8)}


def test_dicts_keep_their_dtypes_and_are_stored_and_drawn_like_arrays():
    rng, lanes = np.random.default_rng(1), [Reference(lane) for lane in range(3)]
    plain, tree = (rings.empty(3, 23, spec) for spec in (PAIR, TREE))
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), tree.obs) == {
        "id": ((3, 23, 1), "float32"),
        "image": ((3, 23, 2, 1, 3), "uint8"),
    }
    lane, start = (jnp.asarray(x.ravel()) for x in np.indices((3, 23)))
    for _ in range(30):
        steps = steps_of([reference.chunk(4, rng) for reference in lanes], 4)
        plain = add(plain, steps)
        tree = add(tree, dataclasses.replace(steps, obs=tree_of(steps.obs)))
    wanted, found = window_at(plain, lane, start, 5, 3), window_at(tree, lane, start, 5, 3)
    real = np.asarray(found.valid[:, 0]) > 0
    for obs, ids, there in (
        (found.obs, wanted.obs, np.ones(len(lane))),
        (found.next_obs, wanted.next_obs, np.ones(len(lane))),
        (found.history.obs, wanted.history.obs, np.asarray(wanted.history.valid)),
    ):
        np.testing.assert_array_equal(obs["id"], ids)
        image = (np.asarray(ids, int) + np.arange(6)) % 256 * there[..., None].astype(int)
        assert obs["image"].dtype == jnp.uint8
        np.testing.assert_array_equal(np.asarray(obs["image"]).reshape(image.shape)[real], image[real])
    np.testing.assert_array_equal(found.rewards, wanted.rewards)
    both = windows((tree, tree), jax.random.key(0), 64, length=2)
    assert both.obs["image"].dtype == jnp.uint8
    np.testing.assert_array_equal(both.obs["image"][:, 0, 0, 0], np.asarray(both.obs["id"][:, 0], int) % 256)


# Further columns


LOG = {"log_density": jax.ShapeDtypeStruct((), jnp.float32), "chain": jax.ShapeDtypeStruct((2,), jnp.int32)}


def with_extra(steps: Steps) -> Steps:
    """Returns steps that leave their ids behind in two further columns."""
    ids = steps.rewards - 0.5
    extra = {"log_density": -ids, "chain": jnp.stack([ids, ids + 7], axis=-1).astype(jnp.int32)}
    return dataclasses.replace(steps, extra=extra)


def test_further_columns_are_stored_with_the_steps_and_windows_have_those_of_their_first():
    rng, lanes = np.random.default_rng(2), [Reference(lane) for lane in range(3)]
    ring = rings.empty(3, 23, PAIR, LOG)
    assert (ring.extra["chain"].shape, ring.extra["chain"].dtype) == ((3, 23, 2), jnp.int32)
    for _ in range(30):
        ring = add(ring, with_extra(steps_of([reference.chunk(4, rng) for reference in lanes], 4)))
    lane, start = (jnp.asarray(x.ravel()) for x in np.indices((3, 22)))
    batch = window_at(ring, lane, start, 3)
    real = np.asarray(batch.valid[:, 0]) > 0
    ids = np.asarray(batch.obs[:, 0])[real]
    assert real.sum() > 30
    np.testing.assert_array_equal(batch.extra["log_density"][real], -ids)
    np.testing.assert_array_equal(batch.extra["chain"][real], np.stack([ids, ids + 7], axis=-1))


def test_windows_of_several_rings_have_the_columns_that_all_of_them_have():
    full, other = two_rings()
    add_column = lambda ring, *names: dataclasses.replace(ring, extra={n: 2 * ring.rewards for n in names})  # noqa: E731
    batch = windows((add_column(full, "a", "b"), add_column(other, "c", "b")), jax.random.key(3), 500, length=2)
    assert set(batch.extra) == {"b"}
    real = np.asarray(batch.valid[:, 0]) > 0
    np.testing.assert_array_equal(batch.extra["b"][real], 2 * batch.rewards[real, 0])
    assert windows((full, add_column(other, "c")), jax.random.key(3), 5, length=2).extra == {}


@pytest.mark.parametrize(("kept", "message"), [({}, "keeps none, the steps bring chain, log_density"), (LOG, "brin")])
def test_columns_are_never_dropped_in_silence(kept, message):
    steps = history(*"...")
    with pytest.raises(UserError, match=message):
        rings.add(rings.empty(1, 9, PAIR, kept), steps if kept else with_extra(steps))


def test_what_a_ring_knows_besides_its_columns_is_kept():
    data, rewards, terminated = dataset(5, 4)
    ring = from_dataset(data, rewards, terminated, goals=data.observations)
    forest = Forest(*(np.asarray(x[0]) for x in (ring.obs, ring.actions, ring.valid)))
    weights = weights_of(np.zeros(2), np.array([0, 5]), np.array([4, 3]))
    known = dataclasses.replace(ring, forest=forest, weights=weights, extra={"mark": ring.rewards})
    steps = dataclasses.replace(history(*".."), extra={"mark": jnp.array([[3.0, 4.0]])})
    after = rings.add(known, steps)
    assert after.forest is forest and after.hindsight is ring.hindsight and after.weights is weights
    np.testing.assert_array_equal(after.extra["mark"][0, 9], 3.0)


# The steps before a window


@pytest.mark.parametrize(("chunk", "length", "rows"), [(4, 5, 23), (1, 3, 7), (5, 1, 12)])
def test_the_steps_before_every_window_are_those_of_a_plain_list(chunk, length, rows):
    rng, lanes = np.random.default_rng(chunk), [Reference(lane) for lane in range(3)]
    ring = rings.empty(len(lanes), rows, PAIR)
    lane, start = (jnp.asarray(x.ravel()) for x in np.indices((len(lanes), rows - 1)))
    counts = np.zeros(length + 1, int)
    for _ in range(60):
        ring = add(ring, steps_of([reference.chunk(chunk, rng) for reference in lanes], chunk))
        kept = [min(len(reference.rows), rows - 1) for reference in lanes]
        found = jax.tree.map(np.asarray, window_at(ring, lane, start, 1, length).history)
        for i, (at, age) in enumerate(zip(np.asarray(lane), np.asarray(start), strict=True)):
            if age >= kept[at]:
                continue  # no such window
            ids = np.array([step.obs for step in lanes[at].before(age, length, kept[at])])
            missing, counts[len(ids)] = length - len(ids), counts[len(ids)] + 1
            padded = lambda x, missing=missing: np.pad(x, [(missing, 0)] + [(0, 0)] * (x.ndim - 1))  # noqa: E731
            np.testing.assert_array_equal(found.valid[i], np.arange(length) >= missing)
            np.testing.assert_array_equal(found.obs[i, :, 0], padded(ids))
            np.testing.assert_array_equal(found.actions[i], padded(np.stack([ids + 0.25, -ids], -1).reshape(-1, 2)))
            np.testing.assert_array_equal(found.rewards[i], padded(ids + 0.5))
    assert min(len(reference.rows) for reference in lanes) > 3 * rows  # every lane went round, several times
    assert (counts > 30).all()  # every length of history was seen


def test_windows_have_their_history_whatever_ring_they_are_from():
    batch = windows(two_rings(), jax.random.key(4), 500, length=2, history=3)
    before, real = batch.history, np.asarray(batch.valid[:, 0]) > 0
    ids = np.asarray(batch.obs) - [[3, 2, 1]]
    there = np.asarray(before.valid) * real[:, None] > 0
    assert 100 < there.sum() < 3 * real.sum()
    np.testing.assert_array_equal(np.asarray(before.obs)[..., 0][there], ids[there])
    np.testing.assert_array_equal(np.asarray(before.rewards)[there], (ids + 0.5)[there])
    assert windows(two_rings(), jax.random.key(4), 500, length=2).history is None


# Drawing


def two_rings() -> tuple[rings.Ring, rings.Ring]:
    """Returns a ring of unequal lanes, one of them untouched, and a longer one of a single lane."""
    rng = np.random.default_rng(5)
    short, ring = [Reference(lane) for lane in range(3)], rings.empty(4, 30, PAIR)
    for count in (2, 4, 1):
        chunks = [reference.chunk(count, rng) for reference in short]
        idle = ([Transition(0, 0, False, False, True)], False)
        steps = steps_of([*chunks, idle], count)
        still = jnp.arange(4)[:, None] < 3
        ring = add(ring, dataclasses.replace(steps, taken=steps.taken & still))
    longer, other = Reference(7), rings.empty(1, 40, PAIR)
    for _ in range(25):
        other = add(other, steps_of([longer.chunk(3, rng)], 3))
    return ring, other


def test_starts_are_uniform_over_valid_rows_and_rings_weigh_by_their_rows():
    both, draws = two_rings(), 40_000
    batch = windows(both, jax.random.key(0), draws, length=2)
    drawn = np.asarray(batch.obs[:, 0])[np.asarray(batch.valid[:, 0]) > 0]
    rows = np.array([int(ring.count.sum()) for ring in both])
    expected = {}
    for ring, share in zip(both, rows / rows.sum(), strict=True):
        behind = (np.asarray(ring.head)[:, None] - 1 - np.arange(ring.valid.shape[1])) % ring.valid.shape[1]
        lane, age = np.nonzero(np.arange(ring.valid.shape[1]) < np.asarray(ring.count)[:, None])
        row = behind[lane, age]
        ids = np.asarray(ring.obs)[lane, row, 0][np.asarray(ring.valid)[lane, row]]
        missed = (1 - len(ids) / ring.count.sum()) ** rings.REDRAWS
        expected |= {float(i): draws * share * float(1 - missed) / len(ids) for i in ids}
    found, counts = np.unique(drawn, return_counts=True)
    assert set(found.tolist()) == set(expected)
    wanted = np.array([expected[i] for i in found.tolist()])
    chi = np.sum((counts - wanted) ** 2 / wanted)
    assert abs(chi - len(wanted)) < 4 * np.sqrt(2 * len(wanted))


def test_an_empty_ring_is_never_drawn_from():
    full, _ = two_rings()
    blank = rings.empty(2, 9, PAIR)
    blank = dataclasses.replace(blank, obs=blank.obs - 5)  # would be seen
    for both in ((full, blank), (blank, full)):
        batch = windows(both, jax.random.key(1), 500, length=3)
        assert float(batch.obs.min()) >= 0
    alone = windows((full,), jax.random.key(1), 500, length=3)
    assert float(alone.obs.min()) >= 0 and float(alone.valid[:, 0].mean()) > 0.9


def test_a_ring_without_any_history_gives_windows_of_no_weight():
    batch = windows((rings.empty(2, 9, PAIR),), jax.random.key(0), 8, length=3)
    np.testing.assert_array_equal(batch.valid, np.zeros((8, 3)))


def test_windows_of_several_rings_keep_their_fields_together():
    batch = windows(two_rings(), jax.random.key(2), 3000, length=3)
    real = np.asarray(batch.valid) > 0
    first = np.asarray(batch.obs)[:, 0]
    assert ((first >= 7 * LANE).any(), (first < 7 * LANE).any()) == (True, True)
    ids = first[:, None] + np.arange(3)
    np.testing.assert_array_equal(np.asarray(batch.rewards)[real], (ids + 0.5)[real])
    np.testing.assert_array_equal(np.asarray(batch.actions)[..., 0][real], (ids + 0.25)[real])
    k = real.sum(axis=1)
    np.testing.assert_array_equal(np.asarray(batch.next_obs)[k > 0, 0], (first + k)[k > 0])


# Datasets


def dataset(*lengths: int) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """Returns episodes of the given numbers of rows, in OGBench's compact layout, whose row i holds i everywhere."""
    ids = np.arange(sum(lengths), dtype=np.float32)
    terminals = np.zeros(len(ids), bool)
    terminals[np.cumsum(lengths) - 1] = True
    data = Dataset(ids[:, None], np.stack([ids + 0.25, -ids], -1).astype(np.float32), terminals)
    return data, ids + 0.5, np.zeros(len(ids), bool)


def every_window(ring: rings.Ring, length: int):
    """Returns the windows from every row of the history, in order, those without a step left out."""
    lane, start = np.nonzero(np.arange(ring.valid.shape[1]) < np.asarray(ring.count)[:, None])
    batch = window_at(ring, jnp.asarray(lane), jnp.asarray(start), length)
    keep = np.asarray(batch.valid[:, 0]) > 0
    return lane[keep], jax.tree.map(lambda x: np.asarray(x)[keep], batch)


@pytest.mark.parametrize("lanes", [1, 2, 6])
def test_a_dataset_is_every_one_of_its_transitions_once(lanes):
    lengths = (3, 7, 2, 5)
    data, rewards, terminated = dataset(*lengths)
    terminated[8] = True  # the second to last transition of the second episode ends the task
    ring = from_dataset(data, rewards, terminated, lanes)
    lane, batch = every_window(ring, 3)
    ids = batch.obs[:, 0].astype(int)
    assert sorted(ids) == [i for i in range(17) if not data.terminals[i]]
    last = np.flatnonzero(data.terminals)
    stop = last[np.searchsorted(last, ids)]  # the last row of the episode
    stop = np.where(ids <= 8, np.minimum(stop, 9), stop)
    k = np.minimum(3, stop - ids)
    np.testing.assert_array_equal(batch.valid, np.arange(3) < k[:, None])
    np.testing.assert_array_equal(batch.next_obs[:, 0], ids + k)
    np.testing.assert_array_equal(batch.terminated, (ids <= 8) & (ids + k == 9))
    np.testing.assert_array_equal(
        batch.actions[..., 1], -np.minimum(ids[:, None] + np.arange(3), (ids + k - 1)[:, None])
    )
    np.testing.assert_array_equal(batch.rewards, (ids[:, None] + np.arange(3) + 0.5) * batch.valid)
    episode = np.searchsorted(last, ids)
    assert all(len(set(lane[episode == e])) == 1 for e in range(4))  # each episode is whole in one lane


def test_lanes_are_filled_evenly_with_the_longest_episodes_first():
    ring = from_dataset(*dataset(3, 7, 2, 5), lanes=2)
    np.testing.assert_array_equal(ring.count, [7 + 2, 5 + 3])
    np.testing.assert_array_equal(from_dataset(*dataset(3, 7), lanes=1).obs[0, :10, 0], np.arange(10))


def test_truncation_is_what_ends_an_episode_without_termination():
    data, rewards, terminated = dataset(3, 4)
    terminated[[1, 2]] = True  # what a file says of its last row means nothing
    ring = from_dataset(data, rewards, terminated)
    np.testing.assert_array_equal(ring.terminated[0, :7], [0, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(ring.truncated[0, :7], [0, 0, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(ring.valid[0, :8], [1, 1, 0, 1, 1, 1, 0, 0])
    assert float(ring.rewards[0, 2]) == 0  # the reward of a row that nothing leaves means nothing


def test_a_dataset_must_close_its_last_episode():
    data, rewards, terminated = dataset(3, 4)
    opened = dataclasses.replace(data, terminals=data.terminals & (np.arange(7) < 5))
    with pytest.raises(UserError, match="the last row must close an episode"):
        from_dataset(opened, rewards, terminated)


# Learning from windows


@pytest.mark.parametrize(("chunk", "sweeps"), [(5, 4), (1, 20)])
def test_value_walks_down_a_chain_of_twenty_steps_in_chunks(chunk, sweeps):
    data, _, _ = dataset(21)
    ends = np.arange(21) == 19
    ring = from_dataset(data, ends.astype(np.float32), ends)
    batch = window_at(ring, jnp.zeros(20, int), jnp.arange(20), chunk)
    value = jnp.zeros(21)
    for sweep in range(1, sweeps + 1):
        bootstrap = value[batch.next_obs[:, 0].astype(int)]
        value = value.at[:20].set(losses.td_target(batch.rewards, batch.steps, batch.terminated, bootstrap, 0.9))
        np.testing.assert_allclose(
            value[:20], np.where(20 - np.arange(20) <= sweep * chunk, 0.9 ** np.arange(19, -1, -1), 0), rtol=1e-5
        )
        assert (float(value[0]) > 0) == (sweep == sweeps)
