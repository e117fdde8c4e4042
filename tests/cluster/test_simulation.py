"""What the simulation of a step promises: times that can be worked out by hand, to the last digit."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_distill.errors import ConfigError
from megatron_distill.launch.simulation import Design, Play, Response, Servers, Setting, Step, play
from megatron_distill.launch.step_time import made_up_lengths, mean_length
from megatron_distill.rollouts.source import IN_FLIGHT

TRAIN_S, SYNC_S, SCORE_S = 3.0, 1.0, 2.0
SEQUENTIAL, STREAMED, AHEAD = Design(0, streams=False), Design(0), Design(1)
WRITER = Servers(number=1, seats=1, token_s=1.0)
SCORER = Servers(number=1, seats=1, token_s=0.0, request_s=SCORE_S)
SETTING = Setting(WRITER, SCORER, SYNC_S)


def steps_of(lengths: Sequence[int], number: int, train_s: float = TRAIN_S, prompt_tokens: int = 0) -> list[Step]:
    return [Step(tuple(Response(prompt_tokens, tokens) for tokens in lengths), train_s)] * number


def played(lengths: Sequence[int], design: Design, number: int = 1, student: Servers = WRITER) -> Play:
    return play(steps_of(lengths, number), replace(SETTING, student=student), design)


def ends(result: Play) -> list[float]:
    return [mark.at_s for mark in result.marks[1:]]


def drawn_s(lengths: Sequence[int], design: Design = STREAMED, student: Servers = WRITER) -> float:
    """When the only step is drawn."""
    return ends(played(lengths, design, student=student))[0] - TRAIN_S - SYNC_S


@pytest.mark.parametrize("design", [SEQUENTIAL, STREAMED])
def test_one_response_passes_through_everybody(design: Design) -> None:
    """Write, score, train, gather: one after the other, step by step, and each works for its part of the time."""
    result = played([10], design, number=3)
    assert ends(result) == [16.0, 32.0, 48.0]
    shares = result.shares()
    assert shares.step_s == 16.0
    assert (shares.student, shares.teacher, shares.trainer) == (10 / 16, 2 / 16, 3 / 16)
    assert shares.student + shares.teacher + shares.trainer + SYNC_S / shares.step_s == 1.0  # nothing overlaps
    assert result.wrote == (((0.0, 10.0), (16.0, 26.0), (32.0, 42.0)),)
    assert result.scored == (((10.0, 12.0), (26.0, 28.0), (42.0, 44.0)),)
    assert result.trained == ((12.0, 15.0), (28.0, 31.0), (44.0, 47.0))
    assert result.gathered == ((15.0, 16.0), (31.0, 32.0), (47.0, 48.0))


def test_a_scored_token_costs_too_and_so_does_its_prompt() -> None:
    """The teacher reads prompt and response; the student's time is its response's and its request's."""
    servers = Setting(replace(WRITER, request_s=0.5), Servers(1, 1, token_s=0.25), 0.0)
    result = play([Step((Response(6, 10),), 0.0)], servers, STREAMED)
    assert result.wrote == (((0.0, 10.5),),) and result.scored == (((10.5, 14.5),),)


def test_without_a_teacher_a_step_is_drawn_when_it_is_written() -> None:
    """Nobody scores, nobody idles for it."""
    result = play(steps_of([10, 4], 2), Setting(replace(WRITER, seats=2), None, SYNC_S), STREAMED)
    assert ends(result) == [14.0, 28.0] and result.scored == () and result.shares().teacher == 0.0


@pytest.mark.parametrize("design", [SEQUENTIAL, STREAMED])
def test_equal_lengths_end_together_however_they_are_spread(design: Design) -> None:
    """Four of ten tokens in four seats; then the scores, one after the other."""
    for number, seats in ((1, 4), (2, 2), (4, 1)):
        assert drawn_s([10] * 4, design, Servers(number, seats, 1.0)) == 10 + 4 * SCORE_S


def test_streamed_scores_hide_behind_the_longest_response() -> None:
    """All but the last score are done when it ends; otherwise all of them follow it."""
    student = replace(WRITER, seats=4)
    assert drawn_s([2, 4, 6, 10], STREAMED, student) == 10 + SCORE_S
    assert drawn_s([2, 4, 6, 10], SEQUENTIAL, student) == 10 + 4 * SCORE_S


