"""Where the time goes: stages without what compiles in them, and lines about what takes long."""

import time

import jax
import jax.numpy as jnp

from jaxrl.runs import jsonlines, progress
from jaxrl.runs.logging import Log
from jaxrl.runs.progress import Clock, announced
from jaxrl.types import Phase


def test_compiling_is_a_stage_of_its_own():
    clock = Clock()
    with clock.stage("training", "training"):
        jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)(jnp.ones((3, 3))).block_until_ready()
    first = clock.taken()
    assert first.keys() == {"compiling", "training"} and first["compiling"] > 0 and first["training"] >= 0
    with clock.stage("training", "training"), clock.stage("evaluating", "evaluating"):
        time.sleep(0.05)
    second = clock.taken()
    assert second["compiling"] == 0 and second["evaluating"] >= 0.05
    assert clock.taken() == {}


def test_spans_within_a_span_are_part_of_it(monkeypatch):
    monkeypatch.setattr(progress, "_spans", [])
    for now, duration in ((10.0, 1.0), (12.0, 1.0), (13.0, 5.0), (20.0, 1.0)):
        monkeypatch.setattr(progress.time, "perf_counter", lambda now=now: now)
        progress._compiled("/jax/core/compile/backend_compile_duration", duration)
        progress._compiled("/jax/other", 100.0)
    assert progress._spans == [(8.0, 13.0), (19.0, 20.0)]
    assert (progress.compiling(0.0), progress.compiling(12.0), progress.compiling(30.0)) == (6.0, 2.0, 0)


def test_what_takes_long_is_told(monkeypatch, capsys):
    with announced("reading x"):
        pass
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    monkeypatch.setattr(progress, "FACTOR", 1e6)
    lines = ""
    with announced("reading y"):
        while "\n" not in lines:
            lines += capsys.readouterr().err
    assert lines + capsys.readouterr().err == "reading y: 0 s so far\n"


def test_rates_are_of_training_alone(tmp_path):
    log = Log(tmp_path)
    log.start(Phase("online", 2, 4, True, 1, last=3), 0, chunk=5, envs=2)
    row = {"phase": "online", "updates": 0, "steps": 0}
    log.row(row | {"epoch": 1}, {"training": 2.0, "evaluating": 5.0, "compiling": 3.0})
    log.row(row | {"epoch": 2}, {"training": 2.0})
    log.close()
    rows = jsonlines.rows(tmp_path / "timings.jsonl")
    assert [row["per_second"] for row in rows] == [4 * 10 / 2, 3 * 10 / 2]
    assert (rows[0]["evaluating"], rows[0]["compiling"]) == (5.0, 3.0)
