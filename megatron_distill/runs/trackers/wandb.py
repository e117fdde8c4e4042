"""Weights & Biases, online or offline. Its own variables say where to: ``WANDB_PROJECT``, ``WANDB_ENTITY``, ``WANDB_MODE``.

Without a key (``WANDB_API_KEY`` or ``wandb login``) a run is recorded offline, in the run folder; ``wandb sync`` uploads it.
"""

import os
from collections.abc import Mapping
from typing import Any

from megatron_distill.config import RunConfig, to_dict
from megatron_distill.runs.follower import Tracker, tracked_evaluation, tracked_step
from megatron_distill.runs.run_folder import RunFolder, kept_id

_SAMPLE_COLUMNS = ("step", "id", "written_by", "prompt", "response", "reward")


class WandbTracker(Tracker):
    """One W&B run for a run folder, however often the run is resumed: its id is kept there."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        import wandb

        offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "megatron-distill"),
            name=config.name,
            id=kept_id(folder, "wandb"),
            resume="allow",
            dir=str(folder.root),
            config=to_dict(config),
            mode="offline" if offline else None,  # None: as W&B's own settings say
            settings=wandb.Settings(x_disable_stats=True, console="off"),  # this process is not the one that trains
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # an evaluation comes after the steps that it was made of
        self._samples = wandb.Table(columns=list(_SAMPLE_COLUMNS), log_mode="INCREMENTAL")

    def step(self, record: Mapping[str, float]) -> None:
        self._run.log(tracked_step(record) | {"step": record["step"]})

    def evaluation(self, summary: Mapping[str, Any]) -> None:
        values: dict[str, Any] = tracked_evaluation(summary)
        self._run.log(values | {"step": summary["step"], "samples": self._samples})

    def sample(self, sample: Mapping[str, Any]) -> None:
        self._samples.add_data(*(sample.get(name) for name in _SAMPLE_COLUMNS))

    def close(self) -> None:
        self._run.finish()
