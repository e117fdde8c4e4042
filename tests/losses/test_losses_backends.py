"""Backends: chosen by device, dtype and what the machine has; equal whatever runs, however the tensors lie in memory."""

import ctypes
import math
import os
import platform
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_distill import compiler
from megatron_distill.errors import BuildError, LossError
from megatron_distill.losses import (
    backends,
    cpu_kernels,
    distill_jsd,
    distill_kl,
    distill_kl_topk,
    vocab_parallel_logprobs,
)
from tests.support import dense

GROUPS = ((1, 5), (2040, 2050))


def favourites(tokens, vocab):
    """Nine ids of each token, that both models believe in."""
    return torch.stack(
        [torch.randperm(vocab, generator=torch.Generator().manual_seed(row))[:9] for row in range(tokens)]
    )


def models(tokens, vocab, dtype):
    """Student and teacher logits, with half the probability or so on the favourites."""
    lift = torch.zeros(tokens, vocab, dtype=torch.float64).scatter(1, favourites(tokens, vocab), math.log(vocab / 9))
    return [(dense.random_logits(seed, tokens, vocab) + lift).to(dtype) for seed in (1, 2)]


def calls(tokens, vocab):
    """One call of each family, on logits of `vocab` columns."""
    ids = favourites(tokens, vocab)

    def topk(student, teacher, **options):
        logprobs = teacher.double().log_softmax(-1).gather(1, ids)
        return distill_kl_topk(student, ids, logprobs, reverse_kl_weight=0.3, **options)[0]

    def logprobs(student, teacher, **options):
        terms = vocab_parallel_logprobs(student, ids[:, 0], **options)
        return terms.logprobs + 0.5 * terms.entropy

    common = {"stop_token_groups": GROUPS, "temperature": 1.3}
    return {
        "kl": lambda z, t, **o: distill_kl(z, t, reverse_kl_weight=0.3, **common, **o).loss,
        "jsd": lambda z, t, **o: distill_jsd(z, t, teacher_weight=0.4, **common, **o).loss,
        "topk": topk,
        "logprobs": logprobs,
    }


def value_and_gradient(loss, student, teacher, **options):
    """Per-token loss and the gradient of a random combination, float64."""
    leaf = student.clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(leaf, teacher, **options)
    (value * dense.random_upstream(7, value.numel()).to(value.dtype)).sum().backward()
    return value.detach().double(), leaf.grad.double()


def assert_equals_float64(loss, student, teacher, **options):
    """Value to 2e-5 of its size; gradient, in norm, to its dtype's rounding."""
    value, grad = value_and_gradient(loss, student, teacher, **options)
    expected, expected_grad = value_and_gradient(loss, student.double(), teacher.double(), backend="eager")
    torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-6)
    rounding = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[student.dtype]
    denormal = 3e-8 * grad.numel() ** 0.5 if student.dtype == torch.float16 else 0.0  # its steps there are 6e-8
    assert (grad - expected_grad).norm() < rounding * expected_grad.norm() + denormal


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [2055, 151_936])
@pytest.mark.parametrize("name", ["kl", "jsd", "topk", "logprobs"])
def test_cpp_equals_float64_at_any_width(name, vocab, dtype) -> None:
    """Widths that are no multiple of a block or a vector, and a real one, with masks and a student-only -inf."""
    student, teacher = models(3, vocab, dtype)
    student[0, 3] = teacher[0, 3] = -torch.inf
    student[1, 2047] = -torch.inf
    if name == "kl":  # else its forward KL is infinite
        teacher[1, 2047] = -torch.inf
    assert_equals_float64(calls(3, vocab)[name], student, teacher, backend="cpp")


@pytest.mark.parametrize("name", ["kl", "jsd", "topk", "logprobs"])
def test_cpp_without_avx512_equals_float64(name, monkeypatch) -> None:
    """The portable build, for narrower vectors than this processor may have."""
    if platform.machine() != "x86_64":
        pytest.skip("the flag names x86 processors")
    portable = cpu_kernels.build("-march=x86-64-v3")
    assert not portable.has_avx512()
    monkeypatch.setattr(cpu_kernels, "library", lambda: portable)
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = models(3, 2055, dtype)
        student[0, 3] = teacher[0, 3] = -torch.inf
        assert_equals_float64(calls(3, 2055)[name], student, teacher, backend="cpp")


