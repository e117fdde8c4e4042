"""New weights for a running server: from disk and by broadcast, with the versions that replies carry."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_distill.errors import CheckpointError, ServerError, StaleWeightsError
from megatron_distill.sglang.client import SGLangClient
from megatron_distill.sglang.server import SGLangServer
from megatron_distill.training.weight_sync import Bucket, WeightsGroup, pack, send_messages
from megatron_distill.types import Generation, SamplingParams, SinceVersion
from tests.sglang.conftest import client_of
from tests.support.tiny_qwen3 import TinyQwen3
from tests.support.waiting import HANG_S

PROMPT = [5, 17, 200, 31]
RESPONSE = [40, 41, 42, 43, 44]


@pytest.fixture(autouse=True)
def original_weights(server: SGLangServer, model: TinyQwen3) -> Iterator[None]:
    """The session's server gets its first weights back after each test."""
    yield
    with client_of(server) as client:
        client.update_weights_from_disk(model.directory, version="0")


def require_serves(client: SGLangClient, model: TinyQwen3) -> None:
    """The server's log-probs are this model's."""
    (scores,) = client.score([(PROMPT, RESPONSE)], top_k=1)
    assert scores is not None
    reference_RV = model.response_logprobs(PROMPT, RESPONSE)
    np.testing.assert_allclose(scores.token_logprobs, reference_RV[np.arange(5), RESPONSE], atol=2e-5)


def sample(client: SGLangClient, weight_version: str | None = None) -> Generation:
    (generation,) = client.generate(
        [PROMPT], sampling=SamplingParams(max_new_tokens=4), seeds=[5], weight_version=weight_version
    )
    return generation


def test_weights_from_disk_change_the_model_and_the_version(
    client: SGLangClient, model: TinyQwen3, other_model: TinyQwen3
) -> None:
    """After an update the log-probs are the new model's, and replies carry the new version."""
    require_serves(client, model)
    assert sample(client).weight_version == "0"
    client.update_weights_from_disk(other_model.directory, version="7")
    require_serves(client, other_model)
    assert sample(client, weight_version="7").weight_version == "7"
    assert [info["weight_version"] for info in client.server_info()] == ["7"]


def test_response_of_another_version_is_refused(client: SGLangClient) -> None:
    """A rollout drawn with other weights than expected is an error that says so, not a sample."""
    with pytest.raises(StaleWeightsError, match=r"not weight version '3'"):
        sample(client, weight_version="3")


