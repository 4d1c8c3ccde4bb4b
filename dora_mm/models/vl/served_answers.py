"""The answers that a server of OpenAI's protocol sends, whole or as a stream of events, read within bounds."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any

from dora_mm.data.vl.answers import ModelAnswer, message_answer, message_texts
from dora_mm.utils.messages import ServerError, shown

CHUNK = 2**16  # bytes that are read at once
EVENTS = "text/event-stream"
DONE = b"[DONE]"  # the last event


class LostAnswerError(Exception):
    """An answer did not arrive within its bounds. The message continues a sentence on the answer.

    It is no ValueError: a row that cannot be read may be left out, and this one scores 0.
    """


class CutOffError(OSError):
    """The connection ended within an answer."""


class Deadline:
    """A context in which a request ends at a time, whatever it waits for.

    The timeout of a socket is that of each wait, which a server that sends a byte now and then never reaches.

    Args:
        seconds: The time that the request has.

    Attributes:
        expired: Whether it is over.
        connected: Whether the server was reached.
    """

    def __init__(self, seconds: float):
        self.seconds, self.expired, self.connected = seconds, False, False
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._socket: socket.socket | None = None
        self._connection: HTTPConnection | None = None

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._timer.cancel()

    def watch(self, connection: HTTPConnection) -> None:
        """Ends what a connection waits for when the time is over, the handshake of TLS included."""
        connect = connection.connect

        def connect_watched() -> None:
            connect()
            self._socket, self.connected = connection.sock, True  # urllib takes it from the connection afterwards
            self.check()

        self._connection = connection
        connection.connect = connect_watched

    def check(self) -> None:
        """Checks that there is time left.

        Raises:
            LostAnswerError: There is none.
        """
        if self.expired:
            raise LostAnswerError(f"had not ended after {self.seconds:g} s (server.timeout)")

    def _expire(self) -> None:
        self.expired = True
        for found in (self._socket, self._connection and self._connection.sock):
            with suppress(OSError):  # it is closed already
                if found is not None:
                    socket.socket.shutdown(found, socket.SHUT_RDWR)  # that of TLS would wait for the other side


def read_json(response: HTTPResponse, deadline: Deadline, max_bytes: int, url: str) -> dict[str, Any]:
    """The object that a response is.

    Raises:
        LostAnswerError: It is longer, or has taken more time, than it may.
        CutOffError: The connection ended before its end.
        ServerError: It is no object of JSON.
    """
    content = b"".join(_chunks(response, deadline, max_bytes))
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ServerError(f"server.url: {url} does not answer with JSON, as OpenAI's protocol does")
    return found


def read_answer(response: HTTPResponse, deadline: Deadline, max_bytes: int, url: str) -> ModelAnswer:
    """The answer that a response has: a stream of events, or one object of a server that does not stream.

    Raises:
        LostAnswerError: As in `read_json`, which see.
        CutOffError: As there; or the stream ended without a reason, or with an error.
        ServerError: As there; or there is no message in it.
    """
    is_stream = response.headers.get_content_type() == EVENTS
    try:
        if is_stream:
            return _streamed(_chunks(response, deadline, max_bytes))
        found = read_json(response, deadline, max_bytes, url)
        choice = found["choices"][0]
        return message_answer(choice["message"], choice.get("finish_reason"))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        about = "a stream of other events" if is_stream else shown(found)
        raise ServerError(f"server.url: {url} answered without a message ({about})") from None


def _chunks(response: HTTPResponse, deadline: Deadline, max_bytes: int) -> Iterator[bytes]:
    """The bytes of a response as they come."""
    num = 0
    while True:
        try:
            chunk = response.read1(CHUNK)
        except TimeoutError:
            raise LostAnswerError(f"had not ended after {deadline.seconds:g} s (server.timeout)") from None
        except (HTTPException, OSError) as error:
            deadline.check()
            raise CutOffError(str(error) or "the connection ended") from None
        deadline.check()
        num += len(chunk)
        if num > max_bytes:
            raise LostAnswerError(f"was longer than {max_bytes:,} bytes (server.max_bytes)")
        if not chunk:
            break
        yield chunk
    if response.length:  # what is missing of the announced length
        raise CutOffError(f"{response.length:,} bytes are missing")


def _streamed(chunks: Iterable[bytes]) -> ModelAnswer:
    """The answer in a stream of events, of which each has a part of its message, and the last one why it ended."""
    texts, thoughts, ended, is_done = [], [], None, False
    for line in _lines(chunks):
        name, _, value = line.partition(b":")
        if name != b"data":
            continue  # a comment that keeps the connection open, the name of an event, or what divides events
        if is_done := value.strip() == DONE:
            break
        event = json.loads(value)
        if problem := event.get("error"):
            raise CutOffError(f"the server says {shown(problem)}")
        for choice in event["choices"][:1]:  # the event of `usage` has none
            text, thought = message_texts(choice.get("delta") or {})
            texts.append(text)
            thoughts.append(thought)
            ended = choice.get("finish_reason") or ended
    if ended is None and not is_done:
        raise CutOffError("the stream ended without a reason")
    return message_answer({"content": "".join(texts), "reasoning": "".join(thoughts)}, ended)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of pieces of a text."""
    rest = bytearray()
    for chunk in chunks:
        *lines, last = chunk.split(b"\n")
        for line in lines:
            yield bytes(rest + line)
            rest = bytearray()
        rest += last
    if rest:
        yield bytes(rest)
