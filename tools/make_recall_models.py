r"""Makes the models of the recall task, their tokenizer and problem files in ``recipes/recall_models``: minutes on two cores.

    python tools/make_recall_models.py --out recipes/recall_models                   # all of it
    python tools/make_recall_models.py --out /tmp/recall --only student     # one model

In: ``megatron_distill.recipes.recall_task``. Out: Hugging Face directories, Qwen3 in shape, made by the loop of
``make_tiny_models.py``; ``train.jsonl``, ``heldout.jsonl``, ``hard.jsonl``; and ``measured.json``:

- the *teacher* knows every fact and hesitates, the more the longer it has; it ends with ``<|im_end|>``;
- the *teacher_flat* hesitates with the same chance each time: the control for the loop that feeds itself;
- the *student*, a quarter as large, is wrong about many facts and hardly hesitates; it ends with ``<|endoftext|>``;
- the *reader*, of the student's size, is as wrong about them by heart, and right with the facts before it: its own teacher.

A word is a token, so that a response's length is its number of words; 64 tokens in all.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from make_tiny_models import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    PAD,
    Role,
    accuracy_of,
    prompt_text,
    respond,
    save_model,
    trained_model,
    wrap_tokenizer,
)
from megatron_distill.recipes.recall_task import (
    FLAT_HAZARD,
    HARD_STEPS,
    NUM_VALUES,
    RIGHT,
    SEPARATORS,
    STUDENT_HAZARD,
    TABLES,
    TRAIN_SEED,
    WAIT,
    OpenBookProblem,
    OtherPageProblem,
    RecallProblem,
    Writer,
    confused_facts,
    facts,
    hard_problems,
    held_out_problems,
    sample_problems,
    write_jsonl,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

VOCAB_SIZE = 64
NUM_TRAIN_PROBLEMS = 1500
MEASURED_TOKENS = 160  # the cap under which models are measured, that of the long horizon
MAX_STREAK = 12

CONFUSED_FRAC, WRONG_FRAC, CONFUSED_SEED = 0.6, 0.75, 52
_FLAT = Writer(FLAT_HAZARD, {}, 0.0)
_STUDENT = Writer(STUDENT_HAZARD, confused_facts(CONFUSED_FRAC, CONFUSED_SEED), WRONG_FRAC)
_COPYIST = Writer(STUDENT_HAZARD, {}, 0.0)


def _read_or_recall(problem: RecallProblem, rng: random.Random) -> str:
    return (_COPYIST if isinstance(problem, OpenBookProblem) else _STUDENT).write(problem, rng)


TEACHER = Role("teacher", 96, 256, 2, 4, False, IM_END, RIGHT.write, 1100, 48, 4e-3, seed=21, initial_std=0.08)
TEACHER_FLAT = Role("teacher_flat", 96, 256, 2, 4, False, IM_END, _FLAT.write, 700, 48, 4e-3, seed=22, initial_std=0.08)
STUDENT = Role("student", 48, 96, 2, 2, True, END_OF_TEXT, _STUDENT.write, 900, 48, 4e-3, seed=23)
READER = Role("reader", 48, 96, 2, 2, True, END_OF_TEXT, _read_or_recall, 3000, 32, 4e-3, seed=24, initial_std=0.08)
ROLES = (TEACHER, TEACHER_FLAT, STUDENT, READER)


def make_tokenizer() -> Tokenizer:
    """A tokenizer of whole words, those of the task, and of words that it has no use for, up to ``VOCAB_SIZE``."""
    words = [END_OF_TEXT, IM_START, IM_END, PAD, "user", "assistant", "\\boxed{", "}", WAIT, *SEPARATORS, *TABLES]
    words += [str(value) for value in range(NUM_VALUES)]
    words += [f"unused_{place}" for place in range(VOCAB_SIZE - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=words[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END_OF_TEXT, IM_START, IM_END, PAD])
    return tokenizer


def problems_of(role: Role) -> Iterator[RecallProblem]:
    """What a model is pre-trained on: all levels; the reader has the book open for every second problem."""
    for number, problem in enumerate(sample_problems(role.seed, HARD_STEPS)):
        has_book = role is READER and number % 2 == 0
        yield open_book(problem) if has_book else problem


def open_book(problem: RecallProblem) -> OpenBookProblem:
    """The same problem with its facts before it."""
    return OpenBookProblem(problem.start, problem.tables)


def other_page(problem: RecallProblem) -> OtherPageProblem:
    """The same problem with other facts before it: what the page alone does, whatever it says."""
    return OtherPageProblem(problem.start, problem.tables)


@torch.no_grad()
def measure_hazard(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """Mean P(wait) after 0, 1, ... ``MAX_STREAK`` hesitations at one look-up of right solutions of 64 held-out problems."""
    model.eval()
    rng = random.Random(0)
    wait = tokenizer.convert_tokens_to_ids(WAIT)
    sums = [0.0] * (MAX_STREAK + 1)
    for problem in held_out_problems()[:64]:
        place, value, words = rng.randrange(len(problem.tables)), problem.start, []
        for table in problem.tables[:place]:
            asked, value = [str(value), table], facts()[table, value]
            words += [*asked, str(value), ";"]
        asked = [str(value), problem.tables[place]]
        text = " ".join([prompt_text(problem), *words, *asked, *[WAIT, *asked] * MAX_STREAK])
        ids = tokenizer.encode(text, add_special_tokens=False)
        probabilities = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)[:, wait]
        for streak in range(MAX_STREAK + 1):  # the position of the look-up's last word after so many
            sums[streak] += probabilities[len(ids) - 1 - 3 * (MAX_STREAK - streak)].item()
    return [round(total / 64, 3) for total in sums]


def measure(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, reads: bool = False) -> dict[str, Any]:
    """What a model does on held-out problems by itself, at temperature 1, and with the book if it reads; how it hesitates."""
    stops = tokenizer.convert_tokens_to_ids([END_OF_TEXT, IM_END])
    numbers: dict[str, Any] = {}
    levels: dict[str, tuple[RecallProblem, ...]] = {"held out": held_out_problems(), "hard": hard_problems()}
    if reads:
        plain = dict(levels)
        levels |= {f"{level}, open book": tuple(map(open_book, problems)) for level, problems in plain.items()}
        levels |= {f"{level}, another page": tuple(map(other_page, problems)) for level, problems in plain.items()}
    for level, problems in levels.items():
        responses = respond(model, tokenizer, problems, sample=True, max_new_tokens=MEASURED_TOKENS)
        numbers[level] = {
            "accuracy": round(accuracy_of(tokenizer, problems, responses), 3),
            "response_tokens": round(sum(map(len, responses)) / len(responses), 1),
            "truncated_frac": round(sum(ids[-1] not in stops for ids in responses) / len(responses), 3),
        }
    return numbers | {"hazard": measure_hazard(model, tokenizer)}


def make_model(role: Role, tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    """Pre-trains one model, measures it, and saves it under ``out``."""
    wrapped = wrap_tokenizer(tokenizer, role.stop_token)
    model = trained_model(role, wrapped, tokenizer, problems_of(role))
    measured = measure(model, wrapped, reads=role is READER)
    print(f"{role.name}: {measured}", flush=True)
    save_model(role, model, wrapped, out)
    return measured


def main() -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write the models and *.jsonl to")
    parser.add_argument("--only", choices=[role.name for role in ROLES], help="make one model instead of all")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "train.jsonl", list(islice(sample_problems(TRAIN_SEED), NUM_TRAIN_PROBLEMS)), seed=TRAIN_SEED)
    write_jsonl(out / "heldout.jsonl", list(held_out_problems()), seed=TRAIN_SEED)
    write_jsonl(out / "hard.jsonl", list(hard_problems()), seed=TRAIN_SEED)
    path = out / "measured.json"
    for role in ROLES:
        if arguments.only in (None, role.name):
            numbers = make_model(role, make_tokenizer(), out)
            measured = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(measured | {role.name: numbers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
