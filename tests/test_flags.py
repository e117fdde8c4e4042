"""Flags that a user adds: known ones pass to Megatron and SGLang, owned, unknown and misspelt ones do not."""

import pytest

from megatron_distill.config import StudentConfig, with_overrides
from megatron_distill.config.flags import MEGATRON, SGLANG
from megatron_distill.config.loading import load_recipe
from megatron_distill.errors import ConfigError, DistillError
from megatron_distill.megatron.arguments import flag_problems as of_megatron
from megatron_distill.megatron.backend import choose_backend
from megatron_distill.sglang.server import flag_problems as of_sglang


@pytest.mark.slow
def test_megatron_knows_what_is_refused_and_nothing_else() -> None:
    """Every refused flag is one of the installed Megatron's, so that no line of the table is dead; a typo, a value that it
    does not take, and another name of a refused flag are told; the rest passes."""
    known = [f"--{name}" for name in MEGATRON]
    assert [one for one in of_megatron(known) if "no such flag" in one] == []
    taken = ["--overlap-grad-reduce", "--attention-backend=flash", "--adam-eps=1e-6", "--optimizer=adam"]
    typo, value, alias, package = of_megatron(
        [*taken, "--overlap-grad-reduse", "--adam-eps=small", "--persistent-save-interval=3", "--optimizer=lion"]
    )
    assert typo.startswith("--overlap-grad-reduse: Megatron knows no such flag")
    assert "invalid float value: 'small'" in value
    assert "sets the same as --save-interval, which is decided by save_every_steps" in alias
    assert "pip install emerging-optimizers" in package


def test_sglang_knows_what_is_refused_and_nothing_else() -> None:
    """The same of SGLang."""
    known = [f"--{name}" for name in SGLANG]
    assert [one for one in of_sglang(known) if "no such flag" in one] == []
    taken = ["--mem-fraction-static=0.5", "--disable-radix-cache"]
    typo, value = of_sglang([*taken, "--men-fraction=1", "--mem-fraction-static=half"])
    assert typo.startswith("--men-fraction=1: SGLang knows no such flag")
    assert "invalid float value: 'half'" in value


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--optimizer=sgd", "could not be resumed"),
        ("--cuda-graph-impl=full_iteration", "a graph would not call"),
        ("--async-save", "nobody watches Megatron's process"),
        ("--fp8-param-gather", "in bf16. To compute in eight bits --fp8-format is enough"),
        ("--fp8-format=hybrid", "Set student.dtype=bf16"),
        ("--lr_warmup_fraction=0.1", "optimizer.warmup_frac"),
        ("adam-eps=1", "is no flag"),
    ],
)
def test_refused_by_name_with_the_reason(flag: str, why: str) -> None:
    """Before anything is imported or started; another value of a flag passes."""
    with pytest.raises(ConfigError, match=why):
        with_overrides(load_recipe("tiny.quickstart"), [f'student.megatron_args=["{flag}"]'])
    with_overrides(load_recipe("tiny.quickstart"), ['student.megatron_args=["--optimizer=lion", "--adam-eps=1e-6"]'])


@pytest.mark.parametrize("flag", ["--fp8-format=hybrid", "--fp4-format=e2m1"])
def test_quantisation_is_refused_where_megatron_would_ignore_it(flag: str) -> None:
    """On a CPU, by the trainer; bf16 and Transformer Engine's layers pass the config's rules."""
    config = with_overrides(load_recipe("tiny.quickstart"), ["student.dtype=bf16", f'student.megatron_args=["{flag}"]'])
    with pytest.raises(DistillError, match=f"{flag.partition('=')[0]} takes a GPU"):
        choose_backend(config.student)
    choose_backend(StudentConfig(dtype="bf16"))
