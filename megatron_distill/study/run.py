"""A controlled study: the same task under many settings, every setting with several seeds, and what follows from it.

    megatron-distill study tiny.study           run it, or go on where it was interrupted
    megatron-distill study tiny.study --quick   one seed and few steps: a look, not a result
    megatron-distill study tiny.study --seeds 2 the runs of one seed; commands of different seeds may go on side by side
    megatron-distill study tiny.study --cluster PROFILE     all runs at once, as job arrays of Slurm: see ``submit``

In: a ``Study`` (see ``study.design``) and a folder. Out, rewritten after every run, so that an interrupted study shows what it
has:

    FOLDER/
      runs/ARM/seed_N/    a run folder each; a finished one is not repeated, an interrupted one is resumed
      runs-quick/         the same of --quick
      STUDY/
        results.json      all that the rest is made from: small, without paths, to be kept
        results.md        verdicts, tables        study.html    the same as a page        figures/*.svg

Studies with arms in common make them once if they are given the same folder. Several commands may share it too: what another
has made is not repeated, what another is making is left to it.
Runs are made seed by seed: of five seeds every arm has its first run after a fifth of the time, and every comparison is judged,
on two seeds, after two fifths.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_distill import config as config_module
from megatron_distill.config import RunConfig, flatten
from megatron_distill.convert.hf_files import check_free_space
from megatron_distill.errors import BusyError, ConfigError, DistillError
from megatron_distill.launch.disk import bytes_to_come
from megatron_distill.launch.launch import Train
from megatron_distill.models import hub
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.runs.lock import in_turn
from megatron_distill.runs.run_folder import RunFolder
from megatron_distill.runs.summary import duration
from megatron_distill.study.design import Arm, Study, check_study
from megatron_distill.study.page import write_pages
from megatron_distill.study.results import save
from megatron_distill.study.run_results import collect

Key = tuple[str, int]
"""A run of a study: its arm's name and its seed."""

_UNSEEN = ("name", "seed", "optimizer.", "distill.reverse_kl_weight")
"""Fields in which no check of files looks: a check reads all weights, and is made once for runs that differ in these alone."""


@dataclass(frozen=True)
class StudyRuns:
    """A study's runs: what each is, and which are to be made.

    Attributes:
        study: arms, seeds, questions.
        results: where its results go.
        folders: of all runs, seed by seed.
        configs: of all runs.
        missing: those to be made, in the order in which they can be.
    """

    study: Study
    results: Path
    folders: dict[Key, RunFolder]
    configs: dict[Key, RunConfig]
    missing: list[Key]

    def before(self, key: Key) -> Key | None:
        """The run whose student this one goes on with."""
        arm, seed = key
        after = next(one.after for one in self.study.arms if one.name == arm)
        return (after, seed) if after else None

    def publish(self) -> str:
        """Write results and pages of what has finished, whoever made it; its verdicts.

        Commands that share the folder take turns, from the look at what has finished to the last page: else the slower would
        put what it saw in place of what the other has found since.
        """
        self.results.mkdir(parents=True, exist_ok=True)
        with in_turn(self.results / ".publishing"):
            results = collect(self.study, _finished(self.folders, self.configs))
            save(results, self.results / "results.json")
            return write_pages(results, self.results)

    def closing(self, verdicts: str) -> str:
        """What the console shows last."""
        return f"\n{verdicts}\n\n  results: {self.results / 'results.md'}\n  page:    {self.results / 'study.html'}"


def run_study(study: Study, folder: Path, train: Train, seeds: Sequence[int] = ()) -> str:
    """Make the runs that are missing, and write the results after each.

    Args:
        study: arms, seeds, questions.
        folder: for the runs and the results; absolute. It may hold those of other studies.
        train: makes a run, on this machine or on a cluster.
        seeds: whose runs are made; none: all. The results hold whatever has finished, whoever made it, and a run that another
            call is making is left to it, so that calls may share the folder at the same time.

    Returns:
        The verdicts and where the results are, for the console.

    Raises:
        ConfigError: the study or a run's config is unsound; nothing was started.
        DistillError: a run failed, or its folder holds a run of another config. Finished runs are kept.
    """
    runs = planned(study, folder, seeds)
    verdicts = runs.publish()
    began = time.monotonic()
    left: list[Key] = []
    for number, key in enumerate(runs.missing, 1):
        print(f"run {number}/{len(runs.missing)}  {key[0]}, seed {key[1]} ... ", end="", flush=True)
        started = time.monotonic()
        if runs.before(key) in left or not _is_made(runs.configs[key], runs.folders[key], train):
            left.append(key)
            print("left to another command, which is making it, or what it goes on from", flush=True)
            continue
        verdicts = runs.publish()
        now = time.monotonic()
        eta = (now - began) / number * (len(runs.missing) - number)
        told = f"; ETA {duration(eta)}" if eta else ""
        print(f"{outcome(runs.folders[key])}, {duration(now - started)}{told}", flush=True)
    if left:
        print(f"{len(left)} runs were left to another command. Should it not finish them, the same command makes them.")
    return runs.closing(verdicts)


