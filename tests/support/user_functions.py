"""What a user may put into a file of their own: one function for every seam, tried together by ``test_seams.py``."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_distill.config import RunConfig
from megatron_distill.evaluate.sets import EvaluationSet
from megatron_distill.rewards.base import Answered
from megatron_distill.rollouts.environment import Episode, Turns, join
from megatron_distill.rollouts.source import RolloutSource, SourceContext
from megatron_distill.rollouts.streamed import StreamedSource
from megatron_distill.teacher import SGLangTopKTeacher, Teacher, TeacherContext, WithinVocabulary
from megatron_distill.training.components import ComponentLoss, LossContext, masked_sum
from megatron_distill.types import Problem, Sample


def is_even(answered: Sequence[Answered], /) -> list[float]:
    """A reward: whether a response has an even number of tokens."""
    return [float(len(one.response_ids) % 2 == 0) for one in answered]


class Confidence:
    """A component: the square of the student's log-prob of each response token, over all of them."""

    name, weight, learns_logprobs = "confidence", 0.01, True

    def count(self, samples: Sequence[Sample], scored_in_trainer: bool) -> float:
        return sum(sample.rollout.num_learnt_tokens for sample in samples)

    def loss(self, context: LossContext) -> ComponentLoss:
        squared_T = context.student.logprobs**2
        every_T = torch.ones_like(squared_T, dtype=torch.bool)
        return ComponentLoss(squared_T.sum(), {"confidence.squared_nats": masked_sum(squared_T, every_T)})


def confidence(config: RunConfig) -> Confidence:
    """The component, whatever the config."""
    return Confidence()


def four_likeliest(context: TeacherContext) -> Teacher:
    """A teacher: the run's servers, asked for four tokens only."""
    assert context.client is not None
    teacher = SGLangTopKTeacher(context.client, top_k=4, stop_token_ids=context.stop_token_ids)
    return WithinVocabulary(teacher, context.vocab_size)


def think_twice(problem: Problem, prompt_ids: list[int], turns: Turns, /) -> Episode:
    """An environment: a short first try, its own first token once more, and the rest."""
    first = turns.generate(prompt_ids)
    hint = first.response_ids[:1]
    so_far = [*prompt_ids, *first.response_ids, *hint]
    return join([first, hint, turns.generate(so_far)]) if turns.room(so_far) > 0 else join([first])


def as_built_in(context: SourceContext) -> RolloutSource:
    """A source: the built-in one."""
    return StreamedSource(context)


def bare(tokenizer: Any, problem: Problem, /) -> list[int]:
    """A prompt builder: the question without a chat template."""
    return list(tokenizer.encode(problem.messages[-1].content, add_special_tokens=False))


def first_four(config: RunConfig) -> EvaluationSet:
    """An evaluation set: four of the held-out problems, at every step, greedily."""
    settings = replace(config.evaluation, num_problems=4, samples_per_problem=1, temperature=0.0, every_steps=1)
    return EvaluationSet("first-four", config.data.heldout_path, config.data, settings)
