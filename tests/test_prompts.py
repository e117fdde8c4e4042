"""Problems: strict reading, prompt ids as the chat template means them, and an order that a resumed run repeats."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron_distill.recipes.tiny import MODELS

from megatron_distill.config import DataConfig
from megatron_distill.errors import ConfigError, DataError
from megatron_distill.rollouts.problems import load_problems
from megatron_distill.rollouts.prompts import encode_prompt, encode_prompts, load_prompt_set
from megatron_distill.types import Message, Problem

WriteLines = Callable[..., Path]


@pytest.fixture
def write_lines(tmp_path: Path) -> WriteLines:
    def write(*records: Any) -> Path:
        path = tmp_path / "problems.jsonl"
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


def numbered_problems(count: int) -> list[Problem]:
    return [Problem(str(i), (Message("user", f"question {i}"),), str(i)) for i in range(count)]


def test_strings_and_chats_are_read(write_lines: WriteLines) -> None:
    """A string prompt is one user turn, a list is a chat, and absent ids are positions."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    path = write_lines({"prompt": "2+2?", "answer": 4}, {"messages": chat, "answer": " 2 ", "solution": "1+1=2."})
    first, second = load_problems(str(path))
    assert first == Problem("0", (Message("user", "2+2?"),), "4")
    assert second == Problem("1", (Message("system", "Be brief."), Message("user", "1+1?")), "2", "1+1=2.")


def test_gsm8k_columns_marker_and_instruction(write_lines: WriteLines) -> None:
    """Other data sets' columns are named by keys; the answer can be cut from a worked solution."""
    path = write_lines({"question": "How many eggs?", "answer": "9 #### is odd\n#### 18"})
    (problem,) = load_problems(str(path), prompt_key="question", answer_marker="####", instruction="Use a box.")
    assert problem.answer == "18"
    assert problem.messages == (Message("user", "How many eggs?\n\nUse a box."),)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("", "blank"),
        ("{'prompt': 1}", "not JSON"),
        ("[1, 2]", "must be a JSON object"),
        ({"text": "hi", "answer": "1"}, "data.prompt_key"),
        ({"prompt": "   ", "answer": "1"}, "non-empty string or list"),
        ({"prompt": [{"role": "robot", "content": "hi"}], "answer": "1"}, "a role of"),
        ({"prompt": [{"role": "assistant", "content": "hi"}], "answer": "1"}, "last turn must be the user's"),
        ({"prompt": "hi"}, "data.answer_key"),
        ({"prompt": "hi", "answer": ""}, "data.answer_key"),
        ({"prompt": "hi", "answer": True}, "data.answer_key"),
        ({"prompt": "hi", "answer": "1", "solution": 3}, "solution = 3"),
    ],
)
def test_bad_records_are_refused_by_line(write_lines: WriteLines, record: Any, said: str) -> None:
    """The first record that is no problem is refused with its file, its line and the remedy."""
    path = write_lines({"prompt": "1+1?", "answer": "2", "id": "a"}, record)
    with pytest.raises(DataError) as caught:
        load_problems(str(path))
    assert f"{path}:2" in str(caught.value)
    assert said in str(caught.value)


def test_a_config_reaches_every_reader(tmp_path: Path, write_lines: Any) -> None:
    """Marker, instruction and template options come from ``data``, whoever reads: training, evaluation, the checks."""
    path = write_lines({"question": "1+1?", "answer": "two #### 2"})
    seen: dict[str, Any] = {}

    class Tokenizer:
        chat_template = "x"

        def apply_chat_template(self, messages: Any, **options: Any) -> list[int]:
            seen.update(options, messages=messages)
            return [1]

    data = DataConfig(
        prompt_key="question", answer_marker="####", instruction="Box it.", template_options={"enable_thinking": False}
    )
    loaded = load_prompt_set(str(path), data, Tokenizer())  # type: ignore[arg-type]
    assert loaded.problems[0].answer == "2"
    assert seen["enable_thinking"] is False
    assert seen["messages"] == [{"role": "user", "content": "1+1?\n\nBox it."}]


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    """A missing, empty or foreign file says what to do about it."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "problems.txt").touch()
    (tmp_path / "folder").mkdir()
    for name, said in {
        "absent.jsonl": "no such file",
        "empty.jsonl": "at least one problem",
        "problems.txt": ".csv",
        "folder": "save_to_disk",
    }.items():
        with pytest.raises(DataError, match=said):
            load_problems(str(tmp_path / name))


class TestEncodePrompt:
    """Prompt ids are the chat template's, once each."""

    @staticmethod
    def tokenizer(chat_template: str | None) -> Any:
        """A word-level tokenizer that, like Llama's, prepends BOS when it encodes plain text."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        words = ["<s>", "<user>", "<think>", "<assistant>", "how", "many", "?"]
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
        wrapped.chat_template = chat_template
        return wrapped

    template = (
        "{{ bos_token }}{% for m in messages %} <{{ m.role }}> {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} <assistant>{% endif %}{% if enable_thinking %} <think>{% endif %}"
    )

    def test_bos_is_written_once(self) -> None:
        """A template that writes BOS under a tokenizer that adds it yields one BOS, and the generation prompt."""
        problem = Problem("0", (Message("user", "how many ?"),), "1")
        assert encode_prompt(self.tokenizer(self.template), problem) == [0, 1, 4, 5, 6, 3]

    def test_template_options_reach_the_template(self) -> None:
        """Options such as Qwen3's enable_thinking are variables of the template."""
        problem = Problem("0", (Message("user", "how"),), "1")
        assert encode_prompt(self.tokenizer(self.template), problem, {"enable_thinking": True}) == [0, 1, 4, 3, 2]

    def test_missing_template_is_refused(self) -> None:
        """Without a chat template there is no right prompt to guess."""
        with pytest.raises(DataError, match="no chat template"):
            encode_prompt(self.tokenizer(None), numbered_problems(1)[0])


