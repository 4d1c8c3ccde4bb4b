"""Messages: texts of others in them (of libraries, or names out of files), and what no row may be left out for."""

import difflib
import re
from collections.abc import Iterable

# What a terminal obeys or does not show: control characters, among them line breaks, and what turns the direction of
# text. No name of a module needs them.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


class ChangedFileError(Exception):
    """A file of the data is another one than the one that was read before.

    It is no ValueError: a row or picture that cannot be read may be left out, and this one would be, silently.
    """


def shown(text: object, most: int = 200) -> str:
    """A text on one line, with what a terminal would obey as escapes, and the beginning of one that is too long.

    Args:
        text: The text, or what has one.
        most: The number of characters that are shown.
    """
    whole = str(text)
    line = UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), whole[:most])
    return line if len(whole) <= most else f"{line} ... ({len(whole)} characters)"


def compiler_problem(error: BaseException) -> str:
    """The first line of what a compiler has raised, without that of torch around it."""
    return first_line(getattr(error, "inner_exception", error))


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def nearest(name: str, names: Iterable[str]) -> str:
    """The text ", did you mean '...'?" with the most similar of `names`, or an empty text if none is similar."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""
