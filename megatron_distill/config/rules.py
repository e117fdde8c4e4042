"""Which values of a config go together. Looks at values only: what needs the files is checked by ``preflight``.

In: a ``RunConfig``. Out: a line for every rule that it breaks, naming the value, the rule and the remedy.
"""

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_distill.config.curricula import EntropyGated, Ladder, Progressive
from megatron_distill.config.fields import broken_range
from megatron_distill.config.flags import MEGATRON, QUANTISED, SGLANG, refused, value_of
from megatron_distill.config.schedules import Schedule
from megatron_distill.config.schema import RunConfig, walk

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def problems_of(config: RunConfig) -> list[str]:
    """Every rule that ``config`` breaks, as ``where = value: rule. Remedy.`` lines; empty if it is sound.

    Looks at values only: what needs the files (vocabularies, shapes) is checked by ``preflight``.
    """
    problems: list[str] = []

    def rule(holds: bool, where: str, text: str) -> None:
        if not holds:
            value: Any = config
            for part in where.split("."):
                name, _, number = part.rstrip("]").partition("[")
                value = getattr(value, name)[int(number)] if number else getattr(value, name)
            shown = value.to_json() if isinstance(value, Schedule) else value
            problems.append(f"{where} = {shown!r}: {text}")

    for where, spec, value in walk(config):
        if spec.metadata.get("function"):
            for one in value if isinstance(value, tuple | dict) else () if value is None else (value,):
                problem = _why_no_function(one, spec.metadata["built_in"])
                rule(not problem, where, problem)
        if spec.name.endswith(("path", "_dir")):
            parts = [len(part.encode()) for part in value.split("/")]
            rule(max(parts) < 256 and sum(parts) < 4000, where, "no file system takes a path of such a length.")
        if broken := broken_range(spec.name, spec.metadata, value):
            rule(False, where, f"{broken}.")
    rule(
        bool(_NAME.fullmatch(config.name)) and len(config.name) <= 128,
        "name",
        "names folders and jobs: letters, digits, '_', '-' and '.' in parts joined by '/', none of which begins with '.' or "
        "'-', at most 128 characters in all. Choose another.",
    )
    if problems:
        return problems  # what follows compares and divides values that must be sound by themselves
    for name in ("student", "teacher") if config.needs_teacher else ("student",):
        rule(bool(getattr(config, name).path), f"{name}.path", "must name a Hugging Face directory.")
    _data_rules(config, rule)
    _parallel_rules(config, rule)
    _curriculum_rules(config, rule)
    if config.distill.weight:
        _divergence_rules(config, rule)
    _component_rules(config, rule)
    for section in ("rollouts", "evaluation"):
        rule(getattr(config, section).top_k != 0, f"{section}.top_k", "must be at least 1, or -1 for all tokens.")
    rollouts = config.rollouts
    rule(
        rollouts.max_staleness_steps == 0 or rollouts.sync_every_steps == 1,
        "rollouts.sync_every_steps",
        "must be 1 with rollouts.max_staleness_steps above 0, which counts weights a step. Set either to its default.",
    )
    rule(
        rollouts.max_staleness_steps < 2 or rollouts.source == "streamed",
        "rollouts.max_staleness_steps",
        "must be 0 or 1 with a rollouts.source of your own: from 2 on weights change under responses of several steps at once, "
        "which only streamed knows how to draw.",
    )
    replicas = config.servers.teacher_replicas
    rule(
        replicas >= 1 or (replicas == 0 and not config.teacher_writes and ":" in config.teacher.transport),
        "servers.teacher_replicas",
        "must be at least 1; or 0, where teacher.transport is a function that needs no server and the teacher writes nothing.",
    )
    rule(
        config.teacher.has_full_vocabulary or config.distill.temperature == 1,
        "distill.temperature",
        "a tail bucket cannot be re-tempered, so a server's top-k scores hold at temperature 1 only. "
        "Set it to 1, or set teacher.transport=sglang_hidden or in_process.",
    )
    _layer_rules(config, rule)
    _flag_rules(config, rule)
    _teacher_rules(config, rule)
    share = config.student.parallel.dp * config.micro_batch_rollouts
    largest = math.gcd(config.micro_batch_rollouts, config.rollouts_per_step // config.student.parallel.dp)
    rule(
        config.micro_batch_tokens > 0 or config.rollouts_per_step % share == 0,
        "micro_batch_rollouts",
        f"rollouts.prompts_per_step * rollouts.rollouts_per_prompt = {config.rollouts_per_step} must be a multiple of "
        f"student.parallel.dp * micro_batch_rollouts = {share}, so that every replica gets the same number of micro-batches. "
        f"Set micro_batch_rollouts={largest}.",
    )
    rule(
        config.rollouts.prompts_per_step % config.student.parallel.dp == 0,
        "rollouts.prompts_per_step",
        f"must be a multiple of student.parallel.dp = {config.student.parallel.dp}, so that a prompt's rollouts stay together.",
    )
    return problems


def _data_rules(config: RunConfig, rule: Callable[[bool, str, str], None]) -> None:
    """The rules of where problems are and how answers are found in their columns."""
    data = config.data
    kinds = "a file (.jsonl, .json, .csv, .parquet), or a data set's directory."
    rule(bool(data.train_path or data.sources), "data.train_path", f"must name {kinds}")
    rule(bool(data.heldout_path), "data.heldout_path", f"must name {kinds}")
    rule(
        not (data.train_path and data.sources),
        "data.train_path",
        'data.sources names where training problems are. Set data.train_path="", or data.sources=[].',
    )
    rule(len(data.sources) <= 100, "data.sources", "must be at most 100. Put several into one file.")
    shares = [source.share for source in data.sources]
    for number, source in enumerate(data.sources):
        rule(bool(source.path), f"data.sources[{number}].path", f"must name {kinds}")
        rule(
            (source.share is None) == (shares[0] is None),
            f"data.sources[{number}].share",
            "either every source has a share, or none has, and then they are drawn by their numbers of problems.",
        )
        rule(
            not source.answer_marker or (source.answer_from or data.answer_from) == "text",
            f"data.sources[{number}].answer_marker",
            "its answer_from already says where the answer is. Set that to text, or drop the marker.",
        )
    rule(
        not data.answer_marker or data.answer_from == "text",
        "data.answer_marker",
        "data.answer_from already says where the answer is. Set that to text, or drop the marker.",
    )


def _teacher_rules(config: RunConfig, rule: Callable[[bool, str, str], None]) -> None:
    """The rules of teachers that run elsewhere, or see another prompt."""
    teacher = config.teacher
    sound = all(
        isinstance(url, str) and url.startswith(("http://", "https://")) and "@" not in url
        for url in teacher.urls.values()
    )
    rule(
        bool(teacher.urls) == teacher.runs_elsewhere and sound,
        "teacher.urls",
        'names servers as {"name": "http://host:port"}, without a password, and goes with teacher.transport=sglang_urls. Set '
        "both, or neither.",
    )
    rule(
        bool(teacher.column) == (len(teacher.urls) > 1),
        "teacher.column",
        "says which of several teacher.urls scores a problem. Set it for several, and leave it empty for one.",
    )
    rule(
        not (teacher.runs_elsewhere and teacher.cache_dir),
        "teacher.cache_dir",
        "files scores by the teacher's weights, and nothing tells which ones a server at teacher.urls holds. Leave it empty.",
    )
    rule(
        teacher.prompt_builder == "same" or not (teacher.in_trainer or config.teacher_writes),
        "teacher.prompt_builder",
        "is for a teacher that scores on servers and writes nothing. Set teacher.transport=sglang_topk and "
        "rollouts.student_prefix_frac=1, or leave it at 'same'.",
    )


def _layer_rules(config: RunConfig, rule: Callable[[bool, str, str], None]) -> None:
    """The rules of whose layers the trainer runs."""
    student = config.student
    rule(
        student.layer_spec != "transformer_engine" or student.dtype == "bf16",
        "student.layer_spec",
        "its attention kernels take no fp32. Set student.dtype=bf16, or student.layer_spec=local.",
    )
    rule(
        not config.servers.shared_gpu_frac or config.servers.weight_sync == "disk",
        "servers.weight_sync",
        "NCCL refuses two processes on one GPU, where servers.shared_gpu_frac puts trainer and servers. Set it to disk.",
    )


def _flag_rules(config: RunConfig, rule: Callable[[bool, str, str], None]) -> None:
    """The rules of the flags that go to Megatron and SGLang as they are: none that the run decides itself, or would ignore."""
    student, servers = config.student, config.servers
    for where, arguments, reasons in (
        ("student.megatron_args", student.megatron_args, MEGATRON),
        ("servers.student_args", servers.student_args, SGLANG),
        ("servers.teacher_args", servers.teacher_args, SGLANG),
    ):
        for sentence in refused(arguments, reasons):
            rule(False, where, sentence)
    for name in QUANTISED:
        rule(
            value_of(student.megatron_args, name) is None
            or (student.dtype == "bf16" and student.layer_spec != "local"),
            "student.megatron_args",
            f"--{name} is computed by Transformer Engine's layers alone, whose parameters are bf16. Set student.dtype=bf16 and "
            "student.layer_spec=auto, or leave it out.",
        )


def _why_no_function(name: str, built_in: tuple[str, ...]) -> str:
    """Why a name stands for no function as far as the name alone tells; empty if it may."""
    path, colon, function = name.rpartition(":")
    known = "".join(f"{one!r}, " for one in built_in)
    if name in built_in:
        return ""
    if not colon or not function.isidentifier():
        return f"must be {known}or path/to/file.py:function."
    return "" if Path(path).is_file() else f"{path} is no file. Give {known}or path/to/file.py:function."


def _parallel_rules(config: RunConfig, rule: Callable[[bool, str, str], None]) -> None:
    """The rules of the trainer's layout that need no look at the model."""
    parallel = config.student.parallel
    rule(
        parallel.vpp == 1 or parallel.pp > 1,
        "student.parallel.vpp",
        "interleaves the stages of a pipeline, and student.parallel.pp is 1. Raise that to 2 or more, or set this to 1.",
    )
    per_pass = 1 if config.micro_batch_tokens else config.micro_batch_rollouts  # by tokens at most one rollout each
    num_micro_batches = config.rollouts_per_step // (parallel.dp * per_pass)
    rule(
        parallel.vpp == 1 or num_micro_batches % parallel.pp == 0,
        "student.parallel.vpp",
        f"an interleaved pipeline takes micro-batches pp = {parallel.pp} at a time, and a replica's step has "
        f"{num_micro_batches} of them. Change micro_batch_rollouts or rollouts.prompts_per_step, or set this to 1.",
    )
    rule(
        not parallel.sequence_parallel or parallel.tp > 1,
        "student.parallel.sequence_parallel",
        "shards activations over tp, which is 1. Set student.parallel.tp to 2 or more, or this to false.",
    )
    etp = parallel.tp if parallel.etp is None else parallel.etp
    ranks = parallel.tp * parallel.cp * parallel.dp
    rule(
        min(etp, parallel.ep) < 1 or ranks % (etp * parallel.ep) == 0,
        "student.parallel.ep",
        f"experts are shared among the tp * cp * dp = {ranks} ranks of a pipeline stage, which must be a multiple of "
        f"ep * etp = {parallel.ep * etp}. Change student.parallel.ep, or student.parallel.etp (null is tp's).",
    )


_ESTIMATORS = {
    ("reverse", "student"): ("k1", "k2"),
    ("forward", "student"): ("k3",),
    ("forward", "teacher"): ("k1", "k3"),
    ("reverse", "teacher"): (),
}
"""Estimators whose gradient is that of the KL, by its direction and by who wrote the tokens (see ``losses.sampled``)."""


def _divergence_rules(config: RunConfig, rule: Callable[[bool, str, str], None]) -> None:
    """The rules of what the distillation component minimises, and from what."""
    distill, rollouts = config.distill, config.rollouts
    sampled = distill.estimator != "distribution"
    weights = set(distill.reverse_kl_weight.values)
    rule(
        distill.divergence == "kl" or config.teacher.has_full_vocabulary,
        "distill.divergence",
        "needs the teacher's whole distribution. Set teacher.transport=sglang_hidden or in_process, or distill.divergence=kl.",
    )
    whole_kl = distill.divergence == "kl" and not sampled and distill.temperature == 1
    rule(
        distill.support == "teacher" or (config.teacher.has_full_vocabulary and whole_kl),
        "distill.support",
        "the student's support is a KL at temperature 1, and the teacher must know of any token. Set "
        "teacher.transport=sglang_hidden or in_process with distill.divergence=kl, estimator=distribution, temperature=1; or "
        "support=teacher.",
    )
    rule(
        distill.divergence == "kl" or not sampled,
        "distill.estimator",
        "estimates a KL only. Set distill.divergence=kl, or distill.estimator=distribution.",
    )
    rule(
        (distill.divergence != "skew_kl" and not sampled) or weights in ({0.0}, {1.0}),
        "distill.reverse_kl_weight",
        "must be 0 (forward) or 1 (reverse) throughout with distill.divergence=skew_kl or a sampled distill.estimator.",
    )
    rule(
        distill.divergence != "jsd" or all(0 < weight < 1 for weight in weights),
        "distill.reverse_kl_weight",
        "must lie strictly between 0 and 1 with distill.divergence=jsd: it is the teacher's share of the mixture, and at the "
        "ends nothing is left of the divergence. Set it to 0.5, or set distill.divergence=kl.",
    )
    if not sampled or weights not in ({0.0}, {1.0}):
        return
    direction = "reverse" if weights == {1.0} else "forward"
    shares = rollouts.student_prefix_frac.values
    authors = [who for who, writes in (("student", max(shares) > 0), ("teacher", min(shares) < 1)) if writes]
    for author in authors:
        allowed = _ESTIMATORS[direction, author]
        use = f"Use {' or '.join(allowed)}, or distribution." if allowed else "Set distill.estimator=distribution."
        rule(
            distill.estimator in allowed,
            "distill.estimator",
            f"at tokens that the {author} writes, its gradient is not that of the {direction} KL. {use}",
        )
    rule(
        "teacher" not in authors or rollouts.off_policy_source == "teacher",
        "rollouts.off_policy_source",
        "a sampled distill.estimator takes tokens for samples of the teacher, and the data's are not. Set "
        "distill.estimator=distribution, or this to teacher.",
    )
    rule(
        rollouts.temperature == 1 and rollouts.top_p == 1 and rollouts.top_k == -1,
        "distill.estimator",
        "takes tokens for samples of the whole distribution. Set rollouts.temperature=1, rollouts.top_p=1 and "
        "rollouts.top_k=-1, or distill.estimator=distribution.",
    )
    rule(
        "student" not in authors or (rollouts.sync_every_steps == 1 and rollouts.max_staleness_steps == 0),
        "distill.estimator",
        "takes the student's tokens for samples of the weights that are trained. Set rollouts.sync_every_steps=1 and "
        "rollouts.max_staleness_steps=0, or distill.estimator=distribution.",
    )


def _component_rules(config: RunConfig, rule: Callable[[bool, str, str], None]) -> None:
    """The rules of the loss's components, alone and together."""
    weights = {f"{name}.weight": getattr(config, name).weight for name in ("distill", "sft", "rl")}
    rule(
        any(weights.values()) or bool(config.components),
        "distill.weight",
        "distill, sft and rl all have weight 0, and nothing would be learnt.",
    )
    shares = config.rollouts.student_prefix_frac.values
    rule(
        not config.sft.weight or min(shares) < 1,
        "sft.weight",
        "cross entropy is computed on responses that the student did not write, and it writes all of them. Set "
        "rollouts.student_prefix_frac below 1, or sft.weight=0.",
    )
    rl = config.rl
    for name, weight in rl.extra_rewards.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool) and abs(weight) < 1e9
        rule(is_number, "rl.extra_rewards", f"the weight of {name} must be a number below 1e9, e.g. 0.2.")
    rule(
        not rl.weight or max(shares) > 0,
        "rl.weight",
        "the policy gradient holds for responses of the student only: on other tokens a log-ratio gradient is not the "
        "gradient of any objective here. Set rollouts.student_prefix_frac above 0, or rl.weight=0.",
    )
    rule(
        not rl.weight or config.rollouts.rollouts_per_prompt >= 2,
        "rollouts.rollouts_per_prompt",
        "an advantage is relative to the prompt's other responses. Set it to 2 or more (8 is usual), or rl.weight=0.",
    )
    rule(
        not rl.weight or config.rollouts.temperature == 1,
        "rollouts.temperature",
        "the policy gradient needs log-probs of the policy that sampled, and the loss takes them at temperature 1. "
        "Set it to 1, or rl.weight=0.",
    )
    rule(
        not rl.weight or (config.rollouts.top_p == 1 and config.rollouts.top_k == -1),
        "rl.weight",
        f"rollouts.top_p = {config.rollouts.top_p} and rollouts.top_k = {config.rollouts.top_k} cut off the tail of what is "
        "sampled, while the policy gradient takes log-probs of the whole distribution: a bias that no metric shows. Set "
        "rollouts.top_p=1 and rollouts.top_k=-1, or rl.weight=0.",
    )


