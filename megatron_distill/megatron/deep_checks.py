"""The checks of ``doctor --deep``: each a function that does, small, what a run does, and compares.

    python -m megatron_distill.megatron.deep_checks CHECK MODEL_DIR

One process a check, started by ``deep_doctor``: a crash ends its own check only. A check prints what it found as one JSON
line, or fails by its exception. On a GPU it runs the kernels of a run in bf16, without one their counterparts on CPU.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from megatron_distill.config import StudentConfig
from megatron_distill.errors import DistillError
from megatron_distill.megatron import cpu_backend
from megatron_distill.megatron.backend import MegatronBackend, choose_backend, prepare

LENGTHS = (7, 33, 1, 23)  # tokens of the sequences packed into one row
NUM_PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS = 8, 12, 24
WIDTH = 151_936  # columns of Qwen3's logits
GAP_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # mean |Megatron - SGLang| of a sampled token's log-prob


def main(check: str, model_dir: str) -> None:
    """Run one check, print what it found."""
    torch.manual_seed(0)
    if check != "losses":  # they need no Megatron, and on CPU its backend turns the compiler off
        prepare()
    print("FOUND " + json.dumps(CHECKS[check](Path(model_dir))), flush=True)


# --- kernels ----------------------------------------------------------------------------------------------------------


def attention(model_dir: Path) -> str:
    """Core attention over packed rows, forward and backward, against float64."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_distill.megatron.forward_step import packed_sequences

    backend, dtype, device = _setting()
    heads, groups, channels = 4, 2, 64
    config = _transformer_config(
        backend, num_layers=1, hidden_size=256, num_attention_heads=heads, num_query_groups=groups
    )
    with _alone():
        if backend.use_transformer_engine:
            from megatron.core.extensions.transformer_engine import TEDotProductAttention as Attention
        else:
            from megatron_distill.models.local_layers import PackedAttention as Attention
        core = Attention(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
        starts = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32, device=device)
        packed = packed_sequences(starts, max(LENGTHS))
        exact = [
            torch.randn(sum(LENGTHS), n, channels, dtype=torch.float64).to(dtype).double().requires_grad_()
            for n in (heads, groups, groups)
        ]
        given = [one.detach().to(device, dtype).requires_grad_() for one in exact]
        upstream = torch.randn(sum(LENGTHS), heads * channels, dtype=torch.float64)
        output = core(*given, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed)
        output = output.reshape(sum(LENGTHS), -1)
        output.backward(upstream.to(device, dtype))
        expected = _dense_attention(*exact)
        expected.backward(upstream)
    pairs = {"output": (output, expected)}
    pairs |= {f"d{name}": (a.grad, b.grad) for name, a, b in zip(("query", "key", "value"), given, exact, strict=True)}
    return f"{type(core).__name__}, {_name(dtype)}: " + _close(pairs, dtype)


