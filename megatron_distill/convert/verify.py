"""Say whether two checkpoints are the same model: tensor by tensor, and on request by what they compute.

In: two paths, each a Hugging Face directory or a Megatron checkpoint. Out: ``Comparison`` of the tensors, and the largest
difference of their logits on a text. Tensors are read one at a time.

Names to know: ``compare_tensors``, ``compare_logits``.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_distill.convert.hf_files import HfDirectory
from megatron_distill.convert.inspection import open_checkpoint
from megatron_distill.convert.layout import hf_of_shards
from megatron_distill.convert.megatron_files import MegatronCheckpoint
from megatron_distill.convert.offline import companion_of, megatron_to_hf
from megatron_distill.errors import CheckpointError
from megatron_distill.models.families import tensor_rules
from megatron_distill.models.hf_config import HfConfig


@dataclass
class Comparison:
    """How the tensors of two checkpoints differ; dtypes may differ without making a tensor different in value."""

    num_tensors: int = 0
    num_equal: int = 0
    differing: list[tuple[str, float]] = field(default_factory=list)  # name, largest absolute difference
    other_dtypes: int = 0

    @property
    def same(self) -> bool:
        """Whether every tensor is equal in value."""
        return self.num_equal == self.num_tensors

    def __str__(self) -> str:
        lines = [f"{self.num_equal} of {self.num_tensors} tensors are equal"]
        if self.other_dtypes:
            lines[0] += f" in value; {self.other_dtypes} have another dtype"
        worst = sorted(self.differing, key=lambda item: -item[1])
        lines += [f"  {name}: largest difference {difference:.3g}" for name, difference in worst[:10]]
        return "\n".join(lines)


def compare_tensors(a: str | Path, b: str | Path, hf_dir: str | Path | None = None) -> Comparison:
    """Compare two checkpoints by Hugging Face tensor; padding and sharding do not count.

    Args:
        a: a Hugging Face directory, or a Megatron checkpoint.
        b: likewise.
        hf_dir: where a Megatron checkpoint's config.json is, unless in its own ``hf/``.

    Raises:
        CheckpointError: one of them cannot be read, is incomplete, or they are of different architectures.
    """
    config_a, tensors_a = _open_tensors(a, hf_dir)
    config_b, tensors_b = _open_tensors(b, hf_dir)
    if config_a != config_b:
        raise CheckpointError(
            f"{a} and {b}: different architectures ({config_a} and {config_b}). Their tensors cannot be compared."
        )
    result = Comparison()
    for (name, tensor_a), (_, tensor_b) in zip(tensors_a, tensors_b, strict=True):
        result.num_tensors += 1
        result.other_dtypes += tensor_a.dtype != tensor_b.dtype
        if torch.equal(tensor_a, tensor_b) if tensor_a.dtype == tensor_b.dtype else _equal_values(tensor_a, tensor_b):
            result.num_equal += 1
        else:
            result.differing.append((name, float((tensor_a.double() - tensor_b.double()).abs().max())))
    return result


def compare_logits(a: str | Path, b: str | Path, text: str, hf_dir: str | Path | None = None) -> float:
    """Largest absolute difference of two checkpoints' logits on ``text``, in fp32, as transformers computes them.

    A Megatron checkpoint is written out as a temporary Hugging Face directory first. Both models are in memory in turn,
    not together.

    Raises:
        CheckpointError: one of them cannot be read, or there is no tokenizer beside them.
    """
    import transformers

    tokens: Tensor | None = None
    logits: list[Tensor] = []
    for path in (a, b):
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(path)
            if isinstance(open_checkpoint(path), MegatronCheckpoint):
                directory = Path(scratch) / "hf"
                megatron_to_hf(path, directory, hf_dir=hf_dir)
            if tokens is None:
                tokens = _tokenize(text, directory)
            # Eager attention: the plain formula, the same on every machine.
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager"
            )
            with torch.no_grad():
                logits.append(model(tokens).logits)
            del model
    difference = float((logits[0] - logits[1]).abs().max())
    if not math.isfinite(difference):
        raise CheckpointError(
            f"{a} and {b}: their logits differ by {difference}. One of them computes no numbers: see `convert inspect` of each."
        )
    return difference


def _tokenize(text: str, directory: Path) -> Tensor:
    import transformers

    try:
        tokens = transformers.AutoTokenizer.from_pretrained(directory)(text).input_ids
    except (OSError, ValueError):
        tokens = []
    if not tokens:  # transformers 5 makes an empty tokenizer of a directory that has none
        raise CheckpointError(
            f"{directory}: no tokenizer that makes tokens of the text {text!r}. --logits needs one. Copy the tokenizer "
            "files there, or compare tensors only."
        )
    return torch.tensor([tokens])


def _open_tensors(path: str | Path, hf_dir: str | Path | None) -> tuple[HfConfig, Iterator[tuple[str, Tensor]]]:
    checkpoint = open_checkpoint(path)
    if isinstance(checkpoint, HfDirectory):
        config = HfConfig.from_dir(path)
    else:
        config = HfConfig.from_dir(companion_of(checkpoint, hf_dir))
    checkpoint.check(config)
    return config, _tensors(checkpoint, config)


def _tensors(checkpoint: HfDirectory | MegatronCheckpoint, config: HfConfig) -> Iterator[tuple[str, Tensor]]:
    for rule in tensor_rules(config):
        names = [tensor.name for tensor in rule.hf]
        if isinstance(checkpoint, HfDirectory):
            yield from ((name, checkpoint.read(name)) for name in names)
        else:
            yield from zip(names, hf_of_shards(rule, config, [checkpoint.read(rule, config)]), strict=True)


def _equal_values(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.double(), b.double())
