"""What a study says: intervals and verdicts that follow from the numbers."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from megatron_distill.study.claims import holm, judge, judge_all, sentence, verdict_on_claim
from megatron_distill.study.design import Comparison, Group
from megatron_distill.study.results import Interval, over_seeds
from tests.support.made_up_study import HIGH_ABOVE_LOW, results_of, small_study


def test_intervals_are_those_of_student() -> None:
    """Against a textbook case, at one seed, and with values that were not measured."""
    interval = over_seeds([1.0, 2.0, 3.0])
    assert (interval.low, interval.high) == pytest.approx(
        (2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), rel=1e-4
    )
    assert over_seeds([0.5]).shown(".2f") == "0.50"
    assert over_seeds([math.nan]).shown(".2f") == "-"
    assert over_seeds([1.0, math.nan, 2.0, 3.0]) == interval


def test_intervals_cover_as_often_as_they_say() -> None:
    """Of many intervals from 3 normal values, about 95% hold the true mean."""
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    covered = [over_seeds(row).low <= 0 <= over_seeds(row).high for row in draws]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_p_values_say_where_the_interval_ends() -> None:
    """5% where it ends at 0, the paired t-test's value where it reaches past it, and none without a spread between seeds."""
    assert Interval(1.0, 0.0, 2.0, num_seeds=4).p_value == pytest.approx(0.05)
    values = np.array([0.1, -0.2, 0.3, 0.25, 0.0])
    assert over_seeds(values).p_value == pytest.approx(ttest_rel(values, np.zeros(5)).pvalue)
    assert math.isnan(over_seeds([1.0]).p_value) and over_seeds([0.0, 0.0]).p_value == 1
    for same in ([0.3, 0.3, 0.3], [0.8 - 0.5, 0.7 - 0.4, 0.9 - 0.6]):  # the second differ in their last bits
        assert math.isnan(over_seeds(same).p_value) and over_seeds(same).shown(".1f") == "0.3"


def test_holm_corrects_for_the_number_of_comparisons() -> None:
    """Worked: times 4, 3, 2, 1 in rising order, never below the one before; what is not judged yet counts as the last."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = holm([0.02, math.nan, 0.4])
    assert corrected[::2] == pytest.approx([0.06, 0.8]) and math.isnan(corrected[1])
    assert holm([]) == []


def test_false_findings_are_as_rare_as_holm_says() -> None:
    """Of 400 studies of ten comparisons in which nothing differs, at most about 5% find anything after correction."""
    draws = np.random.default_rng(0).normal(size=(400, 10, 5))
    found = [min(holm([over_seeds(row).p_value for row in study])) < 0.05 for study in draws]
    assert np.mean(found) == pytest.approx(0.05, abs=0.025)


def test_a_finding_says_whether_it_stands_among_all() -> None:
    """Beside another comparison the same numbers count for less; one asked twice, either way round, counts once."""
    results = results_of({"high": [0.80, 0.81, 0.79], "low": [0.60, 0.66, 0.54], "flat": [0.80, 0.82, 0.785]})
    reverse = Comparison("avg_at_k", HIGH_ABOVE_LOW.lesser, HIGH_ABOVE_LOW.greater)
    other = Comparison("avg_at_k", Group("high", ("high",)), Group("flat", ("flat",)))
    ask = small_study().questions[0]
    results = replace(
        results, questions=[replace(ask, comparisons=(HIGH_ABOVE_LOW, reverse)), replace(ask, comparisons=(other,))]
    )
    (first, second), (third,) = judge_all(results)
    assert first.num_compared == 2 and first.corrected_p == second.corrected_p == pytest.approx(
        2 * first.difference.p_value
    )
    assert "it stands after correction for 2 comparisons" in sentence(first)
    assert third.verdict == "does not show" and "correction" not in sentence(third)


def test_comparisons_without_numbers_yet_are_counted() -> None:
    """Of two that are planned one has one seed: the other is corrected for both, as it will be once both are judged."""
    values = {"high": [0.80, 0.81, 0.79], "low": [0.50, 0.56, 0.44], "late": [0.5]}
    late = Comparison("avg_at_k", Group("high", ("high",)), Group("late", ("late",)))
    question = replace(small_study().questions[0], comparisons=(HIGH_ABOVE_LOW, late))
    ((first, second),) = judge_all(replace(results_of(values), questions=[question]))
    assert first.corrected_p == 2 * first.difference.p_value and "after correction for 2 comparisons" in sentence(first)
    assert second.verdict == "not judged" and math.isnan(second.corrected_p) and not second.stands


def test_groups_of_arms_are_their_means_over_the_seeds_of_all() -> None:
    """A seed that one of a group's arms lacks is left out; groups whose arms stand in another order ask the same."""
    values = {"a": [0.8, 0.9, 0.7], "b": [0.6, 0.9], "c": [0.5, 0.4, 0.3], "d": [0.3, 0.5, 0.1]}
    one, again = (
        Comparison("avg_at_k", Group("first", first), Group("second", second))
        for first, second in ((("a", "b"), ("c", "d")), (("b", "a"), ("d", "c")))
    )
    question = replace(small_study().questions[0], comparisons=(one, again))
    ((judged, twin),) = judge_all(replace(results_of(values), questions=[question]))
    assert (judged.greater.mean, judged.lesser.mean) == pytest.approx((0.8, 0.425))
    assert judged.difference.num_seeds == 2 and judged.num_compared == twin.num_compared == 1


