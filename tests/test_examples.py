"""``docs/examples.md``: every command is run, dry-run, or at least read by its own command's parser and rules."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_distill import config as config_module
from megatron_distill.cli.arguments import chosen_config
from megatron_distill.cli.main import main, make_parser
from megatron_distill.config.loading import load_recipe
from megatron_distill.convert.offline import hf_to_megatron
from megatron_distill.launch.launch import num_gpus
from megatron_distill.runs.checkpoints import directory_of, steps_to_keep
from megatron_distill.runs.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "examples.md").read_text()
[PROFILE] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
LAPTOP, NODE, NODES = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]


def commands(section: str) -> list[list[str]]:
    lines = re.findall(r"^megatron-distill (.*)$", section, re.MULTILINE)
    assert lines
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with models and data, put there as the page does."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    [line] = re.findall(r"^mkdir .*$", LAPTOP, re.MULTILINE)
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_if_trained(folder: RunFolder, recipe: str, step: int) -> None:
    """A run that has come to ``step``."""
    shutil.rmtree(folder.root, ignore_errors=True)
    folder.create()
    config_module.save(config_module.with_overrides(load_recipe(recipe), ["num_steps=100"]), folder.config)
    hf_to_megatron("models/student", folder.root / "megatron")
    shutil.move(folder.root / "megatron" / "release", directory_of(folder, step))
    folder.checkpoint_tracker.write_text(str(step))


def test_what_the_laptop_goes_back_to_is_kept() -> None:
    """The checkpoints that the page forks and exports outlive a run of its own command."""
    lines = commands(LAPTOP)
    [long] = [line for line in lines if "num_steps=100" in line]
    config = config_module.with_overrides(load_recipe("tiny.quickstart"), [one for one in long[2:] if "=" in one])
    steps = range(config.save_every_steps, config.num_steps + 1, config.save_every_steps)
    kept = steps_to_keep(steps, config.num_steps, config.checkpoints, best=None)
    assert {int(line[line.index("--step") + 1]) for line in lines if "--step" in line} <= kept


def understood(command: list[str]) -> None:
    """What cannot be run here is read as its command would read it."""
    options, rest = make_parser([command[0]]).parse_known_args(command)
    assert all("=" in item and item[0] != "-" for item in rest)
    if command[0] in ("train", "launch", "plan") and not options.recipe.startswith("runs/"):
        options.overrides = [*options.overrides, *rest]
        chosen_config(options)


@pytest.mark.slow
def test_the_laptops_commands(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files are written, runs are dry-run, forks and exports are made of a run that stands where the page's does."""
    done = set()
    for command in commands(LAPTOP):
        if command[0] in ("new", "show"):
            assert main(command) == 0
        elif command[0] == "train":
            assert main([*command, *([] if "--dry-run" in command else ["--dry-run"])]) == 0, capsys.readouterr().err
            assert "sound" in capsys.readouterr().out
        elif command[0] in ("fork", "export"):
            step = int(command[command.index("--step") + 1])
            as_if_trained(RunFolder(place / "runs" / "mine"), "mine.py:recipe", step)
            assert main(command) == 0, capsys.readouterr().err
        else:
            understood(command)
        done.add(command[0])
    assert done == {"new", "show", "train", "watch", "fork", "compare", "eval", "export"}
    assert config_module.load(place / "runs" / "forward" / "config.json").distill.reverse_kl_weight.at(0) == 0
    assert (place / "models" / "mine-80" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("section", "gpus"), [(NODE, 8), (NODES, 32)])
def test_the_commands_of_nodes(section: str, gpus: int, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plans are made and fit, job scripts are printed, configs break no rule; a recipe takes as many GPUs as the page says."""
    (place / "ours.py").write_text(PROFILE)
    planned = 0
    for command in commands(section):
        if command[0] == "plan":
            assert main(command) == 0
            printed = capsys.readouterr().out
            assert "DOES NOT FIT" not in printed and "bytes of the run folder" in printed
            planned += 1
        elif command[0] == "launch" and not command[1].startswith("runs/"):
            assert main([*[word for word in command if word not in ("--dry-run", "--detach")], "--dry-run"]) == 0
            assert "#SBATCH" in capsys.readouterr().out
        else:
            understood(command)
        if command[0] in ("train", "launch") and not command[1].startswith("runs/"):
            assert num_gpus(load_recipe(command[1])) == gpus
    assert planned
