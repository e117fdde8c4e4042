"""The first GPU hour's tools, climbed on CPU: ``doctor --deep`` and the ladder's tiny rungs are real runs here too."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_distill.launch import deep_doctor
from megatron_distill.launch.launch import num_gpus
from megatron_distill.launch.local import local_tasks
from megatron_distill.launch.plan import architecture, plan
from megatron_distill.megatron import deep_checks
from megatron_distill.runs.run_folder import RunFolder
from tests.support.tools import tool

ROOT = Path(__file__).parents[1]


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The ladder, as ``make gpu-check`` starts it."""
    command = [sys.executable, "tools/gpu_check.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )


def test_every_deep_check_has_a_remedy() -> None:
    """A check that fails tells what to do."""
    assert deep_doctor.REMEDIES.keys() == deep_checks.CHECKS.keys()


@pytest.mark.slow
def test_rungs_that_a_machine_cannot_take_are_named_and_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing is said, with what to type; nothing is started, and the ladder does not fail for it. A wrong name
    does."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nothing fetched"))
    done = gpu_check("qwen", "qwen_tp2", "--root", str(tmp_path / "runs"))
    assert done.returncode == 0
    assert "needs 1 GPU, agentica-org/" in done.stdout and "needs 3 GPUs, agentica-org/" in done.stdout
    assert "Qwen/Qwen3-4B (type: megatron-distill fetch qwen3.b06_from_4b_1x8_128)" in done.stdout
    assert "no such rung: qwne" in gpu_check("qwne").stderr


def test_one_gpu_takes_every_rung_that_does_not_need_a_second(tmp_path: Path) -> None:
    """Whoever has one card climbs all but the broadcasts and tp 2: trainer and server share it, both fit 80 GiB on paper, and
    the configs are sound."""
    ladder = tool("gpu_check")
    taken = {name: rung for name, rung in ladder.RUNGS.items() if rung.can_share}
    assert set(ladder.RUNGS) - set(taken) == {"tiny_broadcast", "qwen_broadcast", "qwen_tp2"}
    for rung in taken.values():
        config = ladder.config_of(rung, 1, [])
        tasks = local_tasks(config, RunFolder(tmp_path), ["0"])
        assert {task.env["CUDA_VISIBLE_DEVICES"] for task in tasks} == {"0"}
        if rung.needs_gpu:
            student, teacher = (
                architecture(one.path) if one.path else None for one in (config.student, config.teacher)
            )
            planned = plan(config, student, teacher, 80.0)
            assert planned.trainer_fits and planned.server_fits("student", config.max_sequence_tokens)
    for rung in ladder.RUNGS.values():
        config = ladder.config_of(rung, rung.gpus, [])
        assert num_gpus(config) == rung.gpus and config.student.dtype == "bf16"


def test_a_rung_that_cannot_be_judged_fails_and_the_next_is_climbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wish that no config takes, a metric that is not there, a number that is none, wherever it stands among others."""
    ladder = tool("gpu_check")
    for name in (ladder.DEEP, "qwen"):
        result = ladder._climb(name, tmp_path, 1, ["student.paralel.tp=2"])
        assert result.state == "FAILED" and "student.paralel" in result.text
    monkeypatch.setattr(ladder, "_run", lambda *arguments: [{"step": 1, "step_s": 1.0, "tokens_per_s": 1.0}])
    assert "metrics.jsonl holds no 'sampler_gap_nats'" in ladder._climb("tiny", tmp_path, 0, []).line()
    with pytest.raises(AssertionError, match=r"gaps 0\.01, nan nats"):
        ladder.small_gap([{"sampler_gap_nats": 0.01}, {"sampler_gap_nats": math.nan}])
    with pytest.raises(AssertionError, match=r"KLs 0, nan nats"):
        ladder.no_divergence([{"forward_kl_nats": 0.0, "reverse_kl_nats": math.nan}])
    assert ladder.small_gap([{"sampler_gap_nats": 0.01}, {"sampler_gap_nats": 0.0}]) == "sampler gap 1.0e-02 nats"


@pytest.mark.slow
def test_a_failing_check_is_told_with_its_cause(tmp_path: Path) -> None:
    """A deep check that cannot load its model fails with that error's line, and does not pass by silence."""
    outcome = deep_doctor.check("serving", tmp_path)
    assert not outcome.passed
    assert "config.json" in outcome.text


@pytest.mark.slow
def test_no_deep_check_drops_anything_out() -> None:
    """Megatron's own default is a dropout of 0.1, which the attention of a GPU applies and its stand-in here does not know."""
    code = """
from megatron_distill.megatron import deep_checks
deep_checks.prepare()
backend, _, _ = deep_checks._setting()
config = deep_checks._transformer_config(backend, num_layers=1, hidden_size=64, num_attention_heads=4)
assert config.attention_dropout == config.hidden_dropout == 0.0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.heavy
def test_deep_doctor_passes_here(capfd: pytest.CaptureFixture[str]) -> None:
    """Every check runs its CPU counterpart: packed attention, output layer, losses, a server over disk and broadcast."""
    deep_doctor.examine(None)
    table = capfd.readouterr().out
    assert all(f"  passed  {name} " in table for name in deep_doctor.REMEDIES)
    assert "after disk" in table and "after broadcast" in table
    assert all(f"{family} by cpp: loss" in table for family in ("kl", "jsd", "top-k", "log-probs"))


@pytest.mark.long
def test_tiny_rungs_pass_on_cpu(tmp_path: Path) -> None:
    """A run, weights by broadcast, a teacher equal to the student, RL, and a resume: all with verdicts from their metrics."""
    rungs = ["tiny_broadcast", "tiny_self", "tiny_rl", "tiny_resume"]
    done = gpu_check(*rungs, "--root", str(tmp_path))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert all(f"  passed   {name} " in done.stdout for name in rungs)
    (resumed,) = tmp_path.glob("*/tiny_resume/run/metrics.jsonl")
    assert [json.loads(line)["step"] for line in resumed.read_text().splitlines()] == [1, 2, 3, 4]
