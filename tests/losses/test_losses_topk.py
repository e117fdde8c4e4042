"""distill_kl_topk: equal to a dense loss over the K + 1 outcomes, bounded by the full KL, exact where the full KL is."""

import warnings

import dense
import pytest
import torch

from megatron_distill.losses import distill_kl_topk

VOCAB = 37
GROUPS = ((5, 19), (36, 0, 20))
TOKENS = 8
WIDTHS = {1: 40, 2: 24, 4: 16}  # At tp = 4 the last rank holds padding only.


def case(seed, k, by_student=False, dtype=torch.float64):
    """Student and teacher rows, the k ids that one of them prefers, and the teacher's log-probabilities of them."""
    student = dense.random_logits(seed, TOKENS, VOCAB, dtype=dtype)
    teacher_logp = dense.random_logits(seed + 1, TOKENS, VOCAB).log_softmax(-1)
    ids = (student if by_student else teacher_logp).topk(k, dim=-1).indices
    return student, teacher_logp, ids, teacher_logp.gather(-1, ids)


def run_topk(
    group, seed, k, width, groups=(), stop_logprobs=False, weight=0.3, by_student=False, dtype=torch.float64, **options
):
    """One rank's terms and gradient."""
    warnings.simplefilter("ignore")
    full, teacher_logp, ids, logprobs = case(seed, k, by_student, dtype)
    student = dense.shard(full, width, group.rank() if group is not None else 0).requires_grad_()
    stop = teacher_logp[:, [token for members in groups for token in members]] if stop_logprobs else None
    terms = distill_kl_topk(
        student,
        ids,
        logprobs,
        reverse_kl_weight=weight,
        tp_group=group,
        vocab_size=VOCAB,
        stop_token_groups=groups,
        stop_logprobs=stop,
        **options,
    )
    (terms.loss * dense.random_upstream(seed, TOKENS).to(terms.loss.dtype)).sum().backward()
    return [term.detach() for term in terms], student.grad


def partition(row_ids, groups, exact_groups):
    """The outcomes of one token as lists of ids: singles, groups, the tail (last, possibly empty)."""
    ids, members = set(row_ids), {token for group in groups for token in group}
    merged = [list(group) if exact_groups else [t for t in group if t in ids] for group in groups]
    outcomes = [[token] for token in row_ids if token not in members] + [group for group in merged if group]
    covered = {token for outcome in outcomes for token in outcome}
    return [*outcomes, [token for token in range(VOCAB) if token not in covered]]


def dense_topk(
    seed,
    k,
    groups=(),
    stop_logprobs=False,
    weight=0.3,
    by_student=False,
    tail="bucket",
    temperature=1.0,
    dtype=torch.float64,
):
    """Token by token, over explicitly listed outcomes."""
    full, teacher_logp, ids, _ = case(seed, k, by_student, dtype)
    student = full.double().requires_grad_()
    rows = []
    for row in range(TOKENS):
        outcomes = partition(ids[row].tolist(), groups, stop_logprobs)
        lse = [
            [log_p[outcome].logsumexp(-1) for outcome in outcomes if outcome]
            for log_p in ((student[row] / temperature).log_softmax(-1), teacher_logp[row])
        ]
        log_q, log_p = torch.stack(lse[0]), torch.stack(lse[1])
        if tail != "bucket" and outcomes[-1]:
            log_q, log_p = log_q[:-1], log_p[:-1]
        if tail == "renormalised":
            log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
        rows.append((dense.kl(log_p, log_q), dense.kl(log_q, log_p)))
    forward, reverse = (torch.stack(part) for part in zip(*rows, strict=True))
    loss = weight * reverse + (1 - weight) * forward
    (loss * dense.random_upstream(seed, TOKENS)).sum().backward()
    entropy = dense.entropy(dense.log_outcomes(student.detach(), groups if stop_logprobs else (), temperature))
    return [loss.detach(), forward.detach(), reverse.detach()], entropy, student.grad


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalised", "dropped"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_equals_dense(ranks, tp, tail, weight):
    """Loss, both KLs and gradient are those of the listed outcomes: with and without stop groups, either model's top-k."""
    settings = [
        {"k": 6},
        {"k": 6, "by_student": True, "temperature": 0.7},
        {"k": 9, "groups": GROUPS},
        {"k": 4, "groups": GROUPS, "stop_logprobs": True, "chunk_tokens": 3},
        {"k": VOCAB},
    ]
    for seed, setting in enumerate(settings):
        if setting["k"] == VOCAB and tail == "dropped" and tp > 1:
            continue
        results = ranks.run(run_topk, tp, seed=seed, width=WIDTHS[tp], tail=tail, weight=weight, **setting)
        setting = {name: value for name, value in setting.items() if name != "chunk_tokens"}
        expected, entropy, grad = dense_topk(seed, tail=tail, weight=weight, **setting)
        for terms, _ in results:
            for ours, theirs in zip(terms, expected, strict=False):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
            if setting.get("stop_logprobs") or not setting.get("groups"):
                torch.testing.assert_close(terms[3], entropy, rtol=1e-10, atol=1e-11)
        joined = dense.unshard([grad for _, grad in results], VOCAB)
        torch.testing.assert_close(joined, grad, rtol=1e-9, atol=1e-11)
