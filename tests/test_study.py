"""Studies: what is run and in which order, what survives interruptions, and verdicts that follow from the numbers."""

import math
import shutil
import xml.etree.ElementTree as ElementTree
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
from megatron_distill.recipes import tiny
from scipy.stats import ttest_rel

from megatron_distill import config as config_module
from megatron_distill.config import DistillConfig, RunConfig
from megatron_distill.config.loading import every, load_made
from megatron_distill.config.schedules import constant
from megatron_distill.errors import CheckpointError, ConfigError, DataError, DistillError
from megatron_distill.launch import local, preflight
from megatron_distill.launch.disk import bytes_to_come
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.runs.run_folder import RunFolder, write_json
from megatron_distill.study import run as study_module
from megatron_distill.study.claims import holm, judge, judge_all, sentence, verdict_on_claim
from megatron_distill.study.design import (
    CURVES,
    MEASURES,
    Arm,
    Comparison,
    Group,
    Question,
    Study,
    StudyFigure,
    check_study,
)
from megatron_distill.study.page import main as redraw
from megatron_distill.study.results import (
    CURVE_POINTS,
    Interval,
    Results,
    load,
    over_seeds,
    read_result,
    save,
)
from megatron_distill.study.run import planned, run_study
from tests.support.made_up import leave_finished_run

STUDIES = Path(__file__).parents[1] / "docs" / "study"
NUM_STEPS = 6
EVERY_STEPS = 3


def made_up_run(config: RunConfig, folder: RunFolder, out: TextIO | None = None, accuracy: float = 0.5) -> None:
    """A finished run's folder as training leaves it, with numbers that depend on the seed."""
    rng = np.random.default_rng(config.seed)
    share = config.rollouts.student_prefix_frac.at(0)
    metrics = []
    for step in range(1, config.num_steps + 1):
        record = {name: float(rng.uniform(0.1, 1.0)) for name in CURVES}
        times = {"step_s": 3.0, "rollout_s": 2.0, "score_s": 0.5}
        metrics.append(record | times | {"step": step, "response_tokens": 60.0, "student_prefix_frac": share})
    evaluations = {}
    every_steps = config.evaluation.every_steps or config.num_steps
    for step in sorted({*range(0, config.num_steps, every_steps), config.num_steps}):
        avg = 0.3 + (accuracy - 0.3) * step / config.num_steps + float(rng.normal(0, 0.005))
        evaluations[step] = {"avg_at_k": avg, "pass_at_k": avg + 0.2}
    leave_finished_run(config, folder, evaluations, metrics)
    write_json(folder.root / "env.json", {"python": "3.12", "cpus": 2, "packages": {"torch": "2", "apex": None}})


def arm(name: str, weight: float, **changes: Any) -> Arm:
    base = tiny.quickstart()
    config = replace(
        base,
        num_steps=NUM_STEPS,
        distill=DistillConfig(reverse_kl_weight=constant(weight)),
        evaluation=replace(base.evaluation, every_steps=EVERY_STEPS),
    )
    return Arm(name, f"the {name} | arm", config, **changes)


def small_study(draw: bool = False, **changes: Any) -> Study:
    """Two arms and one that goes on from the first; if drawn, with every kind of figure, which is what takes the time."""
    arms = (arm("low", 0.0), arm("high", 1.0), arm("then", 0.5, after="low"))
    figures = (
        StudyFigure("scatter", "scatter", "scatter", ("avg_at_k",), "entropy_nats"),
        StudyFigure("path", "path", "path", ("avg_at_k", "entropy_nats"), "seconds"),
        StudyFigure("dose", "dose", "dose", ("avg_at_k",), "distill.reverse_kl_weight"),
        StudyFigure("curves", "curves", "curves", ("horizon_tokens", "reward")),
        StudyFigure("hand_off", "hand-off", "hand_off", ("avg_at_k",)),
    )
    question = Question(
        "High or low",
        "High is more accurate <than> low.",
        {one.name: one.label for one in arms},
        ("avg_at_k", "gain_avg_at_k", "seconds", "reuse_seconds", "student_tokens", "teacher_tokens"),
        figures if draw else (),
        (Comparison("avg_at_k", Group("high", ("high",)), Group("low", ("low",))),),
    )
    study = Study(
        "s",
        "A study",
        "Of made-up numbers.",
        "megatron-distill study x.s",
        arms,
        (1, 2, 3),
        (question,),
        ("low", "high"),
        (),
    )
    return replace(study, **changes)


