"""Every metric of a run, declared once: name, unit, meaning, and what good and bad look like.

In: per-token sums and counts from the loss, and facts about rollouts, from every rank. Out: one JSON line a step in
``metrics.jsonl``. The console, ``docs/metrics.md`` and the report read the same table, so a metric that is not declared
here cannot be logged (``check_declared``).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One number of a step.

    Attributes:
        name: its key in ``metrics.jsonl``, with the unit where it has one.
        group: the heading it is shown under.
        meaning: what is measured.
        good: the reading of a healthy run.
        bad: a reading that calls for action, and which.
        label: short form for the step line on the console; empty keeps it off.
        form: format spec of the console and the report.
    """

    name: str
    group: str
    meaning: str
    good: str
    bad: str
    label: str = ""
    form: str = ".3f"


METRICS: tuple[Metric, ...] = (
    # --- the loss
    Metric(
        "loss",
        "Loss",
        "The sum that is differentiated: every component times its weight, each divided by its own global token count.",
        "Falls, fast at first.",
        "Rises for tens of steps: lower optimizer.lr.",
        "loss",
    ),
    Metric(
        "forward_kl_nats",
        "Loss",
        "KL(teacher||student), mean over scored response tokens; with top-k scores, over k outcomes and the tail.",
        "Falls. Large values mean that the student misses tokens the teacher uses.",
        "Rises while reverse KL falls: the student narrows; lower distill.reverse_kl_weight.",
        "fwd KL",
    ),
    Metric(
        "reverse_kl_nats",
        "Loss",
        "KL(student||teacher), mean over scored response tokens.",
        "Falls. Large values mean that the student does what the teacher would not.",
        "Falls to 0 together with the entropy: collapse onto a few continuations.",
        "rev KL",
    ),
    Metric(
        "cross_entropy_nats",
        "Loss",
        "-log q(token), mean over response tokens that the student did not write.",
        "Falls to the entropy of whoever wrote them.",
        "Falls while held-out accuracy does too: overfitting.",
    ),
    Metric(
        "policy_loss",
        "Loss",
        "Clipped policy-gradient objective, mean over response tokens; its value says little, its gradient matters.",
        "Small, around 0.",
        "Large: old and new log-probs disagree; see sampler_gap_nats.",
        form=".4f",
    ),
    Metric(
        "clipped_frac",
        "Loss",
        "Share of policy-gradient tokens whose gradient the clip removed.",
        "Below 0.2; 0 with fresh rollouts.",
        "Above 0.3: rollouts are too stale; lower rollouts.sync_every_steps or optimizer.lr.",
    ),
    Metric(
        "reference_kl_nats",
        "Loss",
        "k3 estimate of KL(student||reference) on sampled tokens, where RL keeps a reference.",
        "Grows slowly.",
        "Jumps: raise rl.reference_kl_coef or lower optimizer.lr.",
        form=".4f",
    ),
    Metric(
        "kl_first_quarter_nats",
        "Loss",
        "The mixed KL over the first quarter of each response.",
        "Close to the last quarter's.",
        "Much larger than the last quarter's: early tokens dominate; sampled log-ratios concentrate there.",
    ),
    Metric(
        "kl_last_quarter_nats",
        "Loss",
        "The mixed KL over the last quarter of each response.",
        "Not far above the first quarter's.",
        "Grows with the horizon: the teacher's advice fades on prefixes it would not write; shorten the horizon.",
    ),
    # --- the distributions
    Metric(
        "student_entropy_nats",
        "Distributions",
        "The student's predictive entropy at temperature 1, full vocabulary, mean over response tokens.",
        "Near the teacher's on its own responses; for language models about 0.3.",
        "Falls towards 0.05: entropy collapse; lower distill.reverse_kl_weight or the horizon.",
        "entropy",
    ),
    Metric(
        "teacher_entropy_nats",
        "Distributions",
        "The teacher's entropy on the same prefixes (top-k scores: over k outcomes and the tail, a lower bound).",
        "Stable.",
        "Rises: the student drifts to prefixes that the teacher does not know.",
    ),
    Metric(
        "teacher_topk_mass",
        "Distributions",
        "Probability that the teacher gives to its top-k tokens.",
        "Above 0.99.",
        "Below 0.95: raise teacher.num_logprobs; the tail bucket hides too much.",
        form=".4f",
    ),
    Metric(
        "student_topk_mass",
        "Distributions",
        "Probability that the student gives to the teacher's top-k tokens.",
        "Rises towards teacher_topk_mass.",
        "Stays below it: the student spends mass where the teacher ranks nothing.",
        form=".4f",
    ),
    Metric(
        "topk_overlap_frac",
        "Distributions",
        "Share of the teacher's 8 likeliest tokens that are among the student's 8 likeliest.",
        "Rises.",
        "Falls: the two rank tokens differently although a divergence may look small.",
    ),
    Metric(
        "teacher_gap_nats",
        "Distributions",
        "Where a served teacher sends hidden states: |log-prob by its server - by its output layer in the trainer|, mean over "
        "response tokens.",
        "Below 1e-4 in fp32; in bf16 the rounding of two kernels.",
        "Large: the server does not serve the weights in teacher.path.",
        form=".1e",
    ),
    Metric(
        "student_stop_mass",
        "Distributions",
        "Probability that the student gives to stopping (all stop tokens together), mean over response tokens.",
        "Near 1 / mean response length.",
        "Falls towards 0: length inflation begins; see truncated_frac.",
        form=".4f",
    ),
    # --- rollouts
    Metric(
        "response_tokens",
        "Rollouts",
        "Mean response length, stop token included.",
        "Near the teacher's own length.",
        "Grows to the horizon: length inflation.",
        "len",
        ".1f",
    ),
    Metric(
        "truncated_frac",
        "Rollouts",
        "Share of responses cut at the horizon.",
        "Falls.",
        "Climbs to 1 within tens of steps: length collapse; stop, lower the horizon.",
        "truncated",
        ".2f",
    ),
    Metric(
        "repetition_frac",
        "Rollouts",
        "Share of responses whose last 256 bytes of token ids compress below a fifth of their size.",
        "0.",
        "Above 0.05: loops, which length inflation feeds on.",
        form=".2f",
    ),
    Metric(
        "horizon_tokens",
        "Rollouts",
        "The cap on response length in this step.",
        "Follows the curriculum.",
        "Frozen early: see curriculum.jsonl for the gate that held it.",
        "horizon",
        ".0f",
    ),
    Metric(
        "student_prefix_frac",
        "Rollouts",
        "Share of the step's responses that the student wrote.",
        "Follows the schedule.",
        "Below the schedule: rollouts failed.",
        form=".2f",
    ),
    Metric(
        "reverse_kl_weight",
        "Rollouts",
        "w in w * reverse KL + (1 - w) * forward KL in this step.",
        "Follows the schedule.",
        "Near 1 at long horizons: expect entropy collapse.",
        form=".2f",
    ),
    Metric(
        "missing_teacher_frac",
        "Rollouts",
        "Share of rollouts that the teacher did not score; they are masked, not zeroed.",
        "0.",
        "Above 0: see the teacher server's log. Above teacher.max_missing_frac the run fails.",
        form=".3f",
    ),
    Metric(
        "staleness_steps",
        "Rollouts",
        "Steps between the weights that sampled a response and the weights that learn from it.",
        "0.",
        "Above what the recipe allows: a weight sync failed.",
        form=".2g",
    ),
    Metric(
        "dropped_rollouts",
        "Rollouts",
        "Responses older than rollouts.max_staleness_steps since the step before: left out, and asked for again. Only where "
        "that is 2 or more.",
        "0.",
        "Above 0: a student server was started again, see the events.",
        form=".0f",
    ),
    Metric(
        "sampler_gap_nats",
        "Rollouts",
        "Mean |log-prob under SGLang - log-prob under Megatron| of student-sampled tokens, same weights.",
        "Below 1e-4 in fp32; in bf16 at most 0.05, which `make gpu-check` asks and nobody has measured.",
        "Jumps after a sync: the server holds other weights. Grows slowly: kernels differ; use truncated weights.",
        "gap",
        ".1e",
    ),
    Metric(
        "reward",
        "Rollouts",
        "Mean reward of the step's responses; of several, what each gave before its weight is `reward.NAME`.",
        "Rises.",
        "Flat with zero_signal_frac near 1: problems too easy or too hard.",
        "reward",
    ),
    Metric(
        "zero_signal_frac",
        "Rollouts",
        "Share of prompts whose rollouts all got the same reward; they carry no policy gradient.",
        "Below 0.7.",
        "Near 1: change the problems, or raise rollouts.rollouts_per_prompt.",
        form=".2f",
    ),
    # --- experts
    Metric(
        "expert_load_max",
        "Experts",
        "Tokens of a layer's busiest expert over an even share, mean over layers; padding counts.",
        "1 to 3.",
        "Grows: few experts do the work, and the ranks that hold them set the pace; add --moe-aux-loss-coeff to "
        "student.megatron_args.",
        form=".2f",
    ),
    Metric(
        "expert_idle_frac",
        "Experts",
        "Share of experts that no token of the step chose, mean over layers.",
        "Near 0 in steps of many tokens.",
        "Grows: experts die.",
        form=".3f",
    ),
    # --- optimisation and time
    Metric(
        "grad_norm",
        "Optimisation",
        "Global gradient norm before clipping, as Megatron measures it.",
        "Stable.",
        "Spikes: lower optimizer.lr or set optimizer.clip_grad.",
        "grad",
        ".2f",
    ),
    Metric("lr", "Optimisation", "Learning rate of the step.", "Follows the schedule.", "0: warm-up.", form=".1e"),
    Metric(
        "scored_tokens",
        "Optimisation",
        "Response tokens the distillation loss was computed on, over all replicas.",
        "Stable or growing with the horizon.",
        "Collapses: responses end at once.",
        form=".0f",
    ),
    Metric(
        "rollout_s",
        "Time",
        "Seconds spent sampling responses; where they are drawn ahead, seconds that the trainer waited for them.",
        "The largest phase.",
        "Grows: length inflation.",
        form=".2f",
    ),
    Metric(
        "score_s",
        "Time",
        "Seconds spent waiting for teacher scores, rewards included.",
        "Below rollout_s.",
        "Larger: add teacher replicas.",
        form=".2f",
    ),
    Metric(
        "train_s",
        "Time",
        "Seconds in Megatron's step: forward, backward, optimizer.",
        "Stable.",
        "Grows with length.",
        form=".2f",
    ),
    Metric(
        "sync_s",
        "Time",
        "Seconds that the ranks stood still for a push of weights: gathered, the push before it awaited.",
        "Small.",
        "Large: the push before it had not arrived (push_s).",
        form=".2f",
    ),
    Metric(
        "push_s",
        "Time",
        "Seconds from gathered to served by all servers, verified, of the weights that this step began with.",
        "Below train_s where steps are drawn ahead: then nobody waits for it.",
        "Large: see docs/sglang.md for transports.",
        form=".2f",
    ),
    Metric("step_s", "Time", "Seconds of the whole step.", "Stable.", "Grows: see the phases.", "s/step", ".1f"),
    Metric(
        "tokens_per_s",
        "Time",
        "Response tokens per second of the whole step.",
        "Stable.",
        "Falls: see the phases.",
        "tok/s",
        ".0f",
    ),
    Metric(
        "step",
        "Time",
        "Optimizer step, counted from 1.",
        "Rises by one each step.",
        "Does not change: training hangs.",
        form=".0f",
    ),
)

