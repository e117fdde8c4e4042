"""One rank of a small training job without servers: the real session and ``pretrain``, fed with made-up samples.

    torchrun --nproc-per-node 2 -m tests.support.train_job RUN_DIR [BACKEND]

The run folder holds the config, BACKEND the fields of a ``Backend`` as JSON, instead of the machine's. Samples are a function
of the step alone, and each replica takes its share, so that runs of different layouts see the same data. Losses and
gradient norms are in ``metrics.jsonl``, the student in ``hf/``.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_distill import config as config_module
from megatron_distill.megatron.backend import Backend
from megatron_distill.megatron.session import run
from megatron_distill.models.vocabulary import Vocabulary
from megatron_distill.rollouts.source import Collected, Share
from megatron_distill.runs.run_folder import RunFolder
from megatron_distill.training.leader import Leader
from tests.support.samples import STOP_TOKEN_IDS, make_samples, with_hidden_states

TOP_K = 8


@dataclass(frozen=True)
class _Measured:
    """The summary of an evaluation that asked nothing: the better, the nearer to step 2."""

    step: int

    @property
    def avg_at_k(self) -> float:
        return 1 / (1 + abs(self.step - 2))


class MadeUpLeader(Leader):
    """A leader whose servers say what ``make_samples`` says."""

    def __init__(self, config: config_module.RunConfig, vocab_size: int) -> None:
        self._config, self._vocab_size = config, vocab_size
        self.student = _Server()  # type: ignore[assignment]
        self.heldout = SimpleNamespace(evaluate=lambda name, step: SimpleNamespace(summary=_Measured(step)))  # type: ignore[assignment]

        self.ahead = SimpleNamespace(drain=lambda: None, begin=lambda *_: None, keep=lambda *_: None)  # type: ignore[assignment]

    def wait_ready(self, progress: Any) -> None: ...

    def take(self, step: int, share: Share, horizon_tokens: int) -> Collected:
        samples = make_samples(step, self._config.rollouts_per_step, self._vocab_size, top_k=TOP_K)
        if self._config.teacher.sends_hidden_states:
            samples = with_hidden_states(samples, self._config.teacher.path)
        if self._config.rl.weight:
            samples = [replace(sample, policy_weight=float(sample.rollout.author == "student")) for sample in samples]
        per_replica = len(samples) // share.size
        return Collected(samples[share.rank * per_replica : (share.rank + 1) * per_replica], {"rollout_s": 0.0})

    def weights_changed(self, version: int) -> None: ...

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
    backend = Backend(**json.loads(sys.argv[2])) if len(sys.argv) > 2 else None
    run(config, folder, vocabulary, lambda dp_rank, must_stop: MadeUpLeader(config, vocab_size), backend)


if __name__ == "__main__":
    main()