def planned(study: Study, folder: Path, seeds: Sequence[int] = ()) -> StudyRuns:
    """Look at what there is and check what is to be made; nothing is written.

    Args:
        study: see ``run_study``.
        folder: see ``run_study``.
        seeds: see ``run_study``.

    Raises:
        ConfigError: the study or a run's config is unsound.
        DistillError: a folder holds a run of another config.
    """
    check_study(study)
    if unknown := sorted(set(seeds) - set(study.seeds)):
        raise ConfigError(
            f"--seeds = {unknown[0]}: the study has none such. Its seeds: {', '.join(map(str, study.seeds))}."
        )
    folders = {
        (arm.name, seed): RunFolder(folder / study.runs / arm.name / f"seed_{seed}")
        for seed in study.seeds
        for arm in study.arms
    }
    arms = {arm.name: arm for arm in study.arms}
    configs = {(name, seed): _run_config(arms[name], seed, folders) for name, seed in folders}
    finished = _finished(folders, configs)
    missing = [key for key in folders if key not in finished and key[1] in (seeds or study.seeds)]
    print(f"{study.title}: {len(finished)} of {len(folders)} runs finished before, in {folder}", flush=True)
    runs = StudyRuns(study, folder / study.name, folders, configs, missing)
    _check_files(runs)
    return runs


def _check_files(runs: StudyRuns) -> None:
    """Check models, data and layouts of every run before the first one starts, each combination once; and the disk for all.

    An arm that goes on with another's student is checked with what that one began with, as long as there is no other.

    Raises:
        ConfigError: naming the run.
        CheckpointError: what all runs will write does not fit the disk.
    """
    from megatron_distill.launch import preflight  # which loads tokenizers

    seen = set()
    num_bytes = 0.0
    for key in runs.missing:
        config, before = runs.configs[key], runs.before(key)
        while before is not None and not Path(config.student.path).exists():
            path = runs.configs[before].student.path
            config, before = replace(config, student=replace(config.student, path=path)), runs.before(before)
        fields = flatten(config_module.to_dict(config)).items()
        alike = json.dumps([(field, value) for field, value in fields if not field.startswith(_UNSEEN)])
        if alike not in seen:
            seen.add(alike)
            try:
                preflight.check(config)
            except DistillError as error:
                raise ConfigError(f"study run {config.name!r}: {error}") from error
        num_bytes += bytes_to_come(config, HfConfig.from_dir(config.student.path), runs.folders[key])
    check_free_space(runs.results.parent, int(num_bytes))


def _run_config(arm: Arm, seed: int, folders: dict[Key, RunFolder]) -> RunConfig:
    """An arm's config for one seed; after another arm, its student is what that arm's run of the same seed exported."""
    config = replace(arm.config, name=f"{arm.name}/seed_{seed}", seed=seed)
    if arm.after:
        config = replace(config, student=replace(config.student, path=str(folders[arm.after, seed].hf)))
    return hub.resolved(config_module.from_dict(config_module.to_dict(config)))


def _is_finished(run: RunFolder, config: RunConfig) -> bool:
    """Whether a run need not be made.

    Raises:
        DistillError: the folder holds a run of another config that has come so far that it would be kept.
    """
    if not run.latest_checkpoint_step():
        return False
    before, now = (flatten(config_module.to_dict(one)) for one in (config_module.load(run.config), config))
    if changed := [field for field in now if now[field] != before.get(field)]:
        raise DistillError(
            f"study run = {run.root}: holds a run of another config ({', '.join(changed)} differ), and the study would mix "
            "the two. Choose another --dir, or delete the folder to repeat the run."
        )
    return run.has_finished(config.num_steps)


def _finished(folders: dict[Key, RunFolder], configs: dict[Key, RunConfig]) -> dict[Key, RunFolder]:
    return {key: run for key, run in folders.items() if _is_finished(run, configs[key])}


def _is_made(config: RunConfig, run: RunFolder, train: Train) -> bool:
    """Make a run, its console in ``logs/console.log``, unless another command has made it since; False if one is making it."""
    if _is_finished(run, config):
        return True
    run.create()
    log = run.logs / "console.log"
    try:
        with log.open("a") as out:
            train(config, run, out)
        return True
    except BusyError:
        return False
    except DistillError as error:
        print("failed", flush=True)
        raise DistillError(
            f"study run = {config.name}: failed, and the study stopped. The same command goes on from here; finished runs "
            f"are kept. Console of the run: {log}\n{error}"
        ) from error


def outcome(run: RunFolder) -> str:
    """A finished run's first and last evaluation, in a line."""
    evaluations = run.evaluations()
    first, last = evaluations[0], evaluations[-1]
    return (
        f"Avg@{last['k']} {first['avg_at_k']:.3f} -> {last['avg_at_k']:.3f}, entropy {last['entropy_nats']:.3f} nats, "
        f"length {last['response_tokens']:.0f} tokens"
    )
