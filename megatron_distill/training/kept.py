"""What a run keeps on the way: the best student, the student at each save, and only so many checkpoints.

In: the steps as they pass, on every rank; evaluations and checkpoints in the run folder. Out: ``hf_best/``, ``hf_steps/``,
fewer ``checkpoints/``.

Checkpoints are thinned out by a thread of rank 0, beside training. Before anything is deleted the latest checkpoint is read
whole and its checksums are compared, so that what is left can always be resumed from.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from megatron_distill.config import RunConfig
from megatron_distill.convert.damage import damage_of
from megatron_distill.errors import CheckpointError
from megatron_distill.runs.checkpoints import (
    Best,
    best_so_far,
    directory_of,
    record_best,
    remove,
    remove_leftovers,
    steps_on_disk,
    steps_to_keep,
)
from megatron_distill.runs.run_folder import HELDOUT, RunFolder, read_json
from megatron_distill.training.ranks import Ranks


class Kept:
    """Exports and retention of one run, on one rank."""

    def __init__(self, config: RunConfig, folder: RunFolder, ranks: Ranks, save: Callable[[Path], None]) -> None:
        """Keep nothing yet.

        Args:
            config: the run's, as config.json holds it.
            folder: where the run is recorded.
            ranks: this rank's place.
            save: writes the live student as a Hugging Face directory. Collective.
        """
        self._config, self._folder, self._ranks, self._save = config, folder, ranks, save
        self._thread: threading.Thread | None = None
        self._judged = 0  # the latest checkpoint that was looked at

    def after_step(self, step: int) -> None:
        """Once a step is saved, if that is due, and evaluated: keep its student if it is asked for, thin out checkpoints.

        Collective. Once more for the same step, in a run that was killed in here and resumed, does what is left to do.
        """
        if self._config.checkpoints.keep_best != "none":
            self._keep_best(step, self._config.checkpoints.keep_best)
        is_last = step == self._config.num_steps  # whose export is hf/
        if self._config.checkpoints.export_hf and self._config.is_saved_at(step) and not is_last:
            self._save(self._folder.hf_step(step))
        self._thin_out()

    def _keep_best(self, step: int, metric: str) -> None:
        best: Best | None = None
        evaluation = self._folder.evaluation(HELDOUT, step)
        if self._ranks.rank == 0 and evaluation.exists():
            so_far = best_so_far(self._folder, metric)
            value = float(read_json(evaluation)["summary"][metric])
            best = Best(step, metric, value) if so_far is None or value > so_far.value else None
        best = self._ranks.gather(best)[0]
        if best is None:
            return
        self._save(self._folder.hf_best)
        if self._ranks.rank == 0:
            record_best(self._folder, best)
            self._folder.event("trainer", f"the best student so far is kept: {metric} {best.value:.3f} at step {step}")

    def close(self) -> None:
        """Wait for the thread, and thin out once more: the last checkpoint has been saved."""
        for _ in range(2):
            if self._thread is not None:
                self._thread.join()
                self._thread = None
            self._thin_out()
        if self._thread is not None:
            self._thread.join()

    def _thin_out(self) -> None:
        """Begin to take away what the config does not keep, if a checkpoint was saved since the last time."""
        wanted = self._config.checkpoints.keep_last > 0 and self._ranks.rank == 0
        if not wanted or (self._thread is not None and self._thread.is_alive()):
            return
        latest = self._folder.latest_checkpoint_step()
        if latest == self._judged:
            return
        self._judged = latest
        self._thread = threading.Thread(target=self._take_away, args=(latest,), daemon=True, name="thin-out")
        self._thread.start()

    def _take_away(self, latest: int) -> None:
        try:
            remove_leftovers(self._folder)
            settings = self._config.checkpoints
            best = best_so_far(self._folder, settings.keep_best)
            steps = steps_on_disk(self._folder)
            superfluous = sorted(set(steps) - steps_to_keep(steps, latest, settings, best))
            if superfluous and (damage := damage_of(directory_of(self._folder, latest))):
                self._tell(f"checkpoint of step {latest} is damaged: {damage}. Earlier ones are all kept")
                return
            for step in superfluous:
                if not remove(self._folder, step):
                    self._tell(f"checkpoint of step {step} is kept: its directory holds what Megatron did not write")
        except (OSError, CheckpointError) as error:  # the run goes on; the next save tries again
            self._tell(f"earlier checkpoints could not be removed: {error}")

    def _tell(self, text: str) -> None:
        self._folder.event("trainer", text)
