"""Measure a model on its own: start servers, evaluate, stop them. What ``megatron-distill eval`` does.

In: a run folder, one of its checkpoints, a Hugging Face directory or a hub id; and problems. Out: one line on the console, and
a JSON file. What was written so far is kept in ``OUT.partial/`` until that file is whole: the same command goes on from there.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_distill import config as config_module
from megatron_distill.config import SERVER_RESERVED_TOKENS, SERVING_DTYPES, DataConfig, EvalConfig, RunConfig
from megatron_distill.config.json_files import json_of
from megatron_distill.convert.export import check_whole, checkpoint_of
from megatron_distill.convert.hf_files import HfDirectory
from megatron_distill.convert.offline import megatron_to_hf
from megatron_distill.errors import ConfigError
from megatron_distill.evaluate.accuracy import Evaluation, Model, evaluate
from megatron_distill.evaluate.sets import load_sets
from megatron_distill.models import hub
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.models.vocabulary import load_vocabulary
from megatron_distill.rewards import load_reward
from megatron_distill.rollouts.prompts import PromptSet, load_prompt_set
from megatron_distill.rollouts.records import parse_place
from megatron_distill.runs import marks
from megatron_distill.runs.console import evaluation_line
from megatron_distill.runs.run_folder import RunFolder, read_json
from megatron_distill.sglang.client import SGLangClient
from megatron_distill.sglang.server import ServerSpec, SGLangServer, running
from megatron_distill.teacher import CachedSampler, teacher_identity
from megatron_distill.types import Generation, SamplingParams, TopKSignal, WantedVersion

_KEPT_AT_ONCE = 256  # responses drawn between two writes to disk: what an interruption loses


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        config: of the run, or defaults, with overrides.
        directory: Hugging Face directory of the model; where a checkpoint's will be, if ``checkpoint`` is given.
        checkpoint: Megatron checkpoint to convert first.
        step: optimizer steps behind the weights.
        set_name: what the problems are called.
        problems: where they are.
        data: how they are read.
        settings: sampling, sizes and reward.
        out: file to write.
        dtype: as SGLang spells it.
    """

    config: RunConfig
    directory: Path
    checkpoint: Path | None
    step: int
    set_name: str
    problems: str
    data: DataConfig
    settings: EvalConfig
    out: Path
    dtype: str

    @property
    def partial(self) -> Path:
        """Where everything is kept until the evaluation is whole."""
        return self.out.with_suffix(".partial")


def evaluate_model(
    model: str,
    problems: str = "",
    out: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    step: int | None = None,
    set_name: str = "",
) -> str:
    """Evaluate a model and write ``out``.

    Args:
        model: a run folder, measured under the run's own settings; a Hugging Face directory; or a hub id that was fetched.
        problems: where they are; by default the run's held-out set.
        out: file to write; by default in the run's ``eval/``.
        overrides: of the sections ``evaluation``, ``data``, ``rollouts`` and ``servers``.
        step: of a run: its checkpoint of that step, 0 for the student as it began; by default ``hf/``.
        set_name: a name as in ``evaluation.sets``, instead of ``problems``.

    Returns:
        One line with the summary and the file's path.

    Raises:
        ConfigError: if something is neither given nor told by a run folder.
        CheckpointError: the run holds no checkpoint of ``step``, or it is damaged.
        ServerError: if a server does not start.
    """
    task = _task(model, problems, out, overrides, step, set_name)
    _check_out(task.out)
    _check_partial(task.partial)
    if task.checkpoint is not None:
        check_whole(task.checkpoint)
        task.partial.mkdir(parents=True, exist_ok=True)
        megatron_to_hf(task.checkpoint, task.directory, hf_dir=task.config.student.path, overwrite=True)
    weights = HfDirectory(task.directory)
    weights.check(HfConfig.from_dir(task.directory))
    weights.check_finite()
    vocabulary = load_vocabulary(task.directory, task.directory, task.config.rollouts.stop_tokens)
    loaded = load_prompt_set(task.problems, task.data, vocabulary.tokenizer)
    with (
        _served(task, loaded) as client,
        contextlib.closing(load_reward(task.settings.reward, task.config.rl.reward_timeout_s)) as reward,
        contextlib.closing(Resumable(client, task.partial, _identity(task))) as resumable,
    ):
        evaluation: Evaluation = evaluate(
            loaded,
            resumable,
            reward,
            task.settings,
            stop_token_ids=vocabulary.stop_token_ids,
            decode=vocabulary.decode,
            seed=task.config.seed,
            step=task.step,
        )
    evaluation.save(task.out)
    shutil.rmtree(task.partial)
    return f"{evaluation_line({'set': task.set_name, **asdict(evaluation.summary)})}\n{task.out}"


