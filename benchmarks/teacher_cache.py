"""How many bytes a token of a teacher's signal takes on the wire and in the cache, and how fast it is written and read.

    python benchmarks/teacher_cache.py

The teacher is synthetic: 151,936 tokens (Qwen3) of Zipf's frequencies with noise, some positions peaked and some flat, its
logits in fp32 or rounded to bf16 as a served model's are. Compared with: SGLang's JSON, raw arrays, and 5 bytes an entry
(a 3-byte id and an fp16 log-prob, which would round). Hidden states are normal numbers of several widths: the time of what
a server and a client do with them beside the models' work, as binary and as SGLang's own nested lists, next to a top k's.
"""

import base64
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_distill.rollouts.batches import as_tensor
from megatron_distill.sglang import wire
from megatron_distill.sglang.hidden_states import REPLY_KEY, encode
from megatron_distill.teacher.cache import decode_hidden, decode_scores, encode_hidden, encode_scores
from megatron_distill.teacher.shard_store import ShardStore
from megatron_distill.types import TopKSignal

VOCAB_SIZE, NUM_TOKENS, TOP_K = 151_936, 512, 64
NUM_KEYS = 1_000_000
WIDTHS = (1024, 4096, 5120)  # Qwen3-0.6B, 8B, 32B


def main() -> None:
    """Print the sizes, the speeds and the time to open a large cache."""
    for dtype in ("fp32", "bf16"):
        scores = synthetic_scores(dtype)
        payload, encode_s = timed(lambda scores=scores: encode_scores(scores))
        _, decode_s = timed(lambda payload=payload: decode_scores(payload))
        sizes = {
            "JSON": len(as_json(scores)),
            "raw arrays": sum(array.nbytes for array in vars(scores).values()),
            "5 bytes an entry": 5 * TOP_K * NUM_TOKENS,
            "cached, exact": len(payload),
        }
        print(f"{dtype} logits, K = {TOP_K}, 2 stop tokens: bytes a token (an entry)")
        for name, size in sizes.items():
            print(f"  {name:<20}{size / NUM_TOKENS:8.0f} ({size / NUM_TOKENS / TOP_K:.2f})")
        print(f"  encoded at {NUM_TOKENS / encode_s:,.0f} tokens/s, decoded at {NUM_TOKENS / decode_s:,.0f} tokens/s")
    on_the_wire()
    with tempfile.TemporaryDirectory() as directory:
        store = ShardStore(Path(directory))
        keys = [number.to_bytes(16, "big") for number in range(NUM_KEYS)]
        for start in range(0, NUM_KEYS, 1000):
            store.put(dict.fromkeys(keys[start : start + 1000], b"payload"))
        store.close()
        _, open_s = timed(lambda: ShardStore(Path(directory)))
        print(f"a cache of {NUM_KEYS:,} sequences opens in {open_s:.1f} s")


def on_the_wire() -> None:
    """Print what each signal takes from a server to the trainer, and in the cache."""
    print(
        "\na token: bytes of the reply, and cached; microseconds of the server, the client, the cache written, the cache read"
    )
    scores = synthetic_scores("bf16")
    _line("top k = 64", lambda: json.dumps(topk_reply(scores)), read_topk, encode_scores, decode_scores)
    for width in WIDTHS:
        rows = torch.randn(NUM_TOKENS + 1, width, generator=torch.Generator().manual_seed(0)).bfloat16()
        _line(
            f"hidden states of {width}, bf16",
            lambda rows=rows: json.dumps(reply_with({REPLY_KEY: [encode([rows], NUM_TOKENS + 1)]})),
            lambda text: wire.read_hidden_states(json.loads(text), 1, NUM_TOKENS),
            encode_hidden,
            decode_hidden,
        )
        nested, write_s = timed(lambda rows=rows: json.dumps(reply_with({"hidden_states": [rows.tolist()]})))
        _, read_s = timed(lambda nested=nested: torch.tensor(json.loads(nested)["meta_info"]["hidden_states"][0]))
        times = "".join(f"{1e6 * seconds / NUM_TOKENS:9.1f}" for seconds in (write_s, read_s))
        print(f"  {'  as nested lists':<32}{len(nested) / NUM_TOKENS:9,.0f}{'':9}{times}")
        signal = wire.read_hidden_states(reply_with({REPLY_KEY: [encode([rows], NUM_TOKENS + 1)]}), 1, NUM_TOKENS)
        assert torch.equal(as_tensor(signal.hidden), rows[:-1])


