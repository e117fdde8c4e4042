"""What a study keeps and shows: its results file, and the pages that are made from it."""

import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron_distill.recipes import tiny

from megatron_distill import config as config_module
from megatron_distill.config.loading import every, load_made
from megatron_distill.config.schedules import constant
from megatron_distill.errors import DataError
from megatron_distill.runs.run_folder import HELDOUT, RunFolder, read_json, write_json
from megatron_distill.study import page
from megatron_distill.study.claims import judge_all
from megatron_distill.study.design import CURVES, MEASURES, Study, settings_of
from megatron_distill.study.page import main as redraw
from megatron_distill.study.results import load, over_seeds, save
from megatron_distill.study.run import StudyRuns, run_study
from megatron_distill.study.run_results import CURVE_POINTS, read_result
from tests.support.made_up import leave_finished_run
from tests.support.made_up_study import MadeUpRuns, arm, made_up_run, results_of, small_study

STUDIES = Path(__file__).parents[1] / "docs" / "study"


@pytest.fixture
def runs() -> MadeUpRuns:
    return MadeUpRuns()


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
        *("num_steps=12345", "evaluation.every_steps=0"),
        *("rollouts.prompts_per_step=8", "rollouts.rollouts_per_prompt=8"),
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
    """Longest responses, lowest entropy and mean accuracy of the evaluations so far, the one before training left out; and the
    longest in training, whose stretches here are of one step."""
    evaluated = {
        0: {"avg_at_k": 0.9, "pass_at_k": 0.9, "response_tokens": 200.0, "entropy_nats": 0.01},
        3: {"avg_at_k": 0.1, "pass_at_k": 0.1, "response_tokens": 150.0, "entropy_nats": 0.05},
        6: {"avg_at_k": 0.7, "pass_at_k": 0.7, "response_tokens": 25.0, "entropy_nats": 0.2},
    }
    steps = [
        {"step": float(step), "response_tokens": tokens, "student_prefix_frac": 1.0, "step_s": 1.0}
        for step, tokens in enumerate((60.0, 90.0, 70.0, math.nan, 120.0, 30.0), 1)
    ]
    folder = RunFolder(tmp_path / "run")
    leave_finished_run(arm("low", 0.0).config, folder, evaluated, steps)
    before, middle, end = read_result("low", 1, folder).evaluations
    assert math.isnan(before["peak_response_tokens"]) and math.isnan(before["peak_training_tokens"])
    assert (middle["peak_training_tokens"], end["peak_training_tokens"]) == (90, 120)
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


@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_run_that_lacks_an_evaluation_is_named_with_the_file(step: int, tmp_path: Path) -> None:
    """The first, a middle and the last: another step must not count as the start or the end; nor may there be one too many."""
    folder = RunFolder(tmp_path / "run")
    made_up_run(arm("low", 0.0).config, folder)
    read_result("low", 1, folder)
    evaluation = folder.evaluation(HELDOUT, step)
    moved = evaluation.rename(tmp_path / "moved.json")
    with pytest.raises(DataError, match=rf"step_00000{step}\.json: is missing: .*3 evaluations.*Put the file back"):
        read_result("low", 1, folder)
    moved.rename(evaluation)
    summary = read_json(evaluation)["summary"]
    write_json(folder.evaluation(HELDOUT, 4), {"summary": summary | {"step": 4}})
    with pytest.raises(DataError, match=r"step_000004\.json: is one too many"):
        read_result("low", 1, folder)


@pytest.mark.parametrize("broken", [{"entropy_nats": None}, {"response_tokens": "64"}, {"k": None}])
def test_an_evaluation_without_its_numbers_is_refused(broken: dict[str, Any], tmp_path: Path) -> None:
    """What holds none, or something else, is named: a table would need it."""
    folder = RunFolder(tmp_path / "run")
    made_up_run(arm("low", 0.0).config, folder)
    path, (name, value) = folder.evaluation(HELDOUT, 3), *broken.items()
    whole = read_json(path)
    less = {key: number for key, number in whole["summary"].items() if key != name}
    for summary, told in ((less | broken, repr(value)), (less, "None")):
        write_json(path, whole | {"summary": summary})
        with pytest.raises(DataError, match=rf"{name} = {told} after step 3: must be a number"):
            read_result("low", 1, folder)


@pytest.mark.parametrize("unmeasured", [3, 6])
def test_an_evaluation_that_could_not_be_measured_is_left_out(unmeasured: int, tmp_path: Path) -> None:
    """Whether it comes first or last: what went before and after it still counts."""
    measured = {"avg_at_k": 0.5, "pass_at_k": 0.6, "response_tokens": 64.0, "entropy_nats": 0.2}
    evaluated = dict.fromkeys((0, 3, 6), measured)
    nothing = dict.fromkeys(("avg_at_k", "response_tokens", "entropy_nats"), math.nan)
    folder = RunFolder(tmp_path / "run")
    leave_finished_run(arm("low", 0.0).config, folder, evaluated | {unmeasured: measured | nothing}, [{"step": 6.0}])
    _, middle, end = read_result("low", 1, folder).evaluations
    assert (end["path_avg_at_k"], end["peak_response_tokens"], end["low_entropy_nats"]) == (0.5, 64, 0.2)
    assert math.isnan(middle["low_entropy_nats"]) == (unmeasured == 3)
    assert math.isnan(end["peak_training_tokens"])  # which no step measured


