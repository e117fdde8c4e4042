"""Whole runs as a user starts them: real servers, real Megatron ranks, real NeMo-Run. Minutes: `make test-heavy`."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron_distill.recipes import tiny, tiny_teachers
from safetensors.torch import load_file

from megatron_distill import config as config_module
from megatron_distill.runs.run_folder import RunFolder, read_json, read_lines
from megatron_distill.sglang.server import ServerSpec, SGLangServer, running
from tests.support.tiny_models import save_tiny_mixture
from tests.support.waiting import processes_naming, saved_step, wait_until, wait_until_none_names
from tests.support.whole_run import run, start

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1500)]


def three_steps_by_their_weights(folder: RunFolder) -> list[dict[str, float]]:
    """A run's steps: each drawn by the weights that it trains, of which sampler and trainer say the same."""
    steps = folder.steps()
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step["sampler_gap_nats"] < 1e-4
        assert step["staleness_steps"] == 0
    assert {sample["weight_version"] for sample in read_lines(folder.samples)} == {0, 1, 2}
    return steps


def test_quickstart_leaves_a_whole_run_folder(tmp_path: Path) -> None:
    """Three steps on student prefixes: every artefact is there, sampler and trainer agree on fresh weights and after each
    sync, the exported student is the trained one, and no process is left behind."""
    code, output = run(tmp_path / "run", "num_steps=3")
    assert code == 0, output
    folder = RunFolder(tmp_path / "run")
    for step in three_steps_by_their_weights(folder):
        assert step["missing_teacher_frac"] == 0
        assert step["grad_norm"] > 0
    assert [summary["step"] for summary in folder.evaluations()] == [0, 3]
    for path in (folder.config, folder.root / "env.json", folder.report, folder.checkpoints, folder.hf):
        assert path.exists(), path
    assert "Avg@2" in output
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(folder.hf)
    start_path = read_json(folder.config)["student"]["path"]
    untrained = AutoModelForCausalLM.from_pretrained(start_path, dtype=trained.dtype)
    assert len(AutoTokenizer.from_pretrained(folder.hf)) > 0
    moved = [not torch.equal(a, b) for a, b in zip(trained.parameters(), untrained.parameters(), strict=True)]
    assert all(moved)
    assert processes_naming(str(tmp_path / "run")) == []


def test_other_cells_and_components_share_the_path(tmp_path: Path) -> None:
    """Half teacher's, half student's prefixes under reverse KL, the in-process teacher on two replicas, cross entropy beside
    it, and weights that reach the server by broadcast."""
    code, output = run(
        tmp_path / "run",
        "num_steps=2",
        "student.parallel.tp=1",
        "student.parallel.dp=2",
        "teacher.transport=in_process",
        "rollouts.student_prefix_frac=0.5",
        "distill.reverse_kl_weight=1",
        "sft.weight=0.1",
        "servers.weight_sync=broadcast",
    )
    assert code == 0, output
    folder = RunFolder(tmp_path / "run")
    assert "started again" not in folder.events.read_text()  # no leader takes a push by another rank for lost weights
    for step in folder.steps():
        assert step["student_prefix_frac"] == 0.5
        assert step["reverse_kl_weight"] == 1
        assert step["cross_entropy_nats"] > 0
        assert step["sampler_gap_nats"] < 1e-4


@pytest.mark.parametrize(
    "layout",
    [
        ("student.parallel.tp=1", "student.parallel.dp=2"),
        ("student.parallel.tp=2", "student.parallel.sequence_parallel=true", "student.parallel.etp=1"),
    ],
    ids=["over_dp", "over_tp"],
)
def test_experts_over_two_ranks_reach_their_server(layout: tuple[str, ...], tmp_path: Path) -> None:
    """A random mixture of experts, half of them on each trainer rank: after every push by broadcast the log-probs of what its
    SGLang server writes are the trainer's, and the exported student is the trained one."""
    student = save_tiny_mixture(tmp_path / "student")
    code, output = run(
        tmp_path / "run",
        "num_steps=3",
        f"student.path={student}",
        *layout,
        "student.parallel.ep=2",
        "curriculum.horizon_tokens=32",
        "evaluation.max_response_tokens=32",
        "servers.weight_sync=broadcast",
    )
    assert code == 0, output
    folder = RunFolder(tmp_path / "run")
    for step in three_steps_by_their_weights(folder):
        assert step["expert_load_max"] >= 1
    trained, untrained = (load_file(path / "model.safetensors") for path in (folder.hf, student))
    assert all(not torch.equal(trained[name], tensor) for name, tensor in untrained.items() if ".experts." in name)


