"""How much of a step overlaps: the real trainer beside emulated servers, one step after another, one ahead, and in flight.

    python benchmarks/overlap.py                    staleness 0, 1, 2 and 4: minutes
    python benchmarks/overlap.py --sweep            and how a step grows with rollouts, lengths, servers, dp
    python benchmarks/overlap.py --json out.json    the rows, for docs/figures/overlap.py

The servers answer as SGLang does, after the time that a large model would take: a fixed time a token for the student, whatever
else it writes (up to a number of responses at once, the rest wait), a time a sequence for the teacher, and a time to load
weights, in which nobody writes. Nothing is computed for an answer, so both cores belong to the trainer. The bound of a step is
the sum of its phases where one follows the other, and the longer of drawing (load, write, score) and training (train, gather
weights) where they overlap; the phases are those measured at staleness 0, in the same run of this program. In flight no step
waits for its own longest response: the bound is then the longer of training and of the work that a step gives the servers'
seats, all of them taken, and of loading.

"simulated" is the mean step, measured / said by ``launch.simulation``, which ``megatron-distill plan`` prints: played with the
lengths, latencies and seats of these servers, and with what training and pushes took in the very run. What it leaves out (HTTP,
packing, metrics, cores that are shared) is what the ratio shows.
"""

import argparse
import base64
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from megatron_distill import config as config_module
from megatron_distill.config.loading import load_recipe
from megatron_distill.launch import endpoints
from megatron_distill.launch.launch import ROLE_ENV
from megatron_distill.launch.simulation import Design, Response, Servers, Setting, Step, play
from megatron_distill.rollouts.order import sampling_seed
from megatron_distill.runs.run_folder import RunFolder

Json = dict[str, Any]

STEPS, WARM_UP = 14, 5
STALENESS = (0, 1, 2, 4)
HORIZON_TOKENS = 160
STUDENT_TOKEN_S, TEACHER_SEQUENCE_S, LOAD_S = 0.012, 0.02, 0.3
AT_ONCE = 64  # responses that one server writes at a time
PROMPTS = 64
SWEEPS = {
    "rollouts": (16, 32, 64, 128, 256),
    "horizon_tokens": (40, 80, 160, 320),
    "replicas": (1, 2, 4, 8),
    "dp": (1, 2),
}
BESIDE = {"replicas": {"rollouts": 256}, "dp": {"rollouts": 256, "replicas": 4}}
"""What else a sweep sets: so many responses that one server, or one rank, is not enough."""
_RECIPE = (
    "tiny.quickstart",
    f"num_steps={STEPS}",
    "student.parallel.tp=1",
    "evaluation.num_problems=1",
    "evaluation.samples_per_problem=1",
    "evaluation.entropy_problems=1",
    "data.max_prompt_tokens=128",
)


# --- emulated servers -------------------------------------------------------------------------------------------------


