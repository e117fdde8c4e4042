"""Hub ids: found in Hugging Face's own cache without a network, recorded with their revision, refused in one message."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from megatron_distill.recipes.tiny import MODELS, quickstart

from megatron_distill.cli.main import main
from megatron_distill.errors import ConfigError
from megatron_distill.launch.launch import command_facts
from megatron_distill.models import hub
from megatron_distill.rollouts.problems import Tally, load_problems

pytestmark = pytest.mark.slow
MODEL_REVISION, DATA_REVISION = "a" * 40, "b" * 40


def lay_out(cache: Path, kind: str, name: str, revision: str, files: Path, branch: str = "main") -> None:
    """A repository in the cache as huggingface_hub keeps it: blobs, links to them, a branch that names a commit."""
    repository = cache / f"{kind}s--{name.replace('/', '--')}"
    for file in files.rglob("*"):
        if file.is_file():
            link = repository / "snapshots" / revision / file.relative_to(files)
            blob = repository / "blobs" / str(abs(hash((name, str(file)))))
            for path in (link, blob):
                path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            link.symlink_to(blob)
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / branch).write_text(revision)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model and one data set of two splits; the library is told that there is no network."""
    from huggingface_hub import constants

    folder, data = tmp_path / "cache", tmp_path / "data"
    data.mkdir()
    for split, count in {"train": 5, "test": 2}.items():
        rows = [{"question": f"{n}+1?", "answer": f"so #### {n + 1}"} for n in range(count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lay_out(folder, "model", "lab/student", MODEL_REVISION, MODELS / "student")
    lay_out(folder, "dataset", "lab/sums", DATA_REVISION, data)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def test_what_is_an_id() -> None:
    """owner/name, with a revision, a split and rows; no path that exists, no file."""
    for text in ("Qwen/Qwen3-8B-Base", "openai/gsm8k:main/test", "a/b@v1.0:train[:10]"):
        assert hub.hub_id(text), text
    for text in ("/abs/path", "data/train.jsonl", "name", "a/b/c", str(MODELS / "student"), "recipes.py:function", ""):
        assert hub.hub_id(text) is None, text


def test_a_config_gets_the_folders_that_were_fetched(cache: Path) -> None:
    """Every place that is an id becomes its snapshot, split and rows kept; the revision is told by field."""
    config = quickstart()
    config = replace(
        config,
        student=replace(config.student, path="lab/student"),
        data=replace(config.data, train_path="lab/sums:train[1:4]", heldout_path="lab/sums@main:test"),
    )
    found = hub.resolved(config)
    assert found.student.path == str(cache / "models--lab--student" / "snapshots" / MODEL_REVISION)
    assert found.data.train_path.endswith(f"snapshots/{DATA_REVISION}:train[1:4]")
    assert found.teacher.path == config.teacher.path
    assert hub.resolved(found) == found
    problems = load_problems(found.data.train_path, prompt_key="question", answer_marker="####")
    assert [one.answer for one in problems] == ["2", "3", "4"]
    assert command_facts(found)["hub"] == {
        "student.path": {"id": "lab/student", "revision": MODEL_REVISION},
        "data.train_path": {"id": "lab/sums", "revision": DATA_REVISION},
        "data.heldout_path": {"id": "lab/sums", "revision": DATA_REVISION},
    }


def test_a_dry_run_takes_ids_and_tells_what_to_fetch(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line: sound with what is there; one line to type for what is not."""
    words = ["data.train_path=lab/sums:train", "data.heldout_path=lab/sums:test", "data.prompt_key=question"]
    words = ["tiny.quickstart", "student.path=lab/student", *words, "data.answer_marker=####"]
    dry = ["train", *words, "--dry-run", "--run-dir", str(tmp_path / "run")]
    assert main(dry) == 0
    assert main([*dry, "student.path=lab/other"]) == 1
    assert "megatron-distill fetch lab/other" in capsys.readouterr().err
    assert main([*dry, "data.train_path=lab/else:train"]) == 1
    assert "megatron-distill fetch lab/else --dataset" in capsys.readouterr().err


def test_fetch_says_where_everything_lies_and_what_cannot_be_had(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Offline, what is in the cache is found; what is not is one clear message, for an id and for a recipe."""
    assert main(["fetch", "lab/student"]) == 0
    assert MODEL_REVISION in capsys.readouterr().out
    assert main(["fetch", "tiny.quickstart", "data.train_path=lab/sums:train", "teacher.path=lab/none"]) == 1
    printed = capsys.readouterr()
    assert f"data.train_path = lab/sums:train: {cache}" in printed.out
    assert "student.path" in printed.out
    assert (
        "teacher.path = lab/none: model lab/none: not on this machine, and the hub cannot be reached (HF_HUB_OFFLINE is set)"
        in printed.err
    )
    with pytest.raises(ConfigError, match="no hub id"):
        hub.fetch("nonsense", "model")


def test_fetch_takes_an_id_or_a_recipe_and_what_goes_with_it(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name is an id whatever it holds but the end of a file's; an override of an id and the kind of a recipe are refused."""
    for typed, told in (
        (["lab/model.pytorch"], "model lab/model.pytorch: not on this machine"),
        (["lab/none.py:recipe"], "lab/none.py"),
        (["lab/student", "num_steps=3"], "num_steps=3: sets fields of a recipe, and lab/student is an id"),
        (["tiny.quickstart", "--dataset"], "--dataset: goes with an id, owner/name, and tiny.quickstart is none"),
    ):
        assert main(["fetch", *typed]) == 1
        assert told in capsys.readouterr().err


def test_public_sets_are_names(cache: Path, tmp_path: Path) -> None:
    """A public set by name: its own columns and number of samples, the run's instruction; its folder once fetched."""
    from megatron_distill.evaluate.sets import BENCHMARKS, load_sets
    from megatron_distill.rollouts.problems import read_problems, source_of

    rows = tmp_path / "gsm8k" / "main"
    rows.mkdir(parents=True)
    (rows / "test.jsonl").write_text(
        json.dumps({"question": "How many?", "answer": "1+2=<<1+2=3>>3 ### #### 1,003"}) + "\n"
    )
    (rows.parent / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test.jsonl\n---\n"
    )
    lay_out(cache, "dataset", "openai/gsm8k", "c" * 40, rows.parent)
    config = quickstart()
    evaluation = replace(config.evaluation, sets=tuple(BENCHMARKS))
    data = replace(config.data, instruction="Box it.", answer_from="box", filter="mine.py:hard")
    sets = {one.name: one for one in load_sets(replace(config, evaluation=evaluation, data=data))}
    assert list(sets) == ["heldout", "aime24", "aime25", "amc23", "math500", "gsm8k"]
    assert sets["aime24"].path == "HuggingFaceH4/aime_2024:train"  # not fetched: preflight says so
    assert [sets[name].settings.samples_per_problem for name in ("aime24", "amc23", "math500")] == [32, 16, 4]
    gsm8k = sets["gsm8k"]
    [problem] = read_problems(source_of(gsm8k.data, gsm8k.path), "stop", Tally())
    assert (problem.answer, problem.messages[0].content) == ("1,003", "How many?\n\nBox it.")
