"""Draw docs/figures/overlap.svg: what a step waits for, and how one of staleness 0 grows.

    python benchmarks/overlap.py --sweep --json docs/figures/overlap.json
    python docs/figures/overlap.py

From docs/figures/overlap.json, a row a line.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__)
BLUE, ORANGE = "#0072b2", "#d55e00"
Row = dict[str, Any]


LABELS = {
    "rollouts": "responses a step",
    "horizon_tokens": "horizon, tokens",
    "replicas": "servers",
    "dp": "trainer ranks",
}


def main() -> None:
    """The kinds of step as bars on a line of time; the sweeps as curves."""
    rows = [json.loads(line) for line in HERE.with_suffix(".json").read_text().splitlines()]
    kinds = [row for row in rows if row["varies"] == "staleness"]
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    lanes, *curves = figure.subplots(1, 1 + len(LABELS), width_ratios=[2.4] + [1] * len(LABELS))
    draw_lanes(lanes, kinds[0], kinds[1:3])
    for axes, (name, label) in zip(curves, LABELS.items(), strict=True):
        sweep = [row for row in rows if row["varies"] == name]
        values = [row[name] for row in sweep]
        axes.plot(values, [row["draw_s"] for row in sweep], "o-", color=BLUE, ms=3, label="draw")
        axes.plot(values, [row["train_s"] + row["sync_s"] for row in sweep], "o-", color=ORANGE, ms=3, label="train")
        axes.set_xlabel(label, fontsize=8)
        axes.set_xlim(0, 1.1 * values[-1])
        if values[-1] < 10:
            axes.set_xticks(values)
        axes.set_ylim(0)
        axes.tick_params(labelsize=7)
    curves[0].set_ylabel("seconds", fontsize=8)
    curves[0].legend(frameon=False, fontsize=7)
    for axes in (lanes, *curves):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.with_suffix(".svg"), metadata={"Date": None})


def draw_lanes(axes: Axes, serial: Row, overlapped: Sequence[Row]) -> None:
    """Three steps of each kind, the servers' work above the trainer's."""
    draw, train = serial["push_s"] + serial["draw_s"], serial["train_s"] + serial["sync_s"]
    ticks: dict[float, str] = {}
    for place, row in enumerate([serial, *overlapped]):
        top = -3.0 * place
        ticks |= {top: "servers", top - 1: "trainer"}
        for number in range(3):
            start = number * row["step_s"]
            busy = min(draw, row["step_s"])
            axes.barh(top, busy, 0.7, start, color=BLUE, edgecolor="white")
            axes.barh(top - 1, train, 0.7, start + (draw if row is serial else 0), color=ORANGE, edgecolor="white")
        axes.text(0, top + 0.55, f"staleness {row['staleness']}: {row['step_s']:.2f} s a step", fontsize=8)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
    axes.set_ylim(min(ticks) - 0.6, 1.3)
    axes.set_xlabel("seconds", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)


if __name__ == "__main__":
    main()
