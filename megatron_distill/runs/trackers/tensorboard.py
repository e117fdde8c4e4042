"""TensorBoard: event files in the run folder's ``tensorboard/``. Look at many runs with ``tensorboard --logdir runs``."""

from collections.abc import Mapping
from typing import Any

from megatron_distill.config import RunConfig
from megatron_distill.runs.follower import Tracker, tracked_evaluation, tracked_step
from megatron_distill.runs.run_folder import RunFolder


class TensorBoardTracker(Tracker):
    """Writes scalars and the kept samples' text; needs ``tensorboardX``, and neither torch nor TensorFlow."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder.root / "tensorboard"), flush_secs=5)

    def step(self, record: Mapping[str, float]) -> None:
        self._scalars(tracked_step(record), int(record["step"]))

    def evaluation(self, summary: Mapping[str, Any]) -> None:
        self._scalars(tracked_evaluation(summary), int(summary["step"]))

    def sample(self, sample: Mapping[str, Any]) -> None:
        # Shown as Markdown: indented lines stand as they are.
        text = "\n".join(f"    {line}" for line in f"{sample['prompt']}\n---\n{sample['response']}".splitlines())
        self._writer.add_text(f"samples/{sample['written_by']}", text, int(sample["step"]))

    def close(self) -> None:
        self._writer.close()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
