"""Many runs as job arrays: how they are dealt out, what is submitted, and what the follower makes of Slurm's answers."""

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from megatron_distill.recipes import clusters, recall_studies, tiny

from megatron_distill.config import ParallelConfig, RunConfig, StudentConfig
from megatron_distill.errors import ConfigError, DistillError
from megatron_distill.launch import cluster
from megatron_distill.launch.arrays import Array, ArrayRun, arrays_of, job_of_array
from megatron_distill.launch.job_scripts import RUN_VARIABLE, batch_setup, run_of_job, run_of_task
from megatron_distill.launch.nodes import groups_of
from megatron_distill.launch.slurm import job_states
from megatron_distill.runs.run_folder import RunFolder, write_json
from megatron_distill.study import submit
from megatron_distill.study.design import Study
from megatron_distill.study.run import planned
from tests.support.made_up import leave_finished_run

LAB = clusters.lab()
SMALL, WIDE = (RunConfig(student=StudentConfig(parallel=ParallelConfig(tp=tp))) for tp in (1, 2))


def run_of(number: int, config: RunConfig = SMALL, after: int | None = None) -> ArrayRun:
    return ArrayRun(number, config, folder_of(number), None if after is None else folder_of(after))


def folder_of(number: int) -> RunFolder:
    return RunFolder(Path(f"/runs/{number}"))


def tasks_of(arrays: list[Array]) -> list[tuple[int | str | None, dict[int, str]]]:
    """What each array waits for, and the runs of its tasks."""
    return [(one.after, {number: run.folder.root.name for number, run in one.runs.items()}) for one in arrays]


def none_waits(_: RunFolder) -> None:
    return None


# --- dealing out ------------------------------------------------------------------------------------------------------


def test_runs_that_lie_alike_are_one_array() -> None:
    """However many; those that take other nodes are another, with the numbers that they have."""
    arrays = arrays_of([run_of(0), run_of(1, WIDE), run_of(2), run_of(3, WIDE)], LAB, none_waits)
    assert tasks_of(arrays) == [(None, {0: "0", 2: "2"}), (None, {1: "1", 3: "3"})]
    assert [one.groups for one in arrays] == [tuple(groups_of(config, LAB)) for config in (SMALL, WIDE)]


def test_what_goes_on_with_a_student_has_its_runs_number() -> None:
    """One array for all that wait for another array's tasks, each for the task of its own number; a second run that waits for
    the same task has an array of its own, and so has what waits for what waits."""
    runs = [run_of(0), run_of(1), run_of(2, after=0), run_of(3, WIDE, after=1), run_of(4, after=1), run_of(5, after=0)]
    arrays = arrays_of([*runs, run_of(6, after=5)], LAB, none_waits)
    assert tasks_of(arrays) == [
        (None, {0: "0", 1: "1"}),
        (0, {0: "2", 1: "4"}),
        (0, {1: "3"}),
        (0, {0: "5"}),
        (3, {0: "6"}),
    ]


def test_what_slurm_has_already_is_waited_for_there() -> None:
    """A task of an earlier array by its number, a whole job by its id; what has finished is not waited for."""
    jobs = {"7": "12_3", "8": "45"}
    runs = [run_of(0, after=7), run_of(1, after=8), run_of(2, after=8), run_of(4)]
    arrays = arrays_of(runs, LAB, lambda folder: jobs.get(folder.root.name))
    assert tasks_of(arrays) == [("aftercorr:12", {3: "0"}), ("afterok:45", {1: "1", 2: "2"}), (None, {4: "4"})]


@pytest.mark.parametrize(("max_running", "tasks"), [(0, "0,1"), (3, "0,1%3")])
def test_an_array_says_its_tasks_its_limit_and_what_it_waits_for(max_running: int, tasks: str, tmp_path: Path) -> None:
    """By numbers, and by the id that Slurm gave to the array before."""
    arrays = arrays_of([run_of(0), run_of(1), run_of(2, after=0)], LAB, none_waits)
    first, then = (job_of_array(one, LAB, tmp_path, max_running, ["12", "13"]) for one in arrays)
    assert (first.array, first.after) == (tasks, "")
    assert then.after == "aftercorr:12" and then.array.startswith("0")


