"""One training run inside Megatron's unmodified loop: what ``pretrain`` is given.

    pretrain ──> build_model      the student, with its Hugging Face weights
             ──> datasets         everything that needs the loaded model: the objective, the feed, the cycle's beginning
             ──> forward_step     per micro-batch: logits, loss            (``megatron.forward_step``)
             ──> after_step       per step: ``training.cycle``, on one page
    its schedule ──> before_step  per step, after a checkpoint             (``megatron.schedule``)

``after_step`` is ``pretrain``'s public ``non_loss_data_func``: Megatron calls it on every rank after each step and before a
checkpoint, outside autograd, with parameters in sync. Whatever needs all ranks at once (gathering weights, sharing rollouts)
happens there or in ``before_step``, never in the data iterator, whose ``next`` the stages of a pipeline call at different
times.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from megatron_distill.config import RunConfig
from megatron_distill.convert.live import load_hf_weights, save_hf
from megatron_distill.megatron import schedule
from megatron_distill.megatron.arguments import row_multiple, student_padded_vocab_size
from megatron_distill.megatron.backend import MegatronBackend, choose_backend, prepare
from megatron_distill.megatron.forward_step import FrozenTeacher, make_forward_step
from megatron_distill.megatron.in_process_teacher import InProcessTeacher
from megatron_distill.megatron.megatron_log import ScalarTap, tap_scalars
from megatron_distill.megatron.neighbours import Neighbours, find_neighbours
from megatron_distill.megatron.ranks import find_ranks
from megatron_distill.megatron.router_load import RouterLoad
from megatron_distill.megatron.teacher_head import TeacherHead
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.models.megatron_gpt import build_gpt_model
from megatron_distill.models.vocabulary import Vocabulary
from megatron_distill.rollouts.source import IN_FLIGHT
from megatron_distill.runs.run_folder import RunFolder
from megatron_distill.runs.timeline import Timeline
from megatron_distill.sglang.client import SGLangClient
from megatron_distill.training.chunked_head import ChunkedHead
from megatron_distill.training.components import Shards, load_components
from megatron_distill.training.cycle import Cycle
from megatron_distill.training.feed import Packing, StepFeed
from megatron_distill.training.kept import Kept
from megatron_distill.training.leader import Leader
from megatron_distill.training.objective import Objective, StepSums
from megatron_distill.training.ranks import Ranks
from megatron_distill.training.step_metrics import StepMetrics
from megatron_distill.training.weight_push import WeightPush
from megatron_distill.training.weight_sync import DETERMINISTIC_CHANNELS, BroadcastSync, DiskSync, WeightSync

MakeLeader = Callable[[int, Callable[[], bool]], Leader]


class Session:
    """State of a run on one rank. Its methods are the arguments of ``megatron.training.pretrain``."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        vocabulary: Vocabulary,
        make_leader: MakeLeader,
        backend: MegatronBackend | None = None,
    ) -> None:
        """Remember what the run is; Megatron is not initialised yet.

        Args:
            config: the run's, as config.json holds it.
            folder: its folder, created by the launcher.
            vocabulary: shared by student and teacher.
            make_leader: called on each replica's leader, with what tells whether the process must end.
            backend: how models run here; None chooses by machine and config.
        """
        self.config, self.folder, self.vocabulary = config, folder, vocabulary
        self._make_leader = make_leader
        self.hf_config = HfConfig.from_dir(config.student.path)
        self.backend = backend or choose_backend(config.student)
        self._chunks: list[Any] = []
        self._num_calls = 0  # of ``after_step``
        self._live: _Live | None = None

    # --- what pretrain calls, in this order ---------------------------------------------------------------------------

    def build_model(
        self, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **_: Any
    ) -> Any:
        """Megatron's model provider: this rank's part of the student, with its Hugging Face weights."""
        from megatron.training import get_args
        from megatron.training.arguments import core_transformer_config_from_args

        transformer_config = core_transformer_config_from_args(get_args())
        # Packed rows differ in number and length from one micro-batch to the next.
        transformer_config.variable_seq_lengths = self.config.student.parallel.pp > 1
        model = build_gpt_model(
            self.hf_config,
            transformer_config,
            padded_vocab_size=student_padded_vocab_size(self.config, self.hf_config),
            use_transformer_engine=self.backend.use_transformer_engine,
            packed_attention=self.backend.packed_kernels,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if not self.folder.latest_checkpoint_step():  # else Megatron loads the checkpoint over them
            load_hf_weights(model, self.config.student.path)
        self._chunks.append(model)
        return model

    def datasets(self, num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        """Megatron's dataset provider: the feed, filled for the first step; no validation or test set.

        Called on every rank once the model, the optimizer and any checkpoint are loaded, for each of the model's chunks.
        Megatron 0.19 then takes the chunks for so many validation sets: there must be as many of those, of no batches.
        """
        if self._live is None:
            self._live = _Live(self, self._make_leader)
            self._live.cycle.begin()
        return self._live.cycle.feed.of_chunk(vp_stage or 0), [()] * self.config.student.parallel.vpp, None

    datasets.is_distributed = True  # type: ignore[attr-defined]

    def before_step(self) -> int:
        """What waited for a checkpoint; then the number of micro-batches of the step that is about to train."""
        assert self._live is not None
        self._live.cycle.go_on()
        return self._live.cycle.feed.num_micro_batches

    def forward_step(self, data_iterator: Any, model: Any) -> Any:
        """Megatron's forward step; see ``megatron_distill.megatron.forward_step``."""
        assert self._live is not None
        return self._live.forward_step(data_iterator, model)

    def after_step(self, model: Any) -> None:
        """Between two steps, on every rank; see ``training.cycle``. Called once for each validation set."""
        assert self._live is not None
        self._num_calls += 1
        if self._num_calls % self.config.student.parallel.vpp == 0:
            self._live.cycle.advance()

    def finish(self) -> None:
        """After ``pretrain``: export the student for transformers and SGLang, close what is open. Collective."""
        assert self._live is not None
        self._live.cycle.say("exporting the student to hf/")
        self.save(self.folder.hf)
        self._live.kept.close()
        self._live.push.close()
        if self._live.leader is not None:
            self._live.leader.close()

    def save(self, directory: Path) -> None:
        """Write the student as it is now, in the place of an earlier one. Collective."""
        assert self._live is not None
        world = self._live.cycle.ranks.world
        save_hf(
            self._chunks,
            self.hf_config,
            self.config.student.path,
            directory,
            overwrite=True,
            names_group=world,
            end_token_ids=self.vocabulary.stop_token_ids,
        )

    @property
    def chunks(self) -> list[Any]:
        """This rank's parts of the student."""
        return self._chunks


class _Live:
    """What can be made only once Megatron has loaded the model."""

    def __init__(self, session: Session, make_leader: MakeLeader) -> None:
        from megatron.core import mpu
        from megatron.training import get_args, get_signal_handler

        config, folder = session.config, session.folder
        ranks = find_ranks()
        device = next(session.chunks[0].parameters()).device
        signals = get_signal_handler()
        # Its public method is collective, and a leader asks while the others wait for it.
        self.leader = make_leader(ranks.dp_rank, lambda: signals._signal_received) if ranks.is_leader else None
        self.push = WeightPush(
            _weight_sync(session, ranks, self.leader.student if self.leader else None),
            session.chunks,
            ranks.aside,
            sent=functools.partial(Timeline(folder.timeline).add, "student", "load"),
        )
        tap = tap_scalars() if ranks.is_reporter else ScalarTap()
        in_trainer = config.teacher.in_trainer and config.distill.weight > 0
        components, step_sums = load_components(config), StepSums()
        objective = Objective(
            components,
            Shards(
                tp_group=mpu.get_tensor_model_parallel_group() if config.student.parallel.tp > 1 else None,
                vocab_size=session.vocabulary.size,
                stop_token_ids=session.vocabulary.stop_token_ids,
            ),
            config.rollouts.temperature,
        )
        teacher = _teacher(session, ranks, device) if config.distill.weight else None
        reference = _frozen(session, config.student.path, device) if config.rl.reference_kl_coef else None
        self.forward_step = make_forward_step(
            ChunkedHead(objective, config.head_chunk_tokens),
            packed_kernels=session.backend.packed_kernels,
            teacher=teacher,
            reference=reference,
            record=step_sums.add,
        )
        feed = StepFeed(
            ranks,
            self.leader.take if self.leader is not None else _nobody,
            components=components,
            reverse_kl_weight=config.distill.reverse_kl_weight.at,
            scored_in_trainer=in_trainer,
            asks_teacher=config.distill.weight > 0 and not in_trainer,
            rollouts_per_prompt=config.rollouts.rollouts_per_prompt,
            packing=Packing(
                micro_batch_rollouts=None if config.micro_batch_tokens else config.micro_batch_rollouts,
                micro_batch_tokens=config.micro_batch_tokens,
                count_multiple=config.student.parallel.pp if config.student.parallel.vpp > 1 else 1,
                pad_multiple=row_multiple(config, session.backend),
                needs_mask=session.backend.needs_mask,
                device=device,
                cp_rank=mpu.get_context_parallel_rank(),
                cp_size=config.student.parallel.cp,
            ),
            num_chunks=len(session.chunks),
            show=lambda batches: [
                one.read(batches) for one in (teacher, reference) if isinstance(one, InProcessTeacher)
            ],
        )
        self.kept = Kept(config, folder, ranks, session.save)
        self.cycle = Cycle(
            config,
            folder,
            ranks,
            self.leader,
            feed=feed,
            push=self.push,
            kept=self.kept,
            save=session.save,
            metrics=StepMetrics(folder, ranks, step_sums, tap.take, RouterLoad(session.chunks).take),
            must_stop=lambda: any(signals.signals_received()),
            end=_end,
            step=get_args().iteration,
        )


def _teacher(session: Session, ranks: Ranks, device: torch.device) -> FrozenTeacher | None:
    """The teacher beside the student, or the output layer of a served one; None if its scores travel."""
    from megatron.core import mpu

    config = session.config
    if config.teacher.in_trainer:
        replicas = config.in_process_tp // config.student.parallel.tp
        neighbours = find_neighbours(replicas, ranks.world) if replicas > 1 else None
        return _frozen(session, config.teacher.path, device, neighbours)
    if not config.teacher.sends_hidden_states or not ranks.is_last_stage:
        return None
    return TeacherHead(
        config.teacher.path,
        padded_vocab_size=student_padded_vocab_size(config, session.hf_config),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        tp_size=config.student.parallel.tp,
        dtype=next(session.chunks[0].parameters()).dtype,
        device=device,
    )


def _frozen(
    session: Session, path: str, device: torch.device, neighbours: Neighbours | None = None
) -> InProcessTeacher:
    return InProcessTeacher(
        path,
        padded_vocab_size=student_padded_vocab_size(session.config, session.hf_config),
        backend=session.backend,
        device=device,
        neighbours=neighbours,
    )


def _weight_sync(session: Session, ranks: Ranks, client: SGLangClient | None) -> WeightSync:
    """The config's transport of weights; rank 0 uses its client."""
    servers, client = session.config.servers, client if ranks.rank == 0 else None
    if servers.weight_sync == "disk":
        return DiskSync(
            session.hf_config,
            session.config.student.path,
            session.folder.sync,
            client,
            ranks.world,
            in_flight=session.config.rollouts.max_staleness_steps >= IN_FLIGHT,
        )
    return BroadcastSync(
        session.hf_config,
        client,
        num_replicas=servers.student_replicas,
        ranks_per_replica=servers.student_tp,
        bucket_bytes=servers.sync_bucket_mib << 20,
        num_channels=DETERMINISTIC_CHANNELS if servers.deterministic and servers.student_tp > 1 else None,
        world=ranks.world,
    )


def _end() -> NoReturn:
    """End this process as Megatron's loop does after a signal, once it has saved. Collective."""
    torch.distributed.barrier()
    sys.exit()


def _nobody(*_: Any) -> Any:
    raise AssertionError("only a replica's leader has somebody to ask")


def run(
    config: RunConfig,
    folder: RunFolder,
    vocabulary: Vocabulary,
    make_leader: MakeLeader,
    backend: MegatronBackend | None = None,
) -> Session:
    """Train: hand a ``Session`` to the unmodified ``megatron.training.pretrain``, then export the student."""
    prepare()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_distill.megatron.arguments import training_arguments

    session = Session(config, folder, vocabulary, make_leader, backend)
    schedule.begin_with(session.before_step)
    sys.argv[1:] = training_arguments(config, session.hf_config, folder, session.backend)
    arguments = parse_and_validate_args()
    torch.manual_seed(config.seed)
    pretrain(
        pretrain_cfg_container_from_args(arguments),
        session.datasets,
        ModelType.encoder_or_decoder,
        session.forward_step,
        session.build_model,
        non_loss_data_func=session.after_step,
    )
    session.finish()
    return session
