"""Checks a Hugging Face model directory before a running server is told to load it.

SGLang 0.5.23 dies of a truncated safetensors file in ``update_weights_from_disk`` (its roll-back reads the new path again),
and answers "success" to a directory that lacks tensors, keeping the old ones. Both are cheap to see from the file headers.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_distill.errors import CheckpointError

_OPTIONAL = ("lm_head.weight", "rotary_emb.inv_freq")
"""Ends of names that a directory may hold or not: an output layer tied to the embeddings, and a constant that old exports
stored."""


def tensor_names(model_dir: Path) -> set[str]:
    """Names of all tensors in a directory, read from the headers; opening a file also checks its length.

    Raises:
        CheckpointError: no safetensors file there, or one of them is truncated or corrupt.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"model_dir = {model_dir}: holds no *.safetensors file. The server loads its weights from there. "
            "Export the model in Hugging Face format first."
        )
    names: set[str] = set()
    for file in files:
        try:
            with safe_open(str(file), framework="numpy") as opened:
                names.update(opened.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} = {error}: not a complete safetensors file. Loading it would kill the server. "
                "Write to a temporary directory and rename it when it is complete."
            ) from error
    return names


def require_same_tensors(model_dir: Path, expected: set[str]) -> None:
    """Refuse a directory whose tensors are not the served model's.

    Args:
        model_dir: the new weights.
        expected: ``tensor_names`` of the weights the server was started with.

    Raises:
        CheckpointError: also as ``tensor_names`` does.
    """
    names = tensor_names(model_dir)
    missing, extra = (
        {name for name in some if not name.endswith(_OPTIONAL)} for some in (expected - names, names - expected)
    )
    if missing or extra:
        raise CheckpointError(
            f"model_dir = {model_dir}: {len(missing)} tensors missing {sorted(missing)[:3]}, {len(extra)} unknown "
            f"{sorted(extra)[:3]}. The server would keep its old values for them and report success. "
            "Export the whole model, with the names of the model the server was started with."
        )
