"""A teacher behind SGLang servers that says everything: the last hidden states of given responses.

The trainer's ranks hold the teacher's output layer beside the student's (``megatron.teacher_head``), and so know its whole
distribution at every token: the loss of a teacher in the trainer, from one that is served.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_distill.sglang.client import SGLangClient
from megatron_distill.teacher.base import Teacher, TeacherContext
from megatron_distill.teacher.cache import HIDDEN, CachedTeacher, served_identity
from megatron_distill.types import HiddenSignal, Rollout


def make_sglang_hidden(context: TeacherContext) -> Teacher:
    """The run's teacher servers, behind the disk cache if the config names one."""
    config, client = context.config, context.client
    assert client is not None, "transport sglang_hidden: the launcher should have started a teacher server"
    teacher = SGLangHiddenTeacher(client)
    if not config.teacher.cache_dir:
        return teacher
    identity = served_identity(config)
    return CachedTeacher(teacher, Path(config.teacher.cache_dir), HIDDEN, identity=identity)


class SGLangHiddenTeacher:
    """Asks the teacher's servers for hidden states."""

    def __init__(self, client: SGLangClient) -> None:
        """Wrap a client of the teacher's servers."""
        self._client = client

    def score(self, rollouts: Sequence[Rollout], /) -> list[HiddenSignal | None]:
        """What the servers say of each rollout, or None where they said nothing."""
        return self._client.hidden_states([(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts])
