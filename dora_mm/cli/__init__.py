"""The command line, dora-mm. Only the recipes in `pipelines/`, which its commands run, import large packages."""

import contextlib
import logging
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from dora_mm.cli.errors import user_message
from dora_mm.cli.other_forms import right_form
from dora_mm.cli.parser import build_parser
from dora_mm.cli.streams import open_streams
from dora_mm.registries.other_trainers import command_of
from dora_mm.utils.messages import OURS, nearest
from dora_mm.utils.processes import reports_end

if TYPE_CHECKING:
    from dora_mm.recipes import Recipes

DONE, BUG, USER_ERROR, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143  # a bug leaves its traceback

SLOW_TO_START = (
    *("train", "sample", "grid", "eval", "compare", "features", "new", "inspect", "merge", "convert", "verify"),
    *("extract", "average", "combine", "ask", "caption"),
)  # the commands that import torch


class Termination(KeyboardInterrupt):
    """Raised on SIGTERM; a KeyboardInterrupt, so that code which saves its state on Ctrl-C does so here, too."""


def main(argv: Sequence[str] | None = None, recipes: "Recipes | None" = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments after the program's name; None: those of the process.
        recipes: The recipes that configs may name; None: those of `pipelines/`.

    Returns:
        The exit code: 0 done, 2 a user's mistake (one message on standard error), 130 and 143 interrupted.
    """
    open_streams()
    given = sys.argv[1:] if argv is None else argv
    try:
        try:
            _run(given, recipes)
        finally:  # also of a help text: the disk may be full
            sys.stdout.flush()
    except KeyboardInterrupt as interruption:
        terminated = isinstance(interruption, Termination)
        if reports_end():
            print(f"dora-mm: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
        return TERMINATED if terminated else INTERRUPTED
    except Exception as error:
        message, reports = user_message(error), reports_end()  # of several processes one reports
        if message is None and reports:
            raise
        if reports:
            print(f"dora-mm: {message}", file=sys.stderr)
        return BUG if message is None else USER_ERROR
    return DONE


def _run(given: Sequence[str], recipes: "Recipes | None") -> None:
    arguments = _parsed(given)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    _check_encoding(given)
    if arguments.command in SLOW_TO_START and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print(f"dora-mm {arguments.command}: starting ...", file=sys.stderr, flush=True)  # torch takes seconds
    with _sigterm_raises():
        from dora_mm.utils.requirements import check_command

        check_command(arguments.command)
        from dora_mm.cli.commands import run  # here, since it imports pydantic

        run(arguments, recipes)


def _parsed(given: Sequence[str]) -> Namespace:
    parser = build_parser()
    commands = parser.commands
    if not given:
        parser.print_help(sys.stderr)
        parser.exit(USER_ERROR)
    if not given[0].startswith("-") and given[0] not in commands:
        meant = f": {use}" if (use := command_of(given[0])) else nearest(given[0], commands)
        listed = f"; there are {', '.join(commands)}"
        parser.error(f"there is no command {given[0]!r}{meant or listed}")
    arguments, unknown = parser.parse_known_args(given)
    if unknown:
        usage = commands[arguments.command].format_usage()
        parser.error(right_form(unknown, given, usage) or f"unrecognized arguments: {' '.join(unknown)}")
    return arguments


def _check_encoding(argv: Sequence[str]) -> None:
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:  # bytes that are not UTF-8 arrive as lone surrogates, which no file of ours can hold
            raise ValueError(f"the argument {argument!r} is not valid UTF-8") from None


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Termination

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
