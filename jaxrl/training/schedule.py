"""The schedule of a run and the phases derived from it; agents may define their own phases."""

import dataclasses
import itertools
import math
from fractions import Fraction
from typing import Literal, get_args

from jaxrl import ranges
from jaxrl.errors import UserError
from jaxrl.types import Agent, OnPolicy, Phase, Scheduling, requirements

OnlineData = Literal["auto", "both", "replay"]
LARGEST = 2**31 - 1  # steps and updates are counted in int32
DENOMINATOR = 2**16 - 1  # of a fraction of updates per iteration: its products fit into uint32
FROM_ZERO = ("offline_updates", "online_steps", "utd", "warmup_steps", "eval_seed")  # numbers that may be 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The length of a run, and its division into compiled epochs."""

    offline_updates: int = 1_000_000
    """Gradient steps on the dataset only."""
    online_steps: int = 1_000_000
    """Environment steps after that, summed over all environments."""
    online_data: OnlineData = "auto"
    """Data of online updates: dataset and replay, or replay only; auto: both if the run has a dataset (without offline
    updates, only if a file is given)."""
    utd: float = 1.0
    """Gradient steps per online environment step."""
    warmup_steps: int = 5_000
    """Online environment steps before the first online gradient step."""
    envs: int = 64
    """Number of parallel environments."""
    replay: int = 1_000_000
    """Capacity of the replay in transitions, summed over all environments."""
    updates_per_epoch: int = 5_000
    """Offline gradient steps per compiled call."""
    steps_per_epoch: int = 20_000
    """Online environment steps per compiled call."""
    eval_every: int = 1
    """Epochs between evaluations; the end of each phase is always evaluated."""
    eval_episodes: int = 100
    """Episodes per evaluation."""
    eval_seed: int = 12345
    """Seed of the evaluation episodes; use the same for all compared runs."""

    def check(self) -> None:
        """Raises UserError if a value is out of range."""
        if self.online_data not in get_args(OnlineData):
            raise UserError(f"schedule.online_data = {self.online_data!r}: must be one of {get_args(OnlineData)}")
        for field in dataclasses.fields(self):
            if field.name == "online_data":
                continue
            low = 0 if field.name in FROM_ZERO else 1
            if not low <= getattr(self, field.name) < math.inf:
                raise UserError(
                    f"schedule.{field.name} = {getattr(self, field.name)}: must be at least {low}, and finite"
                )

        ranges.check_seed("schedule.eval_seed", self.eval_seed, following=1)  # sweeps evaluate on the next one, too

    def offline(self, name: str = "offline") -> tuple[Phase, ...]:
        """Returns the phase of updates on the dataset only; empty without such updates."""
        if not self.offline_updates:
            return ()
        epochs, iterations, last = divided(self.offline_updates, self.updates_per_epoch)
        return (Phase(name, epochs, iterations, False, 1, data="dataset", last=last),)

    def online(self, length: int, reward: tuple[float, float] = (1.0, 0.0)) -> tuple[Phase, ...]:
        """Returns the phases that collect: a warm-up without updates, then one with updates at the ratio `utd`.

        Steps are rounded up to whole iterations of one decision of `length` actions in every environment, but `utd` is
        kept exactly on average. `reward` is the (scale, shift) of rewards written to the replay.
        """
        if not self.online_steps:
            return ()
        per_iteration = self.envs * length
        filling = -(-self.warmup_steps // per_iteration)
        warmup = Phase("warmup", 1, filling, True, 0, reward, data="none", evaluated=False)
        epochs, iterations, last = self.collected(per_iteration)
        updates = ratio(self.utd, per_iteration)
        alone = self.online_data == "replay" or (self.online_data == "auto" and not self.offline_updates)
        data = "replay" if alone else "both"
        online = Phase("online", epochs, iterations, True, updates, reward, data=data, last=last)
        return (warmup, online) if self.warmup_steps else (online,)

    def collected(self, per_iteration: int) -> tuple[int, int, int]:
        """Returns the epochs for all online steps, and their iterations, as `divided` does."""
        return divided(-(-self.online_steps // per_iteration), self.steps_per_epoch // per_iteration)

    def on_policy(self, length: int, unroll: int, reward: tuple[float, float] = (1.0, 0.0)) -> tuple[Phase, ...]:
        """Returns the phase of an on-policy agent; empty without online steps.

        An iteration is `unroll` decisions of `length` actions in every environment, and one update on them.
        """
        if not self.online_steps:
            return ()
        epochs, iterations, last = self.collected(self.envs * length * unroll)
        return (Phase("online", epochs, iterations, True, 1, reward, data="none", last=last),)


def divided(total: int, at_most: int) -> tuple[int, int, int]:
    """Returns (epochs, iterations of each, iterations of the last, or 0 if as many) of `total` iterations."""
    iterations = min(max(at_most, 1), total)
    return -(-total // iterations), iterations, total % iterations


def ratio(utd: float, steps: int) -> int | Fraction:
    """Returns the updates per iteration of `steps` environment steps, as a fraction if they are not whole.

    The decimal number that was asked is kept exactly if its denominator is at most `DENOMINATOR`, else to 1 / that.
    Raises UserError for a ratio that rounds to no updates at all.
    """
    exact = Fraction(str(utd)) * steps
    updates = exact.limit_denominator(DENOMINATOR)
    if exact and not updates:
        raise UserError(f"schedule.utd = {utd}: must be 0 or at least {1 / (DENOMINATOR * steps):.1g}")
    return int(updates) if updates.denominator == 1 else updates


def phases(
    schedule: Schedule,
    agent: Agent,
    reward: tuple[float, float] = (1.0, 0.0),
    dataset: bool = False,
    length: int | None = None,
) -> tuple[Phase, ...]:
    """Returns the phases of a run, in order: those defined by its agent (`types.Scheduling`), or offline, then online.

    They do not depend on Scalars of the agent. `dataset` means that there is a dataset even without offline updates;
    `length` is the number of executed actions per decision, by default the whole chunk. Raises UserError if there are
    no phases, or if the data of a phase do not exist.
    """
    length = length or agent.chunk
    if dataset and schedule.online_data == "auto":
        schedule = dataclasses.replace(schedule, online_data="both")
    if isinstance(agent, Scheduling):
        found = agent.phases(schedule, length, reward)
    elif isinstance(agent, OnPolicy):
        found = (*schedule.offline(), *schedule.on_policy(length, agent.unroll, reward))
    else:
        found = (*schedule.offline(), *schedule.online(length, reward))
    if not found:
        raise UserError(
            f"schedule.offline_updates = {schedule.offline_updates} and schedule.online_steps = "
            f"{schedule.online_steps}: there is nothing to do"
        )
    check(found, agent)
    check_counters(found, schedule.envs * length * (agent.unroll if isinstance(agent, OnPolicy) else 1))
    before = itertools.accumulate((phase.epochs for phase in found), initial=0)
    return tuple(dataclasses.replace(phase, start=start) for phase, start in zip(found, before, strict=False))


def check_counters(found: tuple[Phase, ...], steps: int) -> None:
    """Raises UserError if a run counts beyond int32; an iteration that collects makes at most `steps` steps."""
    totals = {
        "updates": sum(phase.total * phase.updates for phase in found),
        "environment steps": sum(phase.total * steps for phase in found if phase.collects),
    }
    for name, total in totals.items():
        if total > LARGEST:
            raise UserError(
                f"the schedule makes {int(total):,} {name}, must be at most {LARGEST:,}: split it into runs"
            )


def check(found: tuple[Phase, ...], agent: Agent) -> None:
    """Raises UserError for invalid phases, which a custom agent may define."""
    collected = False
    for phase in found:
        collected |= phase.collects
        wrong = None
        if phase.name == "behaviour":
            wrong = "this name is reserved for the behavior of the data"
        elif min(phase.epochs, phase.iterations) < 1 or phase.updates < 0:
            wrong = "needs at least one epoch of one iteration, and no negative number of updates"
        elif not 0 <= phase.last < phase.iterations:
            wrong = f"last = {phase.last}: must be 0, or fewer iterations than the {phase.iterations} of other epochs"
        elif Fraction(phase.updates).denominator > DENOMINATOR:
            wrong = f"updates = {phase.updates}: the denominator must be at most {DENOMINATOR}"
        elif reads_replay(phase) and phase.updates and not collected:
            wrong = "learns from the replay, but nothing was collected before"
        elif phase.data == "none" and not isinstance(phase.updates, int):
            wrong = f"updates = {phase.updates}: an on-policy agent makes whole updates"
        elif phase.data == "none" and phase.updates and not (phase.collects and isinstance(agent, OnPolicy)):
            wrong = "makes updates, but has no data to learn from"
        elif requirements(agent).dataset and phase.updates and not reads_dataset(phase):
            wrong = f"{type(agent).__name__} looks up the dataset in every update: set --schedule.online-data both"
        if wrong is not None:
            raise UserError(f"phase {phase.name!r}: {wrong}")
    if not found[-1].evaluated:
        raise UserError(f"phase {found[-1].name!r}: the last phase must be evaluated")


def reads_dataset(phase: Phase) -> bool:
    """Returns whether a phase learns from the dataset."""
    return phase.data in ("dataset", "both")


def reads_replay(phase: Phase) -> bool:
    """Returns whether a phase learns from the replay."""
    return phase.data in ("replay", "both")


def capacity(schedule: Schedule, found: tuple[Phase, ...], length: int) -> int:
    """Returns the replay capacity of a run in transitions; 0 if no phase learns from the replay."""
    if not any(reads_replay(phase) for phase in found):
        return 0
    iterations = sum(phase.total for phase in found if phase.collects)
    return min(schedule.replay, 2 * schedule.online_steps or iterations * schedule.envs * length)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The sequence of epochs of a run."""

    phases: tuple[Phase, ...]

    @property
    def epochs(self) -> int:
        """The number of epochs."""
        return sum(phase.epochs for phase in self.phases)

    def at(self, epoch: int) -> tuple[Phase, int]:
        """Returns the phase of an epoch (counted from 0), and the number of earlier epochs in that phase."""
        for phase in self.phases:
            if epoch < phase.epochs:
                return phase, epoch
            epoch -= phase.epochs
        raise IndexError(epoch)

    def begun(self, epochs: int) -> tuple[Phase, ...]:
        """Returns the phases that contain at least one of the first `epochs` epochs."""
        before = [sum(phase.epochs for phase in self.phases[:i]) for i in range(len(self.phases))]
        return tuple(phase for phase, first in zip(self.phases, before, strict=True) if first < epochs)

    def closes_phase(self, epoch: int) -> bool:
        """Returns whether an epoch is the last of its phase."""
        phase, before = self.at(epoch)
        return before + 1 == phase.epochs

    def evaluates(self, epoch: int, every: int) -> bool:
        """Returns whether the agent is evaluated after an epoch: after every `every`-th, and at each phase's end."""
        phase, _ = self.at(epoch)
        return phase.evaluated and ((epoch + 1) % every == 0 or self.closes_phase(epoch))
