r"""Makes the tiny teacher, the tiny student, their tokenizer and problem files in ``recipes/tiny_models``.

    python tools/make_tiny_models.py --out recipes/tiny_models          # all of it
    python tools/make_tiny_models.py --out /tmp/tiny --only student     # one model, with the same tokenizer

In: ``megatron_distill.recipes.tiny_task`` (problems and solutions in sampled wording). Out: two Hugging Face directories that
``AutoModelForCausalLM``, SGLang and our converter load, and ``train.jsonl``, ``heldout.jsonl``. Both models are Qwen3 in
shape and are pre-trained here from scratch, deterministically, by a plain torch loop:

- the *teacher* (untied embeddings, like Qwen3-8B) learns from right solutions and ends with ``<|im_end|>``;
- the *student* (half as wide, half as deep, tied embeddings, like Qwen3-0.6B) learns, for less long, from solutions in
  which a share of the steps is wrong, and ends with ``<|endoftext|>``, as base models do. It is undertrained rather
  than incapable: it makes mistakes at temperature 1 that a good teacher can teach it not to make.

Held-out problems are never trained on. The held-out accuracies are printed and stored in ``accuracy.json``. What does not
depend on the task is used by ``make_recall_models.py`` too.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron_distill.recipes.tiny_task import (
    TRAIN_SEED,
    held_out_problems,
    sample_problems,
    write_jsonl,
    write_solution,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_distill.rewards.math_verifier import last_boxed

VOCAB_SIZE = 384
CONTEXT_TOKENS = 512
NUM_TRAIN_PROBLEMS = 600
END_OF_TEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
STOP_TOKENS = [IM_END, END_OF_TEXT]
IGNORED_LABEL = -100  # transformers' convention for positions without a loss

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Problem(Protocol):
    """A task's problem, as far as pre-training must know it."""

    @property
    def answer(self) -> int: ...

    def prompt(self) -> str: ...


@dataclass(frozen=True)
class Role:
    """What sets one of the models apart: its shape, its stop token, who writes its corpus, its schedule."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    tie_embeddings: bool
    stop_token: str
    write: Callable[[Any, random.Random], str]
    num_steps: int
    batch_size: int
    peak_lr: float
    seed: int
    initial_std: float = 0.02


TEACHER = Role("teacher", 128, 256, 4, 4, False, IM_END, write_solution, 2200, 16, 3e-3, seed=11)
STUDENT = Role(
    "student", 64, 192, 2, 2, True, END_OF_TEXT, partial(write_solution, error_rate_frac=0.15), 2500, 16, 4e-3, seed=12
)


def train_tokenizer() -> Tokenizer:
    """Trains a byte-level BPE tokenizer of exactly ``VOCAB_SIZE`` tokens; digits stay single, as in Qwen3."""
    rng = random.Random(0)
    texts = [f"user\n{p.prompt()}\nassistant\n{write_solution(p, rng)}" for p in islice(sample_problems(0), 2000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, IM_START, IM_END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the corpus yields {tokenizer.get_vocab_size()} tokens; lower VOCAB_SIZE = {VOCAB_SIZE}")
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer, stop_token: str) -> PreTrainedTokenizerFast:
    """The tokenizer as ``AutoTokenizer`` would load it, with the role's own end-of-sequence token."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=stop_token,
        pad_token=PAD,
        additional_special_tokens=[IM_START, IM_END, END_OF_TEXT],
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model(role: Role, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Build a freshly initialised model; every dimension divides by 2, so that tensor parallelism of 2 works."""
    torch.manual_seed(role.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=role.hidden_size,
        intermediate_size=role.intermediate_size,
        num_hidden_layers=role.num_layers,
        num_attention_heads=role.num_heads,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_theta=10000.0,
        tie_word_embeddings=role.tie_embeddings,
        initializer_range=role.initial_std,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(role.stop_token),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    return Qwen3ForCausalLM(config).float()


def prompt_text(problem: Problem) -> str:
    return f"{IM_START}user\n{problem.prompt()}{IM_END}\n{IM_START}assistant\n"


Example = tuple[list[int], int]  # token ids, and how many of them are the prompt


def encode_examples(role: Role, tokenizer: Tokenizer, problems: Iterator[Problem]) -> Iterator[Example]:
    """Yields a training example for each problem: prompt, solution, stop token."""
    rng = random.Random(role.seed)
    for problem in problems:
        prompt_ids = tokenizer.encode(prompt_text(problem)).ids
        solution = role.write(problem, rng)
        yield prompt_ids + tokenizer.encode(solution + role.stop_token).ids, len(prompt_ids)


def batches(examples: Iterator[Example], batch_size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Groups examples of similar length, so that padding costs little.

    Yields:
        input ids and labels, both int64 [batch_size, longest]; labels ignore the padding, and the prompt too.
    """
    rng = random.Random(seed)
    while True:
        pool = sorted(islice(examples, 32 * batch_size), key=lambda example: len(example[0]))
        groups = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            input_ids = torch.zeros(len(group), longest, dtype=torch.long)
            labels = torch.full((len(group), longest), IGNORED_LABEL)
            for row, (ids, num_prompt) in enumerate(group):
                input_ids[row, : len(ids)] = torch.tensor(ids)
                labels[row, num_prompt : len(ids)] = torch.tensor(ids[num_prompt:])
            yield input_ids, labels


def pretrain(role: Role, model: Qwen3ForCausalLM, tokenizer: Tokenizer, problems: Iterator[Problem]) -> None:
    """Trains on solutions of ``problems`` with AdamW, 2% warm-up and a cosine decay to zero; prints a line every 100 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=role.peak_lr, betas=(0.9, 0.95), weight_decay=0.01)
    stream = batches(encode_examples(role, tokenizer, problems), role.batch_size, role.seed)
    model.train()
    started, warmup = time.monotonic(), max(1, role.num_steps // 50)
    for step in range(role.num_steps):
        scale = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / role.num_steps)))
        for group in optimizer.param_groups:
            group["lr"] = role.peak_lr * scale
        input_ids, labels = next(stream)
        # Right padding under a causal mask is never attended to by a position that has a loss.
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == role.num_steps - 1:
            elapsed = time.monotonic() - started
            eta = elapsed / (step + 1) * (role.num_steps - step - 1)
            print(
                f"{role.name} step {step:5d}/{role.num_steps} loss {loss.item():.4f} nats eta {eta:.0f} s", flush=True
            )


@torch.no_grad()
def respond(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    sample: bool,
    max_new_tokens: int,
) -> list[list[int]]:
    """A response's token ids to each problem, at temperature 1 if ``sample``, else greedy; no stop token where cut."""
    model.eval()
    torch.manual_seed(0)
    tokenizer.padding_side = "left"
    batch = tokenizer([prompt_text(p) for p in problems], return_tensors="pt", padding=True, add_special_tokens=False)
    stops = tokenizer.convert_tokens_to_ids(STOP_TOKENS)
    generated = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        **({"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}),
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    responses = generated[:, batch["input_ids"].shape[1] :].tolist()
    ends = [next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids)) for ids in responses]
    return [ids[:end] for ids, end in zip(responses, ends, strict=True)]


def accuracy_of(
    tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], responses: Sequence[list[int]]
) -> float:
    """The share of responses whose last box holds the answer."""
    boxes = [last_boxed(text) for text in tokenizer.batch_decode(list(responses), skip_special_tokens=True)]
    return sum(box is not None and box.strip() == str(p.answer) for box, p in zip(boxes, problems, strict=True)) / len(
        problems
    )


