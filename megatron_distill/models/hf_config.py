"""Read a Hugging Face ``config.json`` into what a conversion needs, and refuse what we would silently get wrong.

In: the directory (or the parsed JSON) of a Hugging Face causal language model. Out: ``HfConfig``, one frozen record of
the architecture, spelled in Megatron's words (query groups, ffn, rope), from which ``megatron_distill.models.megatron_gpt``
builds the model and ``families`` picks its table of names.

Both spellings of rotary settings are read: ``rope_theta`` + ``rope_scaling`` (transformers 4) and ``rope_parameters``
(transformers 5).

Names to know: ``HfConfig.from_dir``, ``HfConfig.from_dict``, ``Rope``, ``eos_ids``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_distill.config.json_files import json_of
from megatron_distill.errors import CheckpointError

VOCAB_DIVISOR = 128  # megatron.training's own default for --make-vocab-size-divisible-by

MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")

# megatron-core 0.19 computes Llama-3 scaling with these three values built in (RotaryEmbedding._apply_scaling); they are
# those of every published Llama 3.1, 3.2 and 3.3.
_LLAMA3_BUILT_IN = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: ``inv_freq_i = theta^(-2i/head_dim)``, then scaled as ``kind`` says.

    ``linear`` divides positions by ``factor``; ``llama3`` divides low frequencies by ``factor``, keeps high ones and
    interpolates between (Llama 3.1's long-context recipe).
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0


@dataclass(frozen=True)
class HfConfig:
    """The architecture of one Hugging Face causal language model. Sizes are counts of elements."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    head_dim: int
    ffn_hidden_size: int  # of a dense MLP
    vocab_size: int  # rows of the embedding as Hugging Face stores it, unpadded
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    num_experts: int  # 0: dense
    experts_per_token: int
    expert_ffn_hidden_size: int
    norm_topk_prob: bool  # the chosen experts' probabilities are rescaled to sum to one
    raw: Mapping[str, Any] = field(repr=False, compare=False)  # config.json as it was read, to be written back

    @classmethod
    def from_dir(cls, path: str | Path) -> "HfConfig":
        """Read ``path/config.json``.

        Raises:
            CheckpointError: the file is missing, is not JSON, or describes what we cannot convert faithfully.
        """
        file = Path(path) / "config.json"
        try:
            raw = json_of(file)
        except FileNotFoundError:
            raise CheckpointError(
                f"{file}: no such file, so this is not a Hugging Face model directory. Give the folder that holds "
                "config.json and *.safetensors."
            ) from None
        except ValueError as error:
            raise CheckpointError(f"{file}: not valid JSON ({error}). Download the model again.") from error
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}). Name a directory that can.") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{file}: holds {str(raw)[:40]}, not an object. Download the model again.")
        return cls.from_dict(raw, where=str(file))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> "HfConfig":
        """Read a parsed ``config.json``; ``where`` is only for error texts.

        Raises:
            CheckpointError: naming every setting at once that we cannot convert faithfully.
        """
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"{where}: model_type = {model_type!r}: must be one of {', '.join(MODEL_TYPES)}. Other families have "
                "tensors we have no table for; models/families.py is the place to add one."
            )
        problems = _refusals(raw)
        rope, rope_problem = _read_rope(raw)
        if rope_problem:
            problems.append(rope_problem)
        try:
            config = cls._from_checked(raw, model_type, rope)
        except KeyError as error:
            problems.append(f"{error.args[0]} is missing: the architecture is not fully described")
        if problems:
            raise CheckpointError(f"{where}: cannot be converted faithfully:\n  - " + "\n  - ".join(problems))
        return config

    @classmethod
    def _from_checked(cls, raw: Mapping[str, Any], model_type: str, rope: Rope) -> "HfConfig":
        heads = raw["num_attention_heads"]
        is_moe = model_type == "qwen3_moe"
        return cls(
            model_type=model_type,
            num_layers=raw["num_hidden_layers"],
            hidden_size=raw["hidden_size"],
            num_attention_heads=heads,
            num_query_groups=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            ffn_hidden_size=raw["intermediate_size"],
            vocab_size=raw["vocab_size"],
            max_position_embeddings=raw["max_position_embeddings"],
            rms_norm_eps=raw["rms_norm_eps"],
            rope=rope,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type in ("qwen3", "qwen3_moe"),
            num_experts=_num_experts(raw) if is_moe else 0,
            experts_per_token=raw["num_experts_per_tok"] if is_moe else 0,
            expert_ffn_hidden_size=raw["moe_intermediate_size"] if is_moe else 0,
            norm_topk_prob=bool(raw.get("norm_topk_prob", False)),
            raw=raw,
        )


def eos_ids(raw: Mapping[str, Any]) -> list[int]:
    """What ``eos_token_id`` names in a parsed config.json or generation_config.json: no id, one, or a list of them."""
    named = raw.get("eos_token_id")
    if named is None:
        return []
    return named if isinstance(named, list) else [named]


def _num_experts(raw: Mapping[str, Any]) -> int:
    """transformers 4 writes ``num_experts``, transformers 5 ``num_local_experts`` (an attribute alias)."""
    return raw["num_experts"] if "num_experts" in raw else raw["num_local_experts"]


def _refusals(raw: Mapping[str, Any]) -> list[str]:
    """Every setting that would make the Megatron model compute something else than the Hugging Face one."""
    problems = []
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        problems.append(
            f"quantization_config.quant_method = {method!r}: quantised weights are not trainable weights; "
            "convert the unquantised model"
        )
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act = {raw['hidden_act']!r}: must be 'silu' (a gated SwiGLU MLP)")
    if raw.get("attention_bias") and raw["model_type"] != "qwen2":
        problems.append(
            "attention_bias = true: it also adds a bias to o_proj, for which Megatron has a place only "
            "together with biases in the MLP"
        )
    if raw.get("mlp_bias"):
        problems.append("mlp_bias = true: the families here have bias-free MLPs")
    if raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ()):
        problems.append("sliding-window attention is on: the Megatron model would attend to everything")
    if raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1:
        problems.append(
            "mlp_only_layers / decoder_sparse_step: dense layers between mixture-of-experts layers are not supported"
        )
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor = {raw['partial_rotary_factor']}: must be 1")
    if raw.get("pretraining_tp", 1) not in (1, None):
        problems.append(f"pretraining_tp = {raw['pretraining_tp']}: must be 1 (the sliced matmul is not reproduced)")
    return problems


def _read_rope(raw: Mapping[str, Any]) -> tuple[Rope, str]:
    """The rotary settings and, if Megatron could not follow them, why not (else an empty string)."""
    settings = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = settings.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = settings.get("rope_type", settings.get("type", "default"))
    factor = float(settings.get("factor", 1.0))
    if kind not in ("default", "linear", "llama3"):
        return Rope(theta), f"rope type = {kind!r}: must be default, linear or llama3"
    if kind == "llama3":
        for key, built_in in _LLAMA3_BUILT_IN.items():
            if settings.get(key) != built_in:
                return Rope(theta), (
                    f"rope {key} = {settings.get(key)}: must be {built_in}, which Megatron has built "
                    "into its Llama-3 scaling"
                )
    return Rope(theta, kind, factor), ""


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Rows of Megatron's embedding: the vocabulary rounded up to a multiple of ``divisible_by * tp``.

    The rule of ``megatron.training`` (``--make-vocab-size-divisible-by``), so that offline and online agree.
    """
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple
