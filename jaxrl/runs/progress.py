"""What a run spends its time on, and lines that say what takes long, also where the output is a file."""

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Generator

import jax
from tqdm import tqdm

PATIENCE = 10.0  # seconds until the first line about what is going on
FACTOR = 3.0  # until the next one, times as long as until the one before

_spans: list[tuple[float, float]] = []  # (start, end) of everything that was compiled, outermost spans only


def _compiled(event: str, duration: float, **about: str | float) -> None:
    """Notes a span of tracing, lowering or compiling; those within it are part of it."""
    if event.startswith("/jax/core/compile/"):
        end = time.perf_counter()
        while _spans and _spans[-1][0] >= end - duration:
            _spans.pop()
        _spans.append((end - duration, end))


jax.monitoring.register_event_duration_secs_listener(_compiled)  # ty: ignore[invalid-argument-type]


def compiling(since: float) -> float:
    """Returns the seconds spent tracing, lowering and compiling since a time of `time.perf_counter`."""
    return sum(end - max(start, since) for start, end in _spans if end > since)


@contextlib.contextmanager
def announced(what: str) -> Generator[None]:
    """A context for work that may take long: every now and then a line on stderr says that `what` goes on."""
    over, start = threading.Event(), time.perf_counter()

    def remind() -> None:
        due = PATIENCE
        while not over.wait(due - (time.perf_counter() - start)):
            with tqdm.external_write_mode():
                print(f"{what}: {due:.0f} s so far", file=sys.stderr, flush=True)
            due *= FACTOR

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Clock:
    """The seconds of each stage of an epoch (such as training, evaluating), with compiling as a stage of its own."""

    def __init__(self) -> None:
        """Starts at no seconds."""
        self.seconds: collections.defaultdict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def stage(self, name: str, what: str) -> Generator[None]:
        """A context whose seconds count for the stage `name`, without those of compiling; announces `what`."""
        start = time.perf_counter()
        with announced(what):
            yield
        waited = compiling(start)
        self.seconds["compiling"] += waited
        self.seconds[name] += max(time.perf_counter() - start - waited, 0.0)

    def taken(self) -> dict[str, float]:
        """Returns the seconds of each stage since the last call."""
        taken, self.seconds = dict(self.seconds), collections.defaultdict(float)
        return taken
