"""Who works when, played event by event: what a step takes at each staleness, before anything runs.

In: the responses of a few steps, how long servers take for each, what training and a push of weights take. Out: when each step
ended, and how busy everybody was. Computes nothing else: no model, no clock, no torch.

    trainer    wait  train 0 .......... sync | train 1 ...             the loop of ``training.cycle``
    student    write write write             | load  write ...         a queue, and seats that share a server's pace
    teacher         score  score  score      |             score ...   each response once it is written

What lies in this model: seats and queues, a pace that may depend on the seats taken, responses that are scored as they end,
which steps may be drawn beside training (``rollouts.ahead``), servers that stand still for weights. What does not: evaluation,
rewards, packing, the tokens' way over the wire, restarts.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_distill.errors import ConfigError
from megatron_distill.rollouts.source import IN_FLIGHT


@dataclass(frozen=True)
class Response:
    """One response of a step.

    Attributes:
        prompt_tokens: before it.
        tokens: of it, at least 1.
    """

    prompt_tokens: int
    tokens: int


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        responses: in the order in which they are asked for.
        train_s: forward, backward and optimizer.
    """

    responses: tuple[Response, ...]
    train_s: float


def _same(taken: int) -> float:
    return 1.0


@dataclass(frozen=True)
class Servers:
    """Servers that do the same.

    Attributes:
        number: of servers; a request goes to the one with the fewest seats taken.
        seats: requests that one works on at a time; the others queue, first come, first served.
        request_s: of a request, whatever its length.
        token_s: of each of its tokens, alone on its server.
        slowdown: by how much everything takes longer with so many seats taken; 1 with one.
    """

    number: int
    seats: int
    token_s: float
    request_s: float = 0.0
    slowdown: Callable[[int], float] = _same


@dataclass(frozen=True)
class Setting:
    """Everything that is not a response.

    Attributes:
        student: servers that write.
        teacher: servers that score prompts and responses; None if nobody does.
        sync_s: that the trainer gathers weights, and does nothing else.
        push_s: that it then takes until the student's servers, which stand still, have them.
        recompute_token_s: how much longer a student's server stands still for each token that it then has in its seats.
    """

    student: Servers
    teacher: Servers | None
    sync_s: float
    push_s: float = 0.0
    recompute_token_s: float = 0.0


@dataclass(frozen=True)
class Design:
    """How drawing and training follow each other.

    Attributes:
        ahead: steps that are drawn beside the one that trains: ``rollouts.max_staleness_steps``.
        streams: a response is scored when it ends; False: when all of its step have ended.
    """

    ahead: int
    streams: bool = True

    @property
    def drains(self) -> bool:
        """Whether what is being drawn ends before each push."""
        return self.ahead < IN_FLIGHT


@dataclass(frozen=True)
class Mark:
    """The sums at one moment, all in seconds.

    Attributes:
        at_s: since the beginning.
        trainer_s: that it trained.
        student_s: that a student's server wrote, of all of them together.
        seats_s: that its seats were taken, of all of them together.
        teacher_s: that a teacher's server scored, of all of them together.
    """

    at_s: float = 0.0
    trainer_s: float = 0.0
    student_s: float = 0.0
    seats_s: float = 0.0
    teacher_s: float = 0.0


@dataclass(frozen=True)
class Shares:
    """A mean step, and the share of it that each worked. Who waits for weights, or gathers them, idles.

    Attributes:
        step_s: from one gathering of weights to the next.
        trainer: trained.
        student: wrote, a mean over its servers; one seat taken is enough.
        teacher: scored, a mean over its servers; 0 if there are none.
        at_once: responses that a student's server had in its seats, a mean.
    """

    step_s: float
    trainer: float
    student: float
    teacher: float
    at_once: float


Span = tuple[float, float]


@dataclass(frozen=True)
class Play:
    """What happened.

    Attributes:
        marks: the beginning, and the end of each step, its weights gathered.
        trained: when the trainer trained.
        gathered: when it gathered weights.
        wrote: when each of the student's servers wrote.
        scored: when each of the teacher's servers scored.
        num_events: responses that were written or scored.
    """

    marks: tuple[Mark, ...]
    trained: tuple[Span, ...]
    gathered: tuple[Span, ...]
    wrote: tuple[tuple[Span, ...], ...]
    scored: tuple[tuple[Span, ...], ...]
    num_events: int

    def shares(self, first: int = 0, last: int | None = None) -> Shares:
        """The mean over the steps from ``first`` to the one before ``last``, 0-based."""
        last = len(self.marks) - 1 if last is None else last
        begin, end = self.marks[first], self.marks[last]
        seconds = end.at_s - begin.at_s
        students, teachers = seconds * len(self.wrote), seconds * len(self.scored)
        return Shares(
            step_s=seconds / (last - first),
            trainer=(end.trainer_s - begin.trainer_s) / seconds,
            student=(end.student_s - begin.student_s) / students,
            teacher=(end.teacher_s - begin.teacher_s) / teachers if teachers else 0.0,
            at_once=(end.seats_s - begin.seats_s) / students,
        )


