"""Answers of a server of the test's own that is slow, endless, or cut off, and what it says of an answer."""

import itertools
import json
import time
import tracemalloc
from contextlib import suppress

import pytest

from dora_mm.config.served import ServerConfig
from dora_mm.data.vl.answers import ModelAnswer
from dora_mm.models.vl import server as served
from dora_mm.models.vl.server import Server
from dora_mm.utils.messages import ServerError
from tests.shared.local_server import Sent, started

BODY = {"model": "served-vlm", "messages": [{"role": "user", "content": "Q"}]}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(served, "WAITS", (0.0, 0.0))
    own = started()
    yield own
    own.shutdown()
    own.server_close()


def answer(server, said, **settings):
    server.say = lambda body: said
    config = ServerConfig.model_validate({"url": f"http://127.0.0.1:{server.server_port}/v1", **settings})
    return Server(config).answer(BODY)


def event(text, ended=None):
    return (
        b"data: " + json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": ended}]}).encode() + b"\n\n"
    )


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    ("message", "ended", "expected"),
    [
        ({"content": "a dog"}, "stop", ModelAnswer("a dog", ended="stop")),
        ({"content": "<think>a cat?</think>a dog"}, "stop", ModelAnswer("<think>a cat?</think>a dog", ended="stop")),
        (
            {"content": "a dog", "reasoning_content": "a cat?"},
            "stop",
            ModelAnswer("a dog", "<think>a cat?</think>", "stop"),
        ),
        ({"content": None, "reasoning": "a cat, or"}, "length", ModelAnswer("", "<think>a cat, or</think>", "length")),
        ({"content": None}, "content_filter", ModelAnswer("", ended="content_filter")),
    ],
)
def test_a_streamed_answer_is_the_whole_one(server, streams, message, ended, expected):
    server.streams, server.reason = streams, ended
    assert answer(server, {"role": "assistant", **message}) == expected
    assert server.bodies[0]["stream"] is True


def test_a_server_that_refuses_to_stream_is_asked_for_whole_answers(server):
    server.refuses = "stream"
    assert answer(server, "a dog") == ModelAnswer("a dog", ended="stop")
    assert [body.get("stream") for body in server.bodies] == [None]


def test_events_are_read_as_other_servers_write_them(server):
    parts = [
        b": keep alive\n\n",
        b"event: message\r\n",
        event("a "),
        event("dog", "stop")[:20],
        event("dog", "stop")[20:],
    ]
    assert answer(server, Sent(parts)) == ModelAnswer("a dog", ended="stop")  # without [DONE], as some do
    thinking = [{"type": "thinking", "thinking": [{"type": "text", "text": "a cat?"}]}]
    parts = [event(thinking), event([{"type": "text", "text": "a dog"}]), b"data:[DONE]\n"]
    assert answer(server, Sent(parts)) == ModelAnswer("a dog", "<think>a cat?</think>")


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
def test_an_answer_has_a_time_whatever_comes_in_it(server, kind):
    start = time.monotonic()
    found = answer(server, Sent(itertools.repeat(b" "), 0.05, kind), timeout=0.2)
    assert found == ModelAnswer("", failure="had not ended after 0.2 s (server.timeout)")
    assert 0.2 <= time.monotonic() - start < 3


def test_a_header_that_never_ends_has_that_time_too(server):
    def silent(handler):
        with suppress(ConnectionError):
            for _ in range(40):
                time.sleep(0.05)
                handler.wfile.write(b"H")

    assert answer(server, silent, timeout=0.2).failure == "had not ended after 0.2 s (server.timeout)"


@pytest.mark.parametrize(
    ("kind", "piece"), [("text/event-stream", event("x" * 1000)), ("application/json", b" " * 2**16)]
)
def test_an_answer_without_end_costs_no_more_memory_than_it_may(server, kind, piece):
    tracemalloc.start()
    found = answer(server, Sent(itertools.repeat(piece), kind=kind), max_bytes=2**20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == ModelAnswer("", failure="was longer than 1,048,576 bytes (server.max_bytes)")
    assert peak < 8 * 2**20


@pytest.mark.parametrize(
    "sent",
    [
        Sent([event("a "), event("dog")]),
        Sent([event("a dog"), b'data: {"error": {"message": "engine is dead"}}\n\n']),
        Sent([b'{"choices": [{"mess'], kind="application/json", length=900),
    ],
)
def test_an_answer_that_is_cut_off_is_asked_for_again_and_then_missing(server, sent):
    assert answer(server, sent) == ModelAnswer("", failure="was cut off 3 times")
    assert len(server.bodies) == 3
    says = [sent, "a dog"]
    server.say = lambda body: says.pop(0)
    assert Server(ServerConfig(url=f"http://127.0.0.1:{server.server_port}/v1")).answer(BODY).text == "a dog"


@pytest.mark.parametrize("sent", [Sent([b"data: {}\n\n"]), Sent([b"data: x\n\n"]), Sent([b"{}"], kind="text/json")])
def test_what_is_no_answer_stops_the_run(server, sent):
    with pytest.raises(ServerError, match="answered without a message"):
        answer(server, sent)


def test_a_server_that_is_gone_stops_the_run(monkeypatch):
    monkeypatch.setattr(served, "WAITS", (0.0,))
    with pytest.raises(ServerError, match="cannot be reached"):
        Server(ServerConfig(url="http://127.0.0.1:1/v1")).answer(BODY)
