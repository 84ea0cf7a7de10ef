"""Facts about jaxrl.synthesis.segments: sub-trajectories of a dataset, and generated ones as a dataset."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.data import files
from jaxrl.errors import UserError
from jaxrl.synthesis import segments
from tests.known import KEY, quick_to_compile


@pytest.fixture(autouse=True)
def quick():
    with quick_to_compile():
        yield


def file_of(*episodes) -> files.Dataset:
    """Returns a dataset of episodes, each a list of masks; the observation of row t is (t, -t), its reward t / 10."""
    masks = [[*masks, 1] for masks in episodes]
    flat = np.concatenate(masks).astype(np.float32)
    t = np.arange(len(flat), dtype=np.float32)
    columns = {
        "observations": np.stack([t, -t], axis=1),
        "actions": np.sin(t)[:, None],
        "rewards": t / 10,
        "masks": flat,
        "terminals": np.concatenate([np.arange(len(part)) == len(part) - 1 for part in masks]),
    }
    return files.from_columns(columns)


CLOCK = [1] * 10  # ten steps, then the clock runs out
TASK = [1] * 9 + [0]  # ten steps, of which the last ends the task


@pytest.mark.parametrize(
    ("episodes", "length", "stride", "starts"),
    [
        ([CLOCK], 4, 2, [0, 2, 4]),  # the last step is after which the clock ran out: 5..8 would be the last
        ([CLOCK], 4, 1, [0, 1, 2, 3, 4, 5]),
        ([CLOCK], 9, 8, [0]),
        ([TASK], 4, 2, [0, 2, 4, 6]),
        ([TASK], 4, 4, [0, 4, 6]),  # 6..9 ends with the task
        ([TASK], 10, 8, [0]),
        ([CLOCK, TASK], 9, 8, [0, 11, 12]),  # the rows of the second episode are 11 to 21
        ([[1, 1, 0, 1, 1, 1, 1]], 3, 1, [0, 3]),  # the task begins anew in the middle of an episode
        ([[0] * 5, TASK], 4, 4, [6, 10, 12]),  # ends in every step: nothing there is long enough
    ],
)
def test_sub_trajectories_hold_no_end_but_the_tasks_in_their_last_step(episodes, length, stride, starts):
    np.testing.assert_array_equal(segments.starts_of(file_of(*episodes), length, stride), starts)


def test_a_file_without_masks_has_time_limits_only():
    dataset = dataclasses.replace(file_of(TASK), masks=None)
    np.testing.assert_array_equal(segments.starts_of(dataset, 4, 4), [0, 4])


def test_features_are_standardized_over_all_sub_trajectories_and_constant_ones_only_shifted():
    dataset = file_of(TASK, CLOCK)
    learn, judge = segments.segments(dataset, 4, 3)
    assert len(judge.starts) == 0  # 5 % of two episodes
    rows = segments.features(dataset)
    np.testing.assert_allclose(rows[:, 2], np.arctanh(np.clip(np.sin(np.arange(22.0)), -0.999, 0.999)), rtol=1e-4)
    np.testing.assert_array_equal(np.flatnonzero(rows[:, 4]), [9])  # the end of the task, not that of an episode
    windows = rows[np.asarray(learn.starts)[:, None] + np.arange(4)].reshape(-1, 5)
    np.testing.assert_allclose(learn.scale.mean, windows.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(learn.scale.std, windows.std(axis=0), rtol=1e-5)
    drawn = learn.draw(KEY, 2)
    assert drawn.shape == (2, 4, 5)
    np.testing.assert_allclose(jnp.diff(drawn[..., 0], axis=1) * learn.scale.std[0], 1, rtol=1e-4)  # steps in a row
    never, _ = segments.segments(file_of(CLOCK), 4, 3)
    assert never.scale.std[4] == 1 and never.scale.mean[4] == 0


def test_one_episode_in_twenty_is_held_out():
    learn, judge = segments.segments(file_of(*[CLOCK] * 40), 4, 2)
    episode = lambda part: set(np.asarray(part.starts) // 11)  # noqa: E731
    assert len(episode(judge)) == 2 and len(episode(learn)) == 38 and not episode(judge) & episode(learn)


def test_a_dataset_without_a_long_enough_episode_is_refused():
    with pytest.raises(UserError, match="no episode has 10 consecutive steps"):
        segments.segments(file_of(CLOCK), 10, 1)


def test_what_a_model_would_generate_perfectly_is_the_data_again():
    dataset = file_of(TASK, [1] * 11)
    learn, _ = segments.segments(dataset, 10, 1)
    generated = learn.rows[np.asarray(learn.starts)[:, None] + np.arange(10)]
    obs, actions, rewards, ended = map(np.asarray, learn.scale.read(generated))
    again = segments.to_dataset(obs, actions, rewards, ended)
    first, last = files.episodes(again)
    np.testing.assert_array_equal(last - first, [10, 9])  # the last state of the second leads nowhere
    steps = np.r_[0:10, 11:20]
    np.testing.assert_allclose(again.observations[steps], dataset.observations[steps], atol=1e-5)
    np.testing.assert_allclose(again.actions[steps], np.clip(dataset.actions[steps], -0.999, 0.999), atol=1e-5)
    np.testing.assert_allclose(again.rewards[steps], dataset.rewards[steps], atol=1e-5)
    np.testing.assert_array_equal(np.flatnonzero(again.masks == 0), [9])


def test_what_follows_a_generated_end_is_dropped():
    ended = np.array([[0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    obs = np.arange(32.0).reshape(4, 4, 2)
    rewards = 1 + np.arange(16.0).reshape(4, 4)
    dataset = segments.to_dataset(obs, np.full((4, 4, 1), 0.5), rewards, ended)
    first, last = files.episodes(dataset)
    np.testing.assert_array_equal(last - first, [3, 1, 3, 4])
    np.testing.assert_array_equal(dataset.masks, [*[1, 1, 1, 1], *[0, 1], *[1, 1, 0, 1], *[1, 1, 1, 0, 1]])
    np.testing.assert_array_equal(dataset.rewards, [*[1, 2, 3, 0], *[5, 0], *[9, 10, 11, 0], *[13, 14, 15, 16, 0]])
    np.testing.assert_array_equal(dataset.observations[:, 0], [0, 2, 4, 6, 8, 10, 16, 18, 20, 22, 24, 26, 28, 30, 30])
    with pytest.raises(UserError, match="not finite"):
        segments.to_dataset(np.where(obs == 7, np.nan, obs), np.zeros((4, 4, 1)), rewards, ended)