def test_more_responses_than_seats_queue_in_their_order() -> None:
    """Three waves of equal ones; of unequal ones whoever comes next takes the first seat that is left."""
    two = replace(WRITER, seats=2)
    assert drawn_s([10] * 5, STREAMED, two) == 30 + SCORE_S
    result = played([10, 2, 3, 4], STREAMED, student=two)  # the second seat: 2, then 3 until 5, then 4 until 9
    assert result.marks[1].seats_s == 10 + 9 and result.wrote == (((0.0, 10.0),),)
    apart = played([10, 2, 3, 4], STREAMED, student=replace(WRITER, number=2))
    assert apart.wrote == (((0.0, 10.0),), ((0.0, 9.0),))
    assert apart.marks[1].student_s == 19 and apart.shares().at_once == 19 / 2 / apart.shares().step_s


def test_a_request_goes_where_most_seats_are_free() -> None:
    """Six over three servers: two each, so that pace does not suffer more than it must."""
    servers = Servers(3, 6, 1.0, slowdown=float)
    assert drawn_s([10] * 6, STREAMED, servers) == 20 + 6 * SCORE_S


def test_seats_share_a_pace() -> None:
    """Two at once take twice as long each: ten tokens end at 20; then the other's last ten go on alone."""
    student = Servers(1, 2, 1.0, slowdown=float)
    assert drawn_s([10, 20], STREAMED, student) == 30 + SCORE_S


@pytest.mark.parametrize("push_s", [0.0, 2.0])
@pytest.mark.parametrize("train_s", [5.0, 12.0, 40.0])
def test_one_step_ahead_takes_the_longer_of_drawing_and_training(train_s: float, push_s: float) -> None:
    """After the first step, which nothing hides: max(push + draw, train) and the gathering, exactly."""
    result = play(steps_of([10], 5, train_s), replace(SETTING, push_s=push_s), AHEAD)
    draw_s = 10 + SCORE_S
    assert ends(result)[0] == draw_s + max(draw_s, train_s) + SYNC_S
    assert [b - a for a, b in itertools.pairwise(ends(result)[:-1])] == [max(push_s + draw_s, train_s) + SYNC_S] * 3
    assert ends(result)[-1] - ends(result)[-2] == train_s + SYNC_S  # nothing is left to draw


def test_in_flight_a_step_takes_its_tokens_through_full_seats() -> None:
    """One seat that is never empty: ten seconds a step, with training, pushes and scores beside it."""
    result = play(steps_of([10], 12), SETTING, Design(2))
    shares = result.shares(3, 9)
    assert (shares.step_s, shares.student, shares.at_once) == (10.0, 1.0, 1.0)


@pytest.mark.parametrize(("ahead", "step_s"), [(2, 16 / 3), (3, 4.0), (4, 4.0)])
def test_in_flight_a_step_takes_a_part_of_its_longest_response_or_training(ahead: int, step_s: float) -> None:
    """With seats for all, k + 1 steps pass within the 16 s of one; none is faster than training and a push."""
    setting = replace(SETTING, student=replace(WRITER, seats=8))
    result = play(steps_of([10], 24 + ahead), setting, Design(ahead))
    assert result.shares(12, 24).step_s == pytest.approx(step_s)


def test_a_push_in_flight_stops_the_servers_and_costs_prefixes() -> None:
    """At 14 s, all weights gathered, two responses have five tokens of prompt and four of their own each: one second, and 18
    tokens of a quarter."""
    setting = Setting(replace(WRITER, seats=3), None, SYNC_S, push_s=1.0, recompute_token_s=0.25)
    result = play(steps_of([10], 3, prompt_tokens=5), setting, Design(2))
    assert result.wrote == (((0.0, 14.0), (19.5, 25.5)),)
    assert ends(result) == [14.0, 29.5, 33.5]
    assert result.marks[-1].student_s == 20.0  # who stands still, idles


def test_weights_are_gathered_once_the_last_have_arrived() -> None:
    """Short steps in flight take as long as a push and a gathering."""
    setting = replace(SETTING, student=replace(WRITER, seats=8), push_s=5.0)
    result = play(steps_of([1], 12), setting, Design(4))
    assert result.shares(3, 8).step_s == 5.0 + SYNC_S


def test_what_is_drained_costs_no_prefixes() -> None:
    """Nothing is written while weights come in: what is drawn next waits for them; and the modes are those of the rollouts."""
    costly = replace(SETTING, push_s=2.0, recompute_token_s=9.0)
    for design in (SEQUENTIAL, STREAMED):
        assert ends(play(steps_of([10], 3), costly, design)) == [16.0, 34.0, 52.0]
    assert Design(IN_FLIGHT - 1).drains and not Design(IN_FLIGHT).drains


