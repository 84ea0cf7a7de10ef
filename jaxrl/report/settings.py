"""Grouping of runs into tasks and settings, labels of settings, and checks that compared runs are comparable."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxrl.errors import UserError
from jaxrl.report.folders import RunRecord

Mix = Literal["eval-seed", "episodes", "budget", "simulator", "data"]

UNSET = (  # fields that do not distinguish settings
    *("seed", "checkpoint_every", "schedule.eval_every", "schedule.eval_episodes", "schedule.eval_seed"),
    *("env", "data", "behaviour", "data_steps"),
)
NAMED_FIELDS = 4  # with more differing fields, a label shows only those needed to distinguish settings
SPENT, MARGIN = "the budget spent", 0.1  # equal plans differ by a few percent: whole chunks, episode ends


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs whose configurations are equal except for seed, task and evaluation."""

    label: str
    """The agent's name, and the fields in which the settings of this agent differ."""
    agent: str
    values: dict[str, Any]
    """Those fields, by their dotted names."""
    members: tuple[RunRecord, ...]
    counted: tuple[RunRecord, ...]
    """The members that make up the score: those that spent their whole budget, or, if none did, the others."""
    partial: bool
    """Whether no member spent its whole budget and budgets may not be mixed: excluded from comparisons."""

    def on(self, task: str) -> tuple[RunRecord, ...]:
        """Returns the counted members on a task."""
        return tuple(member for member in self.counted if member.task == task)


def with_tasks(members: Sequence[RunRecord]) -> list[RunRecord]:
    """Returns the members with their tasks: the environment, and the data if one environment has several.

    Files with equal content are the same data, regardless of their names.
    """
    names: dict[tuple[str, str | None], str] = {}
    for member in members:
        names.setdefault((member.config["env"], member.digest), _data(member))
    several = Counter(env for env, _ in {(env, name) for (env, _), name in names.items()})

    def task(member: RunRecord) -> str:
        env = member.config["env"]
        return env if several[env] == 1 else f"{env}, {names[env, member.digest]}"

    return [dataclasses.replace(member, task=task(member)) for member in members]


def _data(member: RunRecord) -> str:
    if member.digest is None:
        return "no dataset"
    data = member.config["data"]
    return f"{member.config['behaviour']} {member.config['data_steps']}" if data is None else Path(data).name


def grouped(members: Iterable[RunRecord], score: str, pool: bool) -> tuple[list[Setting], list[str]]:
    """Returns the settings, in the order of their first members, and notes on excluded members.

    With `pool`, members that spent only part of their budget count like the others.
    """
    groups, notes = _groups(members)
    agents: dict[str, list[dict[str, Any]]] = {}
    for key in groups:
        agents.setdefault(dict(key)["agent_name"], []).append(dict(key))
    labels = {agent: iter(_labels(agent, configs)) for agent, configs in agents.items()}
    for agent, configs in agents.items():
        if (count := len(_differing(configs))) > NAMED_FIELDS:
            notes.append(
                f"Settings of {agent} differ in {count} fields: labels show a distinguishing subset, settings.csv all."
            )
    settings = []
    for key, seeds in groups.items():
        config = dict(key)
        agent = config["agent_name"]
        values = {name: config.get(name) for name in _differing(agents[agent])}
        counting = counted(seeds, score, pool)
        partial = not pool and not any(member.whole for member in counting)
        settings.append(Setting(next(labels[agent]), agent, values, tuple(seeds), counting, partial))
    return settings, notes


def _groups(members: Iterable[RunRecord]) -> tuple[dict[tuple, list[RunRecord]], list[str]]:
    """Returns the members by configuration; of repeated runs, only the one that progressed furthest."""
    groups: dict[tuple, dict[tuple, RunRecord]] = {}
    notes = []
    for member in members:
        key = tuple(sorted((name, value) for name, value in member.config.items() if name not in UNSET))
        seeds = groups.setdefault(key, {})
        seed = (member.task, member.config["seed"], member.digest, member.simulators)
        kept = seeds.setdefault(seed, member)
        if kept is not member:
            further = (member.whole, member.updates + member.steps) > (kept.whole, kept.updates + kept.steps)
            seeds[seed], less = (member, kept) if further else (kept, member)
            notes.append(f"{less.path} has the setting, task and seed of {seeds[seed].path}: excluded.")
    return {key: list(seeds.values()) for key, seeds in groups.items()}, notes


def counted(members: Iterable[RunRecord], score: str, pool: bool) -> tuple[RunRecord, ...]:
    """Returns the members that make up their setting's score."""
    scored = [member for member in members if member.last(score) is not None]
    whole = [member for member in scored if member.whole]
    return tuple(scored if pool or not whole else whole)


