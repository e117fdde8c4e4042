"""The Triton kernels without a GPU: compiled for each of three, and run in the interpreter at a real width.

The grid of small cases (layouts, paddings, precisions, extremes) is that of the other backends, in the files of each loss.
"""

import pytest
import torch

from megatron_distill.errors import LossError
from megatron_distill.losses import (
    distill_jsd,
    distill_kl,
    distill_kl_topk,
    triton_launch,
    vocab_parallel_logprobs,
)
from megatron_distill.losses.triton_configs import CONFIGS, DEFAULT, TUNED, config_for
from megatron_distill.losses.triton_resources import ARCHITECTURES, CHOSEN, KERNELS, compiled_resources, configs_of
from megatron_distill.losses.triton_tune import kernel_calls, tune
from tests.losses.test_losses_backends import assert_equals_float64, calls, models
from tests.support.pretended_gpu import MAX_GRID, pretended_gpu

pytestmark = pytest.mark.slow


COMPILED = [
    pytest.param(
        kernel,
        config,
        architecture,
        id=f"{kernel.__name__}-{config.block}-sm_{architecture}",
        marks=() if architecture == 90 and config in (DEFAULT, CHOSEN) else pytest.mark.heavy,
    )
    for kernel in KERNELS
    for config in configs_of(kernel)
    for architecture in ARCHITECTURES
]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("kernel", "config", "architecture"), COMPILED)
def test_compiles_for_a_gpu_without_spills(kernel, config, architecture, dtype) -> None:
    """No spilled register, few enough for two programs of 8 warps on a multiprocessor, and 16-byte loads of logits, whatever
    the number of columns."""
    resources = compiled_resources(kernel, architecture, dtype, config)
    assert resources.spilled_bytes == 0
    assert resources.registers <= 128
    assert resources.wide_loads or kernel.__name__ == "chosen_gradient"


