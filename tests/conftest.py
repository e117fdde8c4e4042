"""What several folders of tests share, started when a test first asks for it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_distill.runs.run_folder import RunFolder
from tests.support.rank_forge import RankForge
from tests.support.rank_pool import RankPool

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a machine with GPUs too: what tests prove, they prove of the CPU


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """PyTorch computes on one thread: tensors here are tiny, and threads that wait for each other cost ten times as much."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankForge]:
    """The process that Megatron ranks are forked from."""
    with RankForge(tmp_path_factory.mktemp("forge")) as started:
        yield started


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four live gloo ranks."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run's folder in which nothing is recorded yet."""
    run = RunFolder(tmp_path / "run")
    run.create()
    return run


STARTS_PROCESSES = {"forge", "ranks", "server"}
INTERPRETED = {"triton"}  # on a CPU, by an interpreter


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that needs one of these is slow."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
        is_interpreted = any(isinstance(one, str) and one in INTERPRETED for one in parameters)
        if is_interpreted or STARTS_PROCESSES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
