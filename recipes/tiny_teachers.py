"""The quickstart under other teachers: the student itself, told the answer; and servers that run already.

megatron-distill train tiny_teachers.self_distillation
megatron-distill train tiny_teachers.at_url 'teacher.urls={"teacher": "http://HOST:PORT"}' teacher.key_variable=TEACHER_KEY
"""

from dataclasses import replace
from typing import Any

from megatron_distill.recipes import tiny

from megatron_distill.config import RunConfig
from megatron_distill.rollouts.prompts import encode_prompt
from megatron_distill.types import Problem


def self_distillation() -> RunConfig:
    """The student imitates itself as it writes with the answer before its eyes: no larger model."""
    base = tiny.quickstart()
    teacher = replace(
        base.teacher, path=base.student.path, prompt_builder=f"{__file__}:with_answer", max_prompt_tokens=160
    )
    return replace(base, name="self-distillation", teacher=teacher)


def with_answer(tokenizer: Any, problem: Problem) -> list[int]:
    """The problem with its answer under it: what only the teacher sees."""
    last = problem.messages[-1]
    told = replace(last, content=f"{last.content}\n{problem.answer}")
    return encode_prompt(tokenizer, replace(problem, messages=(*problem.messages[:-1], told)))


def at_url() -> RunConfig:
    """A teacher that runs already: the run starts servers for the student only."""
    base = tiny.quickstart()
    teacher = replace(base.teacher, transport="sglang_urls", urls={"teacher": "http://127.0.0.1:30000"})
    return replace(base, name="at-url", teacher=teacher)