class MadeUpRuns(list[tuple[str, int]]):
    """In place of training: makes up a run when called, and lists the arm and seed of those that it made."""

    def __call__(self, config: RunConfig, folder: RunFolder, out: TextIO) -> None:
        name = folder.root.parent.name
        print("a step", file=out)
        made_up_run(config, folder, accuracy=0.8 if name == "high" else 0.5)
        self.append((name, config.seed))


@pytest.fixture
def runs() -> MadeUpRuns:
    return MadeUpRuns()


def results_of(values: dict[str, list[float]]) -> Results:
    """Results in which ``avg_at_k`` of each arm takes the given values over seeds 1, 2, ..."""
    from megatron_distill.study.results import ArmFacts, RunResult

    runs = [
        RunResult(name, seed, [{"step": 0.0, "avg_at_k": value}], {})
        for name, numbers in values.items()
        for seed, value in enumerate(numbers, 1)
    ]
    arms = {name: ArmFacts(name, "", {}) for name in values}
    return Results("t", "s", "c", [1, 2, 3], arms, [], {}, {}, runs)


HIGH_ABOVE_LOW = Comparison("avg_at_k", Group("high", ("high",)), Group("low", ("low",)))


# --- running ----------------------------------------------------------------------------------------------------------


def test_runs_are_made_seed_by_seed_and_hand_over_the_student(runs: MadeUpRuns, tmp_path: Path) -> None:
    """All arms of a seed come before the next seed; an arm after another starts from that arm's student of its own seed."""
    run_study(small_study(), tmp_path, runs)
    assert runs == [(name, seed) for seed in (1, 2, 3) for name in ("low", "high", "then")]
    config = config_module.load(tmp_path / "runs" / "then" / "seed_2" / "config.json")
    assert config.student.path == str(tmp_path / "runs" / "low" / "seed_2" / "hf") and config.seed == 2


