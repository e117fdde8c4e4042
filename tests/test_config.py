"""A config is strict, complete and reversible, and says everything that is wrong at once."""

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_distill import config as config_module
from megatron_distill.config import Ladder, RunConfig, from_dict, problems_of, to_dict, with_overrides
from megatron_distill.config.fields import broken_range
from megatron_distill.config.loading import all_recipes, load_recipe
from megatron_distill.config.reference import EXAMPLES, markdown
from megatron_distill.config.schedules import Schedule, constant, linear, piecewise, tabulate
from megatron_distill.errors import ConfigError


def base() -> RunConfig:
    return load_recipe("tiny.quickstart")


@pytest.mark.parametrize("name", list(all_recipes()))
def test_every_recipe_is_sound_and_survives_json(name: str) -> None:
    """A recipe's config breaks no rule, and config.json holds all of it."""
    config = load_recipe(name)
    assert problems_of(config) == []
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_unknown_keys_and_wrong_types_are_all_reported_with_a_suggestion() -> None:
    """One error names every problem: the key, its value, and what was probably meant."""
    with pytest.raises(ConfigError) as caught:
        with_overrides(base(), ["rollout.top_k=3", "num_step=5", "seed=x", "teacher.tail=carrier_pigeon"])
    message = str(caught.value)
    for part in ("Did you mean rollouts?", "Did you mean num_steps?", "seed = 'x'", "'bucket', 'renormalised'"):
        assert part in message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("distill.reverse_kl_weight=1.5", "[0, 1]"),
        ("student.parallel.tp=0", "at least 1"),
        ("student.parallel.vpp=2", "interleaves the stages of a pipeline"),
        ("student.parallel.ep=3", "must be a multiple of ep * etp = 6"),
        ("student.parallel.etp=0", "at least 1"),
        ("student.tp=2", "unknown key. Did you mean student.parallel.tp?"),
        ("tp=2", "unknown key. Did you mean student.parallel.tp?"),
        ("data.temperature=2", "Did you mean rollouts.temperature or distill.temperature or evaluation.temperature?"),
        ("micro_batch_rollouts=7", "must be a multiple"),
        ("micro_batch_rollouts=128", "Set micro_batch_rollouts=64."),
        ("distill.temperature=2.0", "tail bucket"),
        ("rollouts.student_prefix_frac=-0.1", "share"),
        ("rl.weight=1.0", "rollouts_per_prompt"),
        ("sft.weight=1.0", "cross entropy"),
        ("distill.weight=0", "nothing would be learnt"),
        ("optimizer.warmup_frac=2", "share"),
        ("rollouts.top_p=0", "(0, 1]"),
        ("num_steps", "section.field=value"),
        ("distill.divergence=jsd", "needs the teacher's whole distribution"),
        ("distill.skew=1", "must lie in (0, 1)"),
        ("distill.estimator=k4", "must be one of"),
        ("optimizer.lr=NaN", "must be a finite number"),
        ("optimizer.lr=Infinity", "must be a finite number"),
        ("optimizer.lr=0", "must be positive"),
        ("optimizer.adam_beta2=1", "[0, 1)"),
        ("optimizer.clip_grad=-1", "must not be negative"),
        ("rl.weight=Infinity", "must be a finite number"),
        ("distill.temperature=NaN", "must be a finite number"),
        ("curriculum.horizon_tokens=Infinity", "must be a finite number"),
        ('distill.reverse_kl_weight={"points": [[0, NaN]]}', "must be a finite number"),
        ('distill.reverse_kl_weight={"points": [[0.5, 1]]}', "must be whole numbers"),
        ('distill.reverse_kl_weight={"points": [[Infinity, 1]]}', "finite numbers"),
        ('distill.reverse_kl_weight={"points": [[0, 1]], "interpolate": "no"}', "interpolate must be true or false"),
        ("seed=0", "at least 1"),
        ("seed=4294967296", "at most 2147483647"),
        ("save_every_steps=-1", "must not be negative"),
        ("evaluation.every_steps=-1", "must not be negative"),
        ("micro_batch_rollouts=0", "at least 1"),
        ("micro_batch_rollouts=-16", "at least 1"),
        ("student.parallel.dp=0", "at least 1"),
        ("servers.student_replicas=1000000000000", "at most 4096"),
        ("rollouts.top_k=0", "or -1 for all tokens"),
        ("num_steps=" + "9" * 5000, "cannot be read"),
        ("student.distributed_optimizer=True", "Type true."),
        ("data.template_options=3", "must be an object"),
        ("name=", "at most 128 characters"),
        ("name=..", "letters, digits"),
        ("name=a/../b", "letters, digits"),
        ("name=$(touch x)", "letters, digits"),
        ("name=two words", "letters, digits"),
        ("name=-x", "letters, digits"),
        ('student.megatron_args=["--lr=1"]', "is decided by optimizer.lr. Set that instead"),
        ('student.megatron_args=["--save=x"]', "belongs to the run: checkpoints are in the run folder"),
        ('student.megatron_args=["--num_layers=3"]', "is decided by the model in student.path"),
        ('student.megatron_args=["lr"]', "is no flag"),
        ('servers.student_args=["--port=1"]', "the trainer finds the server there"),
        ('servers.teacher_args=["--tp-size=2"]', "servers.teacher_tp. Set that instead"),
        ("teacher.transport=carrier_pigeon", "'sglang_topk', 'sglang_hidden', 'sglang_urls', 'in_process', or path"),
        ("rl.reward=nowhere.py:judge", "nowhere.py is no file"),
        ("servers.teacher_replicas=0", "at least 1"),
        ('servers.teacher_args=["--return-hidden-states-mode=last"]', "is decided by teacher.transport"),
    ],
)
def test_rules_name_value_rule_and_remedy(override: str, part: str) -> None:
    """Each broken rule is refused with the field's name and what it must be."""
    with pytest.raises(ConfigError, match=re.escape(override.split("=")[0])) as caught:
        with_overrides(base(), [override])
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("rollouts.sync_every_steps=2", "must be 1 with rollouts.max_staleness_steps above 0"),
        (f"rollouts.source={__file__}:base", "must be 0 or 1 with a rollouts.source of your own"),
    ],
)
def test_staleness_that_cannot_be_counted_is_refused(override: str, part: str) -> None:
    """Staleness counts one push a step, and only the built-in source draws under weights that change."""
    with pytest.raises(ConfigError) as caught:
        with_overrides(base(), ["rollouts.max_staleness_steps=2", override])
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["distill.reverse_kl_weight=0.2", "distill.estimator=k2"], "must be 0 (forward) or 1 (reverse)"),
        (["distill.reverse_kl_weight=1", "distill.estimator=k3"], "tokens that the student writes"),
        (["distill.reverse_kl_weight=0", "distill.estimator=k1"], "Use k3, or distribution"),
        (["distill.reverse_kl_weight=1", "distill.estimator=k1", "rollouts.student_prefix_frac=0"],
         "at tokens that the teacher writes, its gradient is not that of the reverse KL. Set distill.estimator=distribution"),
        (["distill.reverse_kl_weight=1", "distill.estimator=k1", "rollouts.student_prefix_frac=0.5"], "the teacher writes"),
        (["distill.reverse_kl_weight=0", "distill.estimator=k1", "rollouts.student_prefix_frac=0",
          "rollouts.off_policy_source=data"], "the data's are not"),
        (["distill.reverse_kl_weight=1", "distill.estimator=k1", "rollouts.top_p=0.9"], "samples of the whole distribution"),
        (["distill.reverse_kl_weight=1", "distill.estimator=k1", "rollouts.sync_every_steps=2"], "weights that are trained"),
        (["distill.divergence=skew_kl", "teacher.transport=in_process"], "must be 0 (forward) or 1 (reverse)"),
        (["distill.divergence=jsd", "teacher.transport=in_process", "distill.reverse_kl_weight=1"], "strictly between 0 and 1"),
    ],
)  # fmt: skip
def test_what_would_descend_on_something_else_is_refused(overrides: list[str], part: str) -> None:
    """Estimators and divergences are refused where their gradient is not that of what they are named for."""
    with pytest.raises(ConfigError) as caught:
        with_overrides(base(), overrides)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["distill.reverse_kl_weight=1", "distill.estimator=k1"],
        ["distill.reverse_kl_weight=1", "distill.estimator=k2"],
        ["distill.reverse_kl_weight=0", "distill.estimator=k3", "rollouts.student_prefix_frac=0.5"],
        ["distill.reverse_kl_weight=0", "distill.estimator=k1", "rollouts.student_prefix_frac=0"],
        ["distill.divergence=jsd", "teacher.transport=in_process"],
        ["distill.divergence=skew_kl", "teacher.transport=in_process", "distill.reverse_kl_weight=1"],
        ["distill.divergence=jsd", "teacher.transport=sglang_hidden", "distill.temperature=2", "student.parallel.pp=2"],
        ["distill.support=student", "teacher.transport=sglang_hidden"],
    ],
)
def test_every_loss_of_the_library_can_be_selected(overrides: list[str]) -> None:
    """The combinations that do mean what they say are accepted."""
    with_overrides(base(), overrides)


