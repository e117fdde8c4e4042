"""A served model's hidden states: the binary form on the wire, and what a real server sends, against transformers."""

import ast
import importlib.metadata
import importlib.util
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron_distill.recipes import tiny

from megatron_distill import config as config_module
from megatron_distill.errors import ConfigError, ServerError
from megatron_distill.launch import preflight
from megatron_distill.rollouts.batches import as_tensor
from megatron_distill.sglang import hidden_states, wire
from megatron_distill.sglang.server import ServerSpec, SGLangServer, command, running
from tests.sglang.conftest import START_TIMEOUT_S, client_of
from tests.sglang.test_sglang_serving import ATOL_NATS, random_ids
from tests.support import tiny_qwen3
from tests.support.tiny_qwen3 import TinyQwen3

WIDTH = 6


def reply_to(prompt: Sequence[int], response: Sequence[int], customized_info: dict[str, Any]) -> wire.Json:
    """A server's answer to ``hidden_states_request``, with what the hook left; the log-probs are made up."""
    entries = [[None, prompt[-1], None], *([-1.0, token, None] for token in response)]
    meta = {
        "finish_reason": {"type": "length", "length": 1},
        "prompt_tokens": len(prompt) + len(response),
        "weight_version": "0",
        "input_token_logprobs": entries,
    }
    reply: wire.Json = json.loads(json.dumps({"meta_info": meta | customized_info}))
    return reply


class Request(SimpleNamespace):
    """SGLang's request, as far as the hook looks at it: told apart by identity, as SGLang's are."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def hooked(rows: torch.Tensor, num_prompt: int, chunks: Sequence[int], *, num_cached: int = 0) -> dict[str, Any]:
    """What the hook leaves of the rows [N, H] of a sequence that is prefilled in chunks, beside other requests' rows.

    Args:
        rows: of the whole sequence.
        num_prompt: tokens of the prompt.
        chunks: their lengths, which add up to what is not cached.
        num_cached: rows that the prefix cache left out.
    """
    request = Request(
        return_hidden_states=True,
        return_logprob=True,
        origin_input_ids=[0] * len(rows),
        logprob_start_len=num_prompt - 1,
        inflight_middle_chunks=0,
        customized_info=None,
    )
    start = num_cached
    for number, length in enumerate(chunks):
        others = torch.full((3, rows.shape[1]), torch.nan, dtype=rows.dtype)
        batch = torch.cat([others, rows[start : start + length], others])
        is_last = number == len(chunks) - 1
        request.inflight_middle_chunks = 0 if is_last else 1
        end = hidden_states.keep_response_rows(
            pytest.fail,  # type: ignore[arg-type]
            None,
            req=request,
            logits_output=SimpleNamespace(hidden_states=batch),
            hidden_state_offset=3,
            capture_hidden_mode=SimpleNamespace(is_full=lambda: True),
            extend_input_len=length,
            store=is_last,
        )
        assert end == 3 + length
        start += length
    assert start == len(rows)
    info: dict[str, Any] = request.customized_info
    return info


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_cached", "chunks"), [(0, [11]), (0, [4, 4, 3]), (0, [10, 1]), (3, [8]), (2, [1, 7, 1]), (0, [1] * 11)]
)
def test_rows_that_predict_the_response_arrive_bit_for_bit(
    dtype: torch.dtype, num_cached: int, chunks: list[int]
) -> None:
    """Whatever the chunks and however much of the prompt was cached, the client gets the rows of the response's tokens, in the
    server's dtype; other requests' rows, the prompt's, and that of what would come next are not sent."""
    prompt, response = [5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7]
    rows = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    info = hooked(rows, len(prompt), chunks, num_cached=num_cached)
    signal = wire.read_hidden_states(reply_to(prompt, response, info), len(prompt), len(response), "0")
    assert signal.token_logprobs.tolist() == [-1.0] * len(response)
    assert torch.equal(as_tensor(signal.hidden), rows[3:10])
    assert signal.hidden.flags.writeable


def test_a_request_that_is_not_ours_is_left_to_sglang() -> None:
    """Health checks, and whoever asks in another way, get SGLang's own treatment, with its own arguments."""
    request = Request(return_hidden_states=False, return_logprob=True)
    arguments: dict[str, Any] = {
        "req": request,
        "logits_output": None,
        "hidden_state_offset": 2,
        "capture_hidden_mode": None,
        "extend_input_len": 4,
        "store": False,
    }
    end = hidden_states.keep_response_rows(lambda processor, **given: 7 if given == arguments else 0, None, **arguments)
    assert end == 7


