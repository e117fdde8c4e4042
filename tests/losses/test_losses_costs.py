"""What the losses cost and touch: collectives, bytes kept for the backward, peak memory, and other people's tensors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_distill.errors import LossError
from megatron_distill.losses import (
    distill_jsd,
    distill_kl,
    distill_kl_topk,
    distill_skew_kl,
    fused_linear_distill_kl,
    vocab_parallel_logprobs,
)
from tests.support import dense

TOKENS = 5
GROUPS = ((1, 2), (3, 17))


class CollectiveCounter(TorchDispatchMode):
    """Counts operations of torch.distributed while it is entered."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "c10d" in function.namespace
        return function(*args, **(kwargs or {}))


def loss_by_name(name, student, teacher, group=None, **options):
    """One call of each family on `[T, V]` logits."""
    if name in ("forward", "mixed", "reverse"):
        weight = {"forward": 0.0, "mixed": 0.3, "reverse": 1.0}[name]
        return distill_kl(student, teacher, reverse_kl_weight=weight, tp_group=group, **options).loss
    if name == "jsd":
        return distill_jsd(student, teacher, tp_group=group, **options).loss
    if name == "skew":
        return distill_skew_kl(student, teacher, reverse=True, tp_group=group, **options).loss
    if name == "top-k":
        ids = torch.arange(4).expand(student.shape[0], 4)
        logprobs = torch.full(ids.shape, -2.0)
        return distill_kl_topk(student, ids, logprobs, reverse_kl_weight=0.3, tp_group=group, **options).loss
    if name == "fused":
        head = torch.eye(student.shape[1]).requires_grad_()
        return fused_linear_distill_kl(
            student,
            head,
            teacher,
            head.detach(),
            reverse_kl_weight=0.3,
            tp_group=group,
            reduce_hidden_grad=False,
            **options,
        ).loss
    ids = torch.zeros(student.shape[0], dtype=torch.int64)
    terms = vocab_parallel_logprobs(student, ids, tp_group=group, **options)
    return terms.logprobs + terms.entropy


def count_collectives(group, name, groups):
    """Collectives of forward and backward on one rank."""
    student = dense.random_logits(1, TOKENS, 16, dtype=torch.float32).requires_grad_()
    options = {"stop_token_groups": groups} if groups else {}
    with CollectiveCounter() as forward:
        loss = loss_by_name(name, student, dense.random_logits(2, TOKENS, 16, dtype=torch.float32), group, **options)
    with CollectiveCounter() as backward:
        loss.sum().backward()
    return forward.count, backward.count


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("forward", 1),
        ("mixed", 1),
        ("reverse", 1),
        ("top-k", 1),
        ("log-probs", 1),
        ("fused", 1),
        ("jsd", 2),
        ("skew", 2),
    ],
)
def test_collectives(ranks, name, expected) -> None:
    """One collective forward (two for mixtures), none backward, at tp 2 and 4; stop groups add none."""
    for tp, groups in ((2, ()), (4, GROUPS if name != "log-probs" else ())):
        assert ranks.run(count_collectives, tp, name=name, groups=groups) == [(expected, 0)] * tp


