"""A script with which a shell completes commands, options, keys of configs and paths."""

import argparse
from collections.abc import Iterator

import shtab

from dora_mm.cli.parser import CommandParser
from dora_mm.config.pipelines import SCHEMAS
from dora_mm.config.report import ANY_NAME, all_keys

TEXTS = ("NAME", "KEY=VALUE", "TEXT", "TARGET", "R", "N", "T", "W", "SHARE", "RATE", "COLUMN", "QUESTION", "FAMILY")


def script(shell: str, parser: CommandParser) -> str:
    """The script for a shell.

    Args:
        shell: bash, zsh, fish or powershell.
        parser: The parser of the command line.
    """
    keys = [f"{key}=" for schema in SCHEMAS.values() for key in all_keys(schema) if ANY_NAME not in key]
    for action in arguments_of(parser):
        if action.metavar == "KEY=VALUE" and action.dest == "overrides":
            action.choices = list(dict.fromkeys(keys))
        elif takes_path(action):
            setattr(action, "complete", shtab.FILE)  # noqa: B010 (shtab reads an attribute that argparse has not)
    return shtab.complete(parser, shell=shell)


def arguments_of(parser: CommandParser) -> Iterator[argparse.Action]:
    """The arguments of all commands."""
    for command in parser.commands.values():
        yield from command._actions  # argparse has no public name for them


def takes_path(action: argparse.Action) -> bool:
    """Whether an argument is a file or a folder."""
    return isinstance(action.metavar, str) and action.metavar not in TEXTS and action.choices is None
