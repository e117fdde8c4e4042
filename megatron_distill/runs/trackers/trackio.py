"""trackio: a local dashboard (``trackio show --project megatron-distill``), or a Hugging Face Space, as its variables say
(``TRACKIO_SPACE_ID``, ``TRACKIO_DIR``, ...); ``TRACKIO_PROJECT`` names the project.
"""

import os
from collections.abc import Mapping
from typing import Any

from megatron_distill.config import RunConfig, flatten, to_dict
from megatron_distill.runs.follower import Tracker, tracked_evaluation, tracked_step
from megatron_distill.runs.run_folder import RunFolder, kept_id


class TrackioTracker(Tracker):
    """One trackio run for a run folder: its name holds what is kept there."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "megatron-distill"),
            name=f"{config.name}-{kept_id(folder, 'trackio')}",
            resume="allow",
            config=flatten(to_dict(config)),
            embed=False,
            auto_log_gpu=False,  # this process is not the one that trains
            auto_log_cpu=False,
        )

    def step(self, record: Mapping[str, float]) -> None:
        self._run.log(tracked_step(record), step=int(record["step"]))

    def evaluation(self, summary: Mapping[str, Any]) -> None:
        self._run.log(tracked_evaluation(summary), step=int(summary["step"]))

    def sample(self, sample: Mapping[str, Any]) -> None:
        text = f"{sample['prompt']}\n---\n{sample['response']}"
        self._run.log({f"samples/{sample['written_by']}": text}, step=int(sample["step"]))

    def close(self) -> None:
        self._run.finish()
