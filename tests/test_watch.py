"""The live page: only this machine, only this folder, every record once; and in a real browser, what a person then sees."""

import http.client
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from megatron_distill.recipes.tiny import quickstart

from megatron_distill import config as config_module
from megatron_distill.errors import DataError
from megatron_distill.pages.watch import LivePage, processes, serve
from megatron_distill.runs.run_folder import RunFolder, append, write_json
from megatron_distill.runs.timeline import Timeline
from tests.support import browser as browser_module
from tests.support.browser import Browser
from tests.support.waiting import HANG_S

HOSTILE = "<img src=x onerror='document.title=1'>"


@pytest.fixture
def folder(folder: RunFolder) -> RunFolder:
    """A run's folder that knows what is run."""
    config_module.save(replace(quickstart(), name="watched", num_steps=8), folder.config)
    return folder


@pytest.fixture
def page(folder: RunFolder) -> Iterator[LivePage]:
    server = serve(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def get(url: str, path: str, host: str = "127.0.0.1") -> tuple[int, bytes]:
    """What is answered below an address, which ends with a slash."""
    _, _, place, base = url.split("/", 3)
    connection = http.client.HTTPConnection(place, timeout=HANG_S)
    connection.request("GET", f"/{base}{path}", headers={"Host": place.replace("127.0.0.1", host)})
    reply = connection.getresponse()
    return reply.status, reply.read()


def asked(page: LivePage, path: str) -> Any:
    status, body = get(page.url, path)
    assert status == 200
    return json.loads(body)


def record_step(folder: RunFolder, step: int) -> None:
    append(folder.metrics, {"step": float(step), "loss": 1 / step, "step_s": 2.0, "train_s": 1.0})
    sample = {"step": step, "id": "p1", "written_by": "student", "stop_reason": "stop", "prompt": f"1+1 {HOSTILE}"}
    sample |= {"answer": "2", "response": "2!", "pieces": ["2", "!"], "gap_nats": [4.5, -0.25]}
    append(folder.samples, sample)
    timeline = Timeline(folder.timeline)
    timeline.add("trainer", "wait", 3.0)
    timeline.add("trainer", "train", 1.0)
    timeline.add("student", "busy", 2.0)


def test_records_are_handed_out_once_and_whole(folder: RunFolder, page: LivePage) -> None:
    """From an offset on, whole lines only; a file that was begun anew makes the page begin anew."""
    record_step(folder, 1)
    with folder.metrics.open("a") as file:
        file.write('{"step": 2')
    first = asked(page, "records?metrics=0")
    assert [record["step"] for record in first["metrics"]["records"]] == [1]
    with folder.metrics.open("a") as file:
        file.write("}\n")
    offset = first["metrics"]["offset"]
    second = asked(page, f"records?metrics={offset}")
    assert second["metrics"]["records"] == [{"step": 2}]
    folder.metrics.write_text("")
    assert asked(page, f"records?metrics={offset}") == {"restarted": True}


def test_servers_events_are_handed_out_too(folder: RunFolder, page: LivePage) -> None:
    """A server's role writes into a file of its own: that a server was lost is told on the page as on the console."""
    folder.event("trainer", "step 1")
    folder.event("student server 0", "lost: killed by signal 9")
    first = asked(page, "records?events=0")
    told = {name: [event["text"] for event in part["records"]] for name, part in first.items() if "events" in name}
    assert told == {"events": ["step 1"], "events-student-server-0": ["lost: killed by signal 9"]}
    again = asked(page, "records?" + "&".join(f"{name}={part['offset']}" for name, part in first.items()))
    assert not any(part["records"] for part in again.values())


def test_nobody_else_and_nothing_else_is_served(folder: RunFolder, page: LivePage) -> None:
    """Another host's name (a web site in the reader's browser), other files, other paths: refused."""
    (folder.root / "secret.txt").write_text("secret")
    (folder.logs / "trainer.out").write_text("step 1")
    assert get(page.url, "", host="evil.example")[0] == 403
    assert get(page.url, "run", host="localhost")[0] == 200
    assert get(page.url, "../pyproject.toml")[0] == 404
    root = page.url.removesuffix(f"{page.key}/")
    for without_key in ("", "run", "state", "watch.js", "0" * len(page.key) + "/run", f"{page.key}"):
        assert get(root, without_key)[0] == 403
    assert asked(page, "log?name=trainer.out")["text"] == "step 1"
    for name in ("../secret.txt", "/etc/passwd", "trainer.out/../../secret.txt"):
        assert asked(page, f"log?name={name}")["text"] == ""


def test_odd_questions_and_records_are_answered(
    folder: RunFolder, page: LivePage, capfd: pytest.CaptureFixture[str]
) -> None:
    """A place that is none is told as an error, a record that is none is left out; the terminal stays as it was."""
    for offset in ("x", "-5", "9" * 5000, "1e3"):
        assert get(page.url, f"records?metrics={offset}")[0] == 500
    folder.metrics.write_text('[1]\n{"step": 1\n' + "[" * 100_000 + '\n{"step": 2}\n')
    assert asked(page, "records?metrics=0")["metrics"]["records"] == [{"step": 2}]
    (folder.evals / "step_000001.json").write_text("[]")
    status, told = get(page.url, "state")
    assert status == 500 and b"step_000001.json" in told
    assert capfd.readouterr().err == ""


def test_what_is_no_number_is_null_to_a_browser(folder: RunFolder, page: LivePage) -> None:
    """Python writes NaN and Infinity, and no browser reads them: one of either would end the page for good."""

    def strict(path: str) -> Any:
        return json.loads(get(page.url, path)[1], parse_constant=lambda name: pytest.fail(f"{path}: {name}"))

    append(folder.metrics, {"step": 1.0, "loss": math.nan, "grad_norm": math.inf, "step_s": 2.0})
    append(folder.samples, {"step": 1, "gap_nats": [0.5, -math.inf]})
    summary = {"step": 0, "k": 4, "avg_at_k": 0.5, "pass_at_k": 0.5, "entropy_nats": math.nan}
    write_json(folder.evaluation("heldout", 0), {"summary": summary, "responses": []})
    records = strict("records?")
    assert records["metrics"]["records"] == [{"step": 1.0, "loss": None, "grad_norm": None, "step_s": 2.0}]
    assert records["samples"]["records"][0]["gap_nats"] == [0.5, None]
    assert strict("state")["evaluations"][0]["entropy_nats"] is None


def test_state_tells_how_the_run_stands(folder: RunFolder, page: LivePage) -> None:
    """Under way without news, failed with the first cause, finished whatever failed before."""
    assert asked(page, "state")["failure"] == ""
    folder.fail("trainer", "out of memory")
    assert asked(page, "state")["failure"] == "trainer: out of memory"
    write_json(folder.finished, {"step": 8})
    state = asked(page, "state")
    assert state["finished"] and state["failure"] == ""


def test_a_folder_of_no_run_and_a_taken_port_are_refused(tmp_path: Path, folder: RunFolder, page: LivePage) -> None:
    """Each with what to type."""
    with pytest.raises(DataError, match="runs/NAME"):
        serve(RunFolder(tmp_path / "none"))
    with pytest.raises(DataError, match="free one"):
        serve(folder, page.server_port)
    with pytest.raises(DataError, match="free one"):
        serve(folder, 99999999)


def test_processes_are_found_by_their_run(folder: RunFolder) -> None:
    """A process that names the role and this folder is listed with its memory; others are not."""
    words = ["-m", "megatron_distill.launch.roles", "student-server", str(folder.root), "--index", "1"]
    sleep = [sys.executable, "-c", "print('up', flush=True); input()"]
    with subprocess.Popen([*sleep, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        [found] = processes(folder)
        assert processes(RunFolder(folder.root / "other")) == []
        process.stdin.close()
    assert found["pid"] == process.pid
    assert found["name"] == "student-server 1"
    assert found["memory_gib"] > 0


@pytest.fixture(scope="module")
def chromium() -> None:
    reason = browser_module.install()
    if reason is not None:
        pytest.fail(reason)


@pytest.mark.heavy
def test_a_browser_follows_the_run_as_it_goes_on(
    chromium: None, folder: RunFolder, page: LivePage, tmp_path: Path
) -> None:
    """Curves grow, the timeline has its rows, tokens are coloured by their gap, logs open, the end shows: no reload."""
    record_step(folder, 1)
    (folder.logs / "trainer.out").write_text("Megatron says hello")
    with Browser(tmp_path / "profile") as browser:
        browser.open(page.url)
        browser.wait_for("document.body.dataset.looked === '1'")
        assert "Nothing" not in browser.evaluate("document.getElementById('cards').innerText")
        for step in range(2, 8):
            record_step(folder, step)
        append(folder.metrics, {"step": 7.0, "loss": 1 / 7, "step_s": 2.0, "grad_norm": math.nan})
        browser.wait_for("document.title === 'watched 7/8'")
        (folder.evals / "math500").mkdir(parents=True)
        for step, value in ((0, 0.25), (8, 0.5)):
            summary = {"step": step, "k": 4, "avg_at_k": value, "pass_at_k": value}
            write_json(folder.evaluation("math500", step), {"summary": summary, "responses": []})
        browser.wait_for(
            "[...document.querySelectorAll('.card h3')].some((h) => h.textContent === 'Accuracy on math500')"
        )
        drawn = browser.evaluate("document.querySelector('path[data-name=loss]').getAttribute('d').split('L').length")
        assert drawn == 7
        assert "0.143" in browser.evaluate("document.getElementById('cards').textContent")

        browser.evaluate("document.querySelector('[data-tab=timeline]').click()")
        browser.wait_for("document.querySelectorAll('#gantt rect').length > 10")
        assert "trainer" in browser.evaluate("document.getElementById('gantt').textContent")
        assert "trained 25%" in browser.evaluate("document.getElementById('shares').innerText")

        browser.evaluate("document.querySelector('[data-tab=samples]').click()")
        browser.wait_for("document.querySelectorAll('.sample .text span').length === 2")
        colours = browser.evaluate("[...document.querySelectorAll('.sample .text span')].map(x => x.style.background)")
        assert colours[0].startswith("rgba(213, 94, 0, 0.65") and colours[1].startswith("rgba(0, 114, 178, 0.05")
        assert HOSTILE in browser.evaluate("document.querySelector('.prompt').textContent")
        assert browser.evaluate("document.querySelectorAll('#sample-list img').length") == 0

        browser.evaluate("document.querySelector('[data-tab=processes]').click()")
        browser.wait_for("document.querySelector('#log-names button')")
        browser.evaluate("document.querySelector('#log-names button').click()")
        browser.wait_for("document.getElementById('log').textContent === 'Megatron says hello'")

        record_step(folder, 8)
        write_json(folder.finished, {"step": 8})
        browser.wait_for("document.getElementById('status').textContent === 'finished'")
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_command_prints_where_to_look_and_ends_on_ctrl_c(folder: RunFolder) -> None:
    """``megatron-distill watch RUN`` prints one line with the address, answers there, and leaves with Ctrl-C, saying so."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
    )
    code += "from megatron_distill.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "watch", str(folder.root)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, start_new_session=True) as process:
        assert process.stdout is not None and process.stderr is not None
        address = process.stdout.readline().split()[0]
        assert json.loads(get(address, "run")[1])["config"]["name"] == "watched"
        os.killpg(process.pid, signal.SIGINT)
        assert "the page has ended, the run has not" in process.stderr.read()
    assert process.returncode == 130
