"""distill_kl: equal to the dense loss and its gradient, whatever the sharding, the padding, the chunks and the precision."""

import dense
import pytest
import torch

from megatron_distill.losses import distill_kl

VOCAB = 37
GROUPS = ((5, 19), (36, 0, 20))
# Ranks -> (student width, teacher width): equal and exact, equal and padded, unequal (columns on different ranks).
WIDTHS = {1: [(37, 37), (40, 37)], 2: [(20, 20), (20, 24), (32, 19)], 4: [(10, 10), (10, 16), (24, 10)]}
LAYOUTS = [(tp, *widths) for tp, pairs in WIDTHS.items() for widths in pairs]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}


def run_kl(group, seed, dtype, student_width, teacher_width, tokens=9, groups=(), weight=0.3, **options):
    """One rank's terms and gradient for random logits."""
    rank = group.rank() if group is not None else 0
    student = dense.shard(dense.random_logits(seed, tokens, VOCAB, dtype=dtype), student_width, rank).requires_grad_()
    teacher = dense.shard(dense.random_logits(seed + 1, tokens, VOCAB, dtype=dtype), teacher_width, rank)
    if weight == "per token":
        weight = torch.linspace(0, 1, tokens)
    terms = distill_kl(
        student,
        teacher,
        reverse_kl_weight=weight,
        tp_group=group,
        vocab_size=VOCAB,
        stop_token_groups=groups,
        **options,
    )
    (terms.loss * dense.random_upstream(seed, tokens).to(terms.loss.dtype)).sum().backward()
    return [term.detach() for term in terms], student.grad


def dense_kl(seed, dtype, tokens=9, groups=(), weight=0.3, temperature=1.0):
    """The same in float64 on whole rows."""
    student = dense.random_logits(seed, tokens, VOCAB, dtype=dtype).double().requires_grad_()
    log_q = dense.log_outcomes(student, groups, temperature)
    log_p = dense.log_outcomes(dense.random_logits(seed + 1, tokens, VOCAB, dtype=dtype), groups, temperature)
    forward, reverse = dense.kl(log_p, log_q), dense.kl(log_q, log_p)
    if weight == "per token":
        weight = torch.linspace(0, 1, tokens, dtype=torch.float64)
    loss = weight * reverse + (1 - weight) * forward
    (loss * dense.random_upstream(seed, tokens)).sum().backward()
    terms = [loss, forward, reverse, dense.entropy(log_q), dense.entropy(log_p)]
    return [term.detach() for term in terms], student.grad


def assert_equal_to_dense(results, expected, dtype):
    """Every rank reports the dense terms; the shards of the gradient join to the dense gradient."""
    expected_terms, expected_grad = expected
    tolerance = TOLERANCE[dtype]
    for terms, _ in results:
        for ours, theirs in zip(terms, expected_terms, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=10 * tolerance, atol=tolerance)
    grad = dense.unshard([grad for _, grad in results], VOCAB)
    assert grad.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else 10 * tolerance
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rounding, atol=tolerance)


@pytest.mark.parametrize("groups", [(), GROUPS], ids=["", "stop-groups"])
@pytest.mark.parametrize(("tp", "student_width", "teacher_width"), LAYOUTS)
def test_equals_dense_for_every_layout(ranks, tp, student_width, teacher_width, groups):
    """Terms and gradient are the dense ones for every weight, however the columns are spread and padded."""
    for seed, weight in enumerate([0.0, 0.2, 1.0, "per token"]):
        results = ranks.run(
            run_kl,
            tp,
            seed=seed,
            dtype=torch.float64,
            student_width=student_width,
            teacher_width=teacher_width,
            groups=groups,
            weight=weight,
        )
        assert_equal_to_dense(results, dense_kl(seed, torch.float64, groups=groups, weight=weight), torch.float64)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 100])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_dense_for_every_precision(ranks, dtype, temperature, chunk_tokens):
    """bf16 and fp32 logits give the float64 result to fp32 accuracy, at any temperature, in chunks of any size."""
    options = {"groups": GROUPS, "weight": "per token", "temperature": temperature}
    results = ranks.run(
        run_kl, 2, seed=5, dtype=dtype, student_width=20, teacher_width=24, chunk_tokens=chunk_tokens, **options
    )
    assert_equal_to_dense(results, dense_kl(5, dtype, **options), dtype)
