"""Run Megatron, unmodified, on CPU processes joined by gloo: the only place that knows how.

Megatron assumes CUDA in four ways: it asks torch for tensors on "cuda", moves modules with ``.cuda()``, uses streams,
events and CUDA random states, and initialises with a device id. ``install()`` answers each question with the CPU's
answer *before Megatron is imported*, and does nothing on a machine with a GPU. ``torch.cuda.is_available()`` keeps
saying False, since torch itself (DataLoader pinning, dynamo) believes it.

Written for megatron-core 0.19 and torch 2.14; ``tests/megatron/test_cpu_backend.py`` fails when a patch of Megatron is
no longer needed. Not a performance path: it exists so that what is tested is what is shipped.

Names to know: ``install`` (once per process), ``is_cpu``, ``CPU_ARGUMENTS`` (the Megatron flags a CPU run needs).
"""

import collections
import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils._device

from megatron_distill.errors import DistillError

CPU = torch.device("cpu")

# Megatron flags without which a CPU process dies, beside those of its own layers (``backend.LOCAL_ARGUMENTS``): each names
# a kernel or a backend that exists for CUDA only.
CPU_ARGUMENTS = (
    "--distributed-backend=gloo",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
)

_FACTORIES = (
    *("zeros", "ones", "empty", "full", "tensor", "as_tensor", "scalar_tensor", "arange", "linspace", "eye"),
    *("rand", "randn", "randint", "empty_strided", "triu_indices", "tril_indices"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
)
_TENSOR_FACTORIES = ("new_zeros", "new_empty", "new_full", "new_ones", "new_tensor")


def is_cpu() -> bool:
    """True where no CUDA device exists, i.e. where this backend is (or would be) active."""
    return not torch.cuda.is_available()


def install() -> bool:
    """Make this process able to import and run Megatron on CPU. Idempotent.

    Returns:
        True if the CPU backend is active in this process, False on a machine with a GPU.

    Raises:
        DistillError: torch finds no GPU where there should be one, and would train on CPU, hundreds of times slower.
    """
    if not is_cpu():
        return False
    require_promised_gpu()
    _install_once()
    return True


def require_promised_gpu() -> None:
    """Refuse a machine whose GPU torch does not find.

    Raises:
        DistillError: naming what promises one.
    """
    if is_cpu() and (promise := promised_gpu()):
        raise DistillError(
            f"{promise}: promises a GPU, but torch {torch.__version__} finds none. The driver is missing or too old (CUDA 13 "
            "takes 580 or newer), or the container was started without its GPUs. Compare with nvidia-smi. To use the CPU, set "
            "MEGATRON_DISTILL_DEVICE=cpu."
        )


def promised_gpu(devices: Path = Path("/dev")) -> str | None:
    """What says that this process should see a GPU, as "where = value"; None if nothing does.

    The launcher's word counts first (a cluster profile knows what its nodes have), then whether the user asked for no
    device, then the driver's device files.
    """
    if word := os.environ.get("MEGATRON_DISTILL_DEVICE"):
        return "MEGATRON_DISTILL_DEVICE = cuda" if word == "cuda" else None
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return None
    files = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    return f"{devices} = {', '.join(files)}" if files else None


@functools.cache
def _install_once() -> None:
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's argument check asks for it
    # megatron-core's jit_fuser compiles small functions with Inductor at first call: minutes, for nothing, on CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _redirect_devices()
    _redirect_cuda_runtime()
    _redirect_process_groups()
    _patch_megatron()


def _to_cpu(device: Any) -> Any:
    """The CPU for every spelling of a CUDA device ("cuda", "cuda:1", 0, torch.device("cuda")); others unchanged."""
    is_index = isinstance(device, int) and not isinstance(device, bool)
    if is_index or (isinstance(device, str | torch.device) and str(device).startswith("cuda")):
        return CPU
    return device


def _redirect_devices() -> None:
    # torch caches the set of its device constructors at first use; built after the patch, it would miss the originals, and
    # `with torch.device(...)` (transformers' from_pretrained) would leave tensors uninitialised.
    torch.utils._device._device_constructors()

    def redirect(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def call(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                kwargs["device"] = _to_cpu(kwargs["device"])
            return factory(*args, **kwargs)

        return call

    for name in _FACTORIES:
        setattr(torch, name, redirect(getattr(torch, name)))
    for name in _TENSOR_FACTORIES:
        setattr(torch.Tensor, name, redirect(getattr(torch.Tensor, name)))

    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(_to_cpu(arg) if isinstance(arg, str | torch.device) else arg for arg in args)
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        return tensor_to(self, *args, **kwargs)

    def typed(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        # Megatron's optimizer asserts on the *names* 'torch.cuda.FloatTensor' and 'torch.cuda.BFloat16Tensor'.
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to, torch.Tensor.type = to, typed
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


class _NoStream:
    """A CUDA stream or event that has nothing to order: CPU operations are already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *exc: object) -> None: ...

    def record_event(self, *args: Any) -> "_NoStream":
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def _no_stream_context(stream: Any = None) -> Iterator[None]:
    yield


def _redirect_cuda_runtime() -> None:
    cuda: Any = torch.cuda
    cuda.device_count = lambda: 8  # Megatron checks local ranks against it
    cuda.current_device = lambda: CPU
    cuda.Stream = cuda.Event = _NoStream
    cuda.stream = _no_stream_context
    cuda.current_stream = cuda.default_stream = lambda *args: _NoStream()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.get_device_properties = lambda *args: types.SimpleNamespace(
        major=9, minor=0, name="cpu", total_memory=1 << 34, multi_processor_count=1
    )
    cuda.memory_stats = lambda *args, **kwargs: collections.defaultdict(int)
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "device_memory_used",
        "reset_peak_memory_stats",
    ):
        setattr(cuda, name, lambda *args, **kwargs: 0)


def _redirect_process_groups() -> None:
    distributed: Any = torch.distributed
    init, barrier = distributed.init_process_group, distributed.barrier

    def init_process_group(*args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        init(*args, **kwargs)

    def barrier_without_devices(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return barrier(*args, **kwargs)

    distributed.init_process_group = init_process_group
    distributed.barrier = barrier_without_devices
    _redirect_uneven_collectives(distributed)


def _redirect_uneven_collectives(distributed: Any) -> None:
    """What the experts' dispatcher asks of NCCL and gloo lacks: parts of different sizes, and sizes that are tensors.

    Megatron copies an expert's token counts off the GPU as arrays; here they are on the CPU already, and stay tensors.
    """
    all_to_all_single, all_gather = distributed.all_to_all_single, distributed.all_gather
    reduce_scatter = distributed.reduce_scatter

    def all_to_all(output: torch.Tensor, given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        args = tuple(one.tolist() if isinstance(one, torch.Tensor) else one for one in args)
        kwargs = {name: one.tolist() if isinstance(one, torch.Tensor) else one for name, one in kwargs.items()}
        return all_to_all_single(output, given, *args, **kwargs)

    def gather(outputs: list[torch.Tensor], given: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({one.shape for one in outputs}) == 1:  # known on all ranks alike
            return all_gather(outputs, given, group=group, async_op=async_op)
        outputs[distributed.get_rank(group)].copy_(given)
        for source, one in enumerate(outputs):
            distributed.broadcast(one, group=group, group_src=source)
        return None

    def scatter(
        output: torch.Tensor,
        given: list[torch.Tensor],
        op: Any = distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({one.shape for one in given}) == 1:
            return reduce_scatter(output, given, op=op, group=group, async_op=async_op)
        whole = torch.cat(given)
        distributed.all_reduce(whole, op=op, group=group)
        output.copy_(whole.split([len(one) for one in given])[distributed.get_rank(group)])
        return None

    distributed.all_to_all_single, distributed.all_gather, distributed.reduce_scatter = all_to_all, gather, scatter


def _patch_megatron() -> None:
    # sgl-flash-mla, which SGLang installs, raises OSError instead of ImportError where libcuda is missing, and Megatron
    # imports it optionally: hide it.
    sys.modules["flash_mla"] = None  # type: ignore[assignment]

    import megatron.core.tensor_parallel.random as mcore_random
    import megatron.training.training as training

    def set_rng_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    def get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    mcore_random._set_cuda_rng_state = set_rng_state
    mcore_random._get_cuda_rng_state = get_rng_state
    # pretrain() offers no way to pass allow_no_cuda on to initialize_megatron.
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
