"""What a step of a recipe takes, and who idles meanwhile: the second page of ``megatron-distill plan RECIPE``.

In: a recipe and the models' shapes. Out: latencies by arithmetic on an H100's rates, what ``launch.simulation`` makes of them
one design after the other, and a timeline in letters. All of it is paper: no number here was measured on a GPU.
"""

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from megatron_distill.config import RunConfig
from megatron_distill.errors import ConfigError
from megatron_distill.launch.fit import FLOPS, active_parameters, step_seconds
from megatron_distill.launch.launch import server_groups
from megatron_distill.launch.memory import WEIGHT_BYTES, num_parameters, server_memory
from megatron_distill.launch.simulation import Design, Play, Response, Servers, Setting, Shares, Span, Step, play
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.rollouts.source import IN_FLIGHT

MEMORY_BYTES_PER_S = 0.8 * 3.35e12  # that decoding reads weights and cache with: 80 % of an H100's peak
TOKEN_S = 2e-3  # of a decoding step, however small the model: kernels, sampling, the scheduler
DISK_BYTES_PER_S = 4e9  # of a shared disk, to all who read and write it at once
GATHER_BYTES_PER_S = 20e9  # of weights, from all ranks into rank 0's host memory
BROADCAST_BYTES_PER_S = 5e9  # of weights, from there into the servers, bucket by bucket
SIGMA = 0.5  # of the logarithm of a made-up length
MEASURED = ("token_s", "score_s", "train_s", "sync_s", "push_s")
"""What may be given: a token of a response alone on its server, the scores of a mean response, training a mean step, gathering
its weights, bringing them to the servers."""
IN_FLIGHT_STEPS = 4  # that are shown, unless the recipe says how many
WARM_UP_STEPS = 4  # before those that a mean is taken over, for each step ahead once more
NUM_STEPS, NUM_RESPONSES = 16, 1280  # that a mean is taken over, at least
WIDTH = 80  # letters of the timeline
SHADES = "·░▒▓█"


def made_up_lengths(longest: int, number: int, seed: int) -> list[int]:
    """Lengths of responses of which nothing is known but their cap.

    Log-normal with a median of half of ``longest`` and a sigma of 0.5, cut at ``longest``: 54 % of it in the mean, and one in
    twelve ends at the cap. So the longest of a step is nearly always as long as it may be.
    """
    rng = random.Random(seed)
    lengths = (rng.lognormvariate(math.log(longest / 2), SIGMA) for _ in range(number))
    return [max(1, min(longest, int(length))) for length in lengths]


def mean_length(longest: int) -> float:
    """What ``made_up_lengths`` come to in the mean."""
    cap, normal = math.log(2) / SIGMA, NormalDist().cdf
    return longest * (math.exp(SIGMA**2 / 2) / 2 * normal(cap - SIGMA) + 1 - normal(cap))


# --- latencies on paper -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paper:
    """A recipe's latencies.

    Attributes:
        setting: servers and weights.
        train_s: of a step of mean length; others take their share by tokens.
        measured: what was given, by the names of ``MEASURED``; the rest is arithmetic.
    """

    setting: Setting
    train_s: float
    measured: Mapping[str, float]


def on_paper(
    config: RunConfig, student: HfConfig, teacher: HfConfig | None, gpu_gib: float, measured: Mapping[str, float]
) -> Paper:
    """The arithmetic, by the constants above; what was ``measured`` takes its place."""
    groups, mean = server_groups(config), _prompt_tokens(config) + mean_length(config.max_horizon_tokens)
    replicas, tp = groups["student"]
    longest = config.data.max_prompt_tokens + config.max_horizon_tokens
    prefix_s = 2 * active_parameters(student) / (tp * FLOPS)  # a token
    token_s = _token_s(config, student, tp)
    room = server_memory(config, student, tp, gpu_gib)[1] // longest
    students = Servers(
        number=replicas,
        seats=max(1, min(room, config.servers.requests_per_replica * config.student.parallel.dp)),
        token_s=measured.get("token_s", token_s(1)),
        request_s=prefix_s * _prompt_tokens(config),
        slowdown=lambda taken: token_s(taken) / token_s(1),
    )
    teachers = None
    if teacher is not None and "teacher" in groups:
        number, teacher_tp = groups["teacher"]
        score_s = measured.get("score_s", 2 * active_parameters(teacher) / (teacher_tp * FLOPS) * mean)
        teachers = Servers(number, seats=1, token_s=score_s / mean)  # bound by multiplications: two take twice as long
    weights = num_parameters(student) * WEIGHT_BYTES[config.student.dtype]
    if config.servers.weight_sync == "disk":
        sync_s, push_s = weights / DISK_BYTES_PER_S, weights * replicas / DISK_BYTES_PER_S
    else:
        sync_s, push_s = weights / GATHER_BYTES_PER_S, weights / BROADCAST_BYTES_PER_S
    sync_s, push_s = measured.get("sync_s", sync_s), measured.get("push_s", push_s)
    clock_s = sum(step_seconds(config, student, teacher).values())  # of the longest prompts and responses
    train_s = measured.get("train_s", clock_s * mean / longest)
    return Paper(Setting(students, teachers, sync_s, push_s, prefix_s), train_s, measured)


