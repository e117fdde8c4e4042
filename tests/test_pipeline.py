"""Pipelines: the order of stages, what they hand over, gates, and what survives a failure. Training is made up."""

from dataclasses import replace
from pathlib import Path
from typing import TextIO

import pytest
from megatron_distill.recipes import clusters, tiny

from megatron_distill import config as config_module
from megatron_distill.cli.main import main
from megatron_distill.config import RunConfig
from megatron_distill.config.loading import every
from megatron_distill.errors import ConfigError, DistillError
from megatron_distill.launch.nodes import groups_of
from megatron_distill.launch.pipeline import (
    Evaluations,
    Pipeline,
    Stage,
    all_of,
    at_least,
    dry_run,
    not_worse,
    run_pipeline,
)
from megatron_distill.runs.run_folder import RunFolder
from tests.support.made_up import leave_finished_run


class MadeUpStages(list[str]):
    """In place of training: leaves a finished run of the given accuracies, and lists the stages that it made."""

    def __init__(self, **accuracy: tuple[float, float]) -> None:
        self.accuracy = accuracy

    def __call__(self, config: RunConfig, folder: RunFolder, out: TextIO) -> None:
        name = folder.root.name
        if name not in self.accuracy:
            raise DistillError(f"trainer failed: {name}")
        evaluations = {
            step: {"repetition_frac": 0.0}
            | {
                key: value
                for metric in ("avg_at_k", "pass_at_k")
                for key, value in ((metric, avg), (f"{metric}_low", avg - 0.05), (f"{metric}_high", avg + 0.05))
            }
            for step, avg in zip((0, config.num_steps), self.accuracy[name], strict=True)
        }
        metrics = [{"step": step, "loss": 0.1, "step_s": 1.0} for step in (1, config.num_steps)]
        leave_finished_run(config, folder, evaluations, metrics)
        self.append(name)


def two_stages() -> Pipeline:
    return Pipeline("p", tuple(Stage(name, tiny.quickstart(), not_worse()) for name in ("distil", "rl")))


@pytest.mark.slow
def test_a_stage_starts_from_what_the_one_before_it_left(tmp_path: Path) -> None:
    """The second stage's student is the first one's export; the console gets both tables; a second start makes nothing."""
    made = MadeUpStages(distil=(0.3, 0.5), rl=(0.5, 0.6))
    told = run_pipeline(two_stages(), tmp_path, made)
    assert made == ["distil", "rl"]
    assert config_module.load(tmp_path / "rl" / "config.json").student.path == str(tmp_path / "distil" / "hf")
    assert (tmp_path / "compare.html").exists() and str(tmp_path / "compare.html") in told
    assert "0.300" in told and "0.600" in told
    assert run_pipeline(two_stages(), tmp_path, made) == told and made == ["distil", "rl"]


def test_a_failing_gate_stops_before_the_next_stage(tmp_path: Path) -> None:
    """Worse than the start's interval: stop, and say by how much; the same command stops again without a new run."""
    made = MadeUpStages(distil=(0.5, 0.3), rl=(0.3, 0.6))
    for _ in range(2):
        with pytest.raises(
            DistillError, match=r"'distil' = gate failed: avg_at_k = 0.300 .* must not fall below 0.450"
        ):
            run_pipeline(two_stages(), tmp_path, made)
    assert made == ["distil"]


