"""What a finished run comes to, as text that a person can paste into a chat.

In: a run folder. Out: lines of at most 80 columns.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_distill.runs.metrics import BY_NAME
from megatron_distill.runs.run_folder import HELDOUT, RunFolder, read_json

_TRAINED = ("loss", "reward", "forward_kl_nats", "reverse_kl_nats", "student_entropy_nats", "response_tokens")
_PHASES = ("rollout_s", "score_s", "train_s", "sync_s")


def closing_summary(folder: RunFolder) -> str:
    """What was trained, held-out results before and after, training before and after, and where the time went."""
    config, steps = read_json(folder.config), folder.steps()
    rollouts = config["rollouts"]["prompts_per_step"] * config["rollouts"]["rollouts_per_prompt"]
    lines = [
        f"{config['name']}: {len(steps)} steps of {rollouts} responses, {duration(sum(s['step_s'] for s in steps))} in steps",
        f"  student {_short(config['student']['path'])}, seed {config['seed']}",
        f"  teacher {_short(config['teacher']['path'])}, {config['teacher']['transport']}",
    ]
    for name in folder.evaluated_sets():
        lines += ["", closing_table(folder.evaluations(name), "held out" if name == HELDOUT else name)]
    if steps:
        lines += ["", _trained(steps), "", f"  {_times(steps)}"]
    return "\n".join(lines)


def closing_table(evaluations: Sequence[Mapping[str, Any]], title: str = "held out") -> str:
    """The first and the last evaluation on a set side by side."""
    first, last = evaluations[0], evaluations[-1]
    k = last["k"]
    rows = [
        (title[:24], f"step {first['step']}", f"step {last['step']}"),
        (f"Avg@{k}", *(_with_interval(e, "avg_at_k") for e in (first, last))),
        (f"Pass@{k}", *(_with_interval(e, "pass_at_k") for e in (first, last))),
        *([(f"maj@{k}", *(_with_interval(e, "maj_at_k") for e in (first, last)))] if "maj_at_k" in first else []),
        ("length, tokens", *(f"{e['response_tokens']:.1f}" for e in (first, last))),
        ("truncated", *(f"{e['truncated_frac']:.3f}" for e in (first, last))),
        ("entropy, nats", *(f"{e['entropy_nats']:.3f}" for e in (first, last))),
    ]
    return _table(rows)


def _trained(steps: Sequence[Mapping[str, float]]) -> str:
    first, last = steps[0], steps[-1]
    rows = [("training", f"step {first['step']:.0f}", f"step {last['step']:.0f}")]
    for name in _TRAINED:
        if name in first and name in last:
            form = BY_NAME[name].form
            rows.append((BY_NAME[name].label, f"{first[name]:{form}}", f"{last[name]:{form}}"))
    return _table(rows)


def _times(steps: Sequence[Mapping[str, float]]) -> str:
    median = statistics.median(step["step_s"] for step in steps)
    whole = sum(step["step_s"] for step in steps) or 1.0
    shares = [f"{name.removesuffix('_s')} {sum(step.get(name, 0.0) for step in steps) / whole:.0%}" for name in _PHASES]
    tokens = statistics.median(step["tokens_per_s"] for step in steps)
    return f"{median:.1f} s a step ({', '.join(shares)}), {tokens:.0f} tokens/s"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"  {name:<24}{before:>24}{after:>24}" for name, before, after in rows)


def _with_interval(summary: Mapping[str, Any], name: str) -> str:
    return f"{summary[name]:.3f} [{summary[name + '_low']:.3f}, {summary[name + '_high']:.3f}]"


def _short(path: str) -> str:
    """The last two parts of a model's path: what it is called, without where this machine keeps it."""
    return "/".join(path.rstrip("/").split("/")[-2:]) or "none"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
