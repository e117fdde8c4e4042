"""The first hour on GPUs: a ladder of runs from the smallest on, each with a verdict, and one table at the end.

    make gpu-check                                    # every rung that this machine can take
    python tools/gpu_check.py --list                  # what each rung does and needs
    python tools/gpu_check.py qwen qwen_broadcast     # some of them

The tiny rungs run anywhere; on CPU they are what CI runs. The others take a GPU, and the models and data of their recipe: type
``megatron-distill fetch qwen3.b06_from_4b_1x8_128`` before. One GPU is enough for all but those that need a second by their
nature: trainer and server then share it. Every run keeps its folder, logs and report below --root. A rung that fails does not
end the ladder, but the first failure is the one to look at: see docs/gpu.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from megatron_distill.config import RunConfig, with_overrides
from megatron_distill.config.loading import load_recipe
from megatron_distill.errors import DistillError
from megatron_distill.launch.local import visible_gpus
from megatron_distill.models import hub

Steps = list[dict[str, float]]

SMALL = ("num_steps=3", "evaluation.num_problems=4", "evaluation.samples_per_problem=1", "save_every_steps=0")
TINY = (
    *SMALL,
    "student.parallel.tp=1",
    "micro_batch_rollouts=8",
    "rollouts.prompts_per_step=16",
    "curriculum.horizon_tokens=32",
    "evaluation.max_response_tokens=32",
    "teacher.transport=in_process",
)
QWEN = (
    *SMALL,
    "student.parallel.dp=1",
    "micro_batch_rollouts=2",
    "rollouts.prompts_per_step=16",
    "evaluation.max_response_tokens=256",
    "servers.student_replicas=1",
)
SHARED = ("servers.shared_gpu_frac=0.3", "servers.weight_sync=disk")
"""How one GPU holds trainer and server."""


@dataclass(frozen=True)
class Rung:
    """One rung.

    Attributes:
        what: it shows.
        recipe: that it runs.
        overrides: of the recipe.
        verdict: raises AssertionError if the steps of the run do not show it; returns what they show.
        gpus: it takes, where there are any.
        needs_gpu: a CPU cannot take it, and its models and data must have been fetched.
        can_share: one GPU holds its trainer and its server.
    """

    what: str
    recipe: str
    overrides: tuple[str, ...]
    verdict: Callable[[Steps], str]
    gpus: int = 2
    needs_gpu: bool = False
    can_share: bool = True


@dataclass
class Result:
    """What became of a rung."""

    name: str
    state: str
    seconds: float = 0.0
    text: str = ""
    steps: Steps = field(default_factory=list)

    def line(self) -> str:
        """For the table. Rates are those of the steps after the first, which compiles and warms up."""
        later = self.steps[1:] or self.steps
        rate = sum(step["tokens_per_s"] for step in later) / len(later) if later else 0.0
        pace = sum(step["step_s"] for step in later) / len(later) if later else 0.0
        figures = f"{pace:7.2f} {rate:9.0f}" if later else f"{'':7} {'':9}"
        return f"  {self.state:<8} {self.name:<16} {self.seconds:7.0f} {figures}  {self.text}"


def small_gap(steps: Steps) -> str:
    """Megatron and the server agree on what the server sampled."""
    gaps = [step["sampler_gap_nats"] for step in steps]
    assert all(gap <= 0.05 for gap in gaps), (  # NaN is no gap either
        f"sampler gaps {_listed(gaps)} nats, not all up to 0.05: the server and Megatron do not hold the same model"
    )
    return f"sampler gap {max(gaps):.1e} nats"


def no_divergence(steps: Steps) -> str:
    """Teacher equal to student: what remains is the rounding of two forward passes. One step, before any update."""
    found = [abs(steps[0][name]) for name in ("forward_kl_nats", "reverse_kl_nats")]
    assert all(kl <= 5e-3 for kl in found), f"KLs {_listed(found)} nats of a model with itself, not all up to 0.005"
    return f"KL with itself {max(found):.1e} nats"


def reinforces(steps: Steps) -> str:
    """Rewards arrive, the importance ratio is near one, and the gradient is finite."""
    assert all(step["grad_norm"] < float("inf") for step in steps), "the gradient is not finite"
    return f"reward {steps[-1]['reward']:.2f}, {small_gap(steps)}"


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


RUNGS = {
    "tiny": Rung("a tiny run from start to report", "tiny.quickstart", TINY, small_gap),
    "tiny_broadcast": Rung(
        "weights by broadcast", "tiny.quickstart", (*TINY, "servers.weight_sync=broadcast"), small_gap, can_share=False
    ),
    "tiny_self": Rung(
        "teacher = student in process: KL is 0", "tiny.quickstart", (*TINY, "num_steps=1"), no_divergence
    ),
    "tiny_rl": Rung(
        "group-relative RL",
        "tiny_rl.grpo",
        (*TINY[:-1], "rollouts.rollouts_per_prompt=4", "rollouts.prompts_per_step=4"),
        reinforces,
    ),
    "tiny_resume": Rung("stopped after 2 steps, resumed to 4", "tiny.quickstart", (*TINY, "num_steps=2"), small_gap),
    "qwen": Rung(
        "0.6B from 4B, three steps, weights through the disk",
        "qwen3.b06_from_4b_1x8_128",
        (*QWEN, "servers.weight_sync=disk"),
        small_gap,
        needs_gpu=True,
    ),
    "qwen_broadcast": Rung(
        "the same with weights by broadcast",
        "qwen3.b06_from_4b_1x8_128",
        (*QWEN, "servers.weight_sync=broadcast"),
        small_gap,
        needs_gpu=True,
        can_share=False,
    ),
    "qwen_tp2": Rung(
        "the same on tp 2 with sequence parallelism",
        "qwen3.b06_from_4b_1x8_128",
        (*QWEN, "student.parallel.tp=2", "student.parallel.sequence_parallel=true"),
        small_gap,
        gpus=3,
        needs_gpu=True,
        can_share=False,
    ),
    "qwen_self": Rung(
        "0.6B from itself in process: KL is about 0",
        "qwen3.b06_from_4b_1x8_128",
        (*QWEN, "num_steps=1"),
        no_divergence,
        needs_gpu=True,
    ),
    "qwen_rl": Rung(
        "group-relative RL on 0.6B",
        "qwen3.b06_grpo_1x8_4096",
        (*QWEN, "rollouts.prompts_per_step=2", "curriculum.horizon_tokens=512"),
        reinforces,
        needs_gpu=True,
    ),
}
DEEP = "doctor"
"""The first rung: ``doctor --deep``, which is no run."""


def main() -> None:
    """Climb, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rungs", nargs="*", metavar="RUNG", help=f"of: {DEEP}, {', '.join(RUNGS)} (default: all)")
    parser.add_argument("--list", action="store_true", help="what each rung does and needs; starts nothing")
    parser.add_argument("--root", type=Path, default=Path("runs/gpu-check"), help="where the run folders go")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="more overrides, for every run"
    )
    options = parser.parse_args()
    unknown = [name for name in options.rungs if name not in (DEEP, *RUNGS)]
    if unknown:
        parser.error(f"no such rung: {', '.join(unknown)}")
    if options.list:
        print(f"  {DEEP:<16} megatron-distill doctor --deep; needs nothing")
        for name, rung in RUNGS.items():
            print(f"  {name:<16} {rung.what}; needs {_needs(rung)}")
        return
    gpus = len(visible_gpus())
    root = options.root / time.strftime("%Y%m%d-%H%M%S")
    results = []
    for name in options.rungs or (DEEP, *RUNGS):
        results.append(_climb(name, root, gpus, options.set))
        print(results[-1].line(), flush=True)
    print(f"\n  {'':8} {'rung':<16} {'seconds':>7} {'s/step':>7} {'tokens/s':>9}")
    print("\n".join(result.line() for result in results))
    print(f"\nrun folders: {root}")
    if failed := [result.name for result in results if result.state == "FAILED"]:
        sys.exit(f"gpu-check = {', '.join(failed)}: failed. Begin with {failed[0]}; docs/gpu.md says where to look.")


