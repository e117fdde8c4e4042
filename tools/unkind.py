"""A server that answers slowly, or refuses, for as long as a file says so: a plugin of SGLang's, for ``tools/chaos.py``.

In: every request that showed the key, and the file that MEGATRON_DISTILL_UNKIND names. Out: the request, after so many seconds
("slow 2"); or status 503 in the server's place ("refuse"); the request as it came if the file is empty. One byte is appended to
FILE.met for each request that was slowed or refused, so that whoever breaks a run can tell that it was.

SGLang finds it by an entry point, which ``entry_points`` writes: nothing of the library is changed.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

VARIABLE = "MEGATRON_DISTILL_UNKIND"
"""Names the file that says how to treat requests."""

Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[dict[str, Any], Any, Send], Awaitable[None]]


def entry_points(folder: Path, control: Path) -> dict[str, str]:
    """Write into ``folder`` what SGLang finds plugins by; the environment in which its servers find this one."""
    package = folder / "unkind.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    (package / "entry_points.txt").write_text("[sglang.srt.plugins]\nunkind = unkind:register\n")
    paths = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), VARIABLE: str(control)}


def register() -> None:
    """Called by SGLang in each of its processes; the process that listens calls the hook, when its application is there."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", _surround, HookType.AFTER)


def _surround(result: None, *args: object, **kwargs: object) -> None:
    from sglang.srt.entrypoints.http_server import app

    app.add_middleware(Unkind, control=Path(os.environ[VARIABLE]))


class Unkind:
    """An ASGI application around another one."""

    def __init__(self, app: App, control: Path) -> None:
        self._app, self._control = app, control

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        """Treat one request as the file says at this moment."""
        how, _, seconds = self._control.read_text().partition(" ") if scope["type"] == "http" else ("", "", "")
        if how:
            with self._control.with_name(self._control.name + ".met").open("ab") as met:
                met.write(b".")
        if how == "slow":
            await asyncio.sleep(float(seconds))
        if how == "refuse":
            await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body", "body": b"refused on purpose"})
        else:
            await self._app(scope, receive, send)