@pytest.mark.slow
def test_finished_runs_are_not_repeated(runs: MadeUpRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second start makes what is missing; a run without finished.json counts as missing; nothing missing, nothing run."""
    run_study(small_study(), tmp_path, runs)
    runs.clear()
    (tmp_path / "runs" / "high" / "seed_3" / "finished.json").unlink()
    run_study(small_study(), tmp_path, runs)
    assert runs == [("high", 3)]
    assert "8 of 9 runs finished before" in capsys.readouterr().out
    assert "this study shows it" in run_study(small_study(), tmp_path, runs)
    assert runs == [("high", 3)]


@pytest.mark.slow
def test_commands_of_different_seeds_share_a_folder(runs: MadeUpRuns, tmp_path: Path) -> None:
    """One makes the runs of its seeds; while it does, another makes its own, and the results hold what both have made."""

    def beside(config: RunConfig, folder: RunFolder, out: TextIO) -> None:
        if not runs:
            run_study(small_study(), tmp_path, runs, seeds=(3,))
        runs(config, folder, out)

    run_study(small_study(), tmp_path, beside, seeds=(2,))
    assert runs == [(name, seed) for seed in (3, 2) for name in ("low", "high", "then")]
    assert len(load(tmp_path / "s" / "results.json").runs) == 6
    assert [path.name for path in (tmp_path / "s").iterdir() if path.suffix == ".tmp"] == []
    with pytest.raises(ConfigError, match=r"seeds = 7: the study has none such\. Its seeds: 1, 2, 3"):
        run_study(small_study(), tmp_path, must_not_train, seeds=(7,))


def test_results_are_written_after_each_run_and_a_failure_stops(runs: MadeUpRuns, tmp_path: Path) -> None:
    """The third run fails: the study stops with its cause, and the results hold the two before it; then it goes on."""

    def failing(config: RunConfig, folder: RunFolder, out: TextIO) -> None:
        if len(runs) == 2:
            raise DistillError("trainer failed: the cause")
        runs(config, folder, out)

    with pytest.raises(DistillError, match=r"study run = then/seed_1: failed(?s:.*)trainer failed: the cause"):
        run_study(small_study(), tmp_path, failing)
    assert [(run.arm, run.seed) for run in load(tmp_path / "s" / "results.json").runs] == [("low", 1), ("high", 1)]
    assert "2 of 9 runs (under way)" in (tmp_path / "s" / "study.html").read_text()
    run_study(small_study(), tmp_path, runs)
    assert len(runs) == 9 and len(load(tmp_path / "s" / "results.json").runs) == 9


def test_studies_in_one_folder_share_their_common_arms(runs: MadeUpRuns, tmp_path: Path) -> None:
    """The second study makes only the arms that the first did not, and leaves the first one's results alone."""
    first = small_study(arms=small_study().arms[:2], questions=(small_study().questions[0].without({"then"}),))
    run_study(first, tmp_path, runs)
    before = (tmp_path / "s" / "results.json").read_bytes()
    runs.clear()
    run_study(small_study(name="other"), tmp_path, runs)
    assert runs == [("then", seed) for seed in (1, 2, 3)]
    assert len(load(tmp_path / "other" / "results.json").runs) == 9
    assert (tmp_path / "s" / "results.json").read_bytes() == before


def test_a_folder_of_another_config_is_refused(runs: MadeUpRuns, tmp_path: Path) -> None:
    """Arms that changed since their runs were made must not be mixed with these."""
    run_study(small_study(), tmp_path, runs)
    changed = small_study(arms=(arm("low", 0.3), *small_study().arms[1:]))
    with pytest.raises(
        DistillError, match=r"low/seed_1: holds a run of another config \(distill.reverse_kl_weight differ"
    ):
        run_study(changed, tmp_path, runs)
    (tmp_path / "runs" / "low" / "seed_1" / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(DistillError, match="low/seed_2"):  # what never reached a checkpoint is made anew
        run_study(changed, tmp_path, runs)


def must_not_train(config: RunConfig, folder: RunFolder, out: TextIO) -> None:
    pytest.fail(f"{folder.root} was started")


def test_unsound_studies_are_refused_with_all_problems(tmp_path: Path) -> None:
    """Arms out of order, unknown names and broken configs are told at once, before anything starts."""
    bad = arm("bad", 2.0, after="later")
    question = replace(small_study().questions[0], columns=("accuracy",))
    with pytest.raises(ConfigError) as caught:
        run_study(
            small_study(arms=(bad, arm("bad", 0.0)), questions=(question,), seeds=(1, 1)),
            tmp_path / "new",
            must_not_train,
        )
    message = str(caught.value)
    for part in (
        "'bad': named twice",
        "seeds = (1, 1)",
        "after = 'later'",
        "reverse_kl_weight = 2.0",
        "'accuracy'",
        "'low'",
    ):
        assert part in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("field", ["rl.reward", "components", "trackers"])
def test_every_arms_functions_are_looked_up_before_the_first_run(field: str, tmp_path: Path) -> None:
    """A misspelt function of the second arm is told with its run, though the first arm is as the second in all else."""
    low, _, then = small_study().arms
    config = config_module.with_overrides(low.config, ["rl.weight=1", "rollouts.rollouts_per_prompt=4"])
    (tmp_path / "mine.py").write_text("def meant(answered): ...")
    name = f"{tmp_path}/mine.py:ment"
    override = f"{field}={name}" if field == "rl.reward" else f'{field}=["{name}"]'
    high = Arm("high", "high", config_module.with_overrides(config, [override]))
    arms = (replace(low, config=config), high, then)
    with pytest.raises(ConfigError, match=r"study run 'high/seed_1': .*mine\.py:ment"):
        run_study(small_study(arms=arms), tmp_path / "new", must_not_train)


def test_arms_that_differ_in_numbers_alone_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check reads all weights: neither a seed, a learning rate nor a KL weight asks for another."""
    checked = []
    monkeypatch.setattr(preflight, "check", lambda config: checked.append(config.name))
    low, high, _ = small_study().arms
    faster = replace(high, config=config_module.with_overrides(high.config, ["optimizer.lr=1e-5"]))
    planned(small_study(arms=(low, faster, small_study().arms[2])), tmp_path / "new")
    assert checked == ["low/seed_1"]


@pytest.mark.parametrize(
    ("figure", "told"),
    [
        (
            ("dose", ("avg_at_k",), "distill.reverse_kl_wait"),
            "x = 'distill.reverse_kl_wait': is 'not there' in arm 'low'",
        ),
        (("dose", ("avg_at_k",), "student.dtype"), "x = 'student.dtype': is 'fp32' in arm 'low'"),
        (("dose", ("avg_at_k",), "optimizer.lr"), "in all arms. Name a config field"),
        (("dose", ("reward",), "distill.reverse_kl_weight"), "y = 'reward': no such thing is kept of a run"),
        (("curves", ("avg_at_k",)), "y = 'avg_at_k': no such thing is kept of a run for a figure of kind 'curves'"),
        (("scatter", ("avg_at_k",)), "x = 'step': no such thing is kept of a run"),
        (
            ("scatter", ("avg_at_k", "pass_at_k"), "seconds"),
            "'pass_at_k'): a figure of kind 'scatter' shows one",
        ),
        (("path", ()), "y = (): a figure of kind 'path' shows at least one"),
        (("hand_off", ("avg_at_9",)), "y = 'avg_at_9': no such thing"),
    ],
)
def test_a_figure_that_could_not_be_drawn_is_refused_before_the_first_run(
    figure: tuple[Any, ...], told: str, tmp_path: Path
) -> None:
    """An axis that no run will have is told as its question's and figure's, not found once the first run has ended."""
    question = replace(small_study().questions[0], figures=(StudyFigure("f", "F", *figure),))
    with pytest.raises(ConfigError) as caught:
        run_study(small_study(questions=(question,)), tmp_path / "new", must_not_train)
    assert str(caught.value).startswith("study.questions[High or low].figures[f].")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_the_disk_must_hold_all_runs_not_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that would fill the disk by its third run does not begin; fewer seeds than would, do."""
    config = arm("low", 0.0).config
    each = bytes_to_come(config, HfConfig.from_dir(config.student.path), RunFolder(tmp_path / "none"))
    usage = namedtuple("usage", "total used free")(100 * each, 97 * each, 3 * each)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs .* MiB, but .* has .* MiB free"):
        run_study(small_study(), tmp_path / "new", must_not_train)
    assert len(planned(small_study(), tmp_path / "new", seeds=(2,)).missing) == 3


@pytest.mark.parametrize("name", every(Study))
def test_recipes_are_sound_whole_and_quick(name: str) -> None:
    """Each study of ``recipes`` can be run, and so can its quick look, which has one seed and still asks something."""
    study = every(Study)[name]()
    check_study(study)
    quick = study.quick()
    check_study(quick)
    assert len(quick.seeds) == 1 and quick.questions and len(study.seeds) >= 3
    assert max(arm.config.num_steps for arm in quick.arms) < min(arm.config.num_steps for arm in study.arms)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in every(Study) if not name.startswith("qwen3")])
