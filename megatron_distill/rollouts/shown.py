"""What the student and the teacher really see of a problem, token by token, with the loss mask: ``megatron-distill show``.

In: a run's config and prompts. Out: text for a terminal, or plain text. The mask is read back from the tensors that training
makes of a sample, so what is shown as learnt is what the loss is taken over.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_distill.config import RunConfig
from megatron_distill.models.vocabulary import Vocabulary
from megatron_distill.rollouts.batches import pack_micro_batch
from megatron_distill.rollouts.prompts import PromptSet
from megatron_distill.rollouts.readable import whole_characters
from megatron_distill.rollouts.solutions import cut_solution, encode_solution
from megatron_distill.teacher import teacher_prompts
from megatron_distill.types import Rollout, Sample

# Two shades that alternate, so that each token is seen; special tokens stand out.
_SHADES = {False: ("\x1b[48;5;236m", "\x1b[48;5;239m"), True: ("\x1b[48;5;22m", "\x1b[48;5;28m")}
_SPECIAL, _BOLD, _END = "\x1b[1;95m", "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True)
class Style:
    """How tokens are written.

    Attributes:
        colour: for a terminal: tokens shaded, green where they are learnt. Otherwise they are divided by bars.
        one_a_line: each token on a line of its own, with its place and id.
        width: columns.
    """

    colour: bool
    one_a_line: bool
    width: int


def show_problems(config: RunConfig, train: PromptSet, vocabulary: Vocabulary, number: int, style: Style) -> str:
    """The first problems of a run, as its models see them.

    Args:
        config: of the run.
        train: its training problems.
        vocabulary: of both models.
        number: of problems, in the order in which the run comes to them.
        style: how tokens are written.
    """
    parts = [_overview(config, train, vocabulary, style)]
    for place in range(min(number, len(train.problems))):
        index = train.index_at(place, config.seed)
        parts.append(_problem(config, train, vocabulary, index, place, style))
    return "\n\n".join(parts)


def _overview(config: RunConfig, train: PromptSet, vocabulary: Vocabulary, style: Style) -> str:
    lengths = [len(prompt) for prompt in train.prompts]
    stops = ", ".join(f"{vocabulary.tokenizer.decode([i])!r} ({i})" for i in vocabulary.stop_token_ids)
    facts = {
        "problems": f"{len(lengths):,} of {', '.join(one.path for one in config.data.sources) or config.data.train_path}",
        "prompts": f"{min(lengths)} to {max(lengths)} tokens, median {statistics.median_low(lengths)}; "
        f"data.max_prompt_tokens = {config.data.max_prompt_tokens}",
        "responses": f"at most {_horizon(config)} tokens in step 1, ended by {stops}",
        **({"left out": "; ".join(train.notes)} if train.notes else {}),
        "learnt": "every token of a response, its stop token included; none of a prompt",
        **({"teacher": _what_it_says(config)} if config.distill.weight else {}),
    }
    return "\n".join(f"{_bold(f'{name:<10}', style)} {fact}" for name, fact in facts.items())


def _what_it_says(config: RunConfig) -> str:
    """What the loss gets to know of the teacher's distribution at each learnt token."""
    if config.teacher.in_trainer:
        return "says its whole distribution, beside the student"
    if config.teacher.sends_hidden_states:
        return "says its whole distribution: hidden states from its servers, its output layer beside the student"
    if ":" in config.teacher.transport:
        return f"says what {config.teacher.transport} says"
    return f"says its {config.teacher.num_logprobs} likeliest tokens, from its servers; teacher.tail = {config.teacher.tail}"


def _problem(config: RunConfig, train: PromptSet, vocabulary: Vocabulary, index: int, place: int, style: Style) -> str:
    problem, prompt = train.problems[index], train.prompts[index]
    step, place_in_step = divmod(place, config.rollouts.prompts_per_step)
    head = f"--- problem {place_in_step + 1} of step {step + 1}: id {problem.id!r}, answer {problem.answer!r}"
    lines = [_bold(head, style)]
    teachers = teacher_prompts(config, [problem], vocabulary.tokenizer) if config.needs_teacher else None
    lines.append(f"the student sees {_count(prompt)}{'; the teacher sees the same' if teachers is None else ''}:")
    lines += _tokens(prompt, [False] * len(prompt), vocabulary, style)
    for other in teachers or ():
        lines.append(f"the teacher sees {_count(other)}:")
        lines += _tokens(other, [False] * len(other), vocabulary, style)
    if problem.solution is None:
        lines.append(
            f"no solution in column {config.data.solution_key!r}: the response is the model's to write, and is learnt"
        )
        return "\n".join(lines)
    solution = encode_solution(problem, vocabulary.tokenizer, vocabulary.stop_token_ids[0])
    rollout = _as_rollout(index, prompt, solution, _horizon(config))
    mask = learnt_mask(rollout)
    response = mask[len(prompt) :]
    cut = f", cut from {len(solution)} by the horizon" if rollout.stop_reason == "length" else ""
    lines.append(
        f"a response, from the data's own solution: {_count(rollout.response_ids)}{cut}, of which {sum(response)} are learnt:"
    )
    lines += _tokens(rollout.response_ids, response, vocabulary, style)
    return "\n".join(lines)


