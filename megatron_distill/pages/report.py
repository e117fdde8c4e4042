"""A run's page: ``report.html``, with everything that its folder tells, and what the numbers mean.

In: a run folder, finished or under way. Out: one self-contained file, plots inside, to be mailed or kept with a paper.

    megatron-distill report runs/NAME
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_distill.config import flatten
from megatron_distill.pages.page import Html, document, element, figure, fold, good_and_bad, table
from megatron_distill.pages.plots import Panel, Series, curves, sparkline, stacked
from megatron_distill.pages.run_record import (
    ABSENT,
    RunRecord,
    default_config,
    field_meanings,
    read_run,
    shown,
)
from megatron_distill.pages.timeline import timeline_section
from megatron_distill.runs import marks
from megatron_distill.runs.metrics import METRICS
from megatron_distill.runs.run_folder import RunFolder, read_json
from megatron_distill.runs.summary import duration
from megatron_distill.runs.timeline import read_spans

PHASES = ("rollout_s", "score_s", "train_s", "sync_s")


def write_report(folder: RunFolder, at_end: bool = False) -> Path:
    """Write ``report.html`` from the run folder and from nothing else.

    Args:
        folder: of the run.
        at_end: the run has ended, and says so itself once its page is written.

    Returns:
        Its path.

    Raises:
        DataError: if the folder is missing, is not a run folder, or nothing was measured yet.
    """
    run = read_run(folder)
    run = replace(run, is_finished=run.is_finished or at_end)
    marks.check_page(folder.report, "report")
    environment = folder.root / "env.json"
    sections = [
        ("Held-out accuracy", _evaluations(run)),
        *(
            (f"Accuracy on {name}", _evaluations(replace(run, evaluations=found)))
            for name, found in run.further.items()
        ),
        ("Training", _training_plots(run)),
        ("Timeline", timeline_section(read_spans(folder.timeline))),
        ("Curriculum", _decisions(run)),
        ("Metrics", _metrics_table(run)),
        ("Configuration", _config_table(run)),
        ("Samples", _samples(run)),
        ("Environment", _environment(read_json(environment)) if environment.exists() else Html("")),
    ]
    folder.report.write_text(document(f"Run {run.name}", _intro(run), sections), encoding="utf-8")
    return folder.report


def _intro(run: RunRecord) -> Html:
    last_step = int(run.steps[-1]["step"]) if run.steps else 0
    planned = run.config.get("num_steps", last_step)
    state = "finished" if run.is_finished else "failed" if run.failure else "under way"
    seconds, tokens = np.nansum(run.column("step_s")), np.nansum(run.column("scored_tokens"))
    facts = [f"{state} at step {last_step} of {planned}"]
    if run.steps:
        facts += [f"{duration(float(seconds))} in steps", f"{tokens:,.0f} tokens in the distillation loss"]
    paths = " learns from ".join(str(run.config.get(f"{role}.path", ABSENT)) for role in ("student", "teacher"))
    failure = element("p", run.failure, "failure") if run.failure and not run.is_finished else ""
    return Html(f"{element('p', ' · '.join(facts), 'soft')}\n{element('p', paths, 'soft')}\n{failure}")


# --- evaluations ------------------------------------------------------------------------------------------------------


def _evaluations(run: RunRecord) -> Html:
    if not run.evaluations:
        return Html("")
    first, last = run.evaluations[0], run.evaluations[-1]
    shows = [first] if first is last else [first, last]
    header = ["", *(f"step {summary['step']}" for summary in shows), *(["change"] if len(shows) == 2 else [])]
    rows = [_summary_row(label, shows, key, form) for label, key, form in evaluation_rows(last["k"], shows)]
    rows.append(["ended by", *(_stop_reasons(summary["stop_reasons"]) for summary in shows)])
    sizes = f"{last['num_problems']} problems, {last['k']} sample{'s' * (last['k'] != 1)} each; "
    note = element("p", sizes + "in brackets 95% intervals, by bootstrap over problems", "soft")
    return Html(f"{table(header, rows)}\n{note}\n{_accuracy_plot(run) if len(run.evaluations) > 1 else ''}")


def evaluation_rows(k: int | str, summaries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(label, key, format) of the numbers that evaluation tables show, as far as all of ``summaries`` have them."""
    rows = [
        (f"Avg@{k}", "avg_at_k", ".3f"),
        (f"Pass@{k}", "pass_at_k", ".3f"),
        (f"maj@{k}", "maj_at_k", ".3f"),
        ("response length, tokens", "response_tokens", ".1f"),
        ("truncated, share", "truncated_frac", ".3f"),
        ("repetitive, share", "repetition_frac", ".3f"),
        ("entropy, nats", "entropy_nats", ".3f"),
    ]
    return [row for row in rows if all(row[1] in summary for summary in summaries)]