def test_corrupt_directory_never_reaches_the_server(
    client: SGLangClient, model: TinyQwen3, other_model: TinyQwen3, tmp_path: Path
) -> None:
    """A truncated file, which would kill the server, is refused; the old weights go on serving."""
    broken = tmp_path / "broken"
    shutil.copytree(other_model.directory, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        client.update_weights_from_disk(broken, version="8")
    require_serves(client, model)


def buckets_of(model: TinyQwen3) -> list[Bucket]:
    """A model's tensors in two buckets."""
    tensors = [(name, tensor.contiguous()) for name, tensor in model.model.state_dict().items()]
    return [tensors[:10], tensors[10:]]


def joined_group(client: SGLangClient, name: str) -> WeightsGroup:
    group = WeightsGroup(name, "127.0.0.1", 2)
    group.join(client.init_weights_group(group.address, group.port, group_name=name, backend="gloo"), on_gpu=False)
    return group


def leave(client: SGLangClient, group: WeightsGroup, failed: bool) -> None:
    left = client.destroy_weights_group(group.name)
    group.leave(failed)
    left.result(timeout=HANG_S)


def test_weights_by_broadcast_and_again_after_a_failure(
    client: SGLangClient, model: TinyQwen3, other_model: TinyQwen3
) -> None:
    """Tensors broadcast over gloo make the server the new model. A push that the server refuses, which leaves it paused with
    its session open, is an error at once; the next one, over a new group, sends everything again and succeeds."""
    group = joined_group(client, "first")
    send_messages(client, group, map(pack, buckets_of(other_model)), "9")
    require_serves(client, other_model)
    assert sample(client, weight_version="9").weight_version == "9"

    client.destroy_weights_group("first").result(timeout=HANG_S)  # so the server refuses what rank 0 is sending to it
    with pytest.raises(ServerError, match="first"):
        send_messages(client, group, map(pack, buckets_of(model)), "10")
    group.leave(failed=True)

    group = joined_group(client, "second")
    send_messages(client, group, map(pack, buckets_of(model)), "11")
    leave(client, group, failed=False)
    require_serves(client, model)
    assert sample(client, weight_version="11").weight_version == "11"
    with pytest.raises(ServerError, match="weight version '11', expected '12'"):
        client.require_weight_version("12")


def test_a_server_that_does_not_come_ends_the_joining(client: SGLangClient) -> None:
    """Rank 0 does not wait for ever for a server that refuses to join."""
    group = WeightsGroup("refused", "127.0.0.1", 2)
    refused = client.init_weights_group(group.address, group.port, group_name="refused", backend="mpi")  # type: ignore[arg-type]
    with pytest.raises(ServerError, match="init_weights_update_group"):
        group.join(refused, on_gpu=False)
    group.leave(failed=True)


def test_bucket_outside_a_session_is_an_error(client: SGLangClient) -> None:
    """The server's refusal arrives through the future of the background call."""
    with pytest.raises(ServerError, match="begin_weight_update"):
        client.update_weights_from_distributed(
            ["lm_head.weight"], ["float32"], [[320, 64]], group_name="nobody", version="1"
        ).result(timeout=HANG_S)


def test_aborted_responses_are_drawn_again(client: SGLangClient) -> None:
    """Responses that a pause cut short are asked for again, not taken for samples."""
    sampling = SamplingParams(max_new_tokens=200)
    prompts = [PROMPT] * 4
    undisturbed = client.generate(prompts, sampling=sampling, seeds=range(4))
    results: list[Generation] = []
    thread = threading.Thread(
        target=lambda: results.extend(client.generate(prompts, sampling=sampling, seeds=range(4)))
    )
    thread.start()
    while thread.is_alive() and not client.counters["retries"]:  # until a pause has met running requests
        threading.Event().wait(0.1)
        client.pause("abort")
        client.continue_generation()
    thread.join()
    assert [r.response_ids for r in results] == [u.response_ids for u in undisturbed]
    assert client.counters["retries"] > 0


@pytest.mark.parametrize("transport", ["disk", "broadcast"])
def test_responses_go_on_under_new_weights_and_say_which_tokens_they_drew(
    client: SGLangClient, model: TinyQwen3, other_model: TinyQwen3, transport: str
) -> None:
    """New weights come while responses are written. No token is lost; each span's log-probs are those of the weights that it
    names, given the whole prefix, whoever drew that; and what is not to be older than the new weights is drawn anew."""
    sampling = SamplingParams(max_new_tokens=300)
    prompts = [PROMPT, [9, 8, 7], [100, 3]]
    group = joined_group(client, "in-flight") if transport == "broadcast" else None
    results: list[Generation] = []
    drawing = threading.Thread(
        target=lambda: results.extend(
            client.generate(prompts, sampling=sampling, seeds=range(3), weight_version=SinceVersion(0))
        )
    )
    drawing.start()
    weights = [model]  # by version
    while drawing.is_alive():
        threading.Event().wait(0.1)
        weights.append(other_model if weights[-1] is model else model)
        version = str(len(weights) - 1)
        if group is not None:
            send_messages(client, group, map(pack, buckets_of(weights[-1])), version)
        else:
            client.update_weights_from_disk(weights[-1].directory, version, in_flight=True)
    if group is not None:
        leave(client, group, failed=False)
    spanning = [generation for generation in results if generation.version_spans]
    assert len(results) == 3 and spanning, "no response was being written when the weights came"
    for prompt, generation in zip(prompts, results, strict=True):
        ids = generation.response_ids
        spans = generation.version_spans or ((generation.weight_version, 0, len(ids)),)
        assert [start for _, start, _ in spans] == [0, *[end for _, _, end in spans][:-1]] and spans[-1][2] == len(ids)
        for version, start, end in spans:
            reference_RV = weights[int(version)].response_logprobs(prompt, ids)
            np.testing.assert_allclose(
                generation.sampler_logprobs[start:end], reference_RV[np.arange(start, end), ids[start:end]], atol=5e-5
            )
    newest = len(weights) - 1
    (fresh,) = client.generate([PROMPT], sampling=SamplingParams(8), seeds=[0], weight_version=SinceVersion(newest))
    assert fresh.weight_version == str(newest) and not fresh.version_spans
    with pytest.raises(StaleWeightsError, match=f"not weight version {newest + 1} or later"):
        client.generate([PROMPT], sampling=SamplingParams(8), seeds=[0], weight_version=SinceVersion(newest + 1))
