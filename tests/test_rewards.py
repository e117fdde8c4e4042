r"""Rewards: the last closed box, judged by math-verify, whatever a model may write into it."""

import os
import queue
import signal
import threading
from collections.abc import Iterator

import psutil
import pytest

from megatron_distill.config import RlConfig
from megatron_distill.errors import ConfigError, DataError, DistillError
from megatron_distill.rewards import Answered, WeightedReward, load_reward, weights_of
from megatron_distill.rewards.math_verifier import MathVerifier, clean_answer, compare_strings, last_boxed
from megatron_distill.types import Message, Problem
from tests.support.waiting import HANG_S, wait_until

CPU_LIMIT_S = 2.0

# (reference, content of the response's box): pairs that mean the same.
EQUAL = [
    # integers and separators
    ("42", "42"), ("42", " 42 "), ("42", "042"), ("42", "+42"), ("-7", "-7"), ("0", "-0"), ("42", "42."), ("42", "42.0"),
    ("1000", "1,000"), ("1,000", "1000"), ("12345", "12{,}345"), ("12345", r"12\,345"), ("1234567", "1,234,567"),
    ("1000000", "10^6"), ("1000000", "10^{6}"), ("7", r"7\!"), ("42", "$42$"), ("$42$", "42"), (r"\boxed{42}", "42"),
    # fractions, decimals, mixed numbers
    ("1/2", r"\frac{1}{2}"), ("0.5", r"\frac12"), (r"\frac{1}{2}", r"\dfrac{1}{2}"), (r"\frac34", r"\tfrac{3}{4}"),
    ("0.75", "3/4"), (r"\frac{2}{4}", r"\frac{1}{2}"), (r"-\frac{1}{3}", r"\frac{-1}{3}"), (r"\frac{1}{-3}", "-1/3"),
    ("7/3", r"2\frac{1}{3}"), (".5", "0.5"), ("0.50", "0.5"), ("2.5", r"\frac{5}{2}"), (r"\frac{10}{5}", "2"),
    # powers, roots, constants, factorials
    (r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt 2", r"\sqrt{2}"), (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    ("2^{10}", "1024"), (r"\sqrt[3]{27}", "3"), (r"2\pi", r"\pi \cdot 2"), ("120", "5!"), (r"\log_2 8", "3"),
    (r"3 \times 10^{2}", "300"), (r"\sin(\pi/2)", "1"), ("e^0", "1"), (r"4\cdot 5", "20"),
    # units, per cent, money, degrees
    ("5", r"5\text{ cm}"), ("5", r"5 \mathrm{km}"), (r"5\text{ cm}", "5"), ("5", "5 cm"), (r"90^\circ", "90"),
    ("90", r"90^{\circ}"), (r"50\%", "50"), (r"50\%", "0.5"), ("50", r"50\%"), (r"\$5", "5"), ("5", r"\$5"),
    ("18", r"\$18.00"), ("12", r"12 \text{ square units}"),
    # equations, and letters with values
    ("5", "x=5"), ("5", "x = 5"), ("x=5", "x=5"), ("y=2x+1", "y = 1 + 2x"), ("x^2+2x+1", "(x+1)^2"),
    ("a+b", "b+a"), ("2x", r"2 \cdot x"), (r"x\in(1,2)", "(1,2)"),
    # sets, tuples, intervals, lists
    (r"\{1,2\}", r"\{2,1\}"), (r"\{1,2\}", r"\left\{1, 2\right\}"), ("1,2", "2,1"), ("1, 2", "1,2"), ("1,2", r"\{1,2\}"),
    ("(1,2)", "(1, 2)"), ("(1,2)", r"\left(1,2\right)"), ("[0,1]", "[0, 1]"), (r"(-\infty,3]", r"(-\infty, 3]"),
    (r"(0,1)\cup(2,3)", r"(2,3) \cup (0,1)"), ("(1,2,3)", r"\left( 1, 2, 3 \right)"),
    (r"1\pm\sqrt{2}", r"1+\sqrt2, 1-\sqrt2"), ("3,-1", "-1, 3"), (r"(\frac12, 1)", "(0.5, 1)"),
    # matrices
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix}1&0\\0&1\end{pmatrix}", r"\begin{bmatrix}1 & 0 \\ 0 & 1\end{bmatrix}"),
    # words and choices
    (r"\text{Evelyn}", "Evelyn"), ("Evelyn", r"\text{Evelyn}"), (r"\text{east}", r"\textbf{east}"), ("A", r"\text{A}"),
    ("A", "(A)"), (r"\text{(B)}", "B"), (r"\text{even}", r"\text{ even }"),
    # complex numbers
    ("3+4i", "4i+3"), (r"\frac{1+i}{2}", r"\frac12+\frac{i}{2}"),
]  # fmt: skip

