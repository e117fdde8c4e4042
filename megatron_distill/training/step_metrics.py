"""One line of ``metrics.jsonl`` a step: what all ranks measured, added up, and written by one of them."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from megatron_distill.runs.metrics import add_sums, check_declared, means
from megatron_distill.runs.run_folder import RunFolder, append
from megatron_distill.training.feed import Prepared
from megatron_distill.training.objective import StepSums
from megatron_distill.training.ranks import Ranks


class StepMetrics:
    """Adds up a step's metrics over the ranks; the reporter writes them."""

    def __init__(
        self,
        folder: RunFolder,
        ranks: Ranks,
        step_sums: StepSums,
        scalars: Callable[[], dict[str, float]],
        expert_tokens: Callable[[], dict[int, list[int]]],
    ) -> None:
        """Write nothing yet.

        Args:
            folder: where the run is recorded.
            ranks: this rank's place.
            step_sums: where the forward steps leave their metrics.
            scalars: what Megatron logged of the step.
            expert_tokens: {layer: tokens of each expert} of the step on this rank.
        """
        self._folder, self._ranks, self._step_sums, self._scalars = folder, ranks, step_sums, scalars
        self._expert_tokens = expert_tokens
        self._began = time.perf_counter()

    def step_begins(self) -> None:
        """The clock of the step starts, its rollouts included."""
        self._began = time.perf_counter()

    def write(self, step: int, horizon_tokens: int, prepared: Prepared, seconds: dict[str, float]) -> None:
        """Append the line of a step that has been trained. Collective.

        Args:
            step: 1-based.
            horizon_tokens: cap on its responses.
            prepared: what was known of it before it trained.
            seconds: of each of its phases on this rank; the slowest rank's count.
        """
        own = self._step_sums.take()
        every = self._ranks.gather((own if self._ranks.speaks else {}, seconds, self._expert_tokens()))
        if not self._ranks.is_reporter:
            return
        record = {"step": float(step)} | means(add_sums(sums for sums, _, _ in every)) | means(prepared.sums)
        record |= {"horizon_tokens": float(horizon_tokens)} | self._scalars()
        record |= {name: max(others.get(name, 0.0) for _, others, _ in every) for name in seconds}
        record |= expert_load(tokens for _, _, tokens in every)
        record["step_s"] = time.perf_counter() - self._began
        record["tokens_per_s"] = prepared.sums["response_tokens"][0] / record["step_s"]
        check_declared(record)
        append(self._folder.metrics, record)


def expert_load(counted: Iterable[Mapping[int, Sequence[int]]]) -> dict[str, float]:
    """The metrics of a mixture of experts.

    Args:
        counted: of every rank, {layer: tokens of each expert}; layers may be missing.

    Returns:
        Nothing if there are no experts.
    """
    totals: dict[int, list[int]] = {}
    for layers in counted:
        for layer, tokens in layers.items():
            totals[layer] = [a + b for a, b in zip(totals.get(layer, [0] * len(tokens)), tokens, strict=True)]
    busy = [tokens for tokens in totals.values() if any(tokens)]
    if not busy:
        return {}
    return {
        "expert_load_max": sum(max(tokens) * len(tokens) / sum(tokens) for tokens in busy) / len(busy),
        "expert_idle_frac": sum(tokens.count(0) / len(tokens) for tokens in busy) / len(busy),
    }
