"""Teachers that run already: SGLang servers at given addresses; a column of the data says which of them a problem belongs to.

In: ``teacher.urls``, ``teacher.column``, the key in an environment variable. Out: a ``Teacher`` that asks the right one.
docs/extending.md tells how such a server is started.
"""

import os
from collections.abc import Mapping, Sequence

from megatron_distill.config import RunConfig
from megatron_distill.errors import ConfigError
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.sglang.client import SGLangClient
from megatron_distill.teacher.base import Teacher, TeacherContext
from megatron_distill.teacher.sglang_topk import SGLangTopKTeacher, WithinVocabulary
from megatron_distill.types import Problem, Rollout, TopKSignal


def make_sglang_urls(context: TeacherContext) -> Teacher:
    """A teacher with a client for each of ``teacher.urls``, which knows which of them scores a problem."""
    config = context.config
    problems = problems_of_urls(config, context.problems)
    if problems:
        raise ConfigError("\n".join(problems))
    vocab_size = HfConfig.from_dir(config.teacher.path).vocab_size
    clients = {
        name: SGLangClient(
            [url],
            vocab_size=vocab_size,
            context_length=config.server_context_tokens,
            num_connections=config.servers.requests_per_replica,
            key=os.environ.get(config.teacher.key_variable, "") if config.teacher.key_variable else "",
            timeout_s=config.servers.request_timeout_s,
            unreachable_s=config.servers.hang_timeout_s,
        )
        for name, url in config.teacher.urls.items()
    }
    names = [name_of(config, problem) for problem in context.problems]
    top_k = min(config.teacher.num_logprobs, vocab_size)
    return RoutedTeacher(
        clients, names, top_k=top_k, stop_token_ids=context.stop_token_ids, vocab_size=context.vocab_size
    )


class RoutedTeacher:
    """Asks, for each rollout, the teacher of its problem."""

    def __init__(
        self,
        clients: Mapping[str, SGLangClient],
        names: Sequence[str],
        *,
        top_k: int,
        stop_token_ids: Sequence[int],
        vocab_size: int,
    ) -> None:
        """Remember who is whose.

        Args:
            clients: by name.
            names: of each training problem's teacher.
            top_k: log-probs a token.
            stop_token_ids: tokens whose log-probs are always sent.
            vocab_size: tokens that student and teachers share.
        """
        self._clients, self._names = clients, names
        self._teachers = {
            name: WithinVocabulary(SGLangTopKTeacher(client, top_k=top_k, stop_token_ids=stop_token_ids), vocab_size)
            for name, client in clients.items()
        }

    def score(self, rollouts: Sequence[Rollout], /) -> list[TopKSignal | None]:
        """What each rollout's teacher says of it, or None where it said nothing."""
        signals: list[TopKSignal | None] = [None] * len(rollouts)
        for name, teacher in self._teachers.items():
            places = [i for i, rollout in enumerate(rollouts) if self._names[rollout.prompt_index] == name]
            for place, signal in zip(places, teacher.score([rollouts[i] for i in places]), strict=True):
                signals[place] = signal
        return signals

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()


def name_of(config: RunConfig, problem: Problem) -> str:
    """The name, among ``teacher.urls``, of the teacher of a problem."""
    if not config.teacher.column:
        return next(iter(config.teacher.urls))
    return str(problem.columns.get(config.teacher.column, ""))


def problems_of_urls(config: RunConfig, problems: Sequence[Problem]) -> list[str]:
    """What keeps the teachers from being asked: no key, or problems that are nobody's. Empty if nothing does."""
    found = []
    teacher = config.teacher
    if teacher.key_variable and teacher.key_variable not in os.environ:
        found.append(
            f"teacher.key_variable = {teacher.key_variable}: no such environment variable here. Export it, with the key in it."
        )
    nobodys = next((problem for problem in problems if name_of(config, problem) not in teacher.urls), None)
    if nobodys is not None:
        found.append(
            f"teacher.column = {teacher.column!r}: problem {nobodys.id!r} has {nobodys.columns.get(teacher.column)!r} there, "
            f"which is none of teacher.urls ({', '.join(teacher.urls)}). Add its server, or leave such rows out by data.filter."
        )
    return found
