"""The flags of every recipe, made as on a machine with GPUs, and what the installed Megatron makes of them.

Started as ``-m tests.support.gpu_flags_job RESULTS.json`` in an interpreter of its own, which pretends: CUDA is there, and
Transformer Engine's fused functions can be imported. Everything else is Megatron's own parsing and checking.
"""

import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_distill.config import RunConfig, with_overrides
from megatron_distill.config.loading import all_recipes
from megatron_distill.launch.plan import architecture
from megatron_distill.megatron import backend as backend_module
from megatron_distill.megatron import cpu_backend
from megatron_distill.runs.run_folder import RunFolder

QUANTISED = {
    "--fp8-format=hybrid": 16,
    "--fp8-format=e4m3 --fp8-recipe=tensorwise": 16,
    "--fp8-format=e4m3 --fp8-recipe=mxfp8": 32,
    "--fp4-format=e2m1": 128,
}
"""Flags, and how many rows at a time the kernels behind them take."""
WIDE = ("student.parallel.tp=4", "student.parallel.cp=3", "student.parallel.sequence_parallel=true")


def pretend() -> None:
    """Make Megatron and this project believe that there is a GPU and its libraries."""
    cpu_backend.install()  # answers for devices and their properties
    cpu_backend.is_cpu = lambda: False
    import megatron.core.models.common.embeddings.rope_utils as rope
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.utils as core_utils

    rope.fused_apply_rotary_pos_emb = rope.fused_apply_rotary_pos_emb_thd = print  # asked for, never called
    for name in (
        "permute",
        "permute_with_probs",
        "sort_chunks_by_index",
        "sort_chunks_by_index_with_probs",
        "unpermute",
    ):
        setattr(moe_utils, f"fused_{name}", print)
    core_utils._te_version = core_utils.PkgVersion("2.20.0")
    find_spec = importlib.util.find_spec
    backend_module.importlib.util.find_spec = lambda name, *rest: (
        object() if name == "transformer_engine" else find_spec(name, *rest)
    )


def parsed(config: RunConfig) -> dict[str, Any]:
    """Parse and validate one recipe's flags, and build the transformer configs that the session would."""
    from megatron.training import global_vars
    from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args

    from megatron_distill.megatron.arguments import row_multiple, training_arguments
    from megatron_distill.megatron.in_process_teacher import config_like

    os.environ |= {"RANK": "0", "WORLD_SIZE": str(config.num_ranks), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    student = architecture(config.student.path)
    chosen = backend_module.choose_backend(config.student)
    flags = training_arguments(config, student, RunFolder(Path("/nonexistent")), chosen)
    sys.argv = ["job", *flags]
    global_vars.unset_global_variables()
    args = parse_and_validate_args()
    transformer = core_transformer_config_from_args(args)
    teacher = None
    if config.teacher.path and config.teacher.transport == "in_process":
        teacher = config_like(transformer, architecture(config.teacher.path), chosen)
    fields = [
        *("params_dtype", "gradient_accumulation_fusion", "moe_grouped_gemm", "moe_permute_fusion", "moe_router_dtype"),
        *("moe_token_dispatcher_type", "transformer_impl", "sequence_parallel", "apply_rope_fusion", "num_layers"),
        *("attention_backend", "num_moe_experts", "fp8", "fp4", "fp8_param"),
    ]
    return {
        "backend": dataclasses.asdict(chosen),
        "flags": flags,
        "padded_vocab_size": args.padded_vocab_size,
        "seq_length": args.seq_length,
        "row_multiple": row_multiple(config, chosen),
        "timeout_minutes": args.distributed_timeout_minutes,
        "student": {name: str(getattr(transformer, name)) for name in fields},
        "teacher": teacher and {name: str(getattr(teacher, name)) for name in fields},
    }


def main() -> None:
    results_file = Path(sys.argv[1])
    pretend()
    results: dict[str, Any] = {}
    extra = {
        "tiny.quickstart in bf16": lambda: with_overrides(all_recipes()["tiny.quickstart"](), ["student.dtype=bf16"])
    }
    extra["user flags"] = lambda: with_overrides(
        all_recipes()["qwen3.b06_from_4b_1x8_128"](),
        ['student.megatron_args=["--attention-backend=fused", "--distributed-timeout-minutes=7"]'],
    )
    extra["experts beside a dense student"] = lambda: with_overrides(
        all_recipes()["qwen3.b06_from_4b_1x8_128"](), ["teacher.path=Qwen/Qwen3-30B-A3B-Base"]
    )
    extra["warmed up throughout"] = lambda: with_overrides(
        all_recipes()["tiny.quickstart"](), ["num_steps=10", "optimizer.warmup_frac=1"]
    )
    for flags in QUANTISED:
        extra[flags] = lambda flags=flags: with_overrides(
            all_recipes()["qwen3.moe30b_from_32b_4x8_2048"](),
            [*WIDE, f"student.megatron_args={json.dumps(flags.split())}"],
        )
    extra["fp8 beside a teacher"] = lambda: with_overrides(
        all_recipes()["qwen3.b06_from_4b_1x8_128"](), ['student.megatron_args=["--fp8-format=hybrid"]']
    )
    for name, make in (all_recipes() | extra).items():
        try:
            results[name] = parsed(make())
        except (Exception, SystemExit) as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    results_file.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
