"""The results of a study, read from the folders of its finished runs.

In: a ``Study`` and the run folders. Out: ``Results``: of each run its evaluations with what they had cost until then, and a few
training metrics, down-sampled.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_distill import config as config_module
from megatron_distill.errors import DataError
from megatron_distill.pages.plots import Floats
from megatron_distill.pages.run_record import RunRecord, read_run
from megatron_distill.runs.run_folder import HELDOUT, RunFolder, read_json
from megatron_distill.study.design import CURVES, Study, settings_of
from megatron_distill.study.results import ArmFacts, Results, RunResult

CURVE_POINTS = 40  # of a training metric kept: means of equal stretches of steps
SIGNIFICANT_DIGITS = 4

_MEASURED = (
    *("step", "num_problems", "k"),
    *("avg_at_k", "pass_at_k", "entropy_nats", "response_tokens", "truncated_frac"),
)
"""What every evaluation holds that a table can show."""


def collect(study: Study, folders: Mapping[tuple[str, int], RunFolder]) -> Results:
    """The results of a study from its finished runs.

    Args:
        study: what was asked.
        folders: (arm, seed) -> folder of a finished run.

    Raises:
        DataError: a folder does not hold what a finished run leaves.
    """
    configs = {arm.name: settings_of(config_module.to_dict(arm.config)) for arm in study.arms}
    first = next(iter(configs.values()))
    common = {
        field: value
        for field, value in first.items()
        if all(field in config and config[field] == value for config in configs.values())
    }
    arms = {
        arm.name: ArmFacts(
            arm.label, arm.after, {field: value for field, value in configs[arm.name].items() if field not in common}
        )
        for arm in study.arms
    }
    made_by = {key: _environment(folder) for key, folder in folders.items()}
    environments: list[dict[str, Any]] = []
    for facts in made_by.values():
        if facts not in environments:
            environments.append(facts)
    runs = [
        replace(read_result(*key, folder), environment=environments.index(made_by[key]))
        for key, folder in folders.items()
    ]
    return Results(
        study.title,
        study.scope,
        study.command,
        list(study.seeds),
        arms,
        list(study.questions),
        common,
        environments,
        runs,
    )


def read_result(arm: str, seed: int, folder: RunFolder) -> RunResult:
    """A finished run in numbers.

    Raises:
        DataError: the folder does not hold the evaluations that the run's config asks for, or one lacks a number.
    """
    run = read_run(folder)
    _check_evaluations(run, folder)
    costs = _cumulative_costs(run)
    steps = run.column("step")
    evaluations = []
    for index, summary in enumerate(run.evaluations):
        done = int(np.searchsorted(steps, summary["step"], side="right"))
        numbers = {name: float(value) for name, value in summary.items() if isinstance(value, int | float)}
        numbers["gain_avg_at_k"] = summary["avg_at_k"] - run.evaluations[0]["avg_at_k"]
        numbers |= _so_far(run.evaluations[1 : index + 1])
        numbers["peak_training_tokens"] = _peak(run.column("response_tokens"), done)
        numbers["horizon_tokens"] = float(run.column("horizon_tokens")[done - 1]) if done else math.nan
        numbers |= {name: float(values[done - 1]) if done else 0.0 for name, values in costs.items()}
        evaluations.append(_rounded(numbers))
    kept = [name for name in CURVES if run.has(name)]
    curves = {name: _stretch_means(run.column(name)) for name in ("step", *kept)}
    return RunResult(arm, seed, evaluations, curves)


def _check_evaluations(run: RunRecord, folder: RunFolder) -> None:
    """Refuse a run of which another step than its last would count as the end, or than its first as the start.

    Raises:
        DataError: an evaluation is missing, or there is one too many, or it lacks a number. One that is nan is there.
    """
    remedy = "Put the file back from a copy, or delete the run's folder to repeat the run."
    for summary in run.evaluations:
        for name in _MEASURED:
            if not isinstance(summary.get(name), int | float):
                raise DataError(
                    f"{folder.evals}: {name} = {summary.get(name)!r} after step {summary.get('step')}: must be a number. The "
                    f"study's tables need it. {remedy}"
                )
    num_steps = run.config["num_steps"]
    due = {*range(0, num_steps, run.config["evaluation.every_steps"] or num_steps), num_steps}
    if odd := sorted(due ^ {summary["step"] for summary in run.evaluations}):
        state = "is missing" if odd[0] in due else "is one too many"
        raise DataError(
            f"{folder.evaluation(HELDOUT, odd[0])}: {state}: evaluation.every_steps = "
            f"{run.config['evaluation.every_steps']} and num_steps = {num_steps} give a finished run {len(due)} evaluations. "
            f"Runs are compared at the same steps. {remedy}"
        )


def _so_far(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a run went through up to an evaluation, as far as it was measured; nan where it never was, as before the first step,
    where all arms are alike."""
    accuracies, lengths, entropies = (
        [one[measure] for one in evaluations if math.isfinite(one[measure])]
        for measure in ("avg_at_k", "response_tokens", "entropy_nats")
    )
    return {
        "path_avg_at_k": float(np.mean(accuracies)) if accuracies else math.nan,
        "peak_response_tokens": max(lengths, default=math.nan),
        "low_entropy_nats": min(entropies, default=math.nan),
    }


