"""Bad input is refused before any process starts, in one message that names value, rule and remedy; exit code not 0."""

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from megatron_distill.recipes.tiny import MODELS

from megatron_distill.cli.main import COMMANDS, command_module, main
from megatron_distill.launch.doctor import commit_of, missing_compilers
from megatron_distill.launch.signals import Interrupted, as_interrupts
from tests.support.waiting import wait_until

RECIPE = "tiny.quickstart"


def refused(capsys: pytest.CaptureFixture[str], run_dir: Path, *overrides: str) -> str:
    """The message of a run that must not start, and leaves nothing behind."""
    assert main(["train", RECIPE, "--run-dir", str(run_dir), *overrides]) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert not run_dir.exists()
    return captured.err


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("student.path=nowhere", ("student.path = nowhere", "no such directory")),
        ("student.parallel.tp=3", ("student.parallel.tp = 3", "attention heads", "divisor")),
        ("student.parallel.pp=3", ("student.parallel.pp = 3", "layers")),
        ("curriculum.horizon_tokens=4000", ("positions", "curriculum.horizon_tokens")),
        ("teacher.num_logprobs=5000", ("teacher.num_logprobs = 5000", "vocabulary")),
        (f"teacher.path={MODELS / 'student'}", ("teacher.path", "student's own weights")),
        ("data.max_prompt_tokens=5", ("data.max_prompt_tokens = 5", "Raise it to")),
        ('rollouts.stop_tokens=["stop!"]', ("rollouts.stop_tokens = 'stop!'", "not one token")),
        ('rollouts.stop_tokens=["<|im_end|>"]', ("rollouts.stop_tokens = ", "<|endoftext|> too", "Name it as well")),
        ("data.train_path=nowhere.jsonl", ("nowhere.jsonl", "missing")),
        ("rollouts.promts_per_step=3", ("unknown key", "Did you mean rollouts.prompts_per_step?")),
    ],
)
def test_bad_values_are_named_with_a_remedy(
    override: str, parts: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A wrong value is named, with the rule it breaks."""
    message = refused(capsys, tmp_path / "run", override)
    for part in parts:
        assert part in message


def test_a_broken_jsonl_row_is_named_by_file_and_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The first bad record is refused with its place."""
    broken = tmp_path / "train.jsonl"
    broken.write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2"\n')
    assert f"{broken}:2" in refused(capsys, tmp_path / "run", f"data.train_path={broken}")


def test_a_teacher_of_another_vocabulary_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two tokenizers are compared token by token, and the first difference is shown."""
    other = tmp_path / "teacher"
    shutil.copytree(MODELS / "teacher", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused(capsys, tmp_path / "run", f"teacher.path={other}")
    assert "2 tokens differ" in message
    assert "'7'" in message


def test_several_problems_are_told_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One attempt shows everything that is wrong with the files."""
    message = refused(capsys, tmp_path / "run", "student.path=a", "teacher.path=b")
    assert "student.path = a" in message
    assert "teacher.path = b" in message


def test_dry_run_prints_the_processes_and_starts_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """``--dry-run`` checks everything and leaves no folder."""
    assert main(["train", RECIPE, "--dry-run", "--run-dir", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for part in ("trainer", "student-0", "teacher-0", "--nproc-per-node=2"):
        assert part in printed
    assert not (tmp_path / "run").exists()


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    """``train --help`` lists the recipes and each field with default and meaning."""
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    for part in (RECIPE, "distill.reverse_kl_weight", "rl.clip_high", "curriculum.horizon_tokens"):
        assert part in printed


@pytest.mark.heavy
def test_doctor_reports_versions_and_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    """``doctor`` names the packages of the design, installed or not."""
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for part in ("megatron-core", "sglang", "transformer-engine", "apex", "gloo"):
        assert part in printed


def test_doctor_says_once_that_a_promised_gpu_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that is missing or too old would fail every import in turn: it is the one thing to say, and what to look at."""
    monkeypatch.setenv("MEGATRON_DISTILL_DEVICE", "cuda")
    assert main(["doctor"]) == 1
    said = capsys.readouterr().err
    assert said.count("promises a GPU") == 1 and "580 or newer" in said and "nvidia-smi" in said


def test_doctor_serves_a_model_only_if_it_is_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    """One that would not be looked at is refused."""
    assert main(["doctor", "--model", "nowhere"]) == 1
    assert "--model = nowhere: goes with --deep" in capsys.readouterr().err


def test_doctor_knows_what_kernels_are_compiled_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A C++ compiler on the path, and nvcc there or in the toolkit that CUDA_HOME names."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert missing_compilers()[0] == "C++ compiler"
    for tool in (tmp_path / "g++", tmp_path / "cuda" / "bin" / "nvcc"):
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.touch(mode=0o755)
    assert missing_compilers() == []


def test_evaluating_nothing_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """``eval`` of a directory that is neither a run nor a model says what to name."""
    assert main(["eval", str(tmp_path / "none")]) == 1
    assert "no such directory" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command of the list has a file of its own that declares its arguments, and its help says what it does."""
    assert command_module(command).run
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: megatron-distill {command}" in capsys.readouterr().out


def test_help_loads_no_command_and_no_library() -> None:
    """``--help`` lists all commands without importing one, so that it is there at once however large the libraries are."""
    code = (
        "import sys; from megatron_distill.cli.main import make_parser; make_parser([]).format_help();"
        "print(*(name for name in sys.modules if name.startswith(('megatron_distill.', 'torch', 'numpy'))))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert set(out) == {"megatron_distill.cli", "megatron_distill.cli.main", "megatron_distill.errors"}


def test_a_signal_that_python_drops_is_sent_again() -> None:
    """What is raised in the callback of a weak reference goes nowhere; the command is interrupted all the same."""

    class Referred:
        pass

    referred = Referred()
    reference = weakref.ref(referred, lambda _: os.kill(os.getpid(), signal.SIGTERM))

    def command(of: list[Referred]) -> None:
        with as_interrupts():
            of.clear()
            wait_until(lambda: False, "the signal, once more")

    of = [referred]
    del referred
    with pytest.raises(Interrupted) as stop:
        command(of)
    assert reference() is None and stop.value.code == 143


def test_help_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prose is wrapped at 80 columns; what is typed stays on one line, to be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        wide = [line for line in lines if len(line) > 80 and "  " not in line.strip()]
        assert [line for line in wide if not line.strip().startswith(("e.g. ", "'"))] == []


def test_a_mistyped_command_or_option_is_named_with_the_likely_one(capsys: pytest.CaptureFixture[str]) -> None:
    """And what cannot go together in one is refused, instead of one of the two winning silently."""
    for typed, meant in (
        (["trian", "tiny.quickstart"], "no command 'trian'. Did you mean train?"),
        (["study", "tiny.study", "--max-runing=3"], "arguments: --max-runing=3. Did you mean --max-running?"),
        (["plan", "tiny.quickstart", "--zzz"], "arguments: --zzz. Type megatron-distill plan --help."),
    ):
        with pytest.raises(SystemExit):
            main(typed)
        assert meant in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "model", "--problems", "mine.jsonl", "--set", "gsm8k"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_output_that_nobody_reads_ends_a_command_quietly() -> None:
    """As in ``megatron-distill show RECIPE | head``: no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "megatron_distill.cli.main", "completion", "bash"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_commit_of_a_checkout_is_told_with_a_mark_if_it_was_changed(tmp_path: Path) -> None:
    """Nothing where there is no checkout, though it may lie within one of something else, as an installed copy does."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "package").mkdir()
    (tmp_path / "module.py").write_text("a = 1")
    assert commit_of(tmp_path) == ""
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert (commit_of(tmp_path), commit_of(tmp_path / "package")) == (commit, "")
    (tmp_path / "module.py").write_text("a = 2")
    assert commit_of(tmp_path) == f"{commit}-dirty"
