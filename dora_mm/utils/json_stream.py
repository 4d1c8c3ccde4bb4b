"""JSON of any length, one value of a list or an object at a time: each of bounded size and depth.

ijson has no bounds: it builds a row of any size, nested as deeply as the file says.
"""

from __future__ import annotations

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

MOST_CHARACTERS = 64 * 2**20  # of one value: 40 MB of images in base64, which some rows hold
CHUNK = 2**16  # bytes
SPACE, COMMA = re.compile(r"[ \t\n\r]*").match, re.compile(r"[ \t\n\r]*,[ \t\n\r]*").match
HALF = re.compile(r"\\u[dD][89a-fA-F]").search  # of a surrogate pair


class JSONStream:
    """A position in a JSON file, before a value.

    Every method raises json.JSONDecodeError where the file ends early or is no JSON, or where a value is longer than
    `MOST_CHARACTERS` or nested too deeply; UnicodeDecodeError where it is not UTF-8.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._decoder = file, getincrementaldecoder("utf-8")()
        self._text, self._at, self._escapes = "", 0, False

    def elements(self) -> Iterator[Any]:
        """The elements of the list here; none where there is another value. The stream is then behind it."""
        if self._next() != "[":
            self.skip()
            return
        closed = self._opens("]")
        while not closed:
            yield self.value()
            closed = self._closes("]")

    def members(self) -> Iterator[str]:
        """The keys of the object here, none where there is another value: who gets one reads the value behind it."""
        if self._next() != "{":
            self.skip()
            return
        closed = self._opens("}")
        while not closed:
            if self._next() != '"':
                self._refuse("a key has to be in double quotes")
            key = self.value()
            if self._next() != ":":
                self._refuse("':' is missing behind a key")
            self._at += 1
            yield key
            closed = self._closes("}")

    def skip(self) -> None:
        """Goes behind the value here; a list or an object may be of any length."""
        if (mark := self._next()) == "[":
            for _ in self.elements():
                pass
        elif mark == "{":
            for _ in self.members():
                self.value()
        else:
            self.value()

    def value(self) -> Any:
        """The value here."""
        if self._text[self._at : self._at + 1] in " \t\n\r":  # as "" is, at the end of what was read
            self._next()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._more():  # a number may go on
                    break
            except json.JSONDecodeError as error:
                early = error.pos >= len(self._text) or error.msg.startswith("Unterminated")
                if not self._more():
                    self._refuse("it ends too early" if early else error.msg)
            except RecursionError:
                self._refuse("a value is nested too deeply")
            except ValueError as error:  # a number of more digits than Python converts
                self._refuse(str(error).split(";")[0])
        start, self._at = self._at, end
        return _without_halves(value) if self._escapes and HALF(self._text, start, end) else value

    def end(self) -> None:
        """Checks that nothing follows."""
        if self._next():
            self._refuse("something follows the last value")

    def _opens(self, close: str) -> bool:
        """Goes into a list or an object; whether it is empty, and then behind it."""
        self._at += 1
        empty = self._next() == close
        self._at += empty
        return empty

    def _closes(self, close: str) -> bool:
        """Goes behind the comma or the end that has to follow an element; whether it was the end."""
        if found := COMMA(self._text, self._at):
            self._at = found.end()
            return False
        if (mark := self._next()) not in (",", close):
            self._refuse(f"',' or '{close}' is missing" if mark else "it ends too early")
        self._at += 1
        return mark == close

    def _next(self) -> str:
        """Goes to the next character that is no space; "" at the end of the file."""
        while (position := SPACE(self._text, self._at).end()) == len(self._text):  # type: ignore[union-attr]
            self._at = position
            if not self._more():
                return ""
        self._at = position
        return self._text[position]

    def _more(self) -> bool:
        """Reads on, as much as there is in front: a value of any length takes linear time. False at the end."""
        if len(self._text) - self._at > MOST_CHARACTERS:
            self._refuse(f"a value has more than {MOST_CHARACTERS:,} characters")
        content = self._file.read(max(CHUNK, len(self._text) - self._at))
        text = self._decoder.decode(content, not content)
        if content:
            self._text, self._at = self._text[self._at :] + text, 0
            self._escapes = "\\u" in self._text
        return bool(content)

    def _refuse(self, reason: str) -> NoReturn:
        raise json.JSONDecodeError(reason, "", 0) from None


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not in JSON")


def _without_halves(value: Any) -> Any:
    """A value with question marks in place of halves of surrogate pairs, which no file can hold."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


DECODER = json.JSONDecoder(parse_constant=_no_json)