def _token_s(config: RunConfig, model: HfConfig, tp: int) -> Callable[[int], float]:
    """Seconds of a decoding step with so many responses at once, halfway through a mean one."""
    size = WEIGHT_BYTES[config.student.dtype]
    cached = 2 * model.num_layers * max(model.num_query_groups / tp, 1) * model.head_dim * size
    context = _prompt_tokens(config) + mean_length(config.max_horizon_tokens) / 2

    @functools.cache
    def seconds(taken: int) -> float:
        read = active_parameters(model, taken) * size / tp + taken * context * cached
        return TOKEN_S + read / MEMORY_BYTES_PER_S

    return seconds


def _prompt_tokens(config: RunConfig) -> int:
    return config.data.max_prompt_tokens // 2


def parse_measured(text: str) -> dict[str, float]:
    """``NAME=SECONDS,...``, names of ``MEASURED``.

    Raises:
        ConfigError: another name, or no positive number.
    """
    measured = {}
    for one in text.split(","):
        name, _, value = one.partition("=")
        try:
            measured[name] = float(value)
        except ValueError:
            measured[name] = math.nan
        if name not in MEASURED or not 0 < measured[name] < math.inf:
            raise ConfigError(
                f"--measured = {one}: must be NAME=SECONDS, a positive number for {', '.join(MEASURED)}. Each takes the place "
                "of arithmetic. Type for example --measured train_s=3.2,sync_s=4."
            )
    return measured


