"""What must hold before anything expensive starts, and needs the files to tell: models, vocabularies, prompts, lengths.

In: a sound ``RunConfig``. Out: nothing, or one error with every problem found, each as ``where = value: rule. Remedy.``
"""

import functools
import hashlib
from pathlib import Path

from megatron_distill.config import SERVER_RESERVED_TOKENS, RunConfig
from megatron_distill.convert.hf_files import HfDirectory, check_free_space
from megatron_distill.errors import ConfigError, DistillError
from megatron_distill.evaluate.sets import load_sets
from megatron_distill.launch.disk import bytes_to_come
from megatron_distill.launch.layouts import layout_problems
from megatron_distill.models import hub
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.models.vocabulary import load_vocabulary, require_named_ends
from megatron_distill.rollouts.prompts import load_prompt_set, load_training_set
from megatron_distill.rollouts.solutions import check_solutions
from megatron_distill.runs import marks, trackers
from megatron_distill.runs.run_folder import HELDOUT, RunFolder
from megatron_distill.sglang import hidden_states
from megatron_distill.teacher import problems_of_urls, teacher_prompts
from megatron_distill.training.leader import check_functions


def check(config: RunConfig, folder: RunFolder | None = None) -> list[str]:
    """Check models against each other, the layout against the models, the data against the lengths, the disk against both.

    Args:
        config: of the run.
        folder: where it will be written, if that is decided.

    Returns:
        What was left out of the data, for people.

    Raises:
        ConfigError: listing all problems at once.
    """
    problems: list[str] = []
    notes: list[str] = []
    models = {}
    paths = {"student": config.student.path} | ({"teacher": config.teacher.path} if config.needs_teacher else {})
    for role, path in paths.items():
        try:
            check_is_directory(role, path)
            models[role] = HfConfig.from_dir(path)
            if role == "teacher" and config.teacher.runs_elsewhere and not config.needs_teacher_server:
                continue  # its weights are where it runs
            weights = HfDirectory(path)
            weights.check(models[role])
            weights.check_finite()
        except DistillError as error:
            problems.append(str(error))
    problems += trackers.problems(config)
    problems += _flag_problems(config)
    if config.teacher.sends_hidden_states and not hidden_states.is_installed():
        problems.append(
            "teacher.transport = sglang_hidden: SGLang does not find the hook that sends hidden states among its entry points. "
            "The package was installed before it had one. Install it again: pip install -e . (or make setup)."
        )
    if not problems:
        problems += layout_problems(config, models)
        problems += _model_problems(config, models)
        problems += _data_problems(config, notes)
        problems += _place_problems(config, models, folder)
    if problems:
        raise ConfigError("\n".join(problems))
    return notes


def check_is_directory(role: str, path: str) -> None:
    """Refuse a model that is not here.

    Raises:
        ConfigError: saying how to bring it.
    """
    if not Path(path).is_dir():
        raise ConfigError(
            f"{role}.path = {path}: no such directory. Download or convert the model first.{hub.unresolved_remedy(path)}"
        )


def _model_problems(config: RunConfig, models: dict[str, HfConfig]) -> list[str]:
    problems = []
    longest = config.server_context_tokens
    for role, model in models.items():
        if longest > model.max_position_embeddings:
            problems.append(
                f"data.max_prompt_tokens + longest response + {SERVER_RESERVED_TOKENS} = {longest}: the {role} holds "
                f"{model.max_position_embeddings} positions. Lower curriculum.horizon_tokens, "
                "evaluation.max_response_tokens or data.max_prompt_tokens."
            )
    sees_the_same = config.teacher.prompt_builder == "same" and not config.teacher.runs_elsewhere
    if "teacher" in models and sees_the_same and _same_weights(Path(config.student.path), Path(config.teacher.path)):
        problems.append(
            f"teacher.path = {config.teacher.path}: holds the student's own weights, and every KL would be 0. "
            "Name another teacher."
        )
    return problems


