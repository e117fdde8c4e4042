"""A teacher that sees another prompt than the student: a worked solution, a hint, feedback.

In: any teacher that is asked from outside the trainer, and its own prompt for each training problem. Out: a ``Teacher`` that
puts the student's response behind it. With ``teacher.path`` the student's own model this is self-distillation: the student
learns to answer without the context as it would with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from megatron_distill.config import RunConfig
from megatron_distill.config.loading import load_function
from megatron_distill.errors import ConfigError
from megatron_distill.teacher.base import Teacher
from megatron_distill.types import Problem, Rollout, Signal


class PrivilegedTeacher:
    """Scores each response behind the teacher's own prompt."""

    def __init__(self, inner: Teacher, prompts: Sequence[Sequence[int]]) -> None:
        """Wrap a teacher.

        Args:
            inner: who is asked.
            prompts: token ids of the teacher's prompt of each training problem.
        """
        self._inner, self._prompts = inner, prompts

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Signal | None]:
        """As the inner teacher scores the same responses behind the other prompts."""
        return self._inner.score(
            [replace(rollout, prompt_ids=list(self._prompts[rollout.prompt_index])) for rollout in rollouts]
        )

    def close(self) -> None:
        """Close the inner teacher."""
        close = getattr(self._inner, "close", None)
        if close is not None:
            close()


def teacher_prompts(config: RunConfig, problems: Sequence[Problem], tokenizer: Any) -> list[list[int]] | None:
    """What the teacher sees of each problem, as token ids; None where it sees what the student does.

    Raises:
        ConfigError: ``teacher.prompt_builder`` stands for nothing, fails, or makes no prompt or too long a one.
    """
    where = f"teacher.prompt_builder = {config.teacher.prompt_builder}"
    if config.teacher.prompt_builder == "same":
        return None
    none_built_in: dict[str, Callable[[Any, Problem], list[int]]] = {}
    build = load_function(
        config.teacher.prompt_builder, none_built_in, "teacher.prompt_builder", ("tokenizer", "problem")
    )
    longest = config.teacher.max_prompt_tokens or config.data.max_prompt_tokens
    prompts = []
    for problem in problems:
        try:
            ids = build(tokenizer, problem)
        except Exception as error:  # a user's function
            raise ConfigError(
                f"{where}: raised {type(error).__name__}: {error}, at problem {problem.id!r}. Mend the function."
            ) from error
        if not (isinstance(ids, list) and ids and all(isinstance(one, int) for one in ids)):
            raise ConfigError(
                f"{where}: must return a non-empty list of token ids, and returned {str(ids)[:80]!r} for problem "
                f"{problem.id!r}. Mend the function."
            )
        if len(ids) > longest:
            raise ConfigError(
                f"teacher.max_prompt_tokens = {config.teacher.max_prompt_tokens}: the teacher's prompt of problem "
                f"{problem.id!r} has {len(ids)} tokens, and {longest} are allowed. Raise it."
            )
        prompts.append(ids)
    return prompts
