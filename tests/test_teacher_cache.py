"""The teacher's cache: bit-for-bit answers, keys that hold what matters and nothing else, and files that survive kills."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_distill.recipes.tiny import quickstart

from megatron_distill.config import with_overrides
from megatron_distill.errors import CheckpointError, DataError
from megatron_distill.teacher import MakeTeacher, TeacherContext, make_sglang_hidden, make_sglang_topk
from megatron_distill.teacher.cache import (
    HIDDEN,
    SCORES,
    CachedSampler,
    CachedTeacher,
    decode_generation,
    decode_hidden,
    decode_scores,
    encode_generation,
    encode_hidden,
    encode_scores,
    teacher_identity,
)
from megatron_distill.teacher.shard_store import ShardStore
from megatron_distill.training.leader import _teacher_sampler
from megatron_distill.types import Generation, HiddenSignal, Rollout, SamplingParams, TopKSignal

TOP_K, STOPS = 8, (0, 1)
unhurried = settings(deadline=None)  # a loaded machine is no failure
FORK = multiprocessing.get_context("fork")


def make_scores(num_tokens: int, seed: int, top_k: int = TOP_K, num_stops: int = len(STOPS)) -> TopKSignal:
    """Scores of a random teacher with Qwen3's vocabulary: sorted top-k, values over the whole range of log-probs."""
    rng = np.random.default_rng(seed)
    topk_logprobs = -np.sort(
        rng.exponential(rng.choice([1e-6, 1.0, 10.0], (num_tokens, 1)), (num_tokens, top_k)), axis=1
    )
    return TopKSignal(
        token_logprobs=-rng.exponential(1.0, num_tokens).astype(np.float32),
        topk_ids=rng.integers(0, 151_936, (num_tokens, top_k), dtype=np.int32),
        topk_logprobs=topk_logprobs.astype(np.float32),
        stop_logprobs=-rng.exponential(9.0, (num_tokens, num_stops)).astype(np.float32),
    )


def make_rollout(seed: int, prompt: Sequence[int] = (5, 9)) -> Rollout:
    response = np.random.default_rng(seed).integers(0, 151_936, 3 + seed % 4).tolist()
    return Rollout(seed, list(prompt), response, np.zeros(len(response), np.float32), "student", seed, seed, "stop")


def same_bits(one: Any, other: Any) -> bool:
    """Whether two records of arrays and plain values are equal, type and bit pattern."""
    pairs = [(getattr(one, spec.name), getattr(other, spec.name)) for spec in fields(one)]
    return type(one) is type(other) and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) if isinstance(a, np.ndarray) else a == b
        for a, b in pairs
    )


class FakeTeacher:
    """Scores by a function of the tokens; remembers what it was asked; None for prompts it does not know."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def score(self, rollouts: Sequence[Rollout]) -> list[TopKSignal | None]:
        self.asked += [rollout.response_ids for rollout in rollouts]
        return [
            None if rollout.prompt_ids == [404] else make_scores(len(rollout.response_ids), sum(rollout.response_ids))
            for rollout in rollouts
        ]


class FakeWriter:
    """Writes a response that differs at every call, as a server with ordinary kernels does."""

    def __init__(self) -> None:
        self.num_asked = 0

    def generate(
        self, prompts: Sequence[Sequence[int]], /, *, sampling: SamplingParams, seeds: Sequence[int]
    ) -> list[Generation]:
        first = self.num_asked
        self.num_asked += len(prompts)
        return [
            Generation([7, first + i, 2], np.float32([-0.1, -2.5, -1e-7]), "stop", 2, "default")
            for i in range(len(prompts))
        ]


def open_teacher(directory: Path, **changes: Any) -> tuple[CachedTeacher, FakeTeacher]:
    inner = FakeTeacher()
    question: dict[str, Any] = {"identity": "teacher-a", "top_k": TOP_K, "stop_token_ids": list(STOPS)} | changes
    return CachedTeacher(inner, directory, SCORES, **question), inner


# --- payloads


@unhurried
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_scores_survive_bit_for_bit(num_tokens: int, top_k: int, num_stops: int, seed: int) -> None:
    """Decoding gives back every bit and the types of ``TopKSignal``, so that a hit cannot change a loss."""
    scores = make_scores(num_tokens, seed, top_k, num_stops)
    decoded = decode_scores(encode_scores(scores))
    assert same_bits(decoded, scores)
    assert decoded.topk_logprobs.flags.writeable  # torch warns about others


@pytest.mark.slow
@unhurried
@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from([np.float32, np.float16, np.uint16]), st.integers(0, 99))
def test_hidden_states_survive_bit_for_bit(num_tokens: int, width: int, dtype: type, seed: int) -> None:
    """Whatever the bits, and the dtype in which the server sent them."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 256, (num_tokens, width * np.dtype(dtype).itemsize), np.uint8)
    signal = HiddenSignal(-rng.exponential(1.0, num_tokens).astype(np.float32), bits.view(dtype))
    decoded = decode_hidden(encode_hidden(signal))
    assert same_bits(decoded, signal)
    assert decoded.hidden.flags.writeable and decoded.token_logprobs.flags.writeable