def _line[S](
    name: str,
    send: Callable[[], str],
    receive: Callable[[str], S],
    to_cache: Callable[[S], bytes],
    from_cache: Callable[[bytes], S],
) -> None:
    text, send_s = timed(send)
    signal, receive_s = timed(lambda: receive(text))
    payload, write_s = timed(lambda: to_cache(signal))
    _, read_s = timed(lambda: from_cache(payload))
    times = "".join(f"{1e6 * seconds / NUM_TOKENS:9.1f}" for seconds in (send_s, receive_s, write_s, read_s))
    print(f"  {name:<32}{len(text) / NUM_TOKENS:9,.0f}{len(payload) / NUM_TOKENS:9,.0f}{times}")


def reply_with(more: wire.Json) -> wire.Json:
    """SGLang's reply to a score of ``NUM_TOKENS`` tokens behind a prompt of one."""
    return {
        "meta_info": {
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": NUM_TOKENS + 1,
            "weight_version": "0",
            "input_token_logprobs": [[None, 1, None], *([-1.2345678 - i / 997, 1, None] for i in range(NUM_TOKENS))],
            **more,
        }
    }


def topk_reply(scores: TopKSignal) -> wire.Json:
    """With the flat top k, and two stop tokens."""
    more: wire.Json = {"input_top_logprobs_shape": [NUM_TOKENS, TOP_K], "input_top_logprobs_null_prefix": 1}
    for name, array in (("val", scores.topk_logprobs), ("idx", scores.topk_ids)):
        key = f"input_top_logprobs_{name}_flat_b64"
        more |= {key: base64.b64encode(array.tobytes()).decode(), f"{key}_dtype": str(array.dtype)}
    stops = [[[logprob, stop, None] for stop, logprob in enumerate(row)] for row in scores.stop_logprobs.tolist()]
    return reply_with(more | {"input_token_ids_logprobs": [None, *stops]})


def read_topk(text: str) -> TopKSignal:
    """What the client makes of it."""
    return wire.read_scores(json.loads(text), 1, NUM_TOKENS, TOP_K, (0, 1))


def synthetic_scores(dtype: str) -> TopKSignal:
    """Scores of a made-up teacher, see the module's docstring."""
    rng = np.random.default_rng(0)
    frequency_V = -np.log(1.0 + rng.permutation(VOCAB_SIZE))
    ids, logprobs, others = [], [], []
    for _ in range(NUM_TOKENS):
        logits_V = (rng.uniform(0.5, 1.2) * frequency_V + rng.normal(0, 2, VOCAB_SIZE)) * rng.choice([1.0, 1.5, 3.0])
        logits_V = (logits_V - logits_V.max() + 20.0).astype(np.float32)
        if dtype == "bf16":  # drop the low 16 bits
            logits_V = (logits_V.view(np.uint32) & 0xFFFF0000).view(np.float32)
        logprobs_V = logits_V - np.float32(np.log(np.exp(logits_V.astype(np.float64)).sum()))
        top = np.argpartition(-logprobs_V, TOP_K)[:TOP_K]
        top = top[np.argsort(-logprobs_V[top], kind="stable")]
        ids.append(top)
        logprobs.append(logprobs_V[top])
        others.append(logprobs_V[[int(top[0]), 0, 1]])
    others_T3 = np.array(others, np.float32)
    return TopKSignal(
        token_logprobs=others_T3[:, 0],
        topk_ids=np.array(ids, np.int32),
        topk_logprobs=np.array(logprobs, np.float32),
        stop_logprobs=others_T3[:, 1:],
    )


def as_json(scores: TopKSignal) -> str:
    """As SGLang sends them: [log-prob, id, null] for each entry."""
    rows = [
        [[logprob, token, None] for logprob, token in zip(*row, strict=True)]
        for row in zip(scores.topk_logprobs.tolist(), scores.topk_ids.tolist(), strict=True)
    ]
    return json.dumps([rows, scores.token_logprobs.tolist(), scores.stop_logprobs.tolist()])


def timed[T](work: Callable[[], T]) -> tuple[T, float]:
    """The result, and the processor's seconds, the best of three."""
    seconds = []
    for _ in range(3):
        began = time.process_time()
        result = work()
        seconds.append(time.process_time() - began)
    return result, min(seconds)


if __name__ == "__main__":
    main()
