"""Ahead: samples of later steps are drawn while this step trains, is saved and is evaluated.

    staleness 0                                      staleness 1
    push s | draw s | train s | push s+1 | ...       push s | draw s+1 ............... | push s+1 | draw s+2 ...
           |        |         | save     |           save, evaluate, train s ......... | save, train s+1 ...

A step's samples are drawn by weights one optimizer step old, always exactly one: drawing ends before each push. So results
stay a function of the seed. What was ahead lies in the run folder before a checkpoint of newer weights can be written
(see ``sample_store``), and a resumed run takes it from there: the very samples of a run that was never stopped. (What a
server says of a token is the same up to rounding, which depends on the requests that share a batch.)

    staleness k >= 2, in flight
    push s | draw s+k ............................... | push s+k: the oldest weights that may have drawn a token of it are s
           | still drawing s+1 ... s+k-1              |
           | train s, save | push s+1 | train s+1 ... |

From 2 on, nothing is drained: a push pauses the servers, and a response that is half written goes on under the new weights,
its prefix recomputed by them. Each span of its tokens carries its version. A step still is a fixed set of prompts, so that no
response is left out for being long, and at most k steps are begun beyond the one that trains. A response is older than k
steps only where a server lost its weights: it is dropped, counted and asked for again. Which token which weights drew depends
on when pushes came, so results are no function of the seed, and nothing is kept: a resumed run asks for all that was begun.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import replace

from megatron_distill.errors import StaleWeightsError, StopRequested
from megatron_distill.rollouts.sample_store import SampleStore
from megatron_distill.rollouts.source import Collected, RolloutSource, Share

_POLL_S = 0.25


class Ahead:
    """Draws from a source in threads of its own, now or ahead."""

    def __init__(
        self, source: RolloutSource, store: SampleStore | None, must_stop: Callable[[], bool], num_steps: int = 1
    ) -> None:
        """Draw nothing yet.

        Args:
            source: of samples.
            store: keeps what was drawn ahead; None if nothing is.
            must_stop: whether this process was told to end: then nobody waits for samples any more.
            num_steps: drawn at once.
        """
        self._source, self._store, self._must_stop = source, store, must_stop
        self._threads = ThreadPoolExecutor(num_steps, thread_name_prefix="ahead")
        self._arrival: Future[float] | None = None
        self._asked: dict[int, tuple[Share, int]] = {}
        self._drawing: dict[int, Future[Collected]] = {}

    def weights_changed(self, version: int, arrival: Future[float]) -> None:
        """What is begun from now on is drawn by the weights behind ``version``, once these have arrived."""
        self._arrival = arrival
        self._source.weights_changed(version)

    def begin(self, step: int, share: Share, horizon_tokens: int) -> None:
        """Start to draw ``step``, with the weights that the servers hold or are being sent, unless it was begun."""
        if step in self._drawing:
            return
        self._asked[step] = (share, horizon_tokens)
        self._drawing[step] = self._threads.submit(self._draw, self._arrival, step, share, horizon_tokens)

    def _draw(self, arrival: Future[float] | None, step: int, share: Share, horizon_tokens: int) -> Collected:
        """In a thread. Weights that did not arrive are the failure of whoever waits for the samples."""
        if arrival is not None:
            arrival.result()
        return self._source.take(step, share, horizon_tokens)

    def drain(self) -> None:
        """Wait until all that was begun is drawn, and keep it, since its weights are about to go.

        Raises:
            StaleWeightsError: the servers lost the weights. What was begun is drawn when this is called again.
            ServerError: the weights did not arrive, or the servers are gone.
            StopRequested: this process was told to end meanwhile.
        """
        for step, (share, _) in list(self._asked.items()):
            collected = self._drawn(step)
            if self._store is not None:
                self._store.save(step, share, collected.samples)

    def keep(self, step: int, share: Share) -> None:
        """Before a stop: wait until ``step`` is drawn, if it was begun, and keep it, since its weights will not come back."""
        self._asked.pop(step, None)
        future = self._drawing.pop(step, None)
        if future is not None and self._store is not None and future.exception() is None:
            self._store.save(step, share, future.result().samples)

    def take(self, step: int, share: Share, horizon_tokens: int) -> Collected:
        """The samples of ``step``: drawn ahead, kept from before the run was stopped, or drawn now.

        Raises:
            StopRequested: this process was told to end meanwhile.
        """
        began = time.perf_counter()
        was_ahead = step in self._asked
        kept = self._store.load(step, share) if self._store is not None and not was_ahead else None
        if kept is not None:
            return Collected(kept, {"rollout_s": time.perf_counter() - began, "score_s": 0.0})
        if not was_ahead:
            self.begin(step, share, horizon_tokens)
        try:
            collected = self._drawn(step)
        except StaleWeightsError:
            if not was_ahead:
                del self._asked[step]
            raise
        del self._asked[step], self._drawing[step]
        if not was_ahead:
            return collected
        return replace(collected, seconds={"rollout_s": time.perf_counter() - began, "score_s": 0.0})

    def forget(self, keep: Sequence[int], rank: int) -> None:
        """Remove what is kept of other steps than those in ``keep``."""
        if self._store is not None:
            self._store.prune(keep, rank)

    def _drawn(self, step: int) -> Collected:
        """What was begun, or begun once more after its servers lost the weights."""
        if step not in self._drawing:
            self.begin(step, *self._asked[step])
        try:
            return self._wait(self._drawing[step])
        except StaleWeightsError:
            del self._drawing[step]
            raise

    def _wait(self, future: Future[Collected]) -> Collected:
        while True:
            try:
                return future.result(timeout=_POLL_S)
            except NotYet:
                if future.done():  # just now, perhaps; or the source has run out of time itself
                    return future.result()
                if self._must_stop():
                    raise StopRequested("told to end: the step is left undrawn") from None

    def close(self) -> None:
        """End the threads and the source."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._source.close()
