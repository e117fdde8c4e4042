"""A new run from another run's checkpoint: the same weights and optimizer state, another config.

In: a run folder, a step, a config. Out: a run folder that stands at that step, as if it had been trained there; ``train`` or
``launch`` go on with it. Its records up to the step are the first run's.
"""

import os
import shutil
from pathlib import Path

from megatron_distill import config as config_module
from megatron_distill.config import RunConfig
from megatron_distill.convert.export import check_whole, checkpoint_of
from megatron_distill.errors import ConfigError, DistillError
from megatron_distill.launch import preflight
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.runs import marks
from megatron_distill.runs.checkpoints import directory_of
from megatron_distill.runs.run_folder import RunFolder, has_records, write_json

_SAME = ("student.dtype", "student.distributed_optimizer")  # in which the optimizer's state is laid down


def fork(source: RunFolder, step: int | None, config: RunConfig, target: RunFolder) -> int:
    """Make the new run's folder, all at once or not at all; nothing is started.

    Checkpoint files are hard links where the file system allows: neither run ever writes into one.

    Args:
        source: the run to begin from. Only read.
        step: of its checkpoint; None takes the latest.
        config: of the new run; ``num_steps`` counts from the first run's beginning.
        target: its folder, which is new or empty.

    Returns:
        The step that the new run stands at.

    Raises:
        DistillError: no such checkpoint, it is damaged, the config does not fit it, or the target holds something.
    """
    before = config_module.load(source.config)
    checkpoint = checkpoint_of(source, step)
    step = int(checkpoint.name.removeprefix("iter_"))
    _check_fits(before, config, step)
    if target.root.exists() and (not target.root.is_dir() or any(target.root.iterdir())):
        raise DistillError(f"run folder = {target.root}: is not empty. Choose another --run-dir or name=...")
    check_whole(checkpoint)
    preflight.check(config, target)
    partial = RunFolder(target.root.with_name(f".{target.root.name}.forking"))
    if partial.root.exists():  # what a kill left
        marks.check_claim(partial.root, "run", "leftover")
        shutil.rmtree(partial.root)
    partial.create()
    try:
        _copy(source, checkpoint, partial, step, with_decisions=before.curriculum == config.curriculum)
        config_module.save(config, partial.config)
    except BaseException as error:
        shutil.rmtree(partial.root, ignore_errors=True)
        if isinstance(error, OSError):  # a full disk, or what is no file
            raise DistillError(f"{source.root}: cannot be copied to {target.root} ({str(error)[:300]}).") from error
        raise
    if target.root.exists():
        target.root.rmdir()
    partial.root.rename(target.root)
    return step


def _copy(source: RunFolder, checkpoint: Path, target: RunFolder, step: int, with_decisions: bool) -> None:
    """The checkpoint, and the records up to its step."""
    _link(checkpoint, directory_of(target, step))
    target.checkpoint_tracker.write_text(str(step))
    for path in (source.metrics, source.samples, *([source.curriculum] if with_decisions else [])):
        if has_records(path):
            shutil.copyfile(path, target.root / path.name)
    if source.evals.exists():
        shutil.copytree(source.evals, target.evals, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.log"))
    target.rewind(step)
    write_json(target.root / "forked_from.json", {"run": str(source.root.resolve()), "step": step})


def _check_fits(before: RunConfig, config: RunConfig, step: int) -> None:
    problems = []
    if config.num_steps <= step:
        problems.append(
            f"num_steps = {config.num_steps}: must exceed {step}, the step of the checkpoint; it counts from the first run's "
            "beginning. Raise it."
        )
    was, is_now = (config_module.flatten(config_module.to_dict(one)) for one in (before, config))
    problems += [
        f"{name} = {is_now[name]!r}: must be {was[name]!r}, as the checkpoint's optimizer state was saved. Set it back."
        for name in _SAME
        if was[name] != is_now[name]
    ]
    if HfConfig.from_dir(before.student.path) != HfConfig.from_dir(config.student.path):
        problems.append(
            f"student.path = {config.student.path}: is of another architecture than {before.student.path}, whose weights the "
            "checkpoint holds. Name a student of the same."
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _link(checkpoint: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in checkpoint.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:  # another file system, or one without links
            shutil.copy2(file, target / file.name)
