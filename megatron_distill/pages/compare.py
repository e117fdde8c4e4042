"""Runs side by side: their results, how their configs differ, and every metric they share, in one page and one table.

In: run folders. Out: a self-contained HTML file, and the text of a table for the console.

    megatron-distill compare runs/forward runs/reverse runs/mixed
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_distill.errors import DataError
from megatron_distill.pages.page import Html, document, element, figure, table
from megatron_distill.pages.plots import Panel, curves
from megatron_distill.pages.report import evaluation_rows, with_interval
from megatron_distill.pages.run_record import ABSENT, RunRecord, default_config, field_meanings, read_run, shown
from megatron_distill.runs import marks
from megatron_distill.runs.metrics import METRICS, Metric
from megatron_distill.runs.run_folder import RunFolder
from megatron_distill.runs.summary import duration

_STAIRS = ("horizon_tokens", "reverse_kl_weight", "student_prefix_frac")


def compare_runs(folders: Sequence[RunFolder], out: Path) -> str:
    """Write a page that compares runs, and tell the essence in text.

    Args:
        folders: at least two, in the order in which they are to be shown.
        out: the HTML file to write.

    Returns:
        A table for the console: the last evaluation of each run, and the config fields that differ.

    Raises:
        DataError: for fewer than two runs, one named twice, or a folder that is not a run folder.
    """
    roots = [folder.root.resolve() for folder in folders]
    if len(set(roots)) < 2 or len(set(roots)) < len(roots):
        raise DataError(
            f"compare = {', '.join(str(folder.root) for folder in folders) or 'no run'}: needs two or more different runs. "
            "Name them: megatron-distill compare runs/A runs/B."
        )
    marks.check_page(out, "--out")
    runs = [read_run(folder) for folder in folders]
    labels = _labels(roots)
    differences = config_differences(runs)
    sections = [
        ("Results", _results(runs, labels)),
        ("Differences", _differences_table(differences, labels)),
        ("Curves", _curves(runs, labels)),
    ]
    note = element("p", "One colour a run. Folders: " + ", ".join(map(str, roots)), "soft")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(document(f"Comparison of {len(runs)} runs", note, sections), encoding="utf-8")
    return _console_table(runs, labels, differences)


def config_differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """{dotted field: its value in each run} of the fields whose values are not all equal; a name is no difference.

    A field that a run does not have counts as its default: the run was made before there was such a field.
    """
    defaults = default_config()
    fields = dict.fromkeys(field for run in runs for field in run.config if field != "name")
    differing = {}
    for field in fields:
        values = [run.config.get(field, defaults.get(field, ABSENT)) for run in runs]
        if any(value != values[0] for value in values):
            differing[field] = [run.config.get(field, ABSENT) for run in runs]
    return differing


def _labels(roots: Sequence[Path]) -> list[str]:
    """Folder names, with as many of their parents as tell them apart."""
    depth = 1
    while len({root.parts[-depth:] for root in roots}) < len(roots):
        depth += 1
    return ["/".join(root.parts[-depth:]) for root in roots]


def _differences_table(differences: dict[str, list[Any]], labels: Sequence[str]) -> Html:
    if not differences:
        return element("p", "The configs are equal.", "soft")
    meanings = field_meanings()
    rows = [
        [element("code", field), *(element("code", shown(value)) for value in values), meanings.get(field, "")]
        for field, values in differences.items()
    ]
    return table(["field", *labels, "meaning"], rows)


# --- results ----------------------------------------------------------------------------------------------------------


def _results(runs: Sequence[RunRecord], labels: Sequence[str]) -> Html:
    """A row a run: its last evaluation, and what it cost."""
    evaluated = [run for run in runs if run.evaluations]
    numbers = evaluation_rows(_k(evaluated), [run.evaluations[-1] for run in evaluated]) if evaluated else []
    header = ["run", "step", *(label for label, _, _ in numbers), "time in steps"]
    rows: list[list[Any]] = []
    for run, label in zip(runs, labels, strict=True):
        last = run.evaluations[-1] if run.evaluations else None
        cells = [with_interval(last, key, form) if last else ABSENT for _, key, form in numbers]
        rows.append([label, last["step"] if last else ABSENT, *cells, duration(_seconds(run))])
    note = "Last evaluation of each run; in brackets 95% intervals over its problems."
    warning = _incomparable(evaluated)
    return Html(
        f"{table(header, rows)}{element('p', note, 'soft')}{element('p', warning, 'failure') if warning else ''}"
    )


def _k(runs: Sequence[RunRecord]) -> int | str:
    """The k of Avg@k, or the letter if the runs differ in it."""
    numbers = {run.evaluations[-1]["k"] for run in runs}
    return numbers.pop() if len(numbers) == 1 else "k"


def _incomparable(runs: Sequence[RunRecord]) -> str:
    """Why accuracies must not be compared, or nothing: they depend on the problems and on how responses were sampled."""
    free = ("evaluation.every_steps", "evaluation.entropy_problems")
    differing = [
        field
        for field in config_differences(runs)
        if field == "data.heldout_path" or (field.startswith("evaluation.") and field not in free)
    ]
    return f"These runs were not evaluated alike: {', '.join(differing)} differ." if differing else ""


def _seconds(run: RunRecord) -> float:
    return float(np.nansum(run.column("step_s")))


def _console_table(runs: Sequence[RunRecord], labels: Sequence[str], differences: dict[str, list[Any]]) -> str:
    """Fields down, runs across."""
    rows = [["", *labels]]
    evaluated = [run for run in runs if run.evaluations]
    if evaluated:
        rows.append(["step", *(str(run.evaluations[-1]["step"]) if run.evaluations else ABSENT for run in runs)])
        for label, key, form in evaluation_rows(_k(evaluated), [run.evaluations[-1] for run in evaluated]):
            rows.append([label, *(f"{run.evaluations[-1][key]:{form}}" if run.evaluations else ABSENT for run in runs)])
    rows.append(["time in steps", *(duration(_seconds(run)) for run in runs)])
    rows += [[field, *map(shown, values)] for field, values in differences.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    warning = _incomparable(evaluated)
    return "\n".join(lines + ([warning] if warning else []))


# --- curves -----------------------------------------------------------------------------------------------------------


def _curves(runs: Sequence[RunRecord], labels: Sequence[str]) -> Html:
    """Accuracy, then every metric that any of the runs measured, in the order of the metrics' table."""
    plots = []
    if any(run.evaluations for run in runs):
        for title, key in (("Avg@k, held-out", "avg_at_k"), ("Entropy, held-out", "entropy_nats")):
            pairs = zip(runs, labels, strict=True)
            series = [run.evaluated(key, label) for run, label in pairs if run.evaluations]
            panel = Panel("nats" if key == "entropy_nats" else "share", series, share=key == "avg_at_k")
            plots.append(figure(title, curves(f"heldout-{key}", [panel], width_in=4.2, height_in=2.2)))
    plots += [_metric_plot(metric, runs, labels) for metric in METRICS if metric.name != "step"]
    return element("div", Html("".join(plots)), "figures small")


def _metric_plot(metric: Metric, runs: Sequence[RunRecord], labels: Sequence[str]) -> Html:
    if not any(run.has(metric.name) for run in runs):
        return Html("")
    kind = "stairs" if metric.name in _STAIRS else "line"
    series = [run.curve(metric.name, label, kind) for run, label in zip(runs, labels, strict=True)]
    panel = Panel("", series, log=metric.name == "sampler_gap_nats", share=metric.name.endswith("_frac"))
    return figure(metric.name, curves(metric.name, [panel], width_in=4.2, height_in=2.2), [metric.name])
