"""The command line: ``megatron-distill COMMAND ...``. A command is one line of ``COMMANDS`` and a file beside this one.

In: what was typed. Out: an exit code. A command's file has ``configure(parser)``, which declares its arguments, and
``run(options)``; it is imported when its command is typed, and what it needs when it runs, so that ``--help`` stays quick.

A user's error is printed without a traceback and ends with code 1. Ctrl-C stops everything and ends with code 130, SIGTERM and
SIGHUP with 143. Output that nobody reads any more (``| head``) ends it with 141.
"""

import argparse
import contextlib
import difflib
import importlib
import os
import re
import select
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_distill import __version__
from megatron_distill.errors import DistillError

COMMANDS = {
    "train": "run a recipe on this machine, or resume it",
    "launch": "run a recipe as a Slurm job, or resume it",
    "fetch": "bring models and data sets from the Hugging Face hub, before a run",
    "show": "what the student and the teacher see, token by token, with the loss mask",
    "plan": "what a run will take: layout, memory, bytes on the wire",
    "pipeline": "run stages with gates between them, or resume them: distil, then reinforce, then evaluate",
    "fork": "make a new run from a run's checkpoint, with another config",
    "export": "write any checkpoint as a Hugging Face directory",
    "study": "run a study, or resume it: the same task under many settings, with tables and figures",
    "eval": "measure a model on problems",
    "watch": "a live page of a run: curves, timeline, samples, processes and logs",
    "report": "write a run's page and plots, or write them again",
    "compare": "metrics of several runs together, and what their configs differ in",
    "new": "write a recipe for your own models and data, and check it",
    "completion": "make the shell complete commands, recipes and fields",
    "doctor": "what is installed, and what works here",
    "convert": "move weights between Hugging Face and Megatron, inspect and compare checkpoints",
}
"""Every command and what it does, in the order of ``--help``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn errors into one message and an exit code."""
    from megatron_distill.launch import signals  # small, and not for whoever only asks what commands there are

    try:
        with signals.as_interrupts():
            options = _parse(sys.argv[1:] if argv is None else list(argv))
            command_module(options.command).run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return 141  # as of a program that SIGPIPE ends
    except DistillError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        told = getattr(stop, "told", "") or "stopped; the same command goes on where it was"
        with contextlib.suppress(OSError):  # a terminal that was closed
            print(f"\n{told}", file=sys.stderr, flush=True)
        return getattr(stop, "code", 130)
    return 0


def _reader_has_gone() -> bool:
    """Whether it was ``| head`` that ended; what is left to print then goes nowhere, quietly."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def command_module(command: str) -> Any:
    """The file of a command: ``configure(parser)`` and ``run(options)``."""
    return importlib.import_module(f"megatron_distill.cli.{command}")


def make_parser(configured: Sequence[str]) -> argparse.ArgumentParser:
    """The whole command line, with the arguments of the ``configured`` commands; the others show their line of help only."""
    parser = argparse.ArgumentParser(
        prog="megatron-distill",
        description="Distil large language models, then reinforce them, inside Megatron's own training loop.",
        epilog="megatron-distill COMMAND --help explains a command.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            formatter_class=_Wrapped,
        )
        if name in configured:
            command_module(name).configure(command)
    return parser


class _Wrapped(argparse.RawDescriptionHelpFormatter):
    """Prose fits the terminal; lines that hold columns or something to type stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(self._wrapped(indent + line, width) for line in text.splitlines())

    def _wrapped(self, line: str, width: int) -> str:
        words = line.lstrip()
        if len(line) <= width or "  " in words or words.startswith(("e.g.", "'")):
            return line
        margin = line[: len(line) - len(words)]
        return textwrap.fill(words, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse, with overrides wherever they stand: argparse takes ``nargs="*"`` from one place of the line only.

    What is no override is refused by the command, which knows what else may stand there.
    """
    parser = make_parser([word for word in argv if word in COMMANDS][:1])
    if argv and argv[0][:1] != "-" and argv[0] not in COMMANDS:
        parser.error(f"no command {argv[0]!r}. {_meant(argv[0], COMMANDS, parser.prog)}")
    options, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(options, "overrides") and not any(item.startswith("-") for item in rest)):
        known = re.findall(r"--\w[\w-]*", _parser_of(options.command).format_help())
        meant = _meant(rest[0].partition("=")[0], known, f"{parser.prog} {options.command}")
        parser.error(f"unrecognized arguments: {' '.join(rest)}. {meant}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser_of(command: str) -> argparse.ArgumentParser:
    """One command's arguments, for what their help says of them."""
    parser = argparse.ArgumentParser()
    command_module(command).configure(parser)
    return parser


def _meant(typed: str, known: Iterable[str], helps: str) -> str:
    """What to type instead: the likely word, or who tells them all."""
    close = difflib.get_close_matches(typed, known, n=1)
    return f"Did you mean {close[0]}?" if close else f"Type {helps} --help."


if __name__ == "__main__":
    sys.exit(main())