def _differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the fields in which configurations differ."""
    return [name for name in configs[0] if any(config.get(name) != configs[0][name] for config in configs)]


def _labels(agent: str, configs: Sequence[dict[str, Any]]) -> list[str]:
    """Returns short, unique names of an agent's settings."""
    names = _differing(configs)
    if len(names) > NAMED_FIELDS:
        names = _telling(names, configs)
    short = shortened(names)
    for digits in (3, 6, 17):
        labels = [
            " ".join([agent, *(f"{short[name]}={text(config.get(name), digits)}" for name in names)])
            for config in configs
        ]
        if len(set(labels)) == len(labels):
            break
    return labels


def _telling(names: Sequence[str], configs: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a small set of fields that distinguishes the configurations, selected greedily."""
    chosen: list[str] = []

    def told(fields: Sequence[str]) -> int:
        return len({tuple(config.get(name) for name in fields) for config in configs})

    while told(chosen) < told(names):
        chosen.append(max(names, key=lambda name: told([*chosen, name])))
    return chosen


def shortened(names: Sequence[str]) -> dict[str, str]:
    """Returns the shortest unambiguous suffixes of dotted names."""

    def ending(name: str) -> str:
        parts = name.split(".")
        endings = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        return next(end for end in endings if sum(f".{other}".endswith(f".{end}") for other in names) == 1)

    return {name: ending(name) for name in names}


def text(value: Any, digits: int = 3) -> str:
    """Returns a field's value as text: 1e-4, 128x128, none."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        plain = f"{value:g}"
        plain = plain if len(plain) <= 6 else f"{value:.{digits}g}"
        powers = np.format_float_scientific(float(plain), trim="-", exp_digits=1).replace("e+", "e")
        return powers if "e" in plain or (0 < abs(value) < 0.01 and len(powers) < len(plain)) else plain
    if isinstance(value, tuple):
        return "x".join(text(part) for part in value) or "none"
    return str(value)


def _planned(member: RunRecord) -> str:
    offline, online, utd = (member.config[f"schedule.{name}"] for name in ("offline_updates", "online_steps", "utd"))
    return f"{offline:,} updates" + (f", then {online:,} steps at utd {utd:g}" if online else "")


def _spent(member: RunRecord) -> tuple[int, int] | None:
    return (member.updates, member.steps) if member.status == "finished" else None


ALIKE: tuple[tuple[Mix, str, Callable[[RunRecord], Any]], ...] = (  # what must be equal; None is ignored
    ("eval-seed", "schedule.eval_seed", lambda m: m.config["schedule.eval_seed"]),
    ("eval-seed", "the seed of the separate episodes", lambda m: m.judged and m.judged.get("seed")),
    ("episodes", "schedule.eval_episodes", lambda m: m.config["schedule.eval_episodes"]),
    ("episodes", "the number of separate episodes", lambda m: m.judged and m.judged.get("episodes")),
    ("budget", "the budget (schedule.offline_updates, online_steps, utd)", _planned),
    ("budget", SPENT, _spent),
    ("simulator", "the simulators", lambda m: m.simulators),
    ("data", "the dataset's digest", lambda m: m.digest and m.digest[:12]),
)


def _equal(words: str, a: Any, b: Any) -> bool:
    if words == SPENT:
        return all(abs(one - other) <= MARGIN * max(one, other) for one, other in zip(a, b, strict=True))
    return a == b


def _written(words: str, value: Any) -> str:
    if words == SPENT:
        return f"{value[0]:,} updates and {value[1]:,} steps"
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def check_alike(members: Sequence[RunRecord], mix: Sequence[Mix]) -> list[str]:
    """Returns sentences on differences that `mix` allows. Raises UserError for differences it does not."""
    mixed = []
    for task, words, flag, known in _compared(members):
        first, *others = known
        other = next((one for one in others if not _equal(words, one[1], first[1])), None)
        if other is None:
            continue
        if flag not in mix:
            raise UserError(
                f"{first[0].path} and {other[0].path} differ on {task} in {words}, {_written(words, first[1])} and "
                f"{_written(words, other[1])}: exclude one, or allow it with --mix {flag}"
            )
        counts = Counter(_written(words, value) for _, value in known).most_common(4)
        listed = "; ".join(f"{value} in {count} {'run' if count == 1 else 'runs'}" for value, count in counts)
        more = len({_written(words, value) for _, value in known}) - len(counts)
        mixed.append(f"On {task}, {words}: {listed}{f'; and {more} more' if more else ''}.")
    return mixed


def _compared(members: Sequence[RunRecord]) -> Iterator[tuple[str, str, Mix, list[tuple[RunRecord, Any]]]]:
    """Yields task, the condition that must be equal, the `mix` flag that waives it, and each member's value."""
    for task in dict.fromkeys(member.task for member in members):
        of_task = [member for member in members if member.task == task and member.evaluations]
        for flag, words, value in ALIKE:
            known = [(member, value(member)) for member in of_task]
            if known := [(member, found) for member, found in known if found is not None]:
                yield task, words, flag, known
