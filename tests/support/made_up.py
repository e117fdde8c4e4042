"""Run folders as training leaves them, without training."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_distill import config as config_module
from megatron_distill.config import RunConfig
from megatron_distill.runs.run_folder import HELDOUT, RunFolder, append, write_json


def leave_finished_run(
    config: RunConfig,
    folder: RunFolder,
    evaluations: Mapping[int, Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
) -> None:
    """Write a finished run.

    Args:
        config: of the run.
        folder: where it goes.
        evaluations: what each one measured, by step; whatever it leaves out is the same in all.
        metrics: a record a step.
    """
    folder.create()
    config_module.save(config, folder.config)
    for record in metrics:
        append(folder.metrics, dict(record))
    for step, measured in evaluations.items():
        summary = {"step": step, "num_problems": 100, "k": 4, "entropy_nats": 0.2, "response_tokens": 64.0}
        summary |= {"truncated_frac": 0.0, "stop_reasons": {"7": 400}} | measured
        write_json(folder.evaluation(HELDOUT, step), {"summary": summary, "responses": []})
    folder.checkpoints.mkdir(exist_ok=True)
    folder.checkpoint_tracker.write_text(str(config.num_steps))
    write_json(folder.finished, {"step": config.num_steps})
