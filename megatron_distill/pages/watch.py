"""A live page of a run, from a small web server on this machine: curves, timeline, samples token by token, processes, logs.

In: the folder of a run that goes on, is over, or has hardly begun. Out: http://127.0.0.1:PORT/KEY/, until Ctrl-C. It reads the
folder and nothing else; the page asks for what was appended since it last asked.

    megatron-distill watch runs/NAME [--port 8080]

    GET /                      (each below /KEY) the page (pages/live/)
    GET /run                   what does not change while it is looked at: config, metrics and what they mean
    GET /records?metrics=OFFSET&samples=OFFSET&timeline=OFFSET&events=OFFSET&events-ROLE=OFFSET
                               what was appended to each file, and where to go on; a file that is not named: from its start
    GET /state                 finished, failed or under way; processes and logs
    GET /log?name=trainer.out  the end of a log

Only its reader is served: the socket is the loopback's, which all users of a machine share, so that a key is part of the
address, new at each start; and a request that names another host is refused (a web site that the reader has open could
otherwise ask through their browser). Text of models is shown as text. A number that is not finite comes as null, since a
browser reads no other JSON, and is left out of the curves.
"""

import contextlib
import json
import mimetypes
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from megatron_distill.errors import DataError
from megatron_distill.runs.follower import record_of
from megatron_distill.runs.metrics import METRICS
from megatron_distill.runs.run_folder import HELDOUT, RunFolder, finite_or_none, read_json

_LOG_BYTES = 60_000
_MOST_BYTES = 8 << 20  # of one answer: a long run comes in several
_PAGE = ("index.html", "watch.js", "watch.css")
_SECURITY = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class LivePage(ThreadingHTTPServer):
    """The page's server.

    Attributes:
        key: without which nothing is answered.
    """

    daemon_threads = True

    def __init__(self, port: int, handler: type[BaseHTTPRequestHandler], key: str) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.key = key

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"http://127.0.0.1:{self.server_port}/{self.key}/"


def serve(folder: RunFolder, port: int = 0) -> LivePage:
    """A server that is bound, and answers once its ``serve_forever`` runs; port 0 takes a free one.

    Raises:
        DataError: there is no such folder, it is not a run's, or the port is taken.
    """
    if not folder.config.exists():
        raise DataError(
            f"run folder = {folder.root}: has no {folder.config.name}, so it is not a run folder. Name one that "
            "`megatron-distill train` or `launch` wrote, such as runs/NAME."
        )
    read_json(folder.config)
    key = secrets.token_hex(16)
    answers: dict[str, Callable[[Mapping[str, str]], Any]] = {
        "/run": lambda query: _run(folder),
        "/records": lambda query: _records(folder, query),
        "/state": lambda query: _state(folder),
        "/log": lambda query: _log(folder, query.get("name", "")),
    }

    class Handler(BaseHTTPRequestHandler):
        """Answers one request."""

        def do_GET(self) -> None:
            shown, path = self.path[: len(key) + 2], self.path[len(key) + 2 :]
            url = urlsplit(f"/{path}")
            name = url.path.removeprefix("/") or "index.html"
            if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
                self._send(403, b"this page is for this machine only", "text/plain")
            elif not secrets.compare_digest(shown.encode(), f"/{key}/".encode()):
                self._send(403, b"open the whole address that the command printed", "text/plain")
            elif name in _PAGE:
                page = resources.files("megatron_distill.pages") / "live" / name
                self._send(200, page.read_bytes(), mimetypes.guess_type(name)[0] or "text/plain")
            elif url.path in answers:
                query = {name: values[-1] for name, values in parse_qs(url.query).items()}
                try:
                    status, answer = 200, answers[url.path](query)
                except (OSError, ValueError) as error:  # a made-up question, or a file that is no record
                    status, answer = 500, str(error)
                self._send(status, json.dumps(finite_or_none(answer)).encode(), "application/json")
            else:
                self._send(404, b"no such page", "text/plain")

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            for header, value in _SECURITY.items():
                self.send_header(header, value)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the page has moved on
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """The page asks every second: that is no news."""

    try:
        return LivePage(port, Handler, key)
    except (OSError, OverflowError) as error:
        raise DataError(
            f"--port = {port}: cannot be listened on ({error}). Choose another, or 0 for a free one."
        ) from error