def test_the_hand_off_study_is_two_arrays(tmp_path: Path) -> None:
    """Twenty runs that distil or do without, then fifteen that reinforce a student each, of the same seed."""
    runs = planned(recall_studies.hand_off(), tmp_path)
    before, after = submit._arrays(runs, {}, replace(LAB, tasks_per_cpu_node=2))
    assert (len(before.runs), before.after, len(after.runs), after.after) == (20, None, 15, 0)
    for number, run in after.runs.items():
        assert run.config.student.path == str(before.runs[number].folder.hf)
        assert run.config.seed == before.runs[number].config.seed


# --- scripts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_array", [False, True])
def test_the_batch_script_finds_its_run_and_ends_as_the_run_did(is_array: bool, tmp_path: Path) -> None:
    """By the number of the task if it is one; the exit code is 0 if and only if the run has finished, whatever the roles' was:
    a dependent array goes by it. A task is requeued by its name in the array: by its own id, which may be the array's, all
    tasks would be; and if nobody warned it, only while Slurm holds it for incomplete, which one that was cancelled is not."""
    folders = {3: RunFolder(tmp_path / "it's a $(touch run)"), 11: RunFolder(tmp_path / "other")}
    for folder in folders.values():
        folder.create()
        folder.checkpoints.mkdir()
    asked = tmp_path / "asked.txt"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    (tmp_path / "scontrol").chmod(0o755)
    setup = batch_setup(LAB, run_of_task(folders) if is_array else run_of_job(folders[3]))
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_JOB_NODELIST": "n1", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    saved, job = shlex.quote(str(folders[3].checkpoint_tracker)), "7_3" if is_array else "7"
    for does, code, requeued in (
        ('touch "$run"/finished.json; false', 0, []),
        ("true", 1, []),
        (f"echo 4 > {saved}", 1, [f"requeue Incomplete {job}"]),
        (f'echo 5 > {saved}; touch "$run"/stop_requested', 1, [f"requeue {job}"]),
    ):
        asked.unlink(missing_ok=True)
        script = f"{setup}\nprintenv {RUN_VARIABLE}\n{does}\nexitcode=$?\nset -e\nexit $exitcode"
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[-1] == str(folders[3].root)
        assert done.returncode == code
        assert [line for line in asked.read_text().splitlines() if "requeue" in line] == requeued
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_arrays_scripts_are_those_of_a_job_for_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NeMo-Run would submit them: directives of the array, sound bash, and what each role runs is the same as alone; a dry
    run writes nothing but them."""
    monkeypatch.chdir(tmp_path)
    runs = planned(small_study(), tmp_path / "study")
    scripts = submit.dry_run(runs, LAB, max_running=2)
    told, then = (name.rpartition(":")[0] for name in list(scripts)[:: len(scripts) // 2])
    assert told == "ARRAY_0, 2 runs, each on 3 nodes" and then == "ARRAY_1, 1 runs, each on 3 nodes"
    batch = scripts[f"{told}: roles_sbatch.sh"]
    assert "#SBATCH --array=0,1%2" in batch and "#SBATCH --nodes=3" in batch and "--dependency" not in batch
    assert f"0) {RUN_VARIABLE}={tmp_path}/study/runs/low/seed_1 ;;" in batch
    after = scripts[f"{then}: roles_sbatch.sh"]
    assert "#SBATCH --dependency=aftercorr:ARRAY_0" in after and "#SBATCH --kill-on-invalid-dep=yes" in after
    for script in scripts.values():
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    alone = cluster.dry_run(runs.configs["low", 1], LAB, RunFolder(tmp_path / "alone"))
    assert all(scripts[f"{told}: roles-{role}.sh"] == alone[f"roles-{role}.sh"] for role in range(3))
    assert not (tmp_path / "study" / "runs").exists()


# --- following --------------------------------------------------------------------------------------------------------


def small_study() -> Study:
    """Two arms, and one that goes on with the first's student."""
    study = tiny.study_rl()
    arms = {arm.name: arm for arm in study.arms}
    low, then = arms["student_forward"], arms["rl_from_student_forward"]
    arms_of = (replace(low, name="low"), replace(low, name="high"), replace(low, name="then", after="low"))
    assert then.after == "student_forward"
    return replace(study, name="s", arms=arms_of, seeds=(1,), questions=())


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, answers: str) -> None:
    """A squeue that prints the answers, and a sacct that knows nothing."""
    for name, text in (("squeue", answers), ("sacct", "")):
        (folder / f"{name}.txt").write_text(text)
        (folder / name).write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked.txt\ncat {folder}/{name}.txt\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_many_jobs_are_one_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks by their own names. A controller that does not answer ends no job, and is not asked for each."""
    fake_slurm(tmp_path, monkeypatch, "12_3 RUNNING\n12_4 PENDING\n45 COMPLETED\n")
    assert job_states(["12_3", "12_4", "45"]) == {"12_3": "RUNNING", "12_4": "PENDING", "45": "COMPLETED"}
    assert len((tmp_path / "asked.txt").read_text().splitlines()) == 1
    assert job_states([]) == {}
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked.txt\nexit 1\n")
    assert job_states(["12_3", "45"]) == {"12_3": "UNKNOWN", "45": "UNKNOWN"}
    assert len((tmp_path / "asked.txt").read_text().splitlines()) == 2


def test_a_failed_run_is_named_with_what_waited_for_it_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three runs one finishes, one fails, and the third was cancelled, since it waited for that one. Asked again, only the
    two are missing; while Slurm has one of them, the other alone would be submitted, and wait for it."""
    runs = planned(small_study(), tmp_path)
    fake_slurm(tmp_path, monkeypatch, "12_0 FAILED\n12_1 COMPLETED\n13_0 CANCELLED\n")
    low, high, then = runs.folders
    end, every = runs.configs[high].num_steps, runs.configs[high].evaluation.every_steps
    evaluations = {step: {"avg_at_k": 0.5, "pass_at_k": 0.6} for step in (*range(0, end, every or end), end)}
    for key, folder in runs.folders.items():
        folder.create()
        if key == high:
            steps = [{"step": 1.0, "response_tokens": 60.0, "student_prefix_frac": 1.0, "step_s": 1.0}]
            leave_finished_run(runs.configs[key], folder, evaluations, steps)
    write_json(
        runs.folders[low].errors / "trainer-0.json", {"time": 1.0, "role": "trainer", "message": "out of memory"}
    )
    with pytest.raises(DistillError) as caught:
        submit.follow(runs, {low: "12_0", high: "12_1", then: "13_0"})
    for told in ("low, seed 1: trainer failed: out of memory", "then, seed 1: it was to go on with the student of low"):
        assert told in str(caught.value)
    assert "2 of 3 runs did not finish" in str(caught.value)
    assert "high, seed 1: Avg@4 0.500 -> 0.500" in capsys.readouterr().out
    assert (runs.results / "results.json").exists()

    again = planned(small_study(), tmp_path)
    assert again.missing == [low, then]
    assert tasks_of(submit._arrays(again, {}, LAB)) == [(None, {0: "seed_1"}), (0, {0: "seed_1"})]
    (only,) = submit._arrays(again, {low: "15_0"}, LAB)
    assert (only.after, [run.folder for run in only.runs.values()]) == ("aftercorr:15", [runs.folders[then]])


def test_a_study_is_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    """Where a run does not lie on the nodes, and where its folder would break Slurm's scripts."""
    study = small_study()
    sick = replace(
        study.arms[1],
        config=replace(study.arms[1].config, servers=replace(study.arms[1].config.servers, shared_gpu_frac=0.3)),
    )
    with pytest.raises(ConfigError, match="shared_gpu_frac"):
        submit.submit_missing(planned(replace(study, arms=(study.arms[0], sick)), tmp_path), LAB)
    with pytest.raises(ConfigError, match="study folder"):
        submit.submit_missing(planned(study, tmp_path / "a b"), LAB)
    assert not (tmp_path / "runs").exists()
