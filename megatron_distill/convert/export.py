"""Any checkpoint of a run, or of Megatron, as a Hugging Face directory: what ``megatron-distill export`` does.

In: a run folder or a ``torch_dist`` checkpoint, and a step. Out: a directory that transformers and SGLang load.
"""

from pathlib import Path

from megatron_distill import config as config_module
from megatron_distill.config import RunConfig
from megatron_distill.convert.damage import damage_of
from megatron_distill.convert.megatron_files import MegatronCheckpoint
from megatron_distill.convert.offline import megatron_to_hf
from megatron_distill.errors import CheckpointError
from megatron_distill.models.vocabulary import load_vocabulary
from megatron_distill.runs import marks
from megatron_distill.runs.checkpoints import directory_name, steps_in
from megatron_distill.runs.run_folder import RunFolder


def export(source: Path, target: Path, *, step: int | None, hf_dir: Path | None, overwrite: bool) -> Path:
    """Write ``target`` from one checkpoint, every checksum of which was compared first.

    Args:
        source: a run folder, what ``--save`` of Megatron wrote, or one iteration's folder.
        target: directory to create.
        step: of the checkpoint; None takes the latest.
        hf_dir: where config.json and the tokenizer are; by default the student that the run began with, or the checkpoint's
            own ``hf/``.
        overwrite: replace a target that the project wrote.

    Returns:
        The directory of the checkpoint.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    end_token_ids: tuple[int, ...] = ()
    if marks.kind_of(source) == "run":
        folder = RunFolder(source)
        directory = checkpoint_of(folder, step)
        config = config_module.load(folder.config)
        hf_dir = hf_dir or Path(config.student.path)
        end_token_ids = _ends(config, hf_dir)
    else:
        directory = MegatronCheckpoint(source).directory if step is None else _of_step(source, step)
    check_whole(directory)
    megatron_to_hf(directory, target, hf_dir=hf_dir, overwrite=overwrite, end_token_ids=end_token_ids)
    return directory


def _ends(config: RunConfig, hf_dir: Path) -> tuple[int, ...]:
    """What ended the run's responses; of its teacher's tokens those that the config names, if the teacher is gone."""
    teacher = Path(config.teacher.path) if config.teacher.path else hf_dir
    return load_vocabulary(hf_dir, teacher if teacher.is_dir() else hf_dir, config.rollouts.stop_tokens).stop_token_ids


def checkpoint_of(folder: RunFolder, step: int | None) -> Path:
    """Where a run's checkpoint of a step is, or its latest; whether it is whole, ``check_whole`` says.

    Raises:
        CheckpointError: there is none.
    """
    if step is None and not (step := folder.latest_checkpoint_step()):
        raise CheckpointError(
            f"{folder.root}: holds no checkpoint yet. Train on, with save_every_steps to have some soon."
        )
    return _of_step(folder.checkpoints, step)


def check_whole(checkpoint: Path) -> None:
    """Compare every checksum in a checkpoint's directory.

    Raises:
        CheckpointError: it is damaged; said with the steps of the other checkpoints beside it.
    """
    if damage := damage_of(checkpoint):
        others = [step for step in steps_in(checkpoint.parent) if directory_name(step) != checkpoint.name]
        raise CheckpointError(f"{damage}. The checkpoint is damaged. Name another --step (there: {_listed(others)}).")


def _of_step(checkpoints: Path, step: int) -> Path:
    directory = checkpoints / directory_name(step)
    if not directory.is_dir():
        raise CheckpointError(
            f"--step = {step}: {checkpoints} holds no checkpoint of it (there: {_listed(steps_in(checkpoints))}). Name one of "
            "those, or train with save_every_steps."
        )
    return directory


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
