"""Every recipe's Megatron flags as a machine with GPUs would make them, through the installed Megatron's own checks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_distill.config.flags import MEGATRON, refused
from megatron_distill.config.loading import all_recipes
from tests.support.gpu_flags_job import QUANTISED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIG = [name for name in all_recipes() if name.startswith("qwen3.")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of every recipe's flags; one interpreter, since it pretends."""
    results = tmp_path_factory.mktemp("flags") / "results.json"
    command = [sys.executable, "-m", "tests.support.gpu_flags_job", str(results)]
    job = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert job.returncode == 0, (job.stdout + job.stderr)[-4000:]
    return json.loads(results.read_text())


def test_every_recipe_is_accepted_by_megatron(made: dict[str, Any]) -> None:
    """Flags, transformer config and in-process teacher's config of each pass ``parse_and_validate_args`` and beyond."""
    assert set(all_recipes()) <= set(made)
    assert {name: one["error"] for name, one in made.items() if "error" in one} == {}


@pytest.mark.parametrize("recipe", BIG)
def test_big_recipes_take_transformer_engine_and_no_library_that_is_missing(recipe: str, made: dict[str, Any]) -> None:
    """bf16, packed kernels, no mask; no fused gradient accumulation without apex; nothing of the CPU's flags."""
    one = made[recipe]
    assert one["backend"] == {"use_transformer_engine": True, "packed_kernels": True, "needs_mask": False}
    student = one["student"]
    assert student["params_dtype"] == "torch.bfloat16"
    assert student["transformer_impl"] == "transformer_engine"
    assert student["apply_rope_fusion"] == "True"
    assert student["gradient_accumulation_fusion"] == "False"  # apex is not installed where this runs
    assert "--distributed-backend=gloo" not in one["flags"]
    assert one["seq_length"] % 128 == 0


def test_a_mixture_of_experts_gets_its_kernels(made: dict[str, Any]) -> None:
    """Grouped GEMM, fused permutation, fp32 router and the dispatcher that may see different lengths; dense models none."""
    moe = made["qwen3.moe30b_from_32b_4x8_2048"]["student"]
    wanted = {
        "moe_grouped_gemm": "True",
        "moe_permute_fusion": "True",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
    }
    assert {name: moe[name] for name in wanted} == wanted
    assert made["qwen3.b8_from_32b_4x8_4096"]["student"]["moe_grouped_gemm"] == "False"
    teacher = made["experts beside a dense student"]["teacher"]
    assert {name: teacher[name] for name in wanted} == wanted


def test_warming_up_ends_before_the_run_does(made: dict[str, Any]) -> None:
    """Megatron asserts it, without a word."""
    assert "--lr-warmup-iters=9" in made["warmed up throughout"]["flags"]


def test_fp32_on_a_gpu_takes_megatrons_own_layers(made: dict[str, Any]) -> None:
    """Transformer Engine's attention takes no fp32, which tiny recipes have; in bf16 they take it."""
    assert made["tiny.quickstart"]["student"]["transformer_impl"] == "local"
    assert made["tiny.quickstart"]["backend"]["needs_mask"]
    assert made["tiny.quickstart in bf16"]["backend"]["use_transformer_engine"]


def test_a_users_flags_win_and_reach_the_teacher(made: dict[str, Any]) -> None:
    """The attention kernels are the teacher's too: Megatron asserts that two models of one process agree on them."""
    one = made["user flags"]
    assert one["timeout_minutes"] == 7
    assert one["student"]["attention_backend"] == one["teacher"]["attention_backend"] == "AttnBackend.fused"
    assert one["teacher"]["num_layers"] == "36"


@pytest.mark.parametrize("flags", QUANTISED)
def test_quantised_students_keep_their_parameters_and_pad_their_rows(flags: str, made: dict[str, Any]) -> None:
    """Megatron takes the flags, for experts too; parameters stay bf16; and what a rank of tp 4 and cp 3 has of a row is a
    multiple of what the kernels take."""
    one = made[flags]
    assert one["student"]["params_dtype"] == "torch.bfloat16" and one["student"]["fp8_param"] == "False"
    assert {one["student"]["fp8"], one["student"]["fp4"]} != {"None"}
    assert one["row_multiple"] % (4 * 3 * QUANTISED[flags]) == 0
    assert one["seq_length"] % one["row_multiple"] == 0


def test_a_teacher_beside_a_quantised_student_is_not(made: dict[str, Any]) -> None:
    """What is imitated is the teacher as it is."""
    one = made["fp8 beside a teacher"]
    assert (one["student"]["fp8"], one["teacher"]["fp8"]) == ("hybrid", "None")


def test_every_flag_that_a_run_sets_is_refused_or_harmless(made: dict[str, Any]) -> None:
    """What a run decides cannot be changed behind its back; the few flags that may be are listed here."""
    free = {
        *("log-interval", "distributed-timeout-minutes", "recompute-num-layers", "override-opt-param-scheduler"),
        *("no-gradient-accumulation-fusion", "no-masked-softmax-fusion", "no-rope-fusion", "no-persist-layer-norm"),
        *("moe-grouped-gemm", "moe-permute-fusion", "moe-router-dtype", "moe-token-dispatcher-type"),
    }
    flags = {flag for name in all_recipes() for flag in made[name]["flags"]}
    allowed = {flag[2:].partition("=")[0] for flag in flags if not list(refused([flag], MEGATRON))}
    assert allowed <= free
