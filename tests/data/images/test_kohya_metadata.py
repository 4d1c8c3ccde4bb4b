"""meta_cap.json and its successors caption a folder as kohya's finetune scripts do."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from dora_mm.config.importing import translate
from dora_mm.data.images.folder import read_captioned_images, uncaptioned_images


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for value, name in enumerate(("a.png", "b.jpg", "photo.1.webp")):
        Image.new("RGB", (8, 6), (100 * value, 0, 0)).save(folder / name)
    return folder


def write(folder, entries, name="meta_cap.json"):
    (folder / name).write_text(json.dumps(entries), encoding="utf-8")


def captions(folder, **settings):
    return {image.path.name: image.caption for image in read_captioned_images(folder, **settings)}


def message_of(folder):
    with pytest.raises(ValueError, match=r"^data\.folder") as caught:
        read_captioned_images(folder, instance_prompt="x")
    return str(caught.value)


def test_names_may_lack_their_suffix_and_tags_follow_the_caption(folder):
    write(folder, {
        "a": {"caption": "a red thing", "tags": "thing, red", "train_resolution": [64, 64]},
        "b.jpg": {"tags": "thing"},
        "photo.1": {"caption": "a photo", "tags": None, "image_size": [8, 6]},
    })  # fmt: skip
    images = read_captioned_images(folder)
    assert [image.caption for image in images] == ["a red thing,thing, red", "thing", "a photo"]
    assert {image.source for image in images} == {"meta_cap.json"}


@pytest.mark.parametrize("absolute", [True, False])
def test_full_paths_are_names_of_images_in_the_folder(folder, absolute, monkeypatch):
    monkeypatch.chdir(folder.parent)
    root = folder if absolute else "images"
    write(folder, {os.path.join(root, name): {"caption": name} for name in os.listdir(folder)}, "meta_lat.json")
    assert captions(folder) == {name: name for name in ("a.png", "b.jpg", "photo.1.webp")}
    Image.new("RGB", (8, 8)).save("outside.png")
    write(folder, {os.path.abspath("outside.png"): {"caption": "x"}}, "meta_lat.json")
    assert "outside of the folder" in message_of(folder)


def test_tags_follow_each_line_of_a_caption(folder):
    write(folder, {"a": {"caption": "one\n\ntwo", "tags": "red,\nold"}})
    (image, *_) = read_captioned_images(folder, instance_prompt="x", lines=True)
    assert (image.caption, *image.more) == ("one,red,,old", "two,red,,old")


def test_the_files_that_it_was_made_of_may_stay(folder):
    write(folder, {name: {"caption": "a thing", "tags": "red, old"} for name in ("a", "b", "photo.1")})
    for name in ("a", "b"):
        (folder / f"{name}.caption").write_text("a thing\n")
        (folder / f"{name}.txt").write_text("red, old")
    assert set(captions(folder).values()) == {"a thing,red, old"}
    (folder / "b.txt").write_text("another")
    assert "b.jpg has its caption from meta_cap.json, and that is another" in message_of(folder)


def test_problems_name_their_entry(folder):
    Image.new("RGB", (8, 6)).save(folder / "a.jpg")
    write(folder, {"a": {"caption": "x"}, "d": {"caption": "x"}, "b": {"caption": 3}, "b.jpg": {"caption": "y"}})
    message = message_of(folder)
    for said in (
        "meta_cap.json entry 'a' is the name of a.jpg and a.png: keep one",
        "meta_cap.json entry 'd' names d, which does not exist",
        "meta_cap.json entry 'b' has a caption or tags that are not text",
    ):
        assert said in message
    write(folder, {"b": {"caption": "x"}, "b.jpg": {"caption": "y"}})
    assert "entry 'b.jpg' names b.jpg again (first in entry 'b')" in message_of(folder)
    (folder / "meta_cap.json").write_text('{"a":')
    assert "meta_cap.json it is not valid JSON" in message_of(folder)


def test_one_file_has_the_captions(folder, caplog):
    for name in ("meta_lat.json", "meta_cap.json"):
        write(folder, {"a": {"caption": "x"}}, name)
    assert "meta_cap.json is one of two: keep meta_cap.json or meta_lat.json" in message_of(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    assert "is one of 3: keep metadata.jsonl or meta_cap.json or meta_lat.json" in message_of(folder)
    with pytest.raises(ValueError, match=r"has meta_cap\.json, beside which metadata\.jsonl is not read"):
        uncaptioned_images(folder)


@pytest.mark.parametrize("entries", [{"a": "a thing"}, {"a": {"label": 1}}, {}])
def test_other_files_of_such_a_name_are_not_taken_for_it(folder, entries):
    write(folder, entries, "meta_info.json")
    assert "1 file looks like captions without being used (meta_info.json: " in message_of(folder)
    assert set(captions(folder, instance_prompt="x", unused_captions="ignore").values()) == {"x"}


def test_import_names_the_folder_where_it_is_read(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    command = "accelerate launch sdxl_train_network.py --pretrained_model_name_or_path x --network_module networks.lora"
    for metadata, said in (
        ("images/meta_lat.json", "captions are read from meta_lat.json in images"),
        ("meta_lat.json", "copy it to images/meta_lat.json"),
        ("mine.json", "copy it to images/meta_cap.json"),
        ("mine.jsonl", "write it as metadata.jsonl in the folder"),
    ):
        (folder.parent / "a.sh").write_text(f"{command} --train_data_dir images --in_json {metadata}\n")
        found = translate(Path("a.sh"))
        assert any(said in text for text in (*found.differences, *(reason for *_, reason in found.without_equal)))
        assert "data.subfolders" not in found.values
