"""From a step's samples to packed micro-batches of tensors.

In: ``Sample``s (a rollout, and what the teacher said of it). Out: ``MicroBatch``es, each a few rows into which several
sequences are packed back to back, with everything the loss needs *for response tokens only*.

Shapes: R rows of a micro-batch, L tokens of a row, T response tokens of a micro-batch, K top-k, S stop tokens.

    prompt A  response A  prompt B  response B  padding      one row of ``tokens_RL``
              ^^^^^^^^^^            ^^^^^^^^^^               T of these, in order, in every ``*_T`` tensor

The logits that predict a response token sit one place before it: ``logits_index_T`` holds that place in the flattened
[R * L] row. Two sequences of one row never see each other (``attention_mask`` is block-diagonal and causal); rotary
position embeddings are relative, so where in the row a sequence starts does not matter.

No Megatron here, and nothing depends on how a step is cut into micro-batches: see the invariance tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_distill.models.context_parallel import places_of_rank
from megatron_distill.rollouts.dealing import num_tokens
from megatron_distill.types import HiddenSignal, Rollout, Sample, TopKSignal


@dataclass(frozen=True)
class TopKTensors:
    """A ``TopKSignal`` of every response token of a micro-batch.

    Attributes:
        token_logprobs_T: fp32, the teacher's log-prob of the response token.
        ids_TK: int64, its likeliest tokens.
        logprobs_TK: fp32, their log-probs over the full vocabulary.
        stop_logprobs_TS: fp32, its log-prob of every stop token.
    """

    token_logprobs_T: torch.Tensor
    ids_TK: torch.Tensor
    logprobs_TK: torch.Tensor
    stop_logprobs_TS: torch.Tensor

    def to(self, device: torch.device | str) -> "TopKTensors":
        """The same on ``device``."""
        return TopKTensors(*(getattr(self, spec.name).to(device, non_blocking=True) for spec in fields(self)))

    def at(self, kept_T: torch.Tensor | slice) -> "TopKTensors":
        """The rows of some of the tokens."""
        return TopKTensors(*(getattr(self, spec.name)[kept_T] for spec in fields(self)))


@dataclass(frozen=True)
class HiddenSignalTensors:
    """A ``HiddenSignal`` of every response token of a micro-batch.

    Attributes:
        token_logprobs_T: fp32, the teacher's log-prob of the response token, by its server.
        hidden_TH: what its output layer is given, in the server's dtype. It stays in the host's memory until the layer takes
            it, a micro-batch at a time: a step's would not fit beside a model.
    """

    token_logprobs_T: torch.Tensor
    hidden_TH: torch.Tensor

    def to(self, device: torch.device | str) -> "HiddenSignalTensors":
        """The log-probs on ``device``."""
        return replace(self, token_logprobs_T=self.token_logprobs_T.to(device, non_blocking=True))

    def at(self, kept_T: torch.Tensor | slice) -> "HiddenSignalTensors":
        """The rows of some of the tokens."""
        return HiddenSignalTensors(self.token_logprobs_T[kept_T], self.hidden_TH[kept_T])


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one forward and backward pass of one data-parallel replica.

    Attributes:
        tokens_RL: int64, packed prompts and responses, padded with 0.
        position_ids_RL: int64, counted from each sequence's start.
        attention_mask: bool [R, 1, L, L], True = masked (Megatron's convention); None for kernels that go by
            ``sequence_starts``, since it grows with the square of the row.
        sequence_starts: int32 [N + 1], where each of the N sequences (padding counts as such) starts in the flattened
            rows, and their end: what packed attention kernels call ``cu_seqlens``.
        max_sequence_tokens: the longest of them, known to the host, so that no kernel has to wait for it.
        logits_index_T: int64, flat index into [R * L] of the logits that predict each response token.
        target_ids_T: int64, the response tokens themselves.
        response_quarter_T: int64 in 0..3, which quarter of its response the token lies in.
        response_share_T: fp32, 1 / learnt tokens of its response: what the token counts in the response's mean, wherever the
            response's other tokens are.
        sampler_logprobs_T: fp32, log-prob under the sampler that wrote the token; nan where the teacher wrote it.
        is_scored_T: bool, whether the distillation loss applies to the token.
        is_student_T: bool, whether the student wrote the token.
        is_stale_T: bool, whether older weights than the present ones did.
        advantages_T: fp32, the sample's advantage, repeated over its tokens.
        policy_weights_T: fp32, the sample's ``policy_weight``, repeated for each of its tokens.
        signal: what the teacher said; None if it says it in the forward step, or nothing at all.
    """

    tokens_RL: torch.Tensor
    position_ids_RL: torch.Tensor
    attention_mask: torch.Tensor | None
    sequence_starts: torch.Tensor
    max_sequence_tokens: int
    logits_index_T: torch.Tensor
    target_ids_T: torch.Tensor
    response_quarter_T: torch.Tensor
    response_share_T: torch.Tensor
    sampler_logprobs_T: torch.Tensor
    is_scored_T: torch.Tensor
    is_student_T: torch.Tensor
    is_stale_T: torch.Tensor
    advantages_T: torch.Tensor
    policy_weights_T: torch.Tensor
    signal: TopKTensors | HiddenSignalTensors | None = None

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same batch with every tensor on ``device``."""
        moved: dict[str, Any] = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, torch.Tensor):
                moved[spec.name] = value.to(device, non_blocking=True)
            elif isinstance(value, TopKTensors | HiddenSignalTensors):
                moved[spec.name] = value.to(device)
        return replace(self, **moved)

    def of_context_rank(self, rank: int, size: int) -> "MicroBatch":
        """What one of ``size`` context-parallel ranks sees: its chunks of each sequence, and their response tokens only.

        ``sequence_starts`` and ``max_sequence_tokens`` stay those of the whole sequences, which attention kernels want. A
        rank may be left without any response token.
        """
        if size == 1:
            return self
        assert self.attention_mask is None and self.tokens_RL.shape[0] == 1, "one row, of sequences cut into chunks"
        places = places_of_rank(self.sequence_starts, rank, size)
        local = torch.full((self.tokens_RL.numel(),), -1)
        local[places] = torch.arange(places.numel())
        index = local[self.logits_index_T]
        kept = index >= 0
        return replace(
            self.at(kept),
            logits_index_T=index[kept],
            tokens_RL=self.tokens_RL[:, places],
            position_ids_RL=self.position_ids_RL[:, places],
        )

    def at(self, kept_T: torch.Tensor | slice) -> "MicroBatch":
        """The same sequences with some of the response tokens: what the loss needs of a part of them."""
        cut: dict[str, Any] = {
            spec.name: getattr(self, spec.name)[kept_T] for spec in fields(self) if spec.name.endswith("_T")
        }
        return replace(self, **cut, signal=self.signal and self.signal.at(kept_T))


def pack_micro_batch(
    samples: Sequence[Sample],
    *,
    step: int,
    scored_in_trainer: bool = False,
    pad_multiple: int = 8,
    needs_mask: bool = True,
    sequence_multiple: int = 1,
) -> MicroBatch:
    """Pack the samples of one micro-batch.

    Args:
        samples: at least one.
        step: 0-based: the version of the weights that will learn from them.
        scored_in_trainer: the teacher scores every token in the forward step, and no signal travels.
        pad_multiple: rows are padded to a multiple of it (sequence parallelism needs a multiple of tp).
        needs_mask: the model's attention takes a mask, and not the sequences' lengths.
        sequence_multiple: each sequence is padded to a multiple of it, and its padding counts as its own (context parallelism
            cuts it into as many chunks; causal attention keeps them from what comes before).
    """
    lengths = [_padded_tokens(sample, sequence_multiple) for sample in samples]
    # A mask grows with the square of a row; without one, a single row wastes less than pad_multiple tokens on padding.
    row_tokens = -(-(max(lengths) if needs_mask else sum(lengths)) // pad_multiple) * pad_multiple
    rows = _rows(samples, row_tokens, sequence_multiple)
    tokens = np.zeros((len(rows), row_tokens), np.int64)
    positions = np.zeros_like(tokens)
    sequence_of = np.full_like(tokens, -1)  # which sequence of its row a token belongs to; -1 is padding
    logits_index, packed = [], []
    for r, row in enumerate(rows):
        start = 0
        for number, sample in enumerate(row):
            prompt, response = sample.rollout.prompt_ids, sample.rollout.response_ids
            tokens[r, start : start + len(prompt) + len(response)] = np.concatenate([prompt, response])
            end = start + _padded_tokens(sample, sequence_multiple)
            positions[r, start:end] = np.arange(end - start)
            sequence_of[r, start:end] = number
            first = r * row_tokens + start + len(prompt) - 1
            logits_index.append(first + _learnt(sample.rollout))
            packed.append(sample)
            start = end
    rollouts = [sample.rollout for sample in packed]
    is_scored = [scored_in_trainer or sample.signal is not None for sample in packed]
    starts = _sequence_starts(sequence_of)
    return MicroBatch(
        tokens_RL=torch.from_numpy(tokens),
        position_ids_RL=torch.from_numpy(positions),
        attention_mask=block_causal_mask(torch.from_numpy(sequence_of)) if needs_mask else None,
        sequence_starts=starts,
        max_sequence_tokens=int(starts.diff().max()),
        logits_index_T=torch.from_numpy(np.concatenate(logits_index)),
        target_ids_T=_cat(rollouts, [r.response_ids for r in rollouts], np.int64),
        response_quarter_T=_cat(rollouts, [_quarters(len(r.response_ids)) for r in rollouts], np.int64),
        response_share_T=_per_token(rollouts, [1 / max(r.num_learnt_tokens, 1) for r in rollouts], np.float32),
        sampler_logprobs_T=_cat(rollouts, [r.sampler_logprobs for r in rollouts], np.float32),
        is_scored_T=_per_token(rollouts, is_scored, np.bool_),
        is_student_T=_per_token(rollouts, [r.author == "student" for r in rollouts], np.bool_),
        is_stale_T=_per_token(
            rollouts, [r.author == "student" and r.oldest_version < step for r in rollouts], np.bool_
        ),
        advantages_T=_per_token(rollouts, [s.advantage for s in packed], np.float32),
        policy_weights_T=_per_token(rollouts, [s.policy_weight for s in packed], np.float32),
        signal=None if scored_in_trainer else _signal_tensors(packed),
    )


def _padded_tokens(sample: Sample, multiple: int) -> int:
    return -(-num_tokens(sample) // multiple) * multiple


def _rows(samples: Sequence[Sample], capacity: int, multiple: int) -> list[list[Sample]]:
    """First fit, longest first."""
    rows: list[list[Sample]] = []
    free: list[int] = []
    for sample in sorted(samples, key=num_tokens, reverse=True):
        need = _padded_tokens(sample, multiple)
        index = next((i for i, room in enumerate(free) if room >= need), None)
        if index is None:
            rows.append([])
            free.append(capacity)
            index = len(rows) - 1
        rows[index].append(sample)
        free[index] -= need
    return rows


def block_causal_mask(sequence_of_RL: torch.Tensor) -> torch.Tensor:
    """Attention mask [R, 1, L, L], True = masked, under which a token sees itself and its own sequence's past.

    A padding token (-1) forms a sequence with the other padding of its row, so that no softmax row is empty.
    """
    same_RLL = sequence_of_RL[:, :, None] == sequence_of_RL[:, None, :]
    causal_LL = torch.ones(sequence_of_RL.shape[1:] * 2, dtype=torch.bool).tril()
    return ~(same_RLL & causal_LL)[:, None]


def _quarters(num_tokens: int) -> np.ndarray:
    return 4 * np.arange(num_tokens) // num_tokens


def _sequence_starts(sequence_of_RL: np.ndarray) -> torch.Tensor:
    is_start_RL = np.ones(sequence_of_RL.shape, bool)
    is_start_RL[:, 1:] = sequence_of_RL[:, 1:] != sequence_of_RL[:, :-1]
    return torch.from_numpy(np.append(np.flatnonzero(is_start_RL), sequence_of_RL.size).astype(np.int32))


def _signal_tensors(samples: Sequence[Sample]) -> TopKTensors | HiddenSignalTensors | None:
    """What the teacher said, with rows for what it did not say; None if it said nothing of any sample."""
    known = next((sample.signal for sample in samples if sample.signal is not None), None)
    rollouts = [sample.rollout for sample in samples]
    if isinstance(known, TopKSignal):
        topk = [s.signal if isinstance(s.signal, TopKSignal) else _no_topk(s.rollout, known) for s in samples]
        return TopKTensors(
            token_logprobs_T=_cat(rollouts, [s.token_logprobs for s in topk], np.float32),
            ids_TK=_cat(rollouts, [s.topk_ids for s in topk], np.int64),
            logprobs_TK=_cat(rollouts, [s.topk_logprobs for s in topk], np.float32),
            stop_logprobs_TS=_cat(rollouts, [s.stop_logprobs for s in topk], np.float32),
        )
    if isinstance(known, HiddenSignal):
        hidden = [s.signal if isinstance(s.signal, HiddenSignal) else _no_hidden(s.rollout, known) for s in samples]
        return HiddenSignalTensors(
            token_logprobs_T=_cat(rollouts, [s.token_logprobs for s in hidden], np.float32),
            hidden_TH=as_tensor(_cat_rows(rollouts, [s.hidden for s in hidden])),
        )
    return None


def _no_topk(rollout: Rollout, like: TopKSignal) -> TopKSignal:
    """Masked by ``is_scored_T``: any finite values do, and log-probs of -log(k + 1) keep them recognisable in a debugger."""
    length, num_top = len(rollout.response_ids), like.topk_ids.shape[1]
    return TopKSignal(
        token_logprobs=np.zeros(length, np.float32),
        topk_ids=np.tile(np.arange(num_top, dtype=np.int32), (length, 1)),
        topk_logprobs=np.full((length, num_top), -np.log(num_top + 1), np.float32),
        stop_logprobs=np.full((length, like.stop_logprobs.shape[1]), -30.0, np.float32),
    )


def _no_hidden(rollout: Rollout, like: HiddenSignal) -> HiddenSignal:
    """Masked likewise: of zeros an output layer makes an even distribution."""
    length = len(rollout.response_ids)
    return HiddenSignal(np.zeros(length, np.float32), np.zeros((length, like.hidden.shape[1]), like.hidden.dtype))


def as_tensor(hidden: npt.NDArray[Any]) -> torch.Tensor:
    """Hidden states as ``HiddenSignal`` holds them, in the dtype that they are; shares the array's memory."""
    tensor = torch.from_numpy(hidden)
    return tensor.view(torch.bfloat16) if hidden.dtype == np.uint16 else tensor


def _learnt(rollout: Rollout) -> np.ndarray:
    """Places in the response of the tokens that losses apply to."""
    return np.arange(len(rollout.response_ids)) if rollout.is_learnt is None else np.flatnonzero(rollout.is_learnt)


def _cat(rollouts: Sequence[Rollout], arrays: Sequence[npt.ArrayLike], dtype: type) -> torch.Tensor:
    """One row for each learnt token of the rollouts, from arrays with one for each response token."""
    return torch.from_numpy(_cat_rows(rollouts, [np.asarray(array, dtype) for array in arrays]))


def _cat_rows(rollouts: Sequence[Rollout], arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    pairs = zip(rollouts, arrays, strict=True)
    return np.concatenate([array[_learnt(rollout)] for rollout, array in pairs])


def _per_token(rollouts: Sequence[Rollout], values: Sequence[float], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.repeat(np.asarray(values, dtype), [rollout.num_learnt_tokens for rollout in rollouts]))