# Pairs that do not.
DIFFERENT = [
    ("42", "43"), ("42", "-42"), ("42", "4 2 1"), ("42", ""), ("42", r"\text{none}"), ("42", "{"), ("1000", "1,001"),
    ("1/2", "2"), ("1/2", r"\frac{1}{3}"), ("0.333", "1/3"), ("0.5", "0.51"), (r"2\frac13", "2/3"), ("1/3", "0.3"),
    (r"\sqrt{2}", "2"), (r"\sqrt{2}", r"\sqrt{3}"), (r"2\pi", r"\pi"), ("2^{10}", "2^{11}"), ("10^6", "10^{-6}"),
    (r"50\%", "5"), ("5", "5x"), ("5", "x=6"), ("y=2x+1", "y=2x-1"), ("(x+1)^2", "x^2+1"), ("a+b", "a-b"),
    (r"\{1,2\}", r"\{1,3\}"), (r"\{1,2\}", r"\{1,2,3\}"), ("1,2", "1"), ("1", "1,2"), ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"), ("[0,1]", "[0,1)"), (r"(-\infty,3]", r"(-\infty,3)"), ("(1,2,3)", "(1,2)"), ("3,4", "34"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"), (r"\text{Evelyn}", r"\text{Bob}"),
    ("A", "B"), (r"\text{east}", r"\text{west}"), ("3+4i", "3-4i"), ("1", r"\frac{1}{0}"), ("1", r"\infty"), ("7", "?"),
    ("7", r"\frac{"), ("7", r"\frac{1}{"), ("7", r"\sqrt"), ("7", "((((("), ("7", r"\left("), ("7", "^_^"), ("7", "\\"),
    ("7", "7 or 8"), ("7", "NaN"), ("7", "\u0000"), ("7", "七"),
]  # fmt: skip

# What a collapsing model writes: bombs of time, memory and nesting.
HOSTILE = [
    r"9^{9^{9^9}}", r"(9^{9^9})!", "(" * 400 + "1" + ")" * 400, r"\sqrt{" * 100 + "1" + "}" * 100, "1+" * 400 + "1",
    "9" * 20000, r"\frac{1}{" * 200 + "2" + "}" * 200, "99999999!", "x^" * 300 + "x",
]  # fmt: skip


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    with MathVerifier(cpu_limit_s=CPU_LIMIT_S) as verifier:
        verifier.verify([r"\boxed{1.0}"], ["1"])  # starts the judge, so that no test times its start
        yield verifier


def box(content: str) -> str:
    return rf"Thus we find the answer $\boxed{{{content}}}$."


