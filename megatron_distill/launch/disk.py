"""What a run will put on its disk: checkpoints, exports, weights on their way. Imports neither torch nor Megatron.

In: a config and the student's architecture. Out: ``Part``s for ``plan``; what is still to be written, for ``preflight``.
"""

from collections.abc import Iterator

from megatron_distill.config import RunConfig
from megatron_distill.launch.memory import GIB, OPTIMIZER_BYTES, WEIGHT_BYTES, Part, num_parameters
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.runs.run_folder import RunFolder


def disk(config: RunConfig, student: HfConfig) -> Iterator[Part]:
    """What a run folder holds at its fullest, in parts; records, logs and samples are small beside it."""
    parameters, dtype = num_parameters(student), config.student.dtype
    saved_bytes = WEIGHT_BYTES[dtype] + OPTIMIZER_BYTES[dtype]
    weights, checkpoint = parameters * WEIGHT_BYTES[dtype], parameters * saved_bytes
    saved, kept = num_checkpoints(config)
    each = f"{checkpoint / GIB:.2f} GiB each, {saved_bytes} B a parameter"
    yield Part("checkpoints", kept * checkpoint, f"{kept} at most of {saved} that are saved, {each}")
    yield Part("student", weights, "hf/, at the end")
    if config.checkpoints.keep_best != "none":
        yield Part("best student", 2 * weights, "hf_best/, and the next one while it is written")
    if config.checkpoints.export_hf:
        yield Part("exports", (saved - 1) * weights, f"hf_steps/, one at each of {saved - 1} saves before the last")
    if config.uses_student_prefixes and config.servers.weight_sync == "disk":
        yield Part("weights on the way", 2 * weights, "sync/, two versions")
    if config.servers.evaluation_replicas:
        yield Part("weights evaluated", weights, "evaluating/, one step's at a time")


def num_checkpoints(config: RunConfig) -> tuple[int, int]:
    """How many checkpoints a run saves, and how many it holds at most, the one that is being written included."""
    every, settings = config.save_every_steps, config.checkpoints
    regular = config.num_steps // every if every else 0
    saved = regular + (not every or config.num_steps % every != 0)
    if not settings.keep_last:
        return saved, saved
    kept = settings.keep_last + 1 + (settings.keep_best != "none")
    if settings.keep_every_steps:
        kept += config.num_steps // settings.keep_every_steps
    return saved, min(saved, kept)


def bytes_to_come(config: RunConfig, student: HfConfig, folder: RunFolder) -> float:
    """What a run's folder will need beyond what is in it."""
    places = (folder.checkpoints, folder.hf, folder.hf_best, folder.hf_step(0).parent, folder.sync, folder.evaluating)
    there = sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())
    return max(sum(part.num_bytes for part in disk(config, student)) - there, 0)