def with_interval(summary: Mapping[str, Any], key: str, form: str) -> Html:
    """A number of a summary, and its interval if it has one."""
    low, high = summary.get(f"{key}_low"), summary.get(f"{key}_high")
    interval = "" if low is None or high is None else f' <span class="soft">[{low:{form}}, {high:{form}}]</span>'
    return element("span", Html(f"{summary[key]:{form}}{interval}"), "num")


def _summary_row(label: str, summaries: Sequence[Mapping[str, Any]], key: str, form: str) -> list[Any]:
    cells: list[Any] = [label, *(with_interval(summary, key, form) for summary in summaries)]
    if len(summaries) == 2:
        cells.append(element("span", f"{summaries[1][key] - summaries[0][key]:+{form}}", "num"))
    return cells


def _stop_reasons(reasons: Mapping[str, int]) -> str:
    named = {"length": "the cap"}
    return ", ".join(f"{named.get(reason, f'token {reason}')}: {count}" for reason, count in reasons.items())


def _accuracy_plot(run: RunRecord) -> Html:
    k = run.evaluations[-1]["k"]
    series = [run.evaluated("avg_at_k", f"Avg@{k}"), run.evaluated("pass_at_k", f"Pass@{k}")]
    svg = curves("accuracy", [Panel("share of problems", series, share=True)])
    return element("div", figure("Accuracy, with 95% intervals", svg), "figures")


# --- training ---------------------------------------------------------------------------------------------------------


def _training_plots(run: RunRecord) -> Html:
    if not run.steps:
        return Html("")
    names = ("loss", "forward_kl_nats", "reverse_kl_nats", "cross_entropy_nats")
    plots = [
        figure("Loss and divergences", curves("loss", [Panel("nats", _curves(run, names))]), names),
        _entropy_plot(run),
        _length_plot(run),
        _stability_plot(run),
        _time_plot(run),
    ]
    if run.has("reward"):
        reward = Panel("share", _curves(run, ("reward", "zero_signal_frac")), share=True)
        plots.append(figure("Reward", curves("reward", [reward]), ("reward", "zero_signal_frac")))
    return element("div", Html("".join(plots)), "figures")


def _curves(run: RunRecord, names: Sequence[str]) -> list[Series]:
    labels = {name: name.removesuffix("_nats").replace("_kl", " KL").replace("_", " ") for name in names}
    return [run.curve(name, label) for name, label in labels.items() if run.has(name)]


def _entropy_plot(run: RunRecord) -> Html:
    names = ("student_entropy_nats", "teacher_entropy_nats")
    series = _curves(run, names)
    if run.evaluations:
        series.append(run.evaluated("entropy_nats", "student, held-out"))
    return figure("Entropy", curves("entropy", [Panel("nats", series)]), names)


def _length_plot(run: RunRecord) -> Html:
    names = ("response_tokens", "horizon_tokens", "truncated_frac", "repetition_frac")
    tokens = [run.curve("response_tokens", "response"), run.curve("horizon_tokens", "horizon", "stairs")]
    if run.evaluations:
        tokens.append(run.evaluated("response_tokens", "held-out response"))
    shares = Panel(
        "share", [run.curve("truncated_frac", "truncated"), run.curve("repetition_frac", "repetitive")], share=True
    )
    return figure("Response length", curves("length", [Panel("tokens", tokens), shares], height_in=1.7), names)


