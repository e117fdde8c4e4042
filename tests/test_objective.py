"""Batches and objective: packing, micro-batches and components cannot change what is minimised."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_distill.config import DistillConfig, RlConfig, SftConfig
from megatron_distill.config.schedules import constant
from megatron_distill.losses import distill_jsd, distill_skew_kl
from megatron_distill.rollouts.advantages import with_advantages
from megatron_distill.rollouts.batches import MicroBatch, TopKTensors
from megatron_distill.training.components import (
    Component,
    Distill,
    LogitTensors,
    LossContext,
    PolicyGradient,
    Sft,
    Shards,
    StepPlan,
)
from megatron_distill.training.objective import Objective, StepSums
from megatron_distill.types import Sample
from tests.support.samples import STOP_TOKEN_IDS, build_micro_batches, make_samples

V, STEP = 12, 3


def made(count: int = 8) -> list[Sample]:
    return make_samples(STEP, count, V)


EVERY: list[Component] = [Distill(DistillConfig(), "bucket"), Sft(SftConfig(weight=1.0)), PolicyGradient(RlConfig())]


def plan_of(samples: list[Sample]) -> StepPlan:
    return StepPlan(
        step=STEP,
        reverse_kl_weight=0.3,
        num_response_tokens=sum(s.rollout.num_learnt_tokens for s in samples),
        denominators={part.name: part.count(samples, scored_in_trainer=False) for part in EVERY},
    )


def objective(distill: float = 1.0, sft: float = 0.0, rl: RlConfig | None = None) -> Objective:
    parts: list[Component] = [
        Distill(DistillConfig(weight=distill), "bucket"),
        Sft(SftConfig(weight=sft)),
        PolicyGradient(rl or RlConfig()),
    ]
    return Objective([part for part in parts if part.weight], Shards(tp_group=None, vocab_size=V))


class TableModel(torch.nn.Module):
    """Logits that depend on a token and the one before it within its sequence: enough to see a packing mistake."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.now = torch.nn.Parameter(torch.randn(V, V))
        self.before = torch.nn.Parameter(torch.randn(V, V))

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """[R, L, V]; what attention may see decides whether the token before exists."""
        assert batch.attention_mask is not None
        logits_RLV = self.now[batch.tokens_RL]
        sees_previous = ~batch.attention_mask[:, 0].diagonal(offset=-1, dim1=1, dim2=2)
        previous = self.before[batch.tokens_RL[:, :-1]] * sees_previous[..., None]
        return torch.cat([logits_RLV[:, :1], logits_RLV[:, 1:] + previous], dim=1)


def loss_and_gradient(samples: list[Sample], per_micro_batch: int, loss: Objective) -> tuple[float, torch.Tensor]:
    """A whole step by hand: Megatron adds the micro-batches and divides by the step's response tokens."""
    model, plan = TableModel(), plan_of(samples)
    total = torch.zeros(())
    for batch in build_micro_batches(samples, per_micro_batch, step=STEP):
        logits_TV = model(batch).reshape(-1, V)[batch.logits_index_T]
        total = total + loss(logits_TV, batch, plan).loss / plan.num_response_tokens
    total.backward()
    return float(total), torch.cat([p.grad.flatten() for p in model.parameters()])


RL = RlConfig(weight=0.7, normalisation="token")
COMPONENTS = {
    "distil": (1.0, 0.0, RlConfig()),
    "sft": (0.0, 1.0, RlConfig()),
    "rl": (0.0, 0.0, RL),
    "rl by sequence": (0.0, 0.0, RlConfig(weight=1.0, normalisation="sequence")),
    "joint": (0.5, 0.3, RL),
}


def with_rewards(samples: list[Sample], config: RlConfig) -> list[Sample]:
    return with_advantages(samples, [float(i % 3 == 0) for i in range(len(samples))], 2, config)


