"""The order of a run: what is begun, awaited, pushed, saved, measured, decided and trained. A group of one rank is real."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch.distributed as dist

from megatron_distill.config import EntropyGated, RunConfig
from megatron_distill.config.loading import load_recipe
from megatron_distill.config.schedules import Schedule, constant
from megatron_distill.errors import ServerError
from megatron_distill.evaluate.accuracy import Summary
from megatron_distill.rollouts.source import Share
from megatron_distill.runs.run_folder import RunFolder
from megatron_distill.training.curriculum import Measurement
from megatron_distill.training.cycle import Cycle
from megatron_distill.training.feed import Prepared
from megatron_distill.training.ranks import Ranks

NUM_STEPS = 8
DECISION = 3
Event = tuple[str, int]
Act = Callable[[int], object]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """The only rank there is."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield Ranks(0, 0, (0,), True, True, True, *3 * [dist.group.WORLD])
    dist.destroy_process_group()


@pytest.fixture
def told_to_end() -> Iterator[list[int]]:
    """Signals by which this process told itself to end: what Megatron listens to."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


class Ended(Exception):
    """The cycle ended its process."""


def order_of(
    config: RunConfig,
    ranks: Ranks,
    folder: RunFolder,
    *,
    told: list[int] | None = None,
    on_push: Act = lambda version: None,
    on_evaluation: Act = lambda step: None,
    must_stop: Callable[[list[Event]], bool] = lambda events: False,
) -> list[Event]:
    """(what, step or version), as it came, with Megatron's loop around it.

    Args:
        config: of the run.
        ranks: the only one.
        folder: of the run.
        told: what tells Megatron to save after the step, and to end.
        on_push: what a push does besides.
        on_evaluation: what an evaluation does besides.
        must_stop: whether a stop was asked for, by what came so far.
    """
    events: list[Event] = []

    def note(what: str, number: int) -> Any:
        events.append((what, number))

    def begin(step: int, share: Share, horizon_tokens: int) -> None:
        if ("begin", step) not in events:
            note("begin", step)

    def prepare(step: int, horizon_tokens: int) -> Prepared:
        begin(step, Share(0, 1), horizon_tokens)
        note("train", step)
        return Prepared({}, {"rollout_s": 0.0})

    def push(version: int) -> Future[float]:
        note("push", version)
        on_push(version)
        arrival: Future[float] = Future()
        arrival.set_result(0.0)
        return arrival

    def evaluate(name: str, step: int) -> Any:
        note("evaluate", step)
        on_evaluation(step)
        return SimpleNamespace(summary=Summary(**zero))  # type: ignore[arg-type]

    def end() -> NoReturn:
        note("end", 0)
        raise Ended

    zero = {field.name: 0 for field in fields(Summary)} | {"stop_reasons": {}}
    leader = SimpleNamespace(
        ahead=SimpleNamespace(
            begin=begin, drain=lambda: note("drain", 0), keep=lambda step, share: note("keep samples", step)
        ),
        heldout=SimpleNamespace(evaluate=evaluate, measure=lambda: note("decide", 0) or Measurement(1.0, 0.0, 0.0)),
        beside=None,
        wait_ready=lambda say: None,
        weights_changed=lambda version, arrival: None,
    )
    cycle = Cycle(
        config,
        folder,
        ranks,
        leader,  # type: ignore[arg-type]
        feed=SimpleNamespace(prepare=prepare),  # type: ignore[arg-type]
        push=SimpleNamespace(begin=push, wait=lambda: note("arrive", 0), seconds=0.0),  # type: ignore[arg-type]
        metrics=SimpleNamespace(write=lambda step, *_: note("report", step), step_begins=lambda: None),  # type: ignore[arg-type]
        kept=SimpleNamespace(after_step=lambda step: note("keep", step)),  # type: ignore[arg-type]
        save=lambda directory: None,
        must_stop=lambda: must_stop(events),
        end=end,
        step=0,
    )
    every = config.save_every_steps or config.num_steps
    cycle.begin()
    for step in range(1, config.num_steps + 1):
        cycle.go_on()
        cycle.advance()
        if told or step % every == 0:
            note("save", step)
        if told:
            return events
    if config.num_steps % every:
        note("save", config.num_steps)
    cycle.advance()
    return events


@pytest.mark.parametrize(
    "frac", [constant(1.0), Schedule(((0, 0.0), (5, 1.0)))], ids=["on-policy", "on-policy from step 5"]
)
@pytest.mark.parametrize("decides", [False, True])
@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_nothing_is_older_or_further_ahead_than_the_limit(
    staleness: int, decides: bool, frac: Schedule, ranks: Ranks, tmp_path: Path
) -> None:
    """Every step is begun once and trained once, in order, at most k steps before it trains, and while the servers hold weights
    at most k steps older than it wants: also where the student begins to write in mid-run. At 1 what was begun is awaited
    before each push; above, never. A decision comes before anything is begun whose horizon it sets."""
    recipe = load_recipe("tiny.quickstart")
    gated = EntropyGated(ladder_tokens=(8, 16), stage_steps=DECISION)
    config = replace(
        recipe,
        num_steps=NUM_STEPS,
        rollouts=replace(recipe.rollouts, max_staleness_steps=staleness, student_prefix_frac=frac),
        curriculum=gated if decides else recipe.curriculum,
    )
    folder = RunFolder(tmp_path / "run")
    folder.create()
    events = order_of(config, ranks, folder)
    version, trained = 0, -1
    for what, number in events:
        if what == "push":
            version = number
        elif what == "train":
            trained = number
        elif what == "begin":
            assert number <= trained + 1 + staleness
            if frac.at(number) > 0:
                assert number - version <= staleness
    for what in ("begin", "train"):
        assert [number for event, number in events if event == what] == list(range(NUM_STEPS))
    pushes = [i for i, (what, _) in enumerate(events) if what == "push"]
    if staleness <= 1:
        assert all(events[i - 1][0] == "drain" for i in pushes)
    else:
        assert ("drain", 0) not in events
    if decides:
        assert events.index(("decide", 0)) < events.index(("begin", DECISION))


def of_steps(num_steps: int, *, staleness: int = 0, decides: bool = False, save_every_steps: int = 2) -> RunConfig:
    """A run that is evaluated at every step."""
    recipe = load_recipe("tiny.quickstart")
    return replace(
        recipe,
        num_steps=num_steps,
        save_every_steps=save_every_steps,
        evaluation=replace(recipe.evaluation, every_steps=1),
        rollouts=replace(recipe.rollouts, max_staleness_steps=staleness),
        curriculum=EntropyGated(ladder_tokens=(8, 16), stage_steps=2) if decides else recipe.curriculum,
    )


def test_a_checkpoint_waits_for_no_evaluation_and_no_rollouts(ranks: Ranks, folder: RunFolder) -> None:
    """At a step whose checkpoint is due, weights are gathered and the record written before it; all that asks servers for
    responses comes after it, once they have the weights; the last step's too. At any other step all of it is done before
    Megatron could save."""
    wanted: list[Event] = [("arrive", 0), ("evaluate", 0), ("keep", 0), ("begin", 0), ("train", 0)]
    for step, is_due in ((1, False), (2, True), (3, False), (4, True), (5, True)):
        wanted += [("drain", 0), ("push", step), ("report", step), *([("save", step)] if is_due else [])]
        wanted += [("arrive", 0), ("evaluate", step), ("keep", step)]
        wanted += [("begin", step), ("train", step)] if step < 5 else []
    assert order_of(of_steps(5), ranks, folder) == wanted


@pytest.mark.parametrize("save_every_steps", [0, 1, 5])
def test_the_last_step_is_saved_before_its_evaluation(save_every_steps: int, ranks: Ranks, folder: RunFolder) -> None:
    """Whether Megatron saves it in its loop or after it; and it is evaluated once."""
    events = order_of(of_steps(5, save_every_steps=save_every_steps), ranks, folder)
    assert events[-5:] == [("report", 5), ("save", 5), ("arrive", 0), ("evaluate", 5), ("keep", 5)]
    assert events.count(("evaluate", 5)) == 1


def test_what_old_weights_drew_is_kept_before_a_checkpoint_of_new_ones(ranks: Ranks, folder: RunFolder) -> None:
    """One step ahead, the next step's samples are awaited before the weights that drew them go, and the step after it is begun:
    both before the checkpoint, as at any other step."""
    events = order_of(of_steps(5, staleness=1), ranks, folder)
    for step in (1, 2, 3):
        begins = events.index(("drain", 0), events.index(("train", step - 1)))
        assert events[begins : begins + 4] == [("drain", 0), ("push", step), ("report", step), ("begin", step + 1)]
    assert events.index(("begin", 3)) < events.index(("save", 2)) < events.index(("train", 2))


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_decision_at_a_checkpoint_comes_after_it(staleness: int, ranks: Ranks, folder: RunFolder) -> None:
    """And before anything is begun whose horizon it sets."""
    events = order_of(of_steps(4, staleness=staleness, decides=True), ranks, folder)
    after = events[events.index(("save", 2)) :]
    waits = ("arrive", 0)
    assert after[:7] == [("save", 2), waits, ("evaluate", 2), ("keep", 2), waits, ("decide", 0), ("begin", 2)]


@pytest.mark.parametrize("step", [2, 5])
def test_a_failure_after_a_checkpoint_ends_the_process_at_once(
    step: int, ranks: Ranks, folder: RunFolder, told_to_end: list[int]
) -> None:
    """Its cause is in the run folder, and nothing is trained on top of it. The step is saved: Megatron is not told to."""

    def fail(evaluated: int) -> None:
        if evaluated == step:
            raise ServerError("gone")

    with pytest.raises(Ended):
        order_of(of_steps(5), ranks, folder, on_evaluation=fail)
    assert (folder.first_failure() or {})["message"] == "gone"
    assert told_to_end == []


def test_a_failure_at_another_step_lets_megatron_save_it(
    ranks: Ranks, folder: RunFolder, told_to_end: list[int]
) -> None:
    """In its evaluation, as in the push of its weights: the step has its record all the same."""

    def fail(number: int) -> None:
        if number == 3:
            raise ServerError("gone")

    events = order_of(of_steps(5), ranks, folder, told=told_to_end, on_evaluation=fail)
    ended = [("arrive", 0), ("keep samples", 3), ("save", 3)]
    assert events[-6:] == [("report", 3), ("arrive", 0), ("evaluate", 3), *ended]
    told_to_end.clear()
    events = order_of(of_steps(5), ranks, folder, told=told_to_end, on_push=fail)
    assert events[-5:] == [("push", 3), ("report", 3), *ended]
    assert (folder.first_failure() or {})["message"] == "gone"


def test_a_stop_is_no_failure(ranks: Ranks, folder: RunFolder, told_to_end: list[int]) -> None:
    """Asked for while a checkpoint is written: the process ends before the evaluation. In a step: Megatron saves that."""
    asked: list[Event] = []

    def in_checkpoint(events: list[Event]) -> bool:
        asked[:] = events
        return ("save", 2) in events

    with pytest.raises(Ended):
        order_of(of_steps(5), ranks, folder, told=told_to_end, must_stop=in_checkpoint)
    assert asked[-2:] == [("report", 2), ("save", 2)]
    assert told_to_end == []
    events = order_of(of_steps(5), ranks, folder, told=told_to_end, must_stop=lambda events: ("train", 2) in events)
    assert events[-4:] == [("report", 3), ("arrive", 0), ("keep samples", 3), ("save", 3)]
    assert folder.first_failure() is None