@pytest.mark.parametrize("override", ["rollouts.top_p=0.95", "rollouts.top_k=20"])
def test_rl_on_truncated_samples_is_refused(override: str) -> None:
    """The policy gradient takes log-probs of the whole distribution, so cutting its tail would bias it without a trace."""
    config = load_recipe("tiny_rl.grpo")
    with pytest.raises(ConfigError, match=r"rl\.weight = 1\.0: .* cut off the tail"):
        with_overrides(config, [override])
    with_overrides(config, [override, "rl.weight=0", "distill.weight=1"])


def test_every_number_has_a_range_that_holds_its_default() -> None:
    """No number goes unchecked: each field that holds numbers declares an interval, and its default lies inside."""
    for where, spec, value in config_module.walk(RunConfig()):
        holds_numbers = spec.type in (int, float, Schedule, int | None, tuple[int, ...])
        assert ("within" in spec.metadata) == holds_numbers, where
        assert broken_range(spec.name, spec.metadata, value) is None, where


def test_options_of_the_chat_template_are_set_whole_or_one_by_one() -> None:
    """Both spellings give the same options, and they survive JSON."""
    whole = with_overrides(base(), ['data.template_options={"enable_thinking": false}'])
    assert whole == with_overrides(base(), ["data.template_options.enable_thinking=false"])
    assert from_dict(json.loads(json.dumps(to_dict(whole)))).data.template_options == {"enable_thinking": False}


