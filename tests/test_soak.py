"""What is drawn of a long run's records; the run itself is made by hand."""

from pathlib import Path

import pytest

from megatron_distill.runs.run_folder import append
from tests.support.tools import tool


def test_a_folder_without_steps_is_refused_and_one_with_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what is missing, before anything is drawn; a page of records gives a figure and a table."""
    soak, figure = tool("soak"), tmp_path / "soak.svg"
    command = [str(tmp_path), "--figure", str(figure)]
    append(tmp_path / "soak.jsonl", {"step": 0, "disk_mib": 0.0, "processes": []})
    with pytest.raises(SystemExit, match=r"no soak\.jsonl with steps in it"):
        soak.main(command)
    assert not figure.exists()
    for step in range(1, 12):
        held = {"pid": 1, "name": "trainer", "memory_mib": 100.0 + step, "threads": 3, "files": 4}
        append(tmp_path / "soak.jsonl", {"step": step, "disk_mib": 1.0 + step, "processes": [held]})
    assert soak.main(command) == 0
    assert figure.exists() and "| trainer | 102 to 110 | +1000.0 | 3 | 4 |" in capsys.readouterr().out
