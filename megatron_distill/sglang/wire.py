"""SGLang's /generate, as JSON: requests are built here and replies are checked and taken apart here. No network.

Facts of SGLang 0.5.23 that the code below rests on:

* A score is a request for no new tokens with ``logprob_start_len = P - 1``: the reply's input log-probs start with one
  empty entry and go on with the R response tokens. Prefixes before that position stay cacheable.
* Top-k arrives flat and base64-coded if asked for (a third of the bytes, no JSON floats to parse). The server may fall
  back to nested lists with only a line in its log, and so may a proxy that drops unknown keys: both forms are read.
* Hidden states come as nested JSON numbers, of the last prefilled chunk only. Our servers send them in binary instead, whole
  (``hidden_states``), with the one token that has to be drawn for a plugin's results to be sent at all.
* The token ids echoed beside input log-probs are wrong for the last vocabulary entry. Ours are used instead.
* Temperature divides the logits of *sampled* log-probs and leaves input log-probs alone.
* An aborted request answers 200 with ``finish_reason.type == "abort"`` and the tokens so far.

Shapes: P prompt tokens, R response tokens, K top tokens, S stop tokens, V vocabulary, H a model's width.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_distill.errors import DataError, ServerError
from megatron_distill.sglang.hidden_states import REPLY_KEY
from megatron_distill.types import (
    Generation,
    HiddenSignal,
    SamplingParams,
    SinceVersion,
    TopKSignal,
    VersionSpan,
    WantedVersion,
)

Json = dict[str, Any]

RESERVED_TOKENS = 7
"""SGLang takes at most ``context_length - 7`` input tokens (it keeps one for the output and five spare, exclusively)."""


class NotAnAnswer(Exception):
    """The server replied properly, but not with what was asked (aborted, mixed weights): ask again."""


class TooOld(NotAnAnswer):
    """Older weights than asked for drew some of the response: it is dropped, and asked for again."""


class MalformedReply(Exception):
    """The reply breaks the rules above, and would again: give up on this request."""


def check_token_ids(where: str, ids: Sequence[int], vocab_size: int) -> list[int]:
    """The ids as plain ints, all of them in [0, vocab_size) and at least one.

    Raises:
        DataError: otherwise. A server that is sent one id outside the vocabulary dies, with everyone's requests.
    """
    ids_L = np.asarray(ids)
    if ids_L.ndim != 1 or ids_L.size == 0 or ids_L.dtype.kind not in "iu":
        raise DataError(
            f"{where} = {type(ids).__name__} of shape {ids_L.shape}, {ids_L.dtype}: must be one non-empty list of integers. "
            "Pass token ids."
        )
    if ids_L.min() < 0 or ids_L.max() >= vocab_size:
        at = int(np.flatnonzero((ids_L < 0) | (ids_L >= vocab_size))[0])
        raise DataError(
            f"{where}[{at}] = {ids_L[at]}: must lie in [0, {vocab_size}). The server would die of it. "
            "Use the tokenizer of the served model."
        )
    out: list[int] = ids_L.tolist()
    return out


def check_length(where: str, num_tokens: int, context_length: int) -> None:
    """Refuse a sequence that the server would refuse or, worse, silently cut short.

    Raises:
        DataError: it does not fit.
    """
    longest = context_length - RESERVED_TOKENS
    if num_tokens > longest:
        raise DataError(
            f"{where} = {num_tokens} tokens: must be at most context_length - {RESERVED_TOKENS} = {longest}. "
            "SGLang keeps the rest for itself. Shorten it, or start the server with a larger context_length."
        )


def serves(version: str, wanted: WantedVersion) -> bool:
    """Whether weights of ``version`` may draw a response."""
    if isinstance(wanted, SinceVersion):
        return int(version) >= wanted.oldest
    return wanted in (None, version)


def generate_request(prompt_ids: list[int], sampling: SamplingParams, seed: int) -> Json:
    """A request for one response. The seed always goes along: without one, SGLang uses 42 for every request."""
    params: Json = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_new_tokens,
        "sampling_seed": seed,
    }
    if sampling.stop_token_ids:
        params["stop_token_ids"] = list(sampling.stop_token_ids)
    return {"input_ids": prompt_ids, "sampling_params": params, "return_logprob": True}


def score_request(prompt_ids: list[int], response_ids: list[int], top_k: int, stop_token_ids: Sequence[int]) -> Json:
    """A request for the log-probs of a response, the top k beside each token, and those of the stop tokens."""
    request: Json = {
        "input_ids": prompt_ids + response_ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": len(prompt_ids) - 1,
        "top_logprobs_num": top_k,
        "return_flat_raw_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
    }
    if stop_token_ids:
        request["token_ids_logprob"] = list(stop_token_ids)
    return request


def hidden_states_request(prompt_ids: list[int], response_ids: list[int]) -> Json:
    """A request for the last hidden states that predict a response's tokens, and those tokens' log-probs."""
    return {
        "input_ids": prompt_ids + response_ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": len(prompt_ids) - 1,
        "return_hidden_states": True,
    }


def read_generation(
    reply: Json, num_prompt_tokens: int, max_new_tokens: int, vocab_size: int, weight_version: WantedVersion
) -> Generation:
    """Check a reply to ``generate_request`` and take it apart.

    Args:
        reply: the server's JSON.
        num_prompt_tokens: P, which the reply must echo.
        max_new_tokens: the cap asked for; a response that ended by length must have reached it.
        vocab_size: V.
        weight_version: of the weights that may have drawn it.

    Raises:
        NotAnAnswer: the request was aborted, or other weights than asked for drew some of its tokens.
        TooOld: the same, of ``SinceVersion``.
        MalformedReply: shapes, ids or numbers are not what they must be.
        ServerError: the weights produce NaN.
    """
    meta = _meta(reply, num_prompt_tokens)
    response_ids: list[int] = reply["output_ids"]
    entries = meta["output_token_logprobs"]
    version, spans = _versions(meta, weight_version)
    finish = meta["finish_reason"]
    if finish["type"] == "stop" and not isinstance(finish.get("matched"), int):
        raise ServerError(
            f"sglang.generate = finish_reason {finish}: the served weights (version {version}) give NaN or a token outside "
            "the vocabulary. They are corrupt or training diverged. Restore an earlier checkpoint."
        )
    _require(response_ids == [token for _, token, _ in entries], "ids and log-probs of the response differ")
    _require(len(response_ids) > 0, "the response is empty")
    _require(min(response_ids) >= 0 and max(response_ids) < vocab_size, "a drawn token is outside the vocabulary")
    if finish["type"] == "stop":
        _require(response_ids[-1] == finish["matched"], "the response does not end with the stop token it matched")
    else:
        _require(len(response_ids) == max_new_tokens, f"cut short after {len(response_ids)} tokens")
    return Generation(
        response_ids=response_ids,
        sampler_logprobs=_finite([logprob for logprob, _, _ in entries], (len(response_ids),), "response"),
        stop_reason=finish["type"],
        stop_token_id=finish.get("matched"),
        weight_version=version,
        version_spans=spans,
    )


def read_scores(
    reply: Json,
    num_prompt_tokens: int,
    num_response_tokens: int,
    top_k: int,
    stop_token_ids: Sequence[int],
    weight_version: str | None = None,
) -> TopKSignal:
    """Check a reply to ``score_request`` and take it apart. Row r of each array belongs to response token r.

    Raises:
        NotAnAnswer: the request was aborted, or answered by other weights than asked for.
        MalformedReply: shapes or numbers are not what they must be.
    """
    meta = _scored_meta(reply, num_prompt_tokens + num_response_tokens, weight_version)
    topk_ids, topk_logprobs = _top_k(meta, (num_response_tokens, top_k))
    stop_rows = meta["input_token_ids_logprobs"][1:] if stop_token_ids else [[]] * num_response_tokens
    _require(
        all([token for _, token, _ in row] == list(stop_token_ids) for row in stop_rows), "stop tokens are out of order"
    )
    return TopKSignal(
        token_logprobs=_token_logprobs(meta, num_response_tokens),
        topk_ids=topk_ids,
        topk_logprobs=topk_logprobs,
        stop_logprobs=_finite(
            [[logprob for logprob, _, _ in row] for row in stop_rows],
            (num_response_tokens, len(stop_token_ids)),
            "stop",
        ),
    )


def read_hidden_states(
    reply: Json, num_prompt_tokens: int, num_response_tokens: int, weight_version: str | None = None
) -> HiddenSignal:
    """Check a reply to ``hidden_states_request`` and take it apart. Row r of each array belongs to response token r.

    Raises:
        NotAnAnswer: the request was aborted, or answered by other weights than asked for.
        MalformedReply: shapes or numbers are not what they must be.
        ServerError: the server does not send them in binary.
    """
    meta = _scored_meta(reply, num_prompt_tokens + num_response_tokens, weight_version)
    if REPLY_KEY not in meta:
        raise ServerError(
            f"sglang.hidden_states = no {REPLY_KEY!r} in the reply: the server must be started by megatron_distill, from an "
            "environment in which it is installed: it then sends hidden states in binary. Install the package again there "
            "(pip install -e .), so that SGLang finds its entry points."
        )
    [sent] = meta[REPLY_KEY]
    _require(sent["dtype"] in _HIDDEN_DTYPES, f"hidden states of dtype {sent['dtype']}")
    shape = tuple(sent["shape"])
    _require(len(shape) == 2 and shape[0] == num_response_tokens, f"hidden states of shape {shape}")
    hidden = np.frombuffer(base64.b64decode(sent["data"]), _HIDDEN_DTYPES[sent["dtype"]]).reshape(shape).copy()
    _require(_is_finite(hidden), "hidden states are not finite")
    return HiddenSignal(_token_logprobs(meta, num_response_tokens), hidden)


_HIDDEN_DTYPES: dict[str, type] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_BF16_EXPONENT = np.uint16(0x7F80)  # all ones in an infinity and in a NaN


def _is_finite(hidden: npt.NDArray[Any]) -> bool:
    if hidden.dtype == np.uint16:
        return bool(((hidden & _BF16_EXPONENT) != _BF16_EXPONENT).all())
    return bool(np.isfinite(hidden).all())


def _scored_meta(reply: Json, num_input_tokens: int, weight_version: str | None) -> Json:
    """``_meta`` of a reply about a given response, by the weights that were asked."""
    meta = _meta(reply, num_input_tokens)
    if weight_version is not None and meta["weight_version"] != weight_version:
        raise NotAnAnswer(f"scored by weight version {meta['weight_version']!r}, and {weight_version!r} was asked for")
    return meta


def _token_logprobs(meta: Json, num_response_tokens: int) -> npt.NDArray[np.float32]:
    entries = meta["input_token_logprobs"][1:]
    return _finite([logprob for logprob, _, _ in entries], (num_response_tokens,), "token")


def _meta(reply: Json, num_input_tokens: int) -> Json:
    """The reply's ``meta_info``, of a request that ran to its end on the input we sent."""
    meta: Json = reply["meta_info"]
    if meta["finish_reason"]["type"] == "abort":
        raise NotAnAnswer(f"aborted: {meta['finish_reason'].get('message')}")
    _require(
        meta["prompt_tokens"] == num_input_tokens,
        f"{meta['prompt_tokens']} input tokens echoed, {num_input_tokens} sent",
    )
    return meta


