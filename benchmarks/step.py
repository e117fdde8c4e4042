"""A whole step of on-policy distillation against TRL's ``DistillationTrainer``, on a CPU, ratios from one run.

    python benchmarks/step.py                  the tiny pair of the quickstart, and a pair of about 100M random parameters
    python benchmarks/step.py --pairs tiny     minutes
    python benchmarks/step.py --json out.json  the rows

Both sides get the same models, prompts, batch and longest response, the reverse KL, fp32, no dropout and no checkpointing of
activations; each draws with its own engine and its own random numbers. TRL scores over the whole vocabulary in its one
process, we ask a served teacher for its top 64. TRL lives in an environment of its own below ``.cache/``, made at the first
run (``uv``, from the package registry), with the torch and transformers of this one; it uses all cores. Run it on an idle
machine: our servers and trainer are several processes, and feel every neighbour.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_distill.recipes import tiny

from megatron_distill import config as config_module
from megatron_distill.config.loading import load_recipe
from megatron_distill.rollouts.prompts import load_training_set
from megatron_distill.runs.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
TRL = "1.16.0"
ENVIRONMENT = ROOT / ".cache" / f"trl-{TRL}"
WARM_UP = 2
STALENESS = (0, 1, 2)


@dataclass(frozen=True)
class Pair:
    """What both sides run.

    Attributes:
        student: Hugging Face directory.
        teacher: the same.
        num_prompts: of a step, one response each.
        horizon_tokens: of the longest response.
        num_steps: measured and warm-up.
        cpu_threads: of each of our processes; 0 is its share of the cores.
    """

    student: Path
    teacher: Path
    num_prompts: int
    horizon_tokens: int
    num_steps: int
    cpu_threads: int


@dataclass(frozen=True)
class Row:
    """Medians over the steps after the warm-up.

    Attributes:
        pair: its name.
        who: "TRL", or ours and its staleness.
        step_s: seconds a step.
        tokens: of all responses of a step.
        parts: seconds of the phases of ours.
    """

    pair: str
    who: str
    step_s: float
    tokens: float
    parts: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        """Response tokens drawn, scored and trained on in a second."""
        return self.tokens / self.step_s


# --- the pairs --------------------------------------------------------------------------------------------------------


def pair_of(name: str, folder: Path, num_steps: int) -> Pair:
    """A pair by name; the large one is made in ``folder``."""
    if name == "tiny":
        return Pair(tiny.MODELS / "student", tiny.MODELS / "teacher", 64, 160, num_steps, cpu_threads=1)
    student, teacher = folder / "student", folder / "teacher"
    for directory, layers, seed in ((student, 12, 1), (teacher, 14, 2)):
        _make_large(directory, layers, seed)
    return Pair(student, teacher, 16, 48, num_steps, cpu_threads=0)


def _make_large(directory: Path, num_layers: int, seed: int) -> None:
    """About 110M parameters of random weights, under the tiny pair's tokenizer: most token ids are no text."""
    import torch
    import transformers

    torch.manual_seed(seed)
    known = transformers.AutoConfig.from_pretrained(tiny.MODELS / "student")
    size = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": num_layers, "vocab_size": 32768}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
    facts = {name: value for name, value in known.to_dict().items() if name not in ("layer_types", "dtype")}
    shaped = transformers.AutoConfig.for_model(**(facts | size | heads | {"tie_word_embeddings": True}))
    transformers.AutoModelForCausalLM.from_config(shaped).save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(tiny.MODELS / "student").save_pretrained(directory)


# --- ours -------------------------------------------------------------------------------------------------------------


def overrides_of(pair: Pair, staleness: int) -> list[str]:
    """Of ``tiny.quickstart``."""
    return [
        f"student.path={pair.student}",
        f"teacher.path={pair.teacher}",
        "student.parallel.tp=1",
        f"num_steps={pair.num_steps}",
        f"cpu_threads={pair.cpu_threads}",
        f"rollouts.prompts_per_step={pair.num_prompts}",
        f"rollouts.max_staleness_steps={staleness}",
        f"micro_batch_rollouts={pair.num_prompts}",
        f"curriculum.horizon_tokens={pair.horizon_tokens}",
        "distill.reverse_kl_weight=1",
        "evaluation.num_problems=1",
        "evaluation.samples_per_problem=1",
        "evaluation.entropy_problems=1",
        f"evaluation.max_response_tokens={pair.horizon_tokens}",
    ]


