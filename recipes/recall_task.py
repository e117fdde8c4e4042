r"""The recall task: a chain of look-ups in tables that must be known by heart, by a writer who may hesitate.

In: a seed. Out: problems (``RecallProblem``), their prompts, worked solutions in sampled wording, and the JSONL files that
``recipes/recall_models`` ships. Ten tables, A to J, each map 32 numbers onto each other, at random: 320 facts, with no rule
behind them. A problem names a number and the tables to go through:

    14 E A F H        ->  14 E 23 ; 23 A 5 , 5 F 30 , 30 H wait 30 H 11 ; \boxed{ 11 }

Where arithmetic has too little room for failure (see ``tiny_task``), this has three things that a study of what goes wrong
needs:

- *the writer hesitates*: before it commits to a value it may write ``wait`` and put the look-up again. It hesitates again
  with a chance that rises with the hesitations before (``HAZARD``), as in language models that think aloud. So the more a
  response hesitates, the more likely the teacher itself finds the next ``wait``: it is reliable on its own
  prefixes, which seldom loop, and unreliable on those of a student that does;
- *a student can be wrong about facts* rather than unsure of the format: ``confused_facts`` makes its tables partly wrong;
- *an answer may never come*: nothing but the value itself ends a hesitation.

It is built so: what it shows is what such a teacher and student do, and no evidence of why larger ones fail.
Everything is a function of its seed. Problems have 4 to 6 look-ups; those of 7 (``HARD_STEPS``) are a level that no
distillation trains on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

NUM_VALUES = 32
TABLES = "ABCDEFGHIJ"
MIN_STEPS, MAX_STEPS, HARD_STEPS = 4, 6, 7
WAIT = "wait"
SEPARATORS = (";", ",")  # either ends a look-up, at even odds: the entropy of a writer who does not hesitate

TABLE_SEED, TRAIN_SEED, HELD_OUT_SEED, HARD_SEED = 51, 1, 20260516, 20260517
NUM_HELD_OUT, NUM_HARD = 512, 256

Fact = tuple[str, int]
"""A table's name and the number looked up in it."""

Hazard = tuple[float, ...]
"""Chance of one more ``wait`` after 0, 1, 2, ... in a row; the last holds for ever after."""

HAZARD: Hazard = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.92)
FLAT_HAZARD: Hazard = (0.15,)
STUDENT_HAZARD: Hazard = (0.03,)


@cache
def facts() -> Mapping[Fact, int]:
    """The 320 right facts."""
    rng = random.Random(TABLE_SEED)
    return {
        (table, number): value
        for table in TABLES
        for number, value in enumerate(rng.sample(range(NUM_VALUES), NUM_VALUES))
    }


def confused_facts(share_frac: float, seed: int) -> Mapping[Fact, int]:
    """A wrong value for a share of the facts, drawn anew: what a student believes beside the right ones.

    Args:
        share_frac: of the facts, in [0, 1].
        seed: of the choice.
    """
    rng = random.Random(seed)
    chosen = rng.sample(sorted(facts()), round(share_frac * len(facts())))
    return {fact: rng.choice([value for value in range(NUM_VALUES) if value != facts()[fact]]) for fact in chosen}


@dataclass(frozen=True)
class RecallProblem:
    """A number and the tables that it goes through in order, none of them twice."""

    start: int
    tables: str

    @property
    def answer(self) -> int:
        """The last value."""
        value = self.start
        for table in self.tables:
            value = facts()[table, value]
        return value

    @property
    def id(self) -> str:
        """A readable key that determines the problem, e.g. ``14-EAFH``."""
        return f"{self.start}-{self.tables}"

    def prompt(self) -> str:
        """The question: the number and the tables, as words."""
        return " ".join((str(self.start), *self.tables))


class OpenBookProblem(RecallProblem):
    """The same with the facts that it needs before it, as solutions put them, in an order of its own: what has to be known by
    heart otherwise.

        30 H 11 ; 23 A 5 ; 14 E 23 ; 5 F 30 ; 14 E A F H
    """

    def prompt(self) -> str:
        """The facts, then the question."""
        return f"{self.page()} {super().prompt()}"

    def page(self) -> str:
        """The facts alone."""
        number, entries = self.start, []
        for table in self.tables:
            found = facts()[table, number]
            entries.append(f"{number} {table} {found} ;")
            number = found
        random.Random(self.id).shuffle(entries)
        return " ".join(entries)