def test_studies_of_models_that_are_here_pass_the_check_before_their_first_run(name: str, tmp_path: Path) -> None:
    """With their models, data and prompts."""
    study = every(Study)[name]()
    assert len(planned(study, tmp_path, study.seeds[:1]).missing) == len(study.arms)


def test_the_study_shares_arms_between_questions() -> None:
    """The tiny study asks what it was made for: the grid, five weights, three horizons, each arm run once."""
    study = tiny.study()
    asked = [set(question.arms) for question in study.questions]
    assert {"teacher_forward", "teacher_reverse", "student_forward", "student_reverse"} == asked[0] == asked[1]
    weights = [one.config.distill.reverse_kl_weight.at(0) for one in study.arms if one.name in asked[3]]
    assert sorted(weights) == [0.0, 0.2, 0.5, 0.8, 1.0]
    kinds = {one.config.curriculum.kind for one in study.arms if one.name in asked[2]}
    assert kinds == {"schedule", "entropy_gated"}
    assert len(study.arms) == len(set.union(*asked)) == 9


@pytest.mark.heavy
@pytest.mark.timeout(1500)
def test_a_study_of_real_runs(tmp_path: Path) -> None:
    """Distillation and RL on its student, two steps each, by the real trainer and servers; then there is nothing to do."""
    sizes = ("num_steps=2", "micro_batch_rollouts=8", "evaluation.num_problems=8", "evaluation.entropy_problems=4")
    whole = tiny.study_rl()
    kept = ("student_forward", "rl_from_student_forward")
    study = replace(whole, quick_arms=kept, quick_overrides=(*sizes, "evaluation.every_steps=0")).quick()
    arms = tuple(
        replace(one, config=replace(one.config, rollouts=replace(one.config.rollouts, prompts_per_step=8)))
        for one in study.arms
    )
    questions = tuple(question.without({one.name for one in whole.arms} - set(kept)) for question in whole.questions)
    study = replace(study, arms=arms, questions=questions)
    run_study(study, tmp_path, local.train)
    results = load(tmp_path / study.name / "results.json")
    distilled, reinforced = (results.runs_of(name)[0] for name in kept)
    assert len(reinforced.evaluations) == len(distilled.evaluations) == 2
    # The same weights, problems and sampling seeds: where one run ended the next began, up to near ties in sampling.
    assert reinforced.evaluations[0]["entropy_nats"] == pytest.approx(
        distilled.evaluations[1]["entropy_nats"], rel=0.05
    )
    assert "reward" in reinforced.curves and "forward_kl_nats" in distilled.curves
    before = (tmp_path / study.name / "results.json").read_bytes()
    run_study(study, tmp_path, local.train)
    assert (tmp_path / study.name / "results.json").read_bytes() == before


