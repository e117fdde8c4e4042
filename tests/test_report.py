"""Pages of runs: complete, self-contained, escaped, and clear about folders that hold nothing to show."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_distill import config as config_module
from megatron_distill.config import DistillConfig, EntropyGated, ParallelConfig, RunConfig, StudentConfig
from megatron_distill.config.schedules import linear
from megatron_distill.errors import DataError
from megatron_distill.pages.compare import compare_runs
from megatron_distill.pages.plots import Panel, Series, curves, stacked
from megatron_distill.pages.report import write_report
from megatron_distill.pages.run_record import read_run
from megatron_distill.runs.metrics import BY_NAME
from megatron_distill.runs.run_folder import HELDOUT, RunFolder, append, write_json
from megatron_distill.training.curriculum import Measurement, make_curriculum
from tests.support.made_up import leave_finished_run

HOSTILE = '<script>alert(1)</script> & "quotes" \\boxed{2}'


class Page(HTMLParser):
    """Tags with attributes, and the text of a page; refuses tags that are closed in the wrong order."""

    VOID = ("meta", "br", "path", "use", "image")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source, self.tags, self.text, self._open = path.read_text(encoding="utf-8"), [], "", []
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def summary(step: int, avg: float, k: int = 4) -> dict[str, Any]:
    return {
        "step": step,
        "num_problems": 100,
        "k": k,
        **{"avg_at_k": avg, "avg_at_k_low": avg - 0.05, "avg_at_k_high": avg + 0.05},
        **{"pass_at_k": avg + 0.2, "pass_at_k_low": avg + 0.1, "pass_at_k_high": avg + 0.3},
        **{"response_tokens": 70.5, "truncated_frac": 0.01, "repetition_frac": 0.0},
        **{"entropy_nats": 0.31, "entropy_gap_nats": 0.0, "stop_reasons": {"7": 390, "length": 10}},
    }


FEW = ("loss", "teacher_entropy_nats", "sampler_gap_nats", "rollout_s", "step_s")  # drawing is what takes the time


def make_run(root: Path, num_steps: int = 12, metrics: Sequence[str] = FEW, **changes: Any) -> RunFolder:
    """A run folder as training writes it, with a gated curriculum, two evaluations and hostile samples."""
    config = RunConfig(
        name=root.name,
        num_steps=num_steps,
        student=StudentConfig(path="/models/student", parallel=ParallelConfig(tp=2)),
        curriculum=EntropyGated(ladder_tokens=(8, 16), stage_steps=4),
        **changes,
    )
    folder = RunFolder(root)
    rng = np.random.default_rng(0)
    records = []
    for step in range(1, num_steps + 1):
        record = {name: float(rng.uniform(0.1, 1.0)) for name in metrics}
        if step % 2 and "teacher_entropy_nats" in record:
            del record["teacher_entropy_nats"]  # what was not measured is absent
        records.append(record | {"step": float(step), "horizon_tokens": 8.0})
    leave_finished_run(
        config, folder, {step: summary(step, avg) for step, avg in ((0, 0.1), (num_steps, 0.4))}, records
    )
    curriculum = make_curriculum(config.curriculum, num_steps)
    append(folder.curriculum, curriculum.decide(4, Measurement(0.04, 0.0, 0.0)).to_record())
    for step in (1, num_steps):
        sample = {"step": step, "id": "p", "written_by": "student", "weight_version": 0, "stop_reason": "length"}
        append(folder.samples, sample | {"prompt": f"prompt {HOSTILE}", "response": HOSTILE, "answer": "2"})
    return folder


@pytest.mark.slow
def test_report_shows_all_that_the_folder_tells(tmp_path: Path) -> None:
    """Evaluations, every measured metric with its meaning, the decision's reason, the config's differences, samples."""
    measured = [name for name in BY_NAME if name not in ("step", "reference_kl_nats")]
    page = Page(write_report(make_run(tmp_path / "run", metrics=measured)))
    for expected in (
        "Avg@4",
        "0.400 [0.350, 0.450]",
        "+0.300",
        "entropy_nats 0.04 < 0.1",
        "frozen at the last stable horizon",
        "curriculum.stage_steps",
        BY_NAME["sampler_gap_nats"].meaning,
        BY_NAME["grad_norm"].bad,
        "the cap: 10",
    ):
        assert expected in page.text, expected
    assert [name for name in BY_NAME if f"<td><code>{name}</code></td>" in page.source] == measured
    assert page.text.count(HOSTILE) == 4


@pytest.mark.slow
def test_every_set_that_was_evaluated_is_shown(tmp_path: Path) -> None:
    """In a section of its own, before and after."""
    folder = make_run(tmp_path / "run")
    (folder.evals / "math500").mkdir()
    for step, avg in ((0, 0.25), (12, 0.625)):
        write_json(folder.evaluation("math500", step), {"summary": summary(step, avg), "responses": []})
    page = write_report(folder).read_text()
    assert "Accuracy on math500" in page and "0.625" in page


@pytest.mark.slow
def test_report_is_self_contained_and_inert(tmp_path: Path) -> None:
    """No script, nothing loaded from elsewhere, and no id twice, so that clip paths of one plot cannot cut another."""
    page = Page(write_report(make_run(tmp_path / "run")))
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("href", "src", "xlink:href")]
    assert links and all(link.startswith("#") for link in links)
    clips = [attrs["id"] for tag, attrs in page.tags if tag.lower() == "clippath"]
    assert clips and len(clips) == len(set(clips))


@pytest.mark.slow
def test_report_of_a_run_under_way(tmp_path: Path) -> None:
    """One step, no evaluation, no sample and a last line half written: the page shows what there is."""
    folder = make_run(tmp_path / "run", num_steps=5)
    (first, *_) = folder.metrics.read_text().splitlines(keepends=True)
    folder.metrics.write_text(first + '{"step": 2.0, "lo')
    for path in (*folder.evals.iterdir(), folder.samples, folder.curriculum, folder.finished):
        path.unlink()
    page = Page(write_report(folder))
    assert "under way at step 1 of 5" in page.text and "Samples" not in page.text
    folder.fail("trainer", "rank 3 <died>")
    assert "rank 3 <died>" in Page(write_report(folder)).text


def test_evaluations_alone_make_a_report(tmp_path: Path) -> None:
    """Before the first step there is the start's evaluation."""
    folder = make_run(tmp_path / "run")
    for path in (folder.metrics, folder.evaluation(HELDOUT, 12)):
        path.unlink()
    assert "0.100 [0.050, 0.150]" in Page(write_report(folder)).text


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    """A missing folder, one of something else and one without a step each get their own message."""
    with pytest.raises(DataError, match=r"run folder = .*gone: no such folder"):
        write_report(RunFolder(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"has no config.json"):
        write_report(RunFolder(tmp_path))
    folder = make_run(tmp_path / "run")
    folder.metrics.unlink()
    for path in folder.evals.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"holds no step and no evaluation yet. Wait for its first step"):
        write_report(folder)
    folder.config.write_text("{")
    with pytest.raises(DataError, match=r"config.json: cannot be read .*Put it back from a copy"):
        write_report(folder)


