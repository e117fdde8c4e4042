"""One rank of a job that calls the forward step and the in-process teacher themselves, on a micro-batch of made-up samples.

Started by a forge with FOLDER and the layout as JSON. FOLDER holds ``student``, ``teacher`` and what transformers computes
(``expected_logits``); each rank leaves the largest differences from it in ``rankN.json``.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from megatron_distill import config as config_module
from megatron_distill.megatron.backend import MegatronBackend
from megatron_distill.rollouts.batches import MicroBatch
from tests.support.samples import STOP_TOKEN_IDS, build_micro_batches, make_samples

VOCAB_SIZE = 200  # padded to 256: at tp 2 both ranks hold tokens, and the second one padding too
STEP = 2
MASKED = MegatronBackend(use_transformer_engine=False, packed_kernels=False, needs_mask=True)
PACKED = MegatronBackend(use_transformer_engine=False, packed_kernels=True, needs_mask=False)
BACKENDS = {"masked": MASKED, "packed": PACKED}


def micro_batch(backend: MegatronBackend) -> MicroBatch:
    """Ten samples in one micro-batch, several in a row."""
    samples = make_samples(STEP, 10, VOCAB_SIZE)
    (batch,) = build_micro_batches(samples, len(samples), step=STEP, needs_mask=backend.needs_mask)
    return batch


def expected_logits(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """[T, V]: each of the batch's sequences by itself, through transformers."""
    tokens, starts = batch.tokens_RL.flatten(), batch.sequence_starts.tolist()
    with torch.no_grad():
        rows = [model(tokens[a:b][None]).logits[0] for a, b in itertools.pairwise(starts)]
    return torch.cat(rows)[batch.logits_index_T]


def _gradients_against_whole_logits(
    objective: Any, model: Any, backend: MegatronBackend, teacher: Any, step_batch: Any
) -> dict[str, float]:
    """The largest differences of parameters' gradients, relative to the largest gradient: chunks against logits that exist
    whole and are differentiated by autograd, and the head's as Megatron's fused accumulation would have it."""
    from megatron_distill.megatron.forward_step import make_forward_step, run_model
    from megatron_distill.training.chunked_head import ChunkedHead
    from megatron_distill.training.components import LogitTensors

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (0.5 * loss).backward()
        return {name: one.grad for name, one in model.named_parameters()}

    said, taught = run_model(model, step_batch.batch, packed_kernels=backend.packed_kernels), teacher(step_batch.batch)
    whole = objective(said.logits(), step_batch.batch, step_batch.plan, LogitTensors(taught.logits()))
    exact = gradients(whole.loss)
    step = make_forward_step(ChunkedHead(objective, 7), packed_kernels=backend.packed_kernels, teacher=teacher)

    def by_chunks() -> dict[str, torch.Tensor]:
        rows, loss_function = step(iter([step_batch]), model)
        return gradients(loss_function(rows)[0])

    chunked = by_chunks()
    head: Any = said.head_VH
    is_tied = model.share_embeddings_and_output_weights
    head.main_grad, head.grad_added_to_main_grad, head.zero_out_wgrad = torch.zeros_like(head), False, is_tied
    model.output_layer.gradient_accumulation_fusion = True
    fused = by_chunks()
    name = next(name for name, one in model.named_parameters() if one is head)
    added = head.main_grad + (fused[name] if is_tied else 0)  # what Megatron's hook adds
    largest = max(float(one.abs().max()) for one in exact.values())
    return {
        "gradients": max(float((chunked[one] - exact[one]).abs().max()) for one in exact) / largest,
        "head's main gradient": float((added - exact[name]).abs().max()) / largest,
        "head learns": float(exact[name].abs().max()) / largest,
        "main gradient taken": head.grad_added_to_main_grad,
    }


