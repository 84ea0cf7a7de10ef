"""Reports say what folders hold: who counts, who is compared, how sure it is; runs that are unlike are refused."""

import csv
import html.parser
import itertools
import json
import re
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from jaxrl import cli, report, stats
from jaxrl.errors import UserError
from jaxrl.report import pictures
from jaxrl.runs import config, jsonlines
from jaxrl.runs.presets import preset

VERSIONS = {"python": "3.11.7", "mujoco": "4.0.0", "mujoco-mjx": "3.17.0", "brax": "0.14.2"}


def write_run(
    path: Path,
    scores: list[float],
    *,
    agent: str = "bc",
    env: str = "point",
    seed: int = 0,
    fields: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
    phase: str = "offline",
) -> Path:
    """Writes the folder of a run that was evaluated every 100 updates, with these successes of 50 episodes."""
    values = json.loads(json.dumps(config.to_dict(preset("quick", agent))))
    values |= {"env": env, "seed": seed, "data": "data.npz"}
    values["schedule"] |= {"offline_updates": 100 * len(scores), "online_steps": 0, "eval_episodes": 50}
    for name, value in (fields or {}).items():
        *parents, last = name.split(".")
        part = values
        for parent in parents:
            part = part[parent]
        part[last] = value
    path.mkdir(parents=True)
    rows = [{"epoch": 0, "phase": "behaviour", "updates": 0, "steps": 0, "eval/success": 0.25}]
    for i, score in enumerate(scores, start=1):
        row = {"epoch": 2 * i - 1, "phase": phase, "updates": 100 * i - 50, "steps": 0, "loss": None}
        found = {
            "eval/success": score,
            "eval/success_low": max(score - 0.1, 0),
            "eval/success_high": min(score + 0.1, 1),
        }
        found |= {"eval/return": -100 * (1 - score), "eval/length": 20.0, "eval/broken": 0.0}
        rows += [row, row | {"epoch": 2 * i, "updates": 100 * i} | found]
    (path / "config.json").write_text(json.dumps(values))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if manifest is not None:
        (path / "manifest.json").write_text(json.dumps({"versions": VERSIONS, "dataset_digest": "d1"} | manifest))
    if result is not None:
        (path / "result.json").write_text(json.dumps({"seed": seed} | result))
    return path


def finished(path: Path, scores: list[float], **asked: Any) -> Path:
    return write_run(path, scores, **{"result": {"run": str(path)}, "manifest": {}} | asked)


def write_sweep(path: Path, axes: dict[str, list[float]], seeds: int, evaluations: int = 6, drop: bool = True) -> Path:
    """Writes a sweep whose member 5 diverged, and of which halving dropped seeds of the lowest first value."""
    random = np.random.default_rng(0)
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    members = [(values, seed) for values in grid for seed in range(seeds)]
    for number, (values, seed) in enumerate(members):
        place = np.mean([axes[name].index(value) / max(len(axes[name]) - 1, 1) for name, value in values.items()])
        best = 0.25 + 0.65 * place
        scores = best * (1 - np.exp(-np.arange(1, evaluations + 1) / 2)) + random.normal(0, 0.06, evaluations)
        scores = [round(float(score), 2) for score in np.clip(scores, 0, 1)]
        status = "finished"
        if number == 5:
            status, scores = "diverged", scores[:2]
        elif drop and number < 3:
            status, scores = "dropped", scores[:3]
        judged = None
        if status == "finished":
            judged = {
                "seed": 12346,
                "episodes": 200,
                "success": max(scores[-1] - 0.05, 0),
                "return": -50.0,
                "length": 9.0,
            }
        result = {"member": number, "values": values, "status": status, "judged": judged}
        result |= {"updates": 100 * len(scores), "steps": 0}
        schedule = {"schedule.offline_updates": 100 * evaluations}
        write_run(
            path / f"members/{number:03}", scores, agent="fmq", seed=seed, fields=values | schedule, result=result
        )
    (path / "manifest.json").write_text(json.dumps({"versions": VERSIONS, "dataset_digest": "d1"}))
    cohort = {"members": list(range(len(members))), "dataset_digest": "d1"}
    (path / "sweep.json").write_text(json.dumps({"asked": {}, "cohorts": [cohort]}))
    return path


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open() as file:
        return list(csv.DictReader(file))


