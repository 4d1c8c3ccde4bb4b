"""Errors that a user can fix, and their messages."""

import errno
import re
import sys
from collections.abc import Iterator

from dora_mm.utils.messages import ChangedFileError, ServerError, compiler_problem, is_ours, raised_by_us, shown

LONGEST_LINE = 2000  # characters
MOST_LINES = 60  # of a report

_FULL = ("No space left on device", "Disk quota exceeded")  # safetensors and torch wrap them in other errors
_NATIVE = re.compile(r"\b(?:I/O error|IoError)\W+(.*?) \(os error \d+\)")  # how safetensors shows errors of the system
_REFUSED = (errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)  # also where no file is named


def user_message(error: Exception) -> str | None:
    """The message for an error that the user can fix; None for a bug, which keeps its traceback.

    It may hold names out of files: only the lines of our own reports, which are indented, begin new ones.
    """
    message = _message(error)
    if message is None:
        return None
    lines = message.split("\n  ")
    more = [f"and {len(lines) - MOST_LINES:,} more lines"] if len(lines) > MOST_LINES else []
    return "\n  ".join([*(shown(line, LONGEST_LINE) for line in lines[:MOST_LINES]), *more])


def _message(error: Exception) -> str | None:
    for cause in causes(error):
        if any(text in str(cause) for text in _FULL):
            return f"the disk is full: free some space, then run again (train: with --resume RUN_DIR) ({cause})"
    if found := next((found for cause in causes(error) if (found := _NATIVE.search(str(cause)))), None):
        return f"a file cannot be written or read: {found[1]}"
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _REFUSED):
        return f"{error.filename or 'a file'} cannot be written or read: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name and not is_ours(error.name):
        extras = "eval,optim,track,vl"  # all extras that commands use
        return f"the package {error.name} is missing: pip install 'dora_mm[{extras}]'"
    compiler = sys.modules.get("torch._dynamo.exc")  # importing it takes seconds
    if compiler is not None and isinstance(error, compiler.TorchDynamoException):  # in a forward or a backward pass
        return f"train.compile: a block cannot be compiled ({compiler_problem(error)}): leave it out"
    if isinstance(error, ChangedFileError | ServerError) or (isinstance(error, ValueError) and raised_by_us(error)):
        return str(error)
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