# --- the designs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One design of a recipe.

    Attributes:
        name: in words.
        design: what was played.
        play: of made-up lengths.
        first: the first step that counts, 0-based.
        shares: a mean step of them.
        capped_s: of a step whose responses are all as long as they may be.
    """

    name: str
    design: Design
    play: Play
    first: int
    shares: Shares
    capped_s: float


def rows(config: RunConfig, paper: Paper) -> list[Row]:
    """Every design, the slowest first."""
    own = config.rollouts.max_staleness_steps
    in_flight = own if own >= IN_FLIGHT else IN_FLIGHT_STEPS
    designs = {
        "one after the other": Design(0, streams=False),
        "scores streamed": Design(0),
        "one step ahead": Design(1),
        f"{in_flight} steps in flight": Design(in_flight),
    }
    longest, number, made = config.max_horizon_tokens, config.rollouts_per_step, []
    for name, design in designs.items():
        first = WARM_UP_STEPS * (1 + design.ahead)
        last = first + max(NUM_STEPS, NUM_RESPONSES // number)
        num_steps = last + design.ahead
        drawn = [_step(config, paper, made_up_lengths(longest, number, config.seed + n)) for n in range(num_steps)]
        capped = [_step(config, paper, [longest] * number)] * num_steps
        played = play(drawn, paper.setting, design)
        capped_s = play(capped, paper.setting, design).shares(first, last).step_s
        made.append(Row(name, design, played, first, played.shares(first, last), capped_s))
    return made


def _step(config: RunConfig, paper: Paper, lengths: Sequence[int]) -> Step:
    prompt = _prompt_tokens(config)
    share = (prompt + sum(lengths) / len(lengths)) / (prompt + mean_length(config.max_horizon_tokens))
    return Step(tuple(Response(prompt, tokens) for tokens in lengths), paper.train_s * share)


# --- the page ---------------------------------------------------------------------------------------------------------


def render(config: RunConfig, paper: Paper) -> str:
    """The page: assumptions, the table, the timeline."""
    title = "a step on paper: arithmetic for H100s, " + (
        "but for what was measured" if paper.measured else "not measured"
    )
    if min(config.rollouts.student_prefix_frac.values) < 1:
        return f"{title}\n  only where the student writes every response: rollouts.student_prefix_frac=1"
    made = rows(config, paper)
    return "\n".join([title, *_assumptions(config, paper), "", *_table(config, made), "", *_timeline(made)])


def _assumptions(config: RunConfig, paper: Paper) -> list[str]:
    students, teachers, longest = paper.setting.student, paper.setting.teacher, config.max_horizon_tokens
    at_once = math.ceil(config.rollouts_per_step / students.number)
    alone, beside = (1e3 * students.token_s * students.slowdown(taken) for taken in (1, at_once))
    sync = config.servers.weight_sync
    rates = (DISK_BYTES_PER_S,) * 2 if sync == "disk" else (GATHER_BYTES_PER_S, BROADCAST_BYTES_PER_S)
    gathered, sent = (f"{rate / 1e9:g} GB/s" for rate in rates)

    def why(name: str, arithmetic: str) -> str:
        return "measured" if name in paper.measured else arithmetic

    lines = [
        f"  lengths   {mean_length(longest):,.0f} tokens in the mean: log-normal, median {longest // 2:,}, sigma {SIGMA}, "
        f"cut at {longest:,}; prompts {_prompt_tokens(config):,}",
        f"  student   a token {alone:.1f} ms alone, {beside:.1f} ms with {at_once} at once; {students.seats:,} seats a server: "
        + why("token_s", f"{MEMORY_BYTES_PER_S / 1e12:.2f} TB/s and {1e3 * TOKEN_S:g} ms"),
    ]
    if teachers is not None:
        rate = why("score_s", f"{FLOPS / 1e12:.0f} TFLOP/s a GPU")
        lines.append(f"  teacher   {1 / teachers.token_s:,.0f} tokens a second and server: {rate}")
    clock = why("train_s", "the clock of --fit, by the tokens of a mean step")
    lines.append(f"  trainer   {paper.train_s:.2f} s: {clock}")
    lines.append(
        f"  weights   {paper.setting.sync_s:.2f} s gathered: {why('sync_s', gathered)}; then {paper.setting.push_s:.2f} s to "
        f"the servers by {sync}: {why('push_s', sent)}"
    )
    return lines


def _table(config: RunConfig, made: Sequence[Row]) -> list[str]:
    groups = server_groups(config)
    gpus = {"trainer": config.num_ranks} | {
        role: math.prod(groups.get(role, (0, 0))) for role in ("student", "teacher")
    }
    lines = [
        f"{'':23}{'step, s':^18}{'idle, % of the time':^35}{'responses':>11}{'GPU-s':>9}",
        f"{'':23}{'mean':>8}{'at cap':>9} {'trainer':>9}{'student':>9}{'teacher':>9}{'all':>7}{'a server':>12}{'a step':>9}",
    ]
    for row in made:
        busy = {role: getattr(row.shares, role) for role in gpus}
        of_all = sum(busy[role] * number for role, number in gpus.items()) / sum(gpus.values())
        idle = [f"{1 - busy[role]:.0%}" if number else "-" for role, number in gpus.items()]
        is_recipes = row.design.streams and row.design.ahead == config.rollouts.max_staleness_steps
        lines.append(
            f"  {row.name:<19}{'*' if is_recipes else ' ':<2}{row.shares.step_s:>8.2f}{row.capped_s:>9.2f} "
            f"{idle[0]:>9}{idle[1]:>9}{idle[2]:>9}{1 - of_all:>7.0%}{row.shares.at_once:>12.1f}"
            f"{row.shares.step_s * sum(gpus.values()):>9,.0f}"
        )
    return [*lines, "  * this recipe: rollouts.max_staleness_steps. Who gathers weights, or waits for them, idles."]


def _timeline(made: Sequence[Row]) -> list[str]:
    """The same seconds of each design, from the end of a step on."""
    seconds = 1.25 * max(row.shares.step_s for row in made)
    lines = [
        f"{seconds:.3g} s of each: T trains, w gathers weights; servers at work: {' '.join(SHADES)} from none to all"
    ]
    for row in made:
        began = row.play.marks[row.first].at_s
        cells = [(began + seconds * n / WIDTH, began + seconds * (n + 1) / WIDTH) for n in range(WIDTH)]
        trains, sends = (_covered([spans], cells) for spans in (row.play.trained, row.play.gathered))
        trainer = (
            "T" if t > max(w, 0.2) else "w" if w > 0.2 else SHADES[0] for t, w in zip(trains, sends, strict=True)
        )
        lines += [f"  {row.name}", f"    {'trainer':<9}{''.join(trainer)}"]
        for role, servers in (("student", row.play.wrote), ("teacher", row.play.scored)):
            if servers:
                lines.append(f"    {role:<9}{''.join(map(_shade, _covered(servers, cells)))}")
    return lines


def _shade(share: float) -> str:
    darkest = len(SHADES) - 1
    return SHADES[min(math.ceil(share * darkest - 1e-9), darkest)]


def _covered(lanes: Sequence[Sequence[Span]], cells: Sequence[Span]) -> list[float]:
    """The share of each cell that the lanes' spans cover, a mean over lanes."""
    covered = [0.0] * len(cells)
    (start, end), stop = cells[0], cells[-1][1]
    width = end - start
    for lane in lanes:
        for began, ended in lane:
            if ended > start and began < stop:
                for number in range(max(0, int((began - start) / width)), len(cells)):
                    left, right = cells[number]
                    if left >= ended:
                        break
                    covered[number] += max(0.0, min(ended, right) - max(began, left))
    return [share / width / len(lanes) for share in covered]
