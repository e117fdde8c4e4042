"""Start, and be, the process that follows a run for its trackers.

    with track(config, folder):   # in the launcher
        ...                       # the run

The process ends when its standard input does: when the launcher leaves the block, or dies. It then tells what is still new,
closes the trackers, and waits ``_CLOSING_S`` for those that upload.
"""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator

from megatron_distill import config as config_module
from megatron_distill.config import RunConfig
from megatron_distill.runs.follower import Following, Tracker
from megatron_distill.runs.run_folder import RunFolder, read_json, write_json
from megatron_distill.runs.trackers import load_tracker

_POLL_S = 1.0
_CLOSING_S = 120.0  # for all trackers together: some upload then


@contextlib.contextmanager
def track(config: RunConfig, folder: RunFolder) -> Iterator[None]:
    """Follow a run for its trackers while the block lasts; ``config`` is in its folder by then. A failure is only reported."""
    if not config.trackers:
        yield
        return
    folder.trackers.mkdir(exist_ok=True)
    with (folder.logs / "trackers.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_distill.runs.trackers", str(folder.root)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # out of reach of the terminal's Ctrl-C and of its end: the launcher still saves then
        )
    assert process.stdin is not None
    try:
        yield
    finally:
        process.stdin.close()
        try:
            code = process.wait(_CLOSING_S + 30)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code:
            _warn(folder, "all", f"their process ended with code {code}; see {folder.logs / 'trackers.log'}")


def follow(folder: RunFolder) -> None:
    """Be that process, until the launcher closes the input: once the run has stopped, or by its own end."""
    config = config_module.load(folder.config)
    is_over = threading.Event()
    threads = [
        threading.Thread(target=_serve, args=(name, folder, config, is_over), name=name, daemon=True)
        for name in config.trackers
    ]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    is_over.set()
    deadline = time.monotonic() + _CLOSING_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            _warn(folder, thread.name, f"did not end within {_CLOSING_S:.0f} s, and was left")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread that hangs, or a library's own, must not keep the launcher waiting


def _serve(name: str, folder: RunFolder, config: RunConfig, is_over: threading.Event) -> None:
    """Build a tracker and tell it everything, to the end of the run or to its first failure."""
    try:
        tracker = load_tracker(name)(folder, config)
        _tell_all(name, folder, tracker, is_over)
        tracker.close()
    except BaseException as error:  # whatever a library or a user's file does
        traceback.print_exc()
        _warn(folder, name, f"{type(error).__name__}: {error}; see {folder.logs / 'trackers.log'}")


def _tell_all(name: str, folder: RunFolder, tracker: Tracker, is_over: threading.Event) -> None:
    kept = folder.trackers / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}.json"
    following = Following(folder, from_start=True, told=read_json(kept) if kept.exists() else {})
    was_over = False
    while not was_over:
        was_over = is_over.wait(_POLL_S)  # one more look after the end: the last records
        if following.tell(tracker):
            write_json(kept, following.told())


def _warn(folder: RunFolder, name: str, reason: str) -> None:
    """On the console and in events.jsonl, once a tracker: it is not told anything after."""
    folder.event("trackers", f"{name} failed, and the run goes on without it: {reason}")
