"""The loss from hidden states, chunk by chunk: equal to the objective over whole logits, which never exist."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import head as head_benchmark
from megatron_distill.config import DistillConfig, RlConfig, SftConfig
from megatron_distill.errors import LossError
from megatron_distill.rollouts.batches import MicroBatch
from megatron_distill.training.chunked_head import ChunkedHead, HiddenTensors
from megatron_distill.training.components import (
    Component,
    ComponentLoss,
    Distill,
    LogitTensors,
    LossContext,
    PolicyGradient,
    Sft,
    Shards,
    StepPlan,
    masked_sum,
)
from megatron_distill.training.objective import LossReport, Objective
from tests.support.dense import kl
from tests.support.rank_pool import RankPool
from tests.support.samples import STOP_TOKEN_IDS, build_micro_batches, make_samples

V, WIDTH, STEP, H, H_TEACHER = 21, 6, 3, 5, 7  # 4 ranks of 6 columns: the last 3 are padding
UPSTREAM = 0.7
CHUNKS = (7, 10_000)
SFT, RL = Sft(SftConfig(weight=0.5)), PolicyGradient(RlConfig(weight=0.3, reference_kl_coef=0.1))


@dataclass(frozen=True)
class Case:
    """Components, and whether the teacher is in the trainer."""

    distill: dict[str, Any]
    in_trainer: bool = True
    w: float = 0.3
    beside: tuple[Component, ...] = ()

    @property
    def parts(self) -> list[Component]:
        return [Distill(DistillConfig(**self.distill), "bucket", num_logprobs=4), *self.beside]


CASES = {
    "kl": Case({}),
    "forward kl": Case({}, w=0.0),
    "tempered reverse kl": Case({"temperature": 2.0}, w=1.0),
    "top-k": Case({}, in_trainer=False),
    "kl by sequence": Case({"normalisation": "sequence"}),
    "jsd": Case({"divergence": "jsd"}),
    "skew": Case({"divergence": "skew_kl"}, w=1.0),
    "student's support": Case({"support": "student"}),
    "sampled": Case({"estimator": "k3"}, w=0.0),
    "with cross entropy and rl": Case({}, beside=(SFT, RL)),
    "top-k with rl": Case({}, in_trainer=False, beside=(RL,)),
}


def micro_batch(in_trainer: bool) -> MicroBatch:
    """Samples of every kind, which weigh differently; a fifth has no score, unless the teacher is in the trainer."""
    samples = [
        replace(sample, policy_weight=(sample.rollout.author == "student") * (1 + 0.1 * number))
        for number, sample in enumerate(make_samples(STEP, 10, V, top_k=6))
    ]
    return build_micro_batches(samples, 10, step=STEP, scored_in_trainer=in_trainer)[0]


def models(num_tokens: int, rank: int = 0, size: int = 1) -> list[HiddenTensors]:
    """Student, teacher, reference in float64, by rank's rows of the heads; the student learns."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for features in (H, H_TEACHER, H):
        hidden_TH = torch.randn(num_tokens, features, generator=generator, dtype=torch.float64)
        head_VH = torch.randn(4 * WIDTH, features, generator=generator, dtype=torch.float64)
        made.append(
            HiddenTensors(hidden_TH, head_VH[rank * 4 * WIDTH // size : (rank + 1) * 4 * WIDTH // size].clone())
        )
    made[0].hidden_TH.requires_grad_()
    made[0].head_VH.requires_grad_()
    return made


def plan_of(case: Case, batch: MicroBatch) -> StepPlan:
    tokens = float(batch.target_ids_T.numel())
    return StepPlan(STEP, case.w, 3 * tokens, {"distill": tokens, "sft": 2 * tokens, "rl": 0.5 * tokens})


def differentiate(report: LossReport, student: HiddenTensors) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The metrics, and the gradients of a multiple of the loss."""
    gradients = torch.autograd.grad(UPSTREAM * report.loss, [student.hidden_TH, student.head_VH])
    return report.sums | {"the loss itself": report.loss.detach()}, list(gradients)


def over_whole_logits(
    case: Case, group: dist.ProcessGroup | None = None
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """What autograd says of logits that exist whole."""
    batch = micro_batch(case.in_trainer)
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    student, teacher, reference = models(batch.target_ids_T.numel(), rank, size)
    report = Objective(case.parts, Shards(group, V, STOP_TOKEN_IDS))(
        student.logits(),
        batch,
        plan_of(case, batch),
        LogitTensors(teacher.logits()) if case.in_trainer else None,
        reference.logits(),
    )
    return differentiate(report, student)


def by_chunks(
    case: Case, chunk_tokens: int, group: dist.ProcessGroup | None = None
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The same from hidden states."""
    batch = micro_batch(case.in_trainer)
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    student, teacher, reference = models(batch.target_ids_T.numel(), rank, size)
    head = ChunkedHead(Objective(case.parts, Shards(group, V, STOP_TOKEN_IDS)), chunk_tokens)
    report = head(
        student, batch, plan_of(case, batch), teacher=teacher if case.in_trainer else None, reference=reference
    )
    return differentiate(report, student)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize("name", CASES)
def test_the_cut_changes_neither_loss_nor_metric_nor_gradient(name: str, chunk_tokens: int) -> None:
    """For any components, in float64 and below a factor: loss, every metric and both gradients are those of whole logits."""
    (sums, gradients), (whole, exact) = by_chunks(CASES[name], chunk_tokens), over_whole_logits(CASES[name])
    assert sums.keys() == whole.keys()
    for metric, pair in whole.items():
        torch.testing.assert_close(sums[metric].double(), pair.double(), rtol=1e-9, atol=1e-12, msg=metric)
    for ours, theirs in zip(gradients, exact, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


class Seldom(Sft):
    """Tells a metric of the places of one token, and nothing where there are none."""

    def __init__(self, token_id: int) -> None:
        super().__init__(SftConfig(weight=0.5))
        self._token_id = token_id

    def loss(self, context: LossContext) -> ComponentLoss:
        part, chosen_T = super().loss(context), context.batch.target_ids_T == self._token_id
        own = {"seldom": masked_sum(context.student.logprobs, chosen_T)} if chosen_T.any() else {}
        return replace(part, sums=part.sums | own)


def test_a_metric_that_some_chunks_do_not_tell_is_summed_over_the_others() -> None:
    """What the last chunk has no token of is still counted where it was."""
    ids = micro_batch(in_trainer=True).target_ids_T.tolist()
    only_early = next(token_id for token_id in ids if token_id not in ids[-CHUNKS[0] :])
    case = Case({}, beside=(Seldom(only_early),))
    (sums, _), (whole, _) = by_chunks(case, CHUNKS[0]), over_whole_logits(case)
    assert whole["seldom"][1] == ids.count(only_early)
    torch.testing.assert_close(sums["seldom"], whole["seldom"], rtol=1e-9, atol=0.0)


def test_the_mixed_kl_and_its_gradient_are_the_textbooks() -> None:
    """By softmax and autograd in float64, each token with a weight of its own: scores are missing here and there."""
    case = CASES["kl"]
    batch = micro_batch(in_trainer=True)
    scored_T = torch.arange(batch.target_ids_T.numel()) % 3 != 1
    batch, plan = replace(batch, is_scored_T=scored_T), plan_of(case, batch)
    student, teacher, _ = models(scored_T.numel())
    log_q, log_p = (one.logits()[:, :V].log_softmax(-1) for one in (student, teacher))
    tokens_T = case.w * kl(log_q, log_p) + (1 - case.w) * kl(log_p, log_q)
    expected = (tokens_T * scored_T).sum() * plan.num_response_tokens / plan.denominators["distill"]
    exact = torch.autograd.grad(UPSTREAM * expected, [student.hidden_TH, student.head_VH])
    report = ChunkedHead(Objective(case.parts, Shards(None, V)), 7)(student, batch, plan, teacher=teacher)
    torch.testing.assert_close(report.loss, expected, rtol=1e-9, atol=0)
    for ours, theirs in zip(differentiate(report, student)[1], exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def on_a_rank(group: dist.ProcessGroup, names: list[str]) -> list[list[torch.Tensor]]:
    return [by_chunks(CASES[name], 7, group)[1] for name in names]


@pytest.mark.parametrize("tp", [2, 4])
def test_over_ranks_the_rows_gradients_add_up_and_the_heads_lie_side_by_side(tp: int, ranks: RankPool) -> None:
    """At tp 2 and 4, with padding on the last rank: the sum, and the concatenation, are the gradients of one rank."""
    names = ["kl", "top-k", "jsd", "with cross entropy and rl"]
    by_rank = ranks.run(on_a_rank, tp, names=names)
    for number, name in enumerate(names):
        hidden_grad, head_grad = over_whole_logits(CASES[name])[1]
        torch.testing.assert_close(sum(rank[number][0] for rank in by_rank), hidden_grad, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(torch.cat([rank[number][1] for rank in by_rank]), head_grad, rtol=1e-9, atol=1e-11)


class Widest(TorchDispatchMode):
    """The largest tensor that is as wide as the vocabulary, in rows."""

    rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor) and one.dim() == 2 and one.shape[1] == 4 * WIDTH:
                self.rows = max(self.rows, one.shape[0])
        return result


@pytest.mark.parametrize("name", ["kl", "top-k", "with cross entropy and rl"])
def test_no_tensor_has_more_rows_of_logits_than_a_chunk(name: str) -> None:
    """Of whatever is computed in forward and backward, in fp32 by the kernels of a run."""
    case, chunk_tokens = CASES[name], 7
    batch = micro_batch(case.in_trainer)
    made = [HiddenTensors(one.hidden_TH.float(), one.head_VH.float()) for one in models(batch.target_ids_T.numel())]
    student = HiddenTensors(*(one.detach().requires_grad_() for one in (made[0].hidden_TH, made[0].head_VH)))
    assert batch.target_ids_T.numel() > 4 * chunk_tokens
    with Widest() as widest:
        head = ChunkedHead(Objective(case.parts, Shards(None, V, STOP_TOKEN_IDS)), chunk_tokens)
        teacher = made[1] if case.in_trainer else None
        head(student, batch, plan_of(case, batch), teacher=teacher, reference=made[2]).loss.backward()
    assert widest.rows == chunk_tokens
    assert student.hidden_TH.grad is not None and student.head_VH.grad is not None


def test_the_benchmark_sees_a_chunk_of_logits_of_each_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its table on small tensors: whole logits of two models are two, and chunks of a quarter are a half."""
    monkeypatch.setattr("megatron_distill.training.chunked_head.default_chunk_tokens", lambda head: 16)
    flags = ["--tokens", "64", "--vocab", "512", "--features", "24", "--dtypes", "float32"]
    monkeypatch.setattr("sys.argv", ["head", *flags])
    head_benchmark.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| t")]
    shares = {name.strip(): float(share) for name, _, _, share, _ in rows}
    assert shares["teacher in the trainer: whole logits, kept for autograd"] == pytest.approx(2, abs=0.1)
    assert shares["teacher in the trainer: chunks"] == pytest.approx(0.5, abs=0.1)
    assert shares["top-64: chunks"] < 1


def test_bf16_heads_sum_their_gradient_in_fp32() -> None:
    """Many small chunks lose nothing: the head's gradient is that of fp32 arithmetic to bf16's rounding of each term."""
    case, batch = CASES["kl"], micro_batch(in_trainer=True)
    rounded = [
        HiddenTensors(one.hidden_TH.bfloat16(), one.head_VH.bfloat16()) for one in models(len(batch.target_ids_T))
    ]
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        student, teacher, _ = (HiddenTensors(one.hidden_TH.to(dtype), one.head_VH.to(dtype)) for one in rounded)
        student = HiddenTensors(*(one.detach().requires_grad_() for one in (student.hidden_TH, student.head_VH)))
        head = ChunkedHead(Objective(case.parts, Shards(None, V, STOP_TOKEN_IDS)), 1)
        head(student, batch, plan_of(case, batch), teacher=teacher).loss.backward()
        assert student.head_VH.grad is not None and student.head_VH.grad.dtype is dtype
        gradients.append(student.head_VH.grad.double())
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[0].norm()


def test_the_gradient_is_taken_once_and_not_at_all_without_learning() -> None:
    """Under ``no_grad`` there is a loss without gradient; a second backward is refused by name."""
    case, batch = CASES["kl"], micro_batch(in_trainer=True)
    student, teacher, _ = models(batch.target_ids_T.numel())
    head, plan = ChunkedHead(Objective(case.parts, Shards(None, V, STOP_TOKEN_IDS)), 7), plan_of(case, batch)
    with torch.no_grad():
        silent = head(student, batch, plan, teacher=teacher)
    report = head(student, batch, plan, teacher=teacher)
    assert not silent.loss.requires_grad and torch.equal(silent.loss, report.loss)
    report.loss.backward(retain_graph=True)
    with pytest.raises(LossError, match="differentiated twice"):
        report.loss.backward()