def saved_bytes(name, vocab, **options):
    """Bytes that autograd keeps per token, the two logits tensors not counted."""
    student = torch.randn(TOKENS, vocab, requires_grad=True)
    teacher = torch.randn(TOKENS, vocab)
    inputs = {student.untyped_storage().data_ptr(), teacher.untyped_storage().data_ptr()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_by_name(name, student, teacher, **options)
        total = sum(kept.values())
    del loss
    return total / TOKENS


@pytest.mark.parametrize("name", ["forward", "mixed", "reverse", "jsd", "skew", "log-probs"])
def test_saved_bytes_do_not_grow_with_the_vocabulary(name) -> None:
    """At most 64 bytes per token beside the logits, the same for 1,000 columns and for 50,000, stop groups included."""
    options = {} if name == "log-probs" else {"stop_token_groups": GROUPS}
    small, large = saved_bytes(name, 1_000, **options), saved_bytes(name, 50_000, **options)
    assert small == large
    assert small <= 64


def test_saved_bytes_of_topk_grow_with_k_alone() -> None:
    """Ids (8 bytes) and gradients (4) of K slots, and a constant."""
    small, large = saved_bytes("top-k", 1_000), saved_bytes("top-k", 50_000)
    assert small == large <= 4 * (8 + 4) + 64


def peak_bytes(function):
    """Largest memory held at once while `function` runs, beyond what was held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("in_place", [False, True])
def test_peak_is_a_few_rows_and_the_gradient(in_place) -> None:
    """Beyond the logits: a dozen rows of intermediates of one chunk, plus the gradient unless it replaces the logits."""
    tokens, vocab = 64, 8_192
    row = 4 * vocab
    logits = torch.randn(tokens, vocab, requires_grad=True)
    student = logits * 1.0
    teacher = torch.randn(tokens, vocab)

    def step():
        terms = distill_kl(student, teacher, reverse_kl_weight=0.3, chunk_tokens=1, grad_in_place=in_place)
        torch.autograd.grad(terms.loss.sum(), student)

    gradient = 0 if in_place else tokens * row
    assert peak_bytes(step) <= gradient + 16 * row + 64 * 1024


def test_peak_of_a_token_s_log_probability_is_the_gradient() -> None:
    """In bf16 too, where some of torch's operations go through an fp32 copy of the whole."""
    student = torch.randn(64, 8_192).bfloat16().requires_grad_()

    def step():
        terms = vocab_parallel_logprobs(student, torch.zeros(64, dtype=torch.int64), backend="cpp")
        torch.autograd.grad(terms.logprobs.sum() + terms.entropy.sum(), student)

    assert peak_bytes(step) <= student.nbytes + 64 * 1024


def test_gradient_in_place_equals_the_other() -> None:
    """The gradient is the same, and lies in the logits' memory."""
    teacher = torch.randn(6, 40)
    leaf = torch.randn(6, 40, requires_grad=True)
    grads = []
    for in_place in (False, True):
        logits = leaf * 1.0
        loss = distill_kl(
            logits,
            teacher,
            reverse_kl_weight=0.3,
            grad_in_place=in_place,
            vocab_size=37,
            stop_token_groups=((1, 5),),
            chunk_tokens=4,
        ).loss
        (grad,) = torch.autograd.grad((loss * torch.arange(6)).sum(), logits)
        assert (grad.data_ptr() == logits.data_ptr()) == in_place
        grads.append(grad.clone())
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mixed", "jsd", "skew", "top-k", "log-probs"])
def test_inputs_are_left_alone(name) -> None:
    """Neither model's logits change in forward or backward, and no version counter moves."""
    student, teacher = torch.randn(TOKENS, 30, requires_grad=True), torch.randn(TOKENS, 30)
    copies, versions = (student.detach().clone(), teacher.clone()), (student._version, teacher._version)
    loss_by_name(name, student, teacher).sum().backward()
    assert (student._version, teacher._version) == versions
    torch.testing.assert_close((student.detach(), teacher), copies, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mixed", "jsd", "skew", "top-k", "log-probs"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_overwritten_logits_are_noticed(name, whose) -> None:
    """What Megatron's cross entropy does to fp32 logits between our forward and backward is an error, not a gradient."""
    student, teacher = torch.randn(TOKENS, 30, requires_grad=True), torch.randn(TOKENS, 30)
    logits = student * 1.0
    loss = loss_by_name(name, logits, teacher).sum()
    (logits if whose == "student" else teacher).detach().exp_()
    if whose == "teacher" and name in ("top-k", "log-probs"):
        loss.backward()  # They keep none of the teacher's logits.
        return
    with pytest.raises(LossError, match="logits = overwritten"):
        loss.backward()


def replicated_gradient(group):
    """A rank's gradient of one replicated loss, and the dense gradient of the same columns."""
    full = dense.random_logits(1, TOKENS, 16, dtype=torch.float32)
    teacher = dense.random_logits(2, TOKENS, 16, dtype=torch.float32)
    width = 16 // group.size()
    mine = slice(group.rank() * width, (group.rank() + 1) * width)
    shard = full[:, mine].contiguous().requires_grad_()
    distill_kl(shard, teacher[:, mine].contiguous(), reverse_kl_weight=0.3, tp_group=group).loss.sum().backward()
    whole = full.requires_grad_()
    distill_kl(whole, teacher, reverse_kl_weight=0.3).loss.sum().backward()
    return shard.grad.norm() / whole.grad[:, mine].norm()


def test_the_loss_is_replicated_not_summed(ranks) -> None:
    """A rank's gradient is exactly its part of the one loss's gradient: neither tp times as large nor 1/tp."""
    for tp in (2, 4):
        for ratio in ranks.run(replicated_gradient, tp):
            assert abs(ratio - 1) < 1e-5