def test_hidden_states_and_scores_share_a_cache_without_meeting(tmp_path: Path) -> None:
    """The same sequence of the same teacher is another question, whose answers lie in another folder."""
    open_teacher(tmp_path)[0].score([make_rollout(3)])

    class SendsHidden:
        num_asked = 0

        def score(self, rollouts: Sequence[Rollout], /) -> list[HiddenSignal | None]:
            self.num_asked += len(rollouts)
            return [
                HiddenSignal(np.zeros(1, np.float32), np.full((1, 2), len(r.response_ids), np.uint16)) for r in rollouts
            ]

    inner = SendsHidden()
    for _ in range(2):
        teacher = CachedTeacher(inner, tmp_path, HIDDEN, identity="teacher-a")
        (signal,) = teacher.score([make_rollout(3)])
        assert isinstance(signal, HiddenSignal) and signal.hidden.tolist() == [[6, 6]]
        teacher.close()
    assert inner.num_asked == 1


@pytest.mark.slow
@unhurried
@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20), st.sampled_from(["stop", "length"]), st.text())
def test_generations_survive_bit_for_bit(response_ids: list[int], reason: Any, version: str) -> None:
    """Whatever the ids and the version string, a response is the one that was written."""
    logprobs = -np.random.default_rng(len(response_ids)).exponential(1.0, len(response_ids)).astype(np.float32)
    generation = Generation(response_ids, logprobs, reason, response_ids[-1] if reason == "stop" else None, version)
    assert same_bits(decode_generation(encode_generation(generation)), generation)


# --- teacher and writer


def test_second_run_asks_nothing_and_gets_the_same(tmp_path: Path) -> None:
    """Scores come from disk in any order and batch, in another process' life, bit for bit; hits and misses are counted."""
    rollouts = [make_rollout(seed) for seed in range(12)]
    first, inner = open_teacher(tmp_path)
    expected = first.score(rollouts)
    assert (first.hits, first.misses, len(inner.asked)) == (0, 12, 12)
    first.close()
    second, inner = open_teacher(tmp_path)
    order = np.random.default_rng(0).permutation(12).tolist()
    got: dict[int, TopKSignal | None] = {}
    for part in (order[:5], order[5:]):
        got |= dict(zip(part, second.score([rollouts[i] for i in part]), strict=True))
    assert all(same_bits(got[i], expected[i]) for i in range(12))
    assert (second.hits, second.misses, inner.asked) == (12, 0, [])


