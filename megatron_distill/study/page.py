"""A study's tables, figures and sentences, as ``results.md``, ``figures/*.svg`` and ``study.html``.

In: ``Results``, and nothing else. So the pages of a results file that was kept can be made again, without any run:

    python -m megatron_distill.study.page docs/study/tiny/results.json
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_distill.config.json_files import write_whole
from megatron_distill.errors import DataError
from megatron_distill.pages.page import Html, document, element, reading_help
from megatron_distill.pages.page import table as html_table
from megatron_distill.pages.run_record import shown
from megatron_distill.study.claims import Judgement, judge_all, sentence, verdict_on_claim
from megatron_distill.study.design import MEASURES, Question
from megatron_distill.study.figures import draw, reading
from megatron_distill.study.results import Results, load, over_seeds


@dataclass(frozen=True)
class Answer:
    """A question with what has been measured of it.

    Attributes:
        question: what was asked.
        judgements: one for each comparison of its claim.
        header: the table's first line.
        rows: an arm each.
        figures: (file name, title, SVG, declared metrics in it), those that have something to show.
    """

    question: Question
    judgements: list[Judgement]
    header: list[str]
    rows: list[list[str]]
    figures: list[tuple[str, str, str, list[str]]]

    @property
    def headline(self) -> str:
        """The claim and the verdict on it."""
        return f"Claim: {self.question.claim} This study **{verdict_on_claim(self.judgements)}**."


def write_pages(results: Results, folder: Path) -> str:
    """Write ``results.md``, ``figures/`` and ``study.html`` into ``folder``.

    Returns:
        Each question's verdict, for the console.
    """
    answers = [
        _answer(results, question, judgements)
        for question, judgements in zip(results.questions, judge_all(results), strict=True)
    ]
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for answer in answers:
        for name, _, svg, _ in answer.figures:
            write_whole(folder / "figures" / f"{name}.svg", svg.encode())
    write_whole(folder / "results.md", _markdown(results, answers).encode())
    write_whole(folder / "study.html", _html(results, answers).encode())
    width = max((len(answer.question.title) for answer in answers), default=0)
    return "\n".join(
        f"  {answer.question.title:<{width}}  this study {verdict_on_claim(answer.judgements)}" for answer in answers
    )


def _answer(results: Results, question: Question, judgements: list[Judgement]) -> Answer:
    drawn = [
        (figure.name, figure.title, draw(results, question, figure), reading(figure)) for figure in question.figures
    ]
    rows = []
    for arm, label in question.arms.items():
        cells = [_cell(results.final(arm, name), name) for name in question.columns]
        rows.append([label, str(len(results.runs_of(arm))), *cells])
    return Answer(
        question,
        judgements,
        ["", "seeds", *(MEASURES[name].label for name in question.columns)],
        rows,
        [one for one in drawn if one[2]],
    )


def _cell(by_seed: Mapping[int, float], measure: str) -> str:
    """A measure of an arm, with the seeds behind it where it was not measured in all."""
    interval = over_seeds(by_seed.values())
    partly = f" ({interval.num_seeds} of {len(by_seed)} seeds)" if 0 < interval.num_seeds < len(by_seed) else ""
    return interval.shown(MEASURES[measure].form) + partly


# --- what stands in both pages ----------------------------------------------------------------------------------------


def _status(results: Results) -> str:
    planned = len(results.arms) * len(results.seeds)
    state = "finished" if len(results.runs) == planned else "under way"
    seeds = ", ".join(map(str, results.seeds))
    status = f"{len(results.runs)} of {planned} runs ({state}): {len(results.arms)} arms, seeds {seeds}."
    if len(results.runs) == planned:
        return status
    return (
        f"{status} Interim: the planned test is over {len(results.seeds)} seeds, and looking earlier raises the chance of a "
        "false finding."
    )


def _notes(results: Results) -> list[str]:
    """How to read the numbers, so that no more is read into them than they hold."""
    num_judged = sum(len(question.comparisons) for question in results.questions)
    evaluated = ""
    if results.runs:
        sizes = results.runs[0].evaluations[-1]
        samples = "one sample of each" if sizes["k"] == 1 else f"{sizes['k']:.0f} samples of each (k)"
        evaluated = f"{sizes['num_problems']:.0f} held-out problems, {samples}, at the last step of each run. "
    return [
        f"{evaluated}In brackets: 95% t-interval of the mean over seeds; a number without brackets has one seed, or is the "
        "same for all. Of few and uneven seeds an interval may reach past what its measure can be. All runs answer the same "
        "held-out problems, so the intervals do not say what other problems would change.",
        "Verdicts are computed. A comparison pairs the runs of equal seeds and looks at the 95% t-interval of their "
        "difference: above 0 it **shows** what was claimed, below 0 **the opposite**, around 0 it **does not show** it, which "
        f"with few seeds is no proof of its absence. It judges each of the {num_judged} comparisons alone: where nothing "
        "differs, chance still makes one in forty show it, and one in forty the opposite. Whether a finding stands after "
        "correction for all of them together (Holm, two-sided, 5%) is said beside it.",
        "Times are of one machine; whatever else ran on it is in them. Tokens of a step that student and teacher both wrote "
        "are split by how many of its responses each wrote, which is approximate; what the data wrote is not counted.",
        *_mixed_code(results),
    ]


def _mixed_code(results: Results) -> list[str]:
    """Which runs were made by which commit and packages, where these are not the same for all."""
    codes = [
        {"megatron_distill": facts.get("megatron_distill"), "commit": facts.get("commit"), **facts.get("packages", {})}
        for facts in results.environments
    ]
    names = dict.fromkeys(name for code in codes for name in code)
    differing = [name for name in names if len({code.get(name) for code in codes}) > 1]
    if not differing:
        return []
    seeds: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for run in results.runs:
        code = ", ".join(f"{name} {codes[run.environment].get(name) or 'unknown'}" for name in differing)
        seeds[code][results.arms[run.arm].label].append(run.seed)
    told = [
        f"{code} made {'; '.join(f'{label} (seeds {_listed(numbers)})' for label, numbers in arms.items())}."
        for code, arms in seeds.items()
    ]
    return [f"Not all runs were made by the same code, which may be what differs. {' '.join(told)}"]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _measures(results: Results) -> list[str]:
    """The measures that the tables show, in the order of their declaration."""
    used = {name for question in results.questions for name in question.columns}
    used |= {one.measure for question in results.questions for one in question.comparisons}
    return [name for name in MEASURES if name in used]


def _settings_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Arms down, the fields in which they differ across."""
    fields = list(dict.fromkeys(field for facts in results.arms.values() for field in facts.settings))
    header = ["arm", "goes on from", *fields]
    rows = [
        [
            facts.label,
            results.arms[facts.after].label if facts.after else "-",
            *(shown(facts.settings[f]) if f in facts.settings else "-" for f in fields),
        ]
        for facts in results.arms.values()
    ]
    return header, rows


def _environment(results: Results) -> str:
    return " ".join(map(_made_on, results.environments))


def _made_on(facts: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("packages", {}).items() if version)
    devices = ", ".join(facts.get("gpus", [])) or f"{facts.get('cpus', '?')} CPU cores"
    commit = f", by commit {facts['commit']}" if facts.get("commit") else ""
    return f"Made on {devices} with Python {facts.get('python', '?')}, {versions or 'unknown versions'}{commit}."


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _markdown(results: Results, answers: Sequence[Answer]) -> str:
    lines = [f"# {results.title}", "", results.scope, "", f"    {results.command}", "", _status(results), ""]
    lines += [f"- {answer.question.title}: this study **{verdict_on_claim(answer.judgements)}**" for answer in answers]
    lines += ["", *(f"{note}\n" for note in _notes(results))]
    for answer in answers:
        lines += [f"## {answer.question.title}", "", answer.headline, ""]
        lines += [f"- {sentence(judgement)}" for judgement in answer.judgements]
        lines += ["", *_markdown_table(answer.header, answer.rows), ""]
        for name, title, _, _ in answer.figures:
            lines += [f"![{title}](figures/{name}.svg)", ""]
    lines += ["## Measures", ""]
    lines += [f"- {MEASURES[name].label}: {MEASURES[name].meaning}" for name in _measures(results)]
    lines += ["", "## Settings", "", *_markdown_table(*_settings_rows(results)), "", _environment(results), ""]
    return "\n".join(lines)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


# --- HTML -------------------------------------------------------------------------------------------------------------


def _html(results: Results, answers: Sequence[Answer]) -> str:
    verdicts = html_table(
        ["question", "this study"], [[answer.question.title, verdict_on_claim(answer.judgements)] for answer in answers]
    )
    intro = Html(
        f"{element('p', results.scope)}{element('pre', results.command)}{element('p', _status(results), 'soft')}{verdicts}"
    )
    sections = [(answer.question.title, _html_answer(answer)) for answer in answers]
    notes = "".join(element("p", _bold(note)) for note in _notes(results))
    measures = html_table(
        ["measure", "meaning"], [[MEASURES[m].label, MEASURES[m].meaning] for m in _measures(results)]
    )
    settings = html_table(*_settings_rows(results))
    common = html_table(
        ["field", "value, in all arms"], [[field, shown(value)] for field, value in results.common.items()]
    )
    sections += [
        ("How to read", Html(notes + measures)),
        ("Settings", Html(f"{settings}{element('p', _environment(results), 'soft')}{common}")),
    ]
    return document(results.title, intro, sections)


def _html_answer(answer: Answer) -> Html:
    said = "".join(element("li", _bold(sentence(judgement))) for judgement in answer.judgements)
    figures = "".join(
        f"<figure><figcaption>{element('b', title)}</figcaption>{svg}{reading_help(metrics)}</figure>\n"
        for _, title, svg, metrics in answer.figures
    )
    rows = [
        [label.replace(" ", "\N{NO-BREAK SPACE}"), *(element("span", cell, "num") for cell in cells)]
        for label, *cells in answer.rows
    ]
    note = element("p", "Means over seeds, in brackets 95% t-intervals; bars in the figures are the same.", "soft")
    return Html(
        f"{element('p', _bold(answer.headline))}<ul>{said}</ul>{html_table(answer.header, rows)}{note}<br>"
        f"{element('div', Html(figures), 'figures') if figures else ''}"
    )


def _bold(markdown: str) -> Html:
    """Escaped text, with what stands between pairs of ``**`` in bold."""
    parts = markdown.split("**")
    return Html("".join(element("b", part) if place % 2 else element("span", part) for place, part in enumerate(parts)))


def main(arguments: Sequence[str]) -> int:
    """Make the pages of a results file again, beside it."""
    if len(arguments) != 1:
        print("usage: python -m megatron_distill.study.page RESULTS_JSON", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    try:
        print(write_pages(load(path), path.parent))
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
