"""A real SGLang server against transformers in float32: log-probabilities, sampling, seeds, limits.

Bounds: both sides compute in float32 with differently ordered sums. The largest difference seen is 4e-6 nats; the tests
allow 2e-5.
"""

import json

import numpy as np
import psutil
import pytest
import urllib3

from megatron_distill.errors import DataError, ServerError
from megatron_distill.sglang import wire
from megatron_distill.sglang.client import SGLangClient
from megatron_distill.sglang.server import SGLangServer
from megatron_distill.types import SamplingParams, TopKSignal
from tests.support.tiny_qwen3 import CONTEXT_LENGTH, END_OF_TEXT, VOCAB_SIZE, TinyQwen3
from tests.support.waiting import HANG_S

ATOL_NATS = 2e-5
PROMPT = [5, 17, 200, 31]
OTHER_PROMPT = [9, 8]


def random_ids(num_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, num_tokens).tolist()


def scored(client: SGLangClient, prompt: list[int], response: list[int], top_k: int = 4) -> TopKSignal:
    (scores,) = client.score([(prompt, response)], top_k=top_k)
    assert scores is not None
    return scores


def test_scores_are_the_models_logprobs(client: SGLangClient, model: TinyQwen3) -> None:
    """Token, top-k and stop log-probs of a response equal transformers', row r belonging to response token r."""
    pairs = [(PROMPT, random_ids(40, 1)), (OTHER_PROMPT, random_ids(1, 2)), ([7], random_ids(200, 3))]
    stop_token_ids = (VOCAB_SIZE - 1, END_OF_TEXT, 40)
    results = client.score(pairs, top_k=16, stop_token_ids=stop_token_ids)
    for (prompt, response), scores in zip(pairs, results, strict=True):
        assert scores is not None
        reference_RV = model.response_logprobs(prompt, response)
        rows = np.arange(len(response))
        np.testing.assert_allclose(scores.token_logprobs, reference_RV[rows, response], atol=ATOL_NATS)
        np.testing.assert_allclose(scores.stop_logprobs, reference_RV[:, stop_token_ids], atol=ATOL_NATS)
        np.testing.assert_allclose(scores.topk_logprobs, -np.sort(-reference_RV)[:, :16], atol=ATOL_NATS)
        np.testing.assert_allclose(
            np.take_along_axis(reference_RV, scores.topk_ids, axis=1), scores.topk_logprobs, atol=ATOL_NATS
        )
        assert scores.topk_ids.dtype == np.int32
        assert scores.topk_logprobs.dtype == np.float32


def test_top_k_of_the_whole_vocabulary_is_a_distribution(client: SGLangClient) -> None:
    """With K = V every token appears once and the probabilities sum to 1."""
    scores = scored(client, PROMPT, random_ids(8), top_k=VOCAB_SIZE)
    assert (np.sort(scores.topk_ids) == np.arange(VOCAB_SIZE)).all()
    np.testing.assert_allclose(np.exp(scores.topk_logprobs).sum(axis=1), 1, atol=1e-5)


def test_last_vocabulary_entry_is_scored(client: SGLangClient, model: TinyQwen3) -> None:
    """SGLang misreports the id V - 1 as 0; the scores of a response that holds it are right all the same."""
    response = [VOCAB_SIZE - 1, 12, VOCAB_SIZE - 1]
    reference_RV = model.response_logprobs(PROMPT, response)
    scores = scored(client, PROMPT, response)
    np.testing.assert_allclose(scores.token_logprobs, reference_RV[np.arange(3), response], atol=ATOL_NATS)


def test_nested_reply_reads_like_the_flat_one(client: SGLangClient, server: SGLangServer) -> None:
    """A server that ignores the flat form's flags gives the same scores through the nested form."""
    response = random_ids(9)
    flat_request = wire.score_request(PROMPT, response, 5, (2, 40))
    nested_request = {key: value for key, value in flat_request.items() if "flat" not in key}
    flat, nested = (raw_generate(server, request) for request in (flat_request, nested_request))
    assert "input_top_logprobs" in nested["meta_info"]
    assert "input_top_logprobs" not in flat["meta_info"]
    a, b = (wire.read_scores(reply, len(PROMPT), len(response), 5, (2, 40)) for reply in (flat, nested))
    np.testing.assert_array_equal(a.topk_ids, b.topk_ids)
    np.testing.assert_allclose(a.topk_logprobs, b.topk_logprobs, atol=ATOL_NATS)
    np.testing.assert_allclose(a.stop_logprobs, b.stop_logprobs, atol=ATOL_NATS)


