"""The command line of every recipe's servers, read by the installed SGLang: a flag it lost, or never had, fails here."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_distill.config import RunConfig, ServersConfig
from megatron_distill.config.loading import all_recipes
from megatron_distill.config.schedules import constant
from megatron_distill.launch.launch import server_groups
from megatron_distill.launch.roles import server_spec
from megatron_distill.sglang.hidden_states import HIDDEN_STATES_ENV
from megatron_distill.sglang.server import ServerSpec, command


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """SGLang's own."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    return parser


@pytest.mark.parametrize("name", list(all_recipes()))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sglang_takes_every_recipes_servers(name: str, device: str, parser: argparse.ArgumentParser) -> None:
    """It understands every argument, and understands it as meant."""
    config = all_recipes()[name]()
    for role, (_, tp) in server_groups(config).items():
        spec = replace(server_spec(config, role, 3, "10.0.0.1"), device=device, port=21000)  # type: ignore[arg-type]
        read = parser.parse_args(command(spec).argv[3:])
        model = config.student if role == "student" else config.teacher
        assert (read.model_path, read.host, read.port) == (model.path, "10.0.0.1", 21000)
        assert (read.tp_size, read.device) == (tp, device)
        assert read.context_length >= config.max_sequence_tokens + 7
        assert read.weight_version == "0"
        assert read.skip_tokenizer_init


def test_kernels_that_repeat_a_response_are_for_servers_that_write() -> None:
    """A scorer draws nothing; whoever writes follows the config."""
    recipe = all_recipes()["qwen3.b8_from_32b_4x8_4096"]()

    def deterministic(config: RunConfig) -> tuple[bool, bool]:
        return tuple(server_spec(config, role, 0, "h").deterministic for role in ("student", "teacher"))  # type: ignore[return-value]

    assert deterministic(recipe) == (True, False)
    writes = replace(recipe, rollouts=replace(recipe.rollouts, student_prefix_frac=constant(0.5)))
    assert deterministic(writes) == (True, True)
    assert deterministic(replace(writes, servers=ServersConfig(deterministic=False))) == (False, False)


def test_only_a_scoring_teacher_is_asked_for_hidden_states() -> None:
    """Flag and variable are on the teacher's server where its transport says so, and where it scores at all."""
    recipe = all_recipes()["qwen3.b8_from_32b_4x8_4096"]()
    hidden = replace(recipe, teacher=replace(recipe.teacher, transport="sglang_hidden"))

    def flagged(config: RunConfig, role: str) -> bool:
        spec = replace(server_spec(config, role, 0, "h"), device="cuda", port=1)
        to_run = command(spec)
        has_flag = "--enable-return-hidden-states" in to_run.argv
        assert has_flag == (to_run.env.items() >= HIDDEN_STATES_ENV.items())
        return has_flag

    assert flagged(hidden, "teacher") and not flagged(hidden, "student")
    assert not flagged(recipe, "teacher")
    assert not flagged(replace(hidden, distill=replace(hidden.distill, weight=0.0)), "teacher")


def test_fp32_on_a_gpu_is_served_by_kernels_that_know_it(parser: argparse.ArgumentParser) -> None:
    """SGLang's own choice for seeds takes half precision only, and would fail at the first request."""
    spec = ServerSpec(Path("/m"), role="student", device="cuda", port=1, dtype="float32")
    assert parser.parse_args(command(spec).argv[3:]).attention_backend == "triton"
    assert parser.parse_args(command(replace(spec, dtype="bfloat16")).argv[3:]).attention_backend is None


def test_a_users_arguments_come_last() -> None:
    """So that they win; the student's are not the teacher's."""
    recipe = all_recipes()["tiny.quickstart"]()
    wished = replace(recipe, servers=replace(recipe.servers, student_args=("--mem-fraction-static=0.7",)))
    spec = replace(server_spec(wished, "student", 0, "h"), device="cpu", port=1)
    assert command(spec).argv[-1] == "--mem-fraction-static=0.7"
    assert server_spec(wished, "teacher", 0, "h").extra_args == ()
