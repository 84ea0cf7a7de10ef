"""Replays `trajweight_*`: probabilities of transitions by trajectory weighting, as the data option lays them out."""

import numpy as np

from jaxrl.data.files import Dataset, from_columns
from jaxrl.replay import loading
from jaxrl.replay.weighting import FULL, Weighting, Weights
from tests.golden.recorded import Recorded


def replay(r: Recorded) -> dict[str, np.ndarray]:
    """Returns all that the file expects: one probability per transition and law."""
    temperature = r.hparams["temperature"]
    laws = {
        "return_weighting": Weighting("return", temperature),
        "advantage_weighting": Weighting("advantage", temperature),
        "top_10_percent": Weighting("top", temperature, fraction=0.1),
        "top_50_percent": Weighting("top", temperature, fraction=0.5),
    }
    data, kept = as_dataset(r), r["dataset/episode_lengths"]
    got = {}
    for name, law in laws.items():
        weights = loading.weigh(data, law)
        assert weights is not None and np.array_equal(weights.steps, kept)
        got[f"expected/exact/{name}"] = np.repeat(drawn(weights) / kept, kept)
    return got


def as_dataset(r: Recorded) -> Dataset:
    """Returns the file's transitions; every observation but the first of an episode is also a next one."""
    obs = r["dataset/observations"]
    columns = {"observations": obs, "rewards": r["dataset/rewards"], "terminals": r["dataset/episode_end"]}
    return from_columns(columns | {"actions": np.zeros((len(obs), 1)), "next_observations": np.roll(obs, -1, axis=0)})


def drawn(weights: Weights) -> np.ndarray:
    """Returns the probability of each trajectory that an alias table stands for, without sampling."""
    count = len(weights.steps)
    own = np.asarray(weights.share, np.float64) / FULL
    other = np.asarray(weights.other)
    own = np.where(other == np.arange(count), 1.0, own)
    return (own + np.bincount(other, 1 - own, minlength=count)) / count