def measure_accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], sample: bool
) -> float:
    """The share of responses, of up to 220 tokens, that end in the right box."""
    return accuracy_of(tokenizer, problems, respond(model, tokenizer, problems, sample, max_new_tokens=220))


def make_model(role: Role, tokenizer: Tokenizer, out: Path, held_out: Sequence[Problem]) -> dict[str, float]:
    """Pre-trains one model, measures it, and saves it under ``out``."""
    wrapped = wrap_tokenizer(tokenizer, role.stop_token)
    model = trained_model(role, wrapped, tokenizer, sample_problems(role.seed))
    accuracy = {
        "greedy": measure_accuracy(model, wrapped, held_out, sample=False),
        "temperature_1": measure_accuracy(model, wrapped, held_out, sample=True),
    }
    print(f"{role.name}: held-out accuracy {accuracy}", flush=True)
    save_model(role, model, wrapped, out)
    return accuracy


def trained_model(
    role: Role, wrapped: PreTrainedTokenizerFast, tokenizer: Tokenizer, problems: Iterator[Problem]
) -> Qwen3ForCausalLM:
    """Pre-trains one model and rounds it to bfloat16, as it will be saved."""
    model = build_model(role, wrapped)
    print(f"{role.name}: {model.num_parameters():,} parameters", flush=True)
    pretrain(role, model, tokenizer, problems)
    return model.bfloat16().float()


def save_model(role: Role, model: Qwen3ForCausalLM, wrapped: PreTrainedTokenizerFast, out: Path) -> None:
    """Saves weights, config and tokenizer as a Hugging Face directory ``out/NAME``."""
    # As published: a base model ends with its own token alone, a chat model with its own or the base model's.
    ends = wrapped.convert_tokens_to_ids(
        sorted({role.stop_token, END_OF_TEXT}, key=lambda token: token != role.stop_token)
    )
    model.generation_config = GenerationConfig(
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=wrapped.pad_token_id,
        do_sample=True,
        temperature=1.0,
    )
    model.bfloat16().save_pretrained(out / role.name)
    wrapped.save_pretrained(out / role.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write teacher/, student/ and *.jsonl to")
    parser.add_argument("--only", choices=["teacher", "student"], help="make one model instead of both")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer()
    write_jsonl(out / "train.jsonl", list(islice(sample_problems(TRAIN_SEED), NUM_TRAIN_PROBLEMS)), seed=TRAIN_SEED)
    held_out = list(held_out_problems())
    write_jsonl(out / "heldout.jsonl", held_out, seed=TRAIN_SEED)
    accuracy_path = out / "accuracy.json"
    accuracies = json.loads(accuracy_path.read_text()) if accuracy_path.exists() else {}
    for role in (TEACHER, STUDENT):
        if arguments.only in (None, role.name):
            accuracies[role.name] = make_model(role, tokenizer, out, held_out)
    accuracy_path.write_text(json.dumps(accuracies, indent=2) + "\n")


if __name__ == "__main__":
    main()