def _climb(name: str, root: Path, gpus: int, wished: Sequence[str]) -> Result:
    """One rung; whatever it fails by, the next one is climbed."""
    began = time.perf_counter()
    result = Result(name, "passed")
    try:
        missing = _missing(RUNGS[name], gpus, wished) if name in RUNGS else ""
        if missing:
            return Result(name, "skipped", text=f"needs {missing}")
        print(f"\n=== {name}: {RUNGS[name].what if name in RUNGS else 'doctor --deep'}", flush=True)
        if name == DEEP:
            model = config_of(RUNGS["qwen"], gpus, wished).student.path
            _command("doctor", "--deep", *(["--model", model] if gpus and Path(model).is_dir() else []))
            result.text = "see above"
        else:
            result.steps = _run(name, RUNGS[name], root, gpus, wished)
            result.text = RUNGS[name].verdict(result.steps)
    except (AssertionError, DistillError) as error:
        result.state, result.text = "FAILED", str(error)
    except KeyError as error:
        result.state, result.text = "FAILED", f"metrics.jsonl holds no {error}"
    result.seconds = time.perf_counter() - began
    return result


def _run(name: str, rung: Rung, root: Path, gpus: int, wished: Sequence[str]) -> Steps:
    """The rung's run, and its steps."""
    overrides = overrides_of(rung, gpus, wished)
    if name.endswith("_self"):
        overrides.append(
            f"teacher.path={_twin(Path(config_of(rung, gpus, wished).student.path), root / name / 'twin')}"
        )
    run_dir = root / name / "run"
    _command("train", rung.recipe, *overrides, "--run-dir", str(run_dir))
    if name.endswith("_resume"):
        _command("train", rung.recipe, *overrides, "num_steps=4", "--run-dir", str(run_dir))
    steps: Steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    wanted = 4 if name.endswith("_resume") else config_of(rung, gpus, wished).num_steps
    assert [step["step"] for step in steps] == list(range(1, wanted + 1)), "metrics.jsonl does not hold each step once"
    return steps


