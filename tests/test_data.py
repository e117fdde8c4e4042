"""Where problems come from: every format alike, bad rows counted or refused, sources mixed as a function of the seed."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from megatron_distill.recipes.tiny import quickstart

from megatron_distill.cli.main import main
from megatron_distill.config import DataConfig, SourceConfig, from_dict, problems_of, to_dict, with_overrides
from megatron_distill.errors import ConfigError, DataError
from megatron_distill.rollouts.order import mixed_problem_at
from megatron_distill.rollouts.problems import Tally, load_problems
from megatron_distill.rollouts.prompts import PackedLists, load_prompt_set, load_training_set
from megatron_distill.rollouts.records import Place, parse_place

RECORDS = [{"id": f"p{n}", "prompt": f"{n}+1?", "answer": f"0{n + 1}"} for n in range(5)]


class Tokenizer:
    """A token for each character of the last turn, and one for each turn before it."""

    chat_template, name_or_path = "x", "test"

    def apply_chat_template(self, messages: Any, **options: Any) -> list[int]:
        if messages[-1]["content"] == "raise?":
            raise ValueError("no such role")
        return [0] * (len(messages) - 1) + [ord(c) for c in messages[-1]["content"] if c != "~"]

    def encode(self, text: str, **options: Any) -> list[int]:
        return [ord(c) for c in text]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_every_format_holds_the_same_problems(tmp_path: Path) -> None:
    """Lines, an array, an array in an object, lines called .json, CSV, Parquet, saved data sets and directories of files."""
    datasets = pytest.importorskip("datasets")
    expected = load_problems(write(tmp_path / "a.jsonl", RECORDS))
    assert [one.answer for one in expected] == [
        "01",
        "02",
        "03",
        "04",
        "05",
    ]  # text stays text: no reader guesses numbers
    (tmp_path / "array.json").write_text(json.dumps(RECORDS, indent=1))
    (tmp_path / "object.json").write_text(json.dumps({"version": 1, "data": RECORDS}))
    write(tmp_path / "lines.json", RECORDS)
    table = datasets.Dataset.from_list(RECORDS)
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "files" / "data" / "train-00000-of-00001.parquet")
    names = (
        "array.json",
        "object.json",
        "lines.json",
        "a.csv",
        "a.parquet",
        "saved",
        "splits:test",
        "files:train",
        "files",
    )
    for name in names:
        assert load_problems(str(tmp_path / name)) == expected, name
        assert load_problems(f"{tmp_path / name}[1:3]") == expected[1:3], name
    unsolved = [record | {"solution": None} for record in RECORDS]  # which CSV does not tell from an empty text
    datasets.Dataset.from_list(unsolved).to_parquet(tmp_path / "unsolved.parquet")
    assert load_problems(str(tmp_path / "unsolved.parquet")) == load_problems(write(tmp_path / "b.jsonl", unsolved))
    with pytest.raises(DataError, match=r"Name one of: .*splits:train"):
        load_problems(str(tmp_path / "splits"))


@pytest.mark.slow
def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """Whatever the directory: rows of another split would train, or be measured, under its name."""
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(RECORDS)
    table.save_to_disk(tmp_path / "alone")
    datasets.Dataset.from_list(RECORDS, split="test").save_to_disk(tmp_path / "test_alone")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", RECORDS)
    for place, said in {
        "alone:test": r"alone:test: a data set that was saved alone has no splits.* Drop :test",
        "test_alone:train": r"does not say that it is train",
        "splits:tset": r"splits:tset = no such split. Name one of: .*splits:train, .*splits:test\.",
        "splits:main/test": r"splits:main: a saved data set has no configurations. Drop main/\.",
        "files:tset": r"files:tset = no such split. Name one of: .*files:train\.",
    }.items():
        with pytest.raises(DataError, match=said):
            load_problems(str(tmp_path / place))
    assert load_problems(f"{tmp_path / 'test_alone'}:test") == load_problems(str(tmp_path / "alone"))


@pytest.mark.slow
def test_a_broken_file_of_a_directory_is_told_by_its_place(tmp_path: Path) -> None:
    """Its files are opened one after another, while their rows are read."""
    pytest.importorskip("datasets")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train-0.jsonl", RECORDS)
    write(tmp_path / "files" / "train-1.jsonl", ['{"prompt":'])
    with pytest.raises(DataError, match=rf"files:train: cannot be read from row {len(RECORDS)} on \(.*Write its files"):
        load_problems(str(tmp_path / "files"))


def test_a_place_is_a_path_with_a_split_and_rows_after_it(tmp_path: Path) -> None:
    """Each part may be left out; a file that is really called so wins."""
    assert parse_place("a/b:main/test[:200]") == Place("a/b", "main", "test", 0, 200)
    assert parse_place("a.jsonl[5:]") == Place("a.jsonl", None, None, 5, None)
    odd = write(tmp_path / "a[0:1]", RECORDS)
    assert parse_place(odd) == Place(odd)


def test_bad_rows_are_counted_by_reason_or_refused(tmp_path: Path) -> None:
    """``drop`` leaves out what ``stop`` refuses, and says how many for which reason; what is left keeps its order."""
    rows = [
        RECORDS[0],
        "",
        "{no json",
        {"prompt": "1+1?"},
        {"prompt": " ", "answer": "1"},
        {"prompt": [{"role": "robot", "content": "hi"}], "answer": "1"},
        {"prompt": "a far longer prompt than allowed", "answer": "1"},
        {"prompt": "~", "answer": "1"},
        {"prompt": "raise?", "answer": "1"},
        RECORDS[1],
    ]
    path = write(tmp_path / "odd.jsonl", rows)
    loaded = load_prompt_set(path, DataConfig(on_bad_rows="drop", max_prompt_tokens=8), Tokenizer())  # type: ignore[arg-type]
    assert [one.id for one in loaded.problems] == ["p0", "p1"]
    [note] = loaded.notes
    assert note.startswith(f"{path}: 8 of 10 rows left out: ")
    reasons = ("blank line", "not JSON", "no answer", "no prompt", "odd messages", "prompt longer than 8 tokens")
    for reason in (*reasons, "rendered as nothing", "refused by the chat template"):
        assert f"1 {reason}" in note
    with pytest.raises(DataError, match=r"odd.jsonl:2 = blank"):
        load_prompt_set(path, DataConfig(), Tokenizer())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="2 of 2 rows left out: 2 no answer"):
        load_problems(write(tmp_path / "none.jsonl", [{"prompt": "a"}] * 2), on_bad_rows="drop")


def test_equal_ids_are_made_distinct(tmp_path: Path) -> None:
    """Two sets in one file may count from 0 each: nothing is lost, and no two problems share an id."""
    rows = [{"id": i, "prompt": f"{n}?", "answer": "1"} for n, i in enumerate(["7", "7", "7#2", "7", 7])]
    assert [one.id for one in load_problems(write(tmp_path / "a.jsonl", rows))] == ["7", "7#2", "7#2#2", "7#3", "7#4"]


def test_a_filter_and_an_extractor_of_ones_own(tmp_path: Path) -> None:
    """Functions choose records and find answers; one that fails is named with the row."""
    path = write(tmp_path / "a.jsonl", [{"prompt": f"{n}?", "answer": f"so \\boxed{{{n}}}.", "n": n} for n in range(4)])
    functions = tmp_path / "mine.py"
    functions.write_text(
        "def even(record):\n    return record['n'] % 2 == 0\n"
        "def last_letter(text):\n    return text.rstrip('.}')[-1]\n"
        "def fails(record):\n    return record['m']\n"
    )
    tally = Tally()
    kept = load_problems(path, tally=tally, filter=f"{functions}:even", answer_from="box")
    assert ([one.answer for one in kept], tally.left_out) == (["0", "2"], Counter({"data.filter": 2}))
    assert load_problems(path, answer_from=f"{functions}:last_letter")[3].answer == "3"
    with pytest.raises(DataError, match=r"fails: raised KeyError: 'm', at .*a.jsonl:1"):
        load_problems(path, filter=f"{functions}:fails")


def test_sources_have_their_own_columns_and_the_config_survives_json(tmp_path: Path) -> None:
    """What a source leaves null is as ``data`` says; a relative function becomes absolute; wrong fields are named."""
    (tmp_path / "mine.py").write_text("def keep(record):\n    return True\n")
    one = write(tmp_path / "one.jsonl", RECORDS)
    two = write(tmp_path / "two.jsonl", [{"question": "How?", "target": "because #### 9"}])
    sources = [
        {"path": f"{one}[:2]", "filter": f"{tmp_path}/mine.py:keep"},
        {"path": two, "prompt_key": "question", "answer_key": "target", "answer_marker": "####"},
    ]
    config = with_overrides(quickstart(), ['data.train_path=""', f"data.sources={json.dumps(sources)}"])
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    loaded = load_training_set(config.data, Tokenizer())  # type: ignore[arg-type]
    assert [one.answer for one in loaded.problems] == ["01", "02", "9"]
    assert (loaded.sizes, loaded.shares) == ((2, 1), ())
    with pytest.raises(ConfigError, match=r"data.sources\[1\].promt_key = 'q': unknown key. Did you mean"):
        with_overrides(quickstart(), ['data.sources=[{"path": "a"}, {"promt_key": "q"}]'])


def test_rules_of_sources() -> None:
    """Shares are of all or of none; one way to say where training problems are; no marker beside an extractor."""

    def broken(**changes: Any) -> str:
        data = replace(quickstart().data, **changes)
        return "\n".join(problems_of(replace(quickstart(), data=data)))

    both = (SourceConfig("a", share=0.5), SourceConfig("b"))
    assert "data.sources[1].share = None: either every source" in broken(train_path="", sources=both)
    assert "data.train_path" in broken(sources=(SourceConfig("a"),))
    assert "data.sources[0].path" in broken(train_path="", sources=(SourceConfig(),))
    assert "data.sources[0].share = -1.0: must be positive" in broken(train_path="", sources=(SourceConfig("a", -1.0),))
    assert "data.answer_marker" in broken(answer_from="box", answer_marker="####")


def test_shares_hold_and_every_problem_comes_once_an_epoch_of_its_source() -> None:
    """A source's share is exact over a thousand places; within a source, an epoch visits each problem once."""
    sizes, shares = (30, 7, 500), (0.5, 0.3, 0.2)
    visits = [mixed_problem_at(position, sizes, shares, seed=3) for position in range(3000)]
    source_of = [0] * 30 + [1] * 7 + [2] * 500
    for start in (0, 1000, 2000):
        counts = Counter(source_of[index] for index in visits[start : start + 1000])
        assert [counts[source] for source in range(3)] == pytest.approx([500, 300, 200], abs=1)
    of_first = [index for index in visits if index < 30]
    assert sorted(of_first[:30]) == sorted(of_first[30:60]) == list(range(30))
    assert of_first[:30] != of_first[30:60]


