"""Teachers: who says how likely each next token is, how that reaches the loss, and a cache of what was said.

``base`` tells what a teacher is; a transport is a file of its own and a line in ``TRANSPORTS``.
"""

from megatron_distill.teacher.base import MakeTeacher, Teacher, TeacherContext
from megatron_distill.teacher.cache import CachedSampler, CachedTeacher, served_identity, teacher_identity
from megatron_distill.teacher.privileged import PrivilegedTeacher, teacher_prompts
from megatron_distill.teacher.sglang_hidden import SGLangHiddenTeacher, make_sglang_hidden
from megatron_distill.teacher.sglang_topk import SGLangTopKTeacher, WithinVocabulary, make_sglang_topk
from megatron_distill.teacher.sglang_urls import make_sglang_urls, problems_of_urls

TRANSPORTS: dict[str, MakeTeacher] = {
    "sglang_topk": make_sglang_topk,
    "sglang_hidden": make_sglang_hidden,
    "sglang_urls": make_sglang_urls,
}
"""Transports that ask somebody outside the trainer; ``in_process`` is made in ``megatron.session``."""

__all__ = [
    "TRANSPORTS",
    "CachedSampler",
    "CachedTeacher",
    "MakeTeacher",
    "PrivilegedTeacher",
    "SGLangHiddenTeacher",
    "SGLangTopKTeacher",
    "Teacher",
    "TeacherContext",
    "WithinVocabulary",
    "make_sglang_hidden",
    "make_sglang_topk",
    "make_sglang_urls",
    "problems_of_urls",
    "served_identity",
    "teacher_identity",
    "teacher_prompts",
]
