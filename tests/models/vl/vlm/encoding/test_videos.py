"""Videos are sampled frames where a class takes them, in training, in answers, beside images and text alone."""

import re

import numpy as np
import pytest

from dora_mm.data.images.frames import load_video
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.tables import open_table
from tests.shared.data.chats import as_lines, messages
from tests.shared.data.video_rows import ROWS, losses, opened, reads_videos, row, write_visuals
from tests.shared.data.videos import write_timed_video

TAKE = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava_onevision",
    "smolvlm",
    "internvl",
)  # others: tests/documented


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_visuals(tmp_path_factory.mktemp("videos"))


@pytest.mark.parametrize("name", [*TAKE, "llava"])
def test_rows_with_videos_images_and_text_alone_compute_in_a_batch_what_they_do_alone(tiny_vlm, folder, name):
    assert reads_videos(tiny_vlm(name), folder) == (name in TAKE)


def test_more_frames_are_more_tokens_up_to_a_limit(tiny_vlm, folder):
    base = tiny_vlm("qwen3_vl")
    few, many, most = (
        opened(base, **keys).rows.row("chat", ROWS[1], str(folder), "a dog").num_image_tokens
        for keys in ({"fps": 0.5}, {"fps": 2}, {"fps": 50, "max_frames": 4})
    )
    assert few < most < many
    with pytest.raises(ValueError, match=r"model\.fps: .* reads no videos: leave it out"):
        opened(tiny_vlm("llava"), fps=1)


def test_a_class_that_takes_no_videos_refuses_them_by_name(tiny_vlm, folder, tmp_path):
    rows = [{"messages": messages("<video>Q", "A"), "videos": ["short.mp4"]}, {"messages": messages("Q", "A")}]
    source = as_lines(tmp_path, rows, images=str(folder))
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert table[0].images == ("short.mp4",)
    assert len(opened(tiny_vlm("qwen2_vl")).check_rows(table)) == 2
    for name, kind in (("llava", "LlavaForConditionalGeneration"), ("paligemma", "PaliGemmaForConditionalGeneration")):
        with pytest.raises(ValueError, match=rf"rows\.jsonl, id 1: has a video, and {kind} reads none"):
            opened(tiny_vlm(name)).check_rows(table)
    with pytest.raises(ValueError, match=r"row short of chat: it has a video, and the model reads none"):
        opened(tiny_vlm("llava")).rows.row("chat", ROWS[0], str(folder), "a dog")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "internvl"])
def test_a_row_with_an_image_and_a_video(tiny_vlm, folder, name):
    vlm, both = opened(tiny_vlm(name)), row("both", "wide.png", "short.mp4")
    if name == "smolvlm":
        with pytest.raises(ValueError, match=r"row both of chat: it has images and videos, .* either"):
            vlm.rows.row("chat", both, str(folder), "a dog")
        return
    swapped = row("both", "short.mp4", "wide.png")
    first, second = losses(vlm, folder, [both, swapped]).tolist()
    assert np.isfinite(first)
    assert first != second


LITERALS = {
    "llava": ("Is <image> a tag?", "<image>, which this model reads as the place of images"),
    "qwen2_vl": ("Is <|video_pad|> a tag?", "<|video_pad|>, which this model reads as the place of videos"),
    "gemma3": ("Is <image_soft_token> one?", "<image_soft_token>, which this model reads as a part of an image"),
    "paligemma": ("Is <image> a tag?", "<image>, which this model reads as the place of images"),
}


@pytest.mark.parametrize("name", LITERALS)
def test_the_text_of_a_token_for_images_is_refused_with_its_row(tiny_vlm, folder, name):
    """In a question, an answer or a system turn: it never becomes the place of an image."""
    text, reason = LITERALS[name]
    vlm = opened(tiny_vlm(name))
    asked = Example("7", ("wide.png",), text, ("yes",), (1.0,))
    with pytest.raises(ValueError, match=r"row 7 of vqa: the text has ") as caught:
        vlm.rows.row("vqa", asked, str(folder), "yes")
    assert reason in str(caught.value)
    with pytest.raises(ValueError, match=r"row 7 of vqa: the text has "):
        vlm.rows.row("vqa", Example("7", ("wide.png",), "Q", ("yes",), (1.0,)), str(folder), text)


def test_times_are_those_of_the_frames_where_these_are_at_uneven_distances(tiny_vlm, tmp_path):
    write_timed_video(tmp_path / "slides.mp4", (0, 4000, 4100, 4200, 19800))
    encoder = opened(tiny_vlm("qwen3_vl"), fps=0.3).rows
    encoded = encoder.row("chat", row("slides", "slides.mp4"), str(tmp_path), "a dog")
    said = encoder.processor.tokenizer.decode(encoded.inputs["input_ids"][0])
    found = [float(time) for time in re.findall(r"<([\d.]+) seconds>", said)]
    times = load_video(tmp_path / "slides.mp4", 0.3, 16).times  # two frames at a time
    assert found == pytest.approx([(a + b) / 2 for a, b in zip(times[::2], times[1::2], strict=True)], abs=0.06)


@pytest.mark.parametrize(("name", "differ"), [("qwen2_vl", False), ("llava_onevision", True), ("glm4v", True)])
def test_rows_with_videos_that_are_computed_in_groups_do_not_keep_step(tiny_vlm, folder, tmp_path, name, differ):
    rows = [{"messages": messages("<image>Q", "A"), "images": ["wide.png"]}]
    filmed = [{"messages": messages("<video>Q", "A"), "videos": ["short.mp4"]}]
    vlm = opened(tiny_vlm(name))
    for count, found in enumerate((rows, rows + filmed)):
        (tmp_path / str(count)).mkdir()
        source = as_lines(tmp_path / str(count), found, images=str(folder))
        table = open_table(source, tmp_path / "tables", on_bad_data="stop")
        if count and differ:
            with pytest.raises(ValueError, match=r"train\.shard: \w+ computes rows with videos in groups"):
                vlm.check_in_step("chat", table, str(folder))
        else:
            vlm.check_in_step("chat", table, str(folder))
