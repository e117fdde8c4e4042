"""A served teacher's hidden states and its output layer on the trainer's ranks: logits, loss, gradient, metrics. No server."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_distill.config import DistillConfig
from megatron_distill.errors import TeacherError
from megatron_distill.megatron.teacher_head import TeacherHead
from megatron_distill.rollouts.batches import HiddenSignalTensors, MicroBatch, as_tensor
from megatron_distill.training.components import Distill, LogitTensors, Shards, StepPlan
from megatron_distill.training.objective import LossReport, Objective
from megatron_distill.types import HiddenSignal, Sample
from tests.support.samples import STOP_TOKEN_IDS, build_micro_batches, make_samples, with_hidden_states
from tests.support.tiny_models import VOCAB, write_hf_model

PADDED = 128  # the student's rows; VOCAB = 53 of them are tokens


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with a head of their own and with tied embeddings, of two widths."""
    root = tmp_path_factory.mktemp("teachers")
    write_hf_model(root / "qwen3", "qwen3", seed=1)
    write_hf_model(root / "smollm", "smollm", seed=2)  # tied
    return root


def head(path: Path, *, padded: int = PADDED, rank: int = 0, size: int = 1) -> TeacherHead:
    return TeacherHead(
        path,
        padded_vocab_size=padded,
        tp_rank=rank,
        tp_size=size,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def logits_of(teacher: TeacherHead, batch: MicroBatch) -> torch.Tensor:
    said = teacher(batch)
    assert said is not None
    return said.logits()


def one_batch(samples: list[Sample]) -> MicroBatch:
    (batch,) = build_micro_batches(samples, len(samples), step=0)
    return batch


def scored(path: Path, count: int = 6) -> list[Sample]:
    """Samples with the model's hidden states, of which the fifth is missing."""
    samples = with_hidden_states(make_samples(0, count, VOCAB), path)
    samples[4] = replace(samples[4], signal=None)
    return samples


@pytest.mark.parametrize("family", ["qwen3", "smollm"])
@pytest.mark.parametrize("padded", [PADDED, 56, 54])
def test_shards_of_the_head_make_the_models_logits(family: str, padded: int, teachers: Path) -> None:
    """Whole or in two, with a head of its own or tied embeddings, and however the student's vocabulary is padded: hidden states
    times the ranks' rows, side by side, are the model's logits (computed in float64); padding gives zeros."""
    batch = one_batch(scored(teachers / family))
    assert isinstance(batch.signal, HiddenSignalTensors)
    from safetensors.torch import load_file

    tensors = load_file(teachers / family / "model.safetensors")
    matrix_VH = tensors["model.embed_tokens.weight" if family == "smollm" else "lm_head.weight"].double()
    expected_TV = batch.signal.hidden_TH.double() @ matrix_VH.T
    for size in (1, 2):
        ranks = [head(teachers / family, padded=padded, rank=rank, size=size) for rank in range(size)]
        logits_TV = torch.cat([logits_of(rank, batch) for rank in ranks], dim=1)
        assert logits_TV.shape == (len(batch.target_ids_T), padded)
        torch.testing.assert_close(logits_TV[:, :VOCAB].double(), expected_TV, rtol=1e-5, atol=1e-5)
        assert not logits_TV[:, VOCAB:].any()


def report_of(batch: MicroBatch, logits_TV: torch.Tensor, taught_TV: torch.Tensor, config: DistillConfig) -> LossReport:
    number = int(batch.is_scored_T.sum())
    parts = [Distill(config, "bucket", num_logprobs=4)]
    objective = Objective(parts, Shards(tp_group=None, vocab_size=VOCAB, stop_token_ids=STOP_TOKEN_IDS))
    return objective(logits_TV, batch, StepPlan(0, 0.3, number, {"distill": number}), LogitTensors(taught_TV))


@pytest.mark.parametrize(
    "config",
    [DistillConfig(), DistillConfig(divergence="jsd", temperature=2.0), DistillConfig(support="student")],
    ids=str,
)
def test_loss_gradient_and_metrics_are_those_of_a_teacher_in_the_trainer(config: DistillConfig, teachers: Path) -> None:
    """Of any divergence, to rounding; what the teacher did not say is left out, and what its server says of the written tokens
    beside what its head says of them is one metric more."""
    path, samples = teachers / "qwen3", scored(teachers / "qwen3")
    batch = one_batch(samples)
    taught_TV = logits_of(head(path), batch)
    whole = one_batch(with_hidden_states(samples, path))
    assert isinstance(whole.signal, HiddenSignalTensors)
    exact_TV = whole.signal.hidden_TH @ head(path).weight_VH.T  # of every token, as a teacher in the trainer
    outcomes = []
    for teacher_TV, of in ((taught_TV, batch), (exact_TV, replace(batch, signal=None))):
        logits_TV = torch.randn(len(exact_TV), PADDED, generator=torch.Generator().manual_seed(0)).requires_grad_()
        report = report_of(of, logits_TV * 1, teacher_TV, config)
        report.loss.backward()
        outcomes.append((report, logits_TV.grad))
    (ours, our_gradient), (theirs, their_gradient) = outcomes
    torch.testing.assert_close(our_gradient, their_gradient)
    assert our_gradient is not None and our_gradient.abs().max() > 0
    assert ours.sums.keys() - theirs.sums.keys() == {"teacher_gap_nats"}
    for name, pair in theirs.sums.items():
        torch.testing.assert_close(ours.sums[name], pair, msg=name, rtol=1e-5, atol=1e-6)
    total, count = ours.sums["teacher_gap_nats"].tolist()
    assert count == int(batch.is_scored_T.sum()) and total / count < 1e-5


def test_another_models_head_shows(teachers: Path, tmp_path: Path) -> None:
    """Of another width it is refused, with where to look; of the same width the gap of the written tokens tells."""
    batch = one_batch(scored(teachers / "qwen3"))
    with pytest.raises(TeacherError, match=r"takes 36 features, and the server sent 48.*Serve the model"):
        head(teachers / "smollm")(batch)
    write_hf_model(tmp_path / "other", "qwen3", seed=7)
    taught_TV = logits_of(head(tmp_path / "other"), batch)
    gap = report_of(batch, torch.zeros(len(taught_TV), PADDED), taught_TV, DistillConfig()).sums["teacher_gap_nats"]
    assert gap[0] / gap[1] > 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_rows_follow_their_tokens(dtype: type) -> None:
    """Each learnt token gets its own row, in the server's dtype, wherever its response is packed and whichever rank of a
    sequence it falls to; a response without a signal gets zeros, and a micro-batch without any has none."""
    samples = []
    for number, sample in enumerate(make_samples(0, 6, VOCAB)):
        length = len(sample.rollout.response_ids)
        marks = np.array([[100 * number + row, 1] for row in range(length)])
        rollout = replace(sample.rollout, is_learnt=np.arange(length) % 3 != 1)
        signal = HiddenSignal(marks[:, 0].astype(np.float32), marks.astype(dtype)) if number != 4 else None
        samples.append(replace(sample, rollout=rollout, signal=signal))
    (batch,) = build_micro_batches(samples, 6, step=0, needs_mask=False, sequence_multiple=4, pad_multiple=4)
    for one in (batch, *(batch.of_context_rank(rank, 2) for rank in range(2))):
        assert isinstance(one.signal, HiddenSignalTensors)
        assert one.signal.hidden_TH.dtype == as_tensor(np.zeros(1, dtype)).dtype
        marks_T2 = one.signal.hidden_TH.view(torch.int16) if dtype == np.uint16 else one.signal.hidden_TH
        assert torch.equal(marks_T2[:, 0].float(), one.signal.token_logprobs_T)
        assert torch.equal(marks_T2[:, 1] == 1, one.is_scored_T)
    (silent,) = build_micro_batches([replace(one, signal=None) for one in samples], 6, step=0)
    assert silent.signal is None