def test_reinforcement_without_a_teacher(tmp_path: Path) -> None:
    """GRPO alone starts no teacher server, logs rewards, and lags by one step where told to sync every second one."""
    code, output = run(
        tmp_path / "run",
        "num_steps=2",
        "distill.weight=0",
        "rl.weight=1",
        "rollouts.prompts_per_step=8",
        "rollouts.rollouts_per_prompt=4",
        "rollouts.sync_every_steps=2",
        "rl.reference_kl_coef=0.01",
    )
    assert code == 0, output
    folder = RunFolder(tmp_path / "run")
    first, second = folder.steps()
    assert (first["staleness_steps"], second["staleness_steps"]) == (0, 1)
    for step in (first, second):
        assert 0 <= step["reward"] <= 1
        assert abs(step["reference_kl_nats"]) < 0.1
    assert not list(folder.logs.glob("teacher*"))


def test_a_student_that_is_told_the_answer_teaches_itself(tmp_path: Path) -> None:
    """The teacher's server holds the student's own weights and sees another prompt: there is something to learn, the best
    student is kept, and only the last checkpoint is left."""
    code, output = run(
        tmp_path / "run",
        "num_steps=2",
        "student.parallel.tp=1",
        f"teacher.path={tiny.MODELS / 'student'}",
        f"teacher.prompt_builder={tiny_teachers.__file__}:with_answer",
        "teacher.max_prompt_tokens=160",
        "save_every_steps=1",
        "evaluation.every_steps=1",
        "checkpoints.keep_last=1",
        "checkpoints.keep_best=avg_at_k",
    )
    assert code == 0, output
    folder = RunFolder(tmp_path / "run")
    for step in folder.steps():
        assert step["missing_teacher_frac"] == 0
        assert step["forward_kl_nats"] > 1e-3
    assert (folder.hf_best / "model.safetensors").exists()
    best = read_json(folder.best)["step"]
    assert {path.name for path in folder.checkpoints.glob("iter_*")} <= {"iter_0000002", f"iter_{best:07d}"}


