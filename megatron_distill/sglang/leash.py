"""Runs a module as ``python -m`` would, and kills its process group when standard input closes.

``SGLangServer`` starts SGLang through this file and holds the other end of its standard input. However the parent ends,
by an exception, Ctrl-C, ``os._exit`` or ``kill -9``, the kernel closes that pipe, and the server with all its workers goes
too. The obvious alternative, ``PR_SET_PDEATHSIG``, fires when the *thread* that started the child ends, and so would kill
a server started from a worker thread.

The key that a server asks for comes in the environment, which other users of the machine cannot read, and becomes arguments
only inside the process: a command line is for everyone to see. SGLang writes its arguments into its log; there the key is
blotted out.

Usage: ``python -m megatron_distill.sglang.leash MODULE [ARGUMENT ...]``, as the leader of its own process group.
"""

from __future__ import annotations

import logging
import os
import runpy
import signal
import sys
import threading
from typing import Any

KEY_VARIABLE = "MEGATRON_DISTILL_SGLANG_KEY"
"""Holds the key that the server is to ask for."""


def kill_group_when_stdin_closes() -> None:
    """Start a daemon thread that waits for the end of standard input, then kills this process group."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, name="leash", daemon=True).start()


def require_key(key: str) -> None:
    """Let SGLang ask for ``key`` on every route, and keep it out of the log."""
    sys.argv += [f"--api-key={key}", f"--admin-api-key={key}"]
    make_record = logging.getLogRecordFactory()

    def without_key(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit the text: logging reports that, and the caller goes on
            return record
        if key in message:
            record.msg, record.args = message.replace(key, "***"), None
        return record

    logging.setLogRecordFactory(without_key)


def main() -> None:
    """Put this process on the leash and become the module named on the command line."""
    module = sys.argv[1]
    del sys.argv[1]
    kill_group_when_stdin_closes()
    key = os.environ.pop(KEY_VARIABLE, "")
    if key:
        require_key(key)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
