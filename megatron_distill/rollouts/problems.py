r"""From records to problems: prompt, answer, solution, and what becomes of rows that are none.

In: a source, as ``data`` names it, of records. Out: ``Problem``s, and a tally of the rows that were left out, by reason.

    for problem in read_problems(Source("train.jsonl"), "stop", tally):
        ...

``data.on_bad_rows=stop`` refuses the first row that is no problem, with its file and line; ``drop`` leaves such rows out and
counts them. Nothing is ever left out without a count: that would change what is trained on without a trace.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_distill.config import DataConfig, SourceConfig
from megatron_distill.config.loading import load_function
from megatron_distill.errors import DataError
from megatron_distill.rewards.math_verifier import last_boxed
from megatron_distill.rollouts.records import BadRow, Record, read_records, shown
from megatron_distill.types import Message, Problem

_ROLES = ("system", "user", "assistant")
OnBadRows = Literal["stop", "drop"]


@dataclass
class Tally:
    """Rows of one source.

    Attributes:
        where: the source.
        num_read: rows that were looked at.
        left_out: rows that are no problems of the run, by reason.
    """

    where: str = ""
    num_read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def told(self) -> str:
        """E.g. ``train.jsonl: 12 of 600 rows left out: 10 no answer, 2 blank line``; empty if none is."""
        if not self.left_out:
            return ""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common())
        return f"{self.where}: {self.left_out.total():,} of {self.num_read:,} rows left out: {reasons}"


@dataclass(frozen=True)
class Source:
    """One place of problems and how its records are read; see the fields of ``data`` in the config."""

    path: str
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    solution_key: str = "solution"
    answer_marker: str = ""
    answer_from: str = "text"
    instruction: str = ""
    system_prompt: str = ""
    filter: str = "all"


def source_of(data: DataConfig, path: str, own: SourceConfig | None = None) -> Source:
    """A source of a run: what it says itself, and ``data``'s fields for the rest."""
    names = [name for name in Source.__dataclass_fields__ if name != "path"]
    values = {name: getattr(data, name) for name in names}
    if own is not None:
        values |= {name: value for name in names if (value := getattr(own, name, None)) is not None}
    return Source(path, **values)


def read_problems(source: Source, on_bad_rows: OnBadRows, tally: Tally) -> Iterator[Problem]:
    """The problems of a source, in its order. Ids may repeat; see ``DistinctIds``.

    Args:
        source: place, columns, and what is added.
        on_bad_rows: refuse the first row that is no problem, or leave it out.
        tally: counts rows.

    Raises:
        DataError: the place cannot be read, or a row is refused.
    """
    tally.where = source.path
    keeps = _filter(source.filter)
    answer_of = _extractor(source)
    for index, (where, record) in enumerate(read_records(source.path)):
        tally.num_read += 1
        try:
            if isinstance(record, BadRow):
                raise record
            if not keeps(record, where):
                tally.left_out["data.filter"] += 1
                continue
            problem = _problem(where, index, record, source, answer_of)
        except BadRow as row:
            if on_bad_rows == "stop":
                raise row.refused(after_good_ones=index > 0) from None
            tally.left_out[row.reason] += 1
            continue
        yield problem


class DistinctIds:
    """Makes ids that are taken distinct: ``7``, ``7#2``, ``7#3``. Scores and samples are filed by id."""

    def __init__(self) -> None:
        self._used: dict[str, int] = {}

    def give(self, problem: Problem) -> Problem:
        """The problem, under an id that no other has."""
        number = self._used[problem.id] = self._used.get(problem.id, 0) + 1
        if number == 1:
            return problem
        return self.give(replace(problem, id=f"{problem.id}#{number}"))


def load_problems(
    path: str, *, on_bad_rows: OnBadRows = "stop", tally: Tally | None = None, **columns: str
) -> list[Problem]:
    r"""Every problem of one place, for whoever needs no prompts.

    DeepScaleR's columns need ``prompt_key="problem"``; GSM8K's need ``prompt_key="question"`` and ``answer_marker="####"``, as
    its answers are worked solutions that end with ``#### 18``.

    Args:
        path: see ``records``.
        on_bad_rows: see ``read_problems``.
        tally: counts rows.
        columns: fields of ``Source``.

    Raises:
        DataError: the place is missing, of another kind or empty, or a row is refused.
    """
    ids, tally = DistinctIds(), tally or Tally()
    problems = [ids.give(one) for one in read_problems(Source(str(path), **columns), on_bad_rows, tally)]
    check_not_empty(problems, tally)
    return problems


