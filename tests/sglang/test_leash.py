"""The server's entry point in this process: its key stays out of the log, and its log calls are as forgiving as logging's."""

import logging
import sys
from collections.abc import Iterator

import pytest

from megatron_distill.sglang.leash import require_key

KEY = "0123abcd"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """A logger of a server that asks for ``KEY``."""
    monkeypatch.setattr(sys, "argv", ["server"])
    make_record = logging.getLogRecordFactory()
    require_key(KEY)
    yield logging.getLogger("tests.leash")
    logging.setLogRecordFactory(make_record)


def test_the_key_is_blotted_out_of_text_and_arguments(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    """SGLang writes its arguments into its log, and other users may read that."""
    log.warning("args: %s", [f"--api-key={KEY}"])
    log.warning("%d of %d", 1, 2)
    assert caplog.messages == ["args: ['--api-key=***']", "1 of 2"]


def test_arguments_that_do_not_fit_their_text_do_not_reach_the_caller(
    log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logging reports such a call on standard error, and the server goes on."""
    handler = logging.StreamHandler()
    log.addHandler(handler)
    log.propagate = False
    try:
        log.warning("%d requests", "two")
    finally:
        log.removeHandler(handler)
        log.propagate = True
    assert "--- Logging error ---" in capsys.readouterr().err
