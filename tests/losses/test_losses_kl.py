"""distill_kl: equal to the dense loss and its gradient, whatever the sharding, the padding, the chunks and the precision."""

import pytest
import torch

from megatron_distill.errors import LossError
from megatron_distill.losses import distill_jsd, distill_kl, distill_kl_topk, vocab_parallel_logprobs
from tests.support import dense

VOCAB = 37
GROUPS = ((5, 19), (36, 0, 20))
# Ranks -> (student width, teacher width): equal and exact, equal and padded, unequal (columns on different ranks).
WIDTHS = {1: [(37, 37), (40, 37)], 2: [(20, 20), (20, 24), (32, 19)], 4: [(10, 10), (10, 16), (24, 10)]}
LAYOUTS = [(tp, *widths) for tp, pairs in WIDTHS.items() for widths in pairs]
BACKENDS = ("eager", "cpp", "triton")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
PRECISIONS = [("eager", torch.float64)] + [
    (backend, dtype) for backend in BACKENDS for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


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


def assert_equal_to_dense(results, expected, dtype, backend):
    """Every rank reports the dense terms; the shards of the gradient join to the dense gradient."""
    expected_terms, expected_grad = expected
    tolerance = TOLERANCE[dtype]
    for terms, _ in results:
        for ours, theirs in zip(terms, expected_terms, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=10 * tolerance, atol=tolerance)
    grad = dense.unshard([grad for _, grad in results], VOCAB)
    assert grad.dtype == dtype
    rounding = ROUNDING.get(dtype, 10 * tolerance)
    if backend == "triton" and dtype in ROUNDING:
        rounding *= 2  # its interpreter rounds towards 0, a GPU to the nearest
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rounding, atol=tolerance)


@pytest.mark.parametrize("groups", [(), GROUPS], ids=["", "stop-groups"])
@pytest.mark.parametrize(("tp", "student_width", "teacher_width"), LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_dense_for_every_layout(ranks, backend, tp, student_width, teacher_width, groups) -> None:
    """Terms and gradient are the dense ones for every weight and backend, however the columns are spread and padded."""
    dtype = torch.float64 if backend == "eager" else torch.float32
    weights = ["per token"] if backend == "triton" else [0.0, 0.2, 1.0, "per token"]  # its interpreter is slow
    for seed, weight in enumerate(weights):
        results = ranks.run(
            run_kl,
            tp,
            seed=seed,
            dtype=dtype,
            backend=backend,
            student_width=student_width,
            teacher_width=teacher_width,
            groups=groups,
            weight=weight,
        )
        assert_equal_to_dense(results, dense_kl(seed, dtype, groups=groups, weight=weight), dtype, backend)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 100])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("backend", "dtype"), PRECISIONS)
def test_equals_dense_for_every_precision(ranks, backend, dtype, temperature, chunk_tokens) -> None:
    """bf16, fp16 and fp32 logits give the float64 result to fp32 accuracy, at any temperature, in chunks of any size."""
    options = {"groups": GROUPS, "weight": "per token", "temperature": temperature}
    results = ranks.run(
        run_kl,
        2,
        seed=5,
        dtype=dtype,
        student_width=20,
        teacher_width=24,
        chunk_tokens=chunk_tokens,
        backend=backend,
        **options,
    )
    assert_equal_to_dense(results, dense_kl(5, dtype, **options), dtype, backend)


def random_case(tokens=6, vocab=11, dtype=torch.float64):
    """Leaf student logits and teacher logits, whole rows."""
    student = dense.random_logits(1, tokens, vocab, dtype=dtype).requires_grad_()
    return student, dense.random_logits(2, tokens, vocab, dtype=dtype)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_gradcheck(weight) -> None:
    """The hand-written backward is the derivative of the forward, stop groups and padding included."""
    student, teacher = random_case()
    options = {"reverse_kl_weight": weight, "vocab_size": 10, "stop_token_groups": ((1, 4),), "temperature": 1.4}
    assert torch.autograd.gradcheck(lambda z: distill_kl(z, teacher, **options).loss, (student,))


