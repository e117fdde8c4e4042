"""Draw docs/figures/overlap.svg: what a step waits for, and how it grows.

    python benchmarks/overlap.py --sweep --json docs/figures/overlap.json
    python docs/figures/overlap.py

From docs/figures/overlap.json, a row a line.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__)
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#999999"
Row = dict[str, Any]


def main() -> None:
    """The kinds of step as bars on a line of time; the sweeps as curves."""
    overlap, sweeps = split([json.loads(line) for line in HERE.with_suffix(".json").read_text().splitlines()])
    figure = Figure(figsize=(9.6, 2.6), layout="constrained")
    lanes, *curves = figure.subplots(1, 1 + len(sweeps), width_ratios=[2.2] + [1] * len(sweeps))
    draw_lanes(lanes, *overlap)
    for axes, (name, rows) in zip(curves, sweeps.items(), strict=True):
        values = [row[name] for row in rows]
        axes.plot(values, [row["draw_s"] for row in rows], "o-", color=BLUE, ms=3, label="draw")
        axes.plot(values, [row["train_s"] + row["sync_s"] for row in rows], "o-", color=ORANGE, ms=3, label="train")
        axes.set_xlabel(
            {"horizon_tokens": "horizon, tokens", "replicas": "servers", "dp": "trainer ranks"}.get(
                name, f"{name} a step"
            ),
            fontsize=8,
        )
        axes.set_ylim(0)
        axes.tick_params(labelsize=7)
    curves[0].set_ylabel("seconds", fontsize=8)
    curves[0].legend(frameon=False, fontsize=7)
    for axes in (lanes, *curves):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.with_suffix(".svg"), metadata={"Date": None})


def split(rows: list[Row]) -> tuple[tuple[Row, Row], dict[str, list[Row]]]:
    """One after another and one ahead, then the runs of each sweep."""
    serial, ahead, *_ = (row for row in rows if row["varies"] == "staleness")
    sweeps: dict[str, list[Row]] = {}
    for row in rows:
        if row["varies"] in {"rollouts", "horizon_tokens", "replicas", "dp"}:
            sweeps.setdefault(row["varies"], []).append(row)
    return (serial, ahead), sweeps


def draw_lanes(axes: Axes, serial: Row, ahead: Row) -> None:
    """Three steps of each kind, the servers' work above the trainer's."""
    draw, train = serial["push_s"] + serial["draw_s"], serial["train_s"] + serial["sync_s"]
    for number in range(3):
        start = number * serial["step_s"]
        axes.barh(3, draw, 0.7, start, color=BLUE, edgecolor="white")
        axes.barh(2, train, 0.7, start + draw, color=ORANGE, edgecolor="white")
        start = number * ahead["step_s"]
        axes.barh(1, min(draw, ahead["step_s"]), 0.7, start, color=BLUE, edgecolor="white")
        axes.barh(0, train, 0.7, start, color=ORANGE, edgecolor="white")
    axes.set_yticks([3, 2, 1, 0], ["servers", "trainer", "servers", "trainer"], fontsize=8)
    axes.axhline(1.5, color=GREY, lw=0.6)
    right = 3 * serial["step_s"]
    axes.text(right, 3.5, f"staleness 0: {serial['step_s']:.2f} s a step", fontsize=8, ha="right")
    axes.text(right, 1.05, f"staleness 1: {ahead['step_s']:.2f} s a step", fontsize=8, ha="right")
    axes.set_xlabel("seconds", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)


if __name__ == "__main__":
    main()