# --- statistics and verdicts ------------------------------------------------------------------------------------------


def test_intervals_are_those_of_student() -> None:
    """Against a textbook case, at one seed, and with values that were not measured."""
    interval = over_seeds([1.0, 2.0, 3.0])
    assert (interval.low, interval.high) == pytest.approx(
        (2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), rel=1e-4
    )
    assert over_seeds([0.5]).shown(".2f") == "0.50"
    assert over_seeds([math.nan]).shown(".2f") == "-"
    assert over_seeds([1.0, math.nan, 2.0, 3.0]) == interval


def test_intervals_cover_as_often_as_they_say() -> None:
    """Of many intervals from 3 normal values, about 95% hold the true mean."""
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    covered = [over_seeds(row).low <= 0 <= over_seeds(row).high for row in draws]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_p_values_say_where_the_interval_ends() -> None:
    """5% where it ends at 0, the paired t-test's value where it reaches past it, and neither without an interval."""
    assert Interval(1.0, 0.0, 2.0, num_seeds=4).p_value == pytest.approx(0.05)
    values = np.array([0.1, -0.2, 0.3, 0.25, 0.0])
    assert over_seeds(values).p_value == pytest.approx(ttest_rel(values, np.zeros(5)).pvalue)
    assert math.isnan(over_seeds([1.0]).p_value) and over_seeds([1.0, 1.0]).p_value == 0
    assert over_seeds([0.0, 0.0]).p_value == 1


