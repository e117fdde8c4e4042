"""Which blocks the Triton kernels are fastest with on this GPU, once per kind of GPU: prints the entry for ``triton_configs``.

    python -m megatron_distill.losses.triton_tune            # a minute; the GPU should be idle

Every kernel runs with every config of the fixed set on 2,048 tokens and 151,936 columns, in bf16 and fp32; the config with the
least time for both together is the one to write down. A changed entry changes the last bits of a run's losses.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_distill.errors import LossError
from megatron_distill.losses import triton_launch
from megatron_distill.losses.kernels import Mixture
from megatron_distill.losses.triton_configs import CONFIGS, TUNED, Config, capability_of

NUM_CHOSEN = 64


def kernel_calls(student_TV: Tensor, teacher_TV: Tensor) -> dict[str, Callable[[], object]]:
    """One call of each kernel that walks over a vocabulary."""
    num_tokens, num_columns = student_TV.shape
    out, jsd = torch.empty_like(student_TV), Mixture(0.5, 0.5, 0.5)
    columns = torch.linspace(0, num_columns - 1, NUM_CHOSEN, device=student_TV.device).long().expand(num_tokens, -1)
    ones = torch.ones(num_tokens, 5, device=student_TV.device)
    row, pair = ones[:, 0].contiguous(), (student_TV, teacher_TV)
    one_model = (ones[:, :2], row, row, row, 1.0)
    chosen = (columns, ones[:, :1].expand(-1, NUM_CHOSEN), ones[:, :3], row, 1.0)
    return {
        "kl_statistics": partial(triton_launch.kl_statistics, *pair, None, 1.0),
        "kl_gradient": partial(triton_launch.kl_gradient_, out, *pair, ones, row, row, 1.0),
        "mixture_statistics": partial(triton_launch.mixture_statistics, *pair, None, ones, jsd, 1.0),
        "mixture_gradient": partial(triton_launch.mixture_gradient_, out, *pair, ones, row, row, jsd, 1.0),
        "softmax_statistics": partial(triton_launch.softmax_statistics, student_TV, 1.0),
        "softmax_gradient": partial(triton_launch.softmax_gradient_, out, student_TV, *one_model),
        "rest_gradient": partial(triton_launch.rest_gradient_, out, student_TV, *chosen),
    }


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Least time of a call, after one that compiles."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def tune(num_tokens: int, num_columns: int, device: torch.device, repeats: int) -> dict[str, dict[Config, float]]:
    """Kernel -> config -> seconds for bf16 and fp32 together."""
    found: dict[str, dict[Config, float]] = {}
    capability = capability_of(device)
    before = TUNED.get(capability)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            student, teacher = (torch.randn(num_tokens, num_columns, device=device).to(dtype) for _ in range(2))
            for name, call in kernel_calls(student, teacher).items():
                for config in CONFIGS:
                    TUNED[capability] = {name: config}
                    took = found.setdefault(name, {})
                    took[config] = took.get(config, 0.0) + seconds(call, device, repeats)
    finally:
        TUNED.pop(capability)
        if before is not None:
            TUNED[capability] = before
    return found


def main() -> None:
    """Measure on the GPU, print times and the entry.

    Raises:
        LossError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise LossError(
            "device = cpu: the Triton kernels are tuned on the GPU that they will run on. Run this on a machine with one."
        )
    device = torch.device("cuda")
    found = tune(2_048, 151_936, device, repeats=20)
    print("ms for bf16 and fp32".ljust(22) + "".join(f"{f'{c.block} x {c.num_warps}':>12}" for c in CONFIGS))
    for name, took in found.items():
        print(f"{name:<22}" + "".join(f"{took[config] * 1e3:>12.2f}" for config in CONFIGS))
    print(f"\n    {capability_of(device)}: {{")
    for name, took in found.items():
        print(f'        "{name}": {min(took, key=lambda config: took[config])},')
    print("    },")


if __name__ == "__main__":
    main()