@pytest.mark.parametrize("name", ["kl", "jsd", "topk", "logprobs"])
def test_threads_change_nothing(name) -> None:
    """Bitwise the same loss and gradient from 1 and from 3 threads, twice: rows are independent and sums have one order."""
    student, teacher = models(64, 9_001, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            results.append(value_and_gradient(calls(64, 9_001)[name], student, teacher, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])


@pytest.mark.parametrize("name", ["kl", "jsd", "topk", "logprobs"])
def test_columns_far_apart_in_memory(name) -> None:
    """Logits whose vocabulary is not the fastest dimension give the same loss and gradient."""
    student, teacher = (part.T.contiguous().T for part in models(3, 2100, torch.float32))
    assert student.stride(1) != 1
    assert_equals_float64(calls(3, 2100)[name], student, teacher, backend="cpp")


@pytest.mark.slow
def test_large_gradients_are_written_past_the_caches() -> None:
    """The streaming path (gradients of 16 MiB and more, rows at any alignment) writes the same numbers as the other."""
    rows, vocab = 4, 1_050_001
    student, teacher = models(rows, vocab, torch.float32)
    loss = calls(rows, vocab)["kl"]
    _, whole = value_and_gradient(loss, student, teacher, backend="cpp")
    _, by_row = value_and_gradient(loss, student, teacher, backend="cpp", chunk_tokens=1)
    assert torch.equal(whole, by_row)


@pytest.mark.parametrize("name", ["kl", "jsd", "topk", "logprobs"])
def test_a_temperature_may_be_a_tensor_that_holds_a_number(name) -> None:
    """One that an annealing loop made, say; one that asks for a gradient is refused, since it would get none."""
    student, teacher = models(3, 60, torch.float32)
    ids = favourites(3, 60)
    call = {
        "kl": lambda **o: distill_kl(student, teacher, reverse_kl_weight=0.3, **o).loss,
        "jsd": lambda **o: distill_jsd(student, teacher, **o).loss,
        "topk": lambda **o: distill_kl_topk(student, ids, ids * -0.5 - 2, reverse_kl_weight=0.3, **o).loss,
        "logprobs": lambda **o: vocab_parallel_logprobs(student, ids[:, 0], **o).logprobs,
    }[name]
    assert torch.equal(call(temperature=torch.tensor(2.0)), call(temperature=2.0))
    with pytest.raises(LossError, match="temperature = a tensor that requires a gradient"):
        call(temperature=torch.tensor(2.0, requires_grad=True))


def test_logits_that_kernels_cannot_read_side_by_side_are_refused() -> None:
    """A teacher on another device, whose pointer the C++ would follow, or of a precision that it does not know."""
    student, teacher = models(3, 60, torch.float32)
    with pytest.raises(LossError, match="teacher_logits = on meta: must be where student_logits are, on cpu"):
        distill_kl(student, teacher.to("meta"), reverse_kl_weight=0.3)
    with pytest.raises(LossError, match=r"teacher_logits = of torch\.float64: must be bf16"):
        distill_kl(student, teacher.double(), reverse_kl_weight=0.3)
    assert distill_kl(student.double(), teacher, reverse_kl_weight=0.3).loss.dtype == torch.float64


def test_a_folder_that_nothing_may_be_executed_from_is_passed_over(monkeypatch, tmp_path) -> None:
    """As on a home that is mounted so; without any other it is an error that says it, after which losses run eagerly."""
    load, refused = ctypes.CDLL, [tmp_path]

    def loaded(path):
        if any(str(folder) in path for folder in refused):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    monkeypatch.setattr(ctypes, "CDLL", loaded)
    assert compiler.library(cpu_kernels.SOURCE, cpu_kernels.HEADERS).kl_statistics
    refused.append(Path(tempfile.gettempdir()))
    with pytest.raises(BuildError, match="none can be written to, and executed from"):
        compiler.library(cpu_kernels.SOURCE, cpu_kernels.HEADERS)


def test_the_choice() -> None:
    """C++ for the precisions of training on a CPU, eager for float64; what cannot run is refused by name."""
    assert backends.kernels_for(torch.zeros(1, 4), None).backend == "cpp"
    assert backends.kernels_for(torch.zeros(1, 4, dtype=torch.bfloat16), None).backend == "cpp"
    assert backends.kernels_for(torch.zeros(1, 4, dtype=torch.float64), None).backend == "eager"
    with pytest.raises(LossError, match="backend = 'cpp': needs"):
        backends.kernels_for(torch.zeros(1, 4, dtype=torch.float64), "cpp")
    with pytest.raises(LossError, match="backend = 'numpy': must be"):
        backends.kernels_for(torch.zeros(1, 4), "numpy")


def test_the_choice_on_a_gpu(monkeypatch) -> None:
    """Triton for the precisions of training, on whichever card; eager for float64 and where there is no Triton. The C++
    kernels would follow a GPU's pointer and end the process: they are refused for whatever is not on the CPU."""

    def on_a_gpu(dtype):
        return SimpleNamespace(dtype=dtype, device=torch.device("cuda:1"))  # all that the choice looks at

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert backends.kernels_for(on_a_gpu(dtype), None).backend == "triton"
        with pytest.raises(LossError, match="backend = 'cpp': needs CPU tensors, not cuda"):
            backends.kernels_for(on_a_gpu(dtype), "cpp")
    assert backends.kernels_for(on_a_gpu(torch.float64), None).backend == "eager"
    with pytest.raises(LossError, match="backend = 'triton': needs bf16"):
        backends.kernels_for(on_a_gpu(torch.float64), "triton")
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    assert backends.kernels_for(on_a_gpu(torch.bfloat16), None).backend == "eager"


def test_without_a_compiler_losses_run_eagerly(monkeypatch, tmp_path) -> None:
    """No compiler on the path: said once, with what to install, and the loss is computed all the same."""
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    cpu_kernels.library.cache_clear()
    backends._has_compiler.cache_clear()
    backends._load.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Install g"):
            chosen = backends.kernels_for(torch.zeros(1, 4), None)
        with pytest.raises(LossError, match=r"backend = 'cpp': cannot run here: .*Install g"):
            backends.kernels_for(torch.zeros(1, 4), "cpp")
        assert chosen.backend == "eager"
    finally:
        cpu_kernels.library.cache_clear()
        backends._has_compiler.cache_clear()
