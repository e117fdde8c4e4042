"""The chaos test itself, short: a few faults of different kinds, and a run that ends as if there had been none."""

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_distill.runs.run_folder import RunFolder, read_lines
from tests.support.tools import tool


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_broken_runs_end_like_an_unbroken_one(tmp_path: Path) -> None:
    """Everything killed, asked to stop, and a damaged checkpoint: equal to the bit, and nothing left running."""
    assert tool("chaos").main([str(tmp_path / "chaos")]) == 0


@pytest.mark.parametrize(
    ("words", "kinds", "num_faults"),
    [
        ([], ["SIGKILL of everything", "SIGTERM", "checkpoint truncated"], 3),
        (["--only", "Ctrl-C"], ["Ctrl-C", "Ctrl-C twice"], 2),
        (["--only", "Ctrl-C", "--faults", "7"], ["Ctrl-C", "Ctrl-C twice"], 7),
        (["--only", "nonsense", "--faults", "3"], [], 0),
        (["--only", "disk full"], [], 0),
    ],
)
def test_the_kinds_that_are_asked_for_are_broken_or_there_are_none(
    words: list[str],
    kinds: list[str],
    num_faults: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Words that no kind has, or one that is not possible here, are refused before the first run, with the kinds."""
    chaos, asked = tool("chaos"), []
    monkeypatch.setattr(chaos, "small_disk", lambda root: contextlib.nullcontext())
    monkeypatch.setattr(chaos, "chaos", lambda root, number, seed, faults, disk: asked.append((number, faults)) or True)
    if kinds:
        assert chaos.main([str(tmp_path), *words]) == 0
        ((number, faults),) = asked
        assert [fault.name for fault in faults] == kinds and number == num_faults
    else:
        with pytest.raises(SystemExit):
            chaos.main([str(tmp_path), *words])
        assert "no fault that is possible here. Of: SIGKILL of everything, " in capsys.readouterr().err and not asked


@pytest.mark.slow
def test_a_start_ends_with_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However that is left, Ctrl-C included: its processes have a session of their own."""
    chaos = tool("chaos")
    monkeypatch.setattr(chaos, "_COMMAND", (sys.executable, "-c", "import time; time.sleep(1e6)"))
    with contextlib.suppress(KeyboardInterrupt), chaos.Start(RunFolder(tmp_path / "run")) as start:
        assert start.pids() == [start.process.pid]
        raise KeyboardInterrupt
    assert start.pids() == [] and not start.running()


@pytest.mark.slow
def test_a_fault_that_was_none_is_told_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends nothing else; and the folder's next runs have names of their own, wherever they lay."""
    chaos = tool("chaos")
    monkeypatch.setattr(chaos, "_COMMAND", (sys.executable, "-c", ""))
    monkeypatch.setattr(chaos, "MOMENTS", {"at once": lambda start, rng: True})
    unbroken = RunFolder(tmp_path / "unbroken" / "run")
    unbroken.create()
    unbroken.finished.write_text(json.dumps({}))

    def break_it(start: Any, rng: Any) -> None:
        raise AssertionError("no request met it")

    fault = chaos.Fault(chaos.DISK, ("at once",), break_it)
    for _ in range(2):
        assert not chaos.chaos(tmp_path, 1, 1, [fault], tmp_path / "disk")
    records = list(read_lines(tmp_path / "compared.jsonl"))
    assert [record["run"] for record in records] == ["run-001", "run-002"]
    assert records[0]["differences"] == ["disk full: no request met it", "did not finish"]
    assert [record["came"] for record in read_lines(tmp_path / "faults.jsonl")] == [True, True]


def test_an_unkind_server_is_slow_or_refuses_for_as_long_as_its_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late, refused with 503, then as ever; each request that was treated so is counted, and the server sees no refused one."""
    unkind = tool("unkind")
    waited: list[float] = []
    sent: list[dict[str, Any]] = []
    served: list[str] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    async def server(scope: dict[str, Any], receive: Any, send: Any) -> None:
        served.append(scope["path"])

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    monkeypatch.setattr(unkind.asyncio, "sleep", sleep)
    manners = tmp_path / "manners"
    application = unkind.Unkind(server, manners)
    for number, word in enumerate(("", "slow 2", "refuse", "")):
        manners.write_text(word)
        asyncio.run(application({"type": "http", "path": f"/{number}"}, None, send))
    assert waited == [2.0]
    assert served == ["/0", "/1", "/3"]
    assert [message.get("status") for message in sent] == [503, None]
    assert (tmp_path / "manners.met").read_bytes() == b".."
