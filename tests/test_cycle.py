"""The order of a run: what is begun, awaited, pushed, decided and trained, at every staleness. A group of one rank is real."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_distill.config import EntropyGated, RunConfig
from megatron_distill.config.loading import load_recipe
from megatron_distill.config.schedules import Schedule, constant
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


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """The only rank there is."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield Ranks(0, 0, (0,), True, True, True, dist.group.WORLD, dist.group.WORLD)
    dist.destroy_process_group()


def order_of(config: RunConfig, ranks: Ranks, folder: RunFolder) -> list[Event]:
    """(what, step or version), as it came."""
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

    zero = {field.name: 0 for field in fields(Summary)} | {"stop_reasons": {}}
    heldout = SimpleNamespace(
        evaluate=lambda name, step: SimpleNamespace(summary=Summary(**zero)),  # type: ignore[arg-type]
        measure=lambda: note("decide", 0) or Measurement(1.0, 0.0, 0.0),
    )
    leader = SimpleNamespace(
        ahead=SimpleNamespace(begin=begin, drain=lambda: note("drain", 0), keep=lambda step, share: None),
        heldout=heldout,
        wait_ready=lambda say: None,
        weights_changed=lambda version: None,
    )
    cycle = Cycle(
        config,
        folder,
        ranks,
        leader,  # type: ignore[arg-type]
        feed=SimpleNamespace(prepare=prepare),  # type: ignore[arg-type]
        push=lambda version: note("push", version),
        push_again=lambda version: False,
        metrics=SimpleNamespace(write=lambda *_: None, step_begins=lambda: None),  # type: ignore[arg-type]
        kept=SimpleNamespace(after_step=lambda step: None, after_evaluation=lambda *_: None),  # type: ignore[arg-type]
        save=lambda directory: None,
        must_stop=lambda: False,
        step=0,
    )
    cycle.begin()
    for _ in range(NUM_STEPS):
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
