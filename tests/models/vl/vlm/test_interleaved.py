"""Questions whose images stand in the middle of their texts, as MMMU's do."""

import pytest

from dora_mm.config.served import ServerConfig
from dora_mm.config.vl import TextSamplingConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers.contents import interleaved
from dora_mm.models.vl.server import Server, ServerAnswers
from dora_mm.models.vl.vlm.answers import VLMAnswers
from dora_mm.registries.vl_tasks import TASKS
from tests.shared.data.video_rows import opened
from tests.shared.data.vlm_rows import write_images

IMAGES = ("wide.png", "tall.png")
ROW = interleaved(
    Example("1", IMAGES, "Is <image 2> in it?\nA. <image 1>\nB. no", ("B",), (1.0,), options=("<image 1>", "no"))
)
ASKED = TASKS["mmmu"].prompt.removeprefix("{text}")


def test_the_prompt_is_around_the_whole_question(tiny_vlm):
    rows = opened(tiny_vlm("llava")).rows
    (asked,) = rows.turns("mmmu", ROW, None)
    assert asked.text == f"Is <image> in it?\nA. <image>\nB. no{ASKED}"
    assert [turn.text for turn in rows.turns("mmmu", ROW, "A")] == [asked.text, "A"]  # the answer that is asked for
    unanswered = interleaved(Example("1", IMAGES, "What is <image 2>?"))
    assert rows.turns("mmmu", unanswered, None)[0].text == f"<image>What is <image>?{ASKED}"
    assert rows.turns("mmmu", unanswered, "A")[1].text == "A"


def test_letters_are_ranked(tiny_vlm, tmp_path):
    vlm = opened(tiny_vlm("llava"))
    answers = VLMAnswers(vlm.prompts, vlm.network)
    losses = answers._losses("mmmu", ROW, str(write_images(tmp_path)), ["A", "B"])
    assert losses[0] != pytest.approx(losses[1].item())


def test_a_server_gets_images_at_their_places(tmp_path):
    server = Server(ServerConfig(url="http://localhost:1/v1"))
    served = ServerAnswers(server, "m", TextSamplingConfig(), {})
    (message,) = served.body("mmmu", ROW, str(write_images(tmp_path)))["messages"]
    texts = [part.get("text") for part in message["content"]]
    assert texts == ["Is ", None, " in it?\nA. ", None, f"\nB. no{ASKED}"]
