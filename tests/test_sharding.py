"""One run over several devices: the same numbers, arrays that lie where they should, and refusals."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import envs
from jaxrl import sharding
from jaxrl.agents.td3bc import TD3BC
from jaxrl.errors import UserError
from jaxrl.runs import driver
from jaxrl.training import loop
from jaxrl.training.schedule import Schedule, phases
from tests.known import quick_to_compile, with_fields
from tests.sweeps.test_population import AGENT, dataset

ENV = envs.make("point")
SCHEDULE = Schedule(
    offline_updates=0, online_data="both", online_steps=20, utd=0.3, warmup_steps=0, envs=4, steps_per_epoch=8
)


def epochs():
    """Returns the carry after the schedule's epochs, the metrics of each, and the evaluation's returns."""
    agent, data = loop.on_device(AGENT), sharding.shared(dataset())
    carry = driver.on_devices(loop.jitted_begin(agent, ENV, SCHEDULE, jax.random.key(0)))
    (phase,) = phases(SCHEDULE, AGENT)
    history = []
    for _ in range(phase.epochs):
        carry, metrics = loop.jitted_epoch(agent, ENV, phase, carry, data)
        history.append({name: float(value) for name, value in metrics.items() if name != "digest"})
    returns = loop.jitted_evaluate(agent, ENV, 8, carry.agent, jax.random.key(1)).returns
    return carry, history, np.asarray(returns).tolist()


SPREAD = """
import json, logging
import jax
from jaxrl import sharding
from tests import test_sharding as t
from tests.known import quick_to_compile
compiled = []
handler = logging.Handler()
handler.emit = lambda record: compiled.append(record.getMessage())
logging.getLogger("jax").addHandler(handler)
with quick_to_compile(), sharding.across(4), jax.log_compiles():
    carry, history, returns = t.epochs()
    parts = lambda x: x.sharding.shard_shape(x.shape)[0] / x.shape[0]
    print(json.dumps({
        "agent": sorted({parts(x) for x in jax.tree.leaves(carry.agent.params) if x.ndim}),
        "world": sorted({parts(x) for x in jax.tree.leaves(carry.world)}),
        "programs": sum(line.startswith("Compiling jit(epoch)") for line in compiled),
        "history": history,
        "returns": returns,
    }))
"""


def test_four_devices_compute_what_one_does():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-c", SPREAD], env=os.environ | flags, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert (found["agent"], found["world"], found["programs"]) == ([1.0], [0.25], 1)
    with quick_to_compile():
        _, history, returns = epochs()
    for row, other in zip(found["history"], history, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            np.testing.assert_allclose(row[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(found["returns"], returns, rtol=1e-5)


def test_without_several_devices_nothing_is_moved():
    tree = {"x": np.arange(4)}
    assert not sharding.several()
    assert sharding.spread(tree) is tree and sharding.shared(tree) is tree
    with sharding.across(1):
        assert not sharding.several()


@pytest.mark.parametrize(
    ("batch", "environments", "count", "message"),
    [
        (16, 4, 3, "devices = 3: there are 2"),
        (16, 4, 0, "devices = 0: there are 2"),
        (15, 4, 2, "the agent's batch = 15: must be a multiple of the 2 devices"),
        (16, 3, 2, "schedule.envs = 3: must be a multiple of the 2 devices"),
    ],
)
def test_what_cannot_be_spread_is_refused(batch, environments, count, message, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [None, None])
    sharding.check(AGENT, ENV, 4, 2)
    with pytest.raises(UserError, match=message):
        sharding.check(with_fields(TD3BC(), batch=batch), ENV, environments, count)