@pytest.mark.parametrize(
    ("high", "low", "verdict", "separate"),
    [
        ([0.80, 0.81, 0.79], [0.50, 0.52, 0.49], "shows", True),
        ([0.50, 0.52, 0.49], [0.80, 0.81, 0.79], "the opposite", True),
        ([0.50, 0.60, 0.40], [0.52, 0.41, 0.58], "does not show", False),
        ([0.90, 0.70, 0.50], [0.80, 0.61, 0.39], "shows", False),  # each seed by 0.1: pairing sees it
        ([0.80, 0.70, 0.90], [0.50, 0.40, 0.60], "not judged", False),  # the same for all seeds, up to rounding
        ([0.80, 0.70, 0.90], [0.80, 0.70, 0.90], "does not show", False),  # the same runs
        ([0.80], [0.50], "not judged", False),
        ([], [0.50], "not judged", False),
    ],
)
def test_verdicts_follow_from_the_paired_difference(
    high: list[float], low: list[float], verdict: str, separate: bool
) -> None:
    """Above zero, below zero, around zero, the same for all, and too few seeds; the sentence says so, with the numbers."""
    judgement = judge(results_of({"high": high, "low": low}), HIGH_ABOVE_LOW)
    assert (judgement.verdict, judgement.separate) == (verdict, separate)
    text = sentence(judgement)
    assert f"**{verdict}**" in text
    if verdict == "not judged":
        assert "separate" not in text and ("the same for all seeds has no interval" in text) == (len(high) == 3)
    else:
        assert f"{np.mean(high):.3f} [" in text and ("separate" if separate else "overlap") in text


@pytest.mark.parametrize("low", [[0.5, 0.5], [0.5, 0.5, math.nan]])
def test_only_seeds_of_both_sides_are_compared(low: list[float]) -> None:
    """A seed that one side lacks is in neither side's mean: else an interrupted study would compare unlike runs."""
    judgement = judge(results_of({"high": [0.8, 0.8, 0.1], "low": low}), HIGH_ABOVE_LOW)
    assert judgement.greater.mean == pytest.approx(0.8) and judgement.difference.num_seeds == 2


def test_the_verdict_on_a_claim_needs_all_of_its_comparisons() -> None:
    """All, none, the opposite, a part, not yet, and never; what is found is told with how much of it stands."""

    def one(high: float, low: float, noise: tuple[float, ...] = (0.0, 0.01, -0.01), corrected_p: float = 0.01) -> Any:
        values = {"high": [high + n for n in noise], "low": [low - n for n in noise]}
        return replace(judge(results_of(values), HIGH_ABOVE_LOW), corrected_p=corrected_p)

    shows, opposite, neither = one(0.8, 0.5), one(0.5, 0.8), one(0.5, 0.5, corrected_p=1.0)
    falls, early, same = one(0.8, 0.5, corrected_p=0.06), one(0.8, 0.5, (0.0,)), one(0.8, 0.5, (0.0, 0.0))
    for judged, told in (
        ([shows, falls], "shows it (1 of 2 stand after correction)"),
        ([opposite], "shows the opposite (1 of 1 stands after correction)"),
        ([neither, neither], "does not show it"),
        ([falls, neither], "shows it in part (1 of 2 comparisons; 0 of 1 stands after correction)"),
        ([opposite, neither], "shows the opposite in part (1 of 2 comparisons; 1 of 1 stands after correction)"),
        (
            [shows, opposite, neither],
            "shows it in part and the opposite in part (1 and 1 of 3 comparisons; 2 of 2 stand after correction)",
        ),
        ([shows, early], "cannot judge it yet"),
        ([], "cannot judge it yet"),
        ([shows, same], "cannot judge it"),
    ):
        assert verdict_on_claim(judged) == told