def _task(
    model: str, problems: str, out: Path | None, overrides: Sequence[str], step: int | None, set_name: str
) -> Task:
    model = hub.local_place(model, "model")
    folder, is_run = RunFolder(Path(model)), is_run_folder(Path(model))
    base = config_module.load(folder.config) if is_run else RunConfig()
    config = _with_evaluation_overrides(base, overrides)
    if step is not None and not is_run:
        raise ConfigError(f"--step = {step}: a model directory has no checkpoints. Name a run folder, or drop --step.")
    directory = folder.hf if is_run else Path(model)
    checkpoint = None
    if step == 0:
        directory = Path(config.student.path)
    elif step is not None:
        checkpoint = checkpoint_of(folder, step)
    if checkpoint is None and not directory.is_dir():
        kept_hint = ", or a checkpoint of this one with --step" if is_run else ""
        raise ConfigError(
            f"model = {directory}: no such directory. Name a finished run{kept_hint} or a Hugging Face directory."
            f"{hub.unresolved_remedy(model)}"
        )
    data, settings = config.data, config.evaluation
    if set_name:
        named = replace(config, evaluation=replace(config.evaluation, sets=(set_name,)))
        chosen = load_sets(named)[-1]
        problems, data, settings = chosen.path, chosen.data, chosen.settings
    if not problems and not is_run:
        raise ConfigError(
            "--problems = none: a bare model has no held-out set. Name a file of problems, or a set: --set math500."
        )
    problems = hub.local_place(problems or config.data.heldout_path, "dataset")
    label = set_name.rpartition(":")[2] or Path(parse_place(problems).path).stem
    name = f"{label}-step_{step}" if step is not None else label
    out = out or (folder.evals / f"{name}.json" if is_run else Path(f"{directory.name}-{name}.json"))
    return Task(
        config=config,
        directory=out.with_suffix(".partial") / "hf" if checkpoint is not None else directory,
        checkpoint=checkpoint,
        step=(config.num_steps if step is None else step) if is_run else 0,
        set_name=label,
        problems=problems,
        data=data,
        settings=settings,
        out=out,
        dtype=SERVING_DTYPES[config.student.dtype] if is_run else "auto",
    )


def _identity(task: Task) -> str:
    """Of the model under test, as it is served."""
    return teacher_identity(task.directory, task.dtype, task.config.servers.student_args)


@contextlib.contextmanager
def _served(task: Task, loaded: PromptSet) -> Iterator[SGLangClient]:
    """A client of ``servers.student_replicas`` servers that hold the model, each on ``servers.student_tp`` GPUs of its own."""
    servers = task.config.servers
    prompts = loaded.prompts[: task.settings.num_problems]
    length = max(map(len, prompts)) + task.settings.max_response_tokens + SERVER_RESERVED_TOKENS
    model = HfConfig.from_dir(task.directory)
    if length > model.max_position_embeddings:
        raise ConfigError(
            f"evaluation.max_response_tokens = {task.settings.max_response_tokens}: with the longest prompt and "
            f"{SERVER_RESERVED_TOKENS} tokens to spare {length}, but the model holds {model.max_position_embeddings}. Lower it."
        )
    task.partial.mkdir(parents=True, exist_ok=True)

    def server(index: int) -> SGLangServer:
        spec = ServerSpec(
            model_dir=task.directory,
            role=f"eval-{index}",
            dtype=task.dtype,
            context_length=length,
            tp=servers.student_tp,
            extra_args=servers.student_args,
        )
        made = SGLangServer(spec, task.partial / f"server-{index}.log", key)
        if index and made.spec.device == "cuda":
            own_gpus = f"--base-gpu-id={index * servers.student_tp}"
            made = SGLangServer(replace(spec, extra_args=(own_gpus, *servers.student_args)), made.log_file, key)
        return made

    key = os.urandom(16).hex()
    started = [server(index) for index in range(servers.student_replicas)]
    with (
        running(started, servers.startup_timeout_s, print),
        SGLangClient(
            [one.url for one in started],
            model.vocab_size,
            length,
            key=key,
            num_connections=servers.requests_per_replica,
            timeout_s=servers.request_timeout_s,
            min_tokens_per_s=servers.min_tokens_per_s,
        ) as client,
    ):
        yield client


