"""What happens between two optimizer steps: the algorithm of a run, on one page.

    trainer ranks (all)                                 leaders (one a replica)             servers (SGLang)

    Megatron: forward, backward, optimizer
    advance()
      sync       gather the weights ── rank 0 ── beside all that follows ──────────────────> student: version s + 1
      report     add up the metrics of all ranks; the reporter appends a line
    Megatron: a checkpoint, if one is due
    go_on()
      evaluate   (every so often)                       rank 0: held-out problems ─────────> student, reward
                 (or beside training: ``training.beside``)
      keep       (if asked for) the best student so far, the student at a save; older checkpoints go
      decide     (at the end of a stage)                rank 0: held-out entropy ──────────> student
                 every rank makes the same decision
      prepare    ask for the next step ───────────────> prompts ───────────────────────────> student or teacher writes
                                                        responses ─────────────────────────> teacher scores, reward judges
                 the replica's samples, packed <─────── samples
    Megatron: the next step

A step's checkpoint waits for no evaluation and no rollouts. Where none is due, ``advance`` goes on by itself, and Megatron
saves at the end of it only if that failed or a stop was asked for.

With ``rollouts.max_staleness_steps=1`` the leaders begin to draw the step after next once the weights are there, and ``sync``
begins by waiting for what they drew (``rollouts.ahead``). With 2 and more they are as many steps ahead, and nobody waits:
weights change under what is being written. A decision is a barrier: the step whose horizon it sets is drawn after it.

Ranks wait for a push (``training.weight_push``) where they ask the servers themselves, and before the next one. A checkpoint
waits for none, nor does the training of a step whose samples are there.

``advance`` and ``go_on`` run on every rank at the same point (see ``megatron.session``), so that whatever needs all ranks at
once happens here and nowhere else. Servers hold the weights of the latest sync; a step's rollouts say which ones drew them.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

from megatron_distill.config import RunConfig
from megatron_distill.errors import DistillError, StaleWeightsError, StopRequested
from megatron_distill.evaluate.sets import EvaluationSet, load_sets
from megatron_distill.rollouts.source import IN_FLIGHT, Share
from megatron_distill.runs.run_folder import RunFolder, append, read_lines
from megatron_distill.runs.timeline import Timeline
from megatron_distill.training.curriculum import Measurement, make_curriculum
from megatron_distill.training.feed import Prepared, StepFeed
from megatron_distill.training.kept import Kept
from megatron_distill.training.leader import Leader
from megatron_distill.training.ranks import Ranks
from megatron_distill.training.step_metrics import StepMetrics
from megatron_distill.training.weight_push import WeightPush

MAX_RESTARTS = 10
"""Of all student servers within one piece of work; their supervisors give up before."""


class Cycle:
    """The loop around Megatron's step, on one rank."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        ranks: Ranks,
        leader: Leader | None,
        *,
        feed: StepFeed,
        push: WeightPush,
        metrics: StepMetrics,
        kept: Kept,
        save: Callable[[Path], None],
        must_stop: Callable[[], bool],
        end: Callable[[], NoReturn],
        step: int,
    ) -> None:
        """Stand before a step.

        Args:
            config: the run's, as config.json holds it.
            folder: where the run is recorded.
            ranks: this rank's place.
            leader: what a leader asks; None on other ranks.
            feed: what Megatron reads.
            push: brings the live weights to the student's servers.
            metrics: writes a line a step.
            kept: what is kept of the student on the way.
            save: writes the live student as a Hugging Face directory. Collective.
            must_stop: whether any rank was told to end: Megatron then saves and ends after this step. Collective.
            end: ends the process where all is saved already. Collective.
            step: optimizer steps done: 0, or a checkpoint's.
        """
        self.config, self.folder, self.ranks, self.leader = config, folder, ranks, leader
        self.feed, self.step = feed, step
        self._push, self._metrics = push, metrics
        self._must_stop, self._end = must_stop, end
        self._kept, self._save = kept, save
        self._share = Share(ranks.dp_rank, ranks.dp_size)
        self._curriculum = make_curriculum(config.curriculum, config.num_steps)
        self._curriculum.replay(read_lines(folder.curriculum), step)
        self._sets = load_sets(config)
        self._synced_version = 0  # the servers come up with the weights that the run began with
        self._horizon_tokens = self._curriculum.horizon_tokens(step)
        self._trains_since = time.perf_counter()
        self._prepared = Prepared({}, {})
        self._drained_s = 0.0  # waited for the next step's samples before the last push
        self._waits = False  # for a checkpoint
        self._timeline = Timeline(folder.timeline, is_kept=ranks.rank == 0)

    def begin(self) -> None:
        """Before the first step of this process: servers ready, a fresh run measured, the first rollouts drawn.

        A resumed one does first what was left undone after its checkpoint.
        """
        self._on_leader(lambda leader: leader.wait_ready(self.say))
        if self.step:
            self._sync()
            self._take_up_evaluations()
        self._follow(self._without_record(self.step))

    def advance(self) -> None:
        """After an optimizer step. Megatron calls once more when the last step is saved: then only its end is left.

        What fails here, fails on all ranks alike. Then the cause is left in the run folder and the process is told to end, so
        that Megatron saves the step that has been trained; so it does after a signal, without sampling another step first.
        """
        if self.step == self.config.num_steps:
            self.go_on()
            return
        self.step += 1
        seconds = self._prepared.seconds | {"train_s": time.perf_counter() - self._trains_since}
        self._timeline.add("trainer", "train", seconds["train_s"])
        failure = self._failure_of(self._heed, lambda: self._bring_weights(seconds))
        self._metrics.write(self.step, self._horizon_tokens, self._prepared, seconds)
        if failure is None:
            self._look_ahead()
            self._waits = self.config.is_saved_at(self.step)
            if not self._waits:
                failure = self._failure_of(lambda: self._follow(self._due_sets()))
        if failure is not None:
            self._stop(failure, "saving a checkpoint")
            os.kill(os.getpid(), signal.SIGTERM)  # what Megatron listens to: it saves, and ends the process

    def go_on(self) -> None:
        """After a checkpoint that was due: what waited for it. At any other time there is nothing to do.

        Whatever fails or asks to stop here finds the step saved, so the process ends at once.
        """
        if not self._waits:
            return
        self._waits = False
        failure = self._failure_of(self._heed, lambda: self._follow(self._due_sets()))
        if failure is not None:
            self._stop(failure, "its checkpoint is saved")
            self._end()

    def _failure_of(self, *parts: Callable[[], None]) -> DistillError | None:
        """What ended the parts, one after the other; None if nothing did."""
        try:
            for part in parts:
                part()
        except DistillError as error:
            return error
        return None

    def _heed(self) -> None:
        if self._must_stop():
            raise StopRequested("told to end")

    def _stop(self, failure: DistillError, state: str) -> None:
        """Say why, and keep what a checkpoint needs beside it: what was drawn by weights that are gone by then."""
        if self.ranks.rank == 0 and not isinstance(failure, StopRequested):
            self.folder.fail("trainer-0", str(failure))
        self.say(f"stopping after step {self.step}, {state}: {failure}")

        def part(leader: Leader) -> None:
            leader.ahead.keep(self.step, self._share)
            if leader.beside is not None:
                leader.beside.close()

        with contextlib.suppress(DistillError):
            self._push.wait()  # no thread may be in the middle of something when the process ends
        if (unkept := self._failure_of(lambda: self._on_leader(part))) is not None:
            self.say(f"what was drawn ahead is not kept, and will be drawn again: {unkept}")

    def _bring_weights(self, seconds: dict[str, float]) -> None:
        """What a checkpoint needs beside it, and what is drawn next: samples of the old weights, and the new ones."""
        self._drain()
        if (self._due_sets() and not self._is_beside) or self._is_decision_due() or self._is_sync_due():
            began = time.perf_counter()
            self._sync()
            seconds |= {"sync_s": time.perf_counter() - began, "push_s": self._push.seconds}

    def _follow(self, due: Sequence[EvaluationSet]) -> None:
        """What follows a step that is trained and reported, up to the samples of the next one."""
        self._evaluate(due)
        self._kept.after_step(self.step)
        if self._is_decision_due():
            self._decide()
        if self.step == self.config.num_steps:
            self._evaluated()
            return
        self._prepare()
        self._look_ahead()

    def say(self, text: str) -> None:
        """Tell the console, once for all ranks."""
        if self.ranks.rank == 0:
            self.folder.event("trainer", text)

    # --- the phases ---------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Wait for what the weights before these are drawing, and keep it."""
        began = time.perf_counter()
        if self.config.rollouts.max_staleness_steps < IN_FLIGHT:
            with self._timeline.span("trainer", "wait"):
                self._on_leader(lambda leader: leader.ahead.drain())
        self._drained_s = time.perf_counter() - began

    def _sync(self) -> None:
        """Bring the weights to the student's servers, stamped with the number of steps behind them."""
        if self.step != self._synced_version:
            self._push_now()

    def _push_now(self) -> None:
        with self._timeline.span("trainer", "sync"):
            arrival = self._push.begin(self.step)
        self._synced_version = self.step
        self._weights_come(arrival)

    def _weights_come(self, arrival: Future[float]) -> None:
        self._on_leader(lambda leader: leader.weights_changed(self._synced_version, arrival))

    def _arrive(self) -> None:
        """Wait until the servers hold the weights of the last push: before the ranks ask them."""
        with self._timeline.span("trainer", "sync"):
            self._push.wait()

    def _served[T](self, work: Callable[[], T]) -> T:
        """``work``, which asks the student's servers; once more where all of them lost their weights in a restart.

        What is drawn again is the same: it depends on weights, seed, step and place only, and the weights of the last push are
        kept.
        """
        for _ in range(MAX_RESTARTS):
            try:
                return work()
            except StaleWeightsError:
                self.say("a student server was started again: it gets the weights, and what it lost is asked for again")
                if self._synced_version:
                    self._weights_come(self._push.again())
                else:
                    self._push_now()
                self._arrive()
        return work()

    def _evaluate(self, due: Sequence[EvaluationSet]) -> None:
        if not due:
            return
        if self._is_beside:
            self._evaluate_beside(due)
            return

        def work(leader: Leader) -> None:
            for one in due if self.ranks.rank == 0 else ():
                self.say(f"evaluating on {one.settings.num_problems} problems of {one.name}")
                summary = leader.heldout.evaluate(one.name, self.step).summary
                self.folder.event("trainer", "evaluated", evaluation=asdict(summary), set=one.name)

        self._arrive()
        with self._timeline.span("trainer", "evaluate"):
            self._on_leader(work)

    def _evaluate_beside(self, due: Sequence[EvaluationSet]) -> None:
        """Begin an evaluation on servers of its own; wait for it where the best student is kept, while it is still here."""
        self._evaluated()
        with self._timeline.span("trainer", "evaluate"):
            self._save(self.folder.evaluated_weights(self.step))
        self._begin_beside(self.step, due)
        if self.config.checkpoints.keep_best != "none":
            self._evaluated()

    def _begin_beside(self, step: int, due: Sequence[EvaluationSet]) -> None:
        def begin(leader: Leader) -> None:
            if leader.beside is not None:
                leader.beside.begin(step, [one.name for one in due])

        self._on_leader(begin)

    def _evaluated(self) -> None:
        """Wait for the evaluation beside training, if one is under way."""
        if self._is_beside:
            with self._timeline.span("trainer", "evaluate"):
                self._on_leader(lambda leader: leader.beside.wait() if leader.beside is not None else None)

    def _take_up_evaluations(self) -> None:
        """Those that the run was stopped in, of steps before this one."""
        for step in self.ranks.gather(self.folder.steps_evaluating())[0] if self._is_beside else ():
            due = self._without_record(step)
            if step < self.step or not due:  # with nothing due, all that is left to do is to clear up
                self._evaluated()
                self._begin_beside(step, due)

    def _decide(self) -> None:
        """The curriculum's decision at the end of a stage: measured by rank 0, made alike on all."""

        def measure(leader: Leader) -> Measurement | None:
            if self.ranks.rank != 0:
                return None
            self.say(f"measuring held-out entropy at step {self.step}")
            return leader.heldout.measure()

        self._arrive()
        with self._timeline.span("trainer", "decide"):
            measurement = self.ranks.gather(self._on_leader(measure))[0]  # rank 0 leads the replica that measured
        decision = self._curriculum.decide(self.step, measurement)
        if self.ranks.rank == 0:
            append(self.folder.curriculum, decision.to_record())
            self.say(decision.line())

    def _prepare(self) -> None:
        self._metrics.step_begins()
        self._horizon_tokens = self._curriculum.horizon_tokens(self.step)
        with self._timeline.span("trainer", "wait"):
            prepared = self._served(lambda: self.feed.prepare(self.step, self._horizon_tokens))
        waited = {"rollout_s": prepared.seconds.get("rollout_s", 0.0) + self._drained_s}
        self._prepared, self._drained_s = replace(prepared, seconds=prepared.seconds | waited), 0.0
        self._trains_since = time.perf_counter()

    def _look_ahead(self) -> None:
        """Let the leaders begin to draw the steps after the present one, up to one whose horizon is not decided yet."""
        if self.leader is None or self._is_decision_due():
            return
        for step in range(self.step + 1, self._last_step_drawn() + 1):
            if self._curriculum.is_due(step):
                return
            self.leader.ahead.begin(step, self._share, self._curriculum.horizon_tokens(step))

    def _last_step_drawn(self) -> int:
        """The last step that is drawn before the present one has trained."""
        return min(self.step + self.config.rollouts.max_staleness_steps, self.config.num_steps - 1)

    # --- what is due --------------------------------------------------------------------------------------------------

    def _is_sync_due(self) -> bool:
        """Whether a step that is drawn next samples from the student, with weights that may not be older than these."""
        rollouts = self.config.rollouts
        drawn = range(self.step, self._last_step_drawn() + 1)
        return self.step % rollouts.sync_every_steps == 0 and any(
            rollouts.student_prefix_frac.at(step) > 0 for step in drawn
        )

    @property
    def _is_beside(self) -> bool:
        return self.config.servers.evaluation_replicas > 0

    def _due_sets(self) -> list[EvaluationSet]:
        return [one for one in self._sets if one.is_due(self.step, self.config.num_steps)]

    def _without_record(self, step: int) -> list[EvaluationSet]:
        """Of the sets that are due at ``step`` those that were not evaluated, on rank 0's word."""
        due = [one for one in self._sets if one.is_due(step, self.config.num_steps)]
        done = self.ranks.gather([self.folder.evaluation(one.name, step).exists() for one in due])[0]
        return [one for one, is_done in zip(due, done, strict=True) if not is_done]

    def _is_decision_due(self) -> bool:
        return self.step < self.config.num_steps and self._curriculum.is_due(self.step)

    def _on_leader[T](self, work: Callable[[Leader], T]) -> T:
        """``work`` on every replica's leader; its result on all ranks of the replica."""

        def on_leader() -> T:
            assert self.leader is not None, "only a replica's leader has somebody to ask"
            return work(self.leader)

        result: T = self._served(lambda: self.ranks.from_leader(on_leader))
        return result