def _flag_problems(config: RunConfig) -> list[str]:
    """Flags that Megatron or SGLang do not take. Only they can tell, so they are imported, if there is anything to ask."""
    problems = []
    if config.student.megatron_args:
        from megatron_distill.megatron.arguments import flag_problems as of_megatron

        problems += [f"student.megatron_args = {one}" for one in of_megatron(config.student.megatron_args)]
    for where in ("student_args", "teacher_args"):
        if arguments := getattr(config.servers, where):
            from megatron_distill.sglang.server import flag_problems as of_sglang

            problems += [f"servers.{where} = {one}" for one in of_sglang(arguments)]
    return problems


def _data_problems(config: RunConfig, notes: list[str]) -> list[str]:
    problems = []
    try:
        vocabulary = load_vocabulary(
            config.student.path, config.teacher.path or config.student.path, config.rollouts.stop_tokens
        )
        require_named_ends(vocabulary, config.student.path)
    except DistillError as error:
        return [str(error)]
    if config.needs_teacher_server and config.teacher.num_logprobs > vocabulary.size:
        problems.append(
            f"teacher.num_logprobs = {config.teacher.num_logprobs}: the vocabulary holds {vocabulary.size} tokens."
        )
    data = config.data
    try:
        check_functions(config)
        loads = [
            (
                "data.heldout_path" if one.name == HELDOUT else f"evaluation set {one.name}",
                functools.partial(load_prompt_set, one.path, one.data, vocabulary.tokenizer),
            )
            for one in load_sets(config)
        ]
    except DistillError as error:
        return [*problems, str(error)]
    train = functools.partial(load_training_set, data, vocabulary.tokenizer)
    for where, load in [("data.sources" if data.sources else "data.train_path", train), *loads]:
        try:
            loaded = load()
            notes += loaded.notes
            lengths = [(len(ids), problem.id) for ids, problem in zip(loaded.prompts, loaded.problems, strict=True)]
            if load is train and config.distill.weight > 0:
                teacher_prompts(config, loaded.problems, vocabulary.tokenizer)
                problems += problems_of_urls(config, loaded.problems) if config.teacher.runs_elsewhere else []
            if load is train and config.writes_solutions:
                check_solutions(loaded.problems, data)
        except DistillError as error:
            problems.append(f"{where}: {error}")
            continue
        longest, problem_id = max(lengths)
        if longest > data.max_prompt_tokens:
            problems.append(
                f"data.max_prompt_tokens = {data.max_prompt_tokens}: problem {problem_id!r} of {where} has {longest} "
                f"tokens. Raise it to {longest}, or set data.on_bad_rows=drop to leave longer ones out."
            )
    return problems


def _place_problems(config: RunConfig, models: dict[str, HfConfig], folder: RunFolder | None) -> list[str]:
    """What cannot be written where it should be: the teacher's cache, and the run's own files."""
    problems = []
    if config.teacher.cache_dir:
        cache = Path(config.teacher.cache_dir)
        try:
            if cache.exists() and not cache.is_dir():
                raise ConfigError(f"teacher.cache_dir = {cache}: is a file. Name a folder.")
            marks.check_parent_writable(cache / "scores", "teacher.cache_dir")
        except DistillError as error:
            problems.append(str(error))
    if folder is not None:
        try:
            check_free_space(folder.root, int(bytes_to_come(config, models["student"], folder)))
        except DistillError as error:
            fewer = "" if config.checkpoints.keep_last else " Or keep fewer checkpoints: checkpoints.keep_last=2."
            problems.append(f"{error}{fewer}")
    return problems


def _same_weights(one: Path, other: Path) -> bool:
    """Whether two directories hold byte-equal safetensors files."""
    files = [sorted(path.glob("*.safetensors")) for path in (one, other)]
    if [file.name for file in files[0]] != [file.name for file in files[1]]:
        return False
    if [file.stat().st_size for file in files[0]] != [file.stat().st_size for file in files[1]]:
        return False
    return all(_digest(a) == _digest(b) for a, b in zip(*files, strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