def _cumulative_costs(run: RunRecord) -> dict[str, Floats]:
    """{measure: [N] its sum over the steps so far}. A step that an interruption made a run repeat counts once.

    A step's tokens are exact. Its metrics do not tell whose they are: where it has two authors, they are split by the share of
    responses that each wrote, whatever the lengths. What the data wrote, nobody sampled.
    """
    share = run.column("student_prefix_frac")
    responses = run.config["rollouts.prompts_per_step"] * run.config["rollouts.rollouts_per_prompt"]
    tokens = np.rint(run.column("response_tokens") * responses)
    of_student = np.rint(tokens * share)
    of_teacher = (tokens - of_student) * (run.config["rollouts.off_policy_source"] == "teacher")
    asked_s = np.nan_to_num(run.column("rollout_s")) + np.nan_to_num(run.column("score_s"))
    costs = {
        "student_tokens": of_student,
        "teacher_tokens": of_teacher,
        "sampled_tokens": of_student + of_teacher,
        "seconds": run.column("step_s"),
        "reuse_seconds": run.column("step_s") - (1 - share) * asked_s,
    }
    return {name: np.cumsum(np.nan_to_num(values)) for name, values in costs.items()}


def _stretches(values: Floats) -> list[Floats]:
    return np.array_split(values, min(CURVE_POINTS, len(values)) or 1)


def _stretch_means(values: Floats) -> list[float]:
    finite = [stretch[np.isfinite(stretch)] for stretch in _stretches(values)]
    return [_round(float(part.mean())) if len(part) else math.nan for part in finite]


def _peak(values: Floats, done: int) -> float:
    """The largest of the means over stretches that ended within the first ``done`` steps; nan if none was measured."""
    ends = np.cumsum([len(stretch) for stretch in _stretches(values)])
    means = zip(_stretch_means(values), ends, strict=True)
    return max((mean for mean, end in means if end <= done and math.isfinite(mean)), default=math.nan)


def _environment(folder: RunFolder) -> dict[str, Any]:
    path = folder.root / "env.json"
    facts = read_json(path) if path.exists() else {}
    kept = ("megatron_distill", "commit", "python", "cpus", "gpus", "packages")
    return {name: facts[name] for name in kept if name in facts}


def _round(value: float) -> float:
    """To so many digits; a whole number is a count of steps or tokens, and stays as it is."""
    return value if value.is_integer() else float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: _round(value) for name, value in numbers.items()}
