"""TRL's side of ``step.py``, run by TRL's own environment: a job's JSON in, seconds and lengths of each step out."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Clock(TrainerCallback):
    """Notes when each step ends, and how long its responses were."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self.steps.append({"step_s": now - self.last})
        self.last = now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "completions/mean_length" in logs:
            self.steps[-1]["mean_length"] = logs["completions/mean_length"]


def main() -> None:
    """Train."""
    job = json.loads(Path(sys.argv[1]).read_text())
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(job[role], dtype="float32") for role in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(job["student"])
    settings = DistillationConfig(
        output_dir=str(Path(job["out"]).parent / "trl"),
        per_device_train_batch_size=job["num_prompts"],
        gradient_accumulation_steps=1,
        max_steps=job["num_steps"],
        max_completion_length=job["horizon_tokens"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        beta=1.0,  # the reverse KL
        temperature=1.0,
        generation_kwargs={"eos_token_id": tokenizer.convert_tokens_to_ids(job["stop_tokens"])},
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = DistillationTrainer(
        student,
        teacher,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in job["prompts"]]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    clock.last = time.perf_counter()
    trainer.train()
    Path(job["out"]).write_text(json.dumps(clock.steps))


if __name__ == "__main__":
    main()
