"""What a teacher is: something that says how likely each next token was along a finished response.

    transport       runs                          says              its loss
    sglang_topk     on SGLang servers             ``TopKSignal``    KL over k outcomes and a tail
    sglang_hidden   on SGLang servers             ``HiddenSignal``  over the vocabulary (``megatron.teacher_head``)
    in_process      in the trainer, as Megatron   logits [T, V/tp]  over the vocabulary (``megatron.in_process_teacher``)
    sglang_urls     on servers that run already   ``TopKSignal``    as sglang_topk; several, one for each kind of problem
    a function      wherever it likes             ``TopKSignal``    as sglang_topk

``teacher.transport`` names one: a built-in, or ``path/to/file.py:function``, which is called once on each replica's leader
with a ``TeacherContext`` and returns a ``Teacher``. Whatever it returns is asked from several threads, a rollout at a time,
as soon as a response has ended.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_distill.config import RunConfig
from megatron_distill.sglang.client import SGLangClient
from megatron_distill.types import Problem, Rollout, Signal


class Teacher(Protocol):
    """Scores given responses. What it could not score is None, never zeros: it is masked, counted, and bounded."""

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Signal | None]:
        """One signal for each rollout, in order, of one kind and with the same K and S, or H, for all."""


@dataclass(frozen=True)
class TeacherContext:
    """What a transport may build on.

    Attributes:
        config: the run's, as config.json holds it.
        problems: the training problems; ``Rollout.prompt_index`` counts in them.
        vocab_size: ids that student and teacher share.
        stop_token_ids: S tokens whose log-probs a signal always holds, in this order.
        client: of the teacher's servers; None if the run starts none.
    """

    config: RunConfig
    problems: Sequence[Problem]
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    client: SGLangClient | None


MakeTeacher = Callable[[TeacherContext], Teacher]
"""A transport: how the teacher of a run is made."""