def test_forward_kl_gradient_is_that_of_soft_target_cross_entropy() -> None:
    """grad KL(p || q) = grad of -sum p log q = q - p, exactly."""
    student, teacher = random_case()
    (grad,) = torch.autograd.grad(distill_kl(student, teacher, reverse_kl_weight=0.0).loss.sum(), student)
    cross_entropy = -(teacher.softmax(-1) * student.log_softmax(-1)).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(cross_entropy, student)[0])
    torch.testing.assert_close(grad, (student.softmax(-1) - teacher.softmax(-1)).detach())


def test_reverse_kl_gradient_is_the_centred_log_ratio_policy_gradient() -> None:
    """grad KL(q || p) = sum_y q(y) (log q - log p)(y) grad log q(y) = q ((log q - log p) - KL), exactly."""
    student, teacher = random_case()
    terms = distill_kl(student, teacher, reverse_kl_weight=1.0)
    (grad,) = torch.autograd.grad(terms.loss.sum(), student)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    reward = (log_p - log_q).detach()
    policy_gradient = -(log_q.exp().detach() * reward * log_q).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(policy_gradient, student)[0])
    torch.testing.assert_close(grad, (log_q.exp() * (-reward - terms.reverse_kl[:, None])).detach())


def test_monte_carlo_policy_gradient_agrees_within_its_standard_error() -> None:
    """Averaged over 200,000 tokens drawn from the student, log-ratio REINFORCE is the reverse-KL gradient to 5 sigma."""
    student, teacher = random_case(tokens=1)
    (exact,) = torch.autograd.grad(distill_kl(student, teacher, reverse_kl_weight=1.0).loss.sum(), student)
    log_q, log_p = student.detach().log_softmax(-1)[0], teacher.log_softmax(-1)[0]
    draws = torch.multinomial(log_q.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    score = torch.eye(11, dtype=torch.float64)[draws] - log_q.exp()
    samples = (log_q - log_p)[draws][:, None] * score
    error = samples.std(0) / len(draws) ** 0.5
    assert ((samples.mean(0) - exact[0]).abs() < 5 * error).all()


def check_identical_models(group, backend, dtype, weight):
    """See the test of this name."""
    student, _ = random_case(dtype=dtype)
    shifted = (student.detach().float() + 512).to(dtype).requires_grad_()
    for logits in (student, shifted):
        terms = distill_kl(logits, logits.detach(), reverse_kl_weight=weight, backend=backend)
        terms.loss.sum().backward()
        assert not terms.loss.any()
        assert not logits.grad.any()


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_models_have_no_loss_and_no_gradient(ranks, backend, dtype, weight) -> None:
    """KL(x, x) is 0 to the last bit, at any offset of the logits."""
    ranks.run(check_identical_models, 1, backend=backend, dtype=dtype, weight=weight)


def check_offsets(group, backend):
    """See the test of this name."""
    student, teacher = (part.detach().mul(64).round().div(64).float() for part in random_case())
    results = []
    for offset in (0.0, 4096.0):
        leaf = student.clone().requires_grad_()
        terms = distill_kl(leaf, teacher + offset, reverse_kl_weight=0.5, backend=backend)
        terms.loss.sum().backward()
        results.append((*(term.detach() for term in terms), leaf.grad))
    for plain, moved in zip(*results, strict=True):
        torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_do_not_cost_precision(ranks, backend) -> None:
    """Adding 4096 to the teacher's logits (exact in fp32 for these) changes neither terms nor gradient beyond rounding."""
    ranks.run(check_offsets, 1, backend=backend)


def check_extreme_logits(group, backend):
    """See the test of this name."""
    inf = torch.inf
    rows = [  # student, teacher
        ([1e4, -1e4, 0.0, 3.0], [-1e4, 1e4, 0.0, 3.0]),
        ([1.0, -inf, 2.0, -inf], [0.5, -inf, -1.0, -inf]),
        ([0.3, 0.1, -0.2, 1.0], [1e4, 0.0, 0.0, 0.0]),
        ([1e4, 1e4 - 1, 0.0, -1e4], [1e4 - 2, 1e4, -1e4, 0.0]),
    ]
    student = torch.tensor([row[0] for row in rows], requires_grad=True)
    teacher = torch.tensor([row[1] for row in rows])
    for weight in (0.0, 0.5, 1.0):
        terms = distill_kl(student, teacher, reverse_kl_weight=weight, backend=backend)
        (grad,) = torch.autograd.grad(terms.loss.sum(), student)
        leaf = student.detach().double().requires_grad_()
        # Logits of -1e30 stand for -inf, so that autograd through the dense loss stays finite.
        log_q, log_p = (dense.log_outcomes(part.clamp(min=-1e30)) for part in (leaf, teacher))
        expected = weight * dense.kl(log_q, log_p) + (1 - weight) * dense.kl(log_p, log_q)
        (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
        assert grad.isfinite().all()
        torch.testing.assert_close(terms.loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("inductor", marks=pytest.mark.heavy)])
def test_extreme_logits_give_the_right_finite_values(ranks, backend) -> None:
    """Logits of +-1e4, tokens ruled out by both models, one-hot teachers: the float64 values, and finite gradients."""
    ranks.run(check_extreme_logits, 1, backend=backend)


def check_one_hot_teacher(group, backend):
    """See the test of this name."""
    student = torch.tensor([[0.3, 0.1, -0.2, 1.0]], requires_grad=True)
    teacher = torch.tensor([[-torch.inf, 5.0, -torch.inf, -torch.inf]])
    terms = distill_kl(student, teacher, reverse_kl_weight=0.0, backend=backend)
    terms.loss.sum().backward()
    torch.testing.assert_close(terms.loss, -student.log_softmax(-1)[:, 1].detach())
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    assert terms.reverse_kl.item() == torch.inf
    assert terms.teacher_entropy.item() == 0
    assert distill_kl(student, teacher, reverse_kl_weight=0.1, backend=backend).loss.item() == torch.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hot_teacher_by_infinity(ranks, backend) -> None:
    """A teacher that rules all else out: finite forward KL and gradient; the reverse KL is infinite and says so."""
    ranks.run(check_one_hot_teacher, 1, backend=backend)


def check_uncounted_token(group, backend):
    """See the test of this name."""
    ids = torch.tensor([[1, 2], [1, 2]])
    teacher = torch.tensor([[0.0, 5.0, 1.0, -1.0], [-torch.inf, 5.0, -torch.inf, -torch.inf]])
    for weight in (1.0, 0.5):
        for top_k in (False, True):
            student = torch.tensor([[0.3, 0.1, -0.2, 1.0]] * 2, requires_grad=True)
            if top_k:
                logprobs = teacher.log_softmax(-1).gather(1, ids)
                loss = distill_kl_topk(student, ids, logprobs, reverse_kl_weight=weight, backend=backend).loss
            else:
                loss = distill_kl(student, teacher, reverse_kl_weight=weight, backend=backend).loss
            assert loss.isinf().tolist() == [False, True]
            torch.where(torch.tensor([True, False]), loss, 0.0).sum().backward()
            assert student.grad[0].isfinite().all() and student.grad[0].any()
            assert student.grad[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_does_not_count_has_no_gradient_however_infinite_its_loss(ranks, backend) -> None:
    """A padded token's teacher may rule out what the student would say: ``torch.where`` leaves it a gradient of 0, not NaN."""
    ranks.run(check_uncounted_token, 1, backend=backend)


def check_nan(group, backend, broken):
    """See the test of this name."""
    student, teacher = (part.detach() for part in random_case(dtype=torch.float32))
    (student if broken == "student" else teacher)[2, 5] = torch.nan
    loss = distill_kl(student, teacher, reverse_kl_weight=0.5, backend=backend).loss
    assert loss.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("broken", ["student", "teacher"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_reported_in_its_token_only(ranks, backend, broken) -> None:
    """A NaN logit of either model makes that token's loss NaN, and no other's."""
    ranks.run(check_nan, 1, backend=backend, broken=broken)


def test_merging_stop_tokens_forgives_which_one_is_used() -> None:
    """Models that agree but for which member of a group they end with have zero KL once the group is one action."""
    student, teacher = torch.zeros(1, 5), torch.zeros(1, 5)
    student[0, 1], teacher[0, 3] = 6.0, 6.0
    assert distill_kl(student, teacher, reverse_kl_weight=0.5).loss.item() > 1
    merged = distill_kl(student, teacher, reverse_kl_weight=0.5, stop_token_groups=((1, 3),))
    assert abs(merged.loss.item()) < 1e-6


def test_leading_dimensions_and_empty_batches() -> None:
    """`[s, b, V]` logits give `[s, b]` terms; no tokens give no terms, and an empty gradient."""
    student, teacher = random_case(tokens=6)
    terms = distill_kl(student.view(3, 2, 11), teacher.view(3, 2, 11), reverse_kl_weight=0.2)
    torch.testing.assert_close(terms.loss.flatten(), distill_kl(student, teacher, reverse_kl_weight=0.2).loss)
    empty = torch.zeros(0, 11, requires_grad=True)
    distill_kl(empty, torch.zeros(0, 11), reverse_kl_weight=0.2).loss.sum().backward()
    assert empty.grad.shape == (0, 11)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"reverse_kl_weight": 1.2}, "reverse_kl_weight"),
        ({"reverse_kl_weight": torch.ones(3)}, "reverse_kl_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"vocab_size": 12}, "vocab_size"),
        ({"stop_token_groups": ((1, 2), (2, 3))}, "stop_token_groups"),
        ({"stop_token_groups": ((1, 11),)}, "stop_token_groups"),
        ({"stop_token_groups": ((),)}, "stop_token_groups"),
    ],
)
def test_faults_are_named(options, name) -> None:
    """Each refusal names the argument and its value."""
    student, teacher = random_case()
    with pytest.raises(LossError, match=f"^{name} = "):
        distill_kl(student, teacher, **{"reverse_kl_weight": 0.5, **options})


def test_unequal_padding_needs_the_true_size() -> None:
    """Different widths without `vocab_size` are refused: padding would be read as tokens."""
    with pytest.raises(LossError, match="vocab_size = None"):
        distill_kl(torch.zeros(2, 8), torch.zeros(2, 10), reverse_kl_weight=0.5)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype) -> None:
    """Inductor's kernels give the eager terms and gradients for all families, with stop groups, padding and masks."""
    student, teacher = (part.detach() for part in random_case(tokens=6, vocab=200, dtype=dtype))
    student[0, 3] = teacher[0, 3] = -torch.inf
    common = {"vocab_size": 190, "stop_token_groups": ((1, 5),), "temperature": 1.3}
    calls = [
        lambda z, **o: distill_kl(z, teacher, reverse_kl_weight=0.3, **common, **o),
        lambda z, **o: distill_jsd(z, teacher, teacher_weight=0.4, **common, **o),
        lambda z, **o: vocab_parallel_logprobs(z, torch.arange(6), vocab_size=190, **o),
    ]
    for call in calls:
        results = []
        for options in ({}, {"backend": "inductor"}, {"backend": "inductor", "chunk_tokens": 4}):
            leaf = student.clone().requires_grad_()
            terms = call(leaf, **options)
            (terms[0] * torch.linspace(-1, 1, 6)).sum().backward()
            results.append((*(term.detach() for term in terms), leaf.grad.float()))
        for compiled in results[1:]:
            for ours, eager in zip(compiled, results[0], strict=True):
                torch.testing.assert_close(ours, eager, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=2e-6)
