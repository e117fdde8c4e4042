"""What a person sees: lines that fit, the important figures first, a bar that is drawn over, a summary to keep."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import termios
from pathlib import Path

import pytest
from megatron_distill.recipes.tiny import quickstart

from megatron_distill.runs import console as console_module
from megatron_distill.runs.console import Console, all_metrics, clock, evaluation_line, step_line
from megatron_distill.runs.metrics import METRICS, check_declared, markdown, means
from megatron_distill.runs.run_folder import HELDOUT, RunFolder, append, read_json, write_json
from megatron_distill.runs.summary import closing_summary, closing_table
from megatron_distill.training.step_metrics import expert_load
from tests.support.made_up import leave_finished_run
from tests.support.waiting import wait_until

RECORD = {metric.name: 123.4 for metric in METRICS} | {"step": 7.0}


def evaluation(step: int) -> dict[str, object]:
    keys = ("avg_at_k", "avg_at_k_low", "avg_at_k_high", "pass_at_k", "pass_at_k_low", "pass_at_k_high")
    keys += ("response_tokens", "truncated_frac", "entropy_nats")
    return {"step": step, "set": "heldout", "k": 4, **dict.fromkeys(keys, step / 100)}


@pytest.mark.slow
def test_console_shows_steps_events_and_silence(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a terminal, every event and step is one whole line with all figures, and silence names the phase that lasts."""
    monkeypatch.setattr(console_module, "_SILENT_LOGGED_S", 0.2)
    out = io.StringIO()
    with Console(folder, 10, out):
        folder.event("trainer", "loading")
        wait_until(lambda: "... loading" in out.getvalue(), "a line on the console")
        for step in (1, 2):
            append(folder.metrics, {"step": step, "loss": 0.5, "response_tokens": 20.0, "grad_norm": 1.0})
            wait_until(lambda step=step: f"step  {step}/10" in out.getvalue(), "a line on the console")
        folder.event("trainer", "evaluated", evaluation=evaluation(2))
    text = out.getvalue()
    assert "step  1/10  loss 0.500  len 20.0  grad 1.00" in text
    assert "step  2/10" in text
    assert " left " in text.split("step  2/10")[1]
    assert text.splitlines()[-1].startswith("heldout at step 2  Avg@4 0.020")
    assert "\r" not in text and "\x1b" not in text


@pytest.mark.parametrize("columns", [60, 80, 100, 120, 200])
def test_a_terminal_line_fits_and_keeps_what_matters_most(columns: int) -> None:
    """Whatever the width, a step is one line of it; a wider one shows all that a narrower one does."""
    line, wider = step_line(RECORD, 120, columns), step_line(RECORD, 120, columns + 15)
    assert len(line) <= columns
    assert "loss 123.4" in line
    assert {part.strip() for part in line.split("  ")} <= {part.strip() for part in wider.split("  ")}
    assert len(evaluation_line(evaluation(40), columns)) <= columns
    assert all(len(row) <= columns for row in all_metrics(RECORD, columns).splitlines())
    assert all(metric.name in all_metrics(RECORD, columns) for metric in METRICS if metric.name != "step")


def test_typical_figures_at_80_columns() -> None:
    """A distillation step shows its loss, both divergences, entropy and length on the smallest common terminal."""
    names = ("loss", "forward_kl_nats", "reverse_kl_nats", "student_entropy_nats")
    record = {"step": 12.0, **dict.fromkeys(names, 0.4123), "response_tokens": 70.04, "grad_norm": 0.5, "step_s": 8.0}
    line = step_line(record, 120, 79)
    assert line == "step  12/120  loss 0.412  fwd KL 0.412  rev KL 0.412  entropy 0.412  len 70.0"


