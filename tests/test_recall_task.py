"""The recall task: deterministic, disjoint, right by its own tables, with writers that hesitate and err as they are told."""

import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from megatron_distill.recipes import recall
from megatron_distill.recipes.recall_task import (
    HARD_STEPS,
    HAZARD,
    MAX_STEPS,
    MIN_STEPS,
    NUM_VALUES,
    RIGHT,
    TABLES,
    WAIT,
    OpenBookProblem,
    RecallProblem,
    Writer,
    confused_facts,
    facts,
    hard_problems,
    held_out_problems,
    sample_problems,
    write_jsonl,
)

from megatron_distill.models.vocabulary import load_vocabulary
from megatron_distill.rewards.math_verifier import MathVerifier
from megatron_distill.rollouts.problems import load_problems
from megatron_distill.types import Message, Problem

PROBLEMS = list(islice(sample_problems(7), 300))


def looked_up(text: str) -> list[tuple[str, int, int]]:
    """(table, number, value) of every look-up of a solution that reached a value."""
    words = text.split()
    return [
        (words[i], int(words[i - 1]), int(words[i + 1]))
        for i in range(1, len(words) - 1)
        if words[i] in TABLES and words[i + 1].isdigit()
    ]


def test_every_table_is_a_permutation() -> None:
    """No value is lost or met twice, so that no answer is likelier than another."""
    for table in TABLES:
        assert sorted(facts()[table, number] for number in range(NUM_VALUES)) == list(range(NUM_VALUES))


def test_levels_are_disjoint_and_repeat_by_seed() -> None:
    """A seed determines its problems; 4 to 6 look-ups, none of them held out; the hard level is longer than all of them."""
    assert list(islice(sample_problems(7), 300)) == PROBLEMS
    assert {len(problem.tables) for problem in PROBLEMS} == set(range(MIN_STEPS, MAX_STEPS + 1))
    assert {len(problem.tables) for problem in hard_problems()} == {HARD_STEPS}
    assert set(PROBLEMS).isdisjoint((*held_out_problems(), *hard_problems()))
    assert set(islice(sample_problems(1, HARD_STEPS), 3000)).isdisjoint((*held_out_problems(), *hard_problems()))


def test_right_solutions_are_right_step_by_step(tmp_path: Path) -> None:
    """Every look-up holds, hesitations or not; the files load, and each solution earns the reward."""
    write_jsonl(tmp_path / "train.jsonl", PROBLEMS, seed=1)
    problems = load_problems(str(tmp_path / "train.jsonl"))
    for problem in problems:
        steps = looked_up(problem.solution or "")
        assert all(facts()[table, number] == value for table, number, value in steps)
        assert "".join(table for table, _, _ in steps) == problem.id.split("-")[1]
    rewards = MathVerifier().verify([p.solution or "" for p in problems], [p.answer for p in problems])
    assert rewards == [1.0] * len(problems)


def test_the_open_book_holds_the_facts_of_the_solution_in_another_order() -> None:
    """Each look-up once, before the same question; the longest that the recipe's teacher is shown is as long as it may be. The
    page of the control tells as many, and none of these."""
    config = recall.self_distillation()
    vocabulary = load_vocabulary(config.student.path, config.teacher.path, config.rollouts.stop_tokens)
    problems = held_out_problems()[:64]
    in_order, longest = 0, 0
    for problem in problems:
        prompt = OpenBookProblem(problem.start, problem.tables).prompt()
        book, _, question = prompt.rpartition(" ; ")
        needed = looked_up(RIGHT.write(problem, random.Random(0)))
        assert question == problem.prompt() and sorted(looked_up(f"{book} ;")) == sorted(needed)
        in_order += looked_up(f"{book} ;") == needed
        ids = recall.open_book(vocabulary.tokenizer, Problem(problem.id, (Message("user", question),), ""))
        assert prompt in vocabulary.decode(ids)
        shown = recall.another_page(vocabulary.tokenizer, Problem(problem.id, (Message("user", question),), ""))
        page, _, asked = vocabulary.decode(shown).rpartition(" ; ")
        assert asked.startswith(question) and len(looked_up(f"{page} ;")) == len(needed)
        assert not set(looked_up(f"{page} ;")) & set(needed)
        longest = max(longest, len(ids))
    assert in_order < len(problems) / 8 and longest == config.teacher.max_prompt_tokens


def test_hesitation_feeds_itself() -> None:
    """The chance of one more `wait` after k of them is the hazard's, and the look-up is put again each time."""
    rng, seen, again = random.Random(0), Counter[int](), Counter[int]()
    for _ in range(3000):
        text = RIGHT.write(RecallProblem(3, "ABCD"), rng)
        assert text.count(WAIT) == sum(
            text.count(f"{WAIT} {pair}") for pair in {f"{n} {t}" for t, n, _ in looked_up(text)}
        )
        streak = 0
        for word in text.split():
            if word == WAIT:
                again[streak] += 1
                seen[streak] += 1
                streak += 1
            elif word in ";,":
                seen[streak] += 1
                streak = 0
    for streak in range(4):
        assert again[streak] / seen[streak] == pytest.approx(HAZARD[streak], abs=0.05)


def test_a_confused_writer_is_wrong_as_often_as_told() -> None:
    """60% of the facts have a wrong value beside the right one; it is written 75% of the time, and carried on."""
    confused = confused_facts(0.6, seed=1)
    assert len(confused) == 192 and all(facts()[fact] != value for fact, value in confused.items())
    writer, rng, wrong, met = Writer((0.03,), confused, 0.75), random.Random(0), 0, 0
    for problem in PROBLEMS:
        for table, number, value in looked_up(writer.write(problem, rng)):
            assert value in (facts()[table, number], confused.get((table, number)))
            met += (table, number) in confused
            wrong += value != facts()[table, number]
    assert wrong / met == pytest.approx(0.75, abs=0.05)