def _stability_plot(run: RunRecord) -> Html:
    names = ("grad_norm", "sampler_gap_nats")
    panels = [
        Panel(label, [run.curve(name, label)], log=log)
        for name, label, log in (("grad_norm", "gradient norm", False), ("sampler_gap_nats", "sampler gap, nats", True))
        if run.has(name)
    ]
    return figure("Stability", curves("stability", panels, height_in=1.7), names) if panels else Html("")


def _time_plot(run: RunRecord) -> Html:
    phases = {name.removesuffix("_s"): np.nan_to_num(run.column(name)) for name in PHASES if run.has(name)}
    if not phases or not run.has("step_s"):
        return Html("")
    # Evaluation, packing and waiting; metrics of a run that began before a phase was timed may sum to more than the step.
    rest = np.clip(run.column("step_s") - sum(phases.values()), 0.0, None)
    svg = stacked("time", run.column("step"), phases | {"other": rest}, "seconds a step")
    return figure("Time", svg, (*PHASES, "step_s", "tokens_per_s"))


def _metrics_table(run: RunRecord) -> Html:
    rows = []
    for metric in METRICS:
        values = run.column(metric.name)
        finite = values[np.isfinite(values)]
        if metric.name == "step" or not len(finite):
            continue
        numbers = (finite[0], finite[-1], finite.min(), finite.max())
        meaning = fold(metric.meaning, good_and_bad(metric))
        name = element("code", metric.name)
        cells = [element("span", f"{number:{metric.form}}", "num") for number in numbers]
        rows.append([name, *cells, Html(sparkline(f"spark-{metric.name}", values)), meaning])
    return (
        table(["metric", "first", "last", "least", "greatest", "over the steps", "meaning"], rows) if rows else Html("")
    )


def _decisions(run: RunRecord) -> Html:
    rows = [
        [
            record["step"],
            record["outcome"],
            f"{record['horizon_before_tokens']} → {record['horizon_after_tokens']}",
            "not measured" if (entropy := record["measurement"]["entropy_nats"]) is None else f"{entropy:.3f}",
            record["reason"],
        ]
        for record in run.decisions
    ]
    return (
        table(["step", "decision", "horizon, tokens", "held-out entropy, nats", "reason"], rows) if rows else Html("")
    )


# --- configuration, samples, environment ------------------------------------------------------------------------------


def _config_table(run: RunRecord) -> Html:
    defaults, meanings = default_config(), field_meanings()
    names = {name: element("code", name) for name in run.config}
    changed = [name for name, value in run.config.items() if value != defaults.get(name, ABSENT)]
    rows = [
        [
            names[name],
            element("code", shown(run.config[name])),
            shown(defaults.get(name, ABSENT)),
            meanings.get(name, ""),
        ]
        for name in changed
    ]
    others = table(
        ["field", "value"], [[names[name], shown(value)] for name, value in run.config.items() if name not in changed]
    )
    unchanged = fold(f"{len(run.config) - len(changed)} fields at their defaults", others)
    return Html(table(["field", "value", "default", "meaning"], rows) + unchanged)


def _samples(run: RunRecord) -> Html:
    """The responses kept of the first, the middle and the last step that have any."""
    steps = sorted({sample["step"] for sample in run.samples})
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    return Html("".join(_sample(sample) for step in chosen for sample in run.samples if sample["step"] == step))


def _sample(sample: Mapping[str, Any]) -> Html:
    ended = {"length": "cut at the horizon", "stop": "ended by itself"}.get(
        sample["stop_reason"], sample["stop_reason"]
    )
    facts = (
        f"step {sample['step']} · written by the {sample['written_by']} · {ended} · reference answer {sample['answer']}"
    )
    parts = (
        element("p", facts, "soft"),
        element("pre", sample["prompt"], "prompt"),
        element("pre", sample["response"]),
    )
    return element("div", Html("".join(parts)), "sample")


def _environment(environment: Mapping[str, Any]) -> Html:
    return table(["", ""], [[element("code", name), shown(value)] for name, value in flatten(environment).items()])