@pytest.mark.parametrize("name", COMPONENTS)
def test_micro_batches_and_packing_change_nothing(name: str) -> None:
    """Loss and gradient are the same however a step is cut and packed, for every component and for all together."""
    weights = COMPONENTS[name]
    samples = with_rewards(made(), weights[2])
    loss, gradient = loss_and_gradient(samples, len(samples), objective(*weights))
    assert gradient.abs().max() > 0
    for per_micro_batch in (1, 2, 4):
        other_loss, other_gradient = loss_and_gradient(samples, per_micro_batch, objective(*weights))
        assert other_loss == pytest.approx(loss, abs=1e-6)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_each_component_has_its_own_denominator() -> None:
    """A joint loss is the weighted sum of the components' own means: adding one does not dilute another."""
    samples = with_rewards(made(), RL)
    parts = [
        0.5 * loss_and_gradient(samples, 4, objective())[0],
        0.3 * loss_and_gradient(samples, 4, objective(distill=0.0, sft=1.0))[0],
        loss_and_gradient(samples, 4, objective(distill=0.0, rl=RL))[0],
    ]
    joint, _ = loss_and_gradient(samples, 4, objective(distill=0.5, sft=0.3, rl=RL))
    assert joint == pytest.approx(sum(parts), abs=1e-6)


def test_unscored_samples_do_not_enter_the_distillation_loss() -> None:
    """Dropping the unscored samples changes neither loss nor gradient: they are masked, not zeros."""
    samples = made()
    scored = [sample for sample in samples if sample.signal is not None]
    all_loss, all_gradient = loss_and_gradient(samples, 8, objective())
    loss, gradient = loss_and_gradient(scored, len(scored), objective())
    assert all_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(all_gradient, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["distribution", "k3"])
def test_a_mean_over_responses_weighs_each_response_alike(estimator: Any) -> None:
    """Loss and gradient are, in float64 by softmax and autograd, the mean over scored responses of their own means; however the
    step is cut, and whatever of a response is not learnt. The token mean is another number."""
    samples = [s for s in made() if s.rollout.author == "student" or estimator == "distribution"]
    samples[1] = replace(
        samples[1],
        rollout=replace(samples[1].rollout, is_learnt=np.arange(len(samples[1].rollout.response_ids)) % 3 != 1),
    )
    parts = {
        name: Distill(DistillConfig(estimator=estimator, normalisation=name), "dropped")
        for name in ("sequence", "token")
    }
    w = 0.0 if estimator == "k3" else 0.3
    scored = [sample for sample in samples if sample.signal is not None]
    assert parts["sequence"].count(samples, scored_in_trainer=False) == len(scored) < len(samples)
    assert parts["sequence"].count(samples, scored_in_trainer=True) == len(samples)

    reference, means = TableModel().double(), []
    for sample in scored:
        (batch,) = build_micro_batches([sample], 1, step=STEP)
        log_q_TV = reference(batch).reshape(-1, V)[batch.logits_index_T].log_softmax(-1)
        assert isinstance(batch.signal, TopKTensors)
        if estimator == "k3":
            gap_T = log_q_TV.gather(1, batch.target_ids_T[:, None])[:, 0] - batch.signal.token_logprobs_T.double()
            means.append((gap_T.neg().exp() + gap_T - 1).mean())
        else:
            log_p_TK = batch.signal.logprobs_TK.double()
            log_q_TK = log_q_TV.gather(1, batch.signal.ids_TK)
            gap_TK = log_p_TK - log_q_TK
            means.append(((1 - w) * log_p_TK.exp() * gap_TK - w * log_q_TK.exp() * gap_TK).sum(-1).mean())
    expected = torch.stack(means).mean()
    expected.backward()
    exact = torch.cat([p.grad.flatten() for p in reference.parameters()])

    losses = {}
    for name, part in parts.items():
        loss = Objective([part], Shards(tp_group=None, vocab_size=V))
        plan = replace(plan_of(samples), reverse_kl_weight=w, denominators={"distill": part.count(samples, False)})
        for per_micro_batch in (1, 2, len(samples)):
            model, total = TableModel(), torch.zeros(())
            for batch in build_micro_batches(samples, per_micro_batch, step=STEP):
                logits_TV = model(batch).reshape(-1, V)[batch.logits_index_T]
                total = total + loss(logits_TV, batch, plan).loss / plan.num_response_tokens
            total.backward()
            losses[name] = float(total)
            if name == "sequence":
                assert float(total) == pytest.approx(float(expected), rel=1e-5)
                gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
                torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)
    assert losses["token"] != pytest.approx(losses["sequence"], rel=1e-2)


