"""Hostile values through the real command line, in process: refused in one message, never a traceback, a hang or a process."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron_distill.recipes.tiny import MODELS
from safetensors.torch import load_file, save_file

from megatron_distill import config as config_module
from megatron_distill.cli.main import main
from megatron_distill.config import RunConfig, walk
from megatron_distill.runs.marks import MARK
from megatron_distill.runs.run_folder import RunFolder, append

FIELDS = sorted(where for where, _, _ in walk(RunConfig()))
NUMBERS = ("NaN", "Infinity", "-Infinity", "-1", "-16", "1e308", "-1e308", "1e12", "1000000000000", "0.5")
HUGE = ("9" * 400, "9" * 5000)  # larger than a float can be; longer than Python reads
SHAPES = ("null", "true", '""', "[]", "[null]", "{}", "[[1]]", "[" * 3000, '{"a": 1, "a": 2}')
SCHEDULES = (
    '{"points": []}',
    '{"points": [["a", 1]]}',
    '{"points": [[0, 0.5], [1, NaN]], "interpolate": true}',
    '{"points": [[0, true]]}',
    '{"points": [[0, "1"]]}',
    '{"points": [[0, 0.5], [%s, 1]]}' % ("9" * 400),
    '{"points": [[0, 0.5], [1e12, 1]]}',
    '{"points": [[0, %s]]}' % ("9" * 400),
    '{"points": [[0, 1]], "points": [[0, 0.5]]}',
)
TEXTS = (
    '"\\ud800"',
    '"a\\u0000b"',
    '"../../x"',
    '"$(touch owned)"',
    '"a\\nb"',
    '"\\u202egpj.x"',
    '"' + "x" * 5000 + '"',
    "no such thing",
)
PLACES = {"name", "teacher.cache_dir"}  # where a text may be a value


COMMANDS = {
    "train": ("train", "tiny.quickstart", "--dry-run"),
    "launch": ("launch", "tiny.quickstart", "--cluster", "lab", "--dry-run"),
    "plan": ("plan", "tiny.quickstart"),
}
GROWTH_GIB = 1.0


def dry_run(tmp_path: Path, *words: str, command: str = "train") -> int:
    """The exit code of a command that starts nothing; argparse's own is 2."""
    place = () if command == "plan" else ("--run-dir", str(tmp_path / "run"))
    try:
        return main([*COMMANDS[command], *place, *words])
    except SystemExit:
        return 2


