"""First contact: a recipe of one's own that is sound as written, and a shell that completes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from megatron_distill.recipes.tiny import MODELS

from megatron_distill.cli import completion
from megatron_distill.cli.completion import words
from megatron_distill.cli.main import COMMANDS, main
from megatron_distill.config.loading import load_recipe

pytestmark = pytest.mark.slow


def data(path: Path, prompt: str = "question", answer: str = "target", boxed: str = "") -> Path:
    """Other columns than the shipped ones."""
    rows = [
        {"uid": n, prompt: f"What is {n} plus 1?{boxed}", answer: f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(7)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def new(folder: Path, train: Path, *more: str) -> int:
    models = ["--student", str(MODELS / "student"), "--teacher", str(MODELS / "teacher"), "--horizon-tokens", "64"]
    return main(["new", str(folder / "mine.py"), *models, "--train", str(train), "--heldout", str(train), *more])


def test_a_new_recipe_fits_ones_data_and_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns, answer marker, longest prompt and instruction come from the data; the commands it names work."""
    assert new(tmp_path, data(tmp_path / "train.jsonl")) == 0
    printed = capsys.readouterr().out
    config = load_recipe(f"{tmp_path / 'mine.py'}:recipe")
    assert (config.name, config.data.prompt_key, config.data.answer_key) == ("mine", "question", "target")
    assert config.data.answer_marker == "####"
    assert config.data.instruction.endswith("\\boxed{}.")
    assert config.evaluation.num_problems == 7
    assert 64 <= config.data.max_prompt_tokens < 256
    commands = [line.split()[1:] for line in printed.splitlines() if line.startswith("  megatron-distill")]
    assert main([*commands[0], "--run-dir", str(tmp_path / "run")]) == 0
    assert "sound" in capsys.readouterr().out


def test_columns_of_any_name_can_be_named(tmp_path: Path) -> None:
    """What is called like nothing usual is told on the command line, and stands in the recipe."""
    odd = data(tmp_path / "odd.jsonl", prompt="wording")
    assert new(tmp_path, odd, "--prompt-key", "wording", "--answer-key", "target") == 0
    config = load_recipe(f"{tmp_path / 'mine.py'}:recipe")
    assert (config.data.prompt_key, config.data.answer_key) == ("wording", "target")
    assert config.checkpoints.keep_last == 2


def test_an_instruction_is_not_given_twice(tmp_path: Path) -> None:
    """Prompts that ask for the box themselves are left alone."""
    assert new(tmp_path, data(tmp_path / "train.jsonl", boxed=" Put it in \\boxed{}.")) == 0
    assert load_recipe(f"{tmp_path / 'mine.py'}:recipe").data.instruction == ""


def test_what_cannot_be_a_recipe_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown columns and a missing model are told; an existing file is never touched."""
    assert new(tmp_path, data(tmp_path / "odd.jsonl", prompt="wording")) == 1
    assert "Type --prompt-key COLUMN" in capsys.readouterr().err
    assert new(tmp_path, tmp_path / "odd.jsonl", "--prompt-key", "phrasing") == 1
    assert "none of these columns is phrasing" in capsys.readouterr().err
    assert new(tmp_path, data(tmp_path / "train.jsonl"), "--teacher", str(tmp_path / "none")) == 1
    assert not (tmp_path / "mine.py").exists()
    (tmp_path / "mine.py").write_text("# mine")
    assert new(tmp_path, data(tmp_path / "train.jsonl")) == 1
    assert (tmp_path / "mine.py").read_text() == "# mine"


def test_a_folder_that_takes_no_recipe_is_told_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is missing, a file in its place, or one that may not be written to; nothing is asked of the data, nor made."""
    no_data = tmp_path / "none.jsonl"
    assert new(tmp_path / "missing" / "dir", no_data) == 1
    assert f"there is no folder {tmp_path}/missing/dir to write into. Make it" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert new(tmp_path / "file", no_data) == 1
    assert "is a file. Name a folder" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert new(tmp_path, no_data) == 1
    assert f"{tmp_path} may not be written to." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_words_follow_the_line() -> None:
    """Commands first, then recipes of the command's kind, then fields; options wherever a dash is typed."""
    assert words("megatron-distill ") == sorted(COMMANDS)
    assert words("megatron-distill tr") == ["train"]
    assert words("megatron-distill train tiny.") == ["tiny.quickstart"]
    assert "tiny_rl.pipeline" in words("megatron-distill pipeline ")
    assert words("megatron-distill train tiny.quickstart distill.re") == ["distill.reverse_kl_weight="]
    assert words("megatron-distill launch tiny.quickstart --clu") == ["--cluster"]
    assert words("megatron-distill report ") == []  # a folder: the shell's business
    assert words("megatron-distill train --run-dir x --verbose tiny.") == ["tiny.quickstart"]
    assert words("megatron-distill train --run-dir ") == []  # the option's own value
    assert words("megatron-distill fork ") == []
    assert words("megatron-distill fork runs/one --step 3 tiny.") == ["tiny.quickstart"]
    assert words("megatron-distill fork runs/one tiny.quickstart num_s") == ["num_steps="]
    assert words("megatron-distill eval runs/one evaluation.num_p") == ["evaluation.num_problems="]
    assert words("megatron-distill eval runs/one num_s") == []
    assert words("megatron-distill convert ") == ["hf-to-megatron", "inspect", "megatron-to-hf", "verify"]
    assert words("megatron-distill convert verify --l") == ["--logits"]
    assert words("megatron-distill convert inspect ") == []
    for command in COMMANDS:
        assert "--help" in words(f"megatron-distill {command} --")


