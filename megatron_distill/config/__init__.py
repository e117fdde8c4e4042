"""What a run is: one tree of frozen dataclasses, loaded strictly.

In: a recipe (a function in ``recipes/`` that returns a ``RunConfig``) and overrides from the command line
(``curriculum.horizon_tokens=256``). Out: a validated ``RunConfig``, written to the run folder as ``config.json``.

    schema    the dataclasses: every field with its default and its help text; ``checkpoints``, ``curricula``, ``data``,
              ``objective`` (what is minimised) and ``servers`` are parts of it
    rules     which values go together
    files     to JSON and back, overrides
    reference the text of --help, and docs/config.md

Units are in the fields' names (num_*, *_frac, *_s, *_tokens, *_nats), unknown keys are refused with a suggestion, and all
problems are reported at once, before any process starts. Importing this pulls in neither torch, Megatron, SGLang nor
NeMo-Run.
"""

from megatron_distill.config.checkpoints import CheckpointConfig
from megatron_distill.config.curricula import CurriculumConfig, EntropyGated, FixedHorizon, Ladder, Progressive
from megatron_distill.config.data import DataConfig, SourceConfig
from megatron_distill.config.files import (
    flatten,
    from_dict,
    load,
    plain_value,
    save,
    to_dict,
    with_overrides,
)
from megatron_distill.config.objective import DistillConfig, RlConfig, SftConfig
from megatron_distill.config.reference import field_help
from megatron_distill.config.rules import problems_of
from megatron_distill.config.schema import (
    SERVER_RESERVED_TOKENS,
    SERVING_DTYPES,
    EvalConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    all_fields,
    walk,
)
from megatron_distill.config.servers import ServersConfig

__all__ = [
    "SERVER_RESERVED_TOKENS",
    "SERVING_DTYPES",
    "CheckpointConfig",
    "CurriculumConfig",
    "DataConfig",
    "DistillConfig",
    "EntropyGated",
    "EvalConfig",
    "FixedHorizon",
    "Ladder",
    "OptimizerConfig",
    "ParallelConfig",
    "Progressive",
    "RlConfig",
    "RolloutConfig",
    "RunConfig",
    "ServersConfig",
    "SftConfig",
    "SourceConfig",
    "StudentConfig",
    "TeacherConfig",
    "all_fields",
    "field_help",
    "flatten",
    "from_dict",
    "load",
    "plain_value",
    "problems_of",
    "save",
    "to_dict",
    "walk",
    "with_overrides",
]
