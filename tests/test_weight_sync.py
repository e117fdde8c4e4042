"""Weights on their way: what fails on one rank or on all ends the push, and nobody waits for what will not come."""

import importlib.util
import os
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron_distill.recipes import tiny

from megatron_distill.errors import ServerError
from megatron_distill.launch.roles import _pin_nccl
from megatron_distill.sglang.server import NCCL_ENV
from megatron_distill.training import weight_sync
from megatron_distill.training.weight_sync import WeightsGroup, pack
from tests.support.rank_forge import RankForge


def test_both_sides_of_a_broadcast_have_the_same_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer takes what SGLang gives its servers, where both find nothing set; what is set, both find. A run that sends
    weights through the disk keeps NCCL's own."""
    for name in NCCL_ENV:
        monkeypatch.delenv(name, raising=False)
    by_disk = tiny.quickstart()
    _pin_nccl(by_disk)
    assert not NCCL_ENV.keys() & os.environ.keys()
    by_broadcast = replace(by_disk, servers=replace(by_disk.servers, weight_sync="broadcast"))
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "")  # so that what follows is undone
    del os.environ["NCCL_CUMEM_ENABLE"]
    _pin_nccl(by_broadcast)
    assert (os.environ["NCCL_CUMEM_ENABLE"], os.environ["NCCL_NVLS_ENABLE"]) == ("0", "1")
    servers_side = Path(importlib.util.find_spec("sglang").origin).parent / "srt/entrypoints/engine.py"
    assert all(f'if "{name}" not in os.environ' in joined(servers_side) for name in NCCL_ENV)


def joined(source: Path) -> str:
    """Without the line breaks of long conditions."""
    return " ".join(source.read_text().split()).replace("if ( ", "if ")


def test_servers_that_cannot_be_reached_are_told_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a firewall nobody answers: the group, where it is, how long it was waited for, and what to do."""
    group = WeightsGroup("weights-0", "127.0.0.1", 2)
    monkeypatch.setattr(weight_sync, "GROUP_TIMEOUT_S", 0.05)
    monkeypatch.setattr(weight_sync, "in_background", lambda act: Future())  # rank 0 never meets anybody
    told = (
        rf"weights group weights-0 at 127\.0\.0\.1:{group.port} = .* within 0\.05 s: .* or set servers.weight_sync=disk"
    )
    with pytest.raises(ServerError, match=told):
        group.join(Future(), on_gpu=False)
    group._group = SimpleNamespace(broadcast=lambda *_: None)
    with pytest.raises(ServerError, match=told):
        group.broadcast(torch.zeros(1), Future())


def test_what_was_gathered_is_of_its_moment() -> None:
    """A bucket is copied, wider types first, each at an offset that its item size divides; training on changes nothing of it,
    and the next push writes over the same memory."""
    weights = {
        "bias": torch.arange(3, dtype=torch.bfloat16),
        "norm": torch.arange(5, dtype=torch.float32).reshape(5, 1),
        "head": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4).t(),
    }
    message = pack(list(weights.items()))
    assert message.names == ("norm", "bias", "head") and message.dtypes == ("float32", "bfloat16", "bfloat16")
    assert message.shapes == ((5, 1), (3,), (4, 3))
    for step in range(2):
        expected = {name: tensor.clone() for name, tensor in weights.items()}
        again = pack(list(weights.items()), message.flat)
        assert again.flat is message.flat
        for tensor in weights.values():
            tensor.add_(1 + step)
        offset = 0
        for name, shape in zip(again.names, again.shapes, strict=True):
            tensor = expected[name]
            part = again.flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(shape)
            assert torch.equal(part, tensor)
            offset += tensor.nbytes
        assert offset == again.flat.numel()


@pytest.mark.parametrize("case", ["beside", "again", "fails", "refused"])
def test_a_push_is_sent_beside_what_the_ranks_do(case: str, forge: RankForge, tmp_path: Path) -> None:
    """It arrives, is sent again, fails or is refused: on both ranks alike, whenever they ask, and they stay in step."""
    forge.run("tests.support.push_job", 2, [case], tmp_path)


def test_what_a_sender_alone_meets_ends_the_job(forge: RankForge, tmp_path: Path) -> None:
    """Rank 0 waits for a tensor of a rank that has no memory for it: that one's process ends, with its cause."""
    with pytest.raises(AssertionError, match="RuntimeError: out of memory"):
        forge.run("tests.support.push_job", 2, ["sender"], tmp_path)