def test_policy_gradient_against_a_dense_reference() -> None:
    """Fresh tokens: truncated importance weight times REINFORCE with group-relative advantages, mean over the tokens of
    groups with signal. Stale tokens: PPO's clipped ratio against the sampler."""
    samples = with_rewards(made(), RL)
    _, gradient = loss_and_gradient(samples, 2, objective(distill=0.0, rl=RL))
    model, total, count = TableModel(), torch.zeros(()), 0
    for sample in samples:
        if not sample.policy_weight:
            continue
        batch = build_micro_batches([sample], 1, step=STEP)[0]
        logprobs = model(batch).reshape(-1, V)[batch.logits_index_T].double().log_softmax(-1)
        own = logprobs[torch.arange(len(sample.rollout.response_ids)), sample.rollout.response_ids]
        sampler = torch.tensor(sample.rollout.sampler_logprobs).double()
        ratio = (own - sampler).exp()
        if sample.rollout.oldest_version < STEP:
            held = ratio.clamp(1 - RL.clip_low, 1 + RL.clip_high)
            total = total - torch.minimum(ratio * sample.advantage, held * sample.advantage).sum()
        else:
            weight = ratio.detach().clamp(max=RL.max_importance_weight)
            total = total - (weight * sample.advantage * own).sum()
        count += len(own)
    (RL.weight * total / count).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_advantages_are_relative_to_the_group() -> None:
    """(r - mean) / std within a prompt's group; a group of equal rewards has none and leaves the denominator; samples
    that the student did not write have no weight."""
    samples = with_advantages(made(8), [1, 0, 1, 1, 0, 0, 1, 0], 2, RlConfig(weight=1.0))
    assert [s.advantage for s in samples] == pytest.approx([1, -1, 0, 0, 0, 0, 1, -1])
    assert [s.policy_weight for s in samples] == [1, 1, 0, 0, 0, 0, 1, 0]
    unscaled = with_advantages(made(4), [1, 0, 1, 1], 2, RlConfig(advantage_scale="none", drop_zero_signal=False))
    assert [s.advantage for s in unscaled] == pytest.approx([0.5, -0.5, 0, 0])
    assert [s.policy_weight for s in unscaled] == [1, 1, 1, 0]


def test_packed_kernels_get_lengths_instead_of_a_mask() -> None:
    """A batch's starts cut its flattened rows where its mask does; without a mask all sequences share one row, and no more
    padding than rounds it up."""
    samples = made()
    masked, bare = (
        build_micro_batches(samples, 4, step=STEP, needs_mask=needs_mask)[0] for needs_mask in (True, False)
    )
    assert masked.attention_mask is not None
    num_rows, row_tokens = masked.tokens_RL.shape
    sequence_of = torch.bucketize(torch.arange(num_rows * row_tokens), masked.sequence_starts[1:], right=True)
    rows = sequence_of.view(num_rows, row_tokens)
    visible = (rows[:, :, None] == rows[:, None, :]) & torch.ones(row_tokens, row_tokens, dtype=torch.bool).tril()
    assert torch.equal(~visible[:, None], masked.attention_mask)
    assert bare.attention_mask is None
    assert bare.tokens_RL.shape[0] == 1
    assert bare.tokens_RL.shape[1] == bare.sequence_starts[-1]
    num_padding = bare.tokens_RL.shape[1] - bare.sequence_starts.diff()[:4].sum()
    assert 0 <= num_padding < 8
    assert bare.max_sequence_tokens == bare.sequence_starts.diff().max()
    torch.testing.assert_close(bare.target_ids_T.sort().values, masked.target_ids_T.sort().values)


@pytest.mark.parametrize(
    "distill",
    [
        {"reverse_kl_weight": constant(0.3)},
        {"divergence": "jsd"},
        {"divergence": "skew_kl"},
        {"estimator": "k1"},
        {"support": "student"},
    ],
    ids=str,
)
@pytest.mark.parametrize("in_trainer", [False, True])
def test_a_rank_without_response_tokens_takes_part_all_the_same(distill: dict[str, Any], in_trainer: bool) -> None:
    """Under context parallelism a rank may hold prompts only: its loss is 0, and its backward pass reaches the model."""
    samples = [replace(sample, signal=None) if in_trainer else sample for sample in made(4)]
    options: dict[str, Any] = {"scored_in_trainer": in_trainer, "needs_mask": False}
    batch = build_micro_batches(samples, 4, step=STEP, sequence_multiple=16, pad_multiple=16, **options)[0]
    empty = min((batch.of_context_rank(rank, 8) for rank in range(8)), key=lambda one: one.target_ids_T.numel())
    assert empty.target_ids_T.numel() == 0
    hidden = torch.randn(empty.tokens_RL.numel(), V, requires_grad=True)
    parts: list[Component] = [Distill(DistillConfig(**distill), "bucket", num_logprobs=4), *EVERY[1:]]
    report = Objective(parts, Shards(tp_group=None, vocab_size=V, stop_token_ids=STOP_TOKEN_IDS))(
        hidden[empty.logits_index_T],
        empty,
        plan_of(samples),
        LogitTensors(torch.zeros(0, V)) if in_trainer else None,
    )
    assert report.loss.item() == 0 and all(pair[1] == 0 for pair in report.sums.values())
    report.loss.backward()
    assert hidden.grad is not None and not hidden.grad.any()


