"""Teachers beside the run's own: several by a column, servers elsewhere, a prompt of their own. Real files, no server."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_distill.recipes import tiny, tiny_teachers

from megatron_distill import config as config_module
from megatron_distill.cli.main import main
from megatron_distill.config import RunConfig
from megatron_distill.config.loading import load_recipe
from megatron_distill.errors import ConfigError
from megatron_distill.launch import preflight
from megatron_distill.launch.launch import server_groups
from megatron_distill.losses import distill_kl_topk
from megatron_distill.models.vocabulary import load_vocabulary
from megatron_distill.rollouts.prompts import load_training_set
from megatron_distill.teacher import PrivilegedTeacher, problems_of_urls, teacher_prompts
from megatron_distill.teacher.sglang_topk import within_vocabulary
from megatron_distill.teacher.sglang_urls import RoutedTeacher
from megatron_distill.types import Rollout, TopKSignal
from tests.support.samples import make_samples

STUDENT = tiny.MODELS / "student"


class Echo:
    """A client whose log-prob of each token is its own number; it remembers what it was asked."""

    def __init__(self, number: float) -> None:
        self.number, self.asked = number, list[tuple[list[int], list[int]]]()

    def score(
        self, sequences: Sequence[tuple[list[int], list[int]]], *, top_k: int, stop_token_ids: Sequence[int]
    ) -> list[TopKSignal | None]:
        self.asked += sequences
        return [
            TopKSignal(
                token_logprobs=np.full(len(response), self.number, np.float32),
                topk_ids=np.zeros((len(response), top_k), np.int32),
                topk_logprobs=np.zeros((len(response), top_k), np.float32),
                stop_logprobs=np.zeros((len(response), len(stop_token_ids)), np.float32),
            )
            for _, response in sequences
        ]

    def close(self) -> None: ...


def rollouts() -> list[Rollout]:
    return [sample.rollout for sample in make_samples(step=0, count=6, vocab_size=50)]


def two_teachers(tmp_path: Path, **columns: str) -> RunConfig:
    """The quickstart, its problems half algebra, half counting, under two teachers elsewhere."""
    lines = (tiny.MODELS / "train.jsonl").read_text().splitlines()[:8]
    names = ("algebra", "counting") * 4
    records = [json.loads(line) | {"domain": columns.get(name, name)} for line, name in zip(lines, names, strict=True)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    urls = {"algebra": "http://a:1", "counting": "http://b:2"}
    overrides = [f"teacher.urls={json.dumps(urls)}", "teacher.column=domain", "teacher.transport=sglang_urls"]
    return config_module.with_overrides(tiny.quickstart(), [*overrides, f"data.train_path={tmp_path / 'train.jsonl'}"])


def test_each_rollout_is_scored_by_the_teacher_of_its_problem() -> None:
    """Signals come back in order, each from the teacher that its problem's column names, which is asked for nothing else."""
    clients = {"algebra": Echo(-1.0), "counting": Echo(-2.0)}
    names = ["algebra", "counting", "algebra"]  # of three problems
    teacher = RoutedTeacher(clients, names, top_k=3, stop_token_ids=(0, 1), vocab_size=50)  # type: ignore[arg-type]
    asked = rollouts()
    for rollout, signal in zip(asked, teacher.score(asked), strict=True):
        assert signal is not None
        number = clients[names[rollout.prompt_index]].number
        assert signal.token_logprobs.tolist() == [number] * len(rollout.response_ids)
    for name, client in clients.items():
        own = [(one.prompt_ids, one.response_ids) for one in asked if names[one.prompt_index] == name]
        assert client.asked == own != []


def test_padding_that_a_teacher_finds_likely_falls_into_the_tail() -> None:
    """A teacher with a larger padded vocabulary sends ids that stand for no token: they are left out, and all is finite."""
    logprobs = np.log(np.array([[0.5, 0.3, 0.1]], np.float32))
    signal = TopKSignal(
        token_logprobs=logprobs[:, 0],
        topk_ids=np.array([[3, 57, 4]], np.int32),
        topk_logprobs=logprobs,
        stop_logprobs=np.zeros((1, 0), np.float32),
    )
    within = within_vocabulary(signal, 50)
    assert within.topk_ids.tolist() == [[3, -1, 4]]
    student = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))

    def loss(ids: np.ndarray) -> torch.Tensor:
        ids_TK, logprobs_TK = torch.from_numpy(ids), torch.from_numpy(logprobs)
        return distill_kl_topk(student, ids_TK, logprobs_TK, reverse_kl_weight=0.2, vocab_size=50).loss

    assert loss(within.topk_ids).isfinite().all()
    assert not loss(signal.topk_ids).isfinite().all()  # which is why