def learnt_mask(rollout: Rollout) -> list[bool]:
    """Whether a loss is taken at each token of a prompt and its response, by the tensors that training makes of them."""
    batch = pack_micro_batch([Sample(rollout)], step=0, scored_in_trainer=True)
    mask = np.zeros(len(rollout.prompt_ids) + len(rollout.response_ids), bool)
    mask[batch.logits_index_T.numpy() + 1] = True  # the logits that predict a token sit one place before it
    return mask.tolist()


def _as_rollout(index: int, prompt: Sequence[int], solution: Sequence[int], horizon_tokens: int) -> Rollout:
    episode = cut_solution(solution, horizon_tokens)
    return Rollout(
        prompt_index=index,
        prompt_ids=list(prompt),
        response_ids=episode.response_ids,
        sampler_logprobs=episode.sampler_logprobs,
        author="data",
        oldest_version=0,
        newest_version=0,
        stop_reason=episode.stop_reason,
        is_learnt=episode.is_learnt,
    )


def _tokens(ids: Sequence[int], learnt: Sequence[bool], vocabulary: Vocabulary, style: Style) -> list[str]:
    """Lines that show every token, and which of them are learnt."""
    special = set(vocabulary.tokenizer.all_special_ids)
    cells: list[tuple[str, bool, bool]] = []  # text, learnt, special
    places: list[tuple[int, str]] = []  # of a cell's first token; the cell's ids
    start = 0
    for text, count in whole_characters(ids, vocabulary.tokenizer.decode):
        these = ids[start : start + count]
        cells.append((_visible(text), learnt[start], these[0] in special))
        places.append((start, " ".join(map(str, these))))
        start += count
    if style.one_a_line:
        rows = [
            f"  {place:>5}  {token_id:>7}  {'learnt' if learns else '-':<6}  {_cell(text, learns, is_special, number, style)}"
            for number, ((place, token_id), (text, learns, is_special)) in enumerate(zip(places, cells, strict=True))
        ]
        return [f"  {'place':>5}  {'id':>7}  {'loss':<6}  token", *rows]
    lines = []
    for is_learnt, group in itertools.groupby(cells, key=lambda cell: cell[1]):
        lines += _flow(list(group), is_learnt, style)
    return lines


def _flow(cells: Sequence[tuple[str, bool, bool]], is_learnt: bool, style: Style) -> list[str]:
    """Tokens side by side; a line ends where the text's does, or at the edge."""
    head = f"  {'learnt' if is_learnt else 'context':<8}"
    lines, used = [head], len(head)
    for number, (text, _, is_special) in enumerate(cells):
        shown = _cell(text, is_learnt, is_special, number, style)
        size = len(text) + (not style.colour)
        if used + size > style.width and used > len(head):
            lines.append(" " * len(head))
            used = len(head)
        lines[-1] += shown + ("" if style.colour else "|")
        used += size
        if text.endswith("\\n") and number < len(cells) - 1:
            lines.append(" " * len(head))
            used = len(head)
    return lines


def _cell(text: str, is_learnt: bool, is_special: bool, number: int, style: Style) -> str:
    if not style.colour:
        return text
    return f"{_SHADES[is_learnt][number % 2]}{_SPECIAL if is_special else ''}{text}{_END}"


def _visible(text: str) -> str:
    """Text on one line, in which nothing can move a terminal's cursor."""
    spelt = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return "".join(spelt.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in text)


def _count(ids: Sequence[int]) -> str:
    return f"{len(ids)} tokens"


def _horizon(config: RunConfig) -> int:
    return int(config.curriculum.fastest_schedule(config.num_steps).at(0))


def _bold(text: str, style: Style) -> str:
    return f"{_BOLD}{text}{_END}" if style.colour else text