def test_metrics_add_up_over_micro_batches() -> None:
    """(sum, count) pairs give the same means whatever the cut, and the logged loss is the step's loss."""
    samples = made()
    plan, model = plan_of(samples), TableModel()
    readings = []
    for per_micro_batch in (2, 8):
        loss, sums = objective(), StepSums()
        for batch in build_micro_batches(samples, per_micro_batch, step=STEP):
            sums.add(loss(model(batch).reshape(-1, V)[batch.logits_index_T], batch, plan).sums)
        readings.append({name: total / count for name, (total, count) in sums.take().items() if count})
    assert readings[0] == pytest.approx(readings[1], rel=1e-5)
    assert readings[0]["loss"] == pytest.approx(loss_and_gradient(samples, 8, objective())[0], rel=1e-5)


def test_what_an_environment_said_is_not_learnt() -> None:
    """Tokens that are not learnt enter no loss, no count and no metric, yet the later ones see them."""
    samples = made(4)
    is_learnt = [np.arange(len(s.rollout.response_ids)) % 3 != 1 for s in samples]
    masked = [
        replace(sample, rollout=replace(sample.rollout, is_learnt=learnt))
        for sample, learnt in zip(samples, is_learnt, strict=True)
    ]
    batch, whole = (build_micro_batches(some, 4, step=STEP)[0] for some in (masked, samples))
    kept = torch.isin(whole.logits_index_T, batch.logits_index_T)
    assert 0 < kept.sum() < len(kept) and int(kept.sum()) == sum(int(learnt.sum()) for learnt in is_learnt)
    assert torch.equal(batch.tokens_RL, whole.tokens_RL)
    assert torch.equal(batch.target_ids_T, whole.target_ids_T[kept])
    assert batch.signal is not None and whole.signal is not None
    assert torch.equal(batch.signal.logprobs_TK, whole.signal.logprobs_TK[kept])
    loss, _ = loss_and_gradient(masked, 2, objective())
    assert loss == pytest.approx(loss_and_gradient(masked, 4, objective())[0], abs=1e-6)
    assert loss != pytest.approx(loss_and_gradient(samples, 4, objective())[0], abs=1e-3)