def test_hit_depends_on_tokens_and_question_alone(tmp_path: Path) -> None:
    """Step, place and stop reason do not matter; teacher, top_k, stop ids and where the prompt ends do."""
    rollout = make_rollout(3)
    open_teacher(tmp_path)[0].score([rollout])

    def hits(asked: Rollout, **changes: Any) -> bool:
        teacher, _ = open_teacher(tmp_path / "copy", **changes)
        teacher.score([asked])
        return teacher.hits == 1

    def fresh_copy() -> None:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "scores", tmp_path / "copy" / "scores")

    moved = [*rollout.prompt_ids, rollout.response_ids[0]]
    for expected, asked, changes in (
        (True, replace(rollout, prompt_index=9, newest_version=-1, stop_reason="length"), {}),
        (False, replace(rollout, prompt_ids=moved, response_ids=rollout.response_ids[1:]), {}),
        (False, rollout, {"identity": "teacher-b"}),
        (False, rollout, {"top_k": TOP_K + 1}),
        (False, rollout, {"stop_token_ids": list(STOPS[::-1])}),
    ):
        fresh_copy()
        assert hits(asked, **changes) == expected, (asked, changes)


def test_missing_scores_stay_missing(tmp_path: Path) -> None:
    """A teacher that could not score is asked again next time: a failure is never cached, nor turned into numbers."""
    teacher, inner = open_teacher(tmp_path)
    lost = make_rollout(1, prompt=[404])
    for num_times in (1, 2):
        scores = teacher.score([make_rollout(0), lost])
        assert scores[0] is not None and scores[1] is None
        assert inner.asked.count(lost.response_ids) == num_times


def test_equal_sequences_of_one_call_are_asked_once(tmp_path: Path) -> None:
    """Rollouts of one prompt are often equal when short; each gets its scores, the inner teacher one question."""
    teacher, inner = open_teacher(tmp_path)
    scores = teacher.score([make_rollout(0), make_rollout(1), make_rollout(0)])
    assert len(inner.asked) == 2 and (teacher.hits, teacher.misses) == (1, 2)
    assert same_bits(scores[0], scores[2]) and not same_bits(scores[0], scores[1])


def test_writer_answers_once_for_each_prompt_sampling_and_seed(tmp_path: Path) -> None:
    """The first response counts for ever; another seed or any other sampling parameter is another question."""
    sampling = SamplingParams(max_new_tokens=8, stop_token_ids=STOPS)
    first = CachedSampler(FakeWriter(), tmp_path, identity="a")
    written = first.generate([[1], [2], [1], [1]], sampling=sampling, seeds=[0, 0, 0, 1])
    assert len({tuple(generation.response_ids) for generation in written}) == 3
    assert same_bits(written[0], written[2]) and (first.hits, first.misses) == (1, 3)
    second = CachedSampler(FakeWriter(), tmp_path, identity="a")
    again = second.generate([[1], [1], [2]], sampling=sampling, seeds=[1, 0, 0])
    assert all(same_bits(a, b) for a, b in zip(again, [written[3], written[0], written[1]], strict=True))
    assert (second.hits, second.misses) == (3, 0)
    for changed in (
        replace(sampling, temperature=0.5),
        replace(sampling, max_new_tokens=9),
        replace(sampling, top_k=5),
    ):
        second.generate([[1]], sampling=changed, seeds=[0])
    assert second.misses == 3


def test_identity_follows_the_weights(tmp_path: Path) -> None:
    """Equal files elsewhere are the same teacher; one changed byte, another config, dtype or server flag is another one."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(4096))
    one, other = tmp_path / "a", tmp_path / "b"
    assert teacher_identity(one, "bf16", ()) == teacher_identity(other, "bf16", ()) != teacher_identity(one, "fp32", ())
    assert teacher_identity(one, "bf16", ()) != teacher_identity(one, "bf16", ("--quantization=fp8",))
    (other / "model.safetensors").write_bytes(bytes(4095) + b"\1")
    assert teacher_identity(one, "bf16", ()) != teacher_identity(other, "bf16", ())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"teacher.path = .*safetensors"):
        teacher_identity(tmp_path / "empty", "bf16", ())


class FakeClient:
    """Servers of a teacher: scores as ``FakeTeacher``'s, of 70 ids, and hidden states; counts what it was asked."""

    vocab_size = 70

    def __init__(self) -> None:
        self.num_asked = 0

    def score(self, sequences: Any, *, top_k: int, stop_token_ids: Sequence[int]) -> list[TopKSignal | None]:
        self.num_asked += len(sequences)
        signals = [make_scores(len(response), sum(response), top_k, len(stop_token_ids)) for _, response in sequences]
        return [replace(signal, topk_ids=signal.topk_ids % self.vocab_size) for signal in signals]

    def hidden_states(self, sequences: Any) -> list[HiddenSignal | None]:
        self.num_asked += len(sequences)
        return [HiddenSignal(np.zeros(1, np.float32), np.zeros((1, 2), np.uint16)) for _ in sequences]


