"""Lets an SGLang server send the last hidden states of a response in binary: one hook, found through our entry point.

In: SGLang's own start-up, which calls ``register`` in each of its processes. Out: a hook in SGLang's registry, if the server
was started for it (``HIDDEN_STATES_ENV``); else nothing.

Published SGLang 0.5.23 returns hidden states as nested lists of JSON numbers, some 20 bytes each, of the prompt as well, and
of the last chunk alone where a sequence is prefilled in chunks. Hooked is the place where it takes a request's rows out of a
batch's: rows are kept from chunk to chunk, and at the end those that predict a response token become one base64 text, which
goes to the client by the channel that SGLang has for a plugin's own results (``customized_info``). The rows are what the
output layer takes, after the final norm. Every tensor-parallel rank has them whole; SGLang answers with those of the first.

The client's request (``wire.hidden_states_request``) says by ``logprob_start_len`` where the response begins. That also keeps
SGLang's prefix cache from leaving out rows of the response.

Importing this module is cheap and imports neither torch nor SGLang: SGLang loads it in every process.
"""

from __future__ import annotations

import base64
import importlib.metadata
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch

REPLY_KEY = "response_hidden_states"
"""Where a reply's ``meta_info`` holds them: a list of one ``{"dtype", "shape", "data"}``."""

_VARIABLE = "MEGATRON_DISTILL_SGLANG_HIDDEN_STATES"
HIDDEN_STATES_ENV = {_VARIABLE: "1"}
"""Environment of a server that is asked for hidden states."""

_HOOKED = (
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor._append_prefill_hidden_states"
)


def register() -> None:
    """Entry point ``sglang.srt.plugins``: add the hook to SGLang's registry, in servers that were started for it."""
    if os.environ.get(_VARIABLE) != "1":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_HOOKED, keep_response_rows, HookType.AROUND)


def is_installed() -> bool:
    """Whether SGLang finds the hook here: an installation from before there was one does not offer it."""
    offered = importlib.metadata.entry_points(group="sglang.srt.plugins")
    return any(entry.value == f"{__name__}:{register.__name__}" for entry in offered)


_chunks: WeakKeyDictionary[Any, list[torch.Tensor]] = WeakKeyDictionary()
"""Rows of requests of which some chunks are prefilled and some are not; they go with the request."""


def keep_response_rows(
    original: Callable[..., int],
    processor: object,
    *,
    req: Any,
    logits_output: Any,
    hidden_state_offset: int,
    capture_hidden_mode: Any,
    extend_input_len: int,
    store: bool = True,
) -> int:
    """Around ``_append_prefill_hidden_states``: this request's rows of a batch, kept, or sent with its last chunk.

    Rows are counted from the end of the sequence. So it does not matter where the prefix cache made the first chunk begin, nor
    whether a request was put back and begun again.

    Args:
        original: SGLang's method, which takes the requests that are not for us.
        processor: its ``self``.
        req: the request.
        logits_output: of the batch; ``hidden_states`` are [tokens of the batch, H].
        hidden_state_offset: where this request's rows begin in them.
        capture_hidden_mode: whether all rows were kept, or the last of each request.
        extend_input_len: rows of this request.
        store: whether its last chunk was prefilled, and its output counts.

    Returns:
        Where the next request's rows begin.
    """
    is_asked = req.return_hidden_states is True and req.return_logprob and capture_hidden_mode.is_full()
    if not is_asked:
        return original(
            processor,
            req=req,
            logits_output=logits_output,
            hidden_state_offset=hidden_state_offset,
            capture_hidden_mode=capture_hidden_mode,
            extend_input_len=extend_input_len,
            store=store,
        )
    end = hidden_state_offset + extend_input_len
    is_middle_chunk = req.inflight_middle_chunks > 0
    if store or is_middle_chunk:
        # Of R response tokens the rows before each, and the row of the last, which predicts what comes after it.
        num_wanted = len(req.origin_input_ids) - req.logprob_start_len
        rows = logits_output.hidden_states[max(hidden_state_offset, end - num_wanted) : end].cpu()
        kept = [*_chunks.pop(req, []), rows]
        if is_middle_chunk:
            _chunks[req] = kept
        else:
            req.customized_info = (req.customized_info or {}) | {REPLY_KEY: [encode(kept, num_wanted)]}
    return end


def encode(chunks: list[torch.Tensor], num_wanted: int) -> dict[str, Any]:
    """The last ``num_wanted`` rows of the chunks [n, H] but the very last, for a JSON reply."""
    import torch

    rows = torch.cat(chunks)[-num_wanted:-1].contiguous()
    return {
        "dtype": str(rows.dtype).removeprefix("torch."),
        "shape": list(rows.shape),
        "data": base64.b64encode(rows.view(torch.uint8).numpy().tobytes()).decode("ascii"),
    }