def main() -> None:
    folder, layout = Path(sys.argv[1]), json.loads(sys.argv[2])
    base = {
        "student.path": str(folder / "student"),
        "teacher.path": str(folder / "teacher"),
        "student.recompute": "full",
    }
    base |= {"data.train_path": "unused", "data.heldout_path": "unused", "teacher.transport": "in_process"}
    lines = [f"{key}={json.dumps(value)}" for key, value in (base | layout).items()]
    config = config_module.with_overrides(config_module.RunConfig(), lines)
    student = _initialise(config, folder)
    found = {}
    for name, backend in BACKENDS.items():
        found[name] = _differences(config, student, backend, folder)
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _initialise(config: config_module.RunConfig, folder: Path) -> Any:
    """Megatron's globals as a run has them; the student's architecture."""
    from megatron.training import initialize
    from megatron.training.arguments import parse_and_validate_args

    from megatron_distill.megatron.arguments import training_arguments
    from megatron_distill.models.hf_config import HfConfig
    from megatron_distill.runs.run_folder import RunFolder

    student = HfConfig.from_dir(config.student.path)
    sys.argv = ["job", *training_arguments(config, student, RunFolder(folder / "none"), MASKED)]
    parse_and_validate_args()
    initialize.initialize_megatron(allow_no_cuda=True)
    return student


def _differences(
    config: config_module.RunConfig, hf_config: Any, backend: MegatronBackend, folder: Path
) -> dict[str, float | bool]:
    from megatron.core import mpu
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_distill.convert.live import load_hf_weights
    from megatron_distill.megatron.arguments import student_padded_vocab_size
    from megatron_distill.megatron.forward_step import make_forward_step
    from megatron_distill.megatron.in_process_teacher import InProcessTeacher
    from megatron_distill.models.megatron_gpt import build_gpt_model
    from megatron_distill.training.chunked_head import ChunkedHead
    from megatron_distill.training.components import LogitTensors, Shards, StepPlan, load_components
    from megatron_distill.training.feed import StepBatch
    from megatron_distill.training.objective import Objective

    padded, batch = student_padded_vocab_size(config, hf_config), micro_batch(backend)
    model = build_gpt_model(
        hf_config,
        core_transformer_config_from_args(get_args()),
        padded_vocab_size=padded,
        use_transformer_engine=False,
        packed_attention=backend.packed_kernels,
    )
    load_hf_weights(model, config.student.path)
    teacher = InProcessTeacher(
        config.teacher.path, padded_vocab_size=padded, backend=backend, device=torch.device("cpu")
    )
    group = mpu.get_tensor_model_parallel_group() if config.student.parallel.tp > 1 else None
    objective = Objective(load_components(config), Shards(group, VOCAB_SIZE, STOP_TOKEN_IDS))
    num_tokens = float(batch.target_ids_T.numel())
    plan = StepPlan(STEP, 0.3, num_tokens, {"distill": num_tokens})
    recorded: list[dict[str, torch.Tensor]] = []
    step = make_forward_step(
        ChunkedHead(objective), packed_kernels=backend.packed_kernels, teacher=teacher, record=recorded.append
    )
    rows, loss_function = step(iter([StepBatch(batch, plan)]), model)
    loss, count, report = loss_function(rows)
    logits, taught = rows.logits(), teacher(batch).logits()
    again = objective(logits, batch, plan, LogitTensors(taught))
    shard = padded // config.student.parallel.tp
    first = mpu.get_tensor_model_parallel_rank() * shard
    held = slice(first, min(first + shard, VOCAB_SIZE))

    def difference(ours: torch.Tensor, whose: str) -> float:
        expected = torch.load(folder / f"{whose}.{'packed' if backend.packed_kernels else 'masked'}.pt")
        assert ours.shape == (len(expected), shard)
        return float((ours[:, : held.stop - held.start].detach() - expected[:, held]).abs().max())

    gradients = _gradients_against_whole_logits(objective, model, backend, teacher, StepBatch(batch, plan))
    return gradients | {
        "student": difference(logits, "student"),
        "teacher": difference(taught, "teacher"),
        "tokens held": held.stop - held.start,
        "student learns": logits.requires_grad,
        "teacher learns": taught.requires_grad,
        "loss is the objective's": torch.equal(loss, again.loss),
        "counted tokens": int(count) - int(num_tokens),
        "recorded once": len(recorded) == 1 and torch.equal(recorded[0]["loss"], report["loss"]),
        "loss": float(loss.detach()),
    }