def _dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Each packed sequence by itself: softmax(q k / sqrt(channels)) v, written out."""
    outputs = []
    for q, k, v in zip(*(x.transpose(0, 1).split(LENGTHS, 1) for x in (query, key, value)), strict=True):
        wide_k, wide_v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
        scores = q @ wide_k.transpose(1, 2) / q.shape[2] ** 0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ wide_v)
    return torch.cat(outputs, 1).transpose(0, 1).flatten(1)


def linear(model_dir: Path) -> str:
    """The output layer's matrix products and its weight's gradient, plain and accumulated by a fused kernel."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, _grad_accum_fusion_available

    backend, dtype, device = _setting()
    rows = torch.randn(sum(LENGTHS), 1, 256, dtype=torch.float64).to(dtype).double()
    upstream = torch.randn(sum(LENGTHS), 1, 512, dtype=torch.float64).to(dtype).double()
    found = []
    for fused in (False, True) if _grad_accum_fusion_available else (False,):
        config = _transformer_config(backend, num_layers=1, hidden_size=256, num_attention_heads=4)
        config.gradient_accumulation_fusion = fused
        with _alone():
            layer = ColumnParallelLinear(
                256, 512, config=config, init_method=torch.nn.init.xavier_normal_, bias=False, gather_output=False
            ).to(device, dtype)
            layer.weight.main_grad = torch.zeros(512, 256, device=device)
            for _ in range(2):  # accumulated over two micro-batches
                layer(rows.to(device, dtype))[0].backward(upstream.to(device, dtype))
            gradient = layer.weight.main_grad if fused else layer.weight.grad
            expected = 2 * upstream[:, 0].T @ rows[:, 0]
            found.append(f"{'fused' if fused else 'plain'} " + _close({"dweight": (gradient, expected)}, dtype))
    if not _grad_accum_fusion_available:
        found.append("fused: apex is not installed, and runs go without")
    if backend.use_transformer_engine:
        import transformer_engine.pytorch as engine

        with _alone():
            layer = engine.Linear(256, 512, bias=False, params_dtype=dtype, device=device)
            given = rows[:, 0].to(device, dtype).requires_grad_()
            layer(given).backward(upstream[:, 0].to(device, dtype))
            weight = layer.weight.detach().double().cpu()
            pairs = {"dweight": (layer.weight.grad, expected / 2), "dinput": (given.grad, upstream[:, 0] @ weight)}
            found.append("Transformer Engine " + _close(pairs, dtype))
    return "; ".join(found)


def losses(model_dir: Path) -> str:
    """The losses at a real width, value and gradient, against float64: the KL by every implementation that runs here, the
    others by the one that this machine picks, so that each of its kernels runs."""
    from megatron_distill.losses import Backend
    from megatron_distill.losses.backends import kernels_for

    _, dtype, device = _setting()
    student, teacher = (torch.randn(40, WIDTH, dtype=torch.float64).mul(3).to(dtype).double() for _ in range(2))
    weights = torch.rand(40, dtype=torch.float64)
    picked = kernels_for(student.to(device, dtype), None).backend
    found = []
    for name, loss in _families(teacher).items():
        value, gradient = _value_and_gradient(loss, student, teacher, weights, "eager")
        for backend in get_args(Backend) if name == "kl" else (picked,):
            try:
                given = student.to(device, dtype), teacher.to(device, dtype), weights.to(device)
                ours = _value_and_gradient(loss, *given, backend)
            except Exception:  # no compiler, for one
                if backend == picked:
                    raise
                found.append(f"{name} by {backend}: not here")
                continue
            pairs = {"loss": (ours[0], value), "gradient": (ours[1], gradient)}
            found.append(f"{name} by {backend}: " + _close(pairs, dtype))
    return "; ".join(found)


def _families(teacher_TV: torch.Tensor) -> dict[str, Callable[..., torch.Tensor]]:
    """One loss of each kind, as functions of both models' logits and the backend."""
    from megatron_distill.losses import distill_jsd, distill_kl, distill_kl_topk, vocab_parallel_logprobs

    top_TK, ids_TK = teacher_TV.log_softmax(-1).topk(64)

    def topk(student: torch.Tensor, _: torch.Tensor, backend: Any) -> torch.Tensor:
        top, ids = top_TK.to(student.device), ids_TK.to(student.device)
        return distill_kl_topk(student, ids, top, reverse_kl_weight=0.3, backend=backend).loss

    def logprobs(student: torch.Tensor, _: torch.Tensor, backend: Any) -> torch.Tensor:
        terms = vocab_parallel_logprobs(student, ids_TK[:, 0].to(student.device), backend=backend)
        return terms.logprobs + 0.5 * terms.entropy

    return {
        "kl": lambda z, t, backend: distill_kl(z, t, reverse_kl_weight=0.3, backend=backend).loss,
        "jsd": lambda z, t, backend: distill_jsd(z, t, backend=backend).loss,
        "top-k": topk,
        "log-probs": logprobs,
    }


