"""A real Chromium without a window, driven through its debugging pipe: no driver program and no Python package in between.

    with Browser(folder) as browser:
        browser.open("http://127.0.0.1:8080")
        browser.wait_for("document.title === 'ready'")

Debian's chromium; ``install`` fetches it where it is missing, as ``slurm_lab`` does Slurm.
"""

import json
import os
import select
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.waiting import HANG_S

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def install() -> str | None:
    """Make Chromium available through apt-get, if no browser of its kind is.

    Returns:
        None if it is there, else why it is not, and what to type.
    """
    if any(map(shutil.which, _NAMES)):
        return None
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "Chromium is not installed. On Debian, as root: apt-get install --no-install-recommends chromium"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in ("apt-get -q update", "apt-get -q install -y --no-install-recommends chromium"):
        done = subprocess.run(command.split(), env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{command}: {(done.stderr or done.stdout).strip()[-500:]}"
    return None


class Browser:
    """One page of a headless Chromium. Ends with the block."""

    def __init__(self, profile: Path, width: int = 1200, height: int = 900) -> None:
        program = next(found for name in _NAMES if (found := shutil.which(name)))
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        command = [
            *(program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"),
        ]
        # Chromium reads its commands from descriptor 3 and answers on 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "browser", *command]
        self._process = subprocess.Popen(
            shell, pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number, self._session = b"", 0, ""
        target = self._command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        # A window of a browser without a screen has no size of its own at first.
        self._command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._write)
        self._process.terminate()
        self._process.wait(HANG_S)
        os.close(self._read)

    def open(self, url: str) -> None:
        """Go to a page."""
        self._command("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """What JavaScript gives; promises are waited for."""
        reply = self._command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true; while a page loads it may fail."""
        deadline = time.monotonic() + HANG_S
        while not self.evaluate(f"(() => {{ try {{ return Boolean({expression}) }} catch {{ return false }} }})()"):
            if time.monotonic() > deadline:
                raise AssertionError(f"{expression}: never true. The page: {self.evaluate('document.body.innerText')}")
            threading.Event().wait(0.05)

    def _command(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (reply := self._next()).get("id") != self._number:
            pass
        assert "error" not in reply, f"{method}: {reply['error']}"
        return reply["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            readable, _, _ = select.select([self._read], [], [], HANG_S)
            assert readable, "Chromium does not answer"
            data = os.read(self._read, 1 << 16)
            assert data, "Chromium has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        reply: dict[str, Any] = json.loads(line)
        return reply