def memory_gib() -> float:
    """The most that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@pytest.mark.slow
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    field=st.sampled_from(FIELDS),
    value=st.sampled_from((*NUMBERS, *HUGE, *SHAPES, *SCHEDULES, *TEXTS)),
    command=st.sampled_from(tuple(COMMANDS)),
)
def test_no_value_of_any_field_is_more_than_a_message(
    field: str, value: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any hostile value of any field: the run is sound, or it is refused with a message that names the field's section."""
    before = memory_gib()
    code = dry_run(tmp_path, f"{field}={value}", command=command)
    told = capsys.readouterr()
    assert code in (0, 1)
    assert len(told.err) < 20_000
    assert memory_gib() - before < GROWTH_GIB
    if code:
        assert field.split(".")[0] in told.err
    if command == "launch" and not code:
        shutil.rmtree(tmp_path / "run")  # a dry launch leaves the scripts that it prints
    assert not (tmp_path / "run").exists()
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    "override",
    [
        "seed=0",
        "seed=-1",
        "micro_batch_rollouts=-16",
        "micro_batch_rollouts=0",
        "student.parallel.dp=0",
        "save_every_steps=-1",
        "evaluation.every_steps=-1",
        "optimizer.adam_beta1=1",
        "optimizer.adam_beta2=NaN",
        "optimizer.weight_decay=NaN",
        "optimizer.clip_grad=-1",
        "optimizer.lr=Infinity",
        "distill.weight=Infinity",
        "rollouts.temperature=Infinity",
        "curriculum.horizon_tokens=Infinity",
        "servers.student_tp=3",
        "servers.student_replicas=1000000000000",
        "teacher.cache_dir=/dev/null/cache",
        "name=..",
        "name=a\nb",
        "name=",
        "name=$(touch owned)",
        "num_steps=2.5",
        "optimizer.lr=" + HUGE[0],
        "distill.reverse_kl_weight=" + HUGE[0],
        *(f"distill.reverse_kl_weight={schedule}" for schedule in SCHEDULES),
        "rollouts.student_prefix_frac=" + SCHEDULES[2],
    ],
)
def test_known_bad_values_are_refused(override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Values that once passed the dry run and died later, in Megatron or in a server, or never."""
    assert dry_run(tmp_path, override) == 1
    message = capsys.readouterr().err
    assert override.split("=")[0].split(".")[-1] in message and "Traceback" not in message


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A student with one NaN would train for hours to nothing."""
    shutil.copytree(MODELS / "student", tmp_path / "student")
    (file,) = (tmp_path / "student").glob("*.safetensors")
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    next(iter(weights.values())).view(-1)[0] = torch.inf
    save_file(weights, file)
    assert dry_run(tmp_path, f"student.path={tmp_path / 'student'}") == 1
    assert "holds NaN or infinite values" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '{"a": 1}', "{", "\ud800".encode("utf-8", "surrogatepass").decode("latin1")]
)
def test_any_config_json_of_a_model_is_one_message(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list, null, half a file."""
    shutil.copytree(MODELS / "student", tmp_path / "student")
    (tmp_path / "student" / "config.json").write_text(text)
    assert dry_run(tmp_path, f"student.path={tmp_path / 'student'}") == 1
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "\xff", "answer": "1"}',
        b'{"prompt": "\\ud800", "answer": "1"}',
        b'{"prompt": "1", "answer": NaN}',
        b"[1]",
    ],
)
def test_any_line_of_data_is_one_message(line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not UTF-8, half a character, an answer that is no number, no record: named by file and line."""
    data = tmp_path / "train.jsonl"
    data.write_bytes(b'{"prompt": "1+1", "answer": "2"}\n' + line + b"\n")
    assert dry_run(tmp_path, f"data.train_path={data}") == 1
    assert str(data) in capsys.readouterr().err


def test_a_broken_recipe_file_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Syntax, import, exception, a wrong type: the file is named."""
    for number, text in enumerate(("def f(:", "import nosuchmodule", "1 / 0", "def f() -> int:\n    return 1\n")):
        path = tmp_path / f"r{number}.py"
        path.write_text(text)
        assert main(["train", f"{path}:f", "--dry-run"]) == 1
        assert str(path) in capsys.readouterr().err


def test_a_broken_profile_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Syntax, import, exception, a wrong type, no such name: the file is named."""
    for number, text in enumerate(("def f(:", "import nosuchmodule", "1 / 0", "def f():\n    return 1\n", "x = 1\n")):
        path = tmp_path / f"p{number}.py"
        path.write_text(text)
        assert main(["launch", "tiny.quickstart", "--cluster", f"{path}:f", "--dry-run"]) == 1
        told = capsys.readouterr().err
        assert str(path) in told and "Traceback" not in told


@pytest.mark.parametrize(
    "records",
    [
        *("[]\n", "null\n", '{"step": "x"}\n', '{"step": 1, "loss": []}\n', '{"step": 1}\n{"step": 1}\n', "\xff\n"),
        '{"step": 1, "loss": []}\n{"step": 2, "loss": 1}\n',
        f'{{"step": {HUGE[0]}, "loss": {HUGE[0]}}}\n',
        '{"step": 1e999, "loss": NaN}\n',
    ],
)
def test_records_of_another_shape_are_one_message(
    records: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page is written, or the file is named; a run folder that someone edited is no traceback."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    config_module.save(RunConfig(), folder.config)
    folder.metrics.write_bytes(records.encode("latin1"))
    if main(["report", str(folder.root)]):
        assert "metrics.jsonl" in capsys.readouterr().err


def test_eval_takes_a_model_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory with a model's config.json is a model: what is asked for next is its problems."""
    assert main(["eval", str(MODELS / "student")]) == 1
    assert "--problems = none" in capsys.readouterr().err
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": "1+1", "answer": "2"}) + "\n")
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    command = ["eval", str(MODELS / "student"), "--problems", str(problems), "--out", str(mine)]
    assert main(command) == 1
    assert "is no evaluation" in capsys.readouterr().err and mine.read_text() == "{}"


def test_plan_holds_the_layout_to_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    """The same rule as for a run."""
    assert main(["plan", "tiny.quickstart", "student.parallel.tp=3"]) == 1
    assert "attention heads" in capsys.readouterr().err


def put(place: Path, kind: str) -> None:
    """Something else in the place of a file: what waits, never ends, leads nowhere, or is no record."""
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif kind == "circle":
        place.symlink_to(place.name)
    elif kind == "folder":
        place.mkdir()
    else:
        place.write_text(TEXTS_OF_FILES[kind])


TEXTS_OF_FILES = {
    "empty": "",
    "list": "[]\n",
    "other": '{"step": 1}\n',
    "deep": "[" * 100_000 + "\n",
    "digits": f'{{"step": {HUGE[1]}}}\n',
}
ODD_FILES = ("pipe", "device", "circle")
KINDS = (*ODD_FILES, "folder", *TEXTS_OF_FILES)


def refused(capsys: pytest.CaptureFixture[str], *command: str | Path) -> str:
    """What a command says that refuses, in one message."""
    code = main(list(map(str, command)))
    told = capsys.readouterr().err
    assert code == 1 and "Traceback" not in told and len(told) < 2000, told
    return told


@pytest.mark.parametrize("kind", ODD_FILES)
def test_data_that_is_no_file_is_not_waited_for(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe that nobody writes to, a device without end, a link in a circle: named for what it is."""
    data = tmp_path / "odd.jsonl"
    put(data, kind)
    why = "leads nowhere" if kind == "circle" else "a pipe or a device"
    for command in (["train", "tiny.quickstart", "--dry-run"], ["show", "tiny.quickstart"]):
        assert why in refused(capsys, *command, f"data.train_path={data}")
    model = MODELS / "student"
    places = ["--student", model, "--teacher", MODELS / "teacher", "--heldout", MODELS / "heldout.jsonl"]
    assert why in refused(capsys, "new", tmp_path / "mine.py", *places, "--train", data)
    assert not (tmp_path / "mine.py").exists()


def test_rows_that_no_file_has_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More than Python counts, and none at all."""
    for rows in ("[99999999999999999999999:]", "[:99999999999999999999999]", "[5:2]"):
        assert rows in refused(
            capsys, "train", "tiny.quickstart", "--dry-run", f"data.train_path={MODELS / 'train.jsonl'}{rows}"
        )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_odd_files_is_one_message(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever stands in the place of a model's file: the model is named, nothing is waited for."""
    model = tmp_path / "student"
    shutil.copytree(MODELS / "student", model)
    put(model / name, kind)
    place = f"student.path={model}"
    told = refused(capsys, "train", "tiny.quickstart", "--dry-run", "--run-dir", tmp_path / "run", place)
    assert str(model) in told
    if name == "config.json":
        for command in (["plan", "tiny.quickstart", place], ["convert", "inspect", model], ["eval", model]):
            told = refused(capsys, *command)
            assert str(model) in told or "--problems = none" in told
    if name == "tokenizer.json":
        assert str(model) in refused(capsys, "show", "tiny.quickstart", place)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "samples.jsonl", "eval/step_000001.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_odd_files_is_one_message(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever stands in the place of a run's record: a page is written, or the file is named."""
    sound, odd = RunFolder(tmp_path / "sound"), RunFolder(tmp_path / "odd")
    for folder in (sound, odd):
        folder.create()
        config_module.save(RunConfig(), folder.config)
        append(folder.metrics, {"step": 1.0, "loss": 1.0})
    put(odd.root / name, kind)
    for command in (["report", odd.root], ["compare", sound.root, odd.root, "--out", tmp_path / "page.html"]):
        code = main(list(map(str, command)))
        told = capsys.readouterr().err
        assert "Traceback" not in told and (code == 0 or odd.root.name in told)
    if name == "config.json":
        for command in (["export", odd.root, "--out", tmp_path / "out"], ["fork", odd.root, "name=other"]):
            refused(capsys, *command)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mark_of_odd_kind_is_no_mark(
    kind: str, folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then the folder is somebody else's: nothing is written there, and nothing waited for."""
    put(folder.root / MARK, kind)
    assert MARK in refused(capsys, "train", "tiny.quickstart", "--dry-run", "--run-dir", folder.root)
    refused(capsys, "export", folder.root, "--out", tmp_path / "out")


def test_a_run_folder_lies_in_no_other_and_behind_no_broken_link(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run deletes parts of its folder, such as sync/; a link in a circle can be no folder. Neither passes a dry run."""
    circle, door = tmp_path / "circle", tmp_path / "door"
    circle.symlink_to("circle")
    door.symlink_to(folder.root / "logs")
    for place, why in {
        folder.sync / "v1": "another run",
        folder.root / "a" / "b": "another run",
        door / "inner": "another run",
        circle: "leads nowhere",
        circle / "inner": "leads nowhere",
    }.items():
        assert why in refused(capsys, "train", "tiny.quickstart", "--dry-run", "--run-dir", place)
