"""HTTP to one or more replicas of a server: pooled connections, least-loaded choice, and retries of what is safe.

In: a JSON request, with a function that reads its reply. Out: what that function returns, or one of three errors:
``ServerError`` when no request can succeed (nobody answers, or the server refuses: 4xx), ``GaveUp`` when this one cannot,
``StaleWeightsError`` when every replica that answers serves other weights than the request names.

What is retried, with growing random pauses until ``deadline_s``: no connection, a reset, a timeout, 5xx, 429, and a reply
that is ``NotAnAnswer``. Never any other 4xx. Waiting for a server that is being started again costs nothing of the deadline. A
request whose connection was reset three times is suspected of killing servers and is not sent again in this process.

A replica that was started again serves the weights it began with, and one that another rank gave new ones serves those. So
its version is asked for before it gets a request that names one, whenever it is not known to serve that one; those last heard
to serve another come last.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    IncompleteRead,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
)

from megatron_distill.errors import ServerError, StaleWeightsError
from megatron_distill.sglang.server_log import log_tail
from megatron_distill.sglang.wire import Json, MalformedReply, NotAnAnswer, TooOld, serves
from megatron_distill.types import SinceVersion, WantedVersion

_CONNECT_TIMEOUT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0
_PROBE_EVERY_S = 1.0  # how often a replica that refused a connection is tried again
_MAX_RESETS = 3
_NUM_CONTROL_CONNECTIONS = 2
_VERSION_TIMEOUT_S = 30.0
DEADLINE_PER_TIMEOUT = 2.5
"""A request with all its retries may take so many times as long as one try: a reply that never came is asked for twice more."""


class GaveUp(ServerError):
    """This request could not be answered; others may be."""


class RefusedError(ServerError):
    """A server that works would not do what it was told."""


class _Unreachable(Exception):
    """No connection: the request was not sent."""


class _Reset(Exception):
    """The connection broke after the request was sent."""


class _Busy(Exception):
    """A timeout, 5xx or 429."""


class _Refused(Exception):
    """Any other 4xx: the server would refuse it again."""


class Replica:
    """One server: its connections, how many requests are under way, since when it has been unreachable, what it serves."""

    def __init__(self, url: str, num_connections: int, log_file: Path | None, key: str) -> None:
        self.url = url.rstrip("/")
        self.log_file = log_file
        self.num_in_flight = 0
        self.down_since: float | None = None
        self.next_probe = 0.0
        self.version: str | None = None  # of its weights, as last heard; None after its connection broke
        self.asking = threading.Lock()  # for its version
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        # urllib3 rather than requests: thread-safe by design, and it never sends a loopback call to a configured proxy.
        # Not limited here: how many requests are under way is, and a pause must get through when all of them wait.
        self._http = self._connections(num_connections)

    def _connections(self, num_kept: int) -> urllib3.HTTPConnectionPool:
        return urllib3.connection_from_url(self.url, maxsize=num_kept, retries=False)

    def call(
        self, method: str, path: str, body: bytes | None, read_timeout_s: float, *, keep_alive: bool = True
    ) -> bytes:
        """One HTTP exchange, without retries.

        Args:
            method: GET or POST.
            path: of the URL.
            body: JSON, or nothing.
            read_timeout_s: longest wait for the reply.
            keep_alive: the connection may be an old one and serve again; SGLang drops those that idled for 5 s, which looks
                like a reset if it happens at the wrong moment. Otherwise it is a new one, and is closed afterwards.

        Raises:
            _Unreachable, _Reset, _Busy, _Refused: what their names say.
        """
        http_pool = self._http if keep_alive else self._connections(1)
        try:
            response = http_pool.request(
                method,
                path,
                body=body,
                headers=self._headers
                | ({"Content-Type": "application/json"} if body else {})
                | ({} if keep_alive else {"Connection": "close"}),
                timeout=urllib3.Timeout(connect=_CONNECT_TIMEOUT_S, read=read_timeout_s),
            )
            data: bytes = response.data
            self.down_since = None
        except (NewConnectionError, ConnectTimeoutError) as error:
            now = time.monotonic()
            self.down_since = self.down_since or now
            self.next_probe = now + _PROBE_EVERY_S
            self.version = None
            raise _Unreachable(str(error)) from error
        except ReadTimeoutError as error:
            raise _Busy(f"no answer within {read_timeout_s:.0f} s") from error
        except (ProtocolError, IncompleteRead, http.client.HTTPException, OSError) as error:
            self.version = None
            raise _Reset(str(error)) from error
        except HTTPError as error:
            raise _Busy(str(error)) from error
        finally:
            if not keep_alive:
                http_pool.close()
        if response.status == 200:
            return data
        if response.status == 429 or response.status >= 500:
            raise _Busy(f"HTTP {response.status}: {_error_text(data)}")
        raise _Refused(f"HTTP {response.status}: {_error_text(data)}")

    def close(self) -> None:
        """Close idle connections."""
        self._http.close()


class ReplicaPool:
    """Replicas that serve the same weights."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        num_connections: int,
        unreachable_s: float,
        log_files: Mapping[str, Path],
        key: str,
        first_replica: int,
    ) -> None:
        """See ``SGLangClient`` for the arguments."""
        num_at_most = num_connections * len(urls) + _NUM_CONTROL_CONNECTIONS  # on one replica, if the others are down
        self.replicas = [Replica(url, num_at_most, log_files.get(url), key) for url in urls]
        first = first_replica % len(urls)
        self._by_preference = self.replicas[first:] + self.replicas[:first]
        self.counters: Counter[str] = Counter()
        self.unreachable_s = unreachable_s
        self._lock = threading.Lock()
        self._num_resets: Counter[bytes] = Counter()

    def request[T](
        self,
        request: Json,
        read: Callable[[Json], T],
        cancelled: threading.Event,
        *,
        timeout_s: float,
        weight_version: WantedVersion = None,
    ) -> T:
        """Send to the least-loaded replica, retry what is safe, and return ``read(reply)``.

        Args:
            request: body of POST /generate.
            read: takes the reply apart; may raise ``NotAnAnswer`` (ask again) or ``MalformedReply`` (give up).
            cancelled: set by another thread to end the retries.
            timeout_s: longest wait for the reply; all tries together may take ``DEADLINE_PER_TIMEOUT`` times as long.
            weight_version: what a replica must serve to get the request; None takes any.

        Raises:
            GaveUp: the deadline passed, the reply is malformed, or the request is suspected of killing servers.
            StaleWeightsError: every replica that can be reached serves another version.
            ServerError: no replica can be reached, or the request was refused.
        """
        body = json.dumps(request).encode()
        digest = hashlib.blake2b(body, digest_size=16).digest()
        deadline_s = DEADLINE_PER_TIMEOUT * timeout_s
        deadline = time.monotonic() + deadline_s
        pause_s = _FIRST_PAUSE_S
        stale: set[Replica] = set()
        while True:
            self._refuse_quarantined(digest)
            began = time.monotonic()
            replica = self._acquire(cancelled, weight_version, stale)
            deadline += time.monotonic() - began
            is_sent = False
            try:
                if not self._serves(replica, weight_version):
                    stale.add(replica)
                    continue  # to another one, or to the error that says that there is none
                is_sent = True
                answer = read(json.loads(replica.call("POST", "/generate", body, timeout_s)))
                with self._lock:
                    self._num_resets.pop(digest, None)
                return answer
            except _Refused as error:
                raise ServerError(
                    f"{replica.url}/generate = {error}. The server refuses this request, and would again. Compare the "
                    "client's vocab_size and context_length with how the server was started."
                ) from error
            except _Unreachable:
                self.count("unreachable")
                continue  # _acquire waits for it, or takes another
            except _Reset as error:
                problem = f"connection reset ({error})"
                self.count("resets")
                with self._lock:
                    self._num_resets[digest] += is_sent  # not if the question for the version met the reset
            except (_Busy, NotAnAnswer) as error:
                problem = str(error)
                replica.version = None  # it may have been started again
                self.count("too_old" if isinstance(error, TooOld) else "retries")
            except (MalformedReply, LookupError, TypeError, ValueError) as error:
                raise GaveUp(
                    f"{replica.url} = malformed reply: {error}. The server is not the SGLang this client was written "
                    "for, or a proxy changed the reply. Talk to the server itself, at a version docs/sglang.md names."
                ) from error
            finally:
                self._release(replica)
            if time.monotonic() + pause_s > deadline:
                raise GaveUp(
                    f"{replica.url} = {problem}: still so after {deadline_s:g} s of retries. "
                    f"The server is overloaded, paused or stuck. See {replica.log_file or 'its log'}, or raise its time "
                    "limit (servers.request_timeout_s)."
                )
            cancelled.wait(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def control(self, replica: Replica, method: str, path: str, body: Json | None, timeout_s: float) -> Json:
        """One control call to one replica, without retries: what half happened must be looked at, not repeated.

        Raises:
            RefusedError: the server answered, and would not do it.
            ServerError: it failed in any other way.
        """
        data_out = json.dumps(body).encode() if body is not None else None
        try:
            data = replica.call(method, path, data_out, timeout_s, keep_alive=False)
        except (_Unreachable, _Reset, _Busy, _Refused) as error:
            kind = RefusedError if isinstance(error, _Refused) else ServerError
            raise kind(
                f"{replica.url}{path} = {error}: the server did not do it. If it was a weight update, its weights are "
                f"unknown: send all of them again before using it. {self._where_to_look(replica)}"
            ) from error
        try:
            reply = json.loads(data)
        except ValueError:
            return {"message": data.decode(errors="replace")}  # /flush_cache answers in plain text
        return reply if isinstance(reply, dict) else {"message": reply}

    def close(self) -> None:
        """Close idle connections."""
        for replica in self.replicas:
            replica.close()

    def wait_reachable(self) -> None:
        """Wait until every replica answers: one that died is being started again.

        Raises:
            ServerError: one does not within ``unreachable_s``.
        """
        for replica in self.replicas:
            began = time.monotonic()
            while True:
                try:
                    replica.version = self._version_of(replica)
                    break
                except (_Unreachable, _Reset, _Busy) as error:
                    waited_s = time.monotonic() - began
                    if waited_s > self.unreachable_s:
                        raise ServerError(
                            f"{replica.url} = {error}: no answer for {waited_s:.0f} s. It died, and was not started again "
                            f"in time. {self._where_to_look(replica)}"
                        ) from error
                    time.sleep(_PROBE_EVERY_S / 4)
                except _Refused as error:
                    raise ServerError(
                        f"{replica.url} = {error}: it refuses to say what it serves. Wrong key?"
                    ) from error

    def _serves(self, replica: Replica, wanted: WantedVersion) -> bool:
        """Whether it serves these weights: asked where that is not known, by the first of the requests that wait for it."""
        if _is_known_to_serve(replica, wanted):
            return True
        with replica.asking:
            if not _is_known_to_serve(replica, wanted):
                version = replica.version = self._version_of(replica)
                return serves(version, wanted)
        return True

    @staticmethod
    def _version_of(replica: Replica) -> str:
        info = json.loads(replica.call("GET", "/model_info", None, _VERSION_TIMEOUT_S, keep_alive=False))
        return str(info["weight_version"])

    def _acquire(self, cancelled: threading.Event, weight_version: WantedVersion, stale: set[Replica]) -> Replica:
        """The least-loaded replica that is up, waiting for one if need be: of those not last heard to serve another version, or
        else of those that this request has not found ``stale``. ``_release`` gives it back."""
        while True:
            if cancelled.is_set():
                raise GaveUp("sglang request = cancelled: another request failed.")
            now = time.monotonic()
            with self._lock:
                up = [
                    replica
                    for replica in self._by_preference
                    if replica.next_probe <= now
                    and (replica not in stale or _is_known_to_serve(replica, weight_version))
                ]
                likely = [r for r in up if r.version is None or serves(r.version, weight_version)]
                if up:
                    replica = min(likely or up, key=lambda candidate: candidate.num_in_flight)
                    replica.num_in_flight += 1
                    if replica.down_since is not None:
                        replica.next_probe = now + _PROBE_EVERY_S  # one request at a time finds out whether it is back
                    return replica
                down_s = {replica.url: now - (replica.down_since or now) for replica in self.replicas}
            if stale:
                raise StaleWeightsError(
                    f"sglang servers = not weight version {_words(weight_version)}: no replica that can be reached serves "
                    "that. They were started again, or an update missed them. Send the current weights before asking again."
                )
            if min(down_s.values()) > self.unreachable_s:
                raise ServerError(
                    f"sglang servers = no connection for {min(down_s.values()):.0f} s: nothing listens at "
                    f"{', '.join(down_s)}. They died, and were not started again in time. Mend the cause, then start the "
                    "same command again to resume.\n"
                    + "\n".join(self._where_to_look(replica) for replica in self.replicas)
                )
            cancelled.wait(_PROBE_EVERY_S / 4)

    def _release(self, replica: Replica) -> None:
        with self._lock:
            replica.num_in_flight -= 1

    def _refuse_quarantined(self, digest: bytes) -> None:
        if self._num_resets[digest] >= _MAX_RESETS:
            self.count("quarantined")
            raise GaveUp(
                f"sglang request {digest.hex()[:8]} = connection reset {_MAX_RESETS} times: it seems to kill servers, and is "
                "not sent again. See the end of the server's log for the error it causes."
            )

    def count(self, what: str) -> None:
        """Add one to a counter."""
        with self._lock:
            self.counters[what] += 1

    @staticmethod
    def _where_to_look(replica: Replica) -> str:
        if replica.log_file is None:
            return f"See the log of {replica.url}."
        return f"Log of {replica.url}: {replica.log_file}\n{log_tail(replica.log_file)}"


def _is_known_to_serve(replica: Replica, wanted: WantedVersion) -> bool:
    return wanted is None or (replica.version is not None and serves(replica.version, wanted))


def _words(wanted: WantedVersion) -> str:
    return f"{wanted.oldest} or later" if isinstance(wanted, SinceVersion) else repr(wanted)


def _error_text(body: bytes) -> str:
    """The message in an error reply; SGLang wraps it in three different ways."""
    try:
        reply = json.loads(body)
        message = reply.get("error", reply)
        if isinstance(message, dict):
            message = message.get("message", message)
    except (ValueError, AttributeError):
        message = body.decode(errors="replace")
    return str(message).strip().rstrip(".")[:500]