def test_teachers_elsewhere_start_no_server_and_need_no_weights(tmp_path: Path) -> None:
    """The run starts the student's servers only, and is content with the teacher's tokenizer and config.json."""
    config = two_teachers(tmp_path)
    bare = tmp_path / "teacher"
    bare.mkdir()
    for file in (tiny.MODELS / "teacher").iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    config = replace(config, teacher=replace(config.teacher, path=str(bare)))
    assert set(server_groups(config)) == {"student"}
    preflight.check(config)


def test_a_problem_of_nobodys_and_a_key_that_is_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything starts: which problem has no teacher, and which variable holds no key."""
    config = two_teachers(tmp_path, counting="geometry")
    config = replace(config, teacher=replace(config.teacher, key_variable="TEST_TEACHER_KEY"))
    train = load_training_set(config.data, load_vocabulary(STUDENT, STUDENT, ()).tokenizer)
    no_key, nobodys = problems_of_urls(config, train.problems)
    assert "teacher.key_variable = TEST_TEACHER_KEY: no such environment variable" in no_key
    assert "has 'geometry' there" in nobodys and "(algebra, counting)" in nobodys
    monkeypatch.setenv("TEST_TEACHER_KEY", "secret")
    assert problems_of_urls(config, train.problems) == [nobodys]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.transport=sglang_urls"], "teacher.urls"),
        (['teacher.urls={"a": "http://a:1"}'], "goes with teacher.transport=sglang_urls"),
        (["teacher.transport=sglang_urls", 'teacher.urls={"a": "a:1"}'], "http://host:port"),
        (["teacher.transport=sglang_urls", 'teacher.urls={"a": "http://me:hush@a:1"}'], "without a password"),
        (["teacher.transport=sglang_urls", 'teacher.urls={"a": "http://a:1", "b": "http://b:1"}'], "teacher.column"),
        (
            ["teacher.transport=sglang_urls", 'teacher.urls={"a": "http://a:1"}', "teacher.cache_dir=c"],
            "teacher.cache_dir",
        ),
        (
            [f"teacher.prompt_builder={tiny_teachers.__file__}:with_answer", "teacher.transport=in_process"],
            "scores on servers",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    """By the field, with what to set instead."""
    with pytest.raises(ConfigError, match=message):
        config_module.with_overrides(tiny.quickstart(), overrides)


def test_a_privileged_teacher_sees_its_own_prompt_and_the_students_response() -> None:
    """The answer stands in the teacher's prompt and in no prompt of the student's; the response is the same."""
    config = tiny_teachers.self_distillation()
    tokenizer = load_vocabulary(STUDENT, STUDENT, ()).tokenizer
    train = load_training_set(config.data, tokenizer)
    prompts = teacher_prompts(config, train.problems, tokenizer)
    assert prompts is not None
    first = tokenizer.decode(prompts[0])
    assert f"\n{train.problems[0].answer}" in first
    assert f"\n{train.problems[0].answer}" not in tokenizer.decode(train.prompts[0])
    client, asked = Echo(-1.0), rollouts()
    inner = RoutedTeacher({"": client}, [""] * 6, top_k=3, stop_token_ids=(0, 1), vocab_size=50)  # type: ignore[dict-item]
    PrivilegedTeacher(inner, prompts).score(asked)
    assert client.asked == [(prompts[one.prompt_index], one.response_ids) for one in asked]


def test_a_privileged_prompt_that_is_none_or_too_long_is_named(tmp_path: Path) -> None:
    """With the problem, before anything starts."""
    (tmp_path / "mine.py").write_text("def none(tokenizer, problem):\n    return ''\n")
    config = tiny_teachers.self_distillation()
    tokenizer = load_vocabulary(STUDENT, STUDENT, ()).tokenizer
    problems = load_training_set(config.data, tokenizer).problems
    broken = replace(config, teacher=replace(config.teacher, prompt_builder=f"{tmp_path / 'mine.py'}:none"))
    with pytest.raises(ConfigError, match="must return a non-empty list of token ids"):
        teacher_prompts(broken, problems, tokenizer)
    short = replace(config, teacher=replace(config.teacher, max_prompt_tokens=10))
    with pytest.raises(ConfigError, match=r"teacher\.max_prompt_tokens = 10: .* 10 are allowed"):
        teacher_prompts(short, problems, tokenizer)


@pytest.mark.parametrize("name", ["tiny_teachers.self_distillation", "tiny_teachers.at_url"])
def test_the_recipes_dry_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is sound on the shipped models; the student may be its own teacher where it sees another prompt."""
    assert main(["train", name, "--dry-run", "--run-dir", str(tmp_path / "run")]) == 0
    started = capsys.readouterr().out
    assert ("teacher-0" in started) == (name == "tiny_teachers.self_distillation")
    assert load_recipe(name).distill.weight == 1