def test_a_teacher_that_runs_elsewhere_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that the run did not start, with a key from the environment: the run starts none for a teacher, learns from it,
    and leaves it running; the key is written nowhere."""
    spec = ServerSpec(tiny.MODELS / "teacher", role="elsewhere", dtype="float32", context_length=512)
    elsewhere = SGLangServer(spec, tmp_path / "elsewhere.log")
    monkeypatch.setenv("TEST_TEACHER_KEY", elsewhere.key)
    with running([elsewhere], 500.0):
        code, output = run(
            tmp_path / "run",
            "num_steps=2",
            "student.parallel.tp=1",
            "teacher.transport=sglang_urls",
            f'teacher.urls={{"teacher": "{elsewhere.url}"}}',
            "teacher.key_variable=TEST_TEACHER_KEY",
        )
        assert code == 0, output
        assert elsewhere.is_alive()
    folder = RunFolder(tmp_path / "run")
    assert not list(folder.logs.glob("teacher*"))
    assert [step["missing_teacher_frac"] for step in folder.steps()] == [0, 0]
    written = [path for path in folder.root.rglob("*") if path.is_file()]
    assert {".json", ".jsonl", ".html", ".log", ".out"} <= {path.suffix for path in written}
    assert [path for path in written if elsewhere.key.encode() in path.read_bytes()] == []
    assert elsewhere.key not in output


def test_hidden_states_from_a_server_teach_what_the_teacher_in_the_trainer_does(tmp_path: Path) -> None:
    """A teacher of another width on a real server, its output layer over two ranks: loss, gradient and every metric of the
    first step are those of the whole teacher beside the student, to rounding, from the cache too, which then does not grow."""
    small = ("num_steps=1", "student.parallel.tp=2", "distill.divergence=jsd")
    served = (*small, "teacher.transport=sglang_hidden", f"teacher.cache_dir={tmp_path / 'cache'}")
    steps = {}
    for name, overrides in (
        ("in_process", (*small, "teacher.transport=in_process")),
        ("served", served),
        ("cached", served),
    ):
        code, output = run(tmp_path / name, *overrides)
        assert code == 0, output
        (steps[name],) = RunFolder(tmp_path / name).steps()
        written = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.data"))
        assert (written > 0) == (name != "in_process")
        steps[name]["cache_bytes"] = written
    assert steps["cached"]["cache_bytes"] == steps["served"]["cache_bytes"]
    for name in ("served", "cached"):
        assert steps[name]["teacher_gap_nats"] < 1e-4
        assert steps[name]["missing_teacher_frac"] == 0
        for metric, value in steps["in_process"].items():
            if metric.endswith(("_nats", "_mass", "_tokens")) or metric in ("loss", "grad_norm"):
                assert steps[name][metric] == pytest.approx(value, rel=1e-3, abs=1e-5), (name, metric)


@pytest.mark.long
def test_interrupted_run_stops_everything_and_resumes(tmp_path: Path) -> None:
    """Ctrl-C ends all processes with code 130 and keeps the checkpoint; the same command goes on from there."""
    run_dir, folder = tmp_path / "run", RunFolder(tmp_path / "run")
    options = "save_every_steps=1", "optimizer.warmup_frac=0"
    process = start(run_dir, "num_steps=40", *options)
    wait_until(lambda: saved_step(folder) >= 1 or process.poll() is not None, "its first steps")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    wait_until_none_names(str(run_dir))
    reached = folder.latest_checkpoint_step()
    code, output = run(run_dir, f"num_steps={reached + 1}", *options)
    assert code == 0, output
    assert f"resuming {run_dir} at step {reached}" in output
    assert folder.steps()[-1]["step"] == reached + 1
    assert folder.steps()[-1]["sampler_gap_nats"] < 1e-4  # the servers were given the checkpoint's weights


@pytest.mark.long
def test_a_server_that_dies_ends_the_run_with_its_name(tmp_path: Path) -> None:
    """Killing the teacher's server in mid-run, where none is started again, ends the run with code 1 and a message that names
    it and its cause first; nothing is left."""
    run_dir, folder = tmp_path / "run", RunFolder(tmp_path / "run")
    process = start(run_dir, "num_steps=200", "servers.max_restarts_per_hour=0")
    wait_until(lambda: len(folder.steps()) >= 1 or process.poll() is not None, "its first steps")
    port = read_json(run_dir / "endpoints" / "teacher-0.json")["url"].rsplit(":", 1)[1]
    subprocess.run(["pkill", "-9", "-f", f"sglang.launch_server.*--port {port}"], check=True)
    output, _ = process.communicate()
    assert process.returncode == 1, output
    assert "teacher-server-0 failed: sglang.teacher-0" in output, output[-3000:]
    assert "= died (killed by SIGKILL), 1 times within an hour" in output
    wait_until_none_names(str(run_dir))


def test_a_run_one_step_ahead_resumes_on_the_same_samples(tmp_path: Path) -> None:
    """At staleness 1 every step but the first learns from rollouts exactly one step old; a run that is killed in mid-step and
    started again draws the very samples of one that never was, and ends with its metrics and weights up to the rounding of the
    servers' log-probs (which the joint loss takes in, and which depends on the requests that share a batch)."""
    joint = ("rollouts.max_staleness_steps=1", "rl.weight=0.5", "rollouts.rollouts_per_prompt=2", "num_steps=5")
    code, output = run(tmp_path / "unbroken", *joint, "save_every_steps=1")
    assert code == 0, output
    unbroken, broken = RunFolder(tmp_path / "unbroken"), RunFolder(tmp_path / "broken")
    process = start(broken.root, *joint, "save_every_steps=1")
    wait_until(lambda: saved_step(broken) >= 2 or process.poll() is not None, "two checkpoints")
    process.kill()
    process.communicate()
    wait_until_none_names(str(broken.root))
    code, output = run(broken.root, *joint, "save_every_steps=1")
    assert code == 0, output
    assert [step["staleness_steps"] for step in unbroken.steps()] == [0, 1, 1, 1, 1]
    for ours, theirs in zip(broken.steps(), unbroken.steps(), strict=True):
        for name in ("reward", "response_tokens", "scored_tokens", "staleness_steps"):
            assert ours[name] == theirs[name], name
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    texts = [[sample["response"] for sample in read_lines(one.samples)] for one in (broken, unbroken)]
    assert texts[0] == texts[1]
    weights = load_file(unbroken.hf / "model.safetensors")
    for name, tensor in load_file(broken.hf / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=2e-4, msg=name)


