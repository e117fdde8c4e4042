"""Log-probabilities and entropy over a sharded vocabulary, and estimators from samples that estimate what they say."""

import itertools

import pytest
import torch

from megatron_distill.errors import LossError
from megatron_distill.losses import log_ratio_reward, policy_gradient_loss, sampled_kl, vocab_parallel_logprobs
from tests.support import dense

VOCAB, TOKENS = 37, 10


def ids_for(seed):
    return torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(seed))


def run_logprobs(group, seed, width, dtype, **options):
    """One rank's log-probabilities, entropies and the gradient of a random combination of them."""
    full = dense.random_logits(seed, TOKENS, VOCAB, dtype=dtype)
    logits = dense.shard(full, width, group.rank() if group is not None else 0).requires_grad_()
    terms = vocab_parallel_logprobs(logits, ids_for(seed), tp_group=group, vocab_size=VOCAB, **options)
    weights = [dense.random_upstream(seed + i, TOKENS).to(terms.logprobs.dtype) for i in range(2)]
    (terms.logprobs * weights[0] + terms.entropy * weights[1]).sum().backward()
    return terms.logprobs.detach(), terms.entropy.detach(), logits.grad


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("eager", torch.float64)]
    + [(b, d) for b in ("eager", "cpp") for d in (torch.float32, torch.bfloat16)]
    + [("triton", torch.bfloat16)],
)
@pytest.mark.parametrize(("tp", "width"), [(1, 37), (2, 24), (4, 10), (4, 16)])
def test_logprobs_equal_dense(ranks, tp, width, backend, dtype) -> None:
    """Values and gradients, of log-probability and entropy together, are the dense ones on every rank."""
    for seed, options in enumerate([{}, {"temperature": 0.6, "chunk_tokens": 3}]):
        results = ranks.run(run_logprobs, tp, seed=seed, width=width, dtype=dtype, backend=backend, **options)
        logits = dense.random_logits(seed, TOKENS, VOCAB, dtype=dtype).double().requires_grad_()
        log_q = dense.log_outcomes(logits, temperature=options.get("temperature", 1.0))
        chosen, entropy = log_q.gather(-1, ids_for(seed)[:, None]).squeeze(-1), dense.entropy(log_q)
        (
            chosen * dense.random_upstream(seed, TOKENS) + entropy * dense.random_upstream(seed + 1, TOKENS)
        ).sum().backward()
        tolerance = 1e-12 if dtype == torch.float64 else 5e-6
        for logprobs, ours, _ in results:
            torch.testing.assert_close(logprobs.double(), chosen.detach(), rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(ours.double(), entropy.detach(), rtol=tolerance, atol=tolerance)
        joined = dense.unshard([grad for *_, grad in results], VOCAB)
        half = 2**-7 if backend == "triton" else 2**-8  # Triton's interpreter rounds towards 0
        rounding = half if dtype == torch.bfloat16 else tolerance
        torch.testing.assert_close(joined.double(), logits.grad, rtol=rounding, atol=tolerance)


def test_an_id_outside_the_vocabulary_shows_as_nan() -> None:
    """-100, or a padded column: NaN in that token, nowhere else."""
    logits = torch.zeros(3, 8)
    logprobs = vocab_parallel_logprobs(logits, torch.tensor([-100, 2, 7]), vocab_size=7).logprobs
    assert logprobs.isnan().tolist() == [True, False, True]


def test_bf16_gradient_of_a_likely_token_is_not_rounded_away() -> None:
    """At q = 0.9999 the token's own gradient is 1 - q = 1e-4, not the difference of two bf16 numbers near 1."""
    logits = torch.zeros(1, 2, dtype=torch.bfloat16)
    logits[0, 0] = 9.25
    leaf = logits.requires_grad_()
    vocab_parallel_logprobs(leaf, torch.tensor([0])).logprobs.sum().backward()
    assert leaf.grad[0, 0].item() == pytest.approx(torch.sigmoid(torch.tensor(-9.25)).item(), rel=1e-2)


def expected_gradient(direction, source, estimator, log_q_leaf, log_p):
    """Exact expectation over the sampled token of the loss's gradient, and the gradient of the KL it names."""
    log_q = log_q_leaf.log_softmax(-1)
    terms = sampled_kl(log_q, log_p, direction=direction, sampled_from=source, estimator=estimator)
    weights = (log_q if source == "student" else log_p).exp().detach()
    (estimated,) = torch.autograd.grad((weights * terms.loss).sum(), log_q_leaf, retain_graph=True)
    divergence = dense.kl(log_q, log_p) if direction == "reverse" else dense.kl(log_p, log_q)
    (exact,) = torch.autograd.grad(divergence.sum(), log_q_leaf)
    value = (weights * terms.kl).sum()
    return estimated, exact, value, (dense.kl(log_q, log_p) if source == "student" else dense.kl(log_p, log_q)).sum()


ALLOWED = [
    ("reverse", "student", "k1"),
    ("reverse", "student", "k2"),
    ("forward", "student", "k3"),
    ("forward", "teacher", "k1"),
    ("forward", "teacher", "k3"),
]


@pytest.mark.parametrize("combination", ALLOWED)
def test_estimators_have_the_gradient_they_name(combination) -> None:
    """Averaged exactly over all tokens, each allowed loss has the gradient of its KL, and k3 the value of its samples' KL."""
    leaf = dense.random_logits(1, 1, 9)[0].requires_grad_()
    log_p = dense.random_logits(2, 1, 9)[0].log_softmax(-1)
    estimated, exact, value, expected_value = expected_gradient(*combination, leaf, log_p)
    torch.testing.assert_close(estimated, exact)
    torch.testing.assert_close(value, expected_value)


REFUSED = sorted(
    set(itertools.product(("forward", "reverse"), ("student", "teacher"), ("k1", "k2", "k3"))) - set(ALLOWED)
)


@pytest.mark.parametrize(("direction", "source", "estimator"), REFUSED)
def test_the_rest_is_refused(direction, source, estimator) -> None:
    """Whatever descends on something else than it names is refused, with what to use instead."""
    logprobs = torch.tensor([-1.0])
    with pytest.raises(LossError, match=r"refused: .*(Use|sample)"):
        sampled_kl(logprobs, logprobs, direction=direction, sampled_from=source, estimator=estimator)


@pytest.mark.parametrize("word", ["direction", "sampled_from", "estimator"])
def test_a_misspelt_word_is_refused(word) -> None:
    """It would have descended on something."""
    words = {"direction": "reverse", "sampled_from": "student", "estimator": "k2", word: "fwd"}
    with pytest.raises(LossError, match=f"{word} = 'fwd': must be one of '"):
        sampled_kl(torch.tensor([-1.0]), torch.tensor([-1.0]), **words)


def test_why_they_are_refused() -> None:
    """k1 of student samples has expected gradient 0; k3's is the forward KL's; teacher-sampled log-ratios miss reverse KL."""
    leaf = dense.random_logits(1, 1, 9)[0].requires_grad_()
    log_q, log_p = leaf.log_softmax(-1), dense.random_logits(2, 1, 9)[0].log_softmax(-1)
    q, p, gap = log_q.exp().detach(), log_p.exp(), log_q - log_p

    def grad(value):
        return torch.autograd.grad(value, leaf, retain_graph=True)[0]

    reverse, forward = grad(dense.kl(log_q, log_p)), grad(dense.kl(log_p, log_q))
    torch.testing.assert_close(grad((q * gap).sum()), torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad((q * (torch.expm1(-gap) + gap)).sum()), forward)
    teacher_sampled = grad((p * gap.detach() * log_q).sum())
    assert torch.cosine_similarity(teacher_sampled, reverse, dim=0) < 0.9


def test_log_ratio_reward_is_the_reverse_kl_policy_gradient() -> None:
    """As an advantage it gives, in expectation, the reverse-KL gradient; clipped it is bounded; it is never differentiated."""
    leaf = dense.random_logits(1, 1, 9)[0].requires_grad_()
    log_q, log_p = leaf.log_softmax(-1), dense.random_logits(2, 1, 9)[0].log_softmax(-1)
    reward = log_ratio_reward(log_q, log_p)
    loss = policy_gradient_loss(log_q, log_q.detach(), reward).loss
    (estimated,) = torch.autograd.grad((log_q.exp().detach() * loss).sum(), leaf, retain_graph=True)
    torch.testing.assert_close(estimated, torch.autograd.grad(dense.kl(log_q, log_p), leaf)[0])
    assert log_ratio_reward(log_q, log_p, clip_nats=0.5).abs().max() <= 0.5
    assert not reward.requires_grad
    with pytest.raises(LossError, match="clip_nats"):
        log_ratio_reward(log_q, log_p, clip_nats=0.0)
