"""Where the columns of a vocabulary live on one tensor-parallel rank, and the one exchange that the losses need.

In: the local widths of the student's and the teacher's logits, the true vocabulary size, the stop-token groups, and the
process group. Out: a ``VocabShards``, which splits every rank's columns into

* the *core*: ordinary tokens whose student and teacher logits are both on this rank. Almost everything; it is summarised
  here, column by column, and only the summary travels.
* the *extras*: the few columns whose logits travel themselves, because one rank alone cannot turn them into a term of
  the loss: members of a stop-token group (their probabilities are summed first), and columns that land on different
  ranks for the two models when these are padded to different widths.
* padding, on any rank: at or above ``vocab_size``; it is never read and its gradient is zero.

After the exchange the extras form a handful of *outcomes*, the same on every rank, that enter the loss like one more
shard. Names to know: ``VocabShards``, ``vocab_shards``, ``start_exchange``.

Shape suffixes in this package: T tokens, V one rank's columns, C core columns, X extras, O outcomes made of extras,
S statistics of a shard, R tensor-parallel ranks, K ids chosen per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.errors import LossError

StopTokenGroups = Sequence[Sequence[int]]


@dataclass(frozen=True)
class LocalColumns:
    """The columns that one rank holds of one model: a core, and some of the extras.

    Args:
        core: slice of the rank's columns that form the core.
        columns: ``[n]`` int64, local columns of the extras held here.
        places: ``[n]`` int64, where each of them stands among all X extras.
    """

    core: slice
    columns: Tensor
    places: Tensor


@dataclass(frozen=True)
class VocabShards:
    """One rank's view of the vocabulary of a student and a teacher (see the module's docstring).

    Args:
        student, teacher: what this rank holds of either model.
        core_excluded: ``[C]`` bool, core columns that are counted as extras instead; None when there are none.
        num_extras: X, the columns that travel.
        num_single: the first ``num_single`` extras are outcomes of their own.
        group_bounds: ``(start, stop)`` among the extras of each stop-token group; each is one outcome.
        outcome_of_extra: ``[X]`` int64, the outcome that each extra belongs to.
    """

    student: LocalColumns
    teacher: LocalColumns
    core_excluded: Tensor | None
    num_extras: int
    num_single: int
    group_bounds: tuple[tuple[int, int], ...]
    outcome_of_extra: Tensor

    @property
    def num_outcomes(self) -> int:
        """O, the outcomes that the extras form."""
        return self.num_single + len(self.group_bounds)

    def extras(self, logits_TV: Tensor, held: LocalColumns, inverse_temperature: float, dtype: torch.dtype) -> Tensor:
        """This rank's share of the extras' logits, ``[T, X]``: zero where another rank holds the column."""
        extras_TX = torch.zeros(logits_TV.shape[0], self.num_extras, dtype=dtype, device=logits_TV.device)
        if held.columns.numel():
            extras_TX[:, held.places] = logits_TV[:, held.columns].to(dtype) * inverse_temperature
        return extras_TX

    def outcomes(self, extras_TX: Tensor) -> Tensor:
        """Logits of the outcomes, ``[T, O]``: an extra on its own, or the log-sum-exp over a stop-token group."""
        merged = [torch.logsumexp(extras_TX[:, start:stop], dim=1, keepdim=True) for start, stop in self.group_bounds]
        return torch.cat([extras_TX[:, : self.num_single], *merged], dim=1)


def check_stop_token_groups(groups: StopTokenGroups | None, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """The groups as nested tuples.

    Raises:
        LossError: a group is empty, an id stands in two groups or twice in one, or lies outside the vocabulary.
    """
    checked = tuple(tuple(int(token) for token in group) for group in groups or ())
    members = [token for group in checked for token in group]
    if not all(checked):
        raise LossError(f"stop_token_groups = {checked}: a group must have members. Leave the empty group out.")
    if len(set(members)) != len(members):
        raise LossError(
            f"stop_token_groups = {checked}: a token may stand in one group only, once. Its probability would be "
            "counted twice. Merge the groups that share it."
        )
    if any(not 0 <= token < vocab_size for token in members):
        raise LossError(
            f"stop_token_groups = {checked}: ids must lie in [0, {vocab_size}), the vocabulary. Take the ids from the "
            "tokenizer of this student."
        )
    return checked


def resolve_vocab_size(vocab_size: int | None, padded: dict[str, int]) -> int:
    """The true vocabulary size: as given, or the models' common padded size.

    Args:
        vocab_size: tokens that exist, or None.
        padded: name of each model -> its padded size over all ranks.

    Raises:
        LossError: the sizes differ and none was given, or the given one exceeds a model's.
    """
    text = ", ".join(f"{name} {size}" for name, size in padded.items())
    if vocab_size is None:
        if len(set(padded.values())) > 1:
            raise LossError(
                f"vocab_size = None: the padded sizes differ ({text}). Without the true size, padding would be read as "
                "tokens. Pass vocab_size=len(tokenizer)."
            )
        return next(iter(padded.values()))
    if not 0 < vocab_size <= min(padded.values()):
        raise LossError(
            f"vocab_size = {vocab_size}: must be positive and at most every model's padded size ({text}). A token "
            "without a column has no logit. Pass the size of the tokenizer that both models share."
        )
    return vocab_size


def vocab_shards(
    student_width: int,
    teacher_width: int,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int | None,
    stop_token_groups: StopTokenGroups | None,
    device: torch.device,
) -> VocabShards:
    """Plan the columns of this rank.

    Args:
        student_width, teacher_width: columns of the two models on every rank, padding included.
        tp_group: the tensor-parallel group, or None for one rank.
        vocab_size: tokens that exist; None when neither model is padded.
        stop_token_groups: groups of ids that are one action.
        device: where the index tensors go.

    Raises:
        LossError: see ``resolve_vocab_size`` and ``check_stop_token_groups``.
    """
    size = tp_group.size() if tp_group is not None else 1
    rank = tp_group.rank() if tp_group is not None else 0
    true_size = resolve_vocab_size(vocab_size, {"student": student_width * size, "teacher": teacher_width * size})
    groups = check_stop_token_groups(stop_token_groups, true_size)
    return _plan(student_width, teacher_width, size, rank, true_size, groups, device)


@lru_cache(maxsize=64)  # Built once a run: the index tensors are copied to the device, which would stall it every step.
def _plan(
    student_width: int,
    teacher_width: int,
    size: int,
    rank: int,
    vocab_size: int,
    groups: tuple[tuple[int, ...], ...],
    device: torch.device,
) -> VocabShards:
    def held_by(width: int, of_rank: int) -> range:
        return range(min(of_rank * width, vocab_size), min((of_rank + 1) * width, vocab_size))

    def core_of(of_rank: int) -> range:
        ours, theirs = held_by(student_width, of_rank), held_by(teacher_width, of_rank)
        start = max(ours.start, theirs.start)
        return range(start, max(start, min(ours.stop, theirs.stop)))

    members = [token for group in groups for token in group]
    grouped = set(members)
    single = [
        token
        for of_rank in range(size)
        for edge in _outside(held_by(student_width, of_rank), core_of(of_rank))
        for token in edge
        if token not in grouped
    ]
    extras = single + members
    bounds, start = [], len(single)
    for group in groups:
        bounds.append((start, start + len(group)))
        start += len(group)
    owners = list(range(len(single))) + [len(single) + i for i, group in enumerate(groups) for _ in group]
    core = core_of(rank)

    def local(width: int) -> LocalColumns:
        held = held_by(width, rank)
        places = [place for place, token in enumerate(extras) if token in held]
        columns = [extras[place] - rank * width for place in places]
        return LocalColumns(
            slice(core.start - rank * width, core.stop - rank * width) if len(core) else slice(0, 0),
            torch.tensor(columns, dtype=torch.int64, device=device),
            torch.tensor(places, dtype=torch.int64, device=device),
        )

    excluded = [token - core.start for token in members if token in core]
    core_excluded = None
    if excluded:
        core_excluded = torch.zeros(len(core), dtype=torch.bool, device=device)
        core_excluded[torch.tensor(excluded, device=device)] = True
    return VocabShards(
        student=local(student_width),
        teacher=local(teacher_width),
        core_excluded=core_excluded,
        num_extras=len(extras),
        num_single=len(single),
        group_bounds=tuple(bounds),
        outcome_of_extra=torch.tensor(owners, dtype=torch.int64, device=device),
    )


def _outside(held: range, core: range) -> tuple[range, range]:
    """The columns of ``held`` before and after ``core``."""
    if not len(core):
        return held, range(0)
    return range(held.start, core.start), range(core.stop, held.stop)


class Exchange:
    """An exchange under way: ``wait`` for what every rank then holds."""

    def __init__(self, packed: Tensor, num_stats: int, size: int, work: dist.Work | None) -> None:
        self._packed, self._num_stats, self._size, self._work = packed, num_stats, size, work

    def wait(self) -> tuple[Tensor, Tensor]:
        """``[R, T, S]`` statistics and ``[T, X]`` columns, the same on every rank."""
        if self._work is not None:
            self._work.wait()
        slots = self._size * self._num_stats
        stats_TRS = self._packed[:, :slots].view(self._packed.shape[0], self._size, self._num_stats)
        return stats_TRS.transpose(0, 1), self._packed[:, slots:]


def start_exchange(stats_TS: Tensor, columns_TX: Tensor, tp_group: dist.ProcessGroup | None) -> Exchange:
    """Start to give every rank all ranks' statistics and all travelling columns, in one collective.

    A sum over ranks in which every rank fills its own slot (and only its own columns) is a gather that also assembles
    the columns, whoever holds them. Adding zeros is exact, infinities and NaN included.

    Args:
        stats_TS: ``[T, S]``, this rank's statistics.
        columns_TX: ``[T, X]``, zero where another rank holds the column.
        tp_group: the tensor-parallel group, or None for one rank (no collective).
    """
    num_tokens, num_stats = stats_TS.shape
    size = tp_group.size() if tp_group is not None else 1
    if tp_group is None or size == 1:
        return Exchange(torch.cat([stats_TS, columns_TX], dim=1), num_stats, 1, None)
    slots = size * num_stats
    packed = stats_TS.new_zeros(num_tokens, slots + columns_TX.shape[1])
    packed[:, tp_group.rank() * num_stats : (tp_group.rank() + 1) * num_stats] = stats_TS
    packed[:, slots:] = columns_TX
    return Exchange(packed, num_stats, size, dist.all_reduce(packed, group=tp_group, async_op=True))


def exchange(stats_TS: Tensor, columns_TX: Tensor, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """``start_exchange``, waited for."""
    return start_exchange(stats_TS, columns_TX, tp_group).wait()
