r"""The tiny reasoning task: chained arithmetic, written out step by step, with a boxed answer.

In: a seed. Out: problems (``ChainProblem``), their prompts, worked solutions in sampled wording, and the JSONL files that
``recipes/tiny_models`` ships. A laptop can pre-train models on it within minutes, yet it has what a study of
distillation needs:

- answers take several dependent steps (2 to 6), so one wrong step spoils the answer and length matters;
- there are many right ways to write a solution (opening, wording of each step, optional checks, merged steps), so the
  teacher's distribution has entropy and several modes: forward KL must cover them, reverse KL may pick some;
- solutions take about 25 to 140 tokens, so response horizons and truncation bite.

    Start with 7. Step 1: add 5. Step 2: multiply by 3. Put the answer in \boxed{}.
    -> Let me check as I go. Step 1: 7+5=12. Check: 12-5=7. Step 2: multiply by 3, 12*3=36. The answer is \boxed{36}.

Everything is a function of its seed: ``held_out_problems`` is fixed once and for all, and ``sample_problems`` never yields
one of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Literal

Symbol = Literal["+", "-", "*", "/"]

MIN_STEPS, MAX_STEPS = 2, 6
MAX_VALUE = 50
NUM_HELD_OUT = 256
HELD_OUT_SEED = 20260516
TRAIN_SEED = 1

_INVERSE: dict[Symbol, Symbol] = {"+": "-", "-": "+", "*": "/", "/": "*"}
_VERBS: dict[Symbol, tuple[str, ...]] = {
    "+": ("add", "plus"),
    "-": ("subtract", "minus"),
    "*": ("multiply by", "times"),
    "/": ("divide by",),
}
_CAREFUL_OPENING = "Let me check as I go."
_OPENINGS = ("", "Let me work it out.", _CAREFUL_OPENING)
_CLOSINGS = ("The answer is", "So the result is", "We get")


@dataclass(frozen=True)
class Operation:
    """One step of a chain: ``symbol`` applied to the running value with a single-digit ``operand``."""

    symbol: Symbol
    operand: int

    def apply(self, value: int) -> int:
        """The next running value; divisions are exact by construction."""
        match self.symbol:
            case "+":
                return value + self.operand
            case "-":
                return value - self.operand
            case "*":
                return value * self.operand
            case "/":
                return value // self.operand


@dataclass(frozen=True)
class ChainProblem:
    """A start value and the operations to apply to it in order; every running value lies in 1..50."""

    start: int
    operations: tuple[Operation, ...]

    @property
    def answer(self) -> int:
        value = self.start
        for operation in self.operations:
            value = operation.apply(value)
        return value

    @property
    def id(self) -> str:
        """A readable key that determines the problem, e.g. ``7+5*3``; read left to right, without precedence."""
        return f"{self.start}" + "".join(f"{op.symbol}{op.operand}" for op in self.operations)

    def prompt(self) -> str:
        """The question in words; the wording is a function of the problem, so a problem has one prompt."""
        rng = random.Random(self.id)
        opening = rng.choice(("Start with", "Begin with", "Take"))
        steps = [f"Step {i}: {rng.choice(_VERBS[op.symbol])} {op.operand}." for i, op in enumerate(self.operations, 1)]
        return f"{opening} {self.start}. {' '.join(steps)} Put the answer in \\boxed{{}}."


def sample_problem(rng: random.Random) -> ChainProblem:
    """Draw a problem: the number of steps is uniform in 2..6, then each step's kind, then its operand."""
    start = value = rng.randint(2, 20)
    operations = []
    for _ in range(rng.randint(MIN_STEPS, MAX_STEPS)):
        operands: dict[Symbol, list[int]] = {
            "+": [k for k in range(1, 10) if value + k <= MAX_VALUE],
            "-": [k for k in range(1, 10) if value - k >= 1],
            "*": [k for k in range(2, 6) if value * k <= MAX_VALUE],
            "/": [k for k in range(2, 6) if value % k == 0],
        }
        symbol = rng.choice([symbol for symbol, choices in operands.items() if choices])
        operation = Operation(symbol, rng.choice(operands[symbol]))
        operations.append(operation)
        value = operation.apply(value)
    return ChainProblem(start, tuple(operations))


def _distinct_problems(rng: random.Random, excluded: frozenset[ChainProblem]) -> Iterator[ChainProblem]:
    seen = set(excluded)
    while True:
        problem = sample_problem(rng)
        if problem not in seen:
            seen.add(problem)
            yield problem


@cache
def held_out_problems() -> tuple[ChainProblem, ...]:
    """The 256 problems that no training stream contains; the same ones for every seed and caller."""
    return tuple(islice(_distinct_problems(random.Random(HELD_OUT_SEED), frozenset()), NUM_HELD_OUT))


def sample_problems(seed: int) -> Iterator[ChainProblem]:
    """Yields distinct training problems without end, none of them held out."""
    return _distinct_problems(random.Random(seed), frozenset(held_out_problems()))


def write_solution(problem: ChainProblem, rng: random.Random, error_rate_frac: float = 0.0) -> str:
    """Write one worked solution in sampled wording.

    Openings, wordings, checks and merges are drawn independently, so the number of right texts for a problem grows
    exponentially with its steps: this is where the teacher's entropy comes from.

    Args:
        problem: the problem to solve.
        rng: source of every choice.
        error_rate_frac: probability in [0, 1] that a step's result is written down wrong (and carried on). A corpus
            with errors makes a base model that knows the arithmetic but does not trust it.

    Returns:
        The text of a response, without a stop token. Its boxed answer is right if no error was drawn.
    """
    opening = rng.choice(_OPENINGS)
    sentences = [opening] if opening else []
    value, index, operations = problem.start, 0, problem.operations
    while index < len(operations):
        operation, last = operations[index], index + 1
        following = operations[last] if last < len(operations) else None
        if following and operation.symbol == following.symbol and operation.symbol in "+-" and rng.random() < 0.5:
            merged = Operation(operation.symbol, operation.operand + following.operand)
            lead = f"Steps {index + 1} and {index + 2}: {operation.operand}+{following.operand}={merged.operand},"
            operation, last = merged, index + 2
        else:
            lead = rng.choice((f"Step {index + 1}:", _worded_lead(index + 1, operation, rng)))
        result = operation.apply(value)
        if rng.random() < error_rate_frac:
            result = _mistaken(result, rng)
        sentences.append(f"{lead} {value}{operation.symbol}{operation.operand}={result}.")
        if opening == _CAREFUL_OPENING and rng.random() < 0.5:
            sentences.append(f"Check: {result}{_INVERSE[operation.symbol]}{operation.operand}={value}.")
        value, index = result, last
    return f"{' '.join(sentences)} {rng.choice(_CLOSINGS)} \\boxed{{{value}}}."


def _worded_lead(step: int, operation: Operation, rng: random.Random) -> str:
    return f"Step {step}: {rng.choice(_VERBS[operation.symbol])} {operation.operand},"


def _mistaken(result: int, rng: random.Random) -> int:
    """A plausible wrong result: off by one or two, or by a lost or extra carry."""
    return result + rng.choice((-10, -2, -1, 1, 2, 10))


def write_jsonl(path: Path, problems: list[ChainProblem], seed: int) -> None:
    """Write problems as JSONL records with the fields id, prompt, answer and solution (one drawn per problem)."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            record = {
                "id": problem.id,
                "prompt": problem.prompt(),
                "answer": str(problem.answer),
                "solution": write_solution(problem, rng),
            }
            file.write(json.dumps(record) + "\n")
