"""Runs a module as ``python -m`` would, and kills its process group when standard input closes.

``SGLangServer`` starts SGLang through this file and holds the other end of its standard input. However the parent ends,
by an exception, Ctrl-C, ``os._exit`` or ``kill -9``, the kernel closes that pipe, and the server with all its workers goes
too. The obvious alternative, ``PR_SET_PDEATHSIG``, fires when the *thread* that started the child ends, and so would kill
a server started from a worker thread.

Usage: ``python -m megatron_distill.sglang.leash MODULE [ARGUMENT ...]``, as the leader of its own process group.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def kill_group_when_stdin_closes() -> None:
    """Start a daemon thread that waits for the end of standard input, then kills this process group."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, name="leash", daemon=True).start()


def main() -> None:
    """Put this process on the leash and become the module named on the command line."""
    module = sys.argv[1]
    del sys.argv[1]
    kill_group_when_stdin_closes()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
