"""The shipped models of the recall task: one vocabulary, and what their study rests on, measured from the files."""

import json
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from megatron_distill.recipes.recall_task import (
    TRAIN_SEED,
    RecallProblem,
    hard_problems,
    held_out_problems,
    sample_problems,
    write_jsonl,
)

from megatron_distill import recipes
from megatron_distill.models.vocabulary import load_vocabulary
from tests.support.tools import tool

MODELS = Path(recipes.__file__).parent / "recall_models"
STOP_TOKENS = ("<|endoftext|>", "<|im_end|>")


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """The tool that makes the models."""
    return tool("make_recall_models")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return json.loads((MODELS / "measured.json").read_text())


@pytest.mark.parametrize("teacher", ["teacher", "teacher_flat", "reader"])
def test_they_share_a_vocabulary_in_which_a_word_is_a_token(teacher: str) -> None:
    """64 tokens on both sides; a solution has as many tokens as words, and survives decoding, with its box."""
    vocabulary = load_vocabulary(MODELS / "student", MODELS / teacher, STOP_TOKENS)
    assert vocabulary.size == 64 and len(vocabulary.stop_token_ids) == 2
    text = "14 E 23 ; 23 A wait 23 A 5 , \\boxed{ 5 }"
    ids = vocabulary.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.split()) and vocabulary.decode(ids) == text


def test_each_model_ends_with_a_stop_token_of_its_own() -> None:
    """The pair that a base student and a chat teacher bring along: whoever sets no stop tokens for a run has both."""
    configs = {name: json.loads((MODELS / name / "config.json").read_text()) for name in ("student", "teacher")}
    assert configs["student"]["eos_token_id"] != configs["teacher"]["eos_token_id"]


def test_problem_files_are_reproducible(maker: ModuleType, tmp_path: Path) -> None:
    """The task makes the shipped files again, byte by byte, and the tool their tokenizer."""
    files: dict[str, list[RecallProblem]] = {
        "train.jsonl": list(islice(sample_problems(TRAIN_SEED), maker.NUM_TRAIN_PROBLEMS)),
        "heldout.jsonl": list(held_out_problems()),
        "hard.jsonl": list(hard_problems()),
    }
    for name, problems in files.items():
        write_jsonl(tmp_path / name, problems, seed=TRAIN_SEED)
        assert (tmp_path / name).read_bytes() == (MODELS / name).read_bytes()
    shipped = load_vocabulary(MODELS / "student", MODELS / "teacher", STOP_TOKENS).tokenizer
    assert maker.make_tokenizer().get_vocab() == shipped.get_vocab()


def test_the_teacher_is_good_by_itself_and_hesitates_more_the_longer_it_has(measured: dict[str, Any]) -> None:
    """Right 8 times in 10 with at most 3% cut; the hazard starts low, rises with every `wait`, and ends above 0.8."""
    alone, hazard = measured["teacher"]["held out"], measured["teacher"]["hazard"]
    assert alone["accuracy"] >= 0.8 and alone["truncated_frac"] <= 0.03
    assert hazard[0] < 0.25 and all(before < after for before, after in pairwise(hazard[:6]))
    assert hazard[-1] > 0.8


def test_the_control_teacher_hesitates_alike_each_time(measured: dict[str, Any]) -> None:
    """As good, without a loop that feeds itself: by the fourth `wait` its hazard is below half the other's."""
    flat = measured["teacher_flat"]
    assert flat["held out"]["accuracy"] >= 0.8 and flat["held out"]["truncated_frac"] <= 0.01
    assert all(flat["hazard"][streak] < measured["teacher"]["hazard"][streak] / 2 for streak in range(3, 6))


def test_the_student_is_mostly_wrong_and_hardly_hesitates(measured: dict[str, Any]) -> None:
    """It knows the format, ends every response, and hesitates seldom but not never, so that reverse KL can find it."""
    student = measured["student"]
    assert 0.0 < student["held out"]["accuracy"] <= 0.15 and student["held out"]["truncated_frac"] <= 0.01
    assert 0.005 < student["hazard"][0] < 0.1


def test_the_reader_is_as_wrong_as_the_student_by_heart_and_right_with_the_book(measured: dict[str, Any]) -> None:
    """Of the student's size: what it can teach itself is all in the book, of a level that it is not distilled on too."""
    reader = measured["reader"]
    assert reader["held out"]["accuracy"] <= 0.15 and reader["held out"]["truncated_frac"] <= 0.01
    assert reader["held out, open book"]["accuracy"] >= 0.85 and reader["hard, open book"]["accuracy"] >= 0.7
    sizes = [(MODELS / name / "model.safetensors").stat().st_size for name in ("reader", "student")]
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "teacher_flat", "student", "reader"])
def test_what_is_stored_is_what_the_files_do(maker: ModuleType, measured: dict[str, Any], name: str) -> None:
    """The hazards in `measured.json` are those of the weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype="float32")
    hazard = maker.measure_hazard(model, AutoTokenizer.from_pretrained(MODELS / name))
    assert hazard == pytest.approx(measured[name]["hazard"], abs=0.005)