def test_the_mixed_order_is_a_function_of_seed_and_place() -> None:
    """Whoever asks, in whatever order: the same; another seed: another order."""
    sizes, shares = (30, 7), (1.0, 3.0)
    forward = [mixed_problem_at(place, sizes, shares, 1) for place in range(2500)]
    backward = [mixed_problem_at(place, sizes, shares, 1) for place in reversed(range(2500))]
    assert forward == backward[::-1]
    assert forward != [mixed_problem_at(place, sizes, shares, 2) for place in range(2500)]


def test_packed_lists_are_lists() -> None:
    """Every way in which prompts are read gives what was put in."""
    lists = [[1, 2], [], [3], list(range(100))]
    packed = PackedLists()
    for one in lists:
        packed.append(one)
    assert (list(packed), len(packed), packed[1:3], packed[-1]) == (lists, 4, lists[1:3], lists[-1])
    assert packed.lengths() == [2, 0, 1, 100]
    with pytest.raises(IndexError):
        packed[4]


def test_a_template_that_leaves_the_problem_out_is_refused(tmp_path: Path) -> None:
    """All prompts equal although the problems differ: told before anything is trained on it."""
    path = write(tmp_path / "a.jsonl", [{"prompt": "~" * n, "answer": "1"} for n in (1, 2)])
    with pytest.raises(DataError, match="the problem is not in them"):
        load_prompt_set(path, DataConfig(system_prompt="Be brief."), Tokenizer())  # type: ignore[arg-type]


