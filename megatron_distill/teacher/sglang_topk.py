"""A teacher behind SGLang servers: top-k, sampled-token and stop-token log-probs of given responses."""

from collections.abc import Sequence

from megatron_distill.sglang.client import SGLangClient
from megatron_distill.types import Rollout, TeacherScores


class SGLangTopKTeacher:
    """Scores rollouts on the teacher's servers; see ``rollouts.Teacher``."""

    def __init__(self, client: SGLangClient, *, top_k: int, stop_token_ids: Sequence[int]) -> None:
        """Wrap a client.

        Args:
            client: of the teacher's servers.
            top_k: log-probs per token, at most the vocabulary's size.
            stop_token_ids: tokens whose log-probs are always sent: they must be exact for their merged outcome to be.
        """
        self._client = client
        self._top_k = min(top_k, client.vocab_size)
        self._stop_token_ids = tuple(stop_token_ids)

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores | None]:
        """Scores of each rollout, or None where the servers gave none."""
        sequences = [(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
        return self._client.score(sequences, top_k=self._top_k, stop_token_ids=self._stop_token_ids)