def test_only_decisions_that_count_are_shown(tmp_path: Path) -> None:
    """What a killed run decided after the checkpoint it resumed from is no part of the run."""
    folder = make_run(tmp_path / "run")
    (record,) = [json.loads(line) for line in folder.curriculum.read_text().splitlines()]
    append(folder.curriculum, record | {"step": 8, "reason": "abandoned"})
    append(folder.curriculum, record | {"reason": "decided again"})
    assert [decision["reason"] for decision in read_run(folder).decisions] == ["decided again"]


@pytest.mark.slow
def test_comparison_shows_differences_results_and_curves(tmp_path: Path) -> None:
    """Page and console hold each run's result and exactly the differing fields; names of folders are told apart."""
    first = make_run(tmp_path / "a" / "run")
    second = make_run(tmp_path / "b" / "run", distill=DistillConfig(reverse_kl_weight=linear(0, 1, 10)))
    out = tmp_path / "compare.html"
    console = compare_runs([first, second], out)
    page = Page(out)
    rows = {line.split("  ")[0]: line for line in console.splitlines()}
    assert "a/run" in rows[""] and "b/run" in rows[""]
    assert rows["Avg@4"].split()[1:] == ["0.400", "0.400"]
    assert "0 at step 0 to 1 at step 10" in rows["distill.reverse_kl_weight"]
    assert [row for row in rows if "." in row] == ["distill.reverse_kl_weight"]
    assert "distill.reverse_kl_weight" in page.text and "student.path" not in page.text
    assert all(name in page.text for name in ("loss", "sampler_gap_nats", "a/run", "b/run"))
    assert "not evaluated alike" not in page.text


@pytest.mark.slow
def test_comparison_warns_of_unlike_evaluations(tmp_path: Path) -> None:
    """Accuracies at different sampling temperatures are shown, but not left to be compared unknowingly."""
    first = make_run(tmp_path / "a")
    second = make_run(tmp_path / "b", evaluation=config_module.EvalConfig(temperature=1.0))
    console = compare_runs([first, second], tmp_path / "compare.html")
    assert console.splitlines()[-1] == "These runs were not evaluated alike: evaluation.temperature differ."


@pytest.mark.slow
def test_fields_younger_than_a_run_count_as_their_default(tmp_path: Path) -> None:
    """A run of an older version is not told to differ in fields that did not exist."""
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    config = json.loads(second.config.read_text())
    del config["teacher"]["cache_dir"]
    second.config.write_text(json.dumps(config))
    assert "cache_dir" not in compare_runs([first, second], tmp_path / "compare.html")


def test_comparison_needs_two_different_runs(tmp_path: Path) -> None:
    """None, one, or one named twice is a mistake on the command line."""
    folder = make_run(tmp_path / "run")
    for folders in ([], [folder], [folder, folder]):
        with pytest.raises(DataError, match=r"needs two or more different runs"):
            compare_runs(folders, tmp_path / "compare.html")


def test_long_curves_stay_small_and_keep_their_spikes() -> None:
    """A hundred thousand steps take no more space than a few hundred; a single spike stays visible, in the band."""
    steps = np.arange(100_000.0)
    values = np.sin(steps / 1e4)
    values[5_000] = 900.0
    svg = curves("long", [Panel("y", [Series("y", steps, values)])])
    ElementTree.fromstring(svg)
    assert len(svg) < 60_000
    assert ">800<" in svg  # the axis reaches the spike, although no mean of a stretch does
    values[5_000] = 0.0
    assert ">800<" not in curves("long", [Panel("y", [Series("y", steps, values)])])


@pytest.mark.slow
def test_plots_bear_gaps_single_points_and_nothing() -> None:
    """Missing values, one value, only missing values and no curve at all draw without a warning or an error."""
    nan, one = np.full(3, np.nan), np.array([1.0])
    gaps = Series("gaps", np.arange(3.0), np.array([1.0, np.nan, 2.0]))
    for series in ([gaps], [Series("one", one, one)], [Series("none", np.arange(3.0), nan)], []):
        for log in (False, True):
            ElementTree.fromstring(curves("x", [Panel("y", series, log=log), Panel("share", series, share=True)]))
    ElementTree.fromstring(stacked("t", one, {"a": one, "b": one}, "s"))
