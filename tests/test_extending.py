"""Every example of docs/extending.md works as it stands: read from the page, named in a config, and put to work."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_distill import recipes
from megatron_distill.config import RunConfig, from_dict, to_dict, with_overrides
from megatron_distill.config.loading import load_recipe
from megatron_distill.errors import ConfigError
from megatron_distill.evaluate.sets import load_sets
from megatron_distill.models.vocabulary import load_vocabulary
from megatron_distill.rollouts.source import Collected, Share
from megatron_distill.runs.follower import Following
from megatron_distill.runs.run_folder import RunFolder, append
from megatron_distill.runs.trackers import load_tracker
from megatron_distill.training.components import LossContext, Shards, StepPlan, load_components
from megatron_distill.training.leader import Endpoints, Leader, check_functions
from tests.support.fake_sglang import fake, good
from tests.support.samples import make_samples

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
MODELS = Path(recipes.__file__).parent / "tiny_models"
HORIZON_TOKENS = 8
FEW = (
    "rollouts.prompts_per_step=2",
    "rollouts.rollouts_per_prompt=2",
    "micro_batch_rollouts=2",
    "evaluation.reward=math",
)


def examples() -> dict[str, str]:
    """File name -> code, of every Python example of the page."""
    blocks = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == PAGE.read_text().count("```python")
    return dict(blocks)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds the page's examples."""
    for name, code in examples().items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def named(*overrides: str) -> RunConfig:
    """The quickstart with overrides as they are typed, after a round trip through JSON."""
    config = with_overrides(load_recipe("tiny.quickstart"), [*FEW, *overrides])
    return from_dict(json.loads(json.dumps(to_dict(config))))


@dataclass
class Step:
    """A step that a leader drew, and who drew it."""

    leader: Leader
    collected: Collected


def drawn(config: RunConfig, folder: Path) -> Iterator[Step]:
    """One step by a real leader, from a server that says token 7 until the horizon."""
    run = RunFolder(folder / "run")
    run.create()
    vocabulary = load_vocabulary(config.student.path, config.teacher.path, config.rollouts.stop_tokens)
    with fake(good) as server:
        leader = Leader(config, run, Endpoints({"student": (server.url,)}, key=""), vocabulary)
        try:
            yield Step(leader, leader.take(0, Share(0, 1), HORIZON_TOKENS))
        finally:
            leader.close()


def test_a_reward_judges_what_the_student_wrote(here: Path) -> None:
    """Its numbers become the samples' rewards."""
    config = named("rl.weight=1", "distill.weight=0", "rl.reward=my_rewards.py:right_and_short")
    for step in drawn(config, here):
        rewards = [sample.reward for sample in step.collected.samples]
        assert rewards == pytest.approx([-0.001 * HORIZON_TOKENS] * 4)


def test_a_teacher_scores_what_the_student_wrote(here: Path) -> None:
    """Its signals come with the samples, and no teacher server is needed."""
    config = named("teacher.transport=my_teachers.py:smoothed_labels", "servers.teacher_replicas=0")
    assert not config.needs_teacher_server
    for step in drawn(config, here):
        for sample in step.collected.samples:
            assert sample.signal is not None
            assert sample.signal.topk_ids[:, 0].tolist() == sample.rollout.response_ids


def test_an_environment_brings_about_the_response(here: Path) -> None:
    """The first answer uses up the horizon of this server, so that a shorter one leaves room for a second."""
    config = named("distill.weight=0", "rl.weight=1", "rollouts.environment=my_environments.py:ask_twice")
    for step in drawn(config, here):
        assert all(sample.rollout.response_ids == [7] * HORIZON_TOKENS for sample in step.collected.samples)
    import my_environments

    from megatron_distill.rollouts.environment import Turns
    from megatron_distill.types import Generation, SamplingParams

    class Short:
        """Says three words."""

        def generate(self, prompts, /, *, sampling, seeds, weight_version=None):
            return [Generation([1, 2, 3], np.zeros(3, np.float32), "stop", 3, "0") for _ in prompts]

    class Words:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [9] * len(text.split())

    turns = Turns(
        Short(),
        sampling=SamplingParams(20),
        seed=1,
        num_prompt_tokens=1,
        weight_version=None,
        tokenizer=Words(),
    )
    episode = my_environments.ask_twice(None, [5], turns)
    assert episode.response_ids == [1, 2, 3, 9, 9, 9, 1, 2, 3]
    assert episode.is_learnt is not None
    assert episode.is_learnt.tolist() == [True] * 3 + [False] * 3 + [True] * 3


