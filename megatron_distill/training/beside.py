"""Evaluations beside training: on servers of their own, which get the weights of the evaluated step, while steps go on.

In: a directory with a step's weights, and the sets that are due. Out: the same records as those of an evaluation that training
waits for: seeds, prompts and weights are the same.

    trainer ranks ──> evaluating/step_N/ ──load──> evaluation servers <──asked── a thread of rank 0 ──> eval/step_N.json
                      removed once every record is written

One evaluation is under way at a time. Its directory outlives the process: a run that was stopped or killed in the middle takes
the evaluation up again when it resumes, from the same weights, so that neither a checkpoint nor a stop waits for it.
"""

import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict

from megatron_distill.errors import ServerError, StopRequested
from megatron_distill.evaluate.accuracy import Summary
from megatron_distill.evaluate.heldout import HeldOut
from megatron_distill.runs.run_folder import RunFolder
from megatron_distill.sglang.client import SGLangClient

MAX_ATTEMPTS = 3
"""Of one evaluation: a server that is lost is started again, without the weights."""

_POLL_S = 0.2


class EvaluationBeside:
    """The evaluation under way, if any; on rank 0."""

    def __init__(
        self, folder: RunFolder, heldout: HeldOut, client: SGLangClient, must_stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Begin nothing yet.

        Args:
            folder: where the run is recorded.
            heldout: measures what the evaluations' servers hold.
            client: of those servers.
            must_stop: whether this process was told to end, so that nobody waits any more.
        """
        self._folder, self._heldout, self._client, self._must_stop = folder, heldout, client, must_stop
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._summaries: dict[str, Summary] = {}

    def begin(self, step: int, names: Sequence[str]) -> None:
        """Evaluate the weights of ``step``, which lie in the run folder, on these sets; the last evaluation has ended."""
        assert self._thread is None, "wait first: one evaluation at a time"
        self._summaries = {}
        self._thread = threading.Thread(target=self._work, args=(step, names), daemon=True, name="evaluation")
        self._thread.start()

    def wait(self) -> dict[str, Summary]:
        """Wait until nothing is under way.

        Returns:
            What the last evaluation said, by set.

        Raises:
            DistillError: it failed.
            StopRequested: this process was told to end meanwhile; a resumed run takes the evaluation up again.
        """
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_POLL_S)
            if self._thread.is_alive() and self._must_stop():
                raise StopRequested("stopping: the evaluation under way is made when the run goes on")
        self._thread = None
        if self._failure is not None:
            raise self._failure
        return self._summaries

    def _work(self, step: int, names: Sequence[str]) -> None:
        try:
            for attempt in range(1, MAX_ATTEMPTS + 1) if names else ():
                try:
                    self._evaluate(step, [name for name in names if name not in self._summaries])
                    break
                except ServerError:
                    if attempt == MAX_ATTEMPTS:
                        raise
            shutil.rmtree(self._folder.evaluated_weights(step), ignore_errors=True)
        except Exception as error:
            self._failure = error

    def _evaluate(self, step: int, names: Sequence[str]) -> None:
        self._client.wait_reachable()
        self._client.update_weights_from_disk(self._folder.evaluated_weights(step), str(step))
        self._heldout.weights_changed(step)
        for name in names:
            self._folder.event("trainer", f"evaluating step {step} on {name}, beside training")
            summary = self._heldout.evaluate(name, step).summary
            self._folder.event("trainer", "evaluated", evaluation=asdict(summary), set=name)
            self._summaries[name] = summary

    def close(self) -> None:
        """End the requests in flight; what they were for is made when the run goes on."""
        self._client.close()
