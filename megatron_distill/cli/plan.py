"""``megatron-distill plan RECIPE [--gpu-gib 80] [--fit GPUS]``: what a run and a step will take, before anything starts."""

import argparse

from megatron_distill.cli.arguments import add_recipe, chosen_config, positive_float, positive_int
from megatron_distill.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Layout, memory part by part, bytes on the wire and on the disk, which setting makes it fit; what a step takes at each "
        "staleness, and who idles meanwhile. Starts nothing."
    )
    add_recipe(parser)
    parser.add_argument("--gpu-gib", type=positive_float, default=80.0, help="memory of one GPU (default: 80)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--fit", type=positive_int, metavar="GPUS", help="search the trainer's layouts on so many GPUs instead"
    )
    either.add_argument(
        "--measured",
        metavar="NAME=SECONDS,...",
        help="what a step takes, by measured figures instead of arithmetic: token_s (of a response alone on its server), "
        "score_s (of a mean response), train_s (a step), sync_s (weights gathered), push_s (from there to the servers)",
    )


def run(options: argparse.Namespace) -> None:
    """Print the plan."""
    from megatron_distill.launch import step_time
    from megatron_distill.launch.layouts import layout_problems
    from megatron_distill.launch.plan import architecture, plan, remedies, render, server_remedies

    config = chosen_config(options)
    measured = step_time.parse_measured(options.measured) if options.measured else {}
    student = architecture(config.student.path)
    teacher = architecture(config.teacher.path) if config.needs_teacher else None
    models = {"student": student} | ({"teacher": teacher} if teacher else {})
    if options.fit:
        from megatron_distill.launch import fit

        found = fit.search(config, student, teacher, options.fit, options.gpu_gib)
        print(fit.render(config, student, found, options.fit))
        return
    if problems := layout_problems(config, models):
        raise ConfigError("\n".join(problems))
    asked = (config, student, teacher, options.gpu_gib)
    print(render(config, student, plan(*asked), remedies(*asked), server_remedies(*asked)))
    paper = step_time.on_paper(config, student, teacher, options.gpu_gib, measured)
    print(f"\n{step_time.render(config, paper)}")