@pytest.mark.parametrize("seed", range(5))
def test_each_design_is_at_least_as_fast_as_the_one_before(seed: int) -> None:
    """Uneven lengths, few seats, a busy teacher: sums, spans and shares agree, and everything is written and scored once."""
    steps = [Step(tuple(Response(9, n) for n in made_up_lengths(64, 16, seed + step)), 20.0) for step in range(16)]
    setting = Setting(Servers(2, 4, 1.0, slowdown=lambda n: 1 + n / 8), Servers(2, 1, 0.125), 2.0, push_s=1.0)
    results = [play(steps, setting, design) for design in (SEQUENTIAL, STREAMED, AHEAD, Design(3))]
    totals = [ends(result)[-1] for result in results]
    assert totals == sorted(totals, reverse=True)
    for result in results:
        last, total = result.marks[-1], ends(result)[-1]
        for lanes, busy_s in ((result.wrote, last.student_s), (result.scored, last.teacher_s)):
            assert busy_s == pytest.approx(sum(end - begin for lane in lanes for begin, end in lane))
        assert last.trainer_s == 20.0 * 16 == pytest.approx(sum(end - begin for begin, end in result.trained))
        assert last.teacher_s == pytest.approx(sum(0.125 * (9 + r.tokens) for step in steps for r in step.responses))
        assert result.num_events == 2 * 16 * 16
        parts = [result.shares(n, n + 1) for n in range(16)]
        assert sum(one.step_s for one in parts) == pytest.approx(total)
        whole = result.shares()
        assert all(0 < share < 1 for share in (whole.trainer, whole.student, whole.teacher))
        assert sum(one.student * one.step_s for one in parts) == pytest.approx(whole.student * total)


def test_work_grows_with_the_responses_and_not_faster() -> None:
    """Counted in looks at a server's pace: as many a response for 8 steps as for 64, in flight and with a queue."""

    def looks(number: int) -> float:
        count = itertools.count()

        def slowdown(taken: int) -> float:
            next(count)
            return 1.0

        play(
            steps_of([5, 9, 3, 7] * 8, number),
            replace(SETTING, student=Servers(2, 4, 1.0, slowdown=slowdown)),
            Design(4),
        )
        return next(count) / (32 * number)

    assert looks(64) <= 1.1 * looks(8)


def test_made_up_lengths_are_a_function_of_the_seed() -> None:
    """The same again, others for another seed, none above the cap, and with the mean that is told."""
    lengths = made_up_lengths(4096, 20_000, seed=3)
    assert lengths == made_up_lengths(4096, 20_000, seed=3) != made_up_lengths(4096, 20_000, seed=4)
    assert min(lengths) >= 1 and max(lengths) == 4096
    assert sum(lengths) / len(lengths) == pytest.approx(mean_length(4096), rel=0.01) == pytest.approx(2224, abs=1)
    assert lengths.count(4096) / len(lengths) == pytest.approx(1 / 12, rel=0.05)
    assert made_up_lengths(1, 10, seed=1) == [1] * 10


@pytest.mark.parametrize(
    ("steps", "setting", "design", "said"),
    [
        ([], SETTING, STREAMED, "steps = 0: must be one at least"),
        ([Step((), 1.0)], SETTING, STREAMED, "responses of step 0 = 0: must be one at least"),
        (steps_of([5, 0], 1), SETTING, STREAMED, "a response of step 0 = .*tokens=0"),
        (steps_of([5], 1, train_s=-1.0), SETTING, STREAMED, "train_s of step 0 = -1.0"),
        (steps_of([5], 1, train_s=float("inf")), SETTING, STREAMED, "train_s of step 0 = inf"),
        (steps_of([5], 1), replace(SETTING, sync_s=float("nan")), STREAMED, "sync_s = nan"),
        (
            steps_of([5], 1),
            replace(SETTING, student=Servers(0, 1, 1.0)),
            STREAMED,
            "student servers = .*a server and a seat",
        ),
        (
            steps_of([5], 1),
            replace(SETTING, student=Servers(1, 0, 1.0)),
            STREAMED,
            "student servers = .*a server and a seat",
        ),
        (
            steps_of([5], 1),
            replace(SETTING, teacher=Servers(1, 1, 0.0)),
            STREAMED,
            "teacher servers = .*take some time",
        ),
        (steps_of([5], 1), SETTING, Design(-1), "ahead = -1: must be at least 0"),
        (steps_of([5], 1), SETTING, Design(1, streams=False), "ahead = 1: must be 0"),
    ],
)
def test_numbers_without_a_meaning_are_refused(steps: list[Step], setting: Setting, design: Design, said: str) -> None:
    """By name, before anything is played."""
    with pytest.raises(ConfigError, match=said):
        play(steps, setting, design)