class OtherPageProblem(OpenBookProblem):
    """The same question behind as many facts of the same tables that it does not need: the look-ups from the next number on."""

    def page(self) -> str:
        """The facts alone."""
        return OpenBookProblem((self.start + 1) % NUM_VALUES, self.tables).page()


def sample_problem(rng: random.Random, min_steps: int = MIN_STEPS, max_steps: int = MAX_STEPS) -> RecallProblem:
    """Draw a problem: the number of look-ups is uniform between the two, then the start, then the tables."""
    num_steps = rng.randint(min_steps, max_steps)
    return RecallProblem(rng.randrange(NUM_VALUES), "".join(rng.sample(TABLES, num_steps)))


def _distinct(
    rng: random.Random, excluded: frozenset[RecallProblem], steps: tuple[int, int]
) -> Iterator[RecallProblem]:
    seen = set(excluded)
    while True:
        problem = sample_problem(rng, *steps)
        if problem not in seen:
            seen.add(problem)
            yield problem


@cache
def held_out_problems() -> tuple[RecallProblem, ...]:
    """The 512 problems of 4 to 6 look-ups that no training stream contains."""
    return tuple(islice(_distinct(random.Random(HELD_OUT_SEED), frozenset(), (MIN_STEPS, MAX_STEPS)), NUM_HELD_OUT))


@cache
def hard_problems() -> tuple[RecallProblem, ...]:
    """The 256 problems of 7 look-ups, a level that distillation never trains on."""
    return tuple(islice(_distinct(random.Random(HARD_SEED), frozenset(), (HARD_STEPS, HARD_STEPS)), NUM_HARD))


def sample_problems(seed: int, max_steps: int = MAX_STEPS) -> Iterator[RecallProblem]:
    """Yields distinct training problems without end, none of them held out.

    Args:
        seed: of the stream.
        max_steps: the most look-ups; pre-training goes to ``HARD_STEPS``, so that every model knows how that level is written.
    """
    excluded = frozenset((*held_out_problems(), *hard_problems()))
    return _distinct(random.Random(seed), excluded, (MIN_STEPS, max_steps))


@dataclass(frozen=True)
class Writer:
    """Who writes a solution: how it hesitates, and what it takes for true.

    Attributes:
        hazard: of hesitating.
        confused: wrong beliefs, as ``confused_facts`` makes them.
        wrong_frac: how often a confused fact is written wrong; else it is right.
    """

    hazard: Hazard
    confused: Mapping[Fact, int]
    wrong_frac: float

    def write(self, problem: RecallProblem, rng: random.Random) -> str:
        """One solution in sampled wording, without a stop token; what is written wrong is carried on."""
        words: list[str] = []
        value = problem.start
        for table in problem.tables:
            asked = [str(value), table]
            words += asked
            streak = 0
            while rng.random() < self.hazard[min(streak, len(self.hazard) - 1)]:
                words += [WAIT, *asked]
                streak += 1
            believed = self.confused.get((table, value))
            is_wrong = believed is not None and rng.random() < self.wrong_frac
            value = believed if believed is not None and is_wrong else facts()[table, value]
            words += [str(value), rng.choice(SEPARATORS)]
        return " ".join((*words, "\\boxed{", str(value), "}"))


RIGHT = Writer(HAZARD, {}, 0.0)
"""Knows every fact: what the teacher learns from."""


def write_jsonl(path: Path, problems: list[RecallProblem], seed: int) -> None:
    """Write problems as JSONL records with the fields id, prompt, answer, steps and solution (one drawn per problem)."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            record = {
                "id": problem.id,
                "prompt": problem.prompt(),
                "answer": str(problem.answer),
                "steps": len(problem.tables),
                "solution": RIGHT.write(problem, rng),
            }
            file.write(json.dumps(record) + "\n")