@pytest.mark.parametrize("overrides", [["curriculum.kind=ladder", "curriculum.ladder_tokens=[8,16]"],
                                       ["curriculum.ladder_tokens=[8,16]", "curriculum.kind=ladder"]])  # fmt: skip
def test_another_kind_of_curriculum_can_be_chosen_in_any_order(overrides: list[str]) -> None:
    """The kind decides the type; what the recipe said for its own kind goes with it; JSON keeps both."""
    config = with_overrides(base(), overrides)
    assert config.curriculum == Ladder(ladder_tokens=(8, 16))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_field_of_another_kind_is_refused() -> None:
    """Nothing is accepted and ignored: the message says whose field it is."""
    with pytest.raises(
        ConfigError, match=r"horizon_tokens = 256: belongs to curriculum.kind=schedule, and the kind is ladder"
    ):
        with_overrides(base(), ["curriculum.kind=ladder", "curriculum.horizon_tokens=256"])
    with pytest.raises(
        ConfigError, match=r"belongs to curriculum.kind=ladder or entropy_gated, and the kind is schedule"
    ):
        with_overrides(base(), ["curriculum.ladder_tokens=[8]"])
    with pytest.raises(ConfigError, match=r"curriculum.kind = 'ladders': must be one of 'schedule'"):
        with_overrides(base(), ["curriculum.kind=ladders"])


def test_overrides_reach_nested_fields_and_schedules() -> None:
    """Numbers, strings, lists and schedules can be given on the command line."""
    config = with_overrides(
        base(),
        ["name=other", 'rollouts.stop_tokens=["<|im_end|>"]', 'distill.reverse_kl_weight={"points": [[0, 1], [5, 0]]}'],
    )
    assert config.name == "other"
    assert config.rollouts.stop_tokens == ("<|im_end|>",)
    assert [config.distill.reverse_kl_weight.at(step) for step in (0, 4, 5)] == [1, 1, 0]


def test_saved_config_loads_equal(tmp_path: Path) -> None:
    """config.json is the config; a missing or broken one is an error that says so."""
    config_module.save(base(), tmp_path / "config.json")
    assert config_module.load(tmp_path / "config.json") == base()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        config_module.load(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="no such file"):
        config_module.load(tmp_path / "none.json")


def test_the_page_of_fields_is_current_and_its_examples_hold() -> None:
    """docs/config.md is what ``make docs`` writes, and each section's example can be typed as it stands."""
    assert (Path(__file__).parents[1] / "docs" / "config.md").read_text() == markdown()
    for example in EXAMPLES.values():
        with_overrides(base(), shlex.split(example))


def test_every_field_has_a_help_text() -> None:
    """``--help`` explains every field."""
    for where, spec, _ in config_module.walk(RunConfig()):
        assert spec.metadata.get("help"), where


def test_schedules() -> None:
    """Constant, linear, piecewise and tabulated schedules take the values they are named for."""
    assert constant(0.2).at(10**6) == 0.2
    assert [linear(1, 0, 4).at(step) for step in (0, 1, 4, 9)] == [1, 0.75, 0, 0]
    assert [piecewise({0: 128, 10: 256}).at(step) for step in (0, 9, 10, 99)] == [128, 128, 256, 256]
    table = tabulate(lambda step: step // 3, 9)
    assert [table.at(step) for step in range(9)] == [step // 3 for step in range(9)]
    assert len(table.points) == 3
    assert Schedule.from_json(json.loads(json.dumps(table.to_json()))) == table
    for broken in ("x", True, {"points": []}, {"points": [[1, 2]]}, {"points": [[0, 1], [0, 2]]}, {"point": []}):
        with pytest.raises(ValueError, match="must"):
            Schedule.from_json(broken)
