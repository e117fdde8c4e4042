"""Log-probabilities and entropy over a sharded vocabulary, and estimators from samples that estimate what they say."""

import dense
import pytest
import torch

from megatron_distill.losses import vocab_parallel_logprobs

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tp", "width"), [(1, 37), (2, 24), (4, 10), (4, 16)])
def test_logprobs_equal_dense(ranks, tp, width, dtype):
    """Values and gradients, of log-probability and entropy together, are the dense ones on every rank."""
    for seed, options in enumerate([{}, {"temperature": 0.6, "chunk_tokens": 3}]):
        results = ranks.run(run_logprobs, tp, seed=seed, width=width, dtype=dtype, **options)
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
        rounding = 2**-8 if dtype == torch.bfloat16 else tolerance
        torch.testing.assert_close(joined.double(), logits.grad, rtol=rounding, atol=tolerance)
