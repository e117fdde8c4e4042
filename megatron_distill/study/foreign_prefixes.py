r"""How reliable a teacher is where a student has been: its accuracy when it continues a student's response, by position.

    python -m megatron_distill.study.foreign_prefixes RUN/eval/step_000200.json --teacher DIR --problems heldout.jsonl

In: an evaluation of a student, as runs leave them in ``eval/``; the teacher; the problems that were answered. Each response is
cut after a share of its words, before any answer of its own, and the teacher goes on from there at temperature 1. Out: one line
a share, and ``continued-EVALUATION.json`` beside it. A share of 0 is the teacher by itself. What it loses from there
on is how far its advice can be trusted on what the student writes, which is all that on-policy distillation asks it about.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_distill.errors import DataError
from megatron_distill.evaluate.command import evaluate_model
from megatron_distill.rollouts.prompts import encode_prompt
from megatron_distill.runs.run_folder import read_json, write_json
from megatron_distill.types import Problem

SHARES = (0.0, 0.25, 0.5, 0.75)
_BOX = "\\boxed"


def with_prefix(tokenizer: Any, problem: Problem) -> list[int]:
    """The prompt, and what the student wrote of its response: where the teacher goes on. A ``data.prompt_builder``."""
    return encode_prompt(tokenizer, problem) + list(
        tokenizer.encode(problem.columns["prefix"], add_special_tokens=False)
    )


def cut(response: str, share: float) -> str:
    """The first ``share`` of a response's words, and nothing of its boxed answer.

    >>> cut("3 A 5 ; 5 B 7 ; done", 0.5)
    '3 A 5 ;'
    """
    words = response.split()
    return " ".join(words[: round(share * len(words))]).split(_BOX)[0].rstrip()


def records_of(
    responses: Sequence[Mapping[str, Any]], problems: Mapping[str, Mapping[str, Any]], shares: Sequence[float]
) -> list[dict[str, Any]]:
    """A problem for each response and share: the record of ``problems``, with the student's words beside it.

    Args:
        responses: of an evaluation: "id" and "response".
        problems: records by id.
        shares: of each response, in [0, 1].

    Raises:
        DataError: a response to a problem that is not among them.
    """
    if unknown := sorted({one["id"] for one in responses} - problems.keys()):
        raise DataError(
            f"--problems: hold no {unknown[0]!r}, to which the evaluation has a response. Name the file that it was made with."
        )
    return [
        {**problems[one["id"]], "id": f"{place}@{share}", "prefix": cut(one["response"], share)}
        for place, one in enumerate(responses)
        for share in shares
    ]


def accuracy_by_share(responses: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """{share: accuracy} of the continuations, in the order in which they were asked for."""
    judged: dict[str, list[bool]] = defaultdict(list)
    for one in responses:
        judged[one["id"].partition("@")[2]].append(bool(one["correct"]))
    return {share: sum(right) / len(right) for share, right in judged.items()}


def measure(evaluation: Path, teacher: Path, problems: Path, num_responses: int, max_tokens: int) -> dict[str, float]:
    """Let the teacher continue, through its own server.

    Args:
        evaluation: of the student, JSON.
        teacher: Hugging Face directory.
        problems: .jsonl with the fields id, prompt and answer.
        num_responses: of the evaluation, from the first on.
        max_tokens: cap on each continuation.

    Returns:
        {share of the response that was given: the teacher's accuracy from there}.
    """
    records = {one["id"]: one for one in map(json.loads, problems.read_text(encoding="utf-8").splitlines())}
    asked = records_of(read_json(evaluation)["responses"][:num_responses], records, SHARES)
    # A name that no reader takes for one of the student's evaluations.
    continued = evaluation.with_name(f"continued-{evaluation.stem}.json")
    to_continue = continued.with_suffix(".jsonl")
    to_continue.write_text("".join(json.dumps(one) + "\n" for one in asked), encoding="utf-8")
    settings = (
        f"data.prompt_builder={__file__}:with_prefix",
        "data.max_prompt_tokens=1000000000",
        f"evaluation.num_problems={len(asked)}",
        "evaluation.samples_per_problem=1",
        "evaluation.temperature=1",
        "evaluation.top_p=1",
        "evaluation.top_k=-1",
        f"evaluation.max_response_tokens={max_tokens}",
    )
    evaluate_model(str(teacher), str(to_continue), continued, settings)
    to_continue.unlink()
    written = read_json(continued)
    by_share = accuracy_by_share(written["responses"])
    write_json(continued, written | {"summary": written["summary"] | {"accuracy_by_share": by_share}})
    return by_share


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="JSON of a student's evaluation, in a run's eval/")
    parser.add_argument("--teacher", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--problems", type=Path, required=True, help="the .jsonl that the student was evaluated on")
    parser.add_argument("--num-responses", type=int, default=128, help="that are continued, from the first on")
    parser.add_argument("--max-tokens", type=int, default=160, help="cap on each continuation")
    options = parser.parse_args(arguments)
    by_share = measure(options.evaluation, options.teacher, options.problems, options.num_responses, options.max_tokens)
    for share, accuracy in by_share.items():
        print(f"after {float(share):4.0%} of the student's words the teacher is right {accuracy:.2f} of the time")


if __name__ == "__main__":
    main()