def test_a_model_without_an_end_token_is_refused(tmp_path: Path) -> None:
    """Nothing would end a response: told before servers start, with what to type."""
    from megatron_distill.models.vocabulary import load_vocabulary

    TestEncodePrompt.tokenizer("x").save_pretrained(tmp_path)
    config = json.loads((MODELS / "student" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    with pytest.raises(ConfigError, match=r"rollouts.stop_tokens = \[\]: .* name no end token.*'<s>'"):
        load_vocabulary(tmp_path, tmp_path, ())


def models_that_end_with(folder: Path, student: int | list[int], teacher: int | list[int]) -> tuple[Path, Path]:
    """Copies of the tiny models whose generation configs name other end tokens."""
    for role, ids in (("student", student), ("teacher", teacher)):
        shutil.copytree(MODELS / role, folder / role)
        (folder / role / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder / "student", folder / "teacher"


def test_by_default_every_token_that_ends_either_model_stops(tmp_path: Path) -> None:
    """Those of the tokenizers first, then what the models' files name besides, as Llama's three are; one without a file too."""
    from megatron_distill.models.vocabulary import load_vocabulary

    student, teacher = models_that_end_with(tmp_path, 0, [2, 1])
    assert load_vocabulary(student, teacher, ()).stop_token_ids == (0, 2, 1)
    (teacher / "generation_config.json").unlink()
    assert load_vocabulary(student, teacher, ()).stop_token_ids == (0, 2)


def test_a_token_that_ends_the_students_responses_unnamed_is_refused(tmp_path: Path) -> None:
    """SGLang would end responses there, and the loss never know; what ends the teacher's alone may be left out."""
    from megatron_distill.models.vocabulary import load_vocabulary, require_named_ends

    student, teacher = models_that_end_with(tmp_path, [0, 2], [2, 0])
    own = load_vocabulary(student, teacher, ["<|endoftext|>"])
    both = load_vocabulary(student, teacher, ["<|im_end|>", "<|endoftext|>"])
    assert (own.stop_token_ids, both.stop_token_ids) == ((0,), (2, 0))
    require_named_ends(both, student)
    with pytest.raises(ConfigError, match=r"stop_tokens = .*ends responses at <\|im_end\|> too.*Name it as well"):
        require_named_ends(own, student)
    (student / "generation_config.json").write_text('{"eos_token_id": 0}')
    require_named_ends(own, student)
    (student / "generation_config.json").write_text('{"eos_token_id": "two"}')
    with pytest.raises(DataError, match=r"generation_config.json: is no generation config .*Download the model again"):
        load_vocabulary(student, teacher, ())


def test_an_embedding_that_does_not_hold_the_tokenizers_ids_is_told_of_its_model(tmp_path: Path) -> None:
    """A teacher's that was trimmed is not the student's damage."""
    from megatron_distill.models.vocabulary import load_vocabulary

    shutil.copytree(MODELS / "teacher", tmp_path / "teacher")
    config = tmp_path / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 8}))
    with pytest.raises(DataError, match=r"^teacher.path = .*/teacher: .* the teacher's embedding holds only 8\."):
        load_vocabulary(MODELS / "student", tmp_path / "teacher", ())


def test_many_prompts_at_once_are_those_of_one_by_one() -> None:
    """Chunks are for speed alone."""
    tokenizer, template = TestEncodePrompt.tokenizer(TestEncodePrompt.template), {"enable_thinking": True}
    words = ("how many ?", "how ?", "many")
    problems = [Problem(str(n), (Message("user", text),), "1") for n, text in enumerate(words)]
    together = encode_prompts(tokenizer, problems, template)
    assert together == [encode_prompt(tokenizer, problem, template) for problem in problems]


@pytest.mark.slow
def test_a_template_option_that_is_not_read_is_refused(write_lines: WriteLines) -> None:
    """Jinja passes over an unknown variable: a typo would train on other prompts without a word."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "student")
    tokenizer.chat_template += "{% if enable_thinking is false %}<think></think>{% endif %}"
    path = str(write_lines({"prompt": "1+1?", "answer": "2"}))
    plain, without = (
        load_prompt_set(path, DataConfig(template_options=options), tokenizer).prompts[0]
        for options in ({}, {"enable_thinking": False})
    )
    assert len(without) > len(plain)
    with pytest.raises(
        DataError, match=r"enable_thinkin = False.*reads no such variable.*Did you mean enable_thinking"
    ):
        load_prompt_set(path, DataConfig(template_options={"enable_thinkin": False}), tokenizer)
