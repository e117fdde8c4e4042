"""An HTTP server that answers /generate as a script says: the faults that a real server cannot be made to show."""

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]
Step = Callable[["Handler", Json], None]
"""Answers one request."""


class Handler(BaseHTTPRequestHandler):
    """Takes the next step of the script for each request; the last step repeats."""

    protocol_version = "HTTP/1.1"
    server: "FakeSGLang"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        self.server.next_step()(self, body)

    def do_GET(self) -> None:
        if self.server.num_info_resets:
            self.server.num_info_resets -= 1
            reset(self, {})
        else:
            self.reply(200, self.server.info)

    def reply(self, status: int, body: Json) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:  # the client asked for it, and must know that it is done
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


class FakeSGLang(ThreadingHTTPServer):
    """Counts requests and plays a script."""

    daemon_threads = True

    def __init__(self, script: Sequence[Step]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = list(script)
        self.num_requests = 0
        self.info: Json = {"weight_version": "0"}  # what /server_info and /model_info answer
        self.num_info_resets = 0  # how many of those break first
        self.ended = threading.Event()
        self._lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that have gone."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_step(self) -> Step:
        with self._lock:
            step = self.script[min(self.num_requests, len(self.script) - 1)]
            self.num_requests += 1
        return step


@contextmanager
def fake(*script: Step) -> Iterator[FakeSGLang]:
    """A running fake server."""
    server = FakeSGLang(script)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()


def sample_reply(request: Json) -> Json:
    """A good reply to a rollout request: token 7, as often as was asked for."""
    num_tokens = request["sampling_params"]["max_new_tokens"]
    return {
        "output_ids": [7] * num_tokens,
        "meta_info": {
            "finish_reason": {"type": "length", "length": num_tokens},
            "prompt_tokens": len(request["input_ids"]),
            "weight_versions": [{"version": "0", "start": 0, "end": num_tokens}],
            "output_token_logprobs": [[-0.5, 7, None]] * num_tokens,
        },
    }


def good(handler: Handler, request: Json) -> None:
    handler.reply(200, sample_reply(request))


def changed(change: Callable[[Json], None]) -> Step:
    """A good reply with something changed in it."""

    def step(handler: Handler, request: Json) -> None:
        reply = sample_reply(request)
        change(reply)
        handler.reply(200, reply)

    return step


def status(code: int, message: str = "no") -> Step:
    """An HTTP error."""
    return lambda handler, request: handler.reply(code, {"error": {"message": message}})


def reset(handler: Handler, request: Json) -> None:
    """Break the connection, as a dying server does."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True
    handler.rfile = handler.wfile = None  # type: ignore[assignment]  # nothing is left to flush


def held(until: Callable[[FakeSGLang], bool] = lambda server: False, then: Step = good) -> Step:
    """Hold a request back until something holds of the server, or the test is over; then go on."""

    def hold(handler: Handler, request: Json) -> None:
        while not until(handler.server) and not handler.server.ended.wait(0.01):
            pass
        then(handler, request)

    return hold
