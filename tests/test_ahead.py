"""One step ahead: the same samples whenever they are drawn, kept for a resumed run, and a stop does not wait for them."""

import threading
from concurrent.futures import Future
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from megatron_distill.errors import DataError, ServerError, StaleWeightsError, StopRequested
from megatron_distill.rollouts.ahead import Ahead
from megatron_distill.rollouts.sample_store import SampleStore
from megatron_distill.rollouts.source import Collected, Share
from megatron_distill.types import HiddenSignal, Sample
from tests.support.samples import make_samples
from tests.support.waiting import HANG_S

ALL = Share(0, 1)


class VersionedSource:
    """Samples that say which weights drew them; ``gate`` holds them back."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.version = 0

    def take(self, step: int, share: Share, horizon_tokens: int) -> Collected:
        version = self.version
        assert self.gate.wait(HANG_S)
        samples = make_samples(step, 8, 20)
        per_replica = len(samples) // share.size
        mine = samples[share.rank * per_replica : (share.rank + 1) * per_replica]
        drawn = [replace(s, rollout=replace(s.rollout, newest_version=version)) for s in mine]
        return Collected(drawn, {"rollout_s": 1.0, "score_s": 1.0})

    def weights_changed(self, version: int) -> None:
        self.version = version

    def close(self) -> None: ...


def same(one: Sample, other: Sample) -> bool:
    """Whether two samples are equal bit for bit."""

    def equal(a: object, b: object) -> bool:
        if hasattr(a, "__dataclass_fields__"):
            return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))  # type: ignore[arg-type]
        return bool(np.array_equal(a, b, equal_nan=isinstance(a, float) or getattr(a, "dtype", None) == np.float32))  # type: ignore[arg-type]

    return equal(one, other)


def test_what_is_ahead_is_one_step_old_and_drained_before_the_push(tmp_path: Path) -> None:
    """Drawn by the weights of when it was begun; ``drain`` waits for it and keeps it; ``take`` then hands it out at once."""
    source, store = VersionedSource(), SampleStore(tmp_path)
    ahead = Ahead(source, store, lambda: False)
    source.gate.clear()
    ahead.begin(1, ALL, 8)
    threading.Timer(0.1, source.gate.set).start()
    ahead.drain()
    kept = store.load(1, ALL)
    source.weights_changed(1)
    taken = ahead.take(1, ALL, 8).samples
    assert {s.rollout.newest_version for s in taken} == {0}
    assert kept is not None and all(map(same, kept, taken))
    assert {s.rollout.newest_version for s in ahead.take(2, ALL, 8).samples} == {1}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_resumed_run_takes_what_was_drawn_at_any_number_of_replicas(size: int, tmp_path: Path) -> None:
    """Two replicas drew step 1 ahead; one, two or four take it from the folder, in order, bit for bit, rewards, masks and
    missing scores included; a step of which a replica's part is missing is drawn anew."""
    drawn: list[Sample] = []
    for rank in range(2):
        ahead = Ahead(VersionedSource(), SampleStore(tmp_path), lambda: False)
        ahead.begin(1, Share(rank, 2), 8)
        ahead.drain()
        drawn += ahead.take(1, Share(rank, 2), 8).samples
    taken: list[Sample] = []
    for rank in range(size):
        source = VersionedSource()
        source.weights_changed(7)  # what would be drawn now says so
        taken += Ahead(source, SampleStore(tmp_path), lambda: False).take(1, Share(rank, size), 8).samples
    assert len(taken) == len(drawn) == 8
    assert all(map(same, taken, drawn))
    assert any(s.signal is None for s in taken)
    (tmp_path / "step_000001.1-of-2.npz").unlink()
    fresh = Ahead(source, SampleStore(tmp_path), lambda: False).take(1, ALL, 8).samples
    assert {s.rollout.newest_version for s in fresh} == {7}


def test_masks_and_rewards_are_kept(tmp_path: Path) -> None:
    """What an environment said stays unlearnt, and a reward, an advantage and a weight stay themselves."""
    [sample] = make_samples(0, 1, 20)
    learnt = np.arange(len(sample.rollout.response_ids)) % 2 == 0
    sample = replace(
        sample, rollout=replace(sample.rollout, is_learnt=learnt), reward=0.5, advantage=-1.5, policy_weight=0.25
    )
    store = SampleStore(tmp_path)
    store.save(3, ALL, [sample])
    [loaded] = store.load(3, ALL) or []
    assert same(loaded, sample)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_hidden_states_are_kept(dtype: type, tmp_path: Path) -> None:
    """A teacher's hidden states come back bit for bit in their dtype; what it did not say stays missing."""
    samples = [
        replace(sample, signal=sample.signal and HiddenSignal(sample.signal.token_logprobs, bits))
        for sample in make_samples(3, 6, 20)
        for bits in [np.arange(7 * len(sample.rollout.response_ids)).reshape(-1, 7).astype(dtype)]
    ]
    store = SampleStore(tmp_path)
    store.save(3, ALL, samples)
    loaded = store.load(3, ALL) or []
    assert len(loaded) == 6 and any(one.signal is None for one in loaded)
    assert all(map(same, loaded, samples))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    """Half a file is refused with its name and what to do, and nothing in it is run."""
    store = SampleStore(tmp_path)
    store.save(3, ALL, make_samples(3, 4, 20))
    path = tmp_path / "step_000003.0-of-1.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"step_000003.*damaged.*Delete it"):
        store.load(3, ALL)


