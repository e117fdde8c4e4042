"""The shipped tiny models: one tokenizer, two Qwen3 shapes, a teacher clearly above a student that can still learn."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from megatron_distill.recipes.tiny_task import TRAIN_SEED, held_out_problems, sample_problems, write_jsonl

from megatron_distill import recipes
from megatron_distill.models.vocabulary import end_token_ids
from megatron_distill.rollouts.problems import load_problems
from megatron_distill.rollouts.prompts import encode_prompt
from tests.support.tools import tool

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODELS = Path(recipes.__file__).parent / "tiny_models"
ROLES = ("teacher", "student")
STOP_TOKENS = {"teacher": "<|im_end|>", "student": "<|endoftext|>"}


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """The tool that makes the models."""
    return tool("make_tiny_models")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {role: transformers.AutoTokenizer.from_pretrained(MODELS / role) for role in ROLES}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        role: transformers.AutoModelForCausalLM.from_pretrained(MODELS / role, dtype=torch.float32) for role in ROLES
    }


class TestTokenizer:
    """A byte-level BPE tokenizer, the same on both sides but for its end-of-sequence token."""

    def test_both_sides_share_every_token(self, tokenizers: dict[str, Any]) -> None:
        """Distillation compares distributions over ids, so both vocabularies are equal token by token."""
        assert tokenizers["teacher"].get_vocab() == tokenizers["student"].get_vocab()
        assert {role: tokenizers[role].eos_token for role in ROLES} == STOP_TOKENS

    def test_digits_are_single_and_text_survives(self, tokenizers: dict[str, Any]) -> None:
        """No token holds two digits; any text, Unicode too, is decoded as it was encoded."""
        tokenizer = tokenizers["teacher"]
        assert not [token for token in tokenizer.get_vocab() if sum(char.isdigit() for char in token) > 1]
        for text in ("Step 1: 12+30=42. The answer is \\boxed{42}.", "  two  spaces\n\ttab", "Ünïcødé 漢字 🙂"):
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text

    def test_chat_template_is_chatml(self, tokenizers: dict[str, Any]) -> None:
        """A prompt ends where the assistant begins, and is exactly what the models were pre-trained on."""
        problem = load_problems(str(MODELS / "heldout.jsonl"))[0]
        ids = encode_prompt(tokenizers["student"], problem)
        text = problem.messages[0].content
        assert tokenizers["student"].decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"

    def test_tokenizer_is_reproducible(self, maker: ModuleType, tokenizers: dict[str, Any]) -> None:
        """The tool makes the shipped tokenizer again."""
        assert maker.train_tokenizer().get_vocab() == tokenizers["teacher"].get_vocab()


class TestDirectories:
    """What the servers, the converter and Megatron rely on."""

    @pytest.mark.parametrize("role", ROLES)
    def test_shapes_split_in_two(self, role: str, tokenizers: dict[str, Any]) -> None:
        """Heads, groups, widths and vocabulary divide by 2, for tensor parallelism; every token id has a row."""
        config = transformers.AutoConfig.from_pretrained(MODELS / role)
        assert config.model_type == "qwen3"
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.hidden_size, config.intermediate_size)
        assert all(size % 2 == 0 for size in (*sizes, config.vocab_size, config.num_hidden_layers))
        assert config.vocab_size == len(tokenizers[role])

    def test_they_end_as_published_models_do(self) -> None:
        """The base student with its own token alone, the chat teacher with its own, or the base model's."""
        assert end_token_ids(MODELS / "student") == (0,)
        assert end_token_ids(MODELS / "teacher") == (2, 0)

    def test_they_are_small(self) -> None:
        """All files together stay under 3 MB, and each problem file under 300 KB: they travel with the package."""
        sizes = {path.name: path.stat().st_size for path in MODELS.rglob("*") if path.is_file()}
        assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 3e6
        assert sizes["train.jsonl"] < 300e3
        assert sizes["heldout.jsonl"] < 300e3

    def test_problem_files_are_reproducible(self, maker: ModuleType, tmp_path: Path) -> None:
        """The task makes the shipped files again, byte by byte."""
        train = list(islice(sample_problems(TRAIN_SEED), maker.NUM_TRAIN_PROBLEMS))
        for name, problems in {"train.jsonl": train, "heldout.jsonl": list(held_out_problems())}.items():
            write_jsonl(tmp_path / name, problems, seed=TRAIN_SEED)
            assert (tmp_path / name).read_bytes() == (MODELS / name).read_bytes()


@pytest.mark.slow
class TestAccuracy:
    """The gap that distillation is to close, at temperature 1 on held-out problems."""

    def test_teacher_solves_the_task(
        self, maker: ModuleType, models: dict[str, Any], tokenizers: dict[str, Any]
    ) -> None:
        """The teacher is right at least 9 times in 10."""
        problems = list(held_out_problems())[:128]
        assert maker.measure_accuracy(models["teacher"], tokenizers["teacher"], problems, sample=True) >= 0.9

    def test_student_leaves_room(self, maker: ModuleType, models: dict[str, Any], tokenizers: dict[str, Any]) -> None:
        """The student is sometimes right, so that it has something to build on, and mostly wrong."""
        problems = list(held_out_problems())[:128]
        assert 0.1 <= maker.measure_accuracy(models["student"], tokenizers["student"], problems, sample=True) <= 0.5

    def test_stored_accuracies_are_those_of_the_files(self) -> None:
        """`accuracy.json` tells both models' held-out accuracies, greedy and sampled."""
        accuracies = json.loads((MODELS / "accuracy.json").read_text())
        assert {role: set(accuracies[role]) for role in ROLES} == {role: {"greedy", "temperature_1"} for role in ROLES}


@pytest.mark.slow
def test_the_tool_makes_loadable_models(maker: ModuleType, tmp_path: Path) -> None:
    """One training step of the tool ends in a directory that transformers loads, with bfloat16 weights."""
    role = replace(maker.STUDENT, num_steps=1)
    accuracy = maker.make_model(role, maker.train_tokenizer(), tmp_path, list(held_out_problems())[:2])
    assert accuracy["greedy"] == 0.0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto")
    assert model.dtype == torch.bfloat16
