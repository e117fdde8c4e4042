"""What a user names is found, in whatever way it is written; and what is not found is told with what is there."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_distill.config import RunConfig
from megatron_distill.config.loading import absolute_name, all_recipes, load_function, load_made, load_recipe
from megatron_distill.errors import ConfigError

HEAD = """
from __future__ import annotations
import functools
from pathlib import Path
from megatron_distill.config import RunConfig
from megatron_distill.recipes.tiny import quickstart

LIMIT = 3

def bare(function):
    return lambda: function()

def wrapping(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner

def postponed() -> RunConfig:
    return RunConfig(name="postponed")

def unannotated():
    return RunConfig(name="unannotated")

@wrapping
def wrapped() -> RunConfig:
    return RunConfig(name="wrapped")

@bare
def disguised():
    return RunConfig(name="disguised")

def sized(num_steps=5) -> RunConfig:
    return RunConfig(name="sized", num_steps=num_steps)

def needs(path: str) -> RunConfig:
    return RunConfig(name=path)

def other() -> int:
    return 3

def broken():
    first = 1
    return first / 0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(HEAD)
    return path


@pytest.mark.parametrize("name", ["postponed", "unannotated", "wrapped", "disguised", "sized"])
def test_a_recipe_is_found_however_it_is_annotated_or_decorated(file: Path, name: str) -> None:
    """What counts is that it can be called without arguments and returns a config."""
    assert load_recipe(f"{file}:{name}") == RunConfig(name=name, num_steps=5 if name == "sized" else 100)


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        ("needs", ["takes path", "a function without arguments that returns a RunConfig"]),
        ("other", ["returned a int", "RunConfig"]),
        ("LIMIT", ["is a int, not a function"]),
        ("RunConfig", ["is a class, not a function"]),
        ("broken", ["mine.py, line 44: ZeroDivisionError: division by zero"]),
        ("postpone", ["defines no postpone", "postponed; unannotated", "needs (takes path)", "other (returns int)",
                      "Did you mean postponed?"]),
        ("", ["names a file but no function", "It has: "]),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_told_with_what_the_file_has(file: Path, function: str, parts: list[str]) -> None:
    """The message names the value, what was found, and why it is no recipe."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(f"{file}:{function}")
    for part in (f"recipe = '{file}:{function}'", *parts):
        assert part in str(caught.value)
    assert "quickstart" not in str(caught.value), "what a file imports is not what it has"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("import nothing_of_that_name\n", "line 1: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("x = 1\ny = x +\n", "line 2: SyntaxError: invalid syntax"),
        ("import json\n\njson.loads('{')\n", "line 3: JSONDecodeError"),
        ("import sys\nsys.exit('no GPU here')\n", "line 2: SystemExit: no GPU here"),
        ("x = '\0'\n", "SyntaxError"),
    ],
)
def test_a_file_that_fails_is_one_message_with_its_line_and_cause(tmp_path: Path, text: str, part: str) -> None:
    """The line is the user's own, however deep the error arose, and the cause is kept."""
    path = tmp_path / "failing.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_function(f"{path}:f", {}, "rl.reward")
    assert str(caught.value).startswith(f"rl.reward = '{path}:f': failed at {path}")
    assert part in str(caught.value)
    assert caught.value.__cause__ is not None


def test_no_file_and_other_files_are_refused(tmp_path: Path) -> None:
    """A missing file, a folder and a file of another kind say what to give."""
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    for name in ("nowhere.py:f", f"{tmp_path}:f", f"{tmp_path}/recipe.yaml:f"):
        with pytest.raises(ConfigError, match=r"is no (Python )?file\. Give path/to/file\.py:function"):
            load_function(name, {"math": len}, "rl.reward")


def test_a_function_is_built_in_or_of_a_file(file: Path) -> None:
    """One syntax for all: a built-in name, or a file's function that can be called with what it will be given."""
    assert load_function("math", {"math": len}, "rl.reward") is len
    assert load_function(f"{file}:needs", {"math": len}, "rl.reward", ["path"])("x") == RunConfig(name="x")
    with pytest.raises(ConfigError, match=r"rl\.reward = 'maths': unknown\. Did you mean math\?"):
        load_function("maths", {"math": len}, "rl.reward")
    with pytest.raises(ConfigError, match=r"Known: math, or path/to/file\.py:function"):
        load_function("zzz", {"math": len}, "rl.reward")
    with pytest.raises(ConfigError, match=r"takes \(\) -> 'RunConfig', and is called with \(scored\)"):
        load_function(f"{file}:postponed", {}, "rl.reward", ["scored"])
    with pytest.raises(ConfigError, match="is a int, not a function"):
        load_function(f"{file}:LIMIT", {}, "rl.reward")


def test_a_file_is_run_once_may_be_changed_and_may_lie_beside_others(tmp_path: Path) -> None:
    """Two functions of one file share its state; a changed file is read anew; its neighbours can be imported."""
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 7\n")
    path = tmp_path / "stateful.py"
    path.write_text("from neighbour_of_mine import VALUE\nseen = []\n"
                    "def add(x):\n    seen.append(x)\ndef count():\n    return len(seen) + VALUE\n")  # fmt: skip
    load_function(f"{path}:add", {}, "x")(1)
    assert load_function(f"{path}:count", {}, "x")() == 8
    path.write_text("def count():\n    return -1\n")
    assert load_function(f"{path}:count", {}, "x")() == -1


def test_a_name_holds_in_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths become absolute, built-in names and absolute paths stay."""
    monkeypatch.chdir(tmp_path)
    assert absolute_name("sub/../reward.py:score") == f"{tmp_path}/reward.py:score"
    assert absolute_name(f"{tmp_path}/reward.py:score") == f"{tmp_path}/reward.py:score"
    assert absolute_name("math") == "math"
    assert absolute_name("~/r.py:f").startswith(str(Path.home()))


def test_unknown_recipe_gets_a_suggestion() -> None:
    """A typo in a recipe's name is answered with the nearest one of its kind."""
    with pytest.raises(ConfigError, match=r"Did you mean tiny\.quickstart"):
        load_recipe("tiny.quikstart")
    with pytest.raises(ConfigError, match=r"returned a Study, and must return a RunConfig"):
        load_recipe("tiny.study")
    with pytest.raises(ConfigError, match=r"run = 'tiny.MODELS': is a PosixPath, not a function"):
        load_made("tiny.MODELS", RunConfig, "run")


def test_importing_config_and_recipes_pulls_in_nothing_heavy() -> None:
    """`--help` and dry runs stay quick, and a recipe starts nothing."""
    assert all_recipes()
    code = (
        "import sys; from megatron_distill.config.loading import all_recipes; all_recipes(); "
        "print([m for m in ('torch', 'megatron', 'sglang', 'nemo_run', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_threads_that_load_one_file_at_once_each_find_all_of_it(tmp_path: Path) -> None:
    """None is shown a file that another is still running, and the file runs once."""
    path = tmp_path / "slow.py"
    path.write_text("import time\nseen = []\nseen.append(1)\ntime.sleep(0.2)\ndef runs():\n    return len(seen)\n")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_function(f"{path}:runs", {}, "trackers")(), range(4)))
    assert found == [1, 1, 1, 1]
