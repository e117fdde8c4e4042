"""Samples on disk: what was drawn ahead of a checkpoint, so that a resumed run trains on the same.

One file a replica and step, ``step_000040.0-of-2.npz``: flat arrays and one JSON text, nothing that runs code when it is
read. Written under another name first, so that a reader sees a whole file or none.
"""

import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_distill.errors import DataError
from megatron_distill.rollouts.source import Share
from megatron_distill.types import HiddenSignal, Rollout, Sample, Signal, TopKSignal

_NAME = re.compile(r"step_(\d+)\.(\d+)-of-(\d+)\.npz")
_SIGNALS: tuple[type[TopKSignal] | type[HiddenSignal], ...] = (TopKSignal, HiddenSignal)


class SampleStore:
    """A folder of samples by step."""

    def __init__(self, folder: Path) -> None:
        """Use a folder; it is made at the first write."""
        self._folder = folder

    def save(self, step: int, share: Share, samples: Sequence[Sample]) -> None:
        """Write one replica's samples of ``step``."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{step:06d}.{share.rank}-of-{share.size}.npz"
        temporary = path.with_suffix(f".{share.rank}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, **_to_arrays(samples))
        temporary.replace(path)

    def load(self, step: int, share: Share) -> list[Sample] | None:
        """This replica's samples of ``step``, however many replicas wrote them; None unless all are there.

        Raises:
            DataError: a file is damaged.
        """
        files: dict[int, dict[int, Path]] = {}
        for path in self._folder.glob(f"step_{step:06d}.*-of-*.npz"):
            if found := _NAME.fullmatch(path.name):
                files.setdefault(int(found[3]), {})[int(found[2])] = path
        whole = next((parts for size, parts in files.items() if len(parts) == size), None)
        if whole is None:
            return None
        samples = [sample for rank in sorted(whole) for sample in _read(whole[rank])]
        per_replica = len(samples) // share.size
        return samples[share.rank * per_replica : (share.rank + 1) * per_replica]

    def prune(self, keep: Sequence[int], rank: int) -> None:
        """Remove this replica's files of other steps than those in ``keep``."""
        for path in self._folder.glob(f"step_*.{rank}-of-*.npz"):
            if (found := _NAME.fullmatch(path.name)) and int(found[1]) not in keep:
                path.unlink(missing_ok=True)


def _to_arrays(samples: Sequence[Sample]) -> dict[str, Any]:
    facts = []
    arrays: dict[str, Any] = {}
    for number, sample in enumerate(samples):
        rollout, signal = sample.rollout, sample.signal
        facts.append(
            {
                "prompt_index": rollout.prompt_index,
                "author": rollout.author,
                "oldest_version": rollout.oldest_version,
                "newest_version": rollout.newest_version,
                "stop_reason": rollout.stop_reason,
                "reward": sample.reward,
                "advantage": sample.advantage,
                "policy_weight": sample.policy_weight,
                "reward_parts": dict(sample.reward_parts),
            }
        )
        arrays[f"{number}.prompt_ids"] = np.asarray(rollout.prompt_ids, np.int32)
        arrays[f"{number}.response_ids"] = np.asarray(rollout.response_ids, np.int32)
        arrays[f"{number}.sampler_logprobs"] = rollout.sampler_logprobs
        if rollout.is_learnt is not None:
            arrays[f"{number}.is_learnt"] = rollout.is_learnt
        if signal is not None:
            arrays |= {f"{number}.{one.name}": getattr(signal, one.name) for one in fields(signal)}
    return arrays | {"facts": np.asarray(json.dumps(facts))}


def _read(path: Path) -> list[Sample]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: damaged ({error}). It holds what was drawn ahead of a checkpoint, and the run cannot go on bit for bit "
            "without it. Delete it to draw that step anew."
        ) from error
    return [_sample(number, facts, arrays) for number, facts in enumerate(json.loads(str(arrays["facts"])))]


def _sample(number: int, facts: dict[str, Any], arrays: dict[str, Any]) -> Sample:
    of_sample = {name: facts.pop(name) for name in ("reward", "advantage", "policy_weight")}
    parts = facts.pop("reward_parts", {})
    rollout = Rollout(
        prompt_ids=arrays[f"{number}.prompt_ids"].tolist(),
        response_ids=arrays[f"{number}.response_ids"].tolist(),
        sampler_logprobs=arrays[f"{number}.sampler_logprobs"],
        is_learnt=arrays.get(f"{number}.is_learnt"),
        **facts,
    )
    return Sample(rollout, _signal(number, arrays), **of_sample, reward_parts=parts)


def _signal(number: int, arrays: dict[str, Any]) -> Signal | None:
    """Of the kind whose arrays are all there."""
    for kind in _SIGNALS:
        names = {one.name: f"{number}.{one.name}" for one in fields(kind)}
        if all(name in arrays for name in names.values()):
            return kind(**{field: arrays[name] for field, name in names.items()})
    return None
