"""Made-up samples of every kind, which are a function of the step alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_distill.rollouts.batches import MicroBatch, pack_micro_batch
from megatron_distill.rollouts.dealing import by_count, num_tokens
from megatron_distill.types import HiddenSignal, Rollout, Sample, TopKSignal

STOP_TOKEN_IDS = (0, 1)


def make_samples(step: int, count: int, vocab_size: int, *, top_k: int | None = None) -> list[Sample]:
    """Random prompts, two responses to each, and teacher scores: the same for the same step.

    Every fourth response is the teacher's and every fifth has no score; the third is one step old.

    Args:
        step: that the samples are for, 0-based.
        count: of samples.
        vocab_size: of the tokens drawn, stop tokens included.
        top_k: tokens of the teacher's distribution that are kept; None for all.
    """
    rng = np.random.default_rng([7, step])
    samples = []
    for index in range(count):
        response = rng.integers(0, vocab_size, rng.integers(1, 16)).tolist()
        logits_RV = rng.normal(size=(len(response), vocab_size)) * 2
        logprobs_RV = (logits_RV - np.log(np.exp(logits_RV).sum(1, keepdims=True))).astype(np.float32)
        ids_RK = np.argsort(-logprobs_RV, axis=1)[:, :top_k].astype(np.int32)
        by_teacher, version = index % 4 == 3, max(step - (index == 2), 0)
        rollout = Rollout(
            prompt_index=index // 2,
            prompt_ids=rng.integers(0, vocab_size, rng.integers(1, 9)).tolist(),
            response_ids=response,
            sampler_logprobs=rng.normal(-1, 0.3, len(response)).astype(np.float32),
            author="teacher" if by_teacher else "student",
            oldest_version=0 if by_teacher else version,
            newest_version=0 if by_teacher else step,
            stop_reason="stop",
        )
        signal = TopKSignal(
            token_logprobs=np.take_along_axis(logprobs_RV, np.array(response)[:, None], 1)[:, 0],
            topk_ids=ids_RK,
            topk_logprobs=np.take_along_axis(logprobs_RV, ids_RK, 1),
            stop_logprobs=logprobs_RV[:, list(STOP_TOKEN_IDS)],
        )
        samples.append(Sample(rollout, None if index % 5 == 4 else signal, advantage=float(rng.normal())))
    return samples


def with_hidden_states(samples: Sequence[Sample], path: str | Path) -> list[Sample]:
    """The same samples, each with what transformers' model in ``path`` gives its output layer, as a server would send it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    scored = []
    for sample in samples:
        prompt, response = sample.rollout.prompt_ids, sample.rollout.response_ids
        with torch.no_grad():
            hidden_RH = model.model(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
            logprobs_RV = torch.log_softmax(model.lm_head(hidden_RH), dim=-1)
        token_logprobs = logprobs_RV[torch.arange(len(response)), response].numpy()
        scored.append(replace(sample, signal=HiddenSignal(token_logprobs, hidden_RH.numpy().copy())))
    return scored


def build_micro_batches(samples: Sequence[Sample], rollouts: int, **how: Any) -> list[MicroBatch]:
    """Micro-batches of ``rollouts`` samples each, dealt as a run's are; ``how`` is ``pack_micro_batch``'s."""
    hands = by_count([num_tokens(sample) for sample in samples], rollouts)
    return [pack_micro_batch([samples[place] for place in hand], **how) for hand in hands]