def test_holm_corrects_for_the_number_of_comparisons() -> None:
    """Worked: times 4, 3, 2, 1 in rising order, never below the one before; what was not judged is not counted."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = holm([0.02, math.nan, 0.9])
    assert corrected[::2] == pytest.approx([0.04, 0.9]) and math.isnan(corrected[1])
    assert holm([]) == []


def test_false_findings_are_as_rare_as_holm_says() -> None:
    """Of 400 studies of ten comparisons in which nothing differs, at most about 5% find anything after correction."""
    draws = np.random.default_rng(0).normal(size=(400, 10, 5))
    found = [min(holm([over_seeds(row).p_value for row in study])) < 0.05 for study in draws]
    assert np.mean(found) == pytest.approx(0.05, abs=0.025)


def test_a_finding_says_whether_it_stands_among_all() -> None:
    """Beside another comparison the same numbers count for less; one asked twice, either way round, counts once."""
    results = results_of({"high": [0.80, 0.81, 0.79], "low": [0.60, 0.66, 0.54], "flat": [0.80, 0.82, 0.785]})
    reverse = Comparison("avg_at_k", HIGH_ABOVE_LOW.lesser, HIGH_ABOVE_LOW.greater)
    other = Comparison("avg_at_k", Group("high", ("high",)), Group("flat", ("flat",)))
    ask = small_study().questions[0]
    results = replace(
        results, questions=[replace(ask, comparisons=(HIGH_ABOVE_LOW, reverse)), replace(ask, comparisons=(other,))]
    )
    (first, second), (third,) = judge_all(results)
    assert first.num_compared == 2 and first.corrected_p == second.corrected_p == pytest.approx(
        2 * first.difference.p_value
    )
    assert "it stands after correction for 2 comparisons" in sentence(first)
    assert third.verdict == "does not show" and "correction" not in sentence(third)


@pytest.mark.parametrize(
    ("high", "low", "verdict", "separate"),
    [
        ([0.80, 0.81, 0.79], [0.50, 0.51, 0.49], "shows", True),
        ([0.50, 0.51, 0.49], [0.80, 0.81, 0.79], "the opposite", True),
        ([0.50, 0.60, 0.40], [0.52, 0.41, 0.58], "does not show", False),
        ([0.90, 0.70, 0.50], [0.80, 0.61, 0.39], "shows", False),  # each seed by 0.1: pairing sees it
        ([0.80], [0.50], "not judged", False),
        ([], [0.50], "not judged", False),
    ],
)
def test_verdicts_follow_from_the_paired_difference(
    high: list[float], low: list[float], verdict: str, separate: bool
) -> None:
    """Above zero, below zero, around zero, and too few seeds; the sentence says the same, with the numbers."""
    judgement = judge(results_of({"high": high, "low": low}), HIGH_ABOVE_LOW)
    assert (judgement.verdict, judgement.separate) == (verdict, separate)
    text = sentence(judgement)
    assert f"**{verdict}**" in text
    if len(high) == 3:
        assert f"{np.mean(high):.3f} [" in text and ("separate" if separate else "overlap") in text


@pytest.mark.parametrize("low", [[0.5, 0.5], [0.5, 0.5, math.nan]])
def test_only_seeds_of_both_sides_are_compared(low: list[float]) -> None:
    """A seed that one side lacks is in neither side's mean: else an interrupted study would compare unlike runs."""
    judgement = judge(results_of({"high": [0.8, 0.8, 0.1], "low": low}), HIGH_ABOVE_LOW)
    assert judgement.greater.mean == pytest.approx(0.8) and judgement.difference.num_seeds == 2


def test_the_verdict_on_a_claim_needs_all_of_its_comparisons() -> None:
    """All, none, the opposite, a part, and not yet."""

    def one(high: float, low: float, seeds: int = 3) -> Any:
        noise = [0.0, 0.01, -0.01][:seeds]
        return judge(results_of({"high": [high + n for n in noise], "low": [low - n for n in noise]}), HIGH_ABOVE_LOW)

    shows, opposite, neither, unjudged = one(0.8, 0.5), one(0.5, 0.8), one(0.5, 0.5), one(0.8, 0.5, seeds=1)
    assert verdict_on_claim([shows, shows]) == "shows it"
    assert verdict_on_claim([opposite]) == "shows the opposite"
    assert verdict_on_claim([neither, neither]) == "does not show it"
    assert verdict_on_claim([shows, neither]) == "shows it in part (1 of 2 comparisons)"
    assert verdict_on_claim([opposite, neither]) == "shows the opposite in part (1 of 2 comparisons)"
    assert verdict_on_claim([shows, opposite]) == "shows it in part (1 of 2 comparisons) and the opposite in part (1)"
    assert verdict_on_claim([shows, unjudged]) == verdict_on_claim([]) == "cannot judge it yet"


# --- results and pages ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_costs_add_up_over_the_steps(runs: MadeUpRuns, tmp_path: Path) -> None:
    """Tokens by who sampled them, time in steps, and time without what the teacher wrote, up to each evaluation."""
    teacher = replace(tiny.quickstart().rollouts, student_prefix_frac=constant(0.0))
    low = arm("low", 0.0)
    study = small_study(arms=(replace(low, config=replace(low.config, rollouts=teacher)), *small_study().arms[1:]))
    run_study(study, tmp_path, runs)
    results = load(tmp_path / "s" / "results.json")
    (first, middle, last) = results.runs_of("low")[0].evaluations
    assert [first["seconds"], middle["seconds"], last["seconds"]] == [0, 9, 18]
    assert last["reuse_seconds"] == pytest.approx(6 * 0.5)
    assert (last["student_tokens"], last["teacher_tokens"]) == (0, 6 * 64 * 60)
    on_policy = results.runs_of("high")[0].evaluations[-1]
    assert on_policy["reuse_seconds"] == 18 and on_policy["student_tokens"] == 6 * 64 * 60


