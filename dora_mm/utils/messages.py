"""Messages: texts of others in them (of libraries, or names out of files), and what no row may be left out for."""

import difflib
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from logging import Logger

OURS = ("dora_mm", "samples")  # the top-level packages of our own code; samples/build exists in a checkout only
# What a terminal obeys or does not show: control characters, among them line breaks, and what turns the direction of
# text. No name of a module needs them.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


class ChangedFileError(Exception):
    """A file of the data is another one than the one that was read before.

    It is no ValueError: a row or image that cannot be read may be left out, and this one would be, silently.
    """


class ServerError(Exception):
    """A server does not answer a request.

    It is no ValueError: a row that cannot be read may be left out, and one that nobody answered may not.
    """


def shown(text: object, most: int = 200) -> str:
    """A text on one line, with what a terminal would obey as escapes, and the beginning of one that is too long.

    Args:
        text: The text, or what has one.
        most: The number of characters that are shown.
    """
    full_text = str(text)
    line = UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), full_text[:most])
    return line if len(full_text) <= most else f"{line} ... ({len(full_text)} characters)"


def for_terminal(text: str) -> str:
    """A text of any number of lines, with what a terminal would obey as escapes, but for line breaks and tabs."""
    return re.sub(r"(?![\n\t])" + UNSEEN.pattern, lambda found: found[0].encode("unicode_escape").decode(), text)


def compiler_problem(error: BaseException) -> str:
    """The first line of what a compiler has raised, without that of torch around it."""
    return first_line(getattr(error, "inner_exception", error))


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def foreign_errors(problem: str) -> Iterator[None]:
    """A context in which another library reads a file: whatever it raises becomes one sentence.

    Args:
        problem: The sentence, which names the file; what the library says follows in brackets.

    Raises:
        ValueError: The body raised an error; one of our own stays as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and raised_by_us(error):
            raise
        raise ValueError(f"{problem} ({shown(first_line(error))})") from error


def raised_by_us(error: Exception) -> bool:
    """Only our own code checks for users' mistakes, so a ValueError that a library raises is a bug."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return is_ours(frame.f_globals.get("__name__", ""))


def is_ours(module: str) -> bool:
    """Whether a module is one of our own packages."""
    return module.partition(".")[0] in OURS


@cache
def log_once(log: Logger, text: str) -> None:
    """Logs what is true of a file, however often it is read."""
    log.info("%s", text)


def nearest(name: str, names: Iterable[str]) -> str:
    """The text ", did you mean '...'?" with the most similar of `names`, or an empty text if none is similar."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""
