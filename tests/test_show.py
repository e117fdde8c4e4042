"""``show``: every token of what the models see, the mask that training will use, and the same in every style."""

import re
from pathlib import Path

import numpy as np
import pytest
from megatron_distill.recipes.tiny import quickstart

from megatron_distill.cli.main import main
from megatron_distill.config import RunConfig, with_overrides
from megatron_distill.models.vocabulary import Vocabulary, load_vocabulary
from megatron_distill.rollouts.order import problem_at
from megatron_distill.rollouts.prompts import PromptSet, load_prompt_set
from megatron_distill.rollouts.shown import Style, learnt_mask, show_problems
from megatron_distill.types import Rollout

pytestmark = pytest.mark.slow
PLAIN = Style(colour=False, one_a_line=False, width=100)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return quickstart()


@pytest.fixture(scope="module")
def vocabulary(config: RunConfig) -> Vocabulary:
    return load_vocabulary(config.student.path, config.teacher.path, config.rollouts.stop_tokens)


@pytest.fixture(scope="module")
def train(config: RunConfig, vocabulary: Vocabulary) -> PromptSet:
    return load_prompt_set(config.data.train_path, config.data, vocabulary.tokenizer)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "says its 64 likeliest tokens, from its servers; teacher.tail = bucket"),
        (["teacher.transport=sglang_hidden"], "its whole distribution: hidden states from its servers"),
        (["teacher.transport=in_process"], "its whole distribution, beside the student"),
        (["distill.weight=0", "sft.weight=1", "rollouts.student_prefix_frac=0", "rollouts.off_policy_source=data"], ""),
    ],
)
def test_what_the_loss_knows_of_the_teacher_is_told(
    overrides: list[str], told: str, config: RunConfig, train: PromptSet, vocabulary: Vocabulary
) -> None:
    """Its likeliest tokens or its whole distribution, and from where; nothing where no loss asks it."""
    text = show_problems(with_overrides(config, overrides), train, vocabulary, 0, PLAIN)
    line = next((line for line in text.splitlines() if line.startswith("teacher")), "")
    assert told in line and bool(told) == bool(line)


def test_the_tokens_of_the_first_problem_are_shown_and_none_else(
    config: RunConfig, train: PromptSet, vocabulary: Vocabulary
) -> None:
    """A line for each token: its id, and `learnt` exactly where a response's token is."""
    text = show_problems(config, train, vocabulary, 1, Style(colour=False, one_a_line=True, width=100))
    rows = re.findall(r"^ +\d+ +(\d+)  (learnt|-)", text, re.MULTILINE)
    index = problem_at(0, len(train.problems), config.seed)
    prompt, problem = train.prompts[index], train.problems[index]
    response = [*vocabulary.tokenizer.encode(problem.solution), vocabulary.stop_token_ids[0]]
    assert [int(token) for token, _ in rows] == [*prompt, *response]
    assert [mask for _, mask in rows] == ["-"] * len(prompt) + ["learnt"] * len(response)


def test_colours_change_no_character(config: RunConfig, train: PromptSet, vocabulary: Vocabulary) -> None:
    """A terminal gets the same tokens as a file: shades take the bars' place."""
    plain = show_problems(config, train, vocabulary, 2, PLAIN)
    coloured = show_problems(config, train, vocabulary, 2, Style(colour=True, one_a_line=False, width=100))
    assert "\x1b[" not in plain
    assert "\x1b[" in coloured
    bare = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert re.sub(r"[\s|]", "", bare) == re.sub(r"[\s|]", "", plain)


def test_the_mask_is_that_of_the_batch() -> None:
    """What an environment said inside a response is context, as in training."""
    learnt = np.array([True, False, False, True])
    rollout = Rollout(0, [5, 6, 7], [1, 2, 3, 4], np.zeros(4, np.float32), "student", 0, 0, "stop", learnt)
    assert learnt_mask(rollout) == [False] * 3 + learnt.tolist()


def test_the_command_prints_and_starts_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Overrides count; a cut response says so; nothing is written."""
    assert (
        main(["show", "tiny.quickstart", "--problems", "1", "curriculum.horizon_tokens=7", f"name={tmp_path.name}"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "7 tokens, cut from" in printed
    assert "<|im_start|>|user|" in printed
    assert not Path("runs", tmp_path.name).exists()
    assert main(["show", "tiny.quickstart", "data.train_path=nowhere.jsonl"]) == 1


def test_data_without_solutions_is_shown_too(
    config: RunConfig, train: PromptSet, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    """Where nobody has written a response, the prompt is shown and the response is said to come."""
    path = tmp_path / "bare.jsonl"
    path.write_text('{"prompt": "1+1\\u20ac?", "answer": "2"}\n')
    bare = load_prompt_set(str(path), config.data, vocabulary.tokenizer)
    shown = show_problems(with_overrides(config, [f"data.train_path={path}"]), bare, vocabulary, 3, PLAIN)
    assert "no solution in column 'solution'" in shown


def test_a_place_counts_tokens_and_a_problem_its_step(
    config: RunConfig, train: PromptSet, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    """A character of several tokens is one line, and the next line's place is after all of them; beyond a step's prompts comes
    the next step."""
    path = tmp_path / "bare.jsonl"
    path.write_text('{"prompt": "1+1\\u20ac?", "answer": "2"}\n')
    bare = load_prompt_set(str(path), config.data, vocabulary.tokenizer)
    text = show_problems(config, bare, vocabulary, 1, Style(colour=False, one_a_line=True, width=100))
    rows = re.findall(r"^ +(\d+) +(\d+(?: \d+)*)  -", text, re.MULTILINE)
    ids = [ids.split() for _, ids in rows]
    assert max(map(len, ids)) == 3
    assert [int(place) for place, _ in rows] == [sum(map(len, ids[:number])) for number in range(len(ids))]
    few = with_overrides(config, ["rollouts.prompts_per_step=2", "micro_batch_rollouts=2"])
    heads = re.findall(r"problem (\d+) of step (\d+)", show_problems(few, train, vocabulary, 3, PLAIN))
    assert heads == [("1", "1"), ("2", "1"), ("1", "2")]