def _run(folder: RunFolder) -> dict[str, Any]:
    return {
        "folder": str(folder.root),
        "config": read_json(folder.config),
        "metrics": [asdict(metric) for metric in METRICS],
    }


def _records(folder: RunFolder, query: Mapping[str, str]) -> dict[str, Any]:
    """What each file that the query names holds from an offset on: whole lines, and the offset of the rest.

    A file that is shorter than the offset was begun anew: ``restarted`` says so, and the page begins anew too.
    """
    files = {
        "metrics": folder.metrics,
        "samples": folder.samples,
        "timeline": folder.timeline,
    } | {path.stem: path for path in folder.event_files()}
    answer: dict[str, Any] = {}
    for name, path in files.items():
        offset = int(query.get(name, "0"))
        if offset < 0:
            raise ValueError(f"{name}={offset}: must not be negative")
        size = path.stat().st_size if path.exists() else 0
        if size < offset:
            return {"restarted": True}
        data = b""
        if size > offset:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(_MOST_BYTES)
            data = data[: data.rfind(b"\n") + 1]
        records = [record for line in data.splitlines() if (record := record_of(line)) is not None]
        answer[name] = {"records": records, "offset": offset + len(data)}
    return answer


def _state(folder: RunFolder) -> dict[str, Any]:
    failure = None if folder.finished.exists() else folder.first_failure()
    job = folder.root / "launch" / "job.json"
    return {
        "time": time.time(),
        "finished": folder.finished.exists(),
        "failure": f"{failure['role']}: {failure['message']}" if failure else "",
        "job": read_json(job) if job.exists() else None,
        "processes": processes(folder),
        "evaluations": folder.evaluations(),
        "further": {name: folder.evaluations(name) for name in folder.evaluated_sets() if name != HELDOUT},
        "logs": [
            {"name": path.name, "bytes": path.stat().st_size, "changed": path.stat().st_mtime} for path in _logs(folder)
        ],
    }


def _logs(folder: RunFolder) -> list[Path]:
    return sorted(path for path in folder.logs.glob("*") if path.is_file())


def _log(folder: RunFolder, name: str) -> dict[str, Any]:
    """The end of one of the folder's own logs; nothing for any other name."""
    for path in _logs(folder):
        if path.name == name:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _LOG_BYTES))
                return {"name": name, "text": file.read().decode(errors="replace")}
    return {"name": name, "text": ""}


def processes(folder: RunFolder, proc: Path = Path("/proc")) -> list[dict[str, Any]]:
    """The run's processes on this machine, by their command lines; those on other nodes are not seen.

    Args:
        folder: where the run is recorded.
        proc: where the system describes its processes.
    """
    found = []
    ticks = os.sysconf("SC_CLK_TCK")
    for path in proc.glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            stat = (path / "stat").read_text().rpartition(")")[2].split()
            pages = int((path / "statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            continue  # it has ended, or is not ours to read
        if "megatron_distill.launch.roles" not in words or str(folder.root.absolute()) not in words:
            continue
        role = words[words.index("megatron_distill.launch.roles") + 1]
        index = words[words.index("--index") + 1] if "--index" in words else ""
        found.append(
            {
                "pid": int(path.name),
                "name": f"{role} {index}".strip() + (" (torchrun)" if "torch.distributed.run" in words else ""),
                "cpu_s": (int(stat[11]) + int(stat[12])) / ticks,
                "memory_gib": pages * os.sysconf("SC_PAGE_SIZE") / (1 << 30),
            }
        )
    return sorted(found, key=lambda one: (one["name"], one["pid"]))
