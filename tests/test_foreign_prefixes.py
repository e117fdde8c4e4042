"""A teacher that continues a student's responses: what it is given, and how its accuracy is counted."""

from pathlib import Path

import pytest

from megatron_distill import recipes
from megatron_distill.errors import DataError
from megatron_distill.models.vocabulary import load_vocabulary
from megatron_distill.rollouts.prompts import encode_prompt
from megatron_distill.study.foreign_prefixes import accuracy_by_share, cut, records_of, with_prefix
from megatron_distill.types import Message, Problem

MODELS = Path(recipes.__file__).parent / "recall_models"
RESPONSE = "3 A 5 ; 5 B 7 , \\boxed{ 7 }"


@pytest.mark.parametrize(
    ("share", "kept"), [(0.0, ""), (0.5, "3 A 5 ; 5 B"), (0.75, "3 A 5 ; 5 B 7 ,"), (1.0, "3 A 5 ; 5 B 7 ,")]
)
def test_a_response_is_cut_before_its_answer(share: float, kept: str) -> None:
    """A share of the words from the first on; the answer is left for the teacher, however much is given."""
    assert cut(RESPONSE, share) == kept


def test_every_response_is_continued_from_every_share() -> None:
    """Two responses to one problem stay apart, each with the record's own prompt and answer; an unknown problem is refused."""
    problems = {"3-AB": {"id": "3-AB", "prompt": "3 A B", "answer": "7"}}
    responses = [{"id": "3-AB", "response": RESPONSE}, {"id": "3-AB", "response": "3 A 9 ;"}]
    records = records_of(responses, problems, (0.0, 0.5))
    assert [(one["id"], one["prefix"]) for one in records] == [
        ("0@0.0", ""),
        ("0@0.5", "3 A 5 ; 5 B"),
        ("1@0.0", ""),
        ("1@0.5", "3 A"),
    ]
    assert {(one["prompt"], one["answer"]) for one in records} == {("3 A B", "7")}
    with pytest.raises(DataError, match="hold no '9-C'"):
        records_of([{"id": "9-C", "response": ""}], problems, (0.5,))


def test_accuracy_is_counted_by_share() -> None:
    """Over all responses that were given as much."""
    judged = [("0@0.0", True), ("0@0.5", False), ("1@0.0", True), ("1@0.5", True)]
    assert accuracy_by_share([{"id": name, "correct": right} for name, right in judged]) == {"0.0": 1.0, "0.5": 0.5}


def test_the_teacher_sees_the_prompt_and_then_the_students_words() -> None:
    """The prompt as any run builds it, followed by the prefix as the student's own tokens."""
    tokenizer = load_vocabulary(MODELS / "student", MODELS / "teacher", ()).tokenizer
    problem = Problem("0", (Message("user", "3 A B"),), "7", columns={"prefix": "3 A 5 ;"})
    ids = with_prefix(tokenizer, problem)
    prompt = encode_prompt(tokenizer, problem)
    assert ids[: len(prompt)] == prompt and tokenizer.decode(ids[len(prompt) :]) == "3 A 5 ;"