def scored_by_servers(make: MakeTeacher, directory: Path, vocab_size: int, *overrides: str) -> tuple[Any, int]:
    """What a run's teacher behind a cache in ``directory`` says of one response, and how many its servers were asked for."""
    config = with_overrides(quickstart(), [f"teacher.cache_dir={directory}", *overrides])
    client = FakeClient()
    teacher: Any = make(TeacherContext(config, (), vocab_size, STOPS, client))  # type: ignore[arg-type]
    (signal,) = teacher.score([make_rollout(3)])
    teacher.close()
    return signal, client.num_asked


@pytest.mark.parametrize("make", [make_sglang_topk, make_sglang_hidden])
def test_a_teacher_that_is_served_otherwise_is_asked_anew(make: MakeTeacher, tmp_path: Path) -> None:
    """A quantised teacher is another one than its weights in bf16, though they lie in one directory."""
    for overrides, expected in (
        ((), 1),
        ((), 0),
        (('servers.teacher_args=["--quantization=fp8"]',), 1),
        (('servers.teacher_args=["--quantization=fp8"]',), 0),
        ((), 0),
    ):
        assert scored_by_servers(make, tmp_path, 70, *overrides)[1] == expected


def test_students_of_other_vocabularies_share_a_cache(tmp_path: Path) -> None:
    """What is stored is what the teacher said: each student finds of it what a teacher without a cache would have told it."""
    for vocab_size in (70, 50, 70):
        signal, _ = scored_by_servers(make_sglang_topk, tmp_path / "shared", vocab_size)
        alone, _ = scored_by_servers(make_sglang_topk, tmp_path / f"alone-{vocab_size}", vocab_size)
        assert same_bits(signal, alone)
        assert signal.topk_ids.max() < vocab_size and (signal.topk_ids == -1).any() == (vocab_size < 70)


def test_what_a_teacher_wrote_is_kept_by_how_it_is_served(tmp_path: Path) -> None:
    """Its responses too: those of a quantised teacher are no data of the other."""
    for overrides, expected in (((), 1), ((), 0), (('servers.teacher_args=["--quantization=fp8"]',), 1)):
        own = (f"teacher.cache_dir={tmp_path}", "rollouts.student_prefix_frac=0", *overrides)
        writer = FakeWriter()
        sampler: Any = _teacher_sampler(with_overrides(quickstart(), own), writer)  # type: ignore[arg-type]
        sampler.generate([[1]], sampling=SamplingParams(8), seeds=[0])
        sampler.close()
        assert writer.num_asked == expected


# --- storage


def numbered(first: int, count: int) -> dict[bytes, bytes]:
    """Payloads that can be recognised from their keys: 16 bytes of a number, and that repeated."""
    return {
        number.to_bytes(16, "big"): number.to_bytes(4, "big") * (number % 50 + 1)
        for number in range(first, first + count)
    }


KEYS_PER_WRITER = 99_999


def write_until_killed(directory: Path, first: int, progress: Connection) -> None:
    """Put three payloads at a time, say so after each, and stay alive when the keys are used up."""
    store = ShardStore(directory)
    for start in range(first, first + KEYS_PER_WRITER, 3):
        store.put(numbered(start, 3))
        progress.send_bytes(b".")
    signal.pause()