def _versions(meta: Json, wanted: WantedVersion) -> tuple[str, tuple[VersionSpan, ...]]:
    """The version of the last token, and the spans of all versions if there are several."""
    spans = meta["weight_versions"]
    versions = [span["version"] for span in spans]
    if isinstance(wanted, SinceVersion):
        if not all(serves(version, wanted) for version in versions):
            raise TooOld(f"drawn by weight versions {versions}, and none before {wanted.oldest} was asked for")
    elif len(set(versions)) != 1:
        raise NotAnAnswer(f"tokens of several weight versions: {sorted(set(versions))}")
    elif not serves(versions[0], wanted):
        raise NotAnAnswer(f"drawn by weight version {versions[0]!r}, and {wanted!r} was asked for")
    if len(spans) == 1:
        return versions[0], ()
    return versions[-1], tuple(VersionSpan(span["version"], span["start"], span["end"]) for span in spans)


def _top_k(meta: Json, shape: tuple[int, int]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Top-k ids and log-probs [R, K], from the flat form or from the nested one."""
    if "input_top_logprobs_val_flat_b64" in meta:
        _require(tuple(meta["input_top_logprobs_shape"]) == shape, f"top-k shape {meta['input_top_logprobs_shape']}")
        _require(meta["input_top_logprobs_null_prefix"] == 1, "top-k rows do not start at the response")
        flat_ids = _decode(meta, "input_top_logprobs_idx_flat_b64").reshape(shape)
        flat_logprobs = _decode(meta, "input_top_logprobs_val_flat_b64").reshape(shape)
        return flat_ids.astype(np.int32), _finite(flat_logprobs, shape, "top-k")
    rows = meta["input_top_logprobs"][1:]
    ids = np.array([[token for _, token, _ in row] for row in rows], dtype=np.int32)
    return ids, _finite([[logprob for logprob, _, _ in row] for row in rows], shape, "top-k")


def _decode(meta: Json, key: str) -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(meta[key]), meta[f"{key}_dtype"])


def _finite(values: Any, shape: tuple[int, ...], what: str) -> npt.NDArray[np.float32]:
    """``values`` as a writable float32 array of this shape; NaN and infinity (JSON null) are refused."""
    array = np.array(values, dtype=np.float32).reshape(shape if 0 in shape else np.shape(values))
    _require(array.shape == shape, f"{what} log-probs of shape {array.shape}, expected {shape}")
    _require(bool(np.isfinite(array).all()), f"{what} log-probs are not finite")
    return array


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise MalformedReply(otherwise)
