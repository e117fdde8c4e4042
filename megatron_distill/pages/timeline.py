"""Who worked when, as a picture: a few steps of the trainer and of the servers, one row each; idle time is the white in a row.

In: the spans of a run's ``timeline.jsonl``. Out: an SVG, and the shares of the steps' time in words.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure

from megatron_distill.pages.page import Html, element
from megatron_distill.pages.plots import COLOURS, as_svg, legend_above, style
from megatron_distill.runs.timeline import Span, busy_shares, steps_of

ROWS = ("trainer", "student", "teacher", "evaluation")
_WHAT = {
    "train": COLOURS[0],
    "sync": COLOURS[4],
    "evaluate": COLOURS[3],
    "decide": COLOURS[6],
    "busy": COLOURS[2],
    "load": COLOURS[5],
}
"""What is drawn; a trainer that waits for samples stays white: that is the bubble."""

NUM_STEPS = 4


def timeline_section(spans: Sequence[Span]) -> Html:
    """The steps around the middle of the run that took a typical time, and how busy everyone was over all steps."""
    steps = steps_of(list(spans))
    if not steps:
        return Html("")
    first = _typical(steps)
    window = steps[first : first + NUM_STEPS]
    began, ended = window[0][0], window[-1][1]
    shown = [span for span in spans if span.ended > began and span.began < ended and span.what in _WHAT]
    svg = draw(shown, began, ended, [end for _, end in window])
    told = f"Steps {first + 1} to {first + len(window)} of {len(steps)} recorded. {in_words(spans, steps)}"
    return Html(f'{element("p", told, "soft")}\n<figure class="wide">{svg}</figure>')


def in_words(spans: Sequence[Span], steps: Sequence[tuple[float, float]]) -> str:
    """How much of the steps' time each worked."""
    shares = busy_shares(list(spans), list(steps))

    def share(who: str, what: str) -> str:
        return f"{min(1.0, shares.get((who, what), 0.0)):.0%}"

    parts = [
        f"Of all steps' time the trainer trained {share('trainer', 'train')} and waited {share('trainer', 'wait')}"
    ]
    parts += [f"the {who}'s servers were busy {share(who, 'busy')}" for who in ROWS[1:] if (who, "busy") in shares]
    return "; ".join(parts) + "."


def draw(spans: Sequence[Span], began: float, ended: float, marks: Sequence[float]) -> str:
    """Bars over time, a row for each of ``ROWS`` that did anything.

    Args:
        spans: that fall in between.
        began: the left end, Unix seconds.
        ended: the right end.
        marks: ends of steps, drawn as lines.
    """
    rows = [who for who in ROWS if any(span.who == who for span in spans)]
    with style("timeline"):
        figure = Figure(figsize=(11.5, 0.9 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for what, colour in _WHAT.items():
            for number, who in enumerate(rows):
                bars = [
                    (max(span.began, began) - began, min(span.ended, ended) - max(span.began, began))
                    for span in spans
                    if (span.who, span.what) == (who, what)
                ]
                if bars:
                    is_named = what in [text.get_label() for text in axes.collections]
                    label = f"_{what}" if is_named else what
                    axes.broken_barh(bars, (number - 0.36, 0.72), color=colour, label=label, linewidth=0)
        for mark in marks[:-1]:
            axes.axvline(mark - began, color="#999999", linewidth=0.8, linestyle=(0, (3, 3)))
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, ended - began)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("seconds")
        legend_above(axes)
        return as_svg(figure)


def _typical(steps: Sequence[tuple[float, float]]) -> int:
    """Where to begin: of the stretches of ``NUM_STEPS`` without an evaluation in between, the one of median length."""
    starts = range(max(1, len(steps) - NUM_STEPS + 1))

    def length(first: int) -> float:
        return steps[min(first + NUM_STEPS, len(steps)) - 1][1] - steps[first][0]

    def pauses(first: int) -> float:
        return length(first) - sum(ended - began for began, ended in steps[first : first + NUM_STEPS])

    least = min(map(pauses, starts))
    candidates = sorted((first for first in starts if pauses(first) <= least + 1e-3), key=length)
    return candidates[(len(candidates) - 1) // 2]