def play(steps: Sequence[Step], setting: Setting, design: Design) -> Play:
    """Let the trainer and the servers work through ``steps``.

    Leave the first steps out of a mean, at which nothing was ahead yet, and the last ``design.ahead``, beside which fewer steps
    are drawn.

    Raises:
        ConfigError: a number without a meaning: no responses, no seats, negative seconds.
    """
    _check(steps, setting, design)
    draws = _Draws(steps, setting, design)
    marks, trained, gathered, trainer_s, arrival_s = [Mark()], [], [], 0.0, 0.0
    draws.begin(0)
    draws.wait(0)
    draws.begin(design.ahead)
    for number, step in enumerate(steps):
        began = draws.now
        draws.pass_time(step.train_s)
        trained.append((began, draws.now))
        trainer_s += step.train_s
        if design.drains and design.ahead:
            draws.wait(number + 1)
        draws.pass_time(max(0.0, arrival_s - draws.now))  # of the weights before these
        began = draws.now
        draws.pass_time(setting.sync_s)
        gathered.append((began, draws.now))
        draws.stand_still()
        arrival_s = draws.now + setting.push_s
        marks.append(draws.mark(trainer_s))
        draws.begin(number + 1 + design.ahead)
        draws.wait(number + 1)
    return Play(tuple(marks), tuple(trained), tuple(gathered), *draws.spans(), draws.num_events)


def _check(steps: Sequence[Step], setting: Setting, design: Design) -> None:
    problems = []

    def must(holds: bool, where: str, value: object, rule: str) -> None:
        if not holds:
            problems.append(f"{where} = {value}: {rule}. There is nothing to simulate otherwise. Give such a number.")

    must(bool(steps), "steps", len(steps), "must be one at least")
    must(design.ahead >= 0, "ahead", design.ahead, "must be at least 0")
    must(design.streams or not design.ahead, "ahead", design.ahead, "must be 0 where scores wait for their step")
    for number, step in enumerate(steps):
        must(bool(step.responses), f"responses of step {number}", 0, "must be one at least")
        must(_is_time(step.train_s), f"train_s of step {number}", step.train_s, "must be seconds, 0 or more")
        for one in step.responses:
            sound = one.tokens >= 1 and one.prompt_tokens >= 0
            must(sound, f"a response of step {number}", one, "must have 1 token at least, and its prompt 0")
    for name in ("sync_s", "push_s", "recompute_token_s"):
        must(_is_time(getattr(setting, name)), name, getattr(setting, name), "must be seconds, 0 or more")
    for name, servers in (("student", setting.student), ("teacher", setting.teacher)):
        if servers is None:
            continue
        must(servers.number >= 1 and servers.seats >= 1, f"{name} servers", servers, "must have a server and a seat")
        sound = _is_time(servers.request_s) and _is_time(servers.token_s) and servers.request_s + servers.token_s > 0
        must(sound, f"{name} servers", servers, "must take some time for a request or a token")
    if problems:
        raise ConfigError("\n".join(problems))


