"""Answers of a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, TypeVar

from dora_mm.config.served import KEY_VARIABLE, ServerConfig
from dora_mm.config.vl import TextSamplingConfig
from dora_mm.data.images.decoders import open_image
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.vl.answers import Answer, ModelAnswer
from dora_mm.data.vl.example import Example, Turn, leading, pieces_of
from dora_mm.data.vl.image_folder import image_path
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.models.vl.served_answers import CutOffError, Deadline, LostAnswerError, read_answer, read_json
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils.messages import ServerError, shown

log = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")
WAITS = (1.0, 4.0, 15.0)  # seconds before each further try
BUSY = (408, 425, 429, 500, 502, 503, 504)  # codes of servers that may answer later
UNFIT = (400, 413, 422)  # codes for a request that is never answered, as one that is too long
SENT_AS_THEY_ARE = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}
UPRIGHT = (None, 1)  # values of the tag of orientation
ORIENTATION = 0x0112


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key and images go to the server that is named, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Watched:
    """Connections of a request end by its deadline."""

    def do_open(self, http_class: Any, request: Any, **settings: Any) -> Any:
        def connection(host: str, **more: Any) -> Any:
            opened = http_class(host, **more)
            request.deadline.watch(opened)
            return opened

        return super().do_open(connection, request, **settings)  # pyright: ignore[reportAttributeAccessIssue]


class _WatchedHTTP(_Watched, urllib.request.HTTPHandler):
    pass


class _WatchedHTTPS(_Watched, urllib.request.HTTPSHandler):
    pass


class _Request(urllib.request.Request):
    deadline: Deadline


class Server:
    """A server.

    Args:
        config: Where it is.
    """

    def __init__(self, config: ServerConfig):
        self.config = config
        self._key = os.environ.get(KEY_VARIABLE)
        self._opener = urllib.request.build_opener(_NoRedirect, _WatchedHTTP, _WatchedHTTPS)
        self._streams = True  # until it refuses to

    def model(self) -> str:
        """The name of the model that answers.

        Raises:
            ServerError: It cannot be reached.
            ValueError: It serves several models and none is named, or not the named one.
        """
        try:
            found = self._call("/models", None, read_json).get("data")
        except LostAnswerError as error:
            raise ServerError(f"server.url: the list of models of {self.config.url} {error}") from None
        names = (
            [str(each["id"]) for each in found if isinstance(each, dict) and "id" in each]
            if isinstance(found, list)
            else []
        )
        wanted = self.config.model
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted is None or (names and wanted not in names):
            given = "does not say what it serves" if not names else f"serves {', '.join(map(shown, names))}"
            raise ValueError(f"server.model: {self.config.url} {given}: name one of these")
        return wanted

    def answer(self, body: Mapping[str, Any]) -> ModelAnswer:
        """The answer to a request; one that does not arrive within the bounds has the reason, and no text.

        Raises:
            ServerError: The server does not answer.
            ValueError: It refuses this request.
        """
        try:
            if self._streams:
                try:
                    return self._call("/chat/completions", {**body, "stream": True}, read_answer)
                except ValueError as error:
                    if "stream" not in str(error):
                        raise
                    self._streams = False
                    log.info("%s; asked again for whole answers", error)
            return self._call("/chat/completions", body, read_answer)
        except LostAnswerError as error:
            return ModelAnswer("", failure=str(error))

    def _call(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        read: Callable[[HTTPResponse, Deadline, int, str], ResultT],
    ) -> ResultT:
        """What `read` makes of a response; a busy server, or one that cuts it off, is asked again.

        Raises:
            LostAnswerError: It does not arrive within the bounds, or is cut off each time.
            ServerError: The server cannot be reached, or refuses all requests.
            ValueError: It refuses this request.
        """
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        content = None if body is None else json.dumps(body).encode()
        for wait in (*WAITS, None):
            request = _Request(f"{self.config.url}{path}", content, headers)
            with Deadline(self.config.timeout) as request.deadline:  # which the socket leaves to speak first
                try:
                    with self._opener.open(request, timeout=self.config.timeout + 1) as response:
                        return read(response, request.deadline, self.config.max_bytes, self.config.url)
                except urllib.error.HTTPError as error:
                    if error.code in UNFIT:
                        raise ValueError(self._refusal(error)) from None
                    if error.code not in BUSY or wait is None:
                        raise ServerError(self._refusal(error)) from None
                    problem = f"code {error.code}"
                except CutOffError as error:
                    problem = f"cut off: {shown(error)}"
                    if wait is None:
                        raise LostAnswerError(f"was cut off {len(WAITS) + 1} times") from None
                except (OSError, HTTPException) as error:  # no route, no server, no answer in time
                    if request.deadline.connected:
                        request.deadline.check()
                    problem = shown(getattr(error, "reason", error))
                    if wait is None:
                        raise ServerError(f"server.url: {self.config.url} cannot be reached ({problem})") from None
            log.info("%s: %s; tried again in %.0f s", self.config.url, problem, wait)
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        if error.code in (401, 403):
            return f"server.url: {self.config.url} wants a key: set the variable {KEY_VARIABLE} (code {error.code})"
        body = error.read(2000).decode("utf-8", "replace")
        return f"server.url: {self.config.url} refuses it with code {error.code}: {shown(body)}"


class ServerAnswers:
    """Answers the examples of tasks by a server.

    Args:
        server: The server.
        model: The name of the model there.
        decode: How it answers.
        prompts: The prompts of tasks that have others than their own.
    """

    def __init__(self, server: Server, model: str, decode: TextSamplingConfig, prompts: Mapping[str, str]):
        self.server, self.model, self.decode, self.prompts = server, model, decode, prompts

    def check_rows(self, table: ExampleTable) -> ExampleTable:
        """A table of the rows that can be sent, those without videos, tools and boxes.

        Raises:
            ValueError: A row has some and the table's `on_bad_data` is "stop", or all have.
        """
        marked = table.has("boxes") & (table.lengths("turns") > 0)
        for bad, what in ((table.filmed(), "a video"), (table.has("tools"), "tools"), (marked, "boxes in its texts")):
            table = table.without(bad, f"has {what}, which are sent to no server")
        return table

    def answerer(self, task: str) -> Answer:
        """A function that answers the examples of a task, one after the other: several threads may call it."""

        def answer(example: Example, images: str | None) -> ModelAnswer:
            try:
                found = self.server.answer(self.body(task, example, images))
            except ValueError as error:
                raise ValueError(f"row {example.id} of {task}: {error}") from error
            if found.failure:
                log.warning("row %s of %s: its answer %s", example.id, task, found.failure)
            kept = self.decode.keep_thoughts
            return (found.with_thought() if kept else found.without_thought(example.answers)).stripped()

        return lambda examples, images: [answer(example, images) for example in examples]

    def body(self, task: str, example: Example, images: str | None) -> dict[str, Any]:
        """The request for the answer to an example."""
        decode = self.decode
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(task, example, images),
            "max_tokens": decode.max_new_tokens or TASKS[task].max_answer,
            "temperature": decode.temperature,
        }
        if decode.temperature:
            body |= {"top_p": decode.top_p, "seed": decode.seed}
        return body | ({"stop": list(decode.stop)} if decode.stop else {})

    def _messages(self, task: str, example: Example, folder: str | None) -> list[dict[str, Any]]:
        images = iter([_image_item(image_path(folder, name)) for name in example.images])
        prompt = self.prompts.get(task, TASKS[task].prompt) or "{text}"
        if not example.turns:
            text = prompt.replace("{text}", example.text)
            return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
        if TASKS[task].kind == "conversations":
            return [_message(turn, images) for turn in example.prompt_turns]
        (question,) = example.prompt_turns
        marks, text = leading(question.text)
        return [_message(question._replace(text=marks + prompt.replace("{text}", text)), images)]


def _message(turn: Turn, images: Any) -> dict[str, Any]:
    """A turn as a message: only those of a user have images, and other roles plain texts."""
    pieces = pieces_of(turn.text)
    if len(pieces) == 1:
        return {"role": turn.role, "content": pieces[0]}
    items = [next(images) if number % 2 else {"type": "text", "text": piece} for number, piece in enumerate(pieces)]
    return {"role": turn.role, "content": [item for item in items if item.get("text") != ""]}


def _image_item(path: Path) -> dict[str, Any]:
    """An image file as an item of a message: as it is, or as PNG where it is turned, transparent or of another kind."""
    content = path.read_bytes()
    with open_image(io.BytesIO(content)) as image:
        kind = SENT_AS_THEY_ARE.get(image.format or "")
        is_upright_rgb = image.mode in ("RGB", "L") and image.getexif().get(ORIENTATION) in UPRIGHT
    if kind is None or not is_upright_rgb:
        file = io.BytesIO()
        load_rgb(path).save(file, "PNG")
        kind, content = "png", file.getvalue()
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"},
    }
