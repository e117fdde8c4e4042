"""The forward step and the in-process teacher by themselves: logits as transformers computes them, and one loss of both."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.forward_job import BACKENDS, VOCAB_SIZE, expected_logits, micro_batch
from tests.support.rank_forge import RankForge
from tests.support.tiny_models import write_hf_model

LAYOUTS = {"tp1": {}, "tp2": {"tp": 2}, "tp2 sequence parallel": {"tp": 2, "sequence_parallel": True}}
FAMILY = {"tp1": "qwen3-tied", "tp2": "qwen3-tied", "tp2 sequence parallel": "qwen3"}
"""Of the student: with a head of its own, or the embedding's."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the student's family: it, a wider Llama teacher of the same vocabulary, and what transformers computes of both."""
    return {family: _models(tmp_path_factory.mktemp(family), family) for family in set(FAMILY.values())}


def _models(root: Path, student: str) -> Path:
    for role, family, seed, changes in (("student", student, 1, {}), ("teacher", "llama3", 2, {"hidden_size": 64})):
        model = write_hf_model(root / role, family, seed, vocab_size=VOCAB_SIZE, **changes)
        for name, backend in BACKENDS.items():
            torch.save(expected_logits(model, micro_batch(backend)), root / f"{role}.{name}.pt")
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers_and_the_loss_is_the_objectives(
    layout: str, folders: dict[str, Path], forge: RankForge
) -> None:
    """Packed beside others, under a mask or by lengths, whole or sharded over ranks, with sequence parallelism or without: each
    response token's logits are those of its sequence alone, a teacher's of another family too. The loss is the objective's of
    both, its metrics are recorded once, and the teacher does not learn. Chunk by chunk every parameter's gradient is that of
    whole logits, also where the head is the embedding, or adds its gradient to Megatron's main one by itself."""
    folder = folders[FAMILY[layout]]
    overrides = {f"student.parallel.{name}": value for name, value in LAYOUTS[layout].items()}
    num_ranks = LAYOUTS[layout].get("tp", 1)
    forge.run("tests.support.forward_job", num_ranks, [str(folder), json.dumps(overrides)], folder / layout)
    by_rank = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
    for name in BACKENDS:
        assert sum(found[name]["tokens held"] for found in by_rank) == VOCAB_SIZE
        for found in (one[name] for one in by_rank):
            assert found["student"] < 1e-4 and found["teacher"] < 1e-4, found
            assert found["student learns"] and not found["teacher learns"]
            assert found["gradients"] < 1e-5 and found["head's main gradient"] < 1e-5 and found["main gradient taken"]
            assert found["head learns"] > 1e-2
            assert found["loss is the objective's"] and found["recorded once"] and found["counted tokens"] == 0
    losses = [found[name]["loss"] for found in by_rank for name in BACKENDS]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5) and losses[0] > 0
