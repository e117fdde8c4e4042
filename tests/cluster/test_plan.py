"""What `plan` promises: exact counts, sound arithmetic, remedies that work, a step on paper, and no heavy import."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron_distill.recipes import clusters, qwen3, tiny

from megatron_distill.cli.main import main
from megatron_distill.config import ParallelConfig, RunConfig, StudentConfig, problems_of, with_overrides
from megatron_distill.config.loading import all_recipes
from megatron_distill.errors import CheckpointError
from megatron_distill.launch import fit, memory, step_time
from megatron_distill.launch import plan as planner
from megatron_distill.launch.nodes import groups_of
from megatron_distill.launch.simulation import Setting
from megatron_distill.losses.fused_linear import default_chunk_tokens

HERE = Path(__file__).parent
BIG = {name.removeprefix("qwen3."): make for name, make in all_recipes().items() if name.startswith("qwen3.")}


def models_of(config: RunConfig) -> tuple[planner.HfConfig, planner.HfConfig | None]:
    teacher = planner.architecture(config.teacher.path) if config.needs_teacher else None
    return planner.architecture(config.student.path), teacher


# The totals that Hugging Face shows for these checkpoints.
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("Qwen3-0.6B-Base", 596_049_920),
        ("Qwen3-4B", 4_022_468_096),
        ("Qwen3-8B", 8_190_735_360),
        ("Qwen3-32B", 32_762_123_264),
        ("Qwen3-30B-A3B-Base", 30_532_122_624),
        ("Qwen3-235B-A22B", 235_093_634_560),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, number: int) -> None:
    """Counted from the shapes in config.json alone, to the last parameter."""
    assert memory.num_parameters(planner.architecture(f"models/{name}")) == number


def test_the_page_on_scale_has_the_seconds_of_the_clock() -> None:
    """A push of 235B by broadcast, and what of it is one network card's."""
    weights = 2 * memory.num_parameters(planner.architecture("models/Qwen3-235B-A22B"))
    page = (HERE.parents[1] / "docs" / "scale.md").read_text()
    assert f"gathering them takes {weights / step_time.GATHER_BYTES_PER_S:.0f} s" in page
    assert f"at 40 GB/s would take {weights / fit.NETWORK_BYTES_PER_S:.0f} s" in page
    assert f"to the servers takes {weights / step_time.BROADCAST_BYTES_PER_S:.0f} s more" in page


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_the_count_of_a_real_checkpoint_is_its_tensors(role: str) -> None:
    """Counted from shapes in config.json, and from the safetensors files."""
    from megatron_distill.convert.hf_files import HfDirectory

    path = tiny.MODELS / role
    stored = sum(info.num_bytes // info.dtype.itemsize for info in HfDirectory(path).tensors.values())
    assert memory.num_parameters(planner.architecture(str(path))) == stored


@pytest.mark.parametrize("name", ["Qwen3-0.6B-Base", "Qwen3-8B-Base", "Qwen3-30B-A3B-Base"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (4, 4)])
def test_all_ranks_together_hold_the_model(name: str, tp: int, pp: int) -> None:
    """Whole model <= tp * pp * the fullest rank, and no more than twice that for layouts of at most 4 stages."""
    model = planner.architecture(f"models/{name}")
    held = tp * pp * sum(memory.rank_parameters(model, ParallelConfig(tp=tp, pp=pp)))
    assert memory.num_parameters(model) <= held <= 2 * memory.num_parameters(model)


@pytest.mark.parametrize("name", BIG)
def test_every_large_recipe_is_sound_fits_80_gib_and_lies_on_whole_nodes(name: str) -> None:
    """No rule is broken, no GPU overfilled, none idle."""
    config = BIG[name]()
    assert problems_of(config) == []
    assert config.name == name
    result = planner.plan(config, *models_of(config), gpu_gib=80)
    assert result.trainer_fits
    assert all(result.server_fits(role, config.max_sequence_tokens) for role in result.servers)
    profile = clusters.example_h100()
    nodes = sum(group.num_nodes for group in groups_of(config, profile))
    assert nodes == int(re.search(r"_(\d)x8", name)[1])  # type: ignore[index]
    assert planner.num_gpus(config) == nodes * profile.gpus_per_node  # none idle


@pytest.mark.parametrize("cell", qwen3.SWEEP)
def test_every_cell_of_the_sweep_is_sound_and_fits_the_same_node(cell: str) -> None:
    """Eight GPUs of 80 GiB are enough for each."""
    config = with_overrides(qwen3.b06_from_4b_1x8_4096(), qwen3.SWEEP[cell])
    assert planner.num_gpus(config) == 8
    assert planner.plan(config, *models_of(config), gpu_gib=80).trainer_fits


def test_a_teacher_over_two_replicas_weighs_half_and_is_read_before_the_step() -> None:
    """Its weights are those of twice the ranks; the hidden states of all of a step's micro-batches are kept, not of one."""
    config = with_overrides(
        qwen3.b8_from_32b_4x8_4096(), ["teacher.transport=in_process", "student.parallel.tp=4", "student.parallel.dp=2"]
    )

    def parts(*overrides: str) -> dict[str, float]:
        changed = with_overrides(config, overrides)
        return {part.name: part.num_bytes for part in planner.plan(changed, *models_of(changed), 80).trainer}

    alike, spread = parts(), parts("teacher.in_process_tp=8")
    assert spread["teacher weights"] == pytest.approx(alike["teacher weights"] / 2, rel=1e-3)
    kept = planner.architecture(config.teacher.path).hidden_size * 2 * config.max_horizon_tokens
    more = (memory.num_micro_batches(config) - 1) * config.micro_batch_rollouts * kept
    assert spread["teacher logits"] - alike["teacher logits"] == more > 0


@pytest.mark.parametrize("gpu_gib", [24, 40, 60])
@pytest.mark.parametrize("name", ["b06_from_8b_1x8_4096", "b8_from_32b_4x8_4096"])
def test_a_remedy_makes_it_fit(name: str, gpu_gib: float) -> None:
    """Applying the proposed overrides gives a sound config that fits; without need, none is proposed."""
    config = replace(BIG[name](), micro_batch_rollouts=4)
    config = replace(config, student=replace(config.student, distributed_optimizer=False))
    student, teacher = models_of(config)
    remedy = planner.remedies(config, student, teacher, gpu_gib)
    if remedy is None:
        assert not planner.plan(config, student, teacher, gpu_gib).trainer_fits
        return
    mended = with_overrides(config, remedy)
    assert planner.plan(mended, student, teacher, gpu_gib).trainer_fits
    assert bool(remedy) != planner.plan(config, student, teacher, gpu_gib).trainer_fits


def test_memory_moves_the_way_the_settings_say() -> None:
    """The distributed optimizer divides the optimizer by dp, recomputation shrinks activations, smaller micro-batches these
    and hidden states, smaller chunks logits, tensor parallelism everything."""
    config = qwen3.b8_from_32b_4x8_4096()
    student, teacher = models_of(config)

    def parts(*overrides: str) -> dict[str, float]:
        changed = with_overrides(config, overrides)
        return {part.name: part.num_bytes for part in planner.plan(changed, student, teacher, 80).trainer}

    before = parts()
    assert parts("student.distributed_optimizer=false")["optimizer"] == 4 * before["optimizer"]
    assert parts("student.recompute=full")["activations"] < before["activations"] / 5
    larger = parts("micro_batch_rollouts=2")
    assert larger["activations"] == 2 * before["activations"] and larger["head"] > before["head"]
    chunked, whole = parts("head_chunk_tokens=512"), parts("head_chunk_tokens=1024", "micro_batch_rollouts=2")
    assert whole["logits"] == 2 * chunked["logits"] and larger["logits"] <= 2 * before["logits"]
    wider = parts("student.parallel.tp=8")
    assert all(wider[name] < before[name] for name in before)


def test_a_shared_gpu_is_counted_once() -> None:
    """Servers get the share that they were told to take, and the trainer what they all leave of its GPU."""
    apart = tiny.quickstart()
    shared = replace(apart, servers=replace(apart.servers, shared_gpu_frac=0.25, student_replicas=3))
    plans = [planner.plan(config, *models_of(config), 80.0) for config in (apart, shared)]
    assert shared.num_ranks == 2 and len(plans[1].servers) == 2  # four servers on two GPUs
    assert plans[0].trainer_room_gib == 80 - planner.RESERVE_GIB
    assert plans[1].trainer_room_gib == 80 * (1 - 2 * 0.25) - planner.RESERVE_GIB
    weights, cache = (part.num_bytes / memory.GIB for part in plans[1].servers["student"][0])
    assert weights + cache == pytest.approx(80 * 0.25)


def test_logits_are_counted_as_often_as_they_are_held() -> None:
    """Once where the gradient takes their place, with a gradient, with those of two components."""
    config = qwen3.b06_from_4b_1x8_4096()
    student, teacher = models_of(config)

    def logits(*overrides: str) -> float:
        changed = with_overrides(config, ["student.parallel.pp=1", *overrides])
        return next(
            part.num_bytes for part in planner.plan(changed, student, teacher, 80).trainer if part.name == "logits"
        )

    in_place = logits("teacher.transport=in_process")
    assert logits("teacher.transport=sglang_hidden") == in_place
    assert logits("teacher.transport=sglang_topk") == 2 * in_place
    assert logits("teacher.transport=in_process", "sft.weight=1", "rollouts.student_prefix_frac=0.5") == 3 * in_place


def test_a_chunk_of_logits_is_what_the_trainer_makes_of_it() -> None:
    """The tokens that plan takes for a GPU are those that the loss takes there."""
    head = torch.empty(151_936 // 8, 1, device="meta")
    assert default_chunk_tokens(head) == memory.CHUNK_LOGIT_BYTES // (4 * head.shape[0])


def test_hidden_states_cost_their_bytes_and_one_matrix() -> None:
    """Base64 of a bf16 number for each feature, to the leader; the numbers themselves, to each other rank of its replica; and
    the teacher's output layer over tp, instead of the teacher."""
    config = with_overrides(qwen3.b8_from_32b_4x8_4096(), ["teacher.transport=sglang_hidden"])
    student, teacher = models_of(config)
    assert teacher is not None
    result = planner.plan(config, student, teacher, 80)
    wires = {part.name: part.num_bytes for part in result.wire}
    tokens = config.rollouts_per_step * config.max_horizon_tokens
    assert wires["hidden states"] == tokens * (teacher.hidden_size * 2 * 4 / 3 + 36)
    assert wires["to other ranks"] == tokens * teacher.hidden_size * 2 * (config.student.parallel.tp - 1)
    assert "teacher scores" not in wires
    parts = {part.name: part.num_bytes for part in result.trainer}
    assert parts["teacher head"] == 152_064 // config.student.parallel.tp * teacher.hidden_size * 2
    assert "teacher weights" not in parts


def test_every_axis_moves_the_memory_that_it_shares() -> None:
    """cp shares activations, hidden states and, with the distributed optimizer, its states; ep the experts; virtual stages hold
    more micro-batches; full recomputation keeps least; a stage that is left a layer over is the fullest."""
    config = with_overrides(qwen3.moe30b_from_32b_4x8_2048(), ["student.parallel.pp=2", "rollouts.prompts_per_step=64"])
    student, teacher = models_of(config)

    def parts(*overrides: str) -> dict[str, float]:
        changed = with_overrides(config, overrides)
        return {part.name: part.num_bytes for part in planner.plan(changed, student, teacher, 80).trainer}

    before, shared = parts(), parts("student.parallel.cp=2")
    assert before.pop("head") > shared.pop("head") and before.pop("logits") >= shared.pop("logits")
    assert {name: before[name] / shared[name] for name in before} == pytest.approx(
        {"weights": 1, "gradients": 1, "optimizer": 2, "activations": 2}
    )
    parallel = config.student.parallel
    (dense, experts), (same, fewer) = (
        memory.rank_parameters(student, replace(parallel, ep=ep)) for ep in (parallel.ep, 2 * parallel.ep)
    )
    assert dense == same and experts == 2 * fewer
    kept = [parts(f"student.recompute={choice}")["activations"] for choice in ("none", "selective", "full")]
    assert kept[0] == kept[1] > 5 * kept[2]  # bf16: flash attention keeps no scores
    assert parts("student.parallel.vpp=2")["activations"] > before["activations"]
    assert memory.rank_layers(student, replace(parallel, pp=5)) == 10
    assert memory.rank_layers(student, replace(parallel, pp=4, vpp=2)) == 12


def test_the_page_names_every_axis(capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks, stages, experts and recomputation, as they will be."""
    overrides = ["pp=5", "cp=2", "dp=4", "sequence_parallel=true"]
    recipe = "qwen3.moe30b_from_32b_4x8_2048"
    assert main(["plan", recipe, *(f"student.parallel.{one}" for one in overrides)]) == 0
    said = "tp 2 with sequence parallelism x pp 5 x cp 2 x dp 4 = 80 ranks, stages of 9+3*10+9 layers, "
    assert said + "experts over ep 8 x etp 1 ranks, 2 time(s), recompute full, bf16" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b8_from_32b_4x8_4096", "moe30b_from_32b_4x8_2048"])
def test_the_layouts_that_fit_are_sound_and_can_be_typed(name: str) -> None:
    """Each takes all GPUs, breaks no rule, fits, and is what its overrides make of the recipe; the fastest is first."""
    config = BIG[name]()
    student, teacher = models_of(config)
    found = fit.search(config, student, teacher, 16, 80).found
    clocks = [round(one.step_s, 3) for one in found]
    assert clocks == sorted(clocks)
    for one in found[:5]:
        assert one.config.num_ranks == 16 and one.gib < 80 and problems_of(one.config) == []
        assert with_overrides(config, fit.overrides_of(one.config).split()) == one.config


def test_the_search_says_why_and_when_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Why the first is the first, and what to type for it; or that there is none."""
    recipe = "qwen3.b8_from_32b_4x8_4096"
    assert main(["plan", recipe, "--fit", "16"]) == 0
    printed = capsys.readouterr().out
    assert "first: against the next it saves" in printed and "type:  student.parallel.tp=" in printed
    assert main(["plan", recipe, "--fit", "1", "--gpu-gib", "24"]) == 0
    assert "none fits" in capsys.readouterr().out


def test_a_slower_wire_and_a_bubble_cost_time_on_paper() -> None:
    """The clock rises with a pipeline's bubble, falls with virtual stages, and knows what a second computation costs."""
    config = qwen3.b8_from_32b_4x8_4096()
    student, teacher = models_of(config)

    def seconds(*overrides: str) -> dict[str, float]:
        return fit.step_seconds(with_overrides(config, overrides), student, teacher)

    flat, piped = seconds(), seconds("student.parallel.pp=4", "student.parallel.dp=1")
    virtual = seconds("student.parallel.pp=4", "student.parallel.dp=1", "student.parallel.vpp=3")
    assert flat["bubble"] == flat["pp"] == flat["cp"] == 0 < virtual["bubble"] < piped["bubble"]
    assert seconds("student.recompute=full")["compute"] == pytest.approx(flat["compute"] * 4 / 3)
    assert seconds("student.parallel.tp=8", "student.parallel.dp=2")["tp"] > flat["tp"]


@pytest.mark.parametrize(("layout", "ranks"), [({}, 1), ({"tp": 2}, 2), ({"pp": 2}, 2), ({"tp": 2, "pp": 2}, 4)])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_teacher_beside_costs_one_forward_pass(layout: dict[str, int], ranks: int, recompute: str) -> None:
    """2 N P over the ranks that share it: of 8 responses of 5,120 tokens and 4.02e9 parameters 0.82 s at 400 TFLOP/s."""
    axes = [f"student.parallel.{axis}={size}" for axis, size in ({"dp": 4} | layout).items()]
    config = with_overrides(qwen3.b06_from_4b_1x8_4096(), [*axes, f"student.recompute={recompute}"])
    student, teacher = models_of(config)
    beside, alone = (fit.step_seconds(config, student, one)["compute"] for one in (teacher, None))
    assert beside - alone == pytest.approx(2 * (8 * 5120) * 4_022_468_096 / 400e12 / ranks)


def test_a_reference_policy_is_another_frozen_model() -> None:
    """It costs weights in the trainer, and nothing on the wire."""
    config = qwen3.b06_grpo_1x8_4096()
    student, _ = models_of(config)
    plain = planner.plan(config, student, None, 80)
    anchored = planner.plan(with_overrides(config, ["rl.reference_kl_coef=0.01"]), student, None, 80)
    added = {part.name: part.num_bytes for part in anchored.trainer[len(plain.trainer) :]}
    assert added["reference weights"] == 2 * sum(memory.rank_parameters(student, ParallelConfig()))
    assert plain.wire == anchored.wire and [part.name for part in plain.wire] == ["weight sync"]


def test_plan_prints_without_torch_models_or_servers() -> None:
    """The command works on a laptop without the models: shipped shapes stand in, and nothing heavy is imported."""
    program = (
        "import sys; from megatron_distill.cli.main import main; code = main(['plan', 'qwen3.b8_from_32b_4x8_4096']);"
        "assert not {'torch', 'megatron', 'sglang', 'nemo_run', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "8,190,735,360 parameters" in done.stdout and "DOES NOT FIT" not in done.stdout
    assert "a step on paper" in done.stdout


def test_plan_says_what_does_not_fit_and_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    """The remedy is an override."""
    assert main(["plan", "qwen3.b06_from_8b_1x8_4096", "--gpu-gib", "32"]) == 0
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed and "to fit: student.recompute=full" in printed


@pytest.mark.parametrize(
    ("gpu_gib", "remedy"),
    [
        ("48", "servers.teacher_tp=2"),
        ("24", "servers.teacher_tp=4"),
        ("14", "servers.teacher_tp=8"),
        ("8", "no servers.teacher_tp suffices; use larger GPUs"),
    ],
)
def test_the_remedy_for_a_server_makes_it_fit(gpu_gib: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The smallest tp with which a 32B teacher leaves room for a sequence, not just twice the one that does not; or none."""
    recipe = "qwen3.b8_from_32b_4x8_4096"
    assert main(["plan", recipe, "--gpu-gib", gpu_gib, "servers.teacher_tp=1"]) == 0
    printed = capsys.readouterr().out
    assert f"to fit: {remedy}" in printed
    if not remedy.startswith("no"):
        assert main(["plan", recipe, "--gpu-gib", gpu_gib, remedy]) == 0
        assert "servers.teacher_tp" not in capsys.readouterr().out


def test_no_remedy_for_a_server_breaks_what_its_model_allows() -> None:
    """A teacher of 6 heads is not laid on 4 or 8 ranks."""
    config = with_overrides(qwen3.b8_from_32b_4x8_4096(), ["servers.teacher_tp=1"])
    student, teacher = models_of(config)
    assert teacher is not None
    odd = replace(teacher, num_attention_heads=6, num_query_groups=2)
    assert planner.server_remedies(config, student, odd, 20) == {"servers.teacher_tp": None}


# --- a step on paper --------------------------------------------------------------------------------------------------


def page(*words: str) -> str:
    """The second page of a plan."""
    config = with_overrides(BIG[words[0]](), list(words[1:]))
    return step_time.render(config, step_time.on_paper(config, *models_of(config), 80, {}))


@pytest.mark.parametrize("name", ["b06_grpo_1x8_4096", "b8_from_32b_4x8_4096", "moe30b_from_32b_4x8_2048"])
def test_the_second_page_tells_each_design_within_100_columns(name: str) -> None:
    """Four rows, the slowest first, the recipe's own marked; a timeline of each; no server that the run does not have."""
    printed = page(name)
    assert max(map(len, printed.splitlines())) <= 100
    found = re.findall(
        r"^  (one after .*?|scores .*?|one step .*?|\d steps .*?)  +(\*?) +([\d.]+) +([\d.]+) ", printed, re.M
    )
    assert [name for name, *_ in found] == [
        "one after the other",
        "scores streamed",
        "one step ahead",
        "4 steps in flight",
    ]
    assert [mark for _, mark, *_ in found] == ["", "*", "", ""]
    for place in (2, 3):
        seconds = [float(row[place]) for row in found]
        assert seconds == sorted(seconds, reverse=True)
    assert printed.count("    trainer  ") == printed.count("    student  ") == 4
    assert printed.count("    teacher  ") == (0 if "grpo" in name else 4)


def test_the_second_page_follows_the_recipe() -> None:
    """Its staleness is what is marked and shown; what it does not model is told, not shown."""
    assert re.search(r"8 steps in flight +\*", page("b8_from_32b_4x8_4096", "rollouts.max_staleness_steps=8"))
    assert re.search(r"one step ahead +\*", page("b8_from_32b_4x8_4096", "rollouts.max_staleness_steps=1"))
    told = page("b06_from_4b_1x8_4096", "rollouts.student_prefix_frac=0.5")
    assert "rollouts.student_prefix_frac=1" in told and "in flight" not in told


def test_a_step_at_the_cap_can_be_added_up() -> None:
    """Four responses of 4096 tokens a server at a time, eight scores a teacher's server, training, weights: all measured."""
    config = qwen3.b8_from_32b_4x8_4096()
    measured = {"token_s": 0.0085, "score_s": 0.4, "train_s": 3.0, "sync_s": 4.0, "push_s": 2.0}
    paper = step_time.on_paper(config, *models_of(config), 80, measured)
    student, longest = paper.setting.student, 512 + 4096
    assert student.token_s == 0.0085 and student.seats == 75 and 1 < student.slowdown(4) < 1.1
    by_length = longest / (512 + step_time.mean_length(4096))
    write_s = (4096 * 0.0085 + student.request_s) * student.slowdown(4)
    added = write_s + (8 * 0.4 + 3.0) * by_length + 4.0 + 2.0
    rows = step_time.rows(config, paper)
    assert rows[0].capped_s == rows[1].capped_s == pytest.approx(added)
    assert rows[2].capped_s == pytest.approx(added - 3.0 * by_length)  # training hides behind drawing


def test_latencies_come_from_the_models_shapes() -> None:
    """Decoding reads weights and cache; scoring and training multiply; of experts those that are chosen are read."""
    config = qwen3.b8_from_32b_4x8_4096()
    student, teacher = models_of(config)
    assert teacher is not None
    paper = step_time.on_paper(config, student, teacher, 80, {})
    token_s = paper.setting.student.token_s
    context = 512 + step_time.mean_length(4096) / 2
    assert token_s == pytest.approx(2e-3 + (2 * 8_190_735_360 + 147_456 * context) / (0.8 * 3.35e12))
    assert paper.setting.teacher is not None
    assert paper.setting.teacher.token_s == pytest.approx(2 * 32_762_123_264 / (2 * 400e12))
    full_s = sum(fit.step_seconds(config, student, teacher).values())
    assert paper.train_s == pytest.approx(full_s * (512 + step_time.mean_length(4096)) / (1024 + 4096))
    moe = planner.architecture("models/Qwen3-30B-A3B-Base")
    read = [fit.active_parameters(moe, tokens) for tokens in (1, 8, 10_000)]
    assert read[0] == pytest.approx(3.35e9, rel=0.01) and read[0] < read[1] < read[2] == memory.num_parameters(moe)


def test_weights_stop_the_trainer_while_they_are_gathered_and_the_servers_while_they_come() -> None:
    """Into memory, then by broadcast; or written to a shared disk once, then read by each of eight servers."""
    config = qwen3.b8_from_32b_4x8_4096()
    models, weights = models_of(config), 2 * 8_190_735_360

    def setting(sync: str, **measured: float) -> Setting:
        chosen = with_overrides(config, [f"servers.weight_sync={sync}"])
        return step_time.on_paper(chosen, *models, 80, measured).setting

    broadcast, disk = setting("broadcast"), setting("disk")
    assert (broadcast.sync_s, broadcast.push_s) == (weights / 20e9, weights / 5e9)
    assert (disk.sync_s, disk.push_s) == (weights / 4e9, weights * 8 / 4e9)
    given = setting("disk", sync_s=9.0, push_s=7.0)
    assert (given.sync_s, given.push_s) == (9.0, 7.0)


def test_measured_figures_take_the_place_of_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line, by name; anything else is refused before a page is printed."""
    recipe = "qwen3.b8_from_32b_4x8_4096"
    assert main(["plan", recipe, "--measured", "train_s=30,sync_s=4.5"]) == 0
    printed = capsys.readouterr().out
    assert "but for what was measured" in printed
    assert (
        "  trainer   30.00 s: measured" in printed
        and "  weights   4.50 s gathered: measured; then 3.28 s to the servers" in printed
    )
    for wrong in ("train_s", "train_s=x", "train_s=-1", "step_s=3", "train_s=3,,", "train_s=inf"):
        assert main(["plan", recipe, "--measured", wrong]) != 0
        captured = capsys.readouterr()
        assert "--measured = " in captured.err and not captured.out
    with pytest.raises(SystemExit):  # the search has a clock of its own
        main(["plan", recipe, "--fit", "16", "--measured", "train_s=3"])


def test_an_unknown_model_is_an_error_that_names_it() -> None:
    """Neither a directory nor a shipped shape: refused by its name."""
    with pytest.raises(CheckpointError, match="models/Nobody-7B"):
        planner.architecture("models/Nobody-7B")


@pytest.mark.heavy
def test_weights_gradients_and_optimizer_are_what_megatron_allocates(tmp_path: Path) -> None:
    """Two replicas of the tiny student under Megatron's own optimizer, plain and distributed, on CPU: bytes per rank."""
    path = tiny.MODELS / "student"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.support.memory_job", str(path), str(tmp_path / "measured.json")]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = planner.architecture(str(path))
    for distributed, measured in enumerate(json.loads((tmp_path / "measured.json").read_text())):
        config = RunConfig(
            student=StudentConfig(parallel=ParallelConfig(dp=2), distributed_optimizer=bool(distributed))
        )
        planned = {part.name: part.num_bytes for part in planner.plan(config, model, model, 80).trainer}
        assert measured["weights"] == planned["weights"]
        # Megatron pads its gradient buffer, and with it what the distributed optimizer shards.
        assert measured["gradients"] == pytest.approx(planned["gradients"], rel=0.02)
        assert measured["optimizer"] == pytest.approx(planned["optimizer"], rel=0.02)