BY_NAME: dict[str, Metric] = {metric.name: metric for metric in METRICS}


def check_declared(record: Mapping[str, float]) -> None:
    """Refuse a record that holds an undeclared metric, so that the table stays complete.

    Raises:
        KeyError: naming the metric.
    """
    unknown = [name for name in record if name not in BY_NAME and "." not in name]  # COMPONENT.metric: a user's
    if unknown:
        raise KeyError(f"metrics {unknown}: not declared. Add them to METRICS in megatron_distill/runs/metrics.py.")


Sums = dict[str, tuple[float, float]]
"""Metric name to (sum, count): what adds up over tokens, micro-batches and ranks; the mean is sum / count."""


def add_sums(parts: Iterable[Mapping[str, tuple[float, float]]]) -> Sums:
    """Add (sum, count) pairs by name."""
    total: Sums = {}
    for part in parts:
        for name, (value, count) in part.items():
            old = total.get(name, (0.0, 0.0))
            total[name] = (old[0] + value, old[1] + count)
    return total


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Each sum over its count; a metric with nothing counted is left out, never 0."""
    return {name: value / count for name, (value, count) in sums.items() if count > 0}


def markdown() -> str:
    """``docs/metrics.md``, generated: every metric under its group's heading."""
    lines = [
        "# Metrics",
        "",
        "One JSON line a step in `metrics.jsonl`. This page is generated from `megatron_distill/runs/metrics.py`.",
        "A metric that could not be measured in a step is absent from its line, never 0.",
    ]
    for group in dict.fromkeys(metric.group for metric in METRICS):
        lines += ["", f"## {group}", "", "| metric | meaning | good | bad |", "|---|---|---|---|"]
        for metric in METRICS:
            if metric.group == group:
                cells = (f"`{metric.name}`", metric.meaning, metric.good, metric.bad)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
