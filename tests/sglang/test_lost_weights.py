"""A whole trainer, of one rank, beside servers that a script plays: a server loses its weights whatever it is asked for."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_distill import config
from megatron_distill.config import RunConfig
from megatron_distill.config.loading import load_recipe
from megatron_distill.launch import endpoints
from megatron_distill.runs.run_folder import RunFolder, read_lines
from tests.support.fake_sglang import FakeSGLang, Handler, Json, reset, sample_reply

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]

TINY = [
    "student.parallel.tp=1",
    "num_steps=3",
    "rollouts.prompts_per_step=4",
    "micro_batch_rollouts=4",
    'curriculum={"kind": "entropy_gated", "ladder_tokens": [8, 9], "stage_steps": 2, "max_truncated_frac": 1}',
    "evaluation.num_problems=2",
    "evaluation.samples_per_problem=1",
    "evaluation.max_response_tokens=8",
    "evaluation.entropy_problems=1",
    "servers.weight_sync=disk",
]


class Played(FakeSGLang):
    """Answers as SGLang does, from no model. It may lose its weights, once, instead of its first answer with some version."""

    def __init__(self, key: str, model_dir: str, lost_version: str | None) -> None:
        super().__init__([self.answer])
        self.info = {"model_path": model_dir, "weight_version": "0"}
        self.updates: list[str] = []
        self.strangers = 0
        self._key, self._lost_version = key, lost_version
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler: Handler, request: Json) -> None:
        if handler.headers["Authorization"] != f"Bearer {self._key}":
            self.strangers += 1
            return handler.reply(401, {})
        if handler.path == "/update_weights_from_disk":
            self.info["weight_version"] = request["weight_version"]
            self.updates.append(request["weight_version"])
        if handler.path != "/generate":
            return handler.reply(200, {"success": True})
        if request["sampling_params"]["max_new_tokens"] == 0:
            return handler.reply(200, self._scores(request))
        if self.info["weight_version"] == self._lost_version:
            self._lost_version, self.info["weight_version"] = None, "0"
            return reset(handler, request)
        reply = sample_reply(request)
        reply["meta_info"]["weight_versions"][0]["version"] = self.info["weight_version"]
        return handler.reply(200, reply)

    def _scores(self, request: Json) -> Json:
        ids, start = request["input_ids"], request["logprob_start_len"]
        top = [[-3.0 - 0.01 * token, token, None] for token in range(request["top_logprobs_num"])]
        stops = [[-3.0, token, None] for token in request.get("token_ids_logprob", [])]
        num_tokens = len(ids) - start - 1
        meta = {
            "finish_reason": {"type": "length"},
            "prompt_tokens": len(ids),
            "weight_version": self.info["weight_version"],
            "input_token_logprobs": [[None, 0, None]] + [[-3.0, token, None] for token in ids[start + 1 :]],
            "input_top_logprobs": [None] + [top] * num_tokens,
            "input_token_ids_logprobs": [None] + [stops] * num_tokens,
        }
        return {"output_ids": [], "meta_info": meta}


def train(folder: RunFolder, run_config: RunConfig, lost_version: str | None = None) -> Played:
    """Run the trainer to its end; the student's server."""
    folder.create()
    endpoints.forget(folder)
    config.save(run_config, folder.config)
    student = Played(endpoints.key_of(folder), run_config.student.path, lost_version)
    teacher = Played(endpoints.key_of(folder), run_config.teacher.path, lost_version=None)
    for role, server in (("student", student), ("teacher", teacher)):
        endpoints.announce(folder, role, 0, server.url)
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "megatron_distill.launch.roles", "trainer", str(folder.root)]
    done = subprocess.run(command, env=os.environ | rank, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for server in (student, teacher):
        server.shutdown()
        server.server_close()
        assert server.strangers == 0
    return student


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run in which nothing happens."""
    folder = RunFolder(tmp_path_factory.mktemp("whole"))
    assert train(folder, config.with_overrides(load_recipe("tiny.quickstart"), TINY)).updates == ["1", "2", "3"]
    return folder


@pytest.mark.parametrize(
    ("lost_version", "updates"),
    [("1", ["1", "1", "2", "3"]), ("2", ["1", "2", "2", "3"]), ("3", ["1", "2", "3", "3"])],
    ids=["in a step", "in a decision", "in an evaluation"],
)
def test_a_server_that_lost_its_weights_gets_them_again_and_the_run_ends_with_the_same_bits(
    whole: RunFolder, tmp_path: Path, lost_version: str, updates: list[str]
) -> None:
    """Its connection breaks in the middle of what first asks for a version: version 1 draws a step, 2 is measured for the
    curriculum's decision, 3 is evaluated at the end. It comes back with the weights that it began with, and is given the lost
    ones once more before it draws anything; metrics, decision and evaluation are those of a run in which nothing happened."""
    broken = RunFolder(tmp_path / "broken")
    run_config = config.with_overrides(load_recipe("tiny.quickstart"), TINY)
    assert train(broken, run_config, lost_version).updates == updates
    assert any("started again" in event["text"] for event in read_lines(broken.events))
    timed = ("_s", "_per_s")
    for ours, theirs in zip(read_lines(broken.metrics), read_lines(whole.metrics), strict=True):
        assert {name: value for name, value in ours.items() if not name.endswith(timed)} == {
            name: value for name, value in theirs.items() if not name.endswith(timed)
        }
    assert len(list(read_lines(whole.curriculum))) == 1
    assert list(read_lines(broken.curriculum)) == list(read_lines(whole.curriculum))
    assert broken.evaluations() == whole.evaluations()


def test_in_flight_nothing_older_than_the_limit_is_trained_on(tmp_path: Path) -> None:
    """Two steps are drawn beside the one that trains. A server falls back to the weights that it began with in the middle of
    one of them: that step is drawn by newer weights, or asked for again, and every step learns from all of its prompts."""
    folder = RunFolder(tmp_path / "in-flight")
    in_flight = [
        "num_steps=6",
        "rollouts.max_staleness_steps=2",
        'curriculum={"kind": "schedule", "horizon_tokens": 8}',
    ]
    run_config = config.with_overrides(load_recipe("tiny.quickstart"), [*TINY, *in_flight])
    updates = train(folder, run_config, lost_version="3").updates
    assert list(dict.fromkeys(updates)) == ["1", "2", "3", "4", "5", "6"]
    steps = list(read_lines(folder.metrics))
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(step["staleness_steps"] <= 2 and step["response_tokens"] == 8 for step in steps)
    assert max(step["staleness_steps"] for step in steps) > 0