def _is_time(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds >= 0


# --- servers ----------------------------------------------------------------------------------------------------------


@dataclass(order=True)
class _Seated:
    """A request in a seat, ordered by when it ends."""

    ends: float  # in seconds of work, as its server would count them alone
    number: int
    work_s: float = field(compare=False)
    step: int = field(compare=False)
    response: Response = field(compare=False)


class _Server:
    """One server. All of its seats go on at the same pace, so that one count of work done serves all."""

    def __init__(self, slowdown: Callable[[int], float]) -> None:
        self._slowdown = slowdown
        self._now = self._stands_until = self._work = 0.0
        self._seated: list[_Seated] = []
        self.busy_s = self.seats_s = 0.0
        self.spans: list[Span] = []
        self.edition = 0  # of what is known about its next end

    @property
    def taken(self) -> int:
        return len(self._seated)

    def move(self, now: float) -> None:
        """Work until ``now``."""
        began = min(max(self._now, self._stands_until), now)
        if self._seated and now > began:
            seconds = now - began
            self._work += seconds / self._slowdown(self.taken)
            self.busy_s += seconds
            self.seats_s += seconds * self.taken
            if self.spans and self.spans[-1][1] == began:
                began = self.spans.pop()[0]
            self.spans.append((began, now))
        self._now = now

    def sit(self, number: int, work_s: float, step: int, response: Response) -> None:
        heapq.heappush(self._seated, _Seated(self._work + work_s, number, work_s, step, response))

    def next_end(self) -> float:
        left = max(self._seated[0].ends - self._work, 0.0)
        return max(self._now, self._stands_until) + left * self._slowdown(self.taken)

    def end(self) -> _Seated:
        ended = heapq.heappop(self._seated)
        self._work = max(self._work, ended.ends)
        return ended

    def stand_still(self, push_s: float, token_s: float) -> None:
        """Take weights, then compute the prefixes of all seats anew."""
        held = sum(
            one.response.prompt_tokens + one.response.tokens * (1 - (one.ends - self._work) / one.work_s)
            for one in self._seated
        )
        self._stands_until = self._now + push_s + token_s * held


class _Draws:
    """The servers, their queues, and how much of each step is drawn."""

    def __init__(self, steps: Sequence[Step], setting: Setting, design: Design) -> None:
        self._steps, self._setting, self._streams = steps, setting, design.streams
        groups = {"student": setting.student} | ({"teacher": setting.teacher} if setting.teacher else {})
        self._groups = groups
        self._servers = {role: [_Server(group.slowdown) for _ in range(group.number)] for role, group in groups.items()}
        self._queues: dict[str, deque[tuple[int, Response]]] = {role: deque() for role in groups}
        self._free = {role: [(0, place) for place in range(group.number)] for role, group in groups.items()}
        self._ends: list[tuple[float, int, str, int, int]] = []  # when, who, as known at which edition
        self._numbers = itertools.count()
        self._begun = 0
        self._to_write = [len(step.responses) for step in steps]
        self._to_score = list(self._to_write) if setting.teacher else [0] * len(steps)
        self.now, self.num_events = 0.0, 0

    # --- what the trainer does

    def begin(self, last: int) -> None:
        """Ask for the responses of all steps up to ``last`` that were not asked for yet."""
        while self._begun <= min(last, len(self._steps) - 1):
            self._ask("student", self._begun, self._steps[self._begun].responses)
            self._begun += 1

    def wait(self, step: int) -> None:
        """Let time pass until ``step``, if there is one, is drawn."""
        while step < len(self._steps) and self._to_write[step] + self._to_score[step]:
            self._event()

    def pass_time(self, seconds: float) -> None:
        """Let so much time pass."""
        until = self.now + seconds
        while self._ends and self._ends[0][0] <= until:
            self._event()
        self.now = until

    def stand_still(self) -> None:
        """The student's servers stop for new weights."""
        for place in range(len(self._servers["student"])):
            self._server("student", place).stand_still(self._setting.push_s, self._setting.recompute_token_s)
            self._foresee("student", place)

    def mark(self, trainer_s: float) -> Mark:
        """The sums now."""
        for role, servers in self._servers.items():
            for place in range(len(servers)):
                self._server(role, place)
        students, teachers = self._servers["student"], self._servers.get("teacher", [])
        return Mark(
            at_s=self.now,
            trainer_s=trainer_s,
            student_s=sum(server.busy_s for server in students),
            seats_s=sum(server.seats_s for server in students),
            teacher_s=sum(server.busy_s for server in teachers),
        )

    def spans(self) -> tuple[tuple[tuple[Span, ...], ...], tuple[tuple[Span, ...], ...]]:
        """When each of the student's and of the teacher's servers worked."""
        wrote, scored = (
            tuple(tuple(server.spans) for server in self._servers.get(role, [])) for role in ("student", "teacher")
        )
        return wrote, scored

    # --- what the servers do

    def _server(self, role: str, place: int) -> _Server:
        """A server, as it is now."""
        server = self._servers[role][place]
        server.move(self.now)
        return server

    def _ask(self, role: str, step: int, responses: Sequence[Response]) -> None:
        self._queues[role].extend((step, response) for response in responses)
        self._seat(role)

    def _seat(self, role: str) -> None:
        """Fill free seats from the queue."""
        queue, free, group = self._queues[role], self._free[role], self._groups[role]
        while queue and free:
            taken, place = heapq.heappop(free)
            if self._servers[role][place].taken != taken:
                continue  # noted before something began or ended there
            step, response = queue.popleft()
            tokens = response.tokens + (response.prompt_tokens if role == "teacher" else 0)
            work_s = group.request_s + group.token_s * tokens
            self._server(role, place).sit(next(self._numbers), work_s, step, response)
            self._foresee(role, place)

    def _foresee(self, role: str, place: int) -> None:
        """Note how free a server is and when its next request ends; what was noted before no longer counts."""
        server = self._servers[role][place]
        server.edition += 1
        if server.taken < self._groups[role].seats:
            heapq.heappush(self._free[role], (server.taken, place))
        if server.taken:
            heapq.heappush(self._ends, (server.next_end(), next(self._numbers), role, place, server.edition))

    def _event(self) -> None:
        """What happens next, if it still holds: a response is written, or scored."""
        at, _, role, place, edition = heapq.heappop(self._ends)
        if self._servers[role][place].edition != edition:
            return
        self.now = max(self.now, at)
        self.num_events += 1
        ended = self._server(role, place).end()
        self._foresee(role, place)
        left = self._to_write if role == "student" else self._to_score
        left[ended.step] -= 1
        self._seat(role)
        if role == "student" and self._setting.teacher:
            if self._streams:
                self._ask("teacher", ended.step, [ended.response])
            elif not left[ended.step]:
                self._ask("teacher", ended.step, self._steps[ended.step].responses)
