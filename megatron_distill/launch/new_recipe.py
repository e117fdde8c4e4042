"""Write a recipe for one's own models and data: a commented file that runs as it is, and that a person goes on from.

In: two model directories and two files of problems. Out: ``FILE.py`` with one function, already checked as a run would be:
columns found in the data, the longest prompt measured, an instruction to box the answer if the prompts have none.
"""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path

from megatron_distill.config import SERVER_RESERVED_TOKENS, RunConfig
from megatron_distill.config.loading import load_recipe
from megatron_distill.errors import ConfigError
from megatron_distill.launch import preflight
from megatron_distill.launch.local import visible_gpus
from megatron_distill.models import hub
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.models.vocabulary import load_vocabulary
from megatron_distill.rollouts.prompts import load_prompt_set
from megatron_distill.rollouts.records import first_record
from megatron_distill.runs import marks

FUNCTION = "recipe"
_PROMPT_KEYS = ("prompt", "problem", "question", "messages", "input", "instruction", "query")
_ANSWER_KEYS = ("answer", "final_answer", "expected_answer", "ground_truth", "target", "label", "output")
_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."

_TEXT = '''"""{name}: {student_name} learns from {teacher_name}.

{commands}

Any field can be changed on the command line too: `num_steps=20 distill.reverse_kl_weight=0.5`. docs/config.md lists them all.
"""

from megatron_distill.config import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    EvalConfig,
    FixedHorizon,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)
from megatron_distill.config.schedules import constant


def {function}() -> RunConfig:
    """On-policy distillation: the student writes, the teacher scores every token."""
    return RunConfig(
        name={quoted[name]},  # the run folder: runs/NAME
        num_steps=200,
        save_every_steps=50,  # a checkpoint, from which the same command resumes; with optimizer states, 14 bytes a parameter
        checkpoints=CheckpointConfig(keep_last=2, keep_best="avg_at_k"),  # the best student goes to hf_best/
        trackers=(),  # e.g. ("tensorboard", "wandb"); docs/trackers.md
        student=StudentConfig(
            path={quoted[student]},
            # One process a GPU: tp ranks share each layer, dp replicas share a step's prompts. `plan` says what fits.
            parallel=ParallelConfig(tp=1, dp=1),
            dtype={quoted[dtype]},
        ),
        teacher=TeacherConfig(
            path={quoted[teacher]},
            # A server sends its 64 likeliest tokens, and the rest counts as one. transport="in_process" keeps the teacher
            # beside the student instead: the exact divergence, at the price of its memory.
            num_logprobs=64,
        ),
        data=DataConfig(
            train_path={quoted[train]},
            heldout_path={quoted[heldout]},
            prompt_key={quoted[prompt_key]},
            answer_key={quoted[answer_key]},
            answer_marker={quoted[marker]},  # text after which the answer begins, e.g. "####"; empty is the whole column
            instruction={quoted[instruction]},  # put under the problem; math-verify judges the last \\boxed{{}}
            template_options={{}},  # of the chat template, e.g. {{"enable_thinking": False}} for Qwen3
            max_prompt_tokens={max_prompt},  # the longest here has {longest}
            on_bad_rows={quoted[on_bad_rows]},  # rows without prompt or answer, or too long; "drop" leaves them out, counted
        ),
        rollouts=RolloutConfig(
            prompts_per_step=32,  # shared by the dp replicas
            student_prefix_frac=constant(1.0),  # 0: the teacher writes; in between: a share of the prompts
        ),
        curriculum=FixedHorizon(horizon_tokens=constant({horizon})),  # responses are cut here: look at truncated_frac
        # w * KL(student||teacher) + (1 - w) * KL(teacher||student). Much of the first loses diversity; see docs/losses.md.
        distill=DistillConfig(reverse_kl_weight=constant(0.2)),
        optimizer=OptimizerConfig(lr=1e-6, warmup_frac=0.05),
        evaluation=EvalConfig(
            num_problems={num_heldout},
            samples_per_problem=4,
            every_steps=50,
            max_response_tokens={horizon},
        ),
    )
'''