def found(*paths: Path | str, **asked: Any) -> report.Report:
    return report.read(paths, **asked)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """96 members: 6 settings of 16 seeds; 5 diverged, 0 to 2 were dropped."""
    axes = {"agent.eta": [0.3, 1.0, 3.0], "agent.adam.lr": [1e-4, 3e-4]}
    return write_sweep(tmp_path_factory.mktemp("runs") / "sweep", axes, seeds=16)


@pytest.fixture(scope="module")
def written(sweep) -> Path:
    """The sweep's report, as the command writes it."""
    assert cli.main(["report", str(sweep)]) == 0
    return sweep / "report"


# A sweep


def test_the_table_of_a_sweep_agrees_with_its_files(sweep, written):
    rows = table(written, "settings.csv")
    assert [row["setting"] for row in rows[:1] + rows[-1:]] == ["fmq lr=3e-4 eta=3", "fmq lr=1e-4 eta=0.3"]
    results = [json.loads(path.read_text()) for path in sorted(sweep.glob("members/*/result.json"))]
    last = [
        [json.loads(line) for line in path.read_text().splitlines()][-1]["eval/success"]
        for path in sorted(sweep.glob("members/*/metrics.jsonl"))
    ]
    for row in rows:
        eta, lr = float(row["agent.eta"]), float(row["agent.adam.lr"])
        mine = [i for i, r in enumerate(results) if r["values"] == {"agent.eta": eta, "agent.adam.lr": lr}]
        assert len(mine) == 16
        counted = [i for i in mine if results[i]["status"] != "dropped"]
        scores = [last[i] for i in counted]
        assert float(row["eval"]) == pytest.approx(scipy.stats.trim_mean(scores, 0.25))
        assert float(row["mean_success"]) == pytest.approx(np.mean(scores))
        resampled = scipy.stats.trim_mean(np.random.default_rng(1).choice(scores, (4000, len(scores))), 0.25, axis=1)
        ends = [float(row["eval_low"]), float(row["eval_high"])]
        assert ends == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.012)
        assert (row["eval_over"], int(row["seeds"])) == ("seeds", len(counted))
        separate = [(results[i]["judged"] or {"success": last[i]})["success"] for i in counted]
        assert float(row["separate"]) == pytest.approx(scipy.stats.trim_mean(separate, 0.25))
        assert [int(row[s]) for s in ("finished", "diverged", "dropped", "unfinished")] == [
            *(sum(results[i]["status"] == status for i in mine) for status in ("finished", "diverged", "dropped")),
            0,
        ]


def test_every_member_has_its_row_and_dropped_ones_do_not_count(written):
    rows = {Path(row["member"]).name: row for row in table(written, "members.csv")}
    assert sorted(rows) == [f"{number:03}" for number in range(96)]
    assert [rows[f"{i:03}"]["status"] for i in range(6)] == ["dropped"] * 3 + ["finished"] * 2 + ["diverged"]
    assert [rows[f"{i:03}"]["counted"] for i in range(6)] == ["False"] * 3 + ["True"] * 3
    assert (rows["001"]["updates"], rows["005"]["updates"], rows["095"]["updates"]) == ("300", "200", "600")
    assert rows["005"]["separate_success"] == "" != rows["095"]["separate_success"]


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(written):
    page = (written / "report.html").read_text()
    assert len(page) < 2e6
    assert not re.search(r"https?:|<script|<link|src=|@import|url\((?!#)", page)
    assert page.count("<svg ") == page.count("</svg>") == page.count("<figure>") == 6
    assert "currentColor" in page and pictures.INK not in page.split("</style>")[1]
    parser = Nesting()
    parser.feed(page)
    assert (parser.open, parser.wrong) == ([], [])
    for fact in ("96 runs", "members/005 after 200 updates", "lr=3e-4 eta=3", "1 diverged, 3 dropped"):
        assert fact in re.sub(r"<[^>]*>", "", page)
    for file in ("curves", "scores", "improvement", "profiles", "slices-fmq", "map-fmq"):
        with Image.open(written / f"{file}.png") as picture:
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 20)) > 20


