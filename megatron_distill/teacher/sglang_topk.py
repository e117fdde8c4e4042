"""A teacher behind SGLang servers: top-k, sampled-token and stop-token log-probs of given responses."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from megatron_distill.sglang.client import SGLangClient
from megatron_distill.teacher.base import Teacher, TeacherContext
from megatron_distill.teacher.cache import SCORES, CachedTeacher, served_identity
from megatron_distill.types import Rollout, TopKSignal


def make_sglang_topk(context: TeacherContext) -> Teacher:
    """The run's teacher servers, behind the disk cache if the config names one."""
    config, client = context.config, context.client
    assert client is not None, "transport sglang_topk: the launcher should have started a teacher server"
    top_k = min(config.teacher.num_logprobs, client.vocab_size)
    teacher = SGLangTopKTeacher(client, top_k=top_k, stop_token_ids=context.stop_token_ids)
    if not config.teacher.cache_dir:
        return WithinVocabulary(teacher, context.vocab_size)
    cached = CachedTeacher(
        teacher,
        Path(config.teacher.cache_dir),
        SCORES,
        identity=served_identity(config),
        top_k=top_k,
        stop_token_ids=list(context.stop_token_ids),
    )
    return WithinVocabulary(cached, context.vocab_size)


class SGLangTopKTeacher:
    """Scores rollouts on the teacher's servers, which may name ids that the student does not have: see ``WithinVocabulary``."""

    def __init__(self, client: SGLangClient, *, top_k: int, stop_token_ids: Sequence[int]) -> None:
        """Wrap a client.

        Args:
            client: of the teacher's servers.
            top_k: log-probs per token, at most the vocabulary's size.
            stop_token_ids: tokens whose log-probs are always sent: they must be exact for their merged outcome to be.
        """
        self._client, self._top_k, self._stop_token_ids = client, top_k, tuple(stop_token_ids)

    def score(self, rollouts: Sequence[Rollout], /) -> list[TopKSignal | None]:
        """What the servers say of each rollout, or None where they said nothing."""
        sequences = [(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
        return self._client.score(sequences, top_k=self._top_k, stop_token_ids=self._stop_token_ids)


class WithinVocabulary:
    """A teacher of top-k signals for one student. Outside the cache, as students of other vocabularies read that too."""

    def __init__(self, inner: Teacher, vocab_size: int) -> None:
        """Wrap a teacher.

        Args:
            inner: says ``TopKSignal``s.
            vocab_size: tokens that student and teacher share; ids from there on are padding.
        """
        self._inner, self._vocab_size = inner, vocab_size

    def score(self, rollouts: Sequence[Rollout], /) -> list[TopKSignal | None]:
        """What the inner teacher says of the shared tokens of each rollout."""
        signals = cast(Sequence[TopKSignal | None], self._inner.score(rollouts))
        return [signal and within_vocabulary(signal, self._vocab_size) for signal in signals]

    def close(self) -> None:
        """Close the inner teacher."""
        close = getattr(self._inner, "close", None)
        if close is not None:
            close()


def within_vocabulary(signal: TopKSignal, vocab_size: int) -> TopKSignal:
    """Leave out ids that stand for no token: a model's vocabulary is padded, and its padding may be likely enough to be sent.

    Their mass is then in the tail.
    """
    is_token = signal.topk_ids < vocab_size
    return (
        signal if is_token.all() else replace(signal, topk_ids=np.where(is_token, signal.topk_ids, -1).astype(np.int32))
    )
