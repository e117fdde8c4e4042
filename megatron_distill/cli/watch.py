"""``megatron-distill watch RUN``: a live page of a run, on this machine."""

import argparse
from pathlib import Path

from megatron_distill.runs.run_folder import RunFolder


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "A live page of a run: curves, who works when, samples token by token, processes and logs. It follows the run "
        "folder, so the run may be on other machines, be over, or be started again. Ctrl-C ends the page, not the run."
    )
    parser.add_argument("run_dir", type=Path, help="the run folder")
    parser.add_argument("--port", type=int, default=0, help="of http://127.0.0.1 (default: a free one)")


def run(options: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    from megatron_distill.launch.signals import Interrupted
    from megatron_distill.pages.watch import serve

    server = serve(RunFolder(options.run_dir.absolute()), options.port)
    print(f"{server.url}  (Ctrl-C ends the page, not the run)", flush=True)
    try:
        with server:
            server.serve_forever()
    except Interrupted as stop:
        stop.told = "the page has ended, the run has not"
        raise
