"""Tiny random Hugging Face models of every family, written to disk by transformers itself."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_distill import recipes

VOCAB = 53  # not a multiple of anything: every layout pads it

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# name -> (model_type, changes to the common settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen2": ("qwen2", {"head_dim": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen2-tied": ("qwen2", {"head_dim": None, "tie_word_embeddings": True}),
    "llama2": ("llama", {"head_dim": None, "num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    # SmolLM-135M: tied, 9 heads in 3 groups.
    "smollm": (
        "llama",
        {"head_dim": None, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3,
         "tie_word_embeddings": True},
    ),
    # Fewer key/value heads than tensor-parallel ranks.
    "llama-one-group": ("llama", {"num_key_value_heads": 1}),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "qwen3-moe-unnormalised": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": False},
    ),
}  # fmt: skip


def build_hf_model(family: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A random transformers model in fp32, eager attention; biases and norms random too, so that a mix-up shows."""
    model_type, family_changes = FAMILIES[family]
    settings = {key: value for key, value in (_COMMON | family_changes | changes).items() if value is not None}
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval()


def save_tiny_mixture(directory: Path, seed: int = 1) -> Path:
    """A random Qwen3 of four experts, two of which work on a token, that speaks as the student of ``recipes/tiny.py``."""
    tiny_student = Path(recipes.__file__).parent / "tiny_models" / "student"
    shutil.copytree(tiny_student, directory)
    config = transformers.AutoConfig.from_pretrained(tiny_student)
    same = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id")
    build_hf_model("qwen3-moe", seed, **{name: getattr(config, name) for name in same}).save_pretrained(directory)
    return directory


def write_hf_model(directory: Path, family: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """Save a random model as a user would have it, and what transformers computes with it beside; returns the model."""
    model = build_hf_model(family, seed, **changes)
    model.save_pretrained(directory)
    tokens = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.save({"tokens": tokens, "logits": model(tokens).logits}, logits_file(directory))
    return model


def logits_file(directory: str | Path) -> Path:
    """Where ``write_hf_model`` leaves tokens [2, 24] and the transformers logits [2, 24, V] on them."""
    return Path(f"{directory}.logits.pt")
