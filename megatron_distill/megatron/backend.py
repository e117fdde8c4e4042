"""How this process runs its models: three choices, made in one place from the machine and the config.

In: what the machine has, ``student.layer_spec`` and ``student.dtype``. Out: a ``MegatronBackend``, and the Megatron flags that
belong to it.

Names to know: ``choose_backend``; ``kernel_arguments``; ``prepare`` (once per process, before Megatron is imported).
"""

import functools
import importlib.util
import os
from dataclasses import dataclass

from megatron_distill.config import StudentConfig
from megatron_distill.config.flags import QUANTISED, value_of
from megatron_distill.errors import DistillError
from megatron_distill.megatron import cpu_backend, optimizer_settings, torch_adam

# Megatron's own layers: its fused masked softmax ignores any mask but the causal one, and the others are Transformer
# Engine's or apex's.
LOCAL_ARGUMENTS = (
    "--transformer-impl=local",
    "--no-masked-softmax-fusion",
    "--no-rope-fusion",
    "--no-persist-layer-norm",
)
# The dispatcher that may see micro-batches of different lengths on the ranks that share experts.
MOE_ARGUMENTS = ("--moe-token-dispatcher-type=alltoall",)
# Without them 128 experts are a loop over 256 small kernels a layer.
MOE_KERNEL_ARGUMENTS = ("--moe-grouped-gemm", "--moe-permute-fusion", "--moe-router-dtype=fp32")
FUSED_GRADIENT_MODULE = "fused_weight_gradient_mlp_cuda"  # of apex


@dataclass(frozen=True)
class MegatronBackend:
    """How the student, and every model beside it, runs in this process.

    Attributes:
        use_transformer_engine: layers are Transformer Engine's; else Megatron's own ("local").
        packed_kernels: attention goes by the sequences' lengths, over one long row; else over rows, with a mask.
        needs_mask: batches carry a block-diagonal mask, which grows with the square of a row.
    """

    use_transformer_engine: bool
    packed_kernels: bool
    needs_mask: bool

    @property
    def row_multiple(self) -> int:
        """What a row's length is a multiple of: few distinct lengths keep a GPU's allocator from fragmenting."""
        return 128 if self.use_transformer_engine else 8


def choose_backend(student: StudentConfig) -> MegatronBackend:
    """The backend that ``student.layer_spec`` asks for on this machine.

    "auto" is Transformer Engine for bf16 on a GPU, whose attention kernels take no fp32, and Megatron's own layers
    otherwise.

    Raises:
        DistillError: Transformer Engine is asked for, and cannot run here.
    """
    on_gpu = not cpu_backend.is_cpu()
    engine = student.layer_spec == "transformer_engine" or (
        student.layer_spec == "auto" and on_gpu and student.dtype == "bf16"
    )
    if engine and not on_gpu:
        raise DistillError(
            "student.layer_spec = 'transformer_engine': there is no GPU here. Set student.layer_spec=local, or auto."
        )
    if engine and importlib.util.find_spec("transformer_engine") is None:
        raise DistillError(
            "transformer_engine = not installed: bf16 training on a GPU takes its layers. Type make setup-gpu, use the image "
            "in docker/, or set student.layer_spec=local, which is slower and takes more memory."
        )
    formats = [one for one in QUANTISED if value_of(student.megatron_args, one) is not None]
    if formats and not engine:  # Megatron would compute in bf16 and say nothing
        raise DistillError(
            f"student.megatron_args: --{formats[0]} takes a GPU, and there is none here. Leave it out on a CPU."
        )
    packed = engine or student.parallel.cp > 1  # a mask's rows cannot be cut over ranks
    return MegatronBackend(use_transformer_engine=engine, packed_kernels=packed, needs_mask=not packed)


def kernel_arguments(backend: MegatronBackend, num_experts: int) -> list[str]:
    """Megatron's flags that follow from the backend and from what is installed."""
    flags: list[str] = []
    if cpu_backend.is_cpu():
        flags += cpu_backend.CPU_ARGUMENTS
    if not backend.use_transformer_engine:
        flags += LOCAL_ARGUMENTS
    if num_experts:
        flags += MOE_ARGUMENTS
        flags += MOE_KERNEL_ARGUMENTS if backend.use_transformer_engine else ()
    if importlib.util.find_spec(FUSED_GRADIENT_MODULE) is None:
        flags.append("--no-gradient-accumulation-fusion")  # on by default; the output layer raises without apex
    return flags


@functools.cache
def prepare() -> None:
    """Make this process able to run ``megatron.training.pretrain``: on CPU the CPU backend, anywhere the wheel's quirks.

    ``pretrain`` runs ``make`` in megatron-core's data set folder, to compile a helper for data sets that no run here
    uses. The wheel ships the compiled helper and no Makefile, and Megatron 0.19 then ends rank 0 with ``sys.exit(1)``.
    """
    cpu_backend.install()
    import megatron.core.datasets.utils as dataset_utils

    if not os.path.exists(os.path.join(os.path.dirname(dataset_utils.__file__), "Makefile")):
        dataset_utils.compile_helpers = lambda: None
    torch_adam.mend()
    optimizer_settings.follow_the_config()
