"""The results of a study, read from the folders of its finished runs.

In: a ``Study`` and the run folders. Out: ``Results``: of each run its evaluations with what they had cost until then, and a few
training metrics, down-sampled.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_distill import config as config_module
from megatron_distill.errors import DataError
from megatron_distill.pages.plots import Floats
from megatron_distill.pages.run_record import RunRecord, read_run
from megatron_distill.runs.run_folder import RunFolder, read_json
from megatron_distill.study.design import CURVES, Study, settings_of
from megatron_distill.study.results import ArmFacts, Results, RunResult

CURVE_POINTS = 40  # of a training metric kept: means of equal stretches of steps
SIGNIFICANT_DIGITS = 4


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
    runs = [read_result(arm, seed, folder) for (arm, seed), folder in folders.items()]
    environment = _environment(next(iter(folders.values()))) if folders else {}
    return Results(
        study.title,
        study.scope,
        study.command,
        list(study.seeds),
        arms,
        list(study.questions),
        common,
        environment,
        runs,
    )


def read_result(arm: str, seed: int, folder: RunFolder) -> RunResult:
    """A finished run in numbers.

    Raises:
        DataError: if the folder holds no evaluation.
    """
    run = read_run(folder)
    if not run.evaluations:
        raise DataError(
            f"run folder = {folder.root}: a finished run without an evaluation. Delete the folder to repeat the run."
        )
    costs = _cumulative_costs(run)
    steps = run.column("step")
    evaluations = []
    for index, summary in enumerate(run.evaluations):
        done = int(np.searchsorted(steps, summary["step"], side="right"))
        numbers = {name: float(value) for name, value in summary.items() if isinstance(value, int | float)}
        numbers["gain_avg_at_k"] = summary["avg_at_k"] - run.evaluations[0]["avg_at_k"]
        numbers |= _so_far(run.evaluations[1 : index + 1])
        numbers["horizon_tokens"] = float(run.column("horizon_tokens")[done - 1]) if done else math.nan
        numbers |= {name: float(values[done - 1]) if done else 0.0 for name, values in costs.items()}
        evaluations.append(_rounded(numbers))
    kept = [name for name in CURVES if run.has(name)]
    curves = {name: _stretch_means(run.column(name)) for name in ("step", *kept)}
    return RunResult(arm, seed, evaluations, curves)


def _so_far(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a run went through up to an evaluation; nan before its first step, where all arms are alike."""
    if not evaluations:
        return dict.fromkeys(("path_avg_at_k", "peak_response_tokens", "low_entropy_nats"), math.nan)
    accuracies, lengths, entropies = (
        [one[measure] for one in evaluations] for measure in ("avg_at_k", "response_tokens", "entropy_nats")
    )
    return {
        "path_avg_at_k": float(np.mean(accuracies)),
        "peak_response_tokens": max(lengths),
        "low_entropy_nats": min(entropies),
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


def _stretch_means(values: Floats) -> list[float]:
    stretches = np.array_split(values, min(CURVE_POINTS, len(values)) or 1)
    finite = [stretch[np.isfinite(stretch)] for stretch in stretches]
    return [_round(float(part.mean())) if len(part) else math.nan for part in finite]


def _environment(folder: RunFolder) -> dict[str, Any]:
    path = folder.root / "env.json"
    facts = read_json(path) if path.exists() else {}
    return {name: facts[name] for name in ("megatron_distill", "python", "cpus", "gpus", "packages") if name in facts}


def _round(value: float) -> float:
    """To so many digits; a whole number is a count of steps or tokens, and stays as it is."""
    return value if value.is_integer() else float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: _round(value) for name, value in numbers.items()}