@pytest.mark.parametrize(
    ("tokens", "vocab", "student_dtype", "teacher_dtype"),
    [
        (3, 5_003, torch.bfloat16, torch.bfloat16),
        (1, 4_096, torch.float16, torch.float16),
        (70_000, 20, torch.float32, torch.bfloat16),
        (2, 1, torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_gpu_would_launch_every_kernel(tokens, vocab, student_dtype, teacher_dtype) -> None:
    """Triton binds, specialises and compiles what the losses launch, forward and backward, for logits of every precision, two
    models of different ones, rows of any alignment and a single column; and the grids are within CUDA's bounds."""
    student, teacher = (torch.randn(tokens, vocab, dtype=dtype) for dtype in (student_dtype, teacher_dtype))
    ids, top = torch.zeros(tokens, 1, dtype=torch.int64), torch.zeros(tokens, 1)
    masked = {"stop_token_groups": ((0, vocab - 1),) if vocab > 1 else None, "temperature": 2, "backend": "triton"}
    with pretended_gpu() as gpu:
        for loss in (
            lambda z: distill_kl(z, teacher, reverse_kl_weight=0.3, backend="triton").loss,
            lambda z: distill_kl(z, teacher, reverse_kl_weight=0.3, **masked).loss,
            lambda z: distill_jsd(z, teacher, **masked).loss,
            lambda z: distill_kl_topk(z, ids, top, reverse_kl_weight=0.3, backend="triton").loss,
            lambda z: vocab_parallel_logprobs(z, ids[:, 0], backend="triton").entropy,
        ):
            loss(student.clone().requires_grad_()).sum().backward()
    assert {launch.name for launch in gpu.launches} == {kernel.__name__ for kernel in KERNELS}
    for launch in gpu.launches:
        assert all(0 < size <= most for size, most in zip(launch.grid, MAX_GRID, strict=True))
        assert launch.grid[0] == tokens


def check_far(group, folder):
    """Rows 2^30 columns apart, in a file that holds nothing but them."""
    stride, tokens, vocab = 2**30, 4, 300
    z, t, out = (
        torch.from_file(f"{folder}/{name}", shared=True, size=tokens * stride, dtype=torch.bfloat16).as_strided(
            (tokens, vocab), (stride, 1)
        )
        for name in ("z", "t", "out")
    )
    student, teacher = models(tokens, vocab, torch.bfloat16)
    z.copy_(student), t.copy_(teacher)
    near, far = torch.empty_like(student), out
    row, normalisers = torch.full((tokens,), 0.5), torch.zeros(tokens, 5)
    for a, b, written in ((student, teacher, near), (z, t, far)):
        triton_launch.kl_gradient_(written, a, b, normalisers, row, row, 1.0)
    assert torch.equal(near, far)
    assert torch.equal(
        triton_launch.kl_statistics(student, teacher, None, 1.0), triton_launch.kl_statistics(z, t, None, 1.0)
    )


def test_rows_beyond_two_billion_logits(ranks, tmp_path) -> None:
    """An offset of 32 bits would read and write other rows from the third one on."""
    ranks.run(check_far, 1, folder=str(tmp_path))


def check_configs(group):
    """Each config in turn, written down as if it were this device's."""
    student, teacher = models(2, 5_003, torch.float32)
    for config in CONFIGS:
        TUNED[0] = dict.fromkeys(kernel_calls(student, teacher), config)
        try:
            for name in ("kl", "topk"):
                assert_equals_float64(calls(2, 5_003)[name], student, teacher, backend="triton")
            assert config_for("kl_statistics", 151_936, student.device) == config
        finally:
            del TUNED[0]


def test_every_config_equals_float64(ranks) -> None:
    """Whatever the table says a kernel should run with, results are right."""
    ranks.run(check_configs, 1)


def check_tuning(group):
    """Small tensors: times mean nothing in the interpreter."""
    TUNED[0] = {"kl_gradient": CONFIGS[2]}
    took = tune(1, 300, torch.device("cpu"), repeats=1)
    assert TUNED.pop(0) == {"kl_gradient": CONFIGS[2]}
    names = {kernel.fn.__name__ for kernel in KERNELS} - {"chosen_gradient"}
    assert {name: set(times) for name, times in took.items()} == {name: set(CONFIGS) for name in names}


def test_tuning_times_every_kernel_with_every_config(ranks) -> None:
    """Each kernel runs with each config of the set, and the table is as it was before."""
    ranks.run(check_tuning, 1)


def check_wide(group, name, vocab, dtype):
    """One family at a real width, against float64."""
    student, teacher = models(2, vocab, dtype)
    student[0, 3] = teacher[0, 3] = -torch.inf
    assert_equals_float64(calls(2, vocab)[name], student, teacher, backend="triton")


@pytest.mark.parametrize(
    ("name", "vocab"),
    [(name, 4_099) for name in ("kl", "jsd", "topk", "logprobs")]
    + [("logprobs", 151_936)]
    + [pytest.param(name, 151_936, marks=pytest.mark.heavy) for name in ("kl", "jsd", "topk")],
)
def test_equals_float64_at_real_widths(ranks, name, vocab) -> None:
    """Qwen's 151,936 columns, and a width that is no multiple of anything, with stop groups, masks and a temperature."""
    ranks.run(check_wide, 1, name=name, vocab=vocab, dtype=torch.float32)


def check_strided(group, name):
    """Columns apart in memory, and the gradient into such a tensor."""
    student, teacher = (part.T.contiguous().T for part in models(3, 2100, torch.float32))
    assert_equals_float64(calls(3, 2100)[name], student, teacher, backend="triton")


@pytest.mark.parametrize("name", ["kl", "jsd", "topk", "logprobs"])
def test_columns_far_apart_in_memory(ranks, name) -> None:
    """Logits whose vocabulary is not the fastest dimension give the same loss and gradient."""
    ranks.run(check_strided, 1, name=name)


def check_empty(group):
    """No tokens at all."""
    empty = torch.zeros(0, 40, requires_grad=True)
    distill_kl(empty, torch.zeros(0, 40), reverse_kl_weight=0.2, backend="triton").loss.sum().backward()
    assert empty.grad.shape == (0, 40)


def test_no_tokens(ranks) -> None:
    """A micro-batch without response tokens launches nothing and has an empty gradient."""
    ranks.run(check_empty, 1)


def test_a_cpu_tensor_is_refused_outside_the_interpreter() -> None:
    """Said with what to do instead, not by an error inside Triton."""
    with pytest.raises(LossError, match="backend = 'triton': needs CUDA tensors"):
        distill_kl(torch.zeros(1, 8), torch.zeros(1, 8), reverse_kl_weight=0.5, backend="triton")
