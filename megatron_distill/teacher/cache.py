"""What a teacher said, kept on disk: scores of given responses, and responses it wrote.

In: a ``Teacher`` or ``Sampler`` and a directory. Out: the same interface, which asks the inner one for what is not stored.
A key is a hash of everything that the answer depends on and of nothing else:

    scores      teacher's identity, prompt ids, response ids, top_k, stop token ids
    hidden      teacher's identity, prompt ids, response ids
    responses   teacher's identity, prompt ids, sampling parameters, seed

No step, batch, rank or layout enters, so that a later epoch, another run, or one with other tp, pp, dp or micro-batches
hits. ``teacher_identity`` hashes the weights themselves, since a path may come to hold others, with how they are served.

Everything comes back bit for bit (ids of 32 bits, log-probs of 32, hidden states as they were sent): a run with a warm
cache equals one without, which rounded log-probs would not allow, the tail bucket least of all, being 1 minus a sum that is
nearly 1. Byte planes of differences between neighbours make up for it: see ``benchmarks/teacher_cache.py`` for bytes a token.

    teacher = CachedTeacher(SGLangTopKTeacher(...), Path(cache_dir), SCORES, identity=identity, top_k=64, stop_token_ids=[0, 1])
    teacher.score(rollouts); teacher.hits, teacher.misses
"""

import hashlib
import json
import struct
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_distill.config import RunConfig
from megatron_distill.errors import CheckpointError
from megatron_distill.teacher.base import Teacher
from megatron_distill.teacher.shard_store import KEY_BYTES, ShardStore
from megatron_distill.types import (
    Generation,
    HiddenSignal,
    Rollout,
    Sampler,
    SamplingParams,
    Signal,
    TopKSignal,
    WantedVersion,
)

COMPRESSION_LEVEL = 1
"""Of zlib. On byte planes, higher levels (and zstd) save a few per cent and cost several times the time."""


def teacher_identity(path: Path, dtype: str, server_args: Sequence[str]) -> str:
    """A name for what a model says: equal for equal weights wherever they lie, different for any others.

    Args:
        path: Hugging Face directory. All of its safetensors are read: at disk speed, files at a time.
        dtype: in which it is served; it changes the log-probs.
        server_args: the user's own flags of its servers, in order: a quantisation changes the log-probs, and nobody knows of
            every flag that it does not.

    Raises:
        CheckpointError: if there are no weights.
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"teacher.path = {path}: holds no *.safetensors. Name a Hugging Face directory with weights."
        )
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_file_digest, [path / "config.json", *files]))
    return hashlib.blake2b("\n".join([dtype, *digests, *server_args]).encode(), digest_size=16).hexdigest()


def served_identity(config: RunConfig) -> str:
    """That of the run's teacher on its own servers."""
    return teacher_identity(Path(config.teacher.path), config.student.dtype, config.servers.teacher_args)


@dataclass(frozen=True)
class Kind[S]:
    """What kind of signal a cache holds.

    Attributes:
        name: the folder in the cache, and a part of every key.
        encode: a signal as bytes, without loss.
        decode: its inverse.
    """

    name: str
    encode: Callable[[S], bytes]
    decode: Callable[[bytes], S]


