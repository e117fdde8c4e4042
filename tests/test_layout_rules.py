"""A layout that a model cannot take is refused from its shapes alone, with the value, the rule and what to type."""

import pytest
from megatron_distill.recipes import qwen3

from megatron_distill.config import RunConfig, problems_of, with_overrides
from megatron_distill.launch.layouts import layout_problems
from megatron_distill.launch.plan import architecture

RECIPES = {"moe": qwen3.moe30b_from_32b_4x8_2048, "dense": qwen3.b8_from_32b_4x8_4096}


def problems(config: RunConfig) -> list[str]:
    """Those of the config's values, or else those of its models' shapes."""
    models = {"student": architecture(config.student.path), "teacher": architecture(config.teacher.path)}
    return problems_of(config) or layout_problems(config, models)


@pytest.mark.parametrize("kind", RECIPES)
def test_the_recipes_own_layout_is_sound(kind: str) -> None:
    """What the other tests change breaks no rule before."""
    assert problems(RECIPES[kind]()) == []


@pytest.mark.parametrize(
    ("kind", "overrides", "said"),
    [
        ("moe", ["sequence_parallel=false"], "only with sequence parallelism. Set it to true"),
        ("moe", ["ep=32", "dp=16"], ""),
        (
            "moe",
            ["ep=3", "dp=3"],
            "128 experts a layer, which 3 ranks cannot share evenly.",
        ),
        ("moe", ["etp=5", "dp=40"], "an expert of the student has 768 channels, which 5 ranks cannot"),
        ("moe", ["ep=5"], "must be a multiple of ep * etp = 5"),
        ("dense", ["ep=2"], "the student has no experts. Set it to 1"),
        ("dense", ["etp=2"], "the student has no experts. Set it to null"),
        ("dense", ["tp=3", "dp=1"], "32 attention heads, which 3 ranks cannot share evenly"),
    ],
)
def test_a_layout_that_the_model_cannot_take_is_refused(kind: str, overrides: list[str], said: str) -> None:
    """MoE with tp but without sequence parallelism, experts or channels that do not divide, experts of a model without."""
    free = ["rollouts.prompts_per_step=1920", "micro_batch_rollouts=1"]
    layout = [f"student.parallel.{one}" for one in overrides]
    config = with_overrides(RECIPES[kind](), [*free, *layout], check_rules=False)
    found = problems(config)
    assert any(said in one for one in found) if said else found == [], found


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher.in_process_tp=8"], ""),
        (["teacher.in_process_tp=6"], "must be student.parallel.tp = 4 times a divisor of student.parallel.dp"),
        (["teacher.in_process_tp=16"], "Set it to 8, or to null"),
        (["teacher.in_process_tp=8", "teacher.transport=sglang_hidden"], "there is no teacher in the trainer"),
        (["teacher.in_process_tp=8", "teacher.path=Qwen/Qwen3-30B-A3B-Base"], "is for a teacher without experts"),
    ],
)
def test_a_teacher_over_several_replicas(overrides: list[str], said: str) -> None:
    """Takes the tp ranks of so many of them, and no experts."""
    layout = ["student.parallel.tp=4", "student.parallel.dp=2", "teacher.transport=in_process"]
    config = with_overrides(RECIPES["dense"](), [*layout, *overrides], check_rules=False)
    found = problems(config)
    assert any(said in one for one in found) if said else found == [], found


def test_a_teacher_in_the_trainer_needs_a_layer_for_each_stage() -> None:
    """It lies on the student's stages: 28 layers do not reach over 36."""
    config = with_overrides(
        RECIPES["dense"](),
        [
            "teacher.transport=in_process",
            "teacher.path=Qwen/Qwen3-0.6B",
            "student.parallel.pp=36",
            "student.parallel.tp=1",
            "student.parallel.dp=1",
            "student.parallel.sequence_parallel=false",
        ],
        check_rules=False,
    )
    found = problems(config)
    assert any(
        "student.parallel.pp = 36: the in-process teacher lies on as many stages, and has only 28" in one
        for one in found
    ), found
