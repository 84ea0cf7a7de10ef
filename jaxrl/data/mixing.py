"""Datasets made of whole episodes of others: chosen ones, mixtures, the best."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxrl.data import files
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError


def take(dataset: Dataset, chosen: Sequence[int] | np.ndarray) -> Dataset:
    """Returns these episodes of a dataset, in this order; an index that occurs twice gives an episode twice."""
    first, last = files.episodes(dataset)
    rows = np.concatenate([np.arange(first[i], last[i] + 1) for i in chosen])
    return files.from_columns({name: column[rows] for name, column in files.to_columns(dataset).items()})


def mix(good: Dataset, bad: Dataset, ratio: float, steps: int, seed: int = 0) -> Dataset:
    """Returns at least `steps` steps of whole episodes in random order, int(steps * ratio) of them from `good`.

    Episodes of each are drawn with replacement until its share is reached, as in Hong et al. (2023). Extra columns that
    only one of the two has are left out.

    Raises:
        UserError: a ratio outside [0, 1], no steps, sizes that differ, rewards in one of the two only.
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"ratio = {ratio:g}: must be in [0, 1]")
    if steps < 1:
        raise UserError(f"steps = {steps}: must be at least 1")
    columns = _alike(good, bad)
    random = np.random.default_rng(seed)
    share = int(steps * ratio)
    episodes = [(0, i) for i in _drawn(good, share, random)] + [(1, i) for i in _drawn(bad, steps - share, random)]
    firsts, lasts = zip(files.episodes(good), files.episodes(bad), strict=True)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in columns[0]}
    for place in random.permutation(len(episodes)):
        source, i = episodes[place]
        for name, column in columns[source].items():
            parts[name].append(column[firsts[source][i] : lasts[source][i] + 1])
    return files.from_columns({name: np.concatenate(pieces) for name, pieces in parts.items()})


def top(dataset: Dataset, fraction: float) -> Dataset:
    """Returns the episodes with the largest returns, floor(fraction * episodes) but at least one, in their old order.

    Raises:
        UserError: a fraction outside (0, 1], no rewards.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction = {fraction:g}: must be in (0, 1]")
    if dataset.rewards is None:
        raise UserError(f"dataset {dataset.path}: has no rewards to compare episodes by: relabel it with --env")
    returns = files.episode_returns(dataset)
    best = np.argsort(-returns, kind="stable")[: max(1, int(len(returns) * fraction))]
    return take(dataset, np.sort(best))


def _drawn(dataset: Dataset, steps: int, random: np.random.Generator) -> list[int]:
    """Returns indices of episodes, drawn with replacement until these have so many steps."""
    first, last = files.episodes(dataset)
    chosen: list[int] = []
    while steps > 0:
        chosen.append(int(random.integers(len(last))))
        steps -= int(last[chosen[-1]] - first[chosen[-1]])
    return chosen


def _alike(good: Dataset, bad: Dataset) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the columns that both have. If only one has masks, no step of the other ends its task."""
    pair = (good, bad)
    if (good.rewards is None) != (bad.rewards is None):
        lacking = next(dataset for dataset in pair if dataset.rewards is None)
        raise UserError(f"dataset {lacking.path}: has no rewards, the other has: relabel both with --env")
    if good.masks is not None or bad.masks is not None:
        pair = tuple(_with_masks(dataset) for dataset in pair)
    columns = [files.to_columns(dataset) for dataset in pair]
    shared = columns[0].keys() & columns[1].keys()
    for name in sorted(shared):
        one, other = (each[name].shape[1:] for each in columns)
        if one != other:
            raise UserError(f"a row of column {name!r} is {one} in {good.path}, {other} in {bad.path}")
    one, other = ({name: each[name] for name in each if name in shared} for each in columns)
    return one, other


def _with_masks(dataset: Dataset) -> Dataset:
    if dataset.masks is not None:
        return dataset
    return dataclasses.replace(dataset, masks=np.ones(len(dataset.terminals), np.float32))