def test_on_a_terminal_the_bar_is_drawn_over(folder: RunFolder) -> None:
    """A real terminal of 80 columns: whole lines scroll, the bar below is erased before the next, and nothing is left of it."""
    controller, terminal = pty.openpty()
    os.set_blocking(controller, False)
    seen = b""

    def shown() -> str:
        nonlocal seen
        with contextlib.suppress(BlockingIOError):
            seen += os.read(controller, 1 << 16)
        return seen.decode(errors="ignore")

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(terminal, "w", encoding="utf-8") as out, Console(folder, 4, out):
        folder.event("trainer", "loading the student " + "and more " * 20)
        wait_until(lambda: "loading the student" in shown(), "a line on the console")
        append(folder.metrics, {"step": 1, "loss": 0.5})
        wait_until(lambda: "  25%" in shown(), "a line on the console")
        append(folder.metrics, {"step": 2, "loss": 0.5})
        wait_until(lambda: "  50%" in shown() and " left" in shown(), "a line on the console")
    text = shown()
    drawn = [part for part in text.replace("\r\n", "\n").replace("\n", "\r").split("\r") if "━" in part or "─" in part]
    assert drawn and all(len(part.replace("\x1b[K", "")) <= 79 for part in drawn)
    assert text.replace("\r\n", "\n").endswith("\r\x1b[K")


def test_a_clock_reads_as_people_write_it() -> None:
    """Minutes and seconds, and hours once there are any."""
    assert [clock(seconds) for seconds in (0, 9.6, 61, 3599, 3661)] == ["0:00", "0:10", "1:01", "59:59", "1:01:01"]


def test_metrics_are_declared_once_and_documented() -> None:
    """Names are unique, each has a meaning, a good and a bad reading, and the committed page is the generated one."""
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(metric.meaning and metric.good and metric.bad for metric in METRICS)
    assert all(name in names for name in console_module.FIGURES)
    assert (Path(__file__).parents[1] / "docs" / "metrics.md").read_text() == markdown()
    with pytest.raises(KeyError, match="made_up"):
        check_declared({"made_up": 1.0})
    assert means({"a": (3.0, 2.0), "b": (0.0, 0.0)}) == {"a": 1.5}


def test_closing_table_sets_first_beside_last() -> None:
    """The table names k, and shows both evaluations with their intervals."""
    table = closing_table([evaluation(0), evaluation(40)])
    assert "Avg@4" in table
    assert "0.400 [0.400, 0.400]" in table


def test_the_summary_fits_a_chat_and_names_no_place_of_this_machine(tmp_path: Path) -> None:
    """It says what learnt from what, for how long, and what came of it, in 80 columns."""
    folder = RunFolder(tmp_path / "run")
    step = {"loss": 0.5, "step_s": 60.0, "rollout_s": 30.0, "train_s": 15.0, "tokens_per_s": 100.0}
    measured = {key: value for key, value in evaluation(40).items() if key not in ("step", "k")}
    leave_finished_run(quickstart(), folder, {0: measured, 3: measured}, [step | {"step": float(n)} for n in (1, 2, 3)])
    (folder.evals / "math500").mkdir()
    write_json(folder.evaluation("math500", 3), read_json(folder.evaluation(HELDOUT, 3)))
    text = closing_summary(folder)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert any(line.split()[:3] == ["math500", "step", "3"] for line in text.splitlines())
    for part in (
        "3 steps of 64 responses, 3 min",
        "student tiny_models/student, seed 1",
        "rollout 50%",
    ):
        assert part in text
    assert str(tmp_path) not in text and "/home" not in text


def test_the_load_of_experts_is_of_all_ranks_and_a_mean_over_layers() -> None:
    """Two ranks hold layer 1's tokens, one of them layer 2's too; a model without experts has no such metric."""
    load = expert_load([{1: [4, 0, 1, 0]}, {1: [2, 0, 0, 1], 2: [1, 1, 1, 1]}, {}])
    assert load == {"expert_load_max": (6 * 4 / 8 + 1) / 2, "expert_idle_frac": (1 / 4 + 0) / 2}
    assert expert_load([{}, {}]) == {}
