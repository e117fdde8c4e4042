"""The data's own worked solutions as responses: checked, encoded, cut. They are what the author ``data`` writes.

In: problems with a ``solution``. Out: ``Episode``s that nobody drew, all of whose tokens are learnt.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_distill.config import DataConfig
from megatron_distill.errors import DataError
from megatron_distill.rollouts.environment import Episode
from megatron_distill.types import Problem


def check_solutions(problems: Sequence[Problem], data: DataConfig) -> None:
    """Refuse problems without a solution, if the data is to write.

    Raises:
        DataError: naming how many there are, and the first.
    """
    unsolved = [problem.id for problem in problems if problem.solution is None]
    if unsolved:
        raise DataError(
            f"rollouts.off_policy_source = 'data': {len(unsolved)} training problems have no "
            f"{data.solution_key!r}, the first is {unsolved[0]!r}. Name the column in data.solution_key, or set "
            "rollouts.off_policy_source=teacher."
        )


def encode_solution(problem: Problem, tokenizer: Any, stop_token_id: int) -> list[int]:
    """A problem's worked response as token ids, ended by a stop token."""
    return [*tokenizer.encode(str(problem.solution), add_special_tokens=False), stop_token_id]


def cut_solution(solution: Sequence[int], horizon_tokens: int) -> Episode:
    """A solution, cut at the horizon. Nobody drew it, so it has no log-probs."""
    response = list(solution[:horizon_tokens])
    return Episode(
        response_ids=response,
        sampler_logprobs=np.full(len(response), np.nan, np.float32),
        is_learnt=None,
        stop_reason="stop" if len(response) == len(solution) else "length",
        version_spans=(),
    )