def raw_generate(server: SGLangServer, request: wire.Json) -> wire.Json:
    import requests

    headers = {"Authorization": f"Bearer {server.key}"}
    reply: wire.Json = requests.post(f"{server.url}/generate", json=request, headers=headers, timeout=HANG_S).json()
    return reply


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_sampler_logprobs_are_at_the_temperature_and_untruncated(
    client: SGLangClient, model: TinyQwen3, temperature: float
) -> None:
    """The sampler's log-probs are log softmax(logits / T) over the whole vocabulary, whatever top_p and top_k."""
    sampling = SamplingParams(max_new_tokens=12, temperature=temperature, top_p=0.8, top_k=50)
    samples = client.generate([PROMPT, OTHER_PROMPT], sampling=sampling, seeds=[1, 2])
    for prompt, sample in zip([PROMPT, OTHER_PROMPT], samples, strict=True):
        reference_RV = model.response_logprobs(prompt, sample.response_ids, temperature)
        rows = np.arange(len(sample.response_ids))
        np.testing.assert_allclose(sample.sampler_logprobs, reference_RV[rows, sample.response_ids], atol=ATOL_NATS)


def test_scores_of_a_sample_are_its_sampler_logprobs(client: SGLangClient) -> None:
    """At temperature 1, scoring a response gives the log-probs it was drawn with: prefill and decoding agree."""
    (sample,) = client.generate([PROMPT], sampling=SamplingParams(max_new_tokens=30), seeds=[11])
    scores = scored(client, PROMPT, sample.response_ids)
    np.testing.assert_allclose(scores.token_logprobs, sample.sampler_logprobs, atol=ATOL_NATS)


def test_temperature_zero_is_greedy(client: SGLangClient, model: TinyQwen3) -> None:
    """At temperature 0 each token is the likeliest one, with its log-prob at temperature 1."""
    (sample,) = client.generate([PROMPT], sampling=SamplingParams(max_new_tokens=10, temperature=0.0), seeds=[0])
    reference_RV = model.response_logprobs(PROMPT, sample.response_ids)
    assert sample.response_ids == reference_RV.argmax(axis=1).tolist()
    np.testing.assert_allclose(sample.sampler_logprobs, reference_RV.max(axis=1), atol=ATOL_NATS)


def test_seeds_are_reproducible_and_distinct(client: SGLangClient) -> None:
    """Equal seeds give equal responses, whatever else is in the batch; unequal seeds give unequal ones."""
    sampling = SamplingParams(max_new_tokens=16)
    together = client.generate([PROMPT] * 8 + [OTHER_PROMPT], sampling=sampling, seeds=[3, 3, *range(100, 106), 3])
    (alone,) = client.generate([PROMPT], sampling=sampling, seeds=[3])
    assert together[0].response_ids == together[1].response_ids == alone.response_ids
    assert len({tuple(sample.response_ids) for sample in together[:8]}) == 7


def test_seeded_sampling_follows_the_distribution(client: SGLangClient, model: TinyQwen3) -> None:
    """Over many seeds the first token's frequencies are the model's probabilities (chi-square, 9 degrees, p = 1e-4)."""
    num_draws = 400
    samples = client.generate([PROMPT] * num_draws, sampling=SamplingParams(max_new_tokens=1), seeds=range(num_draws))
    probs_V = np.exp(model.response_logprobs(PROMPT, [0])[0].astype(np.float64))
    bin_of_V = np.empty(VOCAB_SIZE, dtype=int)  # ten bins of about equal probability
    order = np.argsort(probs_V)
    bin_of_V[order] = np.minimum(np.cumsum(probs_V[order]) * 10, 9).astype(int)
    expected = np.bincount(bin_of_V, probs_V, minlength=10) * num_draws
    observed = np.bincount(bin_of_V[[sample.response_ids[0] for sample in samples]], minlength=10)
    used = expected > 0
    assert (((observed - expected) ** 2)[used] / expected[used]).sum() < 33.7


def test_stop_tokens_end_a_response(client: SGLangClient) -> None:
    """A response ends with the first stop token drawn, and says which; otherwise it has exactly the length asked for."""
    stop_token_ids = tuple(range(100, 160))
    sampling = SamplingParams(max_new_tokens=8, stop_token_ids=stop_token_ids)
    samples = client.generate([PROMPT] * 24, sampling=sampling, seeds=range(24))
    enders = {*stop_token_ids, END_OF_TEXT}
    for sample in samples:
        assert not enders & set(sample.response_ids[:-1])
        if sample.stop_reason == "stop":
            assert sample.stop_token_id == sample.response_ids[-1]
            assert sample.stop_token_id in enders
        else:
            assert sample.stop_token_id is None
            assert len(sample.response_ids) == 8
    assert {sample.stop_reason for sample in samples} == {"stop", "length"}


def test_longest_sequences_fit(client: SGLangClient) -> None:
    """context_length - 7 tokens can be scored, and drawn in full."""
    longest = CONTEXT_LENGTH - 7
    assert scored(client, [7], random_ids(longest - 1)).token_logprobs.shape == (longest - 1,)
    sampling = SamplingParams(max_new_tokens=5, top_k=1)
    (sample,) = client.generate([random_ids(longest - 5)], sampling=sampling, seeds=[0])
    assert len(sample.response_ids) == 5


