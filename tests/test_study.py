"""Studies: what is run and in which order, and what survives interruptions."""

import shutil
import threading
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import pytest
from megatron_distill.recipes import tiny

from megatron_distill import config as config_module
from megatron_distill.config import RunConfig
from megatron_distill.config.loading import every
from megatron_distill.errors import CheckpointError, ConfigError, DistillError
from megatron_distill.launch import local, preflight
from megatron_distill.launch.disk import bytes_to_come
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.runs.lock import RunLock
from megatron_distill.runs.run_folder import RunFolder
from megatron_distill.study import run as study_module
from megatron_distill.study.design import Arm, Comparison, Group, Study, StudyFigure, check_study
from megatron_distill.study.results import load
from megatron_distill.study.run import planned, run_study
from tests.support.made_up_study import MadeUpRuns, arm, made_up_run, small_study


@pytest.fixture
def runs() -> MadeUpRuns:
    return MadeUpRuns()


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


def test_what_another_command_has_made_since_is_not_made_again(runs: MadeUpRuns, tmp_path: Path) -> None:
    """Commands of the same seeds share them: while one makes its first run, another makes all others."""

    def beside(config: RunConfig, folder: RunFolder, out: TextIO) -> None:
        runs(config, folder, out)
        for key in all_runs.missing[1:]:
            made_up_run(all_runs.configs[key], all_runs.folders[key])

    all_runs = planned(small_study(), tmp_path)
    run_study(small_study(), tmp_path, beside)
    assert runs == [("low", 1)] and len(load(tmp_path / "s" / "results.json").runs) == 9


def test_what_another_command_is_making_is_left_to_it(
    runs: MadeUpRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what goes on from it; all other runs are made, and what was left is told."""

    def locked(config: RunConfig, folder: RunFolder, out: TextIO) -> None:
        with RunLock(folder.root):
            runs(config, folder, out)

    low = RunFolder(tmp_path / "runs" / "low" / "seed_1")
    low.create()
    with RunLock(low.root):
        run_study(small_study(seeds=(1,)), tmp_path, locked)
    assert runs == [("high", 1)]
    assert "2 runs were left to another command" in capsys.readouterr().out
    run_study(small_study(seeds=(1,)), tmp_path, locked)
    assert runs == [("high", 1), ("low", 1), ("then", 1)]


def test_a_quick_look_and_the_whole_study_share_a_folder(runs: MadeUpRuns, tmp_path: Path) -> None:
    """In either order; their runs and results lie apart."""
    whole = small_study(seeds=(1,), quick_overrides=("num_steps=3",))
    for study in (whole.quick(), whole, whole.quick()):
        run_study(study, tmp_path, runs)
    assert len(runs) == 2 + 3
    assert len(list((tmp_path / "runs-quick").glob("*/seed_1"))) == 2
    assert load(tmp_path / "s" / "results.json").runs[0].evaluations[-1]["step"] == 6


@pytest.mark.slow
def test_a_slow_command_does_not_undo_what_a_fast_one_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one writes the results of the run that it saw, a second run finishes, whose command comes after it."""
    all_runs = planned(small_study(), tmp_path)
    first, second = all_runs.missing[:2]
    made_up_run(all_runs.configs[first], all_runs.folders[first])
    fast = threading.Thread(target=all_runs.publish)
    read = study_module.collect

    def slow(*arguments: Any) -> Any:
        results = read(*arguments)
        if not fast.ident:
            made_up_run(all_runs.configs[second], all_runs.folders[second])
            fast.start()
            fast.join(timeout=1)  # without a turn it would be done by now
        return results

    monkeypatch.setattr(study_module, "collect", slow)
    all_runs.publish()
    fast.join()
    assert len(load(tmp_path / "s" / "results.json").runs) == 2
    assert "2 of 9 runs" in (tmp_path / "s" / "study.html").read_text()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_kill_while_results_are_written_leaves_whole_files(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first, second and third file: each is the old one or the new one, and the next command writes all and leaves no
    other."""
    all_runs = planned(small_study(), tmp_path)
    all_runs.publish()
    folder, first = tmp_path / "s", all_runs.missing[0]
    names = ("results.json", "results.md", "study.html")
    old = {name: (folder / name).read_bytes() for name in names}
    made_up_run(all_runs.configs[first], all_runs.folders[first])
    whole = Path.write_bytes

    def killed(path: Path, content: bytes) -> int:
        if path.name.startswith(names[number]):
            whole(path, content[: len(content) // 2])
            raise KeyboardInterrupt
        return whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            all_runs.publish()
    found = {name: (folder / name).read_bytes() for name in names}
    all_runs.publish()
    new = {name: (folder / name).read_bytes() for name in names}
    assert found == {name: (new if place < number else old)[name] for place, name in enumerate(names)}
    assert {path.name for path in folder.iterdir()} == {*names, "figures", ".publishing"}


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


@pytest.mark.parametrize(
    ("greater", "lesser"), [(("high",), ()), ((), ("low",)), (("high", "low"), ("low",)), (("high", "high"), ("low",))]
)
def test_a_comparison_has_arms_on_both_sides_each_once(greater: tuple[str, ...], lesser: tuple[str, ...]) -> None:
    """An empty side has no mean, and what stands on both says nothing."""
    asked = Comparison("avg_at_k", Group("these", greater), Group("those", lesser))
    question = replace(small_study().questions[0], comparisons=(asked,))
    with pytest.raises(ConfigError, match=r"comparisons\[avg_at_k: these > those\] = .*none may come twice"):
        check_study(small_study(questions=(question,)))


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