def ours(name: str, pair: Pair, staleness: int, folder: Path) -> Row:
    """One run of the whole program."""
    run_dir = folder / f"run-{staleness}"
    command = [sys.executable, "-m", "megatron_distill.cli.main", "train", "tiny.quickstart", "--run-dir", str(run_dir)]
    done = subprocess.run([*command, *overrides_of(pair, staleness)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    steps = RunFolder(run_dir).steps()[WARM_UP:-1]  # the last one is followed by an evaluation
    parts = {key: statistics.median(one[key] for one in steps) for key in ("rollout_s", "score_s", "train_s", "sync_s")}
    tokens = statistics.mean(one["response_tokens"] for one in steps) * pair.num_prompts
    step_s = statistics.median(one["step_s"] for one in steps)
    return Row(name, f"ours, staleness {staleness}", step_s, tokens, parts)


# --- TRL --------------------------------------------------------------------------------------------------------------


def make_environment() -> Path:
    """TRL's interpreter, with this one's torch and transformers."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "ready").exists():
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "-q", "--clear", "--python", sys.executable, str(ENVIRONMENT)], check=True)
        pins = [f"{package}=={version(package)}" for package in ("torch", "transformers")]
        subprocess.run([*uv, "pip", "install", "-q", "--python", str(python), f"trl=={TRL}", *pins], check=True)
        (ENVIRONMENT / "ready").touch()
    return python


def trl(name: str, pair: Pair, folder: Path) -> Row:
    """One run of its trainer on the prompts that our first steps have."""
    config = config_module.with_overrides(load_recipe("tiny.quickstart"), overrides_of(pair, 0))
    job = {
        "student": str(pair.student),
        "teacher": str(pair.teacher),
        "prompts": list(_prompts(config, pair)),
        "num_prompts": pair.num_prompts,
        "horizon_tokens": pair.horizon_tokens,
        "num_steps": pair.num_steps,
        "learning_rate": config.optimizer.lr,
        "stop_tokens": list(config.rollouts.stop_tokens),
        "out": str(folder / "trl.json"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("step_trl.py")
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [str(make_environment()), str(script), str(folder / "job.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=environment | {"HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    steps: list[dict[str, float]] = json.loads((folder / "trl.json").read_text())[WARM_UP:]
    tokens = statistics.mean(one["mean_length"] for one in steps) * pair.num_prompts
    return Row(name, "TRL", statistics.median(one["step_s"] for one in steps), tokens, {})


def _prompts(config: config_module.RunConfig, pair: Pair) -> Iterator[list[dict[str, str]]]:
    from megatron_distill.models.vocabulary import load_vocabulary

    tokenizer = load_vocabulary(config.student.path, config.teacher.path, config.rollouts.stop_tokens).tokenizer
    train = load_training_set(config.data, tokenizer)
    for place in range(pair.num_prompts * pair.num_steps):
        problem = train.problems[train.index_at(place, config.seed)]
        yield [{"role": message.role, "content": message.content} for message in problem.messages]


# --- the whole --------------------------------------------------------------------------------------------------------


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=("tiny", "large"), default=["tiny", "large"])
    parser.add_argument("--steps", type=int, default=12, help=f"of each run, {WARM_UP} of them warm-up")
    parser.add_argument("--staleness", nargs="+", type=int, default=STALENESS, help="of ours")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args()
    rows: list[Row] = []
    print("| pair | who | step, s | tokens a step | tokens/s | against TRL | write | score | train | sync |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in options.pairs:
        with tempfile.TemporaryDirectory() as root:
            pair = pair_of(name, Path(root), options.steps)
            reference = trl(name, pair, Path(root))
            for row in (reference, *(ours(name, pair, staleness, Path(root)) for staleness in options.staleness)):
                rows.append(row)
                print(_line(row, reference), flush=True)
    if options.json:
        records: list[dict[str, Any]] = [asdict(row) for row in rows]
        options.json.write_text("".join(json.dumps(record) + "\n" for record in records))


def _line(row: Row, reference: Row) -> str:
    parts = [f"{row.parts[key]:.2f}" if row.parts else "" for key in ("rollout_s", "score_s", "train_s", "sync_s")]
    ratio = row.tokens_per_s / reference.tokens_per_s
    facts = [
        row.pair,
        row.who,
        f"{row.step_s:.2f}",
        f"{row.tokens:.0f}",
        f"{row.tokens_per_s:.0f}",
        f"{ratio:.2f}",
        *parts,
    ]
    return f"| {' | '.join(facts)} |"


if __name__ == "__main__":
    main()