@pytest.mark.parametrize(("estimator", "weight"), [("k1", 1.0), ("k2", 1.0), ("k3", 0.0)])
def test_sampled_estimators_see_the_students_scored_tokens(estimator: Any, weight: float) -> None:
    """The component is the mean of the estimator over scored tokens, however the step is cut; k1 and k2 share a gradient."""
    samples = [s for s in made() if s.rollout.author == "student"]
    part = Distill(DistillConfig(estimator=estimator), "bucket")
    loss = Objective([part], Shards(tp_group=None, vocab_size=V))
    gradients = []
    for per_micro_batch in (1, len(samples)):
        model = TableModel()
        plan = replace(plan_of(samples), reverse_kl_weight=weight)
        for batch in build_micro_batches(samples, per_micro_batch, step=STEP):
            report = loss(model(batch).reshape(-1, V)[batch.logits_index_T], batch, plan)
            (report.loss / plan.num_response_tokens).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().max() > 0
    model, expected = TableModel(), torch.zeros(())
    (batch,) = build_micro_batches(samples, len(samples), step=STEP)
    logprobs_TV = model(batch).reshape(-1, V)[batch.logits_index_T].log_softmax(-1)
    student_T = logprobs_TV.gather(1, batch.target_ids_T[:, None]).squeeze(1)
    assert isinstance(batch.signal, TopKTensors)
    gap_T = student_T - batch.signal.token_logprobs_T
    per_token_T = gap_T.square() / 2 if estimator != "k3" else torch.exp(-gap_T) + gap_T - 1
    expected = torch.where(batch.is_scored_T, per_token_T, 0.0).sum() / batch.is_scored_T.sum()
    expected.backward()
    torch.testing.assert_close(
        torch.cat([p.grad.flatten() for p in model.parameters()]), gradients[1], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("divergence", ["jsd", "skew_kl"])
def test_other_divergences_take_the_whole_distribution(divergence: Any) -> None:
    """jsd and skew_kl of a teacher in the trainer are what the library's functions say, with the run's KL weight."""
    samples = made()
    (batch,) = build_micro_batches(samples, len(samples), step=STEP)
    torch.manual_seed(2)
    student_TV, teacher_TV = torch.randn(2, batch.target_ids_T.numel(), V).unbind()
    config = DistillConfig(divergence=divergence, skew=0.2)
    shards = Shards(tp_group=None, vocab_size=V)
    plan = replace(plan_of(samples), reverse_kl_weight=0.3 if divergence == "jsd" else 1.0)
    context = LossContext(student_TV, batch, plan, shards, LogitTensors(teacher_TV))
    total = Distill(config, "bucket").loss(context).total
    terms = (
        distill_jsd(student_TV, teacher_TV, teacher_weight=0.3)
        if divergence == "jsd"
        else distill_skew_kl(student_TV, teacher_TV, reverse=True, skew=0.2)
    )
    torch.testing.assert_close(total, torch.where(batch.is_scored_T, terms.loss, 0.0).sum())


def test_the_gradient_takes_the_place_of_logits_that_nothing_else_needs() -> None:
    """Of a teacher in the trainer: alone, distillation leaves its gradient in the logits' memory; beside another component it
    leaves them as they were, and is the same."""
    samples = made(4)
    (batch,) = build_micro_batches(samples, 4, step=STEP, scored_in_trainer=True)
    num_tokens = batch.target_ids_T.numel()
    torch.manual_seed(4)
    start_TV, teacher_TV = torch.randn(2, num_tokens, V).unbind()
    plan = StepPlan(STEP, 0.3, num_tokens, {"distill": num_tokens, "sft": num_tokens})
    gradients = []
    for parts in (
        [Distill(DistillConfig(), "bucket")],
        [Distill(DistillConfig(), "bucket"), Sft(SftConfig(weight=0.0))],
    ):
        weights_TV = start_TV.clone().requires_grad_()
        logits_TV = weights_TV * 1
        report = Objective(parts, Shards(tp_group=None, vocab_size=V))(logits_TV, batch, plan, LogitTensors(teacher_TV))
        report.loss.backward()
        gradients.append(weights_TV.grad)
        assert torch.equal(logits_TV.detach(), start_TV) == (len(parts) == 2)
    assert gradients[0] is not None and gradients[0].abs().max() > 0
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("stops", [(), (0, 1)])
def test_the_students_support_is_the_whole_kl_once_it_holds_all(stops: tuple[int, ...]) -> None:
    """Over all V tokens, the student's support gives loss and gradient of the full KL, stop tokens merged or not; over fewer, a
    KL with a tail, which is at most that."""
    samples = made(4)
    batch = build_micro_batches(samples, 4, step=STEP, scored_in_trainer=True)[0]
    num_tokens = batch.target_ids_T.numel()
    torch.manual_seed(3)
    teacher_TV = torch.randn(num_tokens, V) * 2
    start_TV = torch.randn(num_tokens, V)
    plan = StepPlan(STEP, 0.3, num_tokens, {"distill": num_tokens})
    totals, gradients = [], []
    for support, k in (("teacher", V), ("student", V), ("student", 3)):
        student_TV = start_TV.clone().requires_grad_()
        component = Distill(DistillConfig(support=support), "bucket", num_logprobs=k)  # type: ignore[arg-type]
        shards = Shards(tp_group=None, vocab_size=V, stop_token_ids=stops)
        context = LossContext(student_TV, batch, plan, shards, LogitTensors(teacher_TV))
        part = component.loss(context)
        part.total.backward()
        totals.append(float(part.total.detach()))
        gradients.append(student_TV.grad)
    assert totals[1] == pytest.approx(totals[0], rel=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    assert 0 < totals[2] < totals[0]
