"""What models and ranks must share evenly: heads, channels, experts; and a layer for each stage. Needs shapes only: ``plan``
asks it too.
"""

from megatron_distill.config import ParallelConfig, RunConfig
from megatron_distill.launch.launch import server_groups
from megatron_distill.models.hf_config import HfConfig


def layout_problems(config: RunConfig, models: dict[str, HfConfig]) -> list[str]:
    """What the models' shapes do not share evenly among ranks: the trainer's, and each server's. Needs no weights."""
    problems = []
    student = models["student"]
    tp, pp = config.student.parallel.tp, config.student.parallel.pp
    for what, number in (
        ("attention heads", student.num_attention_heads),
        ("key-value heads", student.num_query_groups),
        ("feed-forward channels", student.ffn_hidden_size),
    ):
        if number % tp:
            problems.append(
                f"student.parallel.tp = {tp}: the student has {number} {what}, which {tp} ranks cannot share evenly. "
                f"Set student.parallel.tp to a divisor of {number}."
            )
    stages = pp * config.student.parallel.vpp
    if student.num_layers < stages:
        problems.append(
            f"student.parallel.pp = {pp}: the student has {student.num_layers} layers, fewer than the pp * vpp = {stages} "
            "stages. Lower student.parallel.pp or student.parallel.vpp."
        )
    problems += _expert_problems(
        config.student.parallel, models, teacher_in_trainer=config.teacher.in_trainer and "teacher" in models
    )
    for role, (_, tp) in server_groups(config).items():
        if role == "evaluation":  # as the student's
            continue
        heads, groups = models[role].num_attention_heads, models[role].num_query_groups
        if heads % tp or (groups % tp and tp % groups):
            problems.append(
                f"servers.{role}_tp = {tp}: the {role} has {heads} attention and {groups} key-value heads, which a server of "
                f"{tp} ranks cannot share evenly. Set it to a divisor of {groups}."
            )
    if config.teacher.in_trainer and "teacher" in models:
        problems += _in_process_problems(config, models["teacher"])
    elif config.teacher.in_process_tp is not None:
        problems.append(
            f"teacher.in_process_tp = {config.teacher.in_process_tp}: there is no teacher in the trainer. Set it to null, or "
            "teacher.transport=in_process."
        )
    return problems


def _in_process_problems(config: RunConfig, teacher: HfConfig) -> list[str]:
    """How a teacher lies on the trainer's ranks."""
    problems = []
    parallel, tp = config.student.parallel, config.in_process_tp
    where = "student.parallel.tp" if config.teacher.in_process_tp is None else "teacher.in_process_tp"
    if tp % parallel.tp or parallel.dp % (tp // parallel.tp):
        problems.append(
            f"teacher.in_process_tp = {tp}: must be student.parallel.tp = {parallel.tp} times a divisor of student.parallel.dp "
            f"= {parallel.dp}: it takes the tp ranks of so many replicas. Set it to {parallel.tp * parallel.dp}, or to null."
        )
    if teacher.num_attention_heads % tp or teacher.num_query_groups % tp or teacher.ffn_hidden_size % tp:
        problems.append(
            f"{where} = {tp}: so many ranks share each layer of the in-process teacher, and its heads or channels do not "
            "divide by it. Choose another size, or teacher.transport=sglang_hidden."
        )
    if teacher.num_experts and tp != parallel.tp:
        problems.append(
            f"teacher.in_process_tp = {tp}: is for a teacher without experts, which lie as student.parallel.ep says. Set it to "
            "null."
        )
    if teacher.num_layers < parallel.pp:
        problems.append(
            f"student.parallel.pp = {parallel.pp}: the in-process teacher lies on as many stages, and has only "
            f"{teacher.num_layers} layers. Lower it, or set teacher.transport=sglang_topk."
        )
    return problems


def _expert_problems(parallel: ParallelConfig, models: dict[str, HfConfig], teacher_in_trainer: bool) -> list[str]:
    """How experts lie on ranks: the student's, and those of a teacher beside it."""
    problems = []
    student = models["student"]
    etp = parallel.tp if parallel.etp is None else parallel.etp
    if not student.num_experts:
        for name, value in (("ep", parallel.ep), ("etp", parallel.etp or 1)):
            if value > 1:
                problems.append(
                    f"student.parallel.{name} = {value}: the student has no experts. Set it to {1 if name == 'ep' else 'null'}."
                )
        return problems
    sharded = {"student": student} | ({"teacher": models["teacher"]} if teacher_in_trainer else {})
    for role, model in sharded.items():
        if not model.num_experts:
            continue
        if model.num_experts % parallel.ep:
            problems.append(
                f"student.parallel.ep = {parallel.ep}: the {role} has {model.num_experts} experts a layer, which "
                f"{parallel.ep} ranks cannot share evenly. Set it to a divisor of {model.num_experts}."
            )
        if model.expert_ffn_hidden_size % etp:
            problems.append(
                f"student.parallel.etp = {parallel.etp}: an expert of the {role} has {model.expert_ffn_hidden_size} channels, "
                f"which {etp} ranks cannot share evenly. Set it to a divisor of {model.expert_ffn_hidden_size}."
            )
    if parallel.tp > 1 and not parallel.sequence_parallel:
        problems.append(
            "student.parallel.sequence_parallel = False: Megatron trains experts under tensor parallelism only with "
            "sequence parallelism. Set it to true, or student.parallel.tp=1."
        )
    return problems
