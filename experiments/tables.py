"""What the studies' tables share. Their results hold `seeds`: per seed, rows of metrics by name of the variant."""

from typing import Any

import numpy as np

from jaxrl import stats
from jaxrl.runs import directory


def machine(digest: str) -> dict[str, Any]:
    """Returns the versions, the machine and the data that a study's numbers depend on."""
    return {name: value for name, value in directory.manifest(digest).items() if name != "argv"}


def last(results: dict[str, Any], name: str, metric: str = "success") -> np.ndarray:
    """Returns a metric of each seed's last evaluation."""
    return np.array([seed[name][-1][f"eval/{metric}"] for seed in results["seeds"]])


def spread(values: np.ndarray, digits: int) -> str:
    """Returns the mean over seeds with its interval."""
    low, high = stats.mean_interval(values) if len(values) > 1 and np.ptp(values) else (values[0], values[0])
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def footnote(results: dict[str, Any]) -> str:
    """Returns what the numbers are: environment, seeds, episodes, kinds of interval, machine."""
    device, versions = results["manifest"]["device"], results["manifest"]["versions"]
    return (
        f"\n`{results['config']['env']}`, {len(results['seeds'])} seeds, "
        f"{results['config']['schedule']['eval_episodes']} episodes each. In brackets 95 % intervals: of the mean over "
        f"seeds (bootstrap), of the behaviour over episodes (Wilson). {results['manifest']['cores']} {device} cores, "
        f"jax {versions['jax']}, mujoco-mjx {versions['mujoco-mjx']}."
    )