def write_some(directory: Path, first: int) -> None:
    store = ShardStore(directory)
    for start in range(first, first + 300, 10):
        store.put(numbered(start, 10))


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    """Four processes that append at once, and a reader that was open before them: every payload is found."""
    reader = ShardStore(tmp_path)
    processes = [FORK.Process(target=write_some, args=(tmp_path, 1000 * i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    expected = {key: payload for i in range(4) for key, payload in numbered(1000 * i, 300).items()}
    assert reader.get(expected) == expected
    assert ShardStore(tmp_path).get(reversed(list(expected))) == expected


@pytest.mark.slow
def test_writer_killed_at_any_moment_leaves_a_sound_store(tmp_path: Path) -> None:
    """After SIGKILL, what was put first is found first, intact and without gaps, and the store goes on."""
    firsts = range(0, 500_000, 100_000)
    for num_puts, first in zip((1, 2, 5, 20, 50), firsts, strict=True):
        progress, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=write_until_killed, args=(tmp_path, first, theirs))
        process.start()
        for _ in range(num_puts):
            progress.recv_bytes()
        process.kill()  # while it goes on putting
        process.join()
    store = ShardStore(tmp_path)
    num_left = len(store)
    for num_puts, first in zip((1, 2, 5, 20, 50), firsts, strict=True):
        candidates = numbered(first, KEYS_PER_WRITER)
        found = store.get(candidates)
        assert found == dict(list(candidates.items())[: len(found)])
        assert len(found) >= 3 * num_puts
        num_left -= len(found)
    assert num_left == 0 and store.num_corrupt == 0
    store.put(numbered(900_000, 5))
    assert ShardStore(tmp_path).get(numbered(900_000, 5)) == numbered(900_000, 5)


@unhurried
@given(cut=st.integers(0, 3000), what=st.sampled_from(["data", "index"]))
def test_torn_files_are_misses(tmp_path_factory: pytest.TempPathFactory, cut: int, what: str) -> None:
    """A data or index file cut at any byte gives back a subset, each payload intact; nothing raises."""
    directory = tmp_path_factory.mktemp("torn")
    expected = numbered(0, 30)
    writer = ShardStore(directory)
    writer.put(expected)
    writer.close()
    (path,) = directory.glob(f"*.{what}")
    kept = min(cut, path.stat().st_size)
    os.truncate(path, kept)
    store = ShardStore(directory)
    found = store.get(expected)
    assert found.items() <= expected.items()
    if what == "index":
        assert len(found) == kept // 32
    else:
        assert len(found) + store.num_corrupt == len(expected)


def test_flipped_bytes_are_misses(tmp_path: Path) -> None:
    """A byte flipped anywhere in the payloads is caught by the checksum; the others are still found."""
    expected = numbered(0, 30)
    ShardStore(tmp_path).put(expected)
    (path,) = tmp_path.glob("*.data")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    store = ShardStore(tmp_path)
    found = store.get(expected)
    assert len(found) == 29 and found.items() <= expected.items() and store.num_corrupt == 1
    lost = expected.keys() - found.keys()
    store.put({key: expected[key] for key in lost})
    assert store.get(expected) == expected


def test_deleted_shard_is_a_miss_and_an_unwritable_place_an_error(tmp_path: Path) -> None:
    """Deleting files by hand only makes the cache smaller; a place that cannot be written says what to change."""
    ShardStore(tmp_path / "cache").put(numbered(0, 3))
    store = ShardStore(tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    assert store.get(numbered(0, 3)) == {}
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"teacher.cache_dir = .*cannot be written"):
        ShardStore(tmp_path / "file")


def test_processes_share_few_files(tmp_path: Path) -> None:
    """However many sequences, a process makes two files."""
    store = ShardStore(tmp_path)
    for start in range(0, 1000, 10):
        store.put(numbered(start, 10))
    assert len(list(tmp_path.iterdir())) == 2 and len(store) == 1000


def test_a_sixth_of_json_and_below_raw_even_on_noise() -> None:
    """Uniform ids and log-probs of every size compress worst of all, and still take a sixth of JSON, less than raw."""
    scores = make_scores(512, 0, top_k=64)
    topk = np.stack([scores.topk_logprobs, scores.topk_ids], -1).tolist()
    as_json = json.dumps([topk, scores.token_logprobs.tolist(), scores.stop_logprobs.tolist()])
    raw = sum(getattr(scores, spec.name).nbytes for spec in fields(scores))
    assert len(encode_scores(scores)) < min(0.85 * raw, len(as_json) / 6)