@pytest.mark.parametrize(
    ("source", "teacher", "sampled"), [("teacher", 300 * 4814, 300 * 6419), ("data", 0, 300 * 1605)]
)
def test_counts_are_kept_whole_and_the_datas_tokens_are_nobodys(
    source: str, teacher: int, sampled: int, tmp_path: Path
) -> None:
    """Steps and tokens keep all their digits; a mixed step's tokens are split by share of responses, and add up."""
    overrides = [
        f"rollouts.off_policy_source={source}",
        "rollouts.student_prefix_frac=0.25",
        *("num_steps=12345", "rollouts.prompts_per_step=8", "rollouts.rollouts_per_prompt=8"),
    ]
    config = config_module.with_overrides(arm("low", 0.0).config, overrides)
    evaluated = {step: {"avg_at_k": 0.54321, "pass_at_k": 0.6} for step in (0, 12345)}
    steps = [
        {"step": float(step), "response_tokens": 6419 / 64, "student_prefix_frac": 0.25, "step_s": 1.0}
        for step in range(12046, 12346)
    ]
    folder = RunFolder(tmp_path / "run")
    leave_finished_run(config, folder, evaluated, steps)
    result = read_result("low", 1, folder)
    end = result.evaluations[-1]
    assert (end["step"], end["student_tokens"]) == (12345, 300 * 1605)
    assert (end["teacher_tokens"], end["sampled_tokens"]) == (teacher, sampled)
    assert end["avg_at_k"] == 0.5432 and result.curves["step"][-1] == np.mean(range(12339, 12346))


@pytest.mark.slow
def test_what_a_run_went_through_is_kept_beside_where_it_ended(tmp_path: Path) -> None:
    """Longest responses, lowest entropy and mean accuracy of the evaluations so far, the one before training left out."""
    evaluated = {
        0: {"avg_at_k": 0.9, "pass_at_k": 0.9, "response_tokens": 200.0, "entropy_nats": 0.01},
        3: {"avg_at_k": 0.1, "pass_at_k": 0.1, "response_tokens": 150.0, "entropy_nats": 0.05},
        6: {"avg_at_k": 0.7, "pass_at_k": 0.7, "response_tokens": 25.0, "entropy_nats": 0.2},
    }
    steps = [
        {"step": float(step), "response_tokens": 60.0, "student_prefix_frac": 1.0, "step_s": 1.0}
        for step in range(1, 7)
    ]
    folder = RunFolder(tmp_path / "run")
    leave_finished_run(arm("low", 0.0).config, folder, evaluated, steps)
    before, middle, end = read_result("low", 1, folder).evaluations
    assert math.isnan(before["peak_response_tokens"])
    assert (middle["path_avg_at_k"], middle["peak_response_tokens"], middle["low_entropy_nats"]) == (0.1, 150, 0.05)
    assert (end["path_avg_at_k"], end["peak_response_tokens"], end["low_entropy_nats"]) == (0.4, 150, 0.05)


@pytest.mark.slow
def test_results_are_small_without_paths_and_enough_to_redraw(runs: MadeUpRuns, tmp_path: Path) -> None:
    """The file is valid JSON, loads to what was saved, names no folder, and alone gives the same pages again."""
    run_study(small_study(draw=True), tmp_path / "study", runs)
    source = (tmp_path / "study" / "s" / "results.json").read_text()
    assert str(tmp_path) not in source and str(tiny.MODELS) not in source and "NaN" not in source
    kept = tmp_path / "kept" / "results.json"
    kept.parent.mkdir()
    kept.write_text(source)
    save(load(kept), kept)
    assert kept.read_text() == source
    assert redraw([str(kept)]) == 0
    for name in ("results.md", "study.html", "figures/scatter.svg", "figures/hand_off.svg"):
        assert (kept.parent / name).read_bytes() == (tmp_path / "study" / "s" / name).read_bytes()


def test_long_runs_stay_small(tmp_path: Path) -> None:
    """Training metrics are kept as means of stretches, and so are not longer than a limit."""
    folder = RunFolder(tmp_path / "run")
    made_up_run(replace(arm("low", 0.0).config, num_steps=1000), folder)
    from megatron_distill.study.results import read_result

    curves = read_result("low", 1, folder).curves
    assert set(curves) == {"step", *CURVES} and {len(values) for values in curves.values()} == {CURVE_POINTS}
    assert curves["step"][0] == pytest.approx(13.0)  # the mean of steps 1 to 25


