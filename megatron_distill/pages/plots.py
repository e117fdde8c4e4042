"""Curves and points as SVG text: the drawing of ``report``, ``compare`` and ``study``, on matplotlib, without its global state.

In: ``Series`` of numbers, grouped into ``Panel``s, or ``Cloud``s of points. Out: one ``<svg>`` element, ready to stand in a
page. Text stays text, so that a page's fonts apply and it can be searched.
"""

import io
import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

Floats = npt.NDArray[np.float64]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#b8a500")
"""Okabe and Ito's palette: told apart by the colour-blind, and in print."""

MAX_POINTS = 150
"""Longer curves are drawn as means of equal stretches of steps, in a band from the least to the greatest value."""

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": "#999999",
    "ytick.color": "#999999",
    "xtick.labelcolor": "#444444",
    "ytick.labelcolor": "#444444",
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True, eq=False)
class Series:
    """One curve.

    Attributes:
        label: what the legend calls it.
        steps: [N] rising: the optimizer steps, or what else the figure has on its x axis.
        values: [N], nan where there is none.
        kind: "line"; "stairs", which holds each value until the next; "points", measured now and then.
        low: [N] lower ends of the values' intervals, if they have any.
        high: [N] upper ends.
    """

    label: str
    steps: Floats
    values: Floats
    kind: Literal["line", "stairs", "points"] = "line"
    low: Floats | None = None
    high: Floats | None = None


@dataclass(frozen=True)
class Panel:
    """Curves that share axes.

    Attributes:
        ylabel: what is measured, and its unit.
        series: the curves; those without values are left out.
        log: logarithmic values.
        share: values are shares: the axis starts at 0 and shows at least a tenth.
        legend: False where a panel above has the same curves in the same colours.
    """

    ylabel: str
    series: Sequence[Series]
    log: bool = False
    share: bool = False
    legend: bool = True


@dataclass(frozen=True, eq=False)
class Cloud:
    """Repeated measurements of two quantities, and their mean.

    Attributes:
        label: what the legend calls it.
        x: [N].
        y: [N].
        x_interval: (mean, low, high) of x; low and high are nan where there is no interval.
        y_interval: the same of y.
    """

    label: str
    x: Floats
    y: Floats
    x_interval: tuple[float, float, float]
    y_interval: tuple[float, float, float]


def curves(
    name: str,
    panels: Sequence[Panel],
    *,
    width_in: float = 5.6,
    height_in: float = 2.5,
    xlabel: str = "step",
    xticks: Sequence[str] = (),
) -> str:
    """Panels above each other over one axis, of steps unless it is told otherwise.

    Args:
        name: of the figure; it keeps the ids inside the SVG apart from other figures' on a page.
        panels: at least one.
        width_in: of the figure, inches.
        height_in: of one panel, inches.
        xlabel: what the series' ``steps`` are, and their unit.
        xticks: names of the places 0, 1, ... on the x axis, where it has no numbers.
    """
    with style(name):
        figure = Figure(figsize=(width_in, height_in * len(panels)), layout="constrained")
        all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(all_axes, panels, strict=True):
            _draw_panel(axes, panel)
        if xlabel == "step":
            _label_steps(all_axes[-1])
        else:
            all_axes[-1].set_xlabel(xlabel)
        if xticks:
            all_axes[-1].set_xticks(range(len(xticks)), xticks)
        return as_svg(figure)


def scatter(name: str, clouds: Sequence[Cloud], *, xlabel: str, ylabel: str) -> str:
    """One mark a cloud at its means, with both intervals; the measurements behind it are small dots.

    Args:
        name: of the figure; it keeps the ids inside the SVG apart from other figures' on a page.
        clouds: at least one.
        xlabel: what x is, and its unit.
        ylabel: what y is, and its unit.
    """
    with style(name):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.subplots()
        for colour, cloud in zip(_colours(len(clouds)), clouds, strict=True):
            (x, x_low, x_high), (y, y_low, y_high) = cloud.x_interval, cloud.y_interval
            axes.plot(cloud.x, cloud.y, "o", color=colour, markersize=3, alpha=0.4, markeredgewidth=0)
            axes.errorbar(
                [x],
                [y],
                xerr=[[x - x_low], [x_high - x]] if np.isfinite(x_high) else None,
                yerr=[[y - y_low], [y_high - y]] if np.isfinite(y_high) else None,
                label=cloud.label,
                color=colour,
                marker="D",
                markersize=6,
                capsize=3,
                linestyle="none",
            )
        axes.set(xlabel=xlabel, ylabel=ylabel)
        legend_above(axes)
        return as_svg(figure)