def test_system_prompt_and_assistant_prefix(tmp_path: Path) -> None:
    """A chat's own system turn stays; the prefix ends the prompt."""
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "b"}]
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": own, "answer": "1"}])
    data = DataConfig(system_prompt="Be brief.", assistant_prefix="<t>")
    loaded = load_prompt_set(path, data, Tokenizer())  # type: ignore[arg-type]
    assert [one.messages[0].content for one in loaded.problems] == ["Be brief.", "mine"]
    assert list(loaded.prompts) == [[0, ord("a"), *map(ord, "<t>")], [0, ord("b"), *map(ord, "<t>")]]


@pytest.mark.slow
def test_a_dry_run_takes_what_is_left_and_refuses_missing_solutions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line: two sources with shares, bad rows left out; and data that should write but cannot."""
    rows = [*RECORDS, {"prompt": "no answer"}]
    sources = json.dumps([{"path": write(tmp_path / f"{n}.jsonl", rows), "share": n} for n in (1, 2)])
    words = ["tiny.quickstart", "data.train_path=", f"data.sources={sources}", "data.on_bad_rows=drop"]
    assert main(["show", *words]) == 0
    assert "1 of 6 rows left out: 1 no answer" in capsys.readouterr().out
    dry = ["--dry-run", "--run-dir", str(tmp_path / "run")]
    assert main(["train", *words, *dry]) == 0
    assert main(["train", *words, *dry, "rollouts.off_policy_source=data", "rollouts.student_prefix_frac=0.5"]) == 1
    assert "10 training problems have no 'solution'" in capsys.readouterr().err
