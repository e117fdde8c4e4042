"""What the client makes of faults: which it repeats, which it reports, and that no bad reply becomes a sample."""

import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from megatron_distill.recipes import tiny

from megatron_distill.errors import ConfigError, ServerError, StaleWeightsError
from megatron_distill.sglang import transport
from megatron_distill.sglang.client import SGLangClient
from megatron_distill.types import Generation, SamplingParams, SinceVersion, VersionSpan
from tests.support.fake_sglang import FakeSGLang, Handler, Json, Step, changed, fake, good, held, reset, status
from tests.support.waiting import HANG_S

SAMPLING = SamplingParams(max_new_tokens=3)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow each other quickly."""
    monkeypatch.setattr(transport, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(transport, "_PROBE_EVERY_S", 0.05)


def client_of(*servers: FakeSGLang, **limits: Any) -> SGLangClient:
    defaults: dict[str, Any] = {"unreachable_s": HANG_S, "timeout_s": HANG_S}
    return SGLangClient([server.url for server in servers], 320, 64, **(defaults | limits))


def generate(client: SGLangClient, num: int = 1) -> list[Generation]:
    return client.generate([[5, 6]] * num, sampling=SAMPLING, seeds=range(num))


@pytest.mark.parametrize(
    "fault",
    [
        status(500),
        status(503),
        status(429),
        reset,
        changed(lambda reply: reply["meta_info"].update(finish_reason={"type": "abort", "message": "paused"})),
        changed(
            lambda reply: reply["meta_info"].update(
                weight_versions=[{"version": "0", "start": 0, "end": 1}, {"version": "1", "start": 1, "end": 3}]
            )
        ),
    ],
    ids=["500", "503", "429", "reset", "abort", "mixed-weights"],
)
def test_passing_faults_are_retried(fault: Step) -> None:
    """Server errors, overload, one reset, an abort and a response of two weight versions are asked for again, once."""
    with fake(fault, good) as server, client_of(server) as client:
        (generation,) = generate(client)
        assert generation.response_ids == [7, 7, 7]
        assert server.num_requests == 2
        assert client.counters.total() == 1


def test_what_is_too_old_is_dropped_counted_and_asked_for_again() -> None:
    """A response may span the versions that were asked for, and says which tokens each of them drew; one of which older weights
    drew a part is no sample, and the next answer takes its place. A server known to be older is not asked at all."""
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "5", "start": 1, "end": 3}]
    spanning = changed(lambda reply: reply["meta_info"].update(weight_versions=spans))

    def since(oldest: int) -> list[Generation]:
        return client.generate([[5, 6]], sampling=SAMPLING, seeds=[0], weight_version=SinceVersion(oldest))

    newer = changed(lambda reply: reply["meta_info"].update(weight_versions=[spans[1]]))
    with fake(spanning, spanning, newer) as server, client_of(server) as client:
        server.info = {"weight_version": "5"}
        (generation,) = since(3)
        assert generation.version_spans == (VersionSpan("3", 0, 1), VersionSpan("5", 1, 3))
        assert generation.weight_version == "5" and not client.counters
        (generation,) = since(4)
        assert generation.version_spans == () and generation.weight_version == "5"
        assert client.counters == {"too_old": 1} and server.num_requests == 3
        with pytest.raises(StaleWeightsError, match="not weight version 6 or later"):
            since(6)
        assert server.num_requests == 3


def test_timeout_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply that takes too long is given up and asked for again."""
    monkeypatch.setattr(transport, "DEADLINE_PER_TIMEOUT", 1000)
    with fake(held(), good) as server, client_of(server, timeout_s=0.5) as client:
        assert generate(client)[0].response_ids == [7, 7, 7]
        assert server.num_requests >= 2  # more where the good reply took half a second too
        assert client.counters["retries"] == server.num_requests - 1


def test_refusal_is_never_retried() -> None:
    """A 4xx is reported at once, with the server's own words."""
    with (
        fake(status(400, "logprob_start_len is too large")) as server,
        client_of(server) as client,
        pytest.raises(ServerError, match="HTTP 400: logprob_start_len is too large"),
    ):
        generate(client)
    assert server.num_requests == 1


def test_deadline_ends_the_retries() -> None:
    """A server that goes on failing is reported when the deadline has passed, with its last words."""
    with (
        fake(status(503, "queue is full")) as server,
        client_of(server, timeout_s=0.12, min_tokens_per_s=1e9) as client,
        pytest.raises(ServerError, match=r"queue is full: still so after 0\.3 s of retries"),
    ):
        generate(client)


def test_request_that_kills_servers_is_quarantined() -> None:
    """After three resets a request is not sent again, to no replica and not in a later call; others still are."""
    with fake(reset, reset, reset, good) as a, fake(reset, reset, reset, good) as b, client_of(a, b) as client:
        for _ in range(2):
            with pytest.raises(ServerError, match="connection reset 3 times"):
                generate(client)
        assert a.num_requests + b.num_requests == 3
        (other,) = client.generate([[9]], sampling=SAMPLING, seeds=[0])  # answered by the one, or by the other
        assert other.response_ids == [7, 7, 7]


