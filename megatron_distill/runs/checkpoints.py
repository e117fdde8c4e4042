"""The checkpoints in a run folder: where each is, which ones a run keeps, and taking the others away.

In: a run folder and the ``checkpoints`` section of its config. Out: steps, and fewer directories.

A checkpoint is taken away in two moves: renamed, so that no start takes a part of it for a whole one, then deleted. A kill in
between leaves ``.removed.iter_...``, which ``remove_leftovers`` takes. A directory that holds anything Megatron does not write
is nobody's to delete, and stays.
"""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_distill.config import CheckpointConfig
from megatron_distill.runs.run_folder import RunFolder, read_json, write_json

_REMOVED = ".removed."
_MEGATRON_WRITES = re.compile(
    r"\.metadata|metadata\.json|common\.pt|.*\.distcp|(modelopt_)?run_config\.yaml|train_dataloader_dprank\d+\.pt"
)


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far, whose student is in ``hf_best/``.

    Attributes:
        step: optimizer steps behind the weights.
        metric: that was compared.
        value: of it.
    """

    step: int
    metric: str
    value: float


def directory_name(step: int) -> str:
    """What Megatron calls the directory of a step's checkpoint."""
    return f"iter_{step:07d}"


def directory_of(folder: RunFolder, step: int) -> Path:
    """Where Megatron keeps a run's checkpoint of a step."""
    return folder.checkpoints / directory_name(step)


def steps_on_disk(folder: RunFolder) -> list[int]:
    """Steps of which a run has a checkpoint's directory, in order."""
    return steps_in(folder.checkpoints)


def steps_in(checkpoints: Path) -> list[int]:
    """Steps of which there is a directory, in order; whether it is whole is another question (``convert.damage``)."""
    numbers = [path.name.removeprefix("iter_") for path in checkpoints.glob("iter_*")]
    return sorted(int(n) for n in numbers if n.isascii() and n.isdigit() and int(n) > 0)


def steps_to_keep(steps: Iterable[int], latest: int, config: CheckpointConfig, best: Best | None) -> set[int]:
    """Those of ``steps`` that the config keeps.

    Args:
        steps: on disk.
        latest: that a resumed run goes on from; it and whatever is newer is always kept.
        config: how many, and which besides.
        best: whose checkpoint is kept too, if there is one.
    """
    complete = sorted(step for step in steps if step <= latest)
    kept = set(steps) - set(complete)
    kept |= set(complete[-config.keep_last :] if config.keep_last else complete)
    kept |= {step for step in complete if config.keep_every_steps and step % config.keep_every_steps == 0}
    kept |= {step for step in complete if step == latest or (best is not None and step == best.step)}
    return kept


def remove(folder: RunFolder, step: int) -> bool:
    """Take one checkpoint away; false, and nothing done, if its directory holds what Megatron did not write."""
    directory = directory_of(folder, step)
    if not _is_megatrons(directory):
        return False
    removed = directory.with_name(_REMOVED + directory.name)
    if removed.exists():
        return False
    directory.rename(removed)
    shutil.rmtree(removed)
    return True


def remove_leftovers(folder: RunFolder) -> None:
    """Finish what a kill interrupted."""
    for path in folder.checkpoints.glob(f"{_REMOVED}iter_*"):
        if _is_megatrons(path):
            shutil.rmtree(path)


def _is_megatrons(directory: Path) -> bool:
    if directory.is_symlink() or not directory.is_dir():
        return False
    return all(
        path.is_file() and not path.is_symlink() and _MEGATRON_WRITES.fullmatch(path.name)
        for path in directory.iterdir()
    )


def best_so_far(folder: RunFolder, metric: str) -> Best | None:
    """The best evaluation so far by ``metric``; None if there was none, or the last was compared by another."""
    if not folder.best.exists():
        return None
    best = Best(**read_json(folder.best))
    return best if best.metric == metric else None


def record_best(folder: RunFolder, best: Best) -> None:
    """What ``best_so_far`` will say from now on."""
    write_json(folder.best, vars(best))