def _curriculum_rules(config: RunConfig, rule: Callable[[bool, str, str], None]) -> None:
    """The rules of the curriculum, by its kind."""
    curriculum = config.curriculum
    if isinstance(curriculum, Progressive):
        rule(
            curriculum.start_tokens <= curriculum.end_tokens,
            "curriculum.start_tokens",
            f"must not exceed curriculum.end_tokens = {curriculum.end_tokens}: the horizon grows from one to the other.",
        )
    if isinstance(curriculum, Ladder | EntropyGated):
        rungs = curriculum.ladder_tokens
        rule(
            bool(rungs) and all(a < b for a, b in itertools.pairwise(rungs)),
            "curriculum.ladder_tokens",
            "must hold at least one horizon, in rising order, e.g. [128, 256, 512].",
        )
    if isinstance(curriculum, EntropyGated) and curriculum.ladder_tokens:
        longest = config.max_horizon_tokens
        rule(
            curriculum.max_truncated_frac == 1 or config.evaluation.max_response_tokens >= longest,
            "evaluation.max_response_tokens",
            f"must be at least the longest horizon of training, {longest} tokens. A shorter cap truncates healthy responses, "
            "and curriculum.max_truncated_frac would hold the curriculum back for it. Raise it, or set "
            "curriculum.max_truncated_frac=1.",
        )