class CachedTeacher:
    """A ``Teacher`` that remembers; see the module's docstring.

    Attributes:
        hits: sequences answered from disk, or by an equal sequence of the same call.
        misses: sequences that the inner teacher was asked for, answered or not.
    """

    def __init__(self, inner: Teacher, directory: Path, kind: Kind[Any], *, identity: str, **question: Any) -> None:
        """Open the cache.

        Args:
            inner: the teacher that knows.
            directory: of the cache; signals go to a folder in it that is called as their kind.
            kind: of the inner teacher's signals: ``SCORES`` or ``HIDDEN``.
            identity: of the inner teacher's model, see ``teacher_identity``.
            question: what else its answers depend on; of scores, ``top_k`` and the list ``stop_token_ids``, in order.

        Raises:
            DataError: if the directory cannot be made.
        """
        self._inner, self._kind = inner, kind
        self._store = ShardStore(directory / kind.name)
        self._lock = threading.Lock()  # of the store; the inner teacher is asked outside it
        self._facts = {"teacher": identity} | question
        self.hits = self.misses = 0

    def score(self, rollouts: Sequence[Rollout]) -> list[Signal | None]:
        """Signals of each rollout. What the inner teacher could not score is None, is not stored, and is asked for again.

        Raises:
            DataError: if the disk does not take new scores.
        """
        keys = [_key(self._kind.name, self._facts, rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
        with self._lock:
            known = {key: self._kind.decode(payload) for key, payload in self._store.get(keys).items()}
            missing = {key: rollout for key, rollout in zip(keys, rollouts, strict=True) if key not in known}
            self.misses += len(missing)
            self.hits += len(rollouts) - len(missing)
        if missing:
            answers = dict(zip(missing, self._inner.score(list(missing.values())), strict=True))
            fresh = {key: signal for key, signal in answers.items() if signal is not None}
            with self._lock:
                self._store.put({key: self._kind.encode(signal) for key, signal in fresh.items()})
            known |= fresh
        return [known.get(key) for key in keys]

    def close(self) -> None:
        """Close the cache's files."""
        self._store.close()


class CachedSampler:
    """A ``Sampler`` that remembers: the teacher writes a data set once. See the module's docstring.

    Attributes:
        hits: responses from disk, or equal to another of the same call.
        misses: responses that the inner sampler was asked for.
    """

    def __init__(self, inner: Sampler, directory: Path, *, identity: str) -> None:
        """Open the cache.

        Args:
            inner: samples from the teacher.
            directory: of the cache; responses go to ``responses/`` in it.
            identity: of the inner sampler's model, whose weights must not change; see ``teacher_identity``.

        Raises:
            DataError: if the directory cannot be made.
        """
        self._inner = inner
        self._store = ShardStore(directory / "responses")
        self._lock = threading.Lock()
        self._identity = identity
        self.hits = self.misses = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        /,
        *,
        sampling: SamplingParams,
        seeds: Sequence[int],
        weight_version: WantedVersion = None,
    ) -> list[Generation]:
        """One response to each prompt, the same whenever prompt, sampling and seed are the same.

        Raises:
            DataError: if the disk does not take new responses.
        """
        facts = {"teacher": self._identity, "sampling": asdict(sampling)}
        keys = [
            _key("responses", facts | {"seed": int(seed)}, prompt) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        with self._lock:
            known = {key: decode_generation(payload) for key, payload in self._store.get(keys).items()}
            missing = {key: i for i, key in enumerate(keys) if key not in known}
            self.misses += len(missing)
            self.hits += len(keys) - len(missing)
        if missing:
            written = self._inner.generate(
                [prompts[i] for i in missing.values()], sampling=sampling, seeds=[seeds[i] for i in missing.values()]
            )
            fresh = dict(zip(missing, written, strict=True))
            with self._lock:
                self._store.put({key: encode_generation(generation) for key, generation in fresh.items()})
            known |= fresh
        return [known[key] for key in keys]

    def close(self) -> None:
        """Close the cache's files."""
        self._store.close()


# --- payloads ---------------------------------------------------------------------------------------------------------

_SCORES_SHAPE = struct.Struct("<III")  # R, K, S


def encode_scores(scores: TopKSignal) -> bytes:
    """Scores as compressed bytes, without loss.

    The log-probs of a row fall, so the differences of their bit patterns are small: their high bytes are nearly constant,
    and lie together once the bytes are sorted into planes. Ids gain from planes alone.
    """
    bits_RK = np.ascontiguousarray(scores.topk_logprobs, np.float32).view(np.uint32)
    steps_RK = np.diff(bits_RK, axis=1, prepend=np.uint32(0))  # modulo 2^32, as is the sum that undoes it
    parts = [
        _byte_planes(np.asarray(scores.topk_ids, np.int32)),
        _byte_planes(steps_RK),
        _byte_planes(np.asarray(scores.token_logprobs, np.float32)),
        _byte_planes(np.asarray(scores.stop_logprobs, np.float32)),
    ]
    shape = _SCORES_SHAPE.pack(*scores.topk_ids.shape, scores.stop_logprobs.shape[1])
    return shape + zlib.compress(b"".join(parts), COMPRESSION_LEVEL)


def decode_scores(payload: bytes) -> TopKSignal:
    """The inverse of ``encode_scores``."""
    num_tokens, num_top, num_stops = _SCORES_SHAPE.unpack_from(payload)
    planes = zlib.decompress(payload[_SCORES_SHAPE.size :])
    values = [num_tokens * num_top, num_tokens * num_top, num_tokens, num_tokens * num_stops]
    ids, steps, token_logprobs, stop_logprobs = (
        _from_byte_planes(planes[4 * start : 4 * (start + count)])
        for start, count in zip(np.cumsum([0, *values]), values, strict=False)
    )
    bits_RK = np.cumsum(steps.reshape(num_tokens, num_top), axis=1, dtype=np.uint32)
    return TopKSignal(
        token_logprobs=token_logprobs.view(np.float32),
        topk_ids=ids.view(np.int32).reshape(num_tokens, num_top),
        topk_logprobs=bits_RK.view(np.float32),
        stop_logprobs=stop_logprobs.view(np.float32).reshape(num_tokens, num_stops),
    )


_HIDDEN_SHAPE = struct.Struct("<8sIII")  # numpy's name of the dtype, R, H, bytes of the compressed part


def encode_hidden(signal: HiddenSignal) -> bytes:
    """Hidden states as bytes, without loss: signs and exponents, in the last byte plane, repeat; the others are noise."""
    hidden = np.ascontiguousarray(signal.hidden)
    planes_BN = hidden.reshape(-1, 1).view(np.uint8).T
    packed = zlib.compress(signal.token_logprobs.tobytes() + planes_BN[-1].tobytes(), COMPRESSION_LEVEL)
    shape = _HIDDEN_SHAPE.pack(hidden.dtype.str.encode(), *hidden.shape, len(packed))
    return shape + packed + planes_BN[:-1].tobytes()


def decode_hidden(payload: bytes) -> HiddenSignal:
    """The inverse of ``encode_hidden``."""
    name, num_tokens, width, num_packed = _HIDDEN_SHAPE.unpack_from(payload)
    dtype, start = np.dtype(name.rstrip(b"\0").decode()), _HIDDEN_SHAPE.size + num_packed
    packed = zlib.decompress(payload[_HIDDEN_SHAPE.size : start])
    bytes_NB = np.empty((num_tokens * width, dtype.itemsize), np.uint8)
    bytes_NB[:, -1] = np.frombuffer(packed, np.uint8, offset=4 * num_tokens)
    bytes_NB[:, :-1] = np.frombuffer(payload, np.uint8, offset=start).reshape(dtype.itemsize - 1, -1).T
    return HiddenSignal(
        token_logprobs=np.frombuffer(packed, np.float32, num_tokens).copy(),
        hidden=bytes_NB.view(dtype).reshape(num_tokens, width),
    )


SCORES = Kind("scores", encode_scores, decode_scores)
HIDDEN = Kind("hidden", encode_hidden, decode_hidden)


def encode_generation(generation: Generation) -> bytes:
    """A response as compressed bytes, without loss."""
    facts = {
        "stop_reason": generation.stop_reason,
        "stop_token_id": generation.stop_token_id,
        "weight_version": generation.weight_version,
    }
    ids = np.asarray(generation.response_ids, np.int32).tobytes()
    logprobs = np.asarray(generation.sampler_logprobs, np.float32).tobytes()
    return zlib.compress(json.dumps(facts).encode() + b"\n" + ids + logprobs, COMPRESSION_LEVEL)


def decode_generation(payload: bytes) -> Generation:
    """The inverse of ``encode_generation``."""
    head, _, arrays = zlib.decompress(payload).partition(b"\n")
    ids, logprobs = arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]
    return Generation(
        response_ids=np.frombuffer(ids, np.int32).tolist(),
        sampler_logprobs=np.frombuffer(logprobs, np.float32).copy(),
        **json.loads(head),
    )


def _byte_planes(values: npt.NDArray[Any]) -> bytes:
    """The first byte of every 32-bit value, then the second of every one, and so on."""
    return np.ascontiguousarray(np.ascontiguousarray(values).reshape(-1, 1).view(np.uint8).T).tobytes()


def _from_byte_planes(planes: bytes) -> npt.NDArray[np.uint32]:
    """The values' bit patterns, in a writable array."""
    return np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(4, -1).T).view(np.uint32).reshape(-1)


def _key(kind: str, facts: Mapping[str, Any], *token_ids: Sequence[int]) -> bytes:
    """A hash of everything that an answer depends on; lengths go in, so that no two inputs run together."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in (
        json.dumps([kind, facts], sort_keys=True).encode(),
        *(np.asarray(i, "<i4").tobytes() for i in token_ids),
    ):
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.digest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
