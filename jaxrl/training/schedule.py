"""How long a run is: a schedule, and the phases that follow from it."""

import dataclasses
import math

from jaxrl.errors import UserError
from jaxrl.types import Phase


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long a run is, and how it is cut into compiled epochs."""

    offline_updates: int = 1_000_000
    """Gradient steps on the dataset alone."""
    online_steps: int = 1_000_000
    """Environment steps after that, in all environments together."""
    utd: float = 1.0
    """Gradient steps per online environment step."""
    warmup_steps: int = 5_000
    """Online environment steps before the first online gradient step."""
    envs: int = 64
    """Environments that run side by side."""
    replay: int = 1_000_000
    """Online transitions kept, in all environments together."""
    updates_per_epoch: int = 5_000
    """Offline gradient steps per compiled call."""
    steps_per_epoch: int = 20_000
    """Online environment steps per compiled call."""
    eval_every: int = 1
    """Epochs between evaluations; the end of each phase is always evaluated."""
    eval_episodes: int = 100
    """Episodes per evaluation."""
    eval_seed: int = 12345
    """Seed of the evaluation's episodes, shared by all runs that are to be compared."""

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        for field in dataclasses.fields(self):
            low = 0 if field.name in ("offline_updates", "online_steps", "utd", "warmup_steps", "eval_seed") else 1
            if not low <= getattr(self, field.name) < math.inf:
                raise UserError(
                    f"schedule.{field.name} = {getattr(self, field.name)}: must be at least {low}, and finite"
                )
        if self.offline_updates == 0 and self.online_steps == 0:
            raise UserError("schedule.offline_updates = 0 and schedule.online_steps = 0: there is nothing to do")


def phases(schedule: Schedule, chunk: int, reward: tuple[float, float] = (1.0, 0.0)) -> tuple[Phase, ...]:
    """Returns the phases of a schedule, each with at least one epoch; sizes are rounded up to whole iterations."""
    result = []
    if schedule.offline_updates:
        per_epoch = min(schedule.updates_per_epoch, schedule.offline_updates)
        result.append(Phase("offline", -(-schedule.offline_updates // per_epoch), per_epoch, False, 1, data="dataset"))
    if schedule.online_steps:
        per_iteration = schedule.envs * chunk
        if schedule.warmup_steps:
            result.append(
                Phase(
                    "warmup",
                    1,
                    -(-schedule.warmup_steps // per_iteration),
                    True,
                    0,
                    reward,
                    data="none",
                    evaluated=False,
                )
            )
        iterations = max(min(schedule.steps_per_epoch, schedule.online_steps) // per_iteration, 1)
        updates = max(round(schedule.utd * per_iteration), 1) if schedule.utd else 0
        epochs = -(-schedule.online_steps // (per_iteration * iterations))
        result.append(Phase("online", epochs, iterations, True, updates, reward))
    return tuple(result)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The epochs of a run in a row."""

    phases: tuple[Phase, ...]

    @property
    def epochs(self) -> int:
        """How many there are."""
        return sum(phase.epochs for phase in self.phases)

    def at(self, epoch: int) -> tuple[Phase, int]:
        """Returns the phase of an epoch (counted from 0), and how many epochs of that phase lie before it."""
        for phase in self.phases:
            if epoch < phase.epochs:
                return phase, epoch
            epoch -= phase.epochs
        raise IndexError(epoch)

    def closes_phase(self, epoch: int) -> bool:
        """Whether an epoch is the last of its phase."""
        phase, before = self.at(epoch)
        return before + 1 == phase.epochs

    def evaluates(self, epoch: int, every: int) -> bool:
        """Whether the agent is evaluated after an epoch: after every so many, and at the end of each phase."""
        phase, _ = self.at(epoch)
        return phase.evaluated and ((epoch + 1) % every == 0 or self.closes_phase(epoch))
