"""One rank of a small training job without servers: the real session and ``pretrain``, fed with made-up samples.

    torchrun --nproc-per-node 2 -m tests.support.train_job RUN_DIR [BACKEND]

The run folder holds the config, BACKEND the fields of a ``MegatronBackend`` as JSON, instead of the machine's. Samples
are a function of the step alone, and each replica takes its share, so that runs of different layouts see the same data.
Losses and gradient norms are in ``metrics.jsonl``, the student in ``hf/``. An evaluation notes what it was made beside; a file
``in_evaluation`` in the run folder, "4 killed" or "4 fails", is what happens, once, to the rank that evaluates that step.
"""

import json
import os
import signal
import sys
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_distill import config as config_module
from megatron_distill.errors import DistillError
from megatron_distill.megatron.backend import MegatronBackend
from megatron_distill.megatron.session import run
from megatron_distill.models.vocabulary import Vocabulary
from megatron_distill.rollouts.source import Collected, Share
from megatron_distill.runs.run_folder import RunFolder, write_json
from megatron_distill.training.leader import Leader
from tests.support.samples import STOP_TOKEN_IDS, make_samples, with_hidden_states

TOP_K = 8


@dataclass(frozen=True)
class _Measured:
    """The summary of an evaluation that asked nothing, and what it was made beside.

    Attributes:
        step: evaluated.
        avg_at_k: the better, the nearer to step 2.
        checkpoint: the latest one.
        is_timed: Megatron took the evaluation for a part of a step's time.
        has_grad: autograd was on.
    """

    step: int
    avg_at_k: float
    checkpoint: int
    is_timed: bool
    has_grad: bool


class MadeUpLeader(Leader):
    """A leader whose servers say what ``make_samples`` says."""

    def __init__(self, config: config_module.RunConfig, folder: RunFolder, vocab_size: int) -> None:
        self._config, self._folder, self._vocab_size = config, folder, vocab_size
        self.student = _Server()  # type: ignore[assignment]
        self.heldout = SimpleNamespace(evaluate=self._evaluate)  # type: ignore[assignment]
        self.beside = None
        self.ahead = SimpleNamespace(drain=lambda: None, begin=lambda *_: None, keep=lambda *_: None)  # type: ignore[assignment]

    def wait_ready(self, progress: Any) -> None: ...

    def _evaluate(self, name: str, step: int) -> Any:
        from megatron.training import get_timers

        folder, fault = self._folder, self._folder.root / "in_evaluation"
        if fault.exists() and fault.read_text().startswith(f"{step} "):
            is_killed = fault.read_text().endswith("killed")
            fault.unlink()
            if is_killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise DistillError("told to fail")
        is_timed = getattr(get_timers()("interval-time"), "_started", False)  # before the first step there is none
        summary = _Measured(
            step, 1 / (1 + abs(step - 2)), folder.latest_checkpoint_step(), is_timed, torch.is_grad_enabled()
        )
        write_json(folder.evaluation(name, step), {"summary": asdict(summary)})
        return SimpleNamespace(summary=summary)

    def take(self, step: int, share: Share, horizon_tokens: int) -> Collected:
        samples = make_samples(step, self._config.rollouts_per_step, self._vocab_size, top_k=TOP_K)
        if self._config.teacher.sends_hidden_states:
            samples = with_hidden_states(samples, self._config.teacher.path)
        if self._config.rl.weight:
            samples = [replace(sample, policy_weight=float(sample.rollout.author == "student")) for sample in samples]
        per_replica = len(samples) // share.size
        return Collected(samples[share.rank * per_replica : (share.rank + 1) * per_replica], {"rollout_s": 0.0})

    def weights_changed(self, version: int, arrival: Future[float]) -> None: ...

    def close(self) -> None: ...


class _Server:
    """Takes weights, and looks at them."""

    def wait_reachable(self) -> None: ...

    def update_weights_from_disk(self, path: Path, version: str, *, in_flight: bool) -> None:
        assert (path / "model.safetensors").exists()


def main() -> None:
    folder = RunFolder(Path(sys.argv[1]))
    config = config_module.load(folder.config)
    from megatron_distill.models.hf_config import HfConfig

    vocab_size = HfConfig.from_dir(config.student.path).vocab_size
    tokenizer = SimpleNamespace(decode=str)
    vocabulary = Vocabulary(tokenizer, vocab_size, STOP_TOKEN_IDS)
    backend = MegatronBackend(**json.loads(sys.argv[2])) if len(sys.argv) > 2 else None
    run(config, folder, vocabulary, lambda dp_rank, must_stop: MadeUpLeader(config, folder, vocab_size), backend)


if __name__ == "__main__":
    main()
