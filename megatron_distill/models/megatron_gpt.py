"""Describe a Hugging Face architecture to Megatron, three ways that agree: config, command line, and model.

In: an ``HfConfig``. Out: keyword arguments for ``TransformerConfig``, the flags of ``megatron.training`` that lead
``core_transformer_config_from_args`` to the same values, and the ``GPTModel`` itself.

Names to know: ``transformer_config_kwargs``, ``megatron_arguments``, ``build_gpt_model``. On CPU call
``megatron_distill.megatron.cpu_backend.install()`` before ``build_gpt_model``; Megatron is imported when it is called.
"""

from typing import TYPE_CHECKING, Any

from megatron_distill.errors import CheckpointError
from megatron_distill.models.hf_config import HfConfig

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig


def transformer_config_kwargs(hf_config: HfConfig) -> dict[str, Any]:
    """The fields of Megatron's ``TransformerConfig`` that the architecture decides.

    Parallel sizes, dtypes and fusions are the caller's. Dropout is off: a distilled student must be scored by the very
    distribution it sampled from.
    """
    import torch.nn.functional as F

    kwargs: dict[str, Any] = {
        "num_layers": hf_config.num_layers,
        "hidden_size": hf_config.hidden_size,
        "num_attention_heads": hf_config.num_attention_heads,
        "num_query_groups": hf_config.num_query_groups,
        "kv_channels": hf_config.head_dim,
        "ffn_hidden_size": hf_config.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf_config.rms_norm_eps,
        "qk_layernorm": hf_config.qk_norm,
        "add_qkv_bias": hf_config.qkv_bias,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if hf_config.num_experts:
        kwargs |= {
            "num_moe_experts": hf_config.num_experts,
            "moe_ffn_hidden_size": hf_config.expert_ffn_hidden_size,
            "moe_router_topk": hf_config.experts_per_token,
            # softmax over all experts, then top-k, unless the chosen ones are rescaled to sum to one: that equals
            # top-k first, then softmax over the chosen.
            "moe_router_pre_softmax": not hf_config.norm_topk_prob,
        }
    return kwargs


def megatron_arguments(hf_config: HfConfig) -> list[str]:
    """The command-line flags of ``megatron.training`` that describe the architecture.

    They set what ``transformer_config_kwargs`` sets, plus what Megatron keeps outside ``TransformerConfig`` (vocabulary,
    positions, rotary settings, tying), so that a model provider built on ``core_transformer_config_from_args`` matches.

    Raises:
        CheckpointError: a rotary base or linear factor that is not a whole number, which those flags cannot carry.
    """
    flags = {
        "num-layers": hf_config.num_layers,
        "hidden-size": hf_config.hidden_size,
        "ffn-hidden-size": hf_config.ffn_hidden_size,
        "num-attention-heads": hf_config.num_attention_heads,
        "num-query-groups": hf_config.num_query_groups,
        "kv-channels": hf_config.head_dim,
        "max-position-embeddings": hf_config.max_position_embeddings,
        "vocab-size": hf_config.vocab_size,
        "normalization": "RMSNorm",
        "norm-epsilon": hf_config.rms_norm_eps,
        "position-embedding-type": "rope",
        "rotary-base": _whole("rope_theta", hf_config.rope.theta),
        "hidden-dropout": 0.0,
        "attention-dropout": 0.0,
    }
    switches = ["group-query-attention", "swiglu", "disable-bias-linear"]
    if hf_config.rope.kind == "llama3":
        switches.append("use-rope-scaling")
        flags["rope-scaling-factor"] = hf_config.rope.factor
    if hf_config.rope.kind == "linear":
        flags["rotary-seq-len-interpolation-factor"] = _whole("linear rope factor", hf_config.rope.factor)
    if hf_config.qk_norm:
        switches.append("qk-layernorm")
    if hf_config.qkv_bias:
        switches.append("add-qkv-bias")
    if not hf_config.tie_word_embeddings:
        switches.append("untie-embeddings-and-output-weights")
    if hf_config.num_experts:
        flags |= {
            "num-experts": hf_config.num_experts,
            "moe-ffn-hidden-size": hf_config.expert_ffn_hidden_size,
            "moe-router-topk": hf_config.experts_per_token,
        }
        if not hf_config.norm_topk_prob:
            switches.append("moe-router-pre-softmax")
    return [f"--{name}={value}" for name, value in flags.items()] + [f"--{name}" for name in switches]


def build_gpt_model(
    hf_config: HfConfig,
    transformer_config: "TransformerConfig",
    *,
    padded_vocab_size: int,
    use_transformer_engine: bool,
    packed_attention: bool = False,
    pre_process: bool = True,
    post_process: bool = True,
    parallel_output: bool = True,
    vp_stage: int | None = None,
    pg_collection: Any = None,
) -> "GPTModel":
    """Build the Megatron model of a Hugging Face architecture, with random weights.

    Needs Megatron's parallel state, but no global arguments. The local layer spec wants an explicit causal attention mask
    (True = masked) at every call, or with ``packed_attention`` the sequences' lengths; the Transformer Engine spec makes
    its own.

    Args:
        hf_config: the architecture.
        transformer_config: made of ``transformer_config_kwargs(hf_config)`` and the caller's parallel and dtype settings.
        padded_vocab_size: rows of the embedding and the output layer, over all tensor-parallel ranks.
        use_transformer_engine: the Transformer Engine layer spec (GPU), or Megatron's own local one.
        packed_attention: local spec only: attention over packed sequences, which Megatron's own has not.
        pre_process: this pipeline stage holds the embedding.
        post_process: this pipeline stage holds the output layer.
        parallel_output: leave the logits sharded over the vocabulary.
        vp_stage: which virtual-pipeline chunk this is.
        pg_collection: Megatron's process groups; None are those of its parallel state.

    Returns:
        A ``GPTModel`` whose logits are [batch, sequence, padded_vocab_size / tp] (whole if not ``parallel_output``).
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    spec = get_gpt_decoder_block_spec(
        transformer_config, use_transformer_engine=use_transformer_engine, normalization="RMSNorm", vp_stage=vp_stage
    )
    if not use_transformer_engine:
        from megatron_distill.models.local_layers import use_local_layers

        use_local_layers(spec, packed_attention=packed_attention)
    rope = hf_config.rope
    model = GPTModel(
        config=transformer_config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size,
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=rope.theta,
        rope_scaling=rope.kind == "llama3",
        rope_scaling_factor=rope.factor,
        seq_len_interpolation_factor=rope.factor if rope.kind == "linear" else None,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            # Reduced and optimised apart from the rest, as Megatron does it under expert parallelism only. Then a checkpoint
            # has an optimizer for experts and one for the rest wherever experts lie, and resumes wherever they may.
            parameter.allreduce = False
    return model


def _whole(what: str, value: float) -> int:
    if value != int(value):
        raise CheckpointError(
            f"{what} = {value}: must be a whole number. Megatron's command line takes no fraction there. Build the model "
            "with build_gpt_model instead."
        )
    return int(value)
