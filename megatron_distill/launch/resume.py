"""What a run may go on with: which config, and from which checkpoint.

In: the config that a run folder holds and the one that is started now; a run folder that this launcher holds. Out: the fields
that may not differ; a step whose checkpoint was proven to be whole before any server is started. A job that Slurm put back into
its queue has no launcher: there the trainer's first rank looks, before anything is loaded.
"""

import os
from pathlib import Path

from megatron_distill.config import RunConfig, flatten, to_dict
from megatron_distill.config.json_files import write_whole
from megatron_distill.errors import CheckpointError
from megatron_distill.runs.checkpoints import directory_of, steps_on_disk
from megatron_distill.runs.run_folder import RunFolder

FREE_SECTIONS = ("checkpoints.",)
FREE_FIELDS = frozenset(
    {
        *("name", "num_steps", "save_every_steps", "on_damaged_checkpoint", "trackers", "teacher.cache_dir"),
        *("evaluation.every_steps", "evaluation.sets"),
        *(f"servers.{name}" for name in ("student_replicas", "teacher_replicas", "evaluation_replicas")),
        *("servers.weight_sync", "servers.sync_bucket_mib"),
        *(f"servers.{name}_timeout_s" for name in ("startup", "request", "hang")),
        *("servers.min_tokens_per_s", "servers.requests_per_replica", "servers.max_restarts_per_hour"),
    }
)
"""Fields that may differ between the starts of one run: they cannot change what it learns.

Not free are the sizes and flags of servers, which change the rounding of what they sample, and what an evaluation consists of:
one run's evaluations can be compared.
"""


def refused_changes(before: RunConfig, now: RunConfig) -> list[str]:
    """Fields that a run may not go on with as they are now; a path may become another name of the same place."""
    was, is_now = flatten(to_dict(before)), flatten(to_dict(now))
    free = set(FREE_FIELDS)
    # An evaluation by the student's servers brings them weights: fresher rollouts.
    if now.rollouts.sync_every_steps > 1:
        free -= {"evaluation.every_steps", "evaluation.sets", "servers.evaluation_replicas"}
    if now.optimizer.lr_decay != "constant":  # which leads to its end
        free -= {"num_steps"}
    changed = {name for name in was.keys() | is_now.keys() if was.get(name) != is_now.get(name)}
    changed -= {name for name in changed if name.endswith("path") and _same_place(was.get(name), is_now.get(name))}
    return sorted(name for name in changed - free if not name.startswith(FREE_SECTIONS))


def changed_warmup(before: RunConfig, now: RunConfig, step: int) -> str:
    """What another number of steps would do to the learning rate from ``step`` on; empty if nothing.

    Megatron takes warm-up's length from the config of now, and looks again at each step whether it is over.
    """
    last = max(before.warmup_steps, now.warmup_steps)
    if before.warmup_steps == now.warmup_steps or step >= last:
        return ""
    return (
        f"num_steps = {now.num_steps} instead of {before.num_steps} would change the learning rate after step {step}: warm-up, "
        f"optimizer.warmup_frac of all steps, would take {now.warmup_steps} steps instead of {before.warmup_steps}. A "
        f"checkpoint of step {last} or later may go on so. To go on from this one, with the optimizer.warmup_frac that you "
        "mean (0 is no warm-up): megatron-distill fork."
    )


def _same_place(one: object, other: object) -> bool:
    return isinstance(one, str) and isinstance(other, str) and Path(one).resolve() == Path(other).resolve()


def requeued_step(folder: RunFolder, may_use_previous: bool) -> int:
    """The step that a trainer goes on from: verified here if no launcher did; see ``whole_checkpoint``."""
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return whole_checkpoint(folder, may_use_previous)
    return folder.latest_checkpoint_step()


def whole_checkpoint(folder: RunFolder, may_use_previous: bool) -> int:
    """The step of the checkpoint to resume from; 0 if there is none.

    A damaged one is put aside, never deleted, and only if an earlier whole one takes its place.

    Args:
        folder: of the run.
        may_use_previous: go on from the latest whole one if the last is damaged.

    Raises:
        CheckpointError: naming the damaged file, and what the next start can do.
    """
    step = folder.latest_checkpoint_step()
    if not step:
        return 0
    # This imports torch: seconds that a fresh run need not spend.
    from megatron_distill.convert.damage import damage_of

    damage = damage_of(directory_of(folder, step))
    if not damage:
        return step
    earlier = next((s for s in _earlier_steps(folder, step) if not damage_of(directory_of(folder, s))), 0)
    if not earlier:
        raise CheckpointError(
            f"checkpoint of step {step}: {damage}. There is no whole one before it. Put the file back from a copy, or start "
            "over in another --run-dir."
        )
    if not may_use_previous:
        raise CheckpointError(
            f"checkpoint of step {step}: {damage}. The one of step {earlier} is whole. Put the file back from a copy, or add "
            f"on_damaged_checkpoint=use_previous to go on from step {earlier}; the {step - earlier} steps after it are made "
            "again, with the same result."
        )
    for late in [step, *(s for s in _earlier_steps(folder, step) if s > earlier)]:
        _put_aside(directory_of(folder, late))
    write_whole(folder.checkpoint_tracker, str(earlier).encode())
    folder.event(
        "launcher", f"checkpoint of step {step} is damaged and put aside: {damage}. Going on from step {earlier}"
    )
    return earlier


def _earlier_steps(folder: RunFolder, step: int) -> list[int]:
    """Steps before ``step`` of which there is a directory, latest first."""
    return [one for one in reversed(steps_on_disk(folder)) if one < step]


def _put_aside(directory: Path) -> None:
    if not directory.exists():
        return
    number = 1
    while (aside := directory.with_name(f"damaged_{directory.name}.{number}")).exists():
        number += 1
    directory.rename(aside)