class Resumable:
    """The model under test, whose responses are kept on disk: an interrupted evaluation draws only those that are missing."""

    def __init__(
        self,
        model: Model,
        folder: Path,
        identity: str,
        told: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        """Open what was kept.

        Args:
            model: answers and scores.
            folder: where responses are kept.
            identity: of the weights and how they are served.
            told: gets lines of progress.
        """
        self.vocab_size = model.vocab_size
        self._model, self._told = model, told
        self._kept = CachedSampler(model, folder, identity=identity)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        /,
        *,
        sampling: SamplingParams,
        seeds: Sequence[int],
        weight_version: WantedVersion = None,
    ) -> list[Generation]:
        """One response to each prompt, from disk where it was drawn before."""
        drawn: list[Generation] = []
        for start in range(0, len(prompts), _KEPT_AT_ONCE):
            part = slice(start, start + _KEPT_AT_ONCE)
            drawn += self._kept.generate(
                prompts[part], sampling=sampling, seeds=seeds[part], weight_version=weight_version
            )
            self._told(f"  {len(drawn):,} of {len(prompts):,} responses, {self._kept.hits:,} of them from before")
        return drawn

    def score(
        self,
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        /,
        *,
        top_k: int,
        weight_version: str | None = None,
    ) -> list[TopKSignal | None]:
        """The model's own scores."""
        return self._model.score(sequences, top_k=top_k, weight_version=weight_version)

    def close(self) -> None:
        """Close the files."""
        self._kept.close()


def is_run_folder(path: Path) -> bool:
    """Whether ``path`` is a run's folder and not a model's: both hold a ``config.json``, but a model's names its architecture.

    Raises:
        ConfigError: its config.json cannot be read.
    """
    if marks.kind_of(path) == "run":
        return True
    config = path / "config.json"
    try:
        fields = json_of(config) if config.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config}: cannot be read ({error}). Copy it again, or name another model.") from error
    return isinstance(fields, dict) and "num_steps" in fields and "model_type" not in fields


def _check_out(out: Path) -> None:
    """Refuse to write over a file that is no evaluation of ours, before minutes are spent on what would be in it."""
    marks.check_parent_writable(out, "--out")
    if not out.exists():
        return
    try:
        written = read_json(out) if out.is_file() else None
    except (OSError, ValueError):
        written = None
    if not (isinstance(written, dict) and written.keys() == {"summary", "responses"}):
        raise ConfigError(f"--out = {out}: exists and is no evaluation. Name another file; it is not overwritten.")


def _check_partial(folder: Path) -> None:
    """Refuse to keep anything in a folder that holds what is not of an evaluation: it is removed at the end."""
    ours = ("hf", "responses", "server-")
    foreign = [path.name for path in folder.glob("*") if not path.name.startswith(ours)] if folder.exists() else []
    if foreign or (folder.exists() and not folder.is_dir()):
        raise ConfigError(
            f"{folder}: holds {', '.join(foreign[:3]) or 'no folder'}, which is no part of an evaluation. Name another --out."
        )


def _with_evaluation_overrides(base: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """``base`` with overrides of what an evaluation reads; a run's other rules do not matter to it."""
    for override in overrides:
        if override.split(".")[0] not in ("evaluation", "data", "rollouts", "servers"):
            raise ConfigError(
                f"override = {override!r}: an evaluation takes evaluation, data, rollouts and servers fields only."
            )
    changed = config_module.with_overrides(base, overrides, check_rules=False)
    read = ("evaluation.", "data.prompt", "data.answer", "data.filter", "data.max", "rollouts.stop", "servers.student")
    problems = [problem for problem in config_module.problems_of(changed) if problem.startswith(read)]
    if problems:
        raise ConfigError("\n".join(problems))
    return changed