def overrides_of(rung: Rung, gpus: int, wished: Sequence[str]) -> list[str]:
    """Of the rung's recipe on a machine with so many GPUs; what the user wishes comes last."""
    dtype = ["student.dtype=bf16"] if gpus and not rung.needs_gpu else []
    return [*rung.overrides, *dtype, *(SHARED if gpus == 1 and rung.can_share else ()), *wished]


def config_of(rung: Rung, gpus: int, wished: Sequence[str]) -> RunConfig:
    """What the rung runs: places that were fetched are folders."""
    return hub.resolved(with_overrides(load_recipe(rung.recipe), overrides_of(rung, gpus, wished)))


def _twin(model: Path, target: Path) -> Path:
    """The same model in files of other bytes: a run refuses a teacher that is the student's own file."""
    if not target.exists():
        shutil.copytree(model, target)
        for path in target.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            save_file(tensors, path, metadata={"format": "pt", "copy": "gpu-check"})
    return target


def _command(*arguments: str) -> None:
    """Run a command of ours, its output shown."""
    code = subprocess.run([sys.executable, "-m", "megatron_distill.cli.main", *arguments], check=False).returncode
    assert code == 0, f"{arguments[0]} ended with code {code}: its message is above"


def _needs(rung: Rung) -> str:
    gpus = f"{rung.gpus} GPUs" + (", or 1 for both" if rung.can_share else "")
    return f"{gpus}, and megatron-distill fetch {rung.recipe}" if rung.needs_gpu else f"{gpus}, or none (CPU)"


def _missing(rung: Rung, gpus: int, wished: Sequence[str]) -> str:
    """What the rung needs and this machine has not; empty if nothing."""
    missing = []
    least = 1 if rung.can_share else rung.gpus
    if gpus < least and (gpus or rung.needs_gpu):
        missing.append(f"{least} GPU{'s' if least > 1 else ''}")
    if rung.needs_gpu:
        places = hub.places(config_of(rung, gpus, wished)).values()
        if absent := [text for text, _ in places if hub.hub_id(text)]:
            missing.append(f"{', '.join(absent)} (type: megatron-distill fetch {rung.recipe})")
    return ", ".join(missing)


if __name__ == "__main__":
    main()