class TestLastBoxed:
    """The last balanced box, in one pass."""

    @pytest.mark.parametrize(
        ("text", "content"),
        [
            (r"\boxed{5}", "5"),
            (r"so \boxed{5}. No, \boxed{6}", "6"),
            (r"\boxed{\frac{1}{2}} and so on", r"\frac{1}{2}"),
            (r"\boxed {5}", "5"),
            ("\\boxed\n{5}", "5"),
            (r"\boxed{}", ""),
            (r"\boxed{\{1,2\}}", r"\{1,2\}"),
            (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
            (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
            (r"\boxed{\boxed{5}}", "5"),
            (r"\boxed{x=\boxed{5}}", "5"),
            (r"\boxed{5} then \boxed{6", "5"),
            (r"\boxed{5 then \boxed{6}", "6"),
            (r"{ open \boxed{5}", "5"),
            (r"} closed \boxed{5}", "5"),
            (r"\boxed{5}}}", "5"),
            (r"\\boxed{5}", None),
            (r"\boxed{12", None),
            (r"\boxed{\frac{1}{2}", None),
            (r"\boxed5", None),
            ("boxed{5}", None),
            ("the answer is 5", None),
            ("", None),
        ],
    )
    def test_content(self, text: str, content: str | None) -> None:
        """Nesting, escapes, several boxes and unclosed ones."""
        assert last_boxed(text) == content

    def test_time_is_linear(self) -> None:
        """A response that repeats an unclosed box to its token limit costs a pass, not a pass per box."""
        assert last_boxed(r"\boxed{" * 1_000_000) is None  # a second or so; hours if it were quadratic


class TestStrings:
    """What is decided without the judge."""

    @pytest.mark.parametrize(
        ("reference", "candidate", "verdict"),
        [
            ("5", "5", True),
            ("5", "05", True),
            ("5", "6", False),
            ("x", "x", True),
            ("5", "", False),
            ("", "", False),
            ("x", "y", None),
            ("x", "y" * 2000, False),
        ],
    )
    def test_easy_pairs(self, reference: str, candidate: str, verdict: bool | None) -> None:
        """Equal strings and integers are decided; anything else is left to mathematics."""
        assert compare_strings(reference, candidate) is verdict

    def test_integers_need_no_judge(self) -> None:
        """A run on integer answers never starts the judge process."""
        verifier = MathVerifier()
        assert verifier.verify([box("12"), box("13"), "none"], ["12", "12", "12"]) == [1.0, 0.0, 0.0]
        assert verifier._judge is None

    @pytest.mark.parametrize("text", ["$5$", r"\boxed{5}", " 5. ", r"$\boxed{5}$", "$ 5 $"])
    def test_wrapping_is_stripped(self, text: str) -> None:
        """A reference may come boxed, in dollar signs, or with a full stop."""
        assert clean_answer(text) == "5"


@pytest.mark.slow
class TestMathVerifier:
    """math-verify's judgement, under limits nothing escapes."""

    def test_equal_forms(self, verifier: MathVerifier) -> None:
        """Every way to write the same value is right."""
        rewards = verifier.verify([box(given) for _, given in EQUAL], [reference for reference, _ in EQUAL])
        assert [pair for pair, reward in zip(EQUAL, rewards, strict=True) if reward != 1.0] == []

    def test_different_values(self, verifier: MathVerifier) -> None:
        """Every other value, malformed LaTeX included, is wrong."""
        rewards = verifier.verify([box(given) for _, given in DIFFERENT], [reference for reference, _ in DIFFERENT])
        assert [pair for pair, reward in zip(DIFFERENT, rewards, strict=True) if reward != 0.0] == []

    @pytest.mark.parametrize("denominator", [2, 3, 7, 12, 40])
    def test_fractions(self, verifier: MathVerifier, denominator: int) -> None:
        """A fraction equals its expanded form and no neighbour of it."""
        numerators = range(1, 21)
        answers = [f"{n}/{denominator}" for n in numerators]
        expanded = [box(rf"\frac{{{3 * n}}}{{{3 * denominator}}}") for n in numerators]
        neighbours = [box(rf"\frac{{{3 * n + 1}}}{{{3 * denominator}}}") for n in numerators]
        assert verifier.verify(expanded, answers) == [1.0] * len(answers)
        assert verifier.verify(neighbours, answers) == [0.0] * len(answers)

    def test_hostile_answers_end_in_time(self, verifier: MathVerifier) -> None:
        """Bombs get 0.0 within their CPU limit each, and honest answers among them are judged as ever."""
        given = [text for bomb in HOSTILE for text in (bomb, "0.50")]
        answers = ["1/2"] * len(given)
        assert verifier.verify([box("0.50")], ["1/2"]) == [1.0]
        assert verifier._judge is not None
        judge = psutil.Process(verifier._judge.pid)
        before = judge.cpu_times()
        rewards = verifier.verify([box(text) for text in given], answers)
        after = judge.cpu_times()
        assert rewards == [0.0, 1.0] * len(HOSTILE)
        assert 0 < verifier.num_undecided <= len(HOSTILE)
        children_s = after.children_user + after.children_system - before.children_user - before.children_system
        assert children_s < 2 * CPU_LIMIT_S * len(given)

    def test_works_in_any_thread(self, verifier: MathVerifier) -> None:
        """Where math-verify's own limits raise outside the main thread, ours hold; concurrent calls do not mix."""
        results: dict[int, list[float]] = {}

        def work(index: int) -> None:
            results[index] = verifier.verify([box(f"{index}/4"), box("9/4")], [f"{index * 2}/8", "1/4"])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {index: [1.0, 0.0] for index in range(1, 5)}

    def test_a_killed_judge_is_reported_and_replaced(self) -> None:
        """If the judge itself dies, the call says so, and the next call starts another."""
        with MathVerifier(num_parallel=1) as verifier:
            assert verifier.verify([box("1.0")], ["1"]) == [1.0]
            assert verifier._judge is not None
            os.kill(verifier._judge.pid, signal.SIGKILL)
            with pytest.raises(DistillError, match="exit status -9"):
                verifier.verify([box("2.0")], ["2"])
            assert verifier.verify([box("2.0")], ["2"]) == [1.0]

    def test_close_ends_the_process(self) -> None:
        """No judge outlives its verifier; closing twice is harmless."""
        verifier = MathVerifier()
        verifier.verify([box("1.0")], ["1"])
        judge = verifier._judge
        assert judge is not None
        verifier.close()
        verifier.close()
        assert judge.poll() is not None

    @pytest.mark.parametrize("when", ["starting", "judging"])
    def test_close_waits_for_no_call(self, when: str) -> None:
        """One that was given up for its time ends with the judge, and the judge's children too, whatever they work on."""
        verifier = MathVerifier(cpu_limit_s=HANG_S, num_parallel=2)
        if when == "judging":
            verifier.verify([box("1.0")], ["1"])
        raised: queue.SimpleQueue[Exception] = queue.SimpleQueue()

        def call() -> None:
            try:
                verifier.verify([box(HOSTILE[0])] * 2, ["1", "2"])
            except DistillError as error:
                raised.put(error)

        threading.Thread(target=call, daemon=True).start()
        wait_until(lambda: verifier._judge is not None, "the judge")
        assert verifier._judge is not None
        judge = psutil.Process(verifier._judge.pid)
        wait_until(lambda: when == "starting" or len(judge.children()) == 2, "two answers under way")
        children = judge.children()
        verifier.close()
        assert "math judge = exit status -9" in str(raised.get(timeout=HANG_S))
        psutil.wait_procs(children, timeout=HANG_S)
        assert not judge.is_running() and not any(child.is_running() for child in children)

    def test_bad_calls_are_refused(self) -> None:
        """Unpaired lists and a limit of nothing are mistakes of the caller."""
        with pytest.raises(DataError, match="2 responses, 1 answers"):
            MathVerifier().verify(["a", "b"], ["1"])
        with pytest.raises(ConfigError, match="cpu_limit_s"):
            MathVerifier(cpu_limit_s=0)


def answered(text: str, stop_reason: str = "stop") -> Answered:
    return Answered(Problem("0", (Message("user", "?"),), "5"), [1] * len(text), text, stop_reason)  # type: ignore[arg-type]


def test_form_and_length() -> None:
    """A closed box with something in it, in a response that ended; thousands of tokens."""
    texts = [r"so \boxed{5}", r"so \boxed{5", "so 5", r"\boxed{ }"]
    assert load_reward("format", 9)([answered(text) for text in texts]) == [1.0, 0.0, 0.0, 0.0]
    assert load_reward("format", 9)([answered(texts[0], "length")]) == [0.0]
    assert load_reward("length", 9)([answered("x" * 250)]) == [0.25]


def test_several_rewards_are_summed_by_weight_and_each_is_told() -> None:
    """The sum is what counts; the parts stand beside it, before their weights; one reward alone has none."""
    weights = weights_of(RlConfig(reward="format", extra_rewards={"length": -2.0}))
    assert weights == {"format": ("format", 1.0), "length": ("length", -2.0)}
    reward = WeightedReward({short: (load_reward(name, 9), weight) for short, (name, weight) in weights.items()})
    [judged] = reward.judge([answered(r"\boxed{5}")])
    assert judged == (1 - 2 * 0.009, {"format": 1.0, "length": 0.009})
    assert reward([answered(r"\boxed{5}")]) == [judged.total]
    assert WeightedReward({"format": (load_reward("format", 9), 1.0)}).judge([answered("5")]) == [(0.0, {})]
    with pytest.raises(ConfigError, match="is called 'length' too"):
        weights_of(RlConfig(reward="length", extra_rewards={"mine.py:length": 1.0}))