def test_bash_completes(tmp_path: Path) -> None:
    """The script in a real bash, which asks the real command."""
    command = tmp_path / "megatron-distill"
    command.write_text(f'#!/bin/bash\nexec {sys.executable} -m megatron_distill.cli.main "$@"\n')
    command.chmod(0o755)
    script = completion.SCRIPTS["bash"] + (
        'COMP_LINE="megatron-distill train tiny.quickstart distill.rev"; COMP_POINT=${#COMP_LINE}\n'
        '_megatron_distill 2>/dev/null; echo "${COMPREPLY[@]}"\n'
    )
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env={"PATH": path})
    assert done.stdout.strip() == "distill.reverse_kl_weight="


def test_help_shows_what_a_value_and_a_schedule_look_like(capsys: pytest.CaptureFixture[str]) -> None:
    """``train --help`` has an example of each kind of value, and the schedule that it shows is one."""
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    shown = next(line for line in printed.splitlines() if '"interpolate": true' in line)
    override = shown.strip().split("   ")[0].strip("'")
    assert main(["plan", "qwen3.b06_from_4b_1x8_128", override]) == 0


def test_a_new_recipe_leaves_odd_rows_out_if_it_is_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row without an answer and one longer than the models hold: refused with what to type, or left out and counted."""
    odd = data(tmp_path / "odd.jsonl")
    rows = [{"question": "What?", "target": ""}, {"question": "x " * 600, "target": "#### 1"}]
    odd.write_text(odd.read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    assert new(tmp_path, odd) == 1
    assert "odd.jsonl:8: target = ''" in (told := capsys.readouterr().err) and "data.on_bad_rows=drop" in told
    assert new(tmp_path, odd, "--on-bad-rows", "drop") == 0
    assert "odd.jsonl: 2 of 9 rows left out: 1 no answer, 1 prompt longer than" in capsys.readouterr().out
    assert main(["train", f"{tmp_path / 'mine.py'}:recipe", "--run-dir", str(tmp_path / "run"), "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "2 of 9 rows left out" in printed.out
    assert "indexing errors" not in printed.err  # transformers' own, of a prompt that no model will see


def test_what_new_takes_is_told_in_its_own_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A horizon that leaves no room, a held-out file with other columns, a hub id that was not fetched; and a file name with a
    blank gives commands that a shell reads."""
    train = data(tmp_path / "train.jsonl")
    assert new(tmp_path, train, "--horizon-tokens", "2000") == 1
    assert "--horizon-tokens = 2000: with prompts of up to" in capsys.readouterr().err
    assert new(tmp_path, train, "--heldout", str(data(tmp_path / "other.jsonl", prompt="problem"))) == 1
    assert "has no column 'question'" in capsys.readouterr().err
    assert new(tmp_path, train, "--student", "Nobody/Model-1B") == 1
    assert "type: megatron-distill fetch Nobody/Model-1B" in capsys.readouterr().err
    (folder := tmp_path / "my runs").mkdir()
    assert new(folder, train, "--train", f"{train}[:5]") == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(command)[2] == f"{folder / 'mine.py'}:recipe"
    assert load_recipe(shlex.split(command)[2]).data.train_path == f"{train}[:5]"