def test_old_steps_are_removed(tmp_path: Path) -> None:
    """Only the steps that a resume can need stay."""
    store = SampleStore(tmp_path)
    for step in range(5):
        store.save(step, ALL, make_samples(step, 4, 20))
    store.prune([2, 4], rank=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002.0-of-1.npz", "step_000004.0-of-1.npz"]


def test_a_stop_does_not_wait_for_samples() -> None:
    """Told to end while samples are drawn, the one who waits for them is told so."""
    source = VersionedSource()
    source.gate.clear()
    with pytest.raises(StopRequested):
        Ahead(source, None, lambda: True).take(0, ALL, 8)
    source.gate.set()


def test_samples_that_come_as_the_wait_for_them_is_over_are_taken() -> None:
    """The wait is cut into short ones, between which a stop is looked for: what ends one of them is no failure."""

    class JustInTime(Future[Collected]):
        def result(self, timeout: float | None = None) -> Collected:
            if not self.done():
                self.set_result(Collected([], {}))
                raise TimeoutError
            return super().result(timeout)

    assert Ahead(VersionedSource(), None, lambda: False)._wait(JustInTime()).samples == []


def test_a_failure_of_the_source_is_its_own() -> None:
    """A lost server is told as such, by ``take`` and by ``drain``."""

    class Lost(VersionedSource):
        def take(self, step: int, share: Share, horizon_tokens: int) -> Collected:
            raise ServerError("gone")

    ahead = Ahead(Lost(), None, lambda: False)
    with pytest.raises(ServerError, match="gone"):
        ahead.take(0, ALL, 8)
    ahead.begin(1, ALL, 8)
    with pytest.raises(ServerError, match="gone"):
        ahead.drain()


def test_a_stop_keeps_what_was_begun(tmp_path: Path) -> None:
    """Told to end while the next step is drawn, that step is waited for and kept: its weights will not come back."""
    source = VersionedSource()
    source.gate.clear()
    ahead = Ahead(source, SampleStore(tmp_path), lambda: True)
    ahead.begin(1, ALL, 8)
    threading.Timer(0.1, source.gate.set).start()
    ahead.keep(1, ALL)
    resumed = VersionedSource()
    resumed.weights_changed(1)
    kept = Ahead(resumed, SampleStore(tmp_path), lambda: False).take(1, ALL, 8).samples
    assert {s.rollout.newest_version for s in kept} == {0}
    ahead.keep(2, ALL)  # never begun: nothing to keep
    assert SampleStore(tmp_path).load(2, ALL) is None


def test_what_lost_its_weights_is_drawn_again_once_they_are_back() -> None:
    """Every server was started again while a step was drawn ahead: the failure is told once, and the next wait draws it anew,
    with the weights that were sent meanwhile."""
    source = VersionedSource()
    ahead = Ahead(source, None, lambda: False)
    take = source.take

    def lost(step: int, share: Share, horizon_tokens: int) -> Collected:
        raise StaleWeightsError("lost")

    source.take = lost  # type: ignore[method-assign]
    ahead.begin(1, ALL, 8)
    with pytest.raises(StaleWeightsError):
        ahead.drain()
    source.take = take  # type: ignore[method-assign]
    source.version = 7
    ahead.drain()
    source.version = 8
    assert {sample.rollout.newest_version for sample in ahead.take(1, ALL, 8).samples} == {7}

    source.take = lost  # type: ignore[method-assign]  # and where nothing is drawn ahead
    with pytest.raises(StaleWeightsError):
        ahead.take(2, ALL, 8)
    source.take = take  # type: ignore[method-assign]
    assert {sample.rollout.newest_version for sample in ahead.take(2, ALL, 8).samples} == {8}
    ahead.close()


def test_in_flight_several_steps_are_drawn_at_once_each_of_them_once() -> None:
    """Later steps are begun before earlier ones are drawn, and end in any order; to begin one again does nothing."""
    source = VersionedSource()
    gates = {step: threading.Event() for step in range(1, 4)}
    asked: list[int] = []
    take = source.take

    def gated(step: int, share: Share, horizon_tokens: int) -> Collected:
        asked.append(step)
        assert gates[step].wait(HANG_S)
        return take(step, share, horizon_tokens)

    source.take = gated  # type: ignore[method-assign]
    ahead = Ahead(source, None, lambda: False, num_steps=3)
    for step in (1, 2, 1, 3, 2):
        ahead.begin(step, ALL, 8)
    for step in (3, 2, 1):  # each ends although those before it do not
        gates[step].set()
        assert len(ahead.take(step, ALL, 8).samples) == 8
    assert sorted(asked) == [1, 2, 3]
    ahead.close()


def test_what_is_begun_waits_for_the_weights_that_it_wants(tmp_path: Path) -> None:
    """They are still on their way when a step is begun, and nothing is asked for; they come, and it is drawn by them. If they
    do not come, whoever waits for the samples is told why."""
    source = VersionedSource()
    asked: list[int] = []
    take = source.take

    def noted(step: int, share: Share, horizon_tokens: int) -> Collected:
        asked.append(step)
        return take(step, share, horizon_tokens)

    source.take = noted  # type: ignore[method-assign]
    ahead = Ahead(source, None, lambda: False, num_steps=2)
    arrival: Future[float] = Future()
    ahead.weights_changed(3, arrival)
    ahead.begin(4, ALL, 8)
    threading.Timer(0.1, lambda: (asked.append(-1), arrival.set_result(1.0))).start()
    assert {sample.rollout.newest_version for sample in ahead.take(4, ALL, 8).samples} == {3}
    assert asked == [-1, 4]

    lost: Future[float] = Future()
    lost.set_exception(ServerError("gone"))
    ahead.weights_changed(4, lost)
    ahead.begin(5, ALL, 8)
    with pytest.raises(ServerError, match="gone"):
        ahead.drain()
    assert asked == [-1, 4]
