"""MLflow: a tracking server, or a local database. ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` choose; by default a
database ``mlflow.db`` in the working directory, which ``mlflow ui`` shows, and the experiment ``megatron-distill``.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

from megatron_distill.config import RunConfig, flatten, to_dict
from megatron_distill.runs.follower import Tracker, tracked_evaluation, tracked_step
from megatron_distill.runs.run_folder import RunFolder, kept_id

_LONGEST_PARAMETER = 6000  # characters that MLflow takes


class MlflowTracker(Tracker):
    """One MLflow run for a run folder, found again by a tag."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "megatron-distill")
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self._client.create_experiment(name)
        tag = kept_id(folder, "mlflow")
        found = self._client.search_runs([where], f"tags.run_folder_id = '{tag}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(where, run_name=config.name, tags={"run_folder_id": tag})
        self._id = made.info.run_id
        values = {key: str(value)[:_LONGEST_PARAMETER] for key, value in flatten(to_dict(config)).items()}
        self._client.log_batch(self._id, params=[Param(key, value) for key, value in values.items()])

    def step(self, record: Mapping[str, float]) -> None:
        self._log(tracked_step(record), int(record["step"]))

    def evaluation(self, summary: Mapping[str, Any]) -> None:
        self._log(tracked_evaluation(summary), int(summary["step"]))

    def sample(self, sample: Mapping[str, Any]) -> None:
        text = f"{sample['prompt']}\n---\n{sample['response']}\n"
        name = f"samples/step_{int(sample['step']):06d}_{sample['written_by']}_{sample['id']}.txt".replace(" ", "_")
        self._client.log_text(self._id, text, name)

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(key, value, now, step) for key, value in values.items()])
