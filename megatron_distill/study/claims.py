"""What the numbers say of a claim: computed, never written by hand.

In: ``Results`` and a question's comparisons. Out: a ``Verdict`` for each, one for the claim, and the sentences that tell them.

A comparison says that a measure is greater in one group of arms than in another. Runs of the same seed are paired: they see
the same problems in the same order, and are evaluated with the same sampling seeds. It is judged by the 95% t-interval of the
paired difference over seeds: above 0 the study shows it, below 0 it shows the opposite, around 0 it does not show it. Beside
that verdict stands whether it survives the correction for all comparisons that the study plans (``holm``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_distill.study.design import MEASURES, Comparison
from megatron_distill.study.results import Interval, Results, over_seeds

Verdict = Literal["shows", "the opposite", "does not show", "not judged"]


@dataclass(frozen=True)
class Judgement:
    """A comparison and what the numbers say of it.

    Attributes:
        comparison: what was asked.
        greater: the side said to be greater, over the seeds that both sides have.
        lesser: the other side.
        difference: of the two, paired by seed.
        corrected_p: p-value of the difference, corrected for all comparisons that the study plans; nan if it is not judged.
        num_compared: how many those are, judged or not.
    """

    comparison: Comparison
    greater: Interval
    lesser: Interval
    difference: Interval
    corrected_p: float = math.nan
    num_compared: int = 0

    @property
    def verdict(self) -> Verdict:
        """Judged by the interval of the difference, where chance has one: see ``Interval.p_value``."""
        if math.isnan(self.difference.p_value):
            return "not judged"
        if self.difference.low > 0:
            return "shows"
        return "the opposite" if self.difference.high < 0 else "does not show"

    @property
    def separate(self) -> bool:
        """Whether the two sides' own intervals share no value: a harder test than the difference's."""
        return self.difference.num_seeds > 1 and not self.greater.overlaps(self.lesser)

    @property
    def stands(self) -> bool:
        """Whether it found something that is left once all planned comparisons are counted."""
        return self.corrected_p < SIGNIFICANCE


SIGNIFICANCE = 0.05


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the chance of one false finding among all stays below the level.

    In rising order the i-th of m (from 0) is multiplied by m - i, and none may be below the one before it. What is nan counts
    as 1, the last in that order, and stays nan: a test that is planned is one of the m before its numbers are in.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if math.isfinite(p))
    corrected, floor = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        floor = max(floor, min((len(p_values) - rank) * p, 1.0))
        corrected[place] = floor
    return corrected


def judge_all(results: Results) -> list[list[Judgement]]:
    """Judge every comparison of a study, question by question, and correct for the number of all, whether their runs have
    finished or not. Questions that ask for the same comparison ask it once."""
    judged = [[judge(results, one) for one in question.comparisons] for question in results.questions]
    different = {_identity(one): one.difference.p_value for question in judged for one in question}
    corrected = dict(zip(different, holm(list(different.values())), strict=True))
    return [
        [replace(one, corrected_p=corrected[_identity(one)], num_compared=len(corrected)) for one in question]
        for question in judged
    ]


def _identity(judgement: Judgement) -> tuple[str, frozenset[frozenset[str]]]:
    """What a two-sided test asks: a measure and two sides of arms, whichever is said to be greater."""
    one = judgement.comparison
    return one.measure, frozenset((frozenset(one.greater.arms), frozenset(one.lesser.arms)))


def judge(results: Results, comparison: Comparison) -> Judgement:
    """Compare two groups of arms over the seeds for which all their runs have finished."""
    greater, lesser = (results.of_group(side, comparison.measure) for side in (comparison.greater, comparison.lesser))
    seeds = [seed for seed in greater if seed in lesser and math.isfinite(greater[seed] - lesser[seed])]
    return Judgement(
        comparison,
        over_seeds(greater[seed] for seed in seeds),
        over_seeds(lesser[seed] for seed in seeds),
        over_seeds(greater[seed] - lesser[seed] for seed in seeds),
    )


def verdict_on_claim(judgements: list[Judgement]) -> str:
    """The verdict on all comparisons of a claim together, to stand after "this study", with how many of its findings are left
    once all planned comparisons are counted: ``shows it (1 of 2 stand after correction)``."""
    verdicts = [judgement.verdict for judgement in judgements]
    count = len(verdicts)
    shown, opposite = verdicts.count("shows"), verdicts.count("the opposite")
    found = shown + opposite
    if not verdicts or any(judgement.difference.num_seeds < 2 for judgement in judgements):
        return "cannot judge it yet"
    if "not judged" in verdicts:
        return "cannot judge it"
    if not found:
        return "does not show it"
    stand = f"{sum(one.stands for one in judgements)} of {found} {'stand' if found > 1 else 'stands'} after correction"
    if shown == count:
        return f"shows it ({stand})"
    if opposite == count:
        return f"shows the opposite ({stand})"
    if not opposite:
        return f"shows it in part ({shown} of {count} comparisons; {stand})"
    if not shown:
        return f"shows the opposite in part ({opposite} of {count} comparisons; {stand})"
    return f"shows it in part and the opposite in part ({shown} and {opposite} of {count} comparisons; {stand})"


def sentence(judgement: Judgement) -> str:
    """A comparison in words and numbers, e.g. ``length, tokens: reverse KL > forward KL: **shows**. 71.0 [70.1, 71.9]
    against ...``."""
    comparison, measure = judgement.comparison, MEASURES[judgement.comparison.measure]
    asked = f"{measure.label}: {comparison.greater.label} > {comparison.lesser.label}"
    if not judgement.difference.num_seeds:
        return f"{asked}: **not judged**: too few runs have finished."
    sides = f"{judgement.greater.shown(measure.form)} against {judgement.lesser.shown(measure.form)}"
    signed = measure.form if measure.form.startswith("+") else f"+{measure.form}"
    text = f"{sides}, difference {judgement.difference.shown(signed)}"
    if judgement.verdict == "not judged":
        none = "one seed" if judgement.difference.num_seeds == 1 else "a difference that is the same for all seeds"
        return f"{asked}: **not judged**, {none} has no interval. {text}."
    apart = "separate" if judgement.separate else "overlap"
    return (
        f"{asked}: **{judgement.verdict}**. {text}, {judgement.difference.num_seeds} seeds; the two intervals {apart}"
        f"{_corrected(judgement)}."
    )


def _corrected(judgement: Judgement) -> str:
    """Whether a finding stands once all planned comparisons are counted; nothing for what found nothing."""
    if judgement.verdict == "does not show" or math.isnan(judgement.corrected_p):
        return ""
    stands = "stands" if judgement.stands else "does not stand"
    return f"; it {stands} after correction for {judgement.num_compared} comparisons (p = {judgement.corrected_p:.2g})"