def test_what_cannot_be_right_is_refused() -> None:
    """A server without the hook is named with its remedy; a lost row, an unknown dtype and a NaN are malformed replies."""
    prompt, response = [5, 6], [1, 2, 3]
    rows = torch.ones(5, WIDTH, dtype=torch.bfloat16)

    def read(info: dict[str, Any]) -> None:
        wire.read_hidden_states(reply_to(prompt, response, info), len(prompt), len(response))

    read(hooked(rows, 2, [5]))
    with pytest.raises(ServerError, match="Install the package again"):
        read({"hidden_states": [[0.1] * WIDTH]})
    with pytest.raises(wire.MalformedReply, match="shape"):
        read(hooked(rows[1:], 2, [4]))
    for bad in (torch.nan, torch.inf):
        rows[3, 1] = bad
        with pytest.raises(wire.MalformedReply, match="not finite"):
            read(hooked(rows, 2, [5]))
        with pytest.raises(wire.MalformedReply, match="not finite"):
            read(hooked(rows.float(), 2, [5]))
    with pytest.raises(wire.MalformedReply, match="dtype"):
        read(hooked(torch.ones(5, WIDTH, dtype=torch.float64), 2, [5]))


def test_the_hook_has_its_place_and_only_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang still has the method with the arguments that the hook takes; a server that was not started for it gets none."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    module, name_of_class, name = hidden_states._HOOKED.rsplit(".", 2)
    (root,) = importlib.util.find_spec("sglang").submodule_search_locations  # type: ignore[union-attr,misc]
    source = Path(root).parent / f"{module.replace('.', '/')}.py"  # read, since its import takes long
    (theirs,) = (
        method.args
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name_of_class
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == name
    )
    ours = inspect.signature(hidden_states.keep_response_rows).parameters
    assert list(ours)[2:] == [argument.arg for argument in theirs.kwonlyargs]
    assert [argument.arg for argument in theirs.args] == ["self"]
    monkeypatch.setattr(HookRegistry, "_hooks", {hidden_states._HOOKED: []})
    hidden_states.register()
    assert HookRegistry._hooks[hidden_states._HOOKED] == []
    spec = ServerSpec(Path("/m"), role="teacher", device="cpu", port=1, returns_hidden_states=True)
    for name, value in command(spec).env.items():
        monkeypatch.setenv(name, value)
    hidden_states.register()
    assert len(HookRegistry._hooks[hidden_states._HOOKED]) == 1


def test_an_installation_without_the_hook_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang finds hooks by entry points, which an older installation lacks: the run is refused with the remedy. This
    installation has it."""
    assert hidden_states.is_installed()
    config = config_module.with_overrides(tiny.quickstart(), ["teacher.transport=sglang_hidden"])
    preflight.check(config)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    with pytest.raises(ConfigError, match=r"teacher\.transport = sglang_hidden: .*Install it again"):
        preflight.check(config)


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def hidden_server(
    request: pytest.FixtureRequest, model: TinyQwen3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SGLangServer]:
    """A server that sends hidden states and prefills long sequences in chunks."""
    spec = ServerSpec(
        model.directory,
        role="teacher",
        dtype="float32",
        context_length=tiny_qwen3.CONTEXT_LENGTH,
        deterministic=False,
        tp=request.param,
        returns_hidden_states=True,
        extra_args=("--chunked-prefill-size=64",),
    )
    server = SGLangServer(spec, tmp_path_factory.mktemp("logs") / "teacher.log")
    with running([server], START_TIMEOUT_S):
        yield server


@pytest.mark.heavy
def test_with_the_head_they_are_the_models_distribution(hidden_server: SGLangServer, model: TinyQwen3) -> None:
    """From a real server, one or two ranks, in chunks, with cached prefixes and many requests at once: hidden @ head.T is
    transformers' distribution over the whole vocabulary, and the log-probs beside it are those of the response's tokens."""
    head_VH = model.model.lm_head.weight.detach()
    long, shared = random_ids(130, 5), random_ids(90, 6)
    pairs = [([5, 17, 200, 31], random_ids(40, 1)), ([9], random_ids(1, 2)), (long, random_ids(200, 3))]
    pairs += [(shared, random_ids(20, seed)) for seed in range(10, 16)]
    with client_of(hidden_server) as client:
        for _ in range(2):  # the second time, prefixes are cached as far as they may be
            for (prompt, response), signal in zip(pairs, client.hidden_states(pairs), strict=True):
                assert signal is not None
                reference_RV = model.response_logprobs(prompt, response)
                ours_RV = torch.log_softmax(as_tensor(signal.hidden) @ head_VH.T, dim=-1).numpy()
                np.testing.assert_allclose(ours_RV, reference_RV, atol=ATOL_NATS)
                rows = np.arange(len(response))
                np.testing.assert_allclose(signal.token_logprobs, reference_RV[rows, response], atol=ATOL_NATS)
        (scores,) = client.score([pairs[0]], top_k=4)  # such a server scores as any other
        assert scores is not None
