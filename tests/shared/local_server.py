"""A server of the tests' own, which answers as vLLM does."""

import json
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Sent(NamedTuple):
    """What a server sends in place of an answer, as it is.

    Attributes:
        pieces: The bytes, one piece after the other.
        wait: Seconds before each piece.
        kind: Its content type.
        length: Its announced length; None: none is announced.
    """

    pieces: Iterable[bytes]
    wait: float = 0.0
    kind: str = "text/event-stream"
    length: int | None = None

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", self.kind)
        if self.length is not None:
            handler.send_header("Content-Length", str(self.length))
        handler.end_headers()
        with suppress(ConnectionError):  # the other side has enough
            for piece in self.pieces:
                time.sleep(self.wait)
                handler.wfile.write(piece)
                handler.wfile.flush()


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM does; `server` of the test says how."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        own = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with own.lock:
            own.keys.add(self.headers.get("Authorization"))
            code = 400 if own.refuses in body else own.codes.pop(0) if own.codes else 200
            if code == 200:
                own.bodies.append(body)
        if code == 302:
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()
        elif code != 200:
            problem = (
                f"{own.refuses} is not supported" if own.refuses else "this model's maximum context length is 8 tokens"
            )
            self.reply(code, {"error": {"message": problem}})
        else:
            said = own.say(body)
            message = said if isinstance(said, dict) else {"role": "assistant", "content": said}
            if callable(said):
                said(self)
            elif own.streams and body.get("stream"):
                self.stream(message)
            else:
                self.reply(200, {"choices": [{"index": 0, "message": message, "finish_reason": own.reason}]})

    def stream(self, message: dict[str, Any]) -> None:
        """Sends a message as vLLM does: its role, each of its texts in parts, why it ended, its usage, and the end."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        parts = [{"role": "assistant", "content": ""}]
        for name, text in message.items():
            parts += [{name: text[at : at + 3]} for at in range(0, len(text or ""), 3) if name != "role"]
        choices = [[{"index": 0, "delta": part, "finish_reason": None}] for part in parts]
        choices += [[{"index": 0, "delta": {}, "finish_reason": self.server.reason}], []]
        for each in choices:
            self.wfile.write(b"data: " + json.dumps({"choices": each}).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def reply(self, code: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def text_of(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def started() -> Any:
    """A server in a thread; its attributes say how it answers, and what it was asked."""
    own: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    own.models, own.codes, own.bodies, own.keys, own.reason = ["served-vlm"], [], [], set(), "stop"
    own.streams, own.refuses = True, None
    own.lock = threading.Lock()
    own.say = lambda body: "No." if "cat" in text_of(body) else "<think>a dog?</think>Yes"
    threading.Thread(target=own.serve_forever, args=(0.02,), daemon=True).start()
    return own