def _value_and_gradient(
    loss: Callable[..., torch.Tensor],
    student_TV: torch.Tensor,
    teacher_TV: torch.Tensor,
    weights_T: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, Any]:
    """Of the losses' weighted sum."""
    given = student_TV.detach().clone().requires_grad_()
    value = loss(given, teacher_TV, backend)
    (value * weights_T).sum().backward()
    return value, given.grad


# --- a server beside a trainer ----------------------------------------------------------------------------------------


def serving(model_dir: Path) -> str:
    """A server and Megatron on the same weights, then on new ones: through the disk, and by broadcast.

    Samples of the server are scored by Megatron; their log-probs must agree before and after each push, and each push must
    change them.
    """
    from megatron_distill.convert.live import load_hf_weights
    from megatron_distill.models.hf_config import VOCAB_DIVISOR, HfConfig, padded_vocab_size
    from megatron_distill.models.megatron_gpt import build_gpt_model, transformer_config_kwargs
    from megatron_distill.sglang.server import NCCL_ENV
    from megatron_distill.training.weight_sync import BroadcastSync, DiskSync

    os.environ.update(NCCL_ENV)  # as in a run: before NCCL is asked for anything
    backend, dtype, device = _setting()
    hf_config = HfConfig.from_dir(model_dir)
    found = []
    with tempfile.TemporaryDirectory() as folder, _alone():
        model = build_gpt_model(
            hf_config,
            _transformer_config(backend, **transformer_config_kwargs(hf_config)),
            padded_vocab_size=padded_vocab_size(hf_config.vocab_size, VOCAB_DIVISOR, 1),
            use_transformer_engine=backend.use_transformer_engine,
            packed_attention=backend.packed_kernels,
        ).to(device, dtype)
        load_hf_weights(model, model_dir)
        with _server(model_dir, hf_config.vocab_size, dtype, Path(folder) / "server.log") as client:
            before = _gap(client, model, hf_config.vocab_size, backend, "0")
            found.append(f"as loaded {before:.1e} nats")
            disk = DiskSync(hf_config, model_dir, Path(folder) / "sync", client)
            transports: dict[str, Any] = {"disk": disk}
            if cpu_backend.is_cpu() or torch.cuda.device_count() > 1:
                transports["broadcast"] = BroadcastSync(
                    hf_config, client, num_replicas=1, ranks_per_replica=1, bucket_bytes=64 << 20
                )
            for version, (name, transport) in enumerate(transports.items(), 1):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
                stale = _gap(client, model, hf_config.vocab_size, backend, str(version - 1), check=False)
                transport.gather([model], version)
                transport.send(version)
                gap = _gap(client, model, hf_config.vocab_size, backend, str(version))
                if stale < 3 * gap:
                    raise DistillError(
                        f"{name} = version {version}: the push changed nothing ({stale:.1e} -> {gap:.1e})."
                    )
                found.append(f"after {name} {gap:.1e} (before it {stale:.1e})")
            for transport in transports.values():
                transport.close()
    if "broadcast" not in transports:
        found.append("broadcast needs a second GPU")
    return f"mean gap of a sampled token's log-prob, {_name(dtype)}: " + ", ".join(found)


@contextmanager
def _server(model_dir: Path, vocab_size: int, dtype: torch.dtype, log: Path) -> Iterator[Any]:
    """A server of the model on the last GPU, or on this one's remaining memory, or on CPU; and its client."""
    from megatron_distill.sglang.client import SGLangClient
    from megatron_distill.sglang.server import ServerSpec, SGLangServer, running

    context = PROMPT_TOKENS + RESPONSE_TOKENS + 32
    extra: tuple[str, ...] = ()
    if not cpu_backend.is_cpu():
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        os.environ["CUDA_VISIBLE_DEVICES"] = chosen.split(",")[-1]  # of the server; this process has chosen already
        extra = ("--mem-fraction-static", "0.4")
    spec = ServerSpec(model_dir, "student", dtype=_name(dtype), context_length=context, extra_args=extra)
    server = SGLangServer(spec, log)
    with (
        running([server], 900),
        SGLangClient([server.url], vocab_size, context, key=server.key, log_files={server.url: log}) as client,
    ):
        yield client