class Emulated(ThreadingHTTPServer):
    """A server that takes its time and computes nothing."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, model_dir: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.info = {"model_path": model_dir, "weight_version": "0"}
        self.stood_s = 0.0  # still, loading weights
        self.changes = [(self.clock(), "0")]  # since when it has served which weights
        self.seats = threading.Semaphore(AT_ONCE)
        self.work_s, self.lock = 0.0, threading.Lock()  # that its seats were taken, added up
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def clock(self) -> float:
        """Seconds that stand still while weights are loaded."""
        return time.monotonic() - self.stood_s

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Emulated

    def do_GET(self) -> None:
        self._reply(self.server.info)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        if self.path == "/update_weights_from_disk":
            self.server.changes.append((self.server.clock(), request["weight_version"]))
            self.server.stood_s += LOAD_S  # from here on: who is writing sleeps for longer
            time.sleep(LOAD_S)
            self.server.info |= {key: request[key] for key in ("model_path", "weight_version")}
            self._reply({"success": True, "message": ""})
        elif self.path != "/generate":
            self._reply({"success": True, "message": ""})
        elif request["sampling_params"]["max_new_tokens"]:
            self._reply(self._write(request))
        else:
            self._reply(self._score(request))

    def _write(self, request: Json) -> Json:
        """A response whose length depends on its seed alone."""
        params = request["sampling_params"]
        longest = params["max_new_tokens"]
        length = length_of(params["sampling_seed"], longest)
        ids = np.random.default_rng(params["sampling_seed"]).integers(10, 200, length).tolist()
        finish: Json = {"type": "length", "length": length}
        if length < longest:
            ids[-1] = params["stop_token_ids"][0]
            finish = {"type": "stop", "matched": ids[-1]}
        with self.server.seats:
            began = self.server.clock()
            while (left := began + length * STUDENT_TOKEN_S - self.server.clock()) > 0:
                time.sleep(left)
        with self.server.lock:
            self.server.work_s += length * STUDENT_TOKEN_S
        spans = _spans(self.server.changes, began, length)
        meta = {"finish_reason": finish, "prompt_tokens": len(request["input_ids"]), "weight_versions": spans}
        return {
            "output_ids": ids,
            "meta_info": meta | {"output_token_logprobs": [[-1.0, token, None] for token in ids]},
        }

    def _score(self, request: Json) -> Json:
        """A uniform top k; what it says does not matter here."""
        ids, start, k = request["input_ids"], request["logprob_start_len"], request["top_logprobs_num"]
        response = ids[start + 1 :]
        with self.server.seats:
            time.sleep(TEACHER_SEQUENCE_S)
        logprob = -float(np.log(2 * k))
        tops = np.tile(np.arange(k, dtype=np.int32), (len(response), 1))
        meta: Json = {"finish_reason": {"type": "length", "length": 0}, "prompt_tokens": len(ids)}
        meta |= {
            "weight_version": self.server.info["weight_version"],
            "input_top_logprobs_shape": tops.shape,
            "input_top_logprobs_null_prefix": 1,
        }
        for key, array in (("idx", tops), ("val", np.full(tops.shape, logprob, np.float32))):
            name = f"input_top_logprobs_{key}_flat_b64"
            meta |= {name: base64.b64encode(array.tobytes()).decode(), f"{name}_dtype": str(array.dtype)}
        meta["input_token_logprobs"] = [None, *([logprob, token, None] for token in response)]
        stops = request.get("token_ids_logprob", [])
        meta["input_token_ids_logprobs"] = [None] + [[[logprob, token, None] for token in stops]] * len(response)
        return {"meta_info": meta}

    def _reply(self, body: Json) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def length_of(seed: int, longest: int) -> int:
    """Tokens of the response that a seed draws: lognormal, a median of half the longest, cut at it."""
    return int(min(longest, max(2, np.random.default_rng(seed).lognormal(np.log(longest / 2), 0.5))))


def _spans(changes: list[tuple[float, str]], began: float, length: int) -> list[Json]:
    """Which weights drew which of ``length`` tokens, the first of them at ``began``."""
    first_tokens = [int(np.clip(np.ceil((since - began) / STUDENT_TOKEN_S), 0, length)) for since, _ in changes]
    ends = [*first_tokens[1:], length]
    spans = zip(changes, first_tokens, ends, strict=True)
    return [{"version": version, "start": start, "end": end} for (_, version), start, end in spans if start < end]


@contextlib.contextmanager
def emulated(config: config_module.RunConfig, folder: RunFolder) -> Iterator[list[Emulated]]:
    """All servers of a run, the student's first, announced where the trainer looks for them."""
    endpoints.forget(folder)
    servers: list[Emulated] = []
    counts = {"student": config.servers.student_replicas, "teacher": config.servers.teacher_replicas}
    for role, number in counts.items():
        for index in range(number):
            servers.append(Emulated(getattr(config, role).path))
            endpoints.announce(folder, role, index, servers[-1].url)
    try:
        yield servers
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Medians over a run's steps after the warm-up, seconds.

    Attributes:
        rollouts: responses a step.
        horizon_tokens: the longest response.
        replicas: of the student's servers, as many of the teacher's.
        staleness: ``rollouts.max_staleness_steps``.
        step_s: from one step to the next.
        mean_step_s: the same, a mean.
        simulated_s: what ``launch.simulation`` makes of the servers' latencies and of what training and pushes took.
        draw_s: until the step's samples were there, written, scored and judged; ahead, what was waited for.
        train_s: forward, backward and optimizer.
        sync_s: gathering weights, and waiting until the last have arrived.
        push_s: from gathered to served.
        work_s: what writing a step takes if no seat of the student's servers is ever free.
        staleness_steps: age of the oldest token of a response, a mean.
        varies: the quantity that its sweep changes.
        dp: trainer ranks, each with a replica of the student.
    """

    rollouts: int
    horizon_tokens: int
    replicas: int
    staleness: int
    step_s: float
    mean_step_s: float
    simulated_s: float
    draw_s: float
    train_s: float
    sync_s: float
    push_s: float
    work_s: float
    staleness_steps: float
    varies: str = "staleness"
    dp: int = 1


def measure(
    staleness: int,
    rollouts: int = PROMPTS,
    horizon_tokens: int = HORIZON_TOKENS,
    replicas: int = 1,
    dp: int = 1,
    varies: str = "staleness",
) -> Row:
    """One run of the real trainer."""
    overrides = [
        f"rollouts.max_staleness_steps={staleness}",
        f"rollouts.prompts_per_step={rollouts}",
        f"curriculum.horizon_tokens={horizon_tokens}",
        f"student.parallel.dp={dp}",
        f"servers.student_replicas={replicas}",
        f"servers.teacher_replicas={replicas}",
        f"evaluation.max_response_tokens={horizon_tokens}",
    ]
    recipe, *words = _RECIPE
    config = config_module.with_overrides(load_recipe(recipe), [*words, *overrides])
    with tempfile.TemporaryDirectory() as root:
        folder = RunFolder(Path(root) / "run")
        folder.create()
        config_module.save(config, folder.config)
        with emulated(config, folder) as servers, (folder.logs / "trainer.out").open("w") as out:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={dp}"]
            command += ["-m", "megatron_distill.launch.roles", "trainer", str(folder.root)]
            ended = subprocess.run(command, stdout=out, stderr=out, env=os.environ | ROLE_ENV, check=False)
        if ended.returncode:
            raise SystemExit((folder.logs / "trainer.out").read_text()[-3000:])
        all_steps = folder.steps()
    if len(all_steps) < STEPS:
        raise SystemExit(f"ended after step {len(all_steps)} of {STEPS}: {folder.events.read_text().splitlines()[-1]}")
    steps = all_steps[WARM_UP:-1]  # the last one is followed by an evaluation
    names = ("step_s", "train_s", "sync_s", "push_s", "staleness_steps")
    medians = {name: statistics.median(one[name] for one in steps) for name in names}
    medians["work_s"] = sum(server.work_s for server in servers[:replicas]) / AT_ONCE / replicas / STEPS
    medians["mean_step_s"] = statistics.mean(one["step_s"] for one in steps)
    medians["simulated_s"] = simulate(config, all_steps)
    drawn = statistics.median(one["rollout_s"] + one["score_s"] for one in steps)
    return Row(rollouts, horizon_tokens, replicas, staleness, dp=dp, draw_s=drawn, varies=varies, **medians)


def simulate(config: config_module.RunConfig, measured: list[Json]) -> float:
    """A mean step of the same run in ``launch.simulation``: the same lengths, latencies and seats, training as it was."""
    count, longest = config.rollouts_per_step, config.max_horizon_tokens
    steps = []
    for number, one in enumerate(measured):
        seeds = (sampling_seed(config.seed, number * count + place) for place in range(count))
        steps.append(Step(tuple(Response(0, length_of(seed, longest)) for seed in seeds), one["train_s"]))
    setting = Setting(
        student=Servers(config.servers.student_replicas, AT_ONCE, STUDENT_TOKEN_S),
        teacher=Servers(config.servers.teacher_replicas, AT_ONCE, 0.0, request_s=TEACHER_SEQUENCE_S),
        sync_s=statistics.mean(one["sync_s"] for one in measured[WARM_UP:-1]),
        push_s=statistics.mean(one["push_s"] for one in measured[WARM_UP:-1]),
    )
    played = play(steps, setting, Design(config.rollouts.max_staleness_steps))
    return played.shares(WARM_UP, len(steps) - 1).step_s


# --- the whole --------------------------------------------------------------------------------------------------------


def overlap() -> list[Row]:
    """Each staleness, and how near it comes to its bound."""
    print(
        "| staleness | measured | step, s | bound, s | step / bound | trainer idle | seats empty | of serial | simulated |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows = [measure(staleness) for staleness in STALENESS]
    print_overlap(rows)
    many = {"rollouts": 192, "horizon_tokens": 40, "replicas": 4, "varies": "many short responses"}
    short = [measure(staleness, **many) for staleness in STALENESS[:2]]  # type: ignore[arg-type]
    print_overlap(short)
    return rows + short


def print_overlap(rows: list[Row]) -> None:
    """A line each, beside the bound that the first, at staleness 0, gives."""
    serial = rows[0]
    draw, train = serial.push_s + serial.draw_s, serial.train_s + serial.sync_s
    for row in rows:
        bound = {0: draw + train, 1: max(draw, train)}.get(row.staleness, max(row.push_s + row.work_s, train))
        idle = (1 - min(1, busy / row.step_s) for busy in (train, row.work_s))
        shares = " | ".join(f"{share:.0%}" for share in idle)
        print(
            f"| {row.staleness} | {row.staleness_steps:.1f} | {row.step_s:.2f} | {bound:.2f} | {row.step_s / bound:.2f} "
            f"| {shares} | {row.step_s / serial.step_s:.2f} | {row.mean_step_s:.2f} / {row.simulated_s:.2f} = "
            f"{row.mean_step_s / row.simulated_s:.2f} |",
            flush=True,
        )


def sweep() -> list[Row]:
    """One quantity at a time, at staleness 0."""
    rows = []
    print("\n| rollouts | horizon, tokens | replicas | dp | step, s | draw, s | train, s | sync, s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, values in SWEEPS.items():
        for value in values:
            row = measure(0, varies=name, **BESIDE.get(name, {}) | {name: value})
            rows.append(row)
            seconds = " | ".join(f"{part:.2f}" for part in (row.step_s, row.draw_s, row.train_s, row.sync_s))
            print(f"| {row.rollouts} | {row.horizon_tokens} | {row.replicas} | {row.dp} | {seconds} |", flush=True)
    return rows


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="more rollouts, longer ones, more servers, more ranks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args()
    rows = overlap() + (sweep() if options.sweep else [])
    if options.json:
        options.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


if __name__ == "__main__":
    main()