def test_a_seed_without_a_number_is_not_counted_for_it() -> None:
    """A cell says how many of its arm's seeds it is of, where these are not all; nothing is said of a measure that none has."""
    results = results_of({"low": [0.5, math.nan, 0.6], "high": [0.8, 0.7, 0.9]})
    assert page._cell(results.final("low", "avg_at_k"), "avg_at_k").endswith("] (2 of 3 seeds)")
    assert page._cell(results.final("high", "avg_at_k"), "avg_at_k").endswith("]")
    assert page._cell({1: math.nan}, "avg_at_k") == "-"


@pytest.mark.slow
def test_runs_of_different_code_are_told(runs: MadeUpRuns, tmp_path: Path) -> None:
    """Each environment is kept once; where commit or packages differ, the page says which arms and seeds were made by which."""
    study = small_study(seeds=(1, 2))
    run_study(study, tmp_path, runs)
    path = tmp_path / "s" / "results.json"
    assert len(load(path).environments) == 1 and "same code" not in path.with_suffix(".md").read_text()
    changed = tmp_path / "runs" / "high" / "seed_2" / "env.json"
    write_json(changed, read_json(changed) | {"commit": "abc-dirty", "packages": {"torch": "3", "apex": None}})
    run_study(study, tmp_path, runs)
    kept, text = load(path), path.with_suffix(".md").read_text()
    assert [run.environment for run in kept.runs] == [0, 0, 0, 0, 1, 0] and len(kept.environments) == 2
    assert "commit abc-dirty, torch 3 made the high | arm (seeds 2)." in text
    assert "commit unknown, torch 2 made the low | arm (seeds 1, 2); the high | arm (seeds 1);" in text
    assert "torch 3, by commit abc-dirty." in text


def test_results_of_one_environment_can_still_be_read() -> None:
    """As the oldest of ``docs/study`` keep them: it is that of every run."""
    path = STUDIES / "tiny" / "results.json"
    assert "environments" not in read_json(path)
    results = load(path)
    assert len(results.environments) == 1 and {run.environment for run in results.runs} == {0}


def test_settings_name_models_and_functions_without_their_folders() -> None:
    """Two arms with different teachers differ in the table, and no field, nor an item of a list, holds a folder."""
    config = arm("low", 0.0).config
    other = replace(
        config,
        teacher=replace(config.teacher, path="/home/me/models/larger"),
        components=("/home/me/mine.py:term", "built_in"),
    )
    before, after = (settings_of(config_module.to_dict(one)) for one in (config, other))
    assert (before["teacher.path"], after["teacher.path"]) == ("teacher", "larger")
    assert after["components"] == ["mine.py:term", "built_in"] and "/home/me" not in str(after)


def test_long_runs_stay_small(tmp_path: Path) -> None:
    """Training metrics are kept as means of stretches, and so are not longer than a limit."""
    folder = RunFolder(tmp_path / "run")
    made_up_run(replace(arm("low", 0.0).config, num_steps=1000), folder)
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
    assert "This study **shows it (1 of 1 stands after correction)**" in markdown and "the low \\| arm" in markdown
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
    StudyRuns(study, tmp_path / "s", {}, {}, []).publish()
    text = (tmp_path / "s" / "results.md").read_text()
    assert "cannot judge it yet" in text and "Interim: the planned test is over 3 seeds" in text
    assert not list((tmp_path / "s" / "figures").iterdir())
    run_study(
        replace(study, arms=study.arms[:2], seeds=(1,), questions=(study.questions[0].without({"then"}),)),
        tmp_path,
        runs,
    )
    text = (tmp_path / "s" / "results.md").read_text()
    assert "one seed has no interval" in text and "Interim" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", every(Study))
def test_pages_of_every_study_can_be_made(name: str, tmp_path: Path) -> None:
    """Whatever its arms differ in, also in fields that some of them lack: before the first run, and with a run of each arm."""
    study = every(Study)[name]()
    StudyRuns(study, tmp_path / "empty", {}, {}, []).publish()
    assert "## Settings" in (tmp_path / "empty" / "results.md").read_text()
    configs = {(one.name, 1): replace(one.config, seed=1) for one in study.arms}
    folders = {key: RunFolder(tmp_path / key[0]) for key in configs}
    for key, config in configs.items():
        made_up_run(config, folders[key])
    StudyRuns(study, tmp_path / "results", folders, configs, []).publish()
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


def test_intervals_told_in_prose_are_those_of_the_results() -> None:
    """Every interval in the tables of ``docs/study/README.md``, but for their last column, is of a comparison in the results
    that its section links to, either way round, to the digits shown."""
    num_found = 0
    for section in (STUDIES / "README.md").read_text().split("\n## ")[1:]:
        kept = [STUDIES / name / "results.json" for name in re.findall(r"\(([a-z-]+)/results\.md\)", section)]
        judged = [one.difference for path in kept for question in judge_all(load(path)) for one in question]
        ends = [pair for one in judged for pair in ((one.low, one.high), (-one.high, -one.low))]
        rows = [line.rpartition("|")[0].rpartition("|")[0] for line in section.splitlines() if kept and line[:1] == "|"]
        for row in rows:
            for shown in re.findall(r"\[([+-]?[\d.]+), ([+-]?[\d.]+)\]", row):
                digits = len(shown[0].partition(".")[2])
                told = tuple(f"{float(end):.{digits}f}" for end in shown)
                assert told in {tuple(f"{end:.{digits}f}" for end in pair) for pair in ends}, f"{shown} in {row}"
                num_found += 1
    assert num_found > 50


@pytest.mark.parametrize("content", ["{", "{}", '{"runs": 3}', "[]"])
def test_other_files_are_no_results(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken or foreign file is named, with what to give instead."""
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError, match="not a study's results"):
        load(path)
    assert redraw([str(path)]) == 1 and "results.json" in capsys.readouterr().err