@pytest.mark.slow
def test_a_failed_stage_is_where_the_same_command_goes_on(tmp_path: Path) -> None:
    """The first stage is not made again once the second has failed."""
    failing, whole = MadeUpStages(distil=(0.3, 0.5)), MadeUpStages(rl=(0.5, 0.6))
    with pytest.raises(DistillError, match="trainer failed: rl"):
        run_pipeline(two_stages(), tmp_path, failing)
    run_pipeline(two_stages(), tmp_path, whole)
    assert failing == ["distil"] and whole == ["rl"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_finished_stage_of_another_config_is_refused(number: int, tmp_path: Path) -> None:
    """Nothing is started, nor judged by another config's numbers, whichever stage it is; a longer patience changes nothing."""
    made = MadeUpStages(distil=(0.3, 0.5), rl=(0.5, 0.6))
    run_pipeline(two_stages(), tmp_path, made)
    made.clear()
    (tmp_path / ("rl", "distil")[number] / "finished.json").unlink()

    def changed(override: str) -> Pipeline:
        stages = list(two_stages().stages)
        config = config_module.with_overrides(stages[number].config, [override])
        stages[number] = replace(stages[number], config=config)
        return Pipeline("p", tuple(stages))

    for start in (
        lambda pipeline: run_pipeline(pipeline, tmp_path, made),
        lambda pipeline: dry_run(pipeline, tmp_path),
    ):
        with pytest.raises(DistillError, match=r"finished with another config \(optimizer.lr differ\).* --dir"):
            start(changed("optimizer.lr=3e-5"))
    assert made == []
    assert "nothing: it has finished" in dry_run(changed("servers.request_timeout_s=999"), tmp_path)


def test_an_unsound_late_stage_is_told_before_the_first_one_starts(tmp_path: Path) -> None:
    """What a stage would trip over in hours is checked now."""
    bad = replace(tiny.quickstart(), data=replace(tiny.quickstart().data, heldout_path="nowhere.jsonl"))
    made = MadeUpStages(distil=(0.3, 0.5), rl=(0.5, 0.6))
    stages = (two_stages().stages[0], Stage("rl", bad, not_worse()))
    with pytest.raises(ConfigError, match=r"stage 'rl': .*nowhere\.jsonl"):
        run_pipeline(Pipeline("p", stages), tmp_path, made)
    with pytest.raises(ConfigError, match="of different names"):
        run_pipeline(Pipeline("p", stages[:1] * 2), tmp_path, made)
    assert made == []


@pytest.mark.slow
def test_a_late_stage_that_the_cluster_cannot_take_is_told_before_the_first_one_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks do not divide into nodes of the profile; the dry run says so too, and refuses a profile that is none."""
    profile, made = clusters.example_h100(), MadeUpStages(distil=(0.3, 0.5))
    nine_ranks = [
        "student.parallel.dp=9",
        "student.parallel.tp=1",
        "micro_batch_rollouts=8",
        "rollouts.prompts_per_step=72",
    ]
    wide = Stage("rl", config_module.with_overrides(tiny.quickstart(), nine_ranks), not_worse())
    pipeline = Pipeline("p", (two_stages().stages[0], wide))

    def check(config: RunConfig, run: RunFolder) -> None:
        groups_of(config, profile)

    for start in (
        lambda: run_pipeline(pipeline, tmp_path, made, check),
        lambda: dry_run(pipeline, tmp_path, check),
    ):
        with pytest.raises(ConfigError, match=r"pipeline stage 'rl': .*must be a multiple of the 8 ranks"):
            start()
    assert made == []
    monkeypatch.chdir(tmp_path)
    assert main(["pipeline", "tiny_rl.pipeline", "--dry-run", "--cluster", "nonsense"]) == 1
    assert "--cluster" in capsys.readouterr().err
    assert main(["pipeline", "tiny_rl.pipeline", "--dry-run", "--cluster", "lab", "--dir", "with a blank"]) == 1
    assert "pipeline stage 'distil': run folder = " in capsys.readouterr().err


def test_recipes_name_stages_and_gates() -> None:
    """Each pipeline of ``recipes`` ends with RL and judges every stage."""
    for make in every(Pipeline).values():
        stages = make().stages
        assert stages[-1].config.rl.weight > 0 and stages[0].config.distill.weight > 0
        worse: Evaluations = {"heldout": [{"avg_at_k": 0.5, "avg_at_k_low": 0.4}, {"avg_at_k": 0.1}]}
        assert all(stage.gate(worse) for stage in stages)


def test_a_gate_may_ask_for_any_set() -> None:
    """Gates by set and metric, and several in one; a set that was not measured is named, with those that were."""
    measured: Evaluations = {
        "heldout": [{"avg_at_k": 0.5, "avg_at_k_low": 0.4}, {"avg_at_k": 0.6}],
        "aime24": [{"maj_at_k": 0.3, "maj_at_k_low": 0.2}, {"maj_at_k": 0.1}],
    }
    assert not_worse()(measured) is None
    assert "maj_at_k on aime24 = 0.100 after" in str(not_worse("maj_at_k", "aime24")(measured))
    assert "must be at least 0.700" in str(all_of(not_worse(), at_least(0.7))(measured))
    assert all_of(not_worse(), at_least(0.6))(measured) is None
    with pytest.raises(ConfigError, match="was measured on heldout, aime24"):
        not_worse(evaluation_set="amc23")(measured)


@pytest.mark.slow
def test_a_dry_run_checks_and_starts_nothing(tmp_path: Path) -> None:
    """Each stage, its steps and the student it would begin from, or that it has finished; an unsound one is refused."""
    made = MadeUpStages(distil=(0.3, 0.5))
    told = dry_run(two_stages(), tmp_path).splitlines()
    assert told[0] == f"p: sound. It would run, in {tmp_path}:"
    assert told[1].endswith(f"steps 1 to 40, from {tiny.MODELS / 'student'}")
    assert told[2].endswith(f"from {tmp_path / 'distil' / 'hf'}")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DistillError):
        run_pipeline(two_stages(), tmp_path, made)
    assert "nothing: it has finished" in dry_run(two_stages(), tmp_path)
    unsound = replace(
        two_stages().stages[1],
        config=replace(tiny.quickstart(), student=replace(tiny.quickstart().student, path="none")),
    )
    with pytest.raises(ConfigError, match="pipeline stage 'rl'"):
        dry_run(replace(two_stages(), stages=(two_stages().stages[0], unsound)), tmp_path)