def write_recipe(
    file: Path,
    student: str,
    teacher: str,
    train: str,
    heldout: str,
    horizon_tokens: int,
    prompt_key: str = "",
    answer_key: str = "",
    on_bad_rows: str = "stop",
) -> str:
    """Write and check a recipe.

    Args:
        file: to write; its stem names the run.
        student: Hugging Face directory, or a hub id that was fetched; so are the others.
        teacher: likewise.
        train: problems.
        heldout: problems that training does not see.
        horizon_tokens: the longest response.
        prompt_key: column of the prompts; empty looks for one of a usual name.
        answer_key: column of the answers; likewise.
        on_bad_rows: as in ``data.on_bad_rows``.

    Returns:
        What was found and what to type next.

    Raises:
        ConfigError: there is such a file already, or no folder for it, or something about models or data is wrong; then
            nothing is left behind.
        DistillError: the folder may not be written to.
    """
    if file.suffix != ".py" or file.exists():
        problem = "exists already. Choose another name" if file.exists() else "must end with .py"
        raise ConfigError(f"new = {file}: {problem}. A recipe is a Python file of its own. Type for example my_run.py.")
    marks.check_parent_writable(file, "new")
    if not file.parent.is_dir():
        raise ConfigError(
            f"new = {file}: there is no folder {file.parent} to write into. Make it, or name a file elsewhere."
        )
    models = {"student": hub.local_place(student, "model"), "teacher": hub.local_place(teacher, "model")}
    for role, place in models.items():
        preflight.check_is_directory(role, place)
    record = first_record(hub.local_place(train, "dataset"))
    prompt_key = _column(record, (prompt_key,) if prompt_key else _PROMPT_KEYS, train, "--prompt-key")
    answer_key = _column(record, (answer_key,) if answer_key else _ANSWER_KEYS, train, "--answer-key")
    _check_same_columns(first_record(hub.local_place(heldout, "dataset")), (prompt_key, answer_key), heldout, train)
    places = {"student": student, "teacher": teacher, "train": train, "heldout": heldout}
    texts = {key: text if hub.hub_id(text) else str(Path(text).absolute()) for key, text in places.items()} | {
        "name": file.stem,
        "dtype": "bf16" if visible_gpus() else "fp32",
        "prompt_key": prompt_key,
        "answer_key": answer_key,
        "on_bad_rows": on_bad_rows,
        "marker": "####" if "####" in str(record[answer_key]) else "",
        "instruction": "" if "\\boxed" in str(record[prompt_key]) else _BOXED,
    }

    def text(longest: int, max_prompt: int, num_heldout: int) -> str:
        return _TEXT.format(
            quoted={key: json.dumps(value, ensure_ascii=False) for key, value in texts.items()},
            function=FUNCTION,
            **{"name": file.stem, "student_name": Path(student).name, "teacher_name": Path(teacher).name},
            **{"commands": _commands(file), "horizon": horizon_tokens},
            **{"longest": longest, "max_prompt": max_prompt, "num_heldout": num_heldout},
        )

    try:
        file.write_text(text(longest=0, max_prompt=1 << 20, num_heldout=1), encoding="utf-8")
        longest, num_heldout = _measured(_load(file))
        room = (
            min(HfConfig.from_dir(place).max_position_embeddings for place in models.values()) - SERVER_RESERVED_TOKENS
        )
        max_prompt = max(64, math.ceil(longest / 64) * 64)
        if on_bad_rows == "drop":
            max_prompt = min(max_prompt, room - horizon_tokens)
        if max_prompt + horizon_tokens > room:
            raise ConfigError(
                f"--horizon-tokens = {horizon_tokens}: with prompts of up to {longest} tokens, the models' positions leave "
                f"{room - max_prompt} for a response. Lower it, or leave long prompts out: --on-bad-rows drop."
            )
        file.write_text(text(longest, max_prompt, min(100, num_heldout)), encoding="utf-8")
        notes = preflight.check(_load(file))
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    name = shlex.quote(f"{file}:{FUNCTION}")
    left_out = "".join(f"\n{note}" for note in notes)
    return (
        f"wrote {file}: sound. Prompts are in {prompt_key!r}, up to {longest} tokens; answers in "
        f"{answer_key!r}.{left_out}\nRead it, then type:\n"
        f"  megatron-distill train {name} --dry-run\n  megatron-distill train {name}"
    )


def _load(file: Path) -> RunConfig:
    return hub.resolved(load_recipe(f"{file}:{FUNCTION}"))


def _commands(file: Path) -> str:
    name = shlex.quote(f"{file}:{FUNCTION}")
    lines = {
        f"train {name} --dry-run": "check everything, start nothing",
        f"plan {name}": "memory of each GPU; what would make it fit",
        f"train {name}": "run it here, or resume it",
        f"watch {shlex.quote(f'runs/{file.stem}')}": "look at it meanwhile",
    }
    width = max(map(len, lines))
    return "\n".join(f"    megatron-distill {line:<{width}}    {what}" for line, what in lines.items())


def _column(record: Mapping[str, object], candidates: tuple[str, ...], path: str, option: str) -> str:
    for name in candidates:
        if name in record:
            return name
    raise ConfigError(
        f"{path} = {{{', '.join(record)}}}: none of these columns is {' or '.join(candidates)}. A recipe must name the column. "
        f"Type {option} COLUMN."
    )


def _check_same_columns(record: Mapping[str, object], keys: tuple[str, ...], heldout: str, train: str) -> None:
    if missing := [key for key in keys if key not in record]:
        raise ConfigError(
            f"{heldout} = {{{', '.join(record)}}}: has no column {' nor '.join(map(repr, missing))}, which {train} "
            "has. A recipe names the columns of both at once. Rename them in one of the files."
        )


def _measured(config: RunConfig) -> tuple[int, int]:
    """(tokens of the longest prompt of both files, held-out problems), as the recipe written so far would encode them."""
    vocabulary = load_vocabulary(config.student.path, config.teacher.path, config.rollouts.stop_tokens)
    sets = [
        load_prompt_set(path, config.data, vocabulary.tokenizer)
        for path in (config.data.train_path, config.data.heldout_path)
    ]
    return max(len(prompt) for one in sets for prompt in one.prompts), len(sets[1].prompts)
