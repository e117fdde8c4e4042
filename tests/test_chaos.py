"""The chaos test itself, short: a few faults of different kinds, and a run that ends as if there had been none."""

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def tool(name: str) -> ModuleType:
    """A program of ``tools/``, as a module."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_broken_runs_end_like_an_unbroken_one(tmp_path: Path) -> None:
    """Everything killed, asked to stop, and a damaged checkpoint: equal to the bit, and nothing left running."""
    assert tool("chaos").main([str(tmp_path / "chaos")]) == 0


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