def test_a_request_that_was_not_sent_kills_no_server() -> None:
    """What breaks is the question which weights a server holds, as while it starts again: the request is innocent."""
    with fake(good) as server, client_of(server) as client:
        server.num_info_resets = 4
        (generation,) = client.generate([[5, 6]], sampling=SAMPLING, seeds=[0], weight_version="0")
        assert generation.response_ids == [7, 7, 7]
        assert server.num_requests == 1 and client.counters == {"resets": 4}


def set_in_meta(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda reply: reply["meta_info"].update(values)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_in_meta(output_token_logprobs=[[None, 7, None]] * 3), "not finite"),
        (set_in_meta(output_token_logprobs=[[-0.5, 7, None]] * 2), "differ"),
        (set_in_meta(output_token_logprobs=[[-0.5, 8, None]] * 3), "differ"),
        (set_in_meta(prompt_tokens=3), "3 input tokens echoed, 2 sent"),
        (
            lambda reply: (reply.update(output_ids=[7]), set_in_meta(output_token_logprobs=[[-1, 7, None]])(reply)),
            "cut",
        ),
        (set_in_meta(finish_reason={"type": "stop", "matched": 9}), "does not end with the stop token"),
        (set_in_meta(finish_reason={"type": "stop", "matched": "NaN happened"}), "NaN"),
        (lambda reply: reply.pop("meta_info"), "malformed"),
    ],
    ids=["nan", "short", "other-ids", "echo", "cut-short", "stop-token", "nan-logits", "no-meta"],
)
def test_malformed_reply_is_not_a_sample(change: Callable[[dict[str, Any]], object], match: str) -> None:
    """A reply whose numbers, ids, shapes or ending are wrong is an error that says what is wrong."""
    with (
        fake(changed(lambda reply: (change(reply), None)[1])) as server,
        client_of(server) as client,
        pytest.raises(ServerError, match=match),
    ):
        generate(client)
    assert server.num_requests == 1


def test_missing_score_is_none_and_counted() -> None:
    """A score that could not be obtained is None in its place and counted; it is neither zeros nor the end of the others."""
    with fake(changed(lambda reply: None)) as server, client_of(server) as client:  # a sample is no score
        assert client.score([([5], [6]), ([5], [7])], top_k=2) == [None, None]
        assert client.counters["missing_scores"] == 2


def test_dead_server_is_named_with_its_log(tmp_path: Path) -> None:
    """If nothing listens, the error names the address, the log and the first error in the log."""
    log = tmp_path / "teacher.log"
    log.write_text(
        "Traceback (most recent call last):\n  File x\nMemoryError: too large\nTraceback (...)\nOSError: later\n"
    )
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and never listens: the port is nobody else's
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        require_named(url, log)


def require_named(url: str, log: Path) -> None:
    with (
        SGLangClient([url], 320, 64, unreachable_s=0.2, log_files={url: log}) as client,
        pytest.raises(ServerError, match=r"(?s)nothing listens at http://127.*teacher\.log.*MemoryError: too large$"),
    ):
        client.score([([5], [6])], top_k=2)


def test_other_replica_takes_over() -> None:
    """With one replica gone, all requests are answered by the other."""
    with fake(good) as dead, fake(good) as alive, client_of(dead, alive) as client:
        dead.shutdown()
        dead.server_close()
        assert len(generate(client, 16)) == 16
        assert alive.num_requests == 16
        assert client.counters["unreachable"] > 0


def test_load_goes_to_the_less_loaded_replica() -> None:
    """A replica that holds its requests gets no more of them than it has connections; the other answers the rest."""
    with fake(good) as fast, fake(held(lambda slow: slow.num_requests + fast.num_requests == 40)) as slow:
        with client_of(slow, fast, num_connections=2) as client:
            generate(client, 40)
        assert 1 <= slow.num_requests <= 2
        assert slow.num_requests + fast.num_requests == 40


def test_first_failure_ends_the_call() -> None:
    """When one request fails for good, the rest is cancelled and the error is raised without waiting for all."""
    with fake(status(400), held()) as server, client_of(server, num_connections=1) as client:
        with pytest.raises(ServerError, match="HTTP 400"):  # although the second request is never answered
            generate(client, 50)
        assert server.num_requests <= 2


def test_a_restarted_replica_gets_no_request_until_it_has_the_weights() -> None:
    """A replica that serves other weights than a request names is passed over; where all do, the error says so, and once
    they were given the weights, the same request is answered."""
    with fake(good) as current, fake(good) as stale, client_of(stale, current) as client:
        current.info, stale.info = {"weight_version": "0"}, {"weight_version": "other"}

        def ask(num: int = 1) -> list[Generation]:
            return client.generate([[5]] * num, sampling=SAMPLING, seeds=range(num), weight_version="0")

        assert len(ask(4)) == 4
        assert (stale.num_requests, current.num_requests) == (0, 4)
        current.info = {"weight_version": "other"}
        client.wait_reachable()
        with pytest.raises(StaleWeightsError, match="not weight version '0'"):
            ask()
        stale.info = {"weight_version": "0"}
        assert len(ask()) == 1
        assert (stale.num_requests, current.num_requests) == (1, 4)