def test_a_source_draws_the_step(here: Path) -> None:
    """Its samples are the step's, and it does what else it likes."""
    config = named("distill.weight=0", "rl.weight=1", "rollouts.source=my_sources.py:keeps_everything")
    for step in drawn(config, here):
        lines = [json.loads(line) for line in Path("responses.jsonl").read_text().splitlines()]
        assert [line["ids"] for line in lines] == [s.rollout.response_ids for s in step.collected.samples]


def test_a_prompt_builder_decides_what_the_model_sees(here: Path) -> None:
    """Prompts are its token ids."""
    config = named("distill.weight=0", "rl.weight=1", "data.prompt_builder=my_prompts.py:plain")
    vocabulary = load_vocabulary(config.student.path, config.teacher.path, config.rollouts.stop_tokens)
    for step in drawn(config, here):
        for sample in step.collected.samples:
            text = vocabulary.decode(sample.rollout.prompt_ids)
            assert text.startswith("Question: ") and text.endswith("\nAnswer:")


def test_an_evaluation_set_stands_beside_the_held_out_one(here: Path) -> None:
    """It has settings of its own."""
    sets = load_sets(named('evaluation.sets=["my_sets.py:first_twenty"]'))
    assert [(one.name, one.settings.samples_per_problem) for one in sets] == [("heldout", 4), ("first_twenty", 8)]


def test_a_sets_own_reward_is_looked_up_before_anything_starts(here: Path) -> None:
    """A misspelt one would be told by the leaders, after the servers' start."""
    code = (here / "my_sets.py").read_text()
    (here / "misspelt_sets.py").write_text(code.replace("samples_per_problem=8", "reward='mats'"))
    check_functions(named('evaluation.sets=["my_sets.py:first_twenty"]'))
    with pytest.raises(ConfigError, match="reward = 'mats'"):
        check_functions(named('evaluation.sets=["misspelt_sets.py:first_twenty"]'))


def test_a_component_is_a_sum_and_a_count(here: Path) -> None:
    """It is added to the built-in ones; its gradient raises the entropy."""
    distill, bonus = load_components(named('components=["my_components.py:entropy_bonus"]'))
    assert (distill.name, bonus.name) == ("distill", "entropy_bonus")
    samples = make_samples(0, 8, 12)
    assert bonus.count(samples, False) == sum(len(sample.rollout.response_ids) for sample in samples)
    logits = torch.randn(5, 12, requires_grad=True)

    class Batch:
        target_ids_T = torch.zeros(5, dtype=torch.int64)

    context = LossContext(logits, Batch(), StepPlan(0, 0.2, 5.0, {}), Shards(None, 12))  # type: ignore[arg-type]
    part = bonus.loss(context)
    part.total.backward()
    with torch.no_grad():
        before = torch.distributions.Categorical(logits=logits).entropy().sum()
        after = torch.distributions.Categorical(logits=logits - 0.1 * logits.grad).entropy().sum()
    assert part.total.item() == pytest.approx(-before.item(), rel=1e-5)
    assert after > before
    assert part.sums["entropy_bonus.nats"].tolist() == pytest.approx([before.item(), 5.0])


def test_a_recipe_is_a_function_in_a_file(here: Path) -> None:
    """Named on the command line as any other, without an annotation."""
    assert load_recipe("my_recipes.py:harder").rollouts.rollouts_per_prompt == 2


def test_commands_of_the_page_are_accepted(here: Path) -> None:
    """Every ``megatron-distill train`` of the page is a config that breaks no rule."""
    commands = re.findall(r"^megatron-distill train (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        recipe, *overrides = shlex.split(command)
        assert with_overrides(load_recipe(recipe), overrides)


def test_a_tracker_is_told_each_step(here: Path) -> None:
    """It follows the run folder."""
    config = named('trackers=["my_trackers.py:lengths"]')
    run = RunFolder(here / "run")
    run.create()
    for step in (1, 2):
        append(run.metrics, {"step": step, "response_tokens": 20.0 + step})
    [name] = config.trackers
    Following(run, from_start=True).tell(load_tracker(name)(run, config))
    assert (run.root / "lengths.txt").read_text() == "21.0\n22.0\n"