def test_a_run_in_flight_goes_on_after_a_kill_and_loses_no_step(tmp_path: Path) -> None:
    """At staleness 2, joint loss, weights change under the responses: every step learns from all of its prompts, none of which
    is older than two steps. Killed in mid-step and started again, it asks for what was in flight, and ends with every step."""
    joint = ("rollouts.max_staleness_steps=2", "rl.weight=0.5", "rollouts.rollouts_per_prompt=2", "num_steps=6")
    run_dir, folder = tmp_path / "run", RunFolder(tmp_path / "run")
    process = start(run_dir, *joint, "save_every_steps=1")
    wait_until(lambda: saved_step(folder) >= 2 or process.poll() is not None, "two checkpoints")
    process.kill()
    process.communicate()
    wait_until_none_names(str(run_dir))
    code, output = run(run_dir, *joint, "save_every_steps=1")
    assert code == 0, output
    steps = folder.steps()
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(step["staleness_steps"] <= 2 and step["dropped_rollouts"] == 0 for step in steps)
    assert steps[1]["staleness_steps"] > 0 and steps[-1]["staleness_steps"] > 0
    rollouts_per_step = config_module.load(folder.config).rollouts_per_step
    assert all(step["scored_tokens"] >= rollouts_per_step for step in steps)
    for sample in read_lines(folder.samples):
        spans = sample.get("version_spans", [[sample["weight_version"], 0, 1]])
        assert sample["step"] - 1 - 2 <= int(spans[0][0]) <= int(spans[-1][0]) < sample["step"]


def test_evaluations_beside_training_say_the_same_and_survive_a_kill(tmp_path: Path) -> None:
    """On servers of their own evaluations have the very responses of those that training waits for, every one of them, also
    where the run was killed in the middle of one; nothing is left of the weights that they were made of."""
    options = ("num_steps=5", "save_every_steps=1", "evaluation.every_steps=2", "evaluation.num_problems=32")
    options += ("optimizer.lr_decay=linear",)
    waiting, beside = RunFolder(tmp_path / "waiting"), RunFolder(tmp_path / "beside")
    code, output = run(waiting.root, *options)
    assert code == 0, output
    own = (*options, "servers.evaluation_replicas=1")
    process = start(beside.root, *own)
    wait_until(lambda: max(beside.steps_evaluating(), default=0) >= 2 or process.poll() is not None, "an evaluation")
    process.kill()
    process.communicate()
    wait_until_none_names(str(beside.root))
    code, output = run(beside.root, *own)
    assert code == 0, output
    for step in (0, 2, 4, 5):
        ours, theirs = (read_json(folder.evaluation("heldout", step)) for folder in (beside, waiting))
        assert ours["responses"] == theirs["responses"], step
        entropy = ours["summary"].pop("entropy_nats"), ours["summary"].pop("entropy_gap_nats")
        assert entropy == pytest.approx(
            (theirs["summary"].pop("entropy_nats"), theirs["summary"].pop("entropy_gap_nats")), rel=1e-4, abs=1e-6
        )
        assert ours["summary"] == theirs["summary"], step
    assert [step["step"] for step in beside.steps()] == [1, 2, 3, 4, 5]
    rates = [step["lr"] for step in beside.steps()]
    assert rates == [step["lr"] for step in waiting.steps()]
    assert sorted(rates[1:], reverse=True) == rates[1:] and rates[-1] < 0.5 * max(rates)
    assert not list(beside.evaluating.glob("*"))


@pytest.mark.long
def test_a_model_is_measured_on_its_own(tmp_path: Path) -> None:
    """``eval`` of the tiny teacher with a server of its own: a summary on the console and in the file, no process left."""
    out = tmp_path / "teacher.json"
    command = [sys.executable, "-m", "megatron_distill.cli.main", "eval", str(tiny.MODELS / "teacher")]
    command += ["--problems", str(tiny.MODELS / "heldout.jsonl"), "--out", str(out)]
    command += ["evaluation.num_problems=16", "evaluation.samples_per_problem=2", "evaluation.entropy_problems=4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read_json(out)["summary"]
    assert summary["num_problems"] == 16 and summary["k"] == 2
    assert summary["avg_at_k"] > 0.7  # 0.91 at temperature 1, more at the evaluation's 0.6
    assert f"{summary['avg_at_k']:.3f}" in done.stdout
    assert processes_naming(str(out)) == []