@pytest.mark.parametrize(
    ("prompt", "response", "top_k", "match"),
    [
        ([5, VOCAB_SIZE], [3], 4, r"prompt_ids\[1\] = 320: must lie in \[0, 320\)"),
        ([5], [-1], 4, r"response_ids\[0\] = -1"),
        ([], [3], 4, "non-empty"),
        ([5], [], 4, "non-empty"),
        ([5.5], [3], 4, "integers"),
        ([5], [3] * (CONTEXT_LENGTH - 7), 4, r"506 tokens: must be at most context_length - 7 = 505"),
        ([5], [3], VOCAB_SIZE + 1, "top_k = 321"),
        ([5], [3], 0, "top_k = 0"),
    ],
)
def test_deadly_requests_are_refused_before_they_are_sent(
    client: SGLangClient, prompt: list[int], response: list[int], top_k: int, match: str
) -> None:
    """What would kill the server never reaches it: the refusal names the item, and the server goes on serving."""
    with pytest.raises(DataError, match=match):
        client.score([(PROMPT, [3]), (prompt, response)] if "top_k" not in match else [(prompt, response)], top_k=top_k)
    assert scored(client, PROMPT, [3]).token_logprobs.shape == (1,)


@pytest.mark.parametrize(
    ("sampling", "seeds", "match"),
    [
        (SamplingParams(max_new_tokens=0, top_p=0.0), [1], "max_new_tokens = 0.*top_p = 0"),
        (SamplingParams(max_new_tokens=4, temperature=float("nan")), [1], "temperature = nan"),
        (SamplingParams(max_new_tokens=4, stop_token_ids=(VOCAB_SIZE,)), [1], "stop_token_ids"),
        (SamplingParams(max_new_tokens=CONTEXT_LENGTH), [1], "max_new_tokens = 516 tokens"),
        (SamplingParams(max_new_tokens=4), [1, 2], "2 seeds for 1 prompts"),
        (SamplingParams(max_new_tokens=4), [-1], "seeds"),
    ],
)
def test_bad_sampling_is_refused_before_it_is_sent(
    client: SGLangClient, sampling: SamplingParams, seeds: list[int], match: str
) -> None:
    """Sampling parameters are checked here, all at once, with the remedy."""
    with pytest.raises(DataError, match=match):
        client.generate([PROMPT], sampling=sampling, seeds=seeds)


def test_refusal_of_the_server_is_an_error_not_a_missing_score(server: SGLangServer) -> None:
    """A client with the wrong limits gets the server's own words at once; a 4xx is neither retried nor "missing"."""
    with (
        SGLangClient([server.url], VOCAB_SIZE, 2 * CONTEXT_LENGTH, key=server.key) as client,
        pytest.raises(ServerError, match=r"HTTP 400.*longer than the model's context length|HTTP 400.*exceeds"),
    ):
        client.score([([5], random_ids(600))], top_k=4)
    assert client.counters == {}


def test_progress_is_reported(client: SGLangClient) -> None:
    """Each finished request is reported once, with the total."""
    reports: list[tuple[int, int]] = []
    client.score([(PROMPT, [3])] * 3, top_k=1, progress=lambda done, total: reports.append((done, total)))
    assert reports == [(1, 3), (2, 3), (3, 3)]


def test_no_route_is_open_to_a_stranger(server: SGLangServer, client: SGLangClient) -> None:
    """Every route that SGLang has, but its health and metrics, answers 401 to a request without the key or with a wrong one.
    The key is in no log and on no command line."""
    with urllib3.PoolManager() as http:
        own = {"Authorization": f"Bearer {server.key}"}
        routes = json.loads(http.request("GET", f"{server.url}/openapi.json", headers=own).data)["paths"]
        open_to_all = ("/health", "/ready", "/metrics", "/{")
        asked = 0
        for path, methods in routes.items():
            for method in methods if not path.startswith(open_to_all) else ():
                for headers in ({}, {"Authorization": "Bearer wrong"}):
                    url = f"{server.url}{path.replace('{', '').replace('}', '')}"
                    reply = http.request(method.upper(), url, headers=headers, timeout=HANG_S, retries=False)
                    assert reply.status in (401, 403), (method, path, reply.status)
                    asked += 1
        assert asked > 60  # generate, weights, pause, flush, profiles, ...
    assert server.key not in server.log_file.read_text(errors="replace")
    assert server.process_group is not None
    for process in [psutil.Process(server.process_group), *psutil.Process(server.process_group).children(True)]:
        assert server.key not in " ".join(process.cmdline())
    with SGLangClient([server.url], VOCAB_SIZE, CONTEXT_LENGTH, key="wrong") as stranger:
        with pytest.raises(ServerError, match="401"):
            stranger.generate([[5]], sampling=SamplingParams(max_new_tokens=1), seeds=[0])
        with pytest.raises(ServerError, match="401"):
            stranger.pause()