class Nesting(html.parser.HTMLParser):
    """Follows which elements are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.wrong = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "path", "use", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag in ("path", "use", "rect"):
            return
        if self.open.pop() != tag:
            self.wrong.append(tag)


def test_the_best_is_chosen_on_evaluations_and_reported_on_separate_episodes(tmp_path):
    for name, scores, judged in (("a", (0.9, 0.8), 0.5), ("b", (0.7, 0.6), 0.7)):
        for seed, score in enumerate(scores):
            one = {"seed": 2, "episodes": 50, "success": judged + 0.02 * seed, "return": -1.0}
            fields = {"lr": 1e-3} if name == "a" else {"lr": 1e-4}
            result = {"status": "finished", "updates": 100, "steps": 0, "judged": one}
            finished(
                tmp_path / f"{name}{seed}", [score], seed=seed, result=result, fields={"agent.adam.lr": fields["lr"]}
            )
    seen = found(tmp_path)
    first, honest, rival = report.verdict(seen)
    assert first == "Best of 2 settings: bc lr=1e-3, chosen on eval/success (success 0.85 [0.80, 0.90])."
    assert honest == "On separate episodes of the same members, not used for selection: 0.51 [0.50, 0.52]."
    assert rival == "Not distinguishable from it, by the intervals of the probability of improvement: bc lr=1e-4."
    (comparison,) = report.comparisons(seen)
    assert (comparison.better, comparison.estimate.point) == ("bc lr=1e-3", 0.0)  # compared on separate episodes
    (tmp_path / "b0/result.json").write_text("{}")
    assert "Selection and score use" not in " ".join(report.verdict(found(tmp_path)))  # of the best there are some
    assert "Not every finished member was evaluated on separate episodes" in " ".join(found(tmp_path).notes)
    (tmp_path / "a1/result.json").write_text('{"run": "a1"}')
    assert "Selection and score use the same episodes" in report.verdict(found(tmp_path))[1]


def test_slices_are_over_all_settings_with_a_value(sweep):
    seen = found(sweep)
    lr, eta = report.slices(seen, "fmq")
    assert (eta.field, eta.values, lr.field, lr.values) == ("agent.eta", (0.3, 1.0, 3.0), "agent.adam.lr", (1e-4, 3e-4))
    for one in (eta, lr):
        for value, estimate in zip(one.values, one.estimates, strict=True):
            members = [m for s in seen.settings for m in s.counted if m.config[one.field] == value]
            scores = [m.judged["success"] if m.judged else m.last("success") for m in members]
            assert estimate.point == pytest.approx(scipy.stats.trim_mean(scores, 0.25))
            assert estimate.low < estimate.point < estimate.high


def test_a_sweep_over_datasets_has_a_task_for_each_and_says_who_has_not_begun(tmp_path):
    for number, (data, score) in enumerate((("one.npz", 0.5), ("two.npz", 0.7))):
        write_run(
            tmp_path / f"members/{number:03}", [score], fields={"data": data}, result={"updates": 100, "steps": 0}
        )
    (tmp_path / "manifest.json").write_text(json.dumps({"versions": VERSIONS, "dataset_digest": "d1 d2"}))
    cohorts = [{"members": [0, 2], "dataset_digest": "d1"}, {"members": [1], "dataset_digest": "d2"}]
    (tmp_path / "sweep.json").write_text(json.dumps({"cohorts": cohorts}))
    seen = found(tmp_path)
    assert seen.tasks == ("point, one.npz", "point, two.npz")
    assert f"{tmp_path}: 1 of its 3 members have not started." in seen.notes
    (tmp_path / "sweep.json").write_text('{"cohorts": [{}]}')
    with pytest.raises(UserError, match=r"sweep\.json is damaged: its cohorts lack members or datasets"):
        found(tmp_path)
    member = found(tmp_path / "members/000").settings[0].members[0]  # one of them alone
    assert member.last("success") == 0.5


# Who counts


def test_diverged_members_keep_their_last_evaluation_and_count_as_failed_before_the_first(tmp_path):
    over = {"status": "diverged", "updates": 250, "steps": 0}
    finished(tmp_path / "0", [0.5, 0.8, 0.9], seed=0)
    finished(tmp_path / "1", [0.4, 0.6], seed=1, result=over, fields={"schedule.offline_updates": 300})
    finished(tmp_path / "2", [], seed=2, result=over | {"updates": 10}, fields={"schedule.offline_updates": 300})
    seen = found(tmp_path)
    (setting,) = seen.ranked
    assert report.estimate(setting.counted, "success").point == pytest.approx((0.9 + 0.6 + 0) / 3)
    clock, points, _, _ = pictures.curve(setting.counted, "offline", "success")
    assert clock == [100, 200, 300] and points == pytest.approx([0.9 / 3, 1.4 / 3, 1.5 / 3])
    assert "Each counts with its last evaluation; 1 before the first evaluation, with success 0." in " ".join(
        seen.notes
    )
    (row,) = report.rows(seen)
    assert (row["finished"], row["diverged"], row["seeds"]) == (1, 2, 3)
    assert report.estimate(found(tmp_path, score="return").ranked[0].counted, "return").point == pytest.approx(-25)


def test_what_never_was_evaluated_has_no_interval_and_comes_after_what_failed(tmp_path):
    for seed in range(2):
        over = {"status": "diverged", "updates": 10, "steps": 0}
        fields = {"schedule.offline_updates": 100, "agent.adam.lr": 3e38}
        finished(tmp_path / f"a{seed}", [], seed=seed, result=over, fields=fields)
        finished(tmp_path / f"b{seed}", [0.0], seed=seed)
    seen = found(tmp_path)
    assert [setting.label for setting in seen.settings] == ["bc lr=1e-3", "bc lr=3e38"]
    assert report.estimate(seen.settings[1].counted, "success") == report.Estimate(0.0)
    assert report.estimate(seen.settings[0].counted, "success").over == "episodes"
    (comparison,) = report.comparisons(seen)
    assert comparison.estimate == report.Estimate(0.5) and not comparison.told_apart
    assert "No episode succeeded." in seen.notes[-1]


def test_partial_budgets_are_marked_and_compared_with_nobody_unless_that_is_allowed(tmp_path):
    longer = {"schedule.offline_updates": 400}
    for seed in range(3):
        finished(tmp_path / f"whole{seed}", [0.1, 0.2, 0.3, 0.4 + 0.01 * seed], seed=seed)
        dropped = {"status": "dropped", "updates": 200, "steps": 0}
        finished(
            tmp_path / f"dropped{seed}", [0.8, 0.9], seed=seed, result=dropped, fields=longer | {"agent.adam.lr": 0.1}
        )
    finished(tmp_path / "late", [0.9], seed=3, result=None, fields=longer)
    finished(tmp_path / "silent", [], seed=4, result=None, fields=longer)
    seen = found(tmp_path)
    best, partial = seen.settings
    assert seen.ranked == (best,) and not best.partial and partial.partial and report.comparisons(seen) == ()
    assert [m.path.name for m in best.counted] == ["whole0", "whole1", "whole2"]
    first, second = report.rows(seen)
    assert (first["unfinished"], first["updates"], first["whole_budget"]) == (2, 400, True)
    assert (second["eval"], second["dropped"], second["updates"], second["whole_budget"]) == (0.9, 3, 200, False)
    notes = " ".join(seen.notes)
    assert "late after 100 updates and 0 steps. Each counts only if no member of its setting spent" in notes
    assert f"No evaluation yet: {tmp_path}/silent after 0 updates" in notes and "(partial budget)" in report.markdown(
        seen
    )

    pooled = found(tmp_path, mix=["budget"])
    assert [setting.label for setting in pooled.ranked] == [partial.label, best.label]
    assert pooled.mixed == ("4 runs that have not spent the whole budget also count.",)
    assert len(pooled.ranked[1].counted) == 4 and "Each counts as is" in " ".join(pooled.notes)


def test_one_seed_has_an_interval_over_its_episodes_and_says_so(tmp_path):
    seen = found(finished(tmp_path / "a", [0.2, 0.8]))
    low, high = stats.success_interval(40, 50)
    assert report.estimate(seen.ranked[0].counted, "success") == report.Estimate(0.8, low, high, "episodes")
    assert "| bc | 1 | 0.80 [0.67, 0.89]ᵉ |" in report.markdown(seen)
    assert report.verdict(seen) == ["One setting, bc: success 0.80 [0.67, 0.89]ᵉ."]
    assert report.comparisons(seen) == () and set(report.figures(seen)) == {"curves", "scores"}
    clock, points, low, high = pictures.curve(seen.ranked[0].counted, "offline", "success")
    assert (clock, points) == ([100, 200], [0.2, 0.8]) and (low, high) == (
        [0.1, pytest.approx(0.7)],
        [pytest.approx(0.3), 0.9],
    )


def test_no_interval_has_a_width_of_zero(tmp_path):
    for seed in range(4):
        finished(tmp_path / f"a{seed}", [1.0], seed=seed)
        finished(tmp_path / f"b{seed}", [0.5], seed=seed, fields={"agent.adam.lr": 0.1})
    seen = found(tmp_path)
    best, other = seen.ranked
    low, _ = stats.success_interval(50, 50)
    assert report.estimate(best.counted, "success") == report.Estimate(1.0, low, 1.0, "episodes")
    (comparison,) = report.comparisons(seen)
    assert comparison.estimate == report.Estimate(1.0) and comparison.pairs == 16 and comparison.told_apart
    assert "1.00 (all 16 pairs)" in report.markdown(seen)
    returns = found(tmp_path, score="return")
    assert report.estimate(returns.ranked[0].counted, "return") == report.Estimate(0.0)
    _, _, low, high = pictures.curve(other.counted, "offline", "success")
    assert (low, high) == ([0.4], [0.6])  # of one seed's episodes


def test_tasks_are_strata_and_settings_without_all_of_them_are_not_ranked(tmp_path):
    random = np.random.default_rng(0)
    tables = {}
    for agent, shift in (("bc", 0.2), ("iql", 0.5)):
        for env in ("point", "push"):
            tables[agent, env] = np.round(random.uniform(0, 0.4, 5) + shift, 2)
            for seed, score in enumerate(tables[agent, env]):
                finished(tmp_path / f"{agent}{env}{seed}", [float(score)], agent=agent, env=env, seed=seed)
    finished(tmp_path / "extra", [0.9], agent="fql", env="push", fields={"schedule.offline_updates": 100})
    seen = found(tmp_path)
    assert seen.tasks == ("point", "push") and [s.label for s in seen.settings] == ["iql", "bc", "fql"]
    assert [s.label for s in seen.ranked] == ["iql", "bc"]
    assert "Not on every task, and therefore not ranked: fql." in seen.notes
    point, low, high = stats.stratified_bootstrap(np.stack([tables["iql", "point"], tables["iql", "push"]], axis=1))
    assert report.estimate(seen.ranked[0].counted, "success") == report.Estimate(point, low, high, "seeds")
    improvement = report.comparisons(seen)[0].estimate.point
    shares = [
        scipy.stats.mannwhitneyu(tables["iql", env], tables["bc", env]).statistic / 25 for env in ("point", "push")
    ]
    assert improvement == pytest.approx(np.mean(shares))
    text = report.markdown(seen)
    assert "| setting | point | push |" in text and re.search(r"^\| fql \| – \| 0.90 \[.*\]ᵉ \|$", text, re.MULTILINE)


def test_up_to_five_settings_are_compared_in_pairs_and_more_with_the_best(tmp_path):
    for setting, seed in itertools.product(range(6), range(2)):
        fields = {"agent.adam.lr": 0.001 * (setting + 1)}
        finished(tmp_path / f"{setting}-{seed}", [0.1 * setting + 0.05 * seed], seed=seed, fields=fields)
    seen = found(tmp_path)
    assert [one.better for one in report.comparisons(seen)] == ["bc lr=6e-3"] * 5
    five = found(*(tmp_path / f"{setting}-{seed}" for setting in range(5) for seed in range(2)))
    assert len(report.comparisons(five)) == 10


def test_a_run_that_was_repeated_counts_once(tmp_path):
    finished(tmp_path / "a", [0.2])
    finished(tmp_path / "b", [0.9])
    write_run(tmp_path / "c", [], manifest={}, fields={"schedule.offline_updates": 100})
    seen = found(tmp_path, tmp_path / "a")
    assert [m.path.name for s in seen.settings for m in s.members] == ["a"]
    assert f"{tmp_path}/b has the setting, task and seed of {tmp_path}/a: excluded." in seen.notes
    assert f"{tmp_path}/c has the setting, task and seed of {tmp_path}/a: excluded." in seen.notes
    assert [m.path.name for s in found(tmp_path / "c", tmp_path / "b").settings for m in s.members] == ["b"]


# Names


def test_labels_are_short_and_tell_settings_apart(tmp_path):
    def labels(name: str, agent: str, *fields: dict[str, Any]) -> list[str]:
        for number, one in enumerate(fields):
            finished(tmp_path / name / str(number), [0.9 - 0.1 * number], agent=agent, fields=one)
        return [setting.label for setting in found(tmp_path / name).settings]

    assert labels("one", "bc", {}) == ["bc"]
    assert labels("two", "bc", {"agent.adam.lr": 3e-4, "agent.flow.net.hidden": [64, 64]}, {}) == [
        "bc lr=3e-4 hidden=64x64",
        "bc lr=1e-3 hidden=128x128x128",
    ]
    assert labels(
        "same", "fmq", {"agent.eta": 1.0, "agent.beam.eta": 0.3}, {"agent.eta": 2.0, "agent.beam.eta": 0.5}
    ) == [
        "fmq beam.eta=0.3 agent.eta=1",
        "fmq beam.eta=0.5 agent.eta=2",
    ]
    assert labels("close", "bc", {"agent.adam.lr": 0.00012341}, {"agent.adam.lr": 0.00012342}) == [
        "bc lr=1.2341e-4",
        "bc lr=1.2342e-4",
    ]
    names = ("agent.eta", "agent.adam.lr", "agent.critic.tau", "agent.windows.discount", "agent.beta")
    many = labels("many", "fmq", dict.fromkeys(names, 0.1), dict.fromkeys(names, 0.2))
    assert len(set(many)) == 2 and all(len(label.split()) == 2 for label in many)  # one field tells them apart
    assert "Settings of fmq differ in 5 fields" in found(tmp_path / "many").notes[0]


def test_equal_data_are_one_task_and_different_data_of_an_environment_are_several(tmp_path):
    finished(tmp_path / "a", [0.5], fields={"data": "one/data.npz"})
    finished(tmp_path / "b", [0.5], seed=1, fields={"data": "copy.npz"})
    assert found(tmp_path).tasks == ("point",)
    finished(tmp_path / "c", [0.5], seed=2, fields={"data": "other.npz"}, manifest={"dataset_digest": "d2"})
    seen = found(tmp_path)
    assert seen.tasks == ("point, data.npz", "point, other.npz") and len(seen.settings) == 1


# What is refused


@pytest.mark.parametrize(
    ("flag", "asked", "words"),
    [
        ("eval-seed", {"fields": {"schedule.eval_seed": 7}}, "schedule.eval_seed, 12345 and 7"),
        ("episodes", {"fields": {"schedule.eval_episodes": 20}}, "schedule.eval_episodes, 50 and 20"),
        (
            "budget",
            {"fields": {"schedule.offline_updates": 900}},
            "the budget (schedule.offline_updates, online_steps, utd), 100 updates and 900 updates",
        ),
        (
            "budget",
            {"result": {"updates": 50, "steps": 0}},
            "the budget spent, 100 updates and 0 steps and 50 updates and 0 steps",
        ),
        (
            "simulator",
            {"manifest": {"versions": VERSIONS | {"mujoco": "3.9"}}},
            "the simulators, mujoco 4.0.0, mujoco-mjx 3.17.0, brax 0.14.2 and mujoco 3.9, mujoco-mjx 3.17.0, "
            "brax 0.14.2",
        ),
        ("data", {"manifest": {"dataset_digest": "d2"}}, "the dataset's digest, d1 and d2"),
    ],
)
def test_unlike_runs_are_refused_and_mixed_only_where_that_is_said(flag, asked, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finished(Path("a"), [0.5])
    finished(Path("b"), [0.7], **{"agent": "iql", "seed": 1} | asked)
    others = [name for name in typing.get_args(report.Mix) if name != flag]
    assert cli.main(["report", "a", "b", "--mix", *others]) == 2
    assert capsys.readouterr().err == (
        f"jaxrl: a and b differ on point in {words}: exclude one, or allow it with --mix {flag}\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert cli.main(["report", "a", "b", "--mix", flag]) == 0
    name = words.split(",")[0]
    assert capsys.readouterr().out.startswith(f"**Mixed as allowed by --mix.** On point, {name}")
    page = Path("report/report.html").read_text()
    assert 0 < page.index("Mixed as allowed by --mix") < page.index("class=verdict")


def test_other_tasks_and_small_differences_of_what_was_spent_are_no_mixture(tmp_path):
    finished(tmp_path / "a", [0.5], result={"updates": 100, "steps": 0})
    finished(tmp_path / "b", [0.6], seed=1, result={"updates": 104, "steps": 0})
    finished(tmp_path / "c", [0.5], env="push", manifest={"dataset_digest": "d2"}, fields={"schedule.eval_seed": 1})
    assert found(tmp_path).mixed == ()


def test_returns_of_several_tasks_are_refused(tmp_path):
    finished(tmp_path / "a", [0.5])
    finished(tmp_path / "b", [0.5], env="push")
    with pytest.raises(UserError, match=r"^score = 'return': returns of different tasks are not comparable, point and"):
        found(tmp_path, score="return")
    assert report.rows(found(tmp_path / "a", score="return"))[0]["eval"] == -50


def broken(folder: Path, name: str, text: str) -> Path:
    (finished(folder, [0.5, 0.6]) / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "missing", "missing is not a run directory: it does not exist"),
        (
            lambda: Path("empty").mkdir() or "empty",
            "empty is not a run directory, a sweep or a folder of these: it is empty",
        ),
        (
            lambda: Path("else/where").mkdir(parents=True) or "else",
            "else is not a run directory, a sweep or a folder of these: it holds neither config.json nor runs",
        ),
        (lambda: Path("file").touch() or "file", "file is not a run directory: it is a file"),
        (lambda: finished(Path("new"), [], result=None), "new: no run directory there has an evaluation yet"),
        (
            lambda: broken(Path("a"), "metrics.jsonl", "{}\n{}\n"),
            "a/metrics.jsonl is damaged: line 1 is not a metrics row",
        ),
        (lambda: broken(Path("b"), "metrics.jsonl", "{\n{}\n"), "b/metrics.jsonl is damaged: line 1 is not JSON"),
        (lambda: broken(Path("c"), "config.json", "{}"), "c/config.json: unknown agent 'None': known are "),
        (
            lambda: broken(Path("d"), "config.json", '{"agent_name": "bc"'),
            "d is not a run directory: config.json cannot be",
        ),
        (lambda: broken(Path("e"), "config.json", '{"agent_name": "bc", "agent": 1}'), "e/config.json is damaged: "),
        (lambda: broken(Path("f"), "result.json", "["), "f: result.json cannot be read"),
        (
            lambda: broken(Path("g"), "result.json", '{"status": "lost"}'),
            "g/result.json is damaged: status 'lost' is not one of finished, diverged, dropped, unfinished",
        ),
        (lambda: write_run(Path("h"), [0.5]), "h is not a run directory: manifest.json is missing"),
    ],
)
def test_bad_folders_are_refused_in_words(make, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(make())]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith(f"jaxrl: {message}") and error.count("\n") == 1
    assert not list(tmp_path.rglob("report*"))


def test_a_row_that_was_not_finished_is_passed_over(tmp_path):
    path = finished(tmp_path / "a", [0.5, 0.6], result=None)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5, "pha')
    (setting,) = found(path).settings
    assert (setting.members[0].updates, setting.members[0].last("success")) == (200, 0.6)


def test_names_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(UserError, match="unknown mix 'budgets': did you mean 'budget'"):
        found(tmp_path, mix=["budgets"])
    assert cli.main(["report"]) == cli.main(["report", str(tmp_path), "--mix", "seed"]) == 2


# Files


def test_a_report_replaces_a_report_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finished(Path("runs/a"), [0.5])
    Path("mine").mkdir()
    Path("mine/thesis.md").write_text("years")
    assert cli.main(["report", "runs", "--out", "mine"]) == 2
    assert (
        capsys.readouterr().err
        == "jaxrl: --out mine: the folder contains something other than a report, name another folder\n"
    )
    assert cli.main(["report", "runs", "--out", "runs/a/config.json"]) == 2
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.md"]

    for _ in range(2):
        assert cli.main(["report", "runs/a", "runs"]) == 0
        Path("report/map-old.png").touch()
    assert cli.main(["report", "runs/", "--out", "report"]) == 0
    files = ["curves.png", "members.csv", "report.html", "scores.png", "settings.csv", "table.md"]
    assert sorted(path.name for path in Path("report").iterdir()) == files
    out = capsys.readouterr().out.splitlines()[-1]
    assert out == "written: report/{report.html,table.md,settings.csv,members.csv,curves.png,scores.png}"
    before = [(path, path.read_bytes()) for path in Path("report").iterdir()]
    assert cli.main(["report", "runs", "--out", "report"]) == 0
    assert all(path.read_bytes() == content for path, content in before)  # equal runs give equal files


def test_a_report_that_was_cut_short_anywhere_is_written_anew(tmp_path, monkeypatch):
    seen = found(finished(tmp_path / "a", [0.5]))
    report.write(seen, tmp_path / "whole")
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    write, left = jsonlines.write, [0]

    def killed(path, text):
        left[0] -= 1
        if left[0] < 0:
            path.with_name(f"{path.name}.partial").write_text(text[:10])
            raise KeyboardInterrupt
        write(path, text)

    for whole in range(4):
        folder, left[0] = tmp_path / f"after-{whole}", whole
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(jsonlines, "write", killed)
            report.write(seen, folder)
        report.write(seen, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_names_from_folders_cannot_break_the_page(tmp_path):
    finished(tmp_path / "<b>&x", [0.5], env="mine:$make|<i>")
    seen = found(tmp_path)
    page = report.html(seen, report.figures(seen))
    assert "<i>" not in page and "&lt;i&gt;" in page and "<b>" not in page
    assert r"mine:$make\|<i>" not in report.markdown(seen).splitlines()[4]
