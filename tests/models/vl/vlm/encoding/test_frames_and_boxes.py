"""Videos that are lists of frames, and boxes in the forms that ms-swift gives them for each model."""

import json

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from dora_mm.data.images.frames import frames_as_video, load_video
from dora_mm.data.vl.example import Example, Turn
from dora_mm.data.vl.tables import open_table
from dora_mm.models.vl.vlm.answers import VLMAnswers
from dora_mm.models.vl.vlm.boxes import with_boxes
from tests.shared.data import suite_files
from tests.shared.data.video_rows import opened, write_visuals
from tests.shared.data.vlm_rows import write_images

# ms-swift's normalize_bbox, replace_bbox and replace_ref, of the box (25, 20, 50.4, 40) in 200 x 100 pixels
EXPECTED = {
    "qwen2_vl": "<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(125,200),(252,400)<|box_end|>",
    "qwen3_vl": "<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(125,200),(252,400)<|box_end|>",
    "internvl": "<ref>a dog</ref><box>[[125, 200, 252, 400]]</box>",
    "gemma3": "a dog[(125,200),(252,400)]",
}
BOXES = {"bbox": [[25, 20, 50.4, 40]], "ref": ["a dog"], "norm1": False, "image": [0]}
SHARES = BOXES | {"bbox": [[0.125, 0.2, 0.252, 0.4]], "norm1": True}
MARKED = (Turn("user", "<image>Where is it?", False), Turn("assistant", "<ref-object><bbox>", True))
IMAGE = Image.new("RGB", (200, 100))


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("boxes", [BOXES, SHARES])
def test_boxes_have_the_form_of_the_model(name, boxes):
    assert with_boxes(MARKED, json.dumps(boxes), [IMAGE], None, name)[1].text == EXPECTED[name]


def test_boxes_of_qwen2_5_vl_are_pixels_of_the_resized_image(tiny_vlm):
    processor = opened(tiny_vlm("qwen2_5_vl")).rows.processor
    resizer = processor.image_processor
    limits = {"min_pixels": resizer.size["shortest_edge"], "max_pixels": resizer.size["longest_edge"]}
    height, width = smart_resize(100, 200, resizer.patch_size * resizer.merge_size, **limits)
    (_, answer) = with_boxes(MARKED, json.dumps(BOXES), [IMAGE], processor, "qwen2_5_vl")
    expected = [round(share * side) for share, side in zip(SHARES["bbox"][0], (width, height) * 2, strict=True)]
    assert answer.text.endswith("<|box_start|>({},{}),({},{})<|box_end|>".format(*expected))
    assert (width, height) != IMAGE.size


def test_a_point_a_second_image_and_a_wrong_one():
    boxes = BOXES | {"bbox": [[5, 5]], "image": [1]}
    images = [IMAGE, Image.new("RGB", (10, 50))]
    assert with_boxes(MARKED, json.dumps(boxes), images, None, "llava")[1].text == "a dog[(500,100)]"
    with pytest.raises(ValueError, match="it has a box on image 1, and 1 images, counted from 0"):
        with_boxes(MARKED, json.dumps(boxes), images[:1], None, "llava")


def test_a_row_with_boxes_is_learned_with_their_numbers(tiny_vlm, tmp_path):
    write_images(tmp_path)
    rows = opened(tiny_vlm("qwen3_vl")).rows
    example = Example("1", ("wide.png",), "", turns=MARKED, boxes=json.dumps(SHARES))
    row = rows.row("chat", example, str(tmp_path), "")
    learned = rows.processor.tokenizer.decode(row.labels[row.labels >= 0])
    assert "(125,200),(252,400)" in learned.replace(" ", "")
    assert "bbox" not in rows.processor.tokenizer.decode(row.inputs["input_ids"][0])


# --- frames ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_visuals(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def frames(folder):
    """The frames of a video as the model reads it, as images without loss."""
    for number, frame in enumerate(load_video(folder / "short.mp4", 4.0, 16).frames):
        Image.fromarray(frame).save(folder / f"frame{number}.png")
    return sorted(path.name for path in folder.glob("frame*.png"))


@pytest.mark.parametrize("name", ["qwen2_vl", "smolvlm"])
def test_frames_are_read_as_the_video_that_has_them(tiny_vlm, folder, frames, name):
    rows = opened(tiny_vlm(name), fps=4.0).rows
    turns = (Turn("user", "<video>What is it?", False), Turn("assistant", "A dog.", True))
    whole = rows.row("chat", Example("1", ("short.mp4",), "", turns=turns), str(folder), "")
    listed = Example("1", tuple(frames), "", turns=turns, frames=(len(frames),))
    row = rows.row("chat", listed, str(folder), "")
    assert row.inputs.keys() == whole.inputs.keys()
    assert all(torch.equal(row.inputs[key], whole.inputs[key]) for key in whole.inputs)


def test_frames_stand_beside_images_and_are_refused_where_no_video_is_read(tiny_vlm, folder, frames):
    turns = (Turn("user", "<image>Is it in <video>?", False), Turn("assistant", "Yes.", True))
    example = Example("1", ("wide.png", *frames), "", turns=turns, frames=(0, len(frames)))
    row = opened(tiny_vlm("qwen2_vl")).rows.row("chat", example, str(folder), "")
    assert row.inputs["image_grid_thw"].shape == row.inputs["video_grid_thw"].shape == (1, 3)
    with pytest.raises(ValueError, match="it has a video, and the model reads none"):
        opened(tiny_vlm("llava")).rows.row("chat", example, str(folder), "")


def test_of_many_frames_some_at_equal_distances_are_taken(folder, frames):
    names = [folder / frames[n % len(frames)] for n in range(40)]
    found = frames_as_video(names, 2.0, 4)
    assert (found.times, found.duration, found.frames.shape[0]) == ((2.75, 7.75, 12.75, 17.75), 20.0, 4)
    assert frames_as_video(names[:1], 1.0, 8).frames.shape[0] == 2  # some models read frames in pairs
    with pytest.raises(
        ValueError, match=r"wide\.png is not of the size of .*frame0\.png: frames of a video are of one"
    ):
        frames_as_video([names[0], folder / "wide.png"], 1.0, 8)


def test_a_model_without_a_chat_template_is_asked_where_things_are(tiny_vlm, tmp_path):
    """RefCOCO's rows have a box to compare with, and none in their texts."""
    table = open_table(suite_files.source("refcoco", tmp_path), tmp_path, on_bad_data="stop", check_images=False)
    assert len(opened(tiny_vlm("paligemma")).check_rows(table)) == 1


def test_tokens_of_boxes_stay_in_answers_where_they_are_special(tiny_vlm):
    vlm = opened(tiny_vlm("florence2"))
    tokenizer = vlm.prompts.processor.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<loc_7>", "<od>"]}, replace_extra_special_tokens=False)
    ids = tokenizer("a dog<loc_7><loc_7><od>", return_tensors="pt")["input_ids"]
    assert tokenizer.eos_token_id in ids
    (text,) = VLMAnswers(vlm.prompts, vlm.network)._texts(ids)
    assert text == "a dog<loc_7><loc_7>"
