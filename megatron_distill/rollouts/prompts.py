r"""Prompts: what a model sees of a problem, as token ids, up to where its response begins.

In: the places of problems, a tokenizer. Out: a ``PromptSet``. The order in which a run visits it is a function of its seed: see
``rollouts.order``.

    train = load_training_set(config.data, tokenizer)
    heldout = load_prompt_set("heldout.jsonl", config.data, tokenizer)
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import itertools
import re
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, overload

from megatron_distill.config import DataConfig
from megatron_distill.config.loading import load_function
from megatron_distill.errors import DataError, DistillError
from megatron_distill.rollouts.order import mixed_problem_at, problem_at
from megatron_distill.rollouts.problems import DistinctIds, Source, Tally, check_not_empty, read_problems, source_of
from megatron_distill.rollouts.records import BadRow, shown
from megatron_distill.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENCODED_AT_ONCE = 256
_TOLD_EVERY_S = 5.0  # progress of a load; a short one says nothing


class PromptBuilder(Protocol):
    """Turns a problem into what the model sees, up to where its response begins: ``data.prompt_builder`` names one."""

    def __call__(self, tokenizer: PreTrainedTokenizerBase, problem: Problem, /) -> list[int]:
        """Token ids [P] of the prompt."""


_Build = Callable[["PreTrainedTokenizerBase", Sequence[Problem]], "list[list[int] | BadRow]"]
"""Prompts of problems, or why there is none, in order."""


class PackedLists(Sequence[list[int]]):
    """Lists of token ids, end to end in one array of 32-bit numbers: a million prompts take no more room than their ids."""

    def __init__(self) -> None:
        """Hold none."""
        self._ids, self._ends = array("i"), array("q", [0])

    def append(self, ids: Sequence[int]) -> None:
        """Add a list."""
        self._ids.extend(ids)
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        return self._ids[self._ends[place] : self._ends[place + 1]].tolist()

    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [end - first for first, end in zip(self._ends, self._ends[1:], strict=False)]


@dataclass(frozen=True)
class PromptSet:
    """Problems, and what the model sees of them.

    Attributes:
        problems: in file order, one source after the other.
        prompts: token ids [P] of each.
        sizes: problems of each source; empty for one.
        shares: how often each source's problems come; empty if by their number.
        notes: what was left out of each source, for people.
    """

    problems: Sequence[Problem]
    prompts: Sequence[list[int]]
    sizes: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    def index_at(self, position: int, seed: int) -> int:
        """The problem at a place of the endless stream that a run with this seed visits."""
        if self.shares:
            return mixed_problem_at(position, self.sizes, self.shares, seed)
        return problem_at(position, len(self.problems), seed)


def load_training_set(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """Read a run's training problems, of one source or several, and encode their prompts.

    Raises:
        DataError: something cannot be read or encoded, or a row is refused.
    """
    sources = [source_of(data, one.path, one) for one in data.sources] or [source_of(data, data.train_path)]
    shares = tuple(one.share for one in data.sources if one.share is not None)
    return _load(sources, shares, data, tokenizer)


def load_prompt_set(path: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """Read the problems of one place and encode their prompts as ``data`` says: the one way for a run, its checks and ``eval``.

    Raises:
        DataError: something cannot be read or encoded, or a row is refused.
    """
    return _load([source_of(data, path)], (), data, tokenizer)


def _load(
    sources: Sequence[Source], shares: tuple[float, ...], data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> PromptSet:
    problems: list[Problem] = []
    prompts, sizes, notes, ids = PackedLists(), [], [], DistinctIds()
    if data.prompt_builder == "chat":
        _check_template_options(tokenizer, data.template_options)
    build = _builder(data)
    for source in sources:
        tally, before = Tally(), len(problems)
        read = _with_progress(read_problems(source, data.on_bad_rows, tally), tally)
        for problem, prompt in _encoded(read, build, tokenizer):
            if isinstance(prompt, BadRow) and data.on_bad_rows == "stop":
                raise prompt.refused(after_good_ones=len(problems) > before)
            if isinstance(prompt, BadRow):
                tally.left_out[prompt.reason] += 1
            elif len(prompt) > data.max_prompt_tokens and data.on_bad_rows == "drop":
                tally.left_out[f"prompt longer than {data.max_prompt_tokens} tokens"] += 1
            else:
                problems.append(ids.give(problem))
                prompts.append(prompt)
        check_not_empty(problems[before:], tally)
        sizes.append(len(problems) - before)
        if told := tally.told():
            notes.append(told)
    _check_different(problems, prompts, data)
    return PromptSet(problems, prompts, tuple(sizes), shares, tuple(notes))


def _encoded(
    problems: Iterator[Problem], build: _Build, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Problem, list[int] | BadRow]]:
    """Each problem with its prompt, or why it has none; many at once, which a tokenizer does several times faster."""
    while chunk := list(itertools.islice(problems, _ENCODED_AT_ONCE)):
        yield from zip(chunk, build(tokenizer, chunk), strict=True)


def _with_progress(problems: Iterator[Problem], tally: Tally) -> Iterator[Problem]:
    """The same problems; a load of many seconds says how far it is."""
    began = told = time.monotonic()
    for problem in problems:
        yield problem
        if tally.num_read % 1000 == 0 and (now := time.monotonic()) - told > _TOLD_EVERY_S:
            rate = tally.num_read / (now - began)
            print(f"reading {tally.where}: {tally.num_read:,} rows, {rate:,.0f} a second", file=sys.stderr, flush=True)
            told = now


def _builder(data: DataConfig) -> _Build:
    """What turns problems into prompts, held to its word, with the assistant's prefix."""
    built_in: dict[str, PromptBuilder] = {
        "chat": functools.partial(encode_prompt, template_options=data.template_options)
    }
    users = load_function(data.prompt_builder, built_in, "data.prompt_builder", ("tokenizer", "problem"))

    def one(tokenizer: PreTrainedTokenizerBase, problem: Problem, ids: list[int] | None) -> list[int] | BadRow:
        try:
            ids = users(tokenizer, problem) if ids is None else ids
            _check_prompt(ids, problem, data)
        except BadRow as row:
            return row
        except DistillError:
            raise
        except Exception as error:
            raise DataError(
                f"data.prompt_builder = {data.prompt_builder}: raised {type(error).__name__}: {error}, at problem "
                f"{problem.id!r}. Mend the function."
            ) from error
        if data.assistant_prefix:
            ids = [*ids, *tokenizer.encode(data.assistant_prefix, add_special_tokens=False)]
        return ids

    def build(tokenizer: PreTrainedTokenizerBase, chunk: Sequence[Problem]) -> list[list[int] | BadRow]:
        together: Sequence[list[int] | None] = [None] * len(chunk)
        if data.prompt_builder == "chat" and len(chunk) > 1:
            # A template that fails does so for all of them: each is then asked by itself, to tell which.
            with contextlib.suppress(Exception):
                together = encode_prompts(tokenizer, chunk, data.template_options)
        return [one(tokenizer, problem, ids) for problem, ids in zip(chunk, together, strict=True)]

    return build


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, template_options: Mapping[str, Any] | None = None
) -> list[int]:
    """Encode a problem as the model is to see it, up to where its response begins.

    The chat template writes every special token itself, BOS included, so the tokenizer must not add a second one:
    ``apply_chat_template`` with ``tokenize=True`` sees to that, rendering to text and encoding it again does not.

    Args:
        tokenizer: any Hugging Face tokenizer with a chat template.
        problem: what to ask.
        template_options: variables of the chat template, e.g. ``{"enable_thinking": False}`` for Qwen3.

    Returns:
        Token ids.

    Raises:
        DataError: the tokenizer has no chat template, or it fails on this problem.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r} = no chat template: prompts are written by it. A base model usually "
            "shares the template of its chat variant. Copy that variant's chat_template.jinja into the directory."
        )
    # transformers 5 returns a dict of ids and mask unless told otherwise.
    try:
        ids = tokenizer.apply_chat_template(
            _chat(problem), tokenize=True, add_generation_prompt=True, return_dict=False, **(template_options or {})
        )
    except Exception as error:  # a template is a program, and refuses by raising, e.g. a role that it does not know
        raise BadRow(
            "refused by the chat template",
            f"tokenizer {tokenizer.name_or_path!r}: its chat template fails on problem {problem.id!r} "
            f"({type(error).__name__}: {error}). Mend chat_template.jinja, data.template_options or the messages.",
        ) from error
    return list(ids)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], template_options: Mapping[str, Any]
) -> list[list[int]]:
    """``encode_prompt`` of many at once."""
    chats = list(map(_chat, problems))
    return [
        list(ids)
        for ids in tokenizer.apply_chat_template(
            chats, tokenize=True, add_generation_prompt=True, return_dict=False, padding=False, **template_options
        )
    ]


def _chat(problem: Problem) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in problem.messages]


def _check_template_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    """Refuse a misspelt variable of the chat template, which Jinja would pass over without a word.

    One that is like none of the template's is let through: a recipe may serve models with and without it.
    """
    read = set(re.findall(r"\w+", str(tokenizer.chat_template or "")))
    for name in options.keys() - read:
        if close := difflib.get_close_matches(name, read, n=1, cutoff=0.8):
            raise DataError(
                f"data.template_options.{name} = {shown(options[name])}: the chat template reads no such variable, and the "
                f"option would change nothing. Did you mean {close[0]}?"
            )


def _check_prompt(ids: list[int], problem: Problem, data: DataConfig) -> None:
    """Whether what a builder returned is a prompt."""
    if isinstance(ids, list) and set(map(type, ids)) == {int}:
        return
    if ids == [] and data.prompt_builder == "chat":
        raise BadRow(
            "rendered as nothing",
            f"data.prompt_builder = chat: the chat template renders problem {problem.id!r} as nothing, and there is no prompt "
            "to answer. Mend chat_template.jinja in the student's directory, or name a builder of your own.",
        )
    raise DataError(
        f"data.prompt_builder = {data.prompt_builder}: returned {shown(ids)} for problem {problem.id!r}: must be a "
        "non-empty list of token ids. Mend the function."
    )


def _check_different(problems: Sequence[Problem], prompts: Sequence[list[int]], data: DataConfig) -> None:
    """Refuse prompts that are all the same although the problems are not: a template that leaves the problem out."""
    first = prompts[0]
    other = next((place for place, one in enumerate(problems) if one.messages != problems[0].messages), None)
    if other is not None and all(prompt == first for prompt in prompts):
        raise DataError(
            f"data.prompt_builder = {data.prompt_builder}: problems {problems[0].id!r} and {problems[other].id!r} differ, and "
            "their prompts are the same: the problem is not in them. Mend the chat template or the builder; `megatron-distill "
            "show` prints what it makes."
        )