def check_not_empty(problems: list[Problem], tally: Tally) -> None:
    """Refuse a source that holds no problem.

    Raises:
        DataError: saying what became of its rows.
    """
    if not problems:
        told = tally.told() or f"{tally.where} = 0 records"
        raise DataError(f"{told}: a data set must hold at least one problem. Check the path, the file and the columns.")


def _filter(name: str) -> Callable[[Record, str], bool]:
    function = load_function(name, {"all": lambda record: True}, "data.filter", ("record",))

    def keeps(record: Record, where: str) -> bool:
        try:
            return bool(function(record))
        except Exception as error:
            raise DataError(
                f"data.filter = {name}: raised {type(error).__name__}: {error}, at {where}. Mend the function: it says whether "
                "a record is kept."
            ) from error

    return keeps


def _problem(where: str, index: int, record: Record, source: Source, answer_of: Callable[[str], str | None]) -> Problem:
    answer = _read_answer(where, record, source, answer_of)
    solution = record.get(source.solution_key)
    if solution is not None and not isinstance(solution, str):
        raise BadRow(
            "solution is no text",
            f"{where}: {source.solution_key} = {shown(solution)}: must be a string. Mend or drop the field.",
        )
    messages = _read_messages(where, record, source.prompt_key)
    if source.instruction:
        last = messages[-1]
        messages = (*messages[:-1], replace(last, content=f"{last.content}\n\n{source.instruction}"))
    if source.system_prompt and messages[0].role != "system":
        messages = (Message("system", source.system_prompt), *messages)
    columns = {sys.intern(name): value for name, value in record.items()}  # one copy of each name, not one a record
    return Problem(str(record.get("id", index)), messages, answer, solution, columns)


def _read_messages(where: str, record: Record, prompt_key: str) -> tuple[Message, ...]:
    key = prompt_key if prompt_key in record else "messages"
    if key not in record:
        raise BadRow(
            "no prompt",
            f"{where} = {{{', '.join(map(str, record))}}}: has neither {prompt_key!r} nor 'messages'. "
            "Set data.prompt_key to the column that holds the prompt.",
        )
    value = record[key]
    if isinstance(value, str) and value.strip():
        return (Message("user", value),)
    if not isinstance(value, list) or not value:
        raise BadRow(
            "no prompt",
            f"{where}: {key} = {shown(value)}: must be a non-empty string or list of messages. "
            "Mend the record, or set data.prompt_key.",
        )
    messages = []
    for item in value:
        role, content = (item.get("role"), item.get("content")) if isinstance(item, Mapping) else (None, None)
        if role not in _ROLES or not isinstance(content, str):
            raise BadRow(
                "odd messages",
                f"{where}: {key} = {shown(item)}: a message must have a role of {', '.join(_ROLES)} and a string as "
                "its content. Mend the record.",
            )
        messages.append(Message(role, content))
    if messages[-1].role != "user":
        raise BadRow(
            "odd messages",
            f"{where}: {key} ends with the role {messages[-1].role!r}: the last turn must be the user's, as the model "
            "is to write the next. Move a worked response into 'solution'.",
        )
    return tuple(messages)


def _read_answer(where: str, record: Record, source: Source, answer_of: Callable[[str], str | None]) -> str:
    key = source.answer_key
    value = record.get(key)
    # bool is an int to Python, yet no answer.
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise BadRow(
            "no answer",
            f"{where}: {key} = {shown(value)}: must be a non-empty string or a number, as nothing can be "
            "judged without it. Mend the record, or set data.answer_key to the column that holds the answer.",
        )
    answer = answer_of(str(value))
    if not answer or not answer.strip():
        how = (
            f"no answer follows {source.answer_marker!r}"
            if source.answer_marker
            else f"{source.answer_from} finds none"
        )
        raise BadRow(
            "no answer",
            f"{where}: {key} = {shown(value)}: {how}. Mend the record, or set "
            'data.answer_marker="" and data.answer_from=text if the column holds the bare answer.',
        )
    return answer.strip()


def _extractor(source: Source) -> Callable[[str], str | None]:
    """How the reference answer is found in its column."""

    def after_marker(text: str) -> str | None:
        _, found, answer = text.rpartition(source.answer_marker)
        return answer if found else None

    if source.answer_marker:
        return after_marker
    built_in: dict[str, Callable[[str], str | None]] = {"text": lambda text: text, "box": last_boxed}
    extract: Any = load_function(source.answer_from, built_in, "data.answer_from", ("text",))

    def checked(text: str) -> str | None:
        answer = extract(text)
        if answer is not None and not isinstance(answer, str):
            raise DataError(
                f"data.answer_from = {source.answer_from}: returned {shown(answer)} for {shown(text)}: must be a string, or "
                "None where there is no answer. Mend the function."
            )
        return answer

    return checked