def _gap(client: Any, model: Any, vocab_size: int, backend: MegatronBackend, version: str, check: bool = True) -> float:
    """Mean |Megatron - server| of the log-probs of what the server samples, in nats."""
    from megatron_distill.megatron.forward_step import run_model
    from megatron_distill.rollouts.batches import pack_micro_batch
    from megatron_distill.training.chunked_head import HiddenTensors
    from megatron_distill.types import Rollout, Sample, SamplingParams

    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab_size, PROMPT_TOKENS).tolist() for _ in range(NUM_PROMPTS)]
    sampling = SamplingParams(max_new_tokens=RESPONSE_TOKENS, temperature=1.0)
    written = client.generate(prompts, sampling=sampling, seeds=range(NUM_PROMPTS), weight_version=version)
    samples = [
        Sample(
            Rollout(
                prompt_index=index,
                prompt_ids=prompt,
                response_ids=one.response_ids,
                sampler_logprobs=one.sampler_logprobs,
                author="student",
                oldest_version=0,
                newest_version=0,
                stop_reason=one.stop_reason,
            )
        )
        for index, (prompt, one) in enumerate(zip(prompts, written, strict=True))
    ]
    batch = pack_micro_batch(samples, step=0, scored_in_trainer=True, needs_mask=backend.needs_mask)
    batch = batch.to(next(model.parameters()).device)
    with torch.no_grad():
        said = run_model(model, batch, packed_kernels=backend.packed_kernels)
        assert isinstance(said, HiddenTensors)
        logits = said.logits()
    logprobs = logits[:, :vocab_size].float().log_softmax(-1).gather(1, batch.target_ids_T[:, None])[:, 0]
    gap = float((logprobs - batch.sampler_logprobs_T).abs().mean())
    bound = GAP_NATS[next(model.parameters()).dtype]
    if check and not gap <= bound:
        raise DistillError(f"sampler gap = {gap:.3g} nats at version {version}: must not exceed {bound}.")
    return gap


# --- what they share --------------------------------------------------------------------------------------------------


def _setting() -> tuple[MegatronBackend, torch.dtype, torch.device]:
    """The backend, dtype and device of a run here: bf16 on a GPU."""
    if cpu_backend.is_cpu():
        return choose_backend(StudentConfig()), torch.float32, torch.device("cpu")
    return choose_backend(StudentConfig(dtype="bf16")), torch.bfloat16, torch.device("cuda")


def _transformer_config(backend: MegatronBackend, **architecture: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    _, dtype, _ = _setting()
    dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}  # 0.1 each by default, which kernels on a GPU heed
    return TransformerConfig(
        **(dropout | architecture),
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        masked_softmax_fusion=backend.use_transformer_engine,
        apply_rope_fusion=backend.use_transformer_engine,
        persist_layer_norm=backend.use_transformer_engine,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        transformer_impl="transformer_engine" if backend.use_transformer_engine else "local",
    )


@contextmanager
def _alone() -> Iterator[None]:
    """Megatron's parallel state of one rank."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with tempfile.NamedTemporaryFile() as store:
        if not dist.is_initialized():
            backend = "gloo" if cpu_backend.is_cpu() else "nccl"
            dist.init_process_group(backend, init_method=f"file://{store.name}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


def _close(pairs: dict[str, tuple[Any, torch.Tensor]], dtype: torch.dtype) -> str:
    """The largest error of each, relative to the largest value; raises if it is not of the dtype's rounding."""
    bound = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    errors = {
        name: float((ours.detach().double().cpu() - exact.detach()).abs().max() / exact.detach().abs().max())
        for name, (ours, exact) in pairs.items()
    }
    text = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    if not all(error <= bound for error in errors.values()):
        raise DistillError(f"error against float64 = {text}: must not exceed {bound} of the largest value.")
    return text


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CHECKS: dict[str, Callable[[Path], str]] = {
    "attention": attention,
    "linear": linear,
    "losses": losses,
    "serving": serving,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