@pytest.mark.slow
def test_pages_hold_every_number_figure_and_measure(runs: MadeUpRuns, tmp_path: Path) -> None:
    """Markdown and page show the table's intervals, the claim escaped, the command; figures are well-formed SVG files."""
    run_study(small_study(draw=True), tmp_path, runs)
    markdown, page = (tmp_path / "s" / "results.md").read_text(), (tmp_path / "s" / "study.html").read_text()
    shown = over_seeds(load(tmp_path / "s" / "results.json").final("high", "avg_at_k").values()).shown(".3f")
    for text in (markdown, page):
        assert (
            shown in text
            and "megatron-distill study x.s" in text
            and "Of made-up" in text
            and MEASURES["reuse_seconds"].meaning in text
        )
    assert "This study **shows it**" in markdown and "the low \\| arm" in markdown
    assert "&lt;than&gt;" in page and "<script" not in page and "**" not in page.split("</style>")[1]
    figures = sorted((tmp_path / "s" / "figures").iterdir())
    assert [path.stem for path in figures] == ["curves", "dose", "hand_off", "path", "scatter"]
    for path in figures:
        ElementTree.parse(path)
        assert f"figures/{path.name}" in markdown


@pytest.mark.slow
def test_pages_bear_studies_that_have_hardly_begun(runs: MadeUpRuns, tmp_path: Path) -> None:
    """No finished run: no figure and no number. One run of one seed: numbers without intervals, and no verdict."""
    study = small_study(draw=True)
    study_module._publish(study, {}, tmp_path / "s")
    assert "cannot judge it yet" in (tmp_path / "s" / "results.md").read_text()
    assert not list((tmp_path / "s" / "figures").iterdir())
    run_study(
        replace(study, arms=study.arms[:2], seeds=(1,), questions=(study.questions[0].without({"then"}),)),
        tmp_path,
        runs,
    )
    assert "one seed has no interval" in (tmp_path / "s" / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", every(Study))
def test_pages_of_every_study_can_be_made(name: str, tmp_path: Path) -> None:
    """Whatever its arms differ in, also in fields that some of them lack: before the first run, and with a run of each arm."""
    study = every(Study)[name]()
    study_module._publish(study, {}, tmp_path / "empty")
    assert "## Settings" in (tmp_path / "empty" / "results.md").read_text()
    finished = {(arm.name, 1): RunFolder(tmp_path / arm.name) for arm in study.arms}
    for arm in study.arms:
        made_up_run(replace(arm.config, seed=1), finished[arm.name, 1])
    study_module._publish(study, finished, tmp_path / "results")
    drawn = {path.stem for path in (tmp_path / "results" / "figures").iterdir()}
    assert drawn == {figure.name for question in study.questions for figure in question.figures}


@pytest.mark.slow
@pytest.mark.parametrize("kept", sorted(STUDIES.glob("*/results.json")), ids=lambda path: path.parent.name)
def test_the_pages_of_kept_results_are_what_would_be_written_now(kept: Path, tmp_path: Path) -> None:
    """Whoever changes how results are told writes those of ``docs/study`` again."""
    shutil.copy(kept, tmp_path)
    assert redraw([str(tmp_path / kept.name)]) == 0
    assert (tmp_path / "results.md").read_text() == kept.with_name("results.md").read_text()


@pytest.mark.parametrize("kept", sorted(STUDIES.glob("*/results.json")), ids=lambda path: path.parent.name)
def test_kept_results_answer_what_their_command_asks(kept: Path) -> None:
    """Whoever rewords or moves a study writes its results of ``docs/study`` again: same arms, seeds, claims and comparisons."""
    results = load(kept)
    study = load_made(results.command.split()[2], Study, "study")
    assert (results.command, results.title, tuple(results.seeds)) == (study.command, study.title, study.seeds)
    assert list(results.arms) == [arm.name for arm in study.arms]
    assert [(one.claim, one.comparisons) for one in results.questions] == [
        (one.claim, one.comparisons) for one in study.questions
    ]


@pytest.mark.parametrize("content", ["{", "{}", '{"runs": 3}', "[]"])
def test_other_files_are_no_results(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken or foreign file is named, with what to give instead."""
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError, match="not a study's results"):
        load(path)
    assert redraw([str(path)]) == 1 and "results.json" in capsys.readouterr().err