def test_clients_of_the_same_servers_start_at_different_ones() -> None:
    """Eight leaders with one request each reach eight servers: none of them begins where the others do."""
    with ExitStack() as stack:
        servers = [stack.enter_context(fake(good)) for _ in range(4)]
        for leader in range(4):
            generate(stack.enter_context(client_of(*servers, first_replica=leader)))
        assert [server.num_requests for server in servers] == [1, 1, 1, 1]


def test_every_request_shows_the_key() -> None:
    """Requests and control calls alike."""
    shown: list[str | None] = []

    def look(handler: Handler, request: Json) -> None:
        shown.append(handler.headers["Authorization"])
        good(handler, request) if handler.path == "/generate" else handler.reply(200, {})

    with fake(look) as server, client_of(server, key="s3cret") as client:
        generate(client)
        client.pause()
    assert shown == ["Bearer s3cret"] * 2


def test_time_limits_grow_with_the_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """A response of many tokens may take long; the limit of one reply is the base plus its tokens at the slowest rate."""
    limits_s: list[float] = []
    request = transport.ReplicaPool.request

    def noted(pool: transport.ReplicaPool, *arguments: Any, timeout_s: float, **named: Any) -> Any:
        limits_s.append(timeout_s)
        return request(pool, *arguments, timeout_s=timeout_s, **named)

    monkeypatch.setattr(transport.ReplicaPool, "request", noted)
    with fake(good) as server, client_of(server, timeout_s=HANG_S, min_tokens_per_s=7.5) as client:
        generate(client)
    assert limits_s == [HANG_S + 3 / 7.5]


def test_a_refusing_replica_ends_a_control_call_at_once() -> None:
    """The first failure is raised while another replica has not answered yet."""
    with (
        fake(status(400, "no such group")) as refusing,
        fake(held()) as silent,
        client_of(silent, refusing) as client,
        pytest.raises(ServerError, match="no such group"),
    ):
        client.pause()


def test_limits_of_the_client_are_checked() -> None:
    """A client without servers or with an impossible context is refused when it is made."""
    with pytest.raises(ConfigError, match="0 urls"):
        SGLangClient([], 320, 64)
    with pytest.raises(ConfigError, match="context_length 7"):
        SGLangClient(["http://127.0.0.1:1"], 320, 7)


def test_a_server_that_still_holds_a_request_is_waited_for_before_new_weights() -> None:
    """SGLang answers a request a moment before it lets go of it, and refuses an update in that moment."""
    holds = [True]

    def flush(handler: Handler, request: Json) -> None:
        assert handler.path == "/flush_cache"
        handler.reply(400 if holds[0] else 200, {})
        holds[0] = False

    def update(handler: Handler, request: Json) -> None:
        assert handler.path == "/update_weights_from_disk"
        handler.server.info["weight_version"] = request["weight_version"]
        handler.reply(400 if holds[0] else 200, {"success": not holds[0], "message": "requests are still running"})

    with fake(flush, flush, update) as server, client_of(server) as client:
        server.info = {"model_path": str(tiny.MODELS / "student"), "weight_version": "0"}
        client.update_weights_from_disk(tiny.MODELS / "student", version="1")
        assert server.num_requests == 3


def test_a_control_call_has_a_connection_of_its_own() -> None:
    """A server may be closing one that idled, and what is never sent again must not meet that."""
    connections = []

    def noted(handler: Handler, request: Json) -> None:
        connections.append(handler.client_address)
        good(handler, request) if handler.path == "/generate" else handler.reply(200, {})

    with fake(noted) as server, client_of(server) as client:
        generate(client)
        client.pause()
        client.continue_generation()
    assert len(set(connections)) == 3


def test_weights_that_another_client_sent_are_asked_for() -> None:
    """Each replica of a student has a client of its own, and one of them pushes: the others know older versions."""

    def served(handler: Handler, request: Json) -> None:
        version = handler.server.info["weight_version"]
        changed(lambda reply: reply["meta_info"].update(weight_versions=[{"version": version, "start": 0, "end": 3}]))(
            handler, request
        )

    with fake(served) as first, fake(served) as second, client_of(first, second) as client:
        for version in ("1", "2"):
            first.info = second.info = {"weight_version": version}
            client.generate([[5, 6]] * 8, sampling=SAMPLING, seeds=range(8), weight_version=version)
        with pytest.raises(StaleWeightsError, match="'3'"):
            client.generate([[5, 6]] * 8, sampling=SAMPLING, seeds=range(8), weight_version="3")
        second.info = {"weight_version": "3"}
        client.generate([[5, 6]] * 8, sampling=SAMPLING, seeds=range(8), weight_version="3")
        assert not client.counters