def stacked(name: str, steps: Floats, parts: Mapping[str, Floats], ylabel: str) -> str:
    """Parts of a sum as areas on top of each other, the first at the bottom.

    Args:
        name: of the figure; it keeps the ids inside the SVG apart from other figures' on a page.
        steps: [N].
        parts: label -> [N]; nan counts as 0.
        ylabel: what the sum measures, and its unit.
    """
    stretches = _stretches(len(steps))
    with style(name):
        figure = Figure(figsize=(5.6, 2.5), layout="constrained")
        axes = figure.subplots()
        heights = [[np.nan_to_num(values[part]).mean() for part in stretches] for values in parts.values()]
        centres = [steps[part].mean() for part in stretches]
        axes.stackplot(centres, heights, labels=list(parts), colors=COLOURS, alpha=0.85, linewidth=0)
        axes.set_ylabel(ylabel)
        axes.margins(x=0.02)
        legend_above(axes)
        _label_steps(axes)
        return as_svg(figure)


def sparkline(name: str, values: Floats) -> str:
    """A curve the height of a line of text, without axes; its last value is marked."""
    means = [np.nanmean(values[part]) for part in _stretches(len(values)) if np.isfinite(values[part]).any()]
    with style(name):
        figure = Figure(figsize=(1.5, 0.3))
        axes = figure.add_axes((0.02, 0.1, 0.96, 0.8))
        axes.axis("off")
        axes.plot(means, color=COLOURS[0], linewidth=1.0)
        axes.plot(len(means) - 1, means[-1], "o", color=COLOURS[1], markersize=2.5)
        return as_svg(figure)


def style(name: str) -> AbstractContextManager[None]:
    """Our look, for one figure; the salt keeps the ids inside its SVG apart from other figures'."""
    settings: Any = _STYLE | {"svg.hashsalt": name}
    return mpl.rc_context(settings)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    present = [series for series in panel.series if np.isfinite(series.values).any()]
    for colour, series in zip(_colours(len(present)), present, strict=True):
        if series.kind == "points":
            _draw_points(axes, series, colour)
        else:
            _draw_line(axes, series, colour)
    axes.set_ylabel(panel.ylabel)
    if panel.log and present:
        axes.set_yscale("log", nonpositive="mask")
        positive = np.concatenate([series.values[series.values > 0] for series in present])
        if len(positive):  # whole decades, so that at least two ticks are labelled
            low, high = np.floor(np.log10(positive.min())), np.floor(np.log10(positive.max())) + 1
            axes.set_ylim(10**low, 10**high)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:  # matplotlib's own would put a common power of ten where the legend is
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if panel.share and present:
        tops = [series.values if series.high is None else series.high for series in present]
        top = max([0.1, *(1.1 * float(np.nanmax(values)) for values in tops)])
        axes.set_ylim(-0.03 * top, top)
    if panel.legend and (len(present) > 1 or any(series.label != panel.ylabel for series in present)):
        legend_above(axes)


def _draw_points(axes: Axes, series: Series, colour: str) -> None:
    errors = None
    if series.low is not None and series.high is not None:
        errors = np.maximum([series.values - series.low, series.high - series.values], 0.0)
    axes.errorbar(
        series.steps, series.values, errors, label=series.label, color=colour, marker="o", markersize=4, capsize=3
    )


def _draw_line(axes: Axes, series: Series, colour: str) -> None:
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    if series.kind == "stairs":
        kept = np.flatnonzero(np.append(True, values[1:] != values[:-1]) | (np.arange(len(values)) == len(values) - 1))
        axes.step(steps[kept], values[kept], where="post", label=series.label, color=colour)
        return
    stretches = _stretches(len(steps))
    centres = [steps[part].mean() for part in stretches]
    means = [values[part].mean() for part in stretches]
    axes.plot(centres, means, label=series.label, color=colour, marker="o" if len(steps) == 1 else "", markersize=4)
    if len(stretches) < len(steps):
        lows, highs = ([f(values[part]) for part in stretches] for f in (np.min, np.max))
        axes.fill_between(centres, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _stretches(count: int) -> list[slice]:
    """At most ``MAX_POINTS`` slices of nearly equal length that cover ``range(count)``."""
    ends = np.linspace(0, count, min(count, MAX_POINTS) + 1).astype(int)
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def legend_above(axes: Axes) -> None:
    """A legend above the axes, in as many columns as the labels leave room for."""
    handles, labels = axes.get_legend_handles_labels()
    room = axes.get_figure(root=True).get_figwidth() * 14  # type: ignore[union-attr]  # characters of this font, roughly
    columns = int(room // (max(map(len, labels), default=0) + 8))
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=min(max(columns, 1), len(labels), 5),
        borderaxespad=0.2,
        columnspacing=1.2,
    )


def _label_steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def as_svg(figure: Figure) -> str:
    """The ``<svg>`` element alone: what precedes it is for stand-alone files."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
