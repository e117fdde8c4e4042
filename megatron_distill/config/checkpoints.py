"""The ``checkpoints`` section: what a run keeps on the way, and for how long.

In: nothing. Out: ``CheckpointConfig``. How often a checkpoint is saved is ``save_every_steps``.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_distill.config.fields import plain


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of the checkpoints and of the student on the way."""

    keep_last: int = plain(
        0,
        "how many of the latest checkpoints are kept; 0 keeps all. An older one goes only once the latest was read and "
        "found whole",
        "[0, 1e9]",
    )
    keep_every_steps: int = plain(0, "also keep those whose step is a multiple of this; 0 is none", "[0, 1e9]")
    keep_best: Literal["none", "avg_at_k", "pass_at_k"] = plain(
        "none",
        "keep the student of the best evaluation on the held-out set, by this metric, in hf_best/, and its checkpoint if one "
        "was saved at that step",
    )
    export_hf: bool = plain(
        False,
        "beside each checkpoint, write the student as a Hugging Face directory, hf_steps/step_NNNNNN; all are kept",
    )
