import json
import logging
import os

import pytest
from PIL import Image

from dora_mm.data.images.folder import digest_of, read_captioned_images
from dora_mm.utils.digest import file_digest


@pytest.fixture
def folder(tmp_path):
    """A folder of three different images of 8 x 6 pixels: a.png, b.jpg, c.webp."""
    folder = tmp_path / "images"
    folder.mkdir()
    for value, name in enumerate(("a.png", "b.jpg", "c.webp")):
        Image.new("RGB", (8, 6), (100 * value, 0, 0)).save(folder / name)
    return folder


def write_rows(folder, *rows):
    (folder / "metadata.jsonl").write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )


def captions(folder, **arguments):
    return {image.path.name: image.caption for image in read_captioned_images(folder, **arguments)}


def message_of(folder, **arguments):
    with pytest.raises(ValueError, match=r"^data\.folder.*images") as caught:
        read_captioned_images(folder, **arguments)
    return str(caught.value)


def test_captions_come_from_metadata_then_text_files_then_the_instance_prompt(folder, caplog):
    write_rows(folder, {"file_name": "a.png", "text": " a red thing\n"}, {"file_name": "b.jpg", "prompt": "  "})
    (folder / "a.txt").write_text("a  red thing")
    (folder / "b.txt").write_text("from the\n text file \n")
    assert captions(folder, instance_prompt="a thing") == {
        "a.png": "a red thing",
        "b.jpg": "from the text file",
        "c.webp": "a thing",
    }
    assert "1 image (c.webp) is without a caption: data.instance_prompt" in caplog.text


def test_images_are_in_order_with_their_upright_size_and_digest(folder):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (8, 6)).save(folder / "b.jpg", exif=exif)
    images = read_captioned_images(folder, instance_prompt="x")
    assert [image.path.name for image in images] == ["a.png", "b.jpg", "c.webp"]
    assert [image.size for image in images] == [(6, 8), (8, 6), (6, 8)]
    assert len({image.digest for image in images}) == 3
    assert images == read_captioned_images(str(folder), instance_prompt="x")


@pytest.mark.parametrize("side", [8, 160])
def test_large_images_which_threads_read_are_as_small_ones(tmp_path, side):
    """The files of the larger ones have 77 kB, being noise."""
    for number in range(6):
        Image.frombytes("RGB", (side, side + number), os.urandom(3 * side * (side + number))).save(
            tmp_path / f"{number}.png"
        )
    images = read_captioned_images(tmp_path, instance_prompt="x")
    assert [image.size for image in images] == [(side + number, side) for number in range(6)]
    assert [image.digest for image in images] == [file_digest(tmp_path / f"{number}.png") for number in range(6)]
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"1\.png is not a complete image"):
        read_captioned_images(tmp_path, instance_prompt="x")


def test_no_warning_if_all_images_take_the_instance_prompt(folder, caplog):
    read_captioned_images(folder, instance_prompt="x")
    assert caplog.text == ""


def test_metadata_may_name_images_in_subfolders(folder):
    (folder / "more").mkdir()
    (folder / "a.png").rename(folder / "more" / "d.PNG")
    write_rows(folder, "\n", {"file_name": "./more/d.PNG", "text": "deep"})
    assert captions(folder, instance_prompt="x")["d.PNG"] == "deep"


def test_line_separators_and_byte_order_marks_are_accepted(folder):
    row = json.dumps({"file_name": "a.png", "text": "one\u2028two"}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_text(row + "\r\n", encoding="utf-8-sig")
    (folder / "b.txt").write_text("three", encoding="utf-8-sig")
    found = captions(folder, instance_prompt="x")
    assert (found["a.png"], found["b.jpg"]) == ("one\u2028two", "three")


def test_images_without_a_caption_are_named(folder):
    (folder / "a.txt").write_text("a")
    message = message_of(folder)
    assert "2 images (b.jpg, c.webp) are without a caption" in message
    assert "data.instance_prompt" in message


def test_a_missing_folder_a_file_and_an_empty_folder(tmp_path):
    root = tmp_path / "images"
    assert "does not exist" in message_of(root)
    root.write_text("")
    assert "is not a folder" in message_of(root)
    root.unlink()
    root.mkdir()
    assert "has no images (.png, .jpg" in message_of(root)
    (root / "notes.md").write_text("")
    (root / ".hidden.png").write_text("")
    assert "has no images" in message_of(root)


def test_an_unreadable_folder(folder, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(folder), "iterdir", denied)
    assert "cannot be read: Permission denied" in message_of(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_image(folder):
    (folder / "b.jpg").chmod(0)
    assert "b.jpg cannot be read: permission denied" in message_of(folder, instance_prompt="x")


def test_all_bad_images_are_in_one_report(folder):
    (folder / "a.png").write_bytes(b"")
    (folder / "d.png").mkdir()
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:300])
    message = message_of(folder, instance_prompt="x")
    assert "3 problems" in message
    assert "d.png is not a file" in message
    assert "a.png is empty" in message
    assert "b.jpg is not a complete image" in message


def test_metadata_problems_are_reported_with_their_lines(folder):
    write_rows(
        folder,
        {"file_name": "a.png", "text": "a"},
        '{"file_name": "b.jpg", "text": \n',
        {"file_name": "d.png", "text": "d"},
        {"file_name": "a.png", "text": "again"},
        {"text": "nothing"},
        ["a.png"],
        {"file_name": "b.jpg", "text": 3},
        {"file_name": "b.jpg", "text": "one", "prompt": "two"},
        {"file_name": "more\0"},
    )
    message = message_of(folder, instance_prompt="x")
    assert message.count("\n  ") == 8
    for line in (
        "metadata.jsonl line 2 is not valid JSON",
        "metadata.jsonl line 3 names d.png, which does not exist",
        "metadata.jsonl line 4 names a.png again (first in line 1)",
        "metadata.jsonl line 5 must be an object with the key file_name",
        "metadata.jsonl line 6 must be an object with the key file_name",
        "metadata.jsonl line 7 has a caption that is not text",
        "metadata.jsonl line 8 has different values for text and prompt",
        "metadata.jsonl line 9 names 'more\\x00', which is not a valid path",
    ):
        assert line in message


def test_a_row_must_not_name_a_file_outside_the_folder(folder):
    secret = folder.parent / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    (folder / "link.png").symlink_to(secret)
    (folder / "out").symlink_to(folder.parent)
    names = ("../secret.png", str(secret), "link.png", "out/secret.png", "more/../../secret.png")
    write_rows(folder, *({"file_name": name, "text": "x"} for name in names))
    message = message_of(folder, instance_prompt="x")
    assert f"{folder / 'link.png'} is a link to {secret}, outside of {folder}" in message
    (folder / "link.png").unlink()
    message = message_of(folder, instance_prompt="x")
    reasons = ("is outside of", "is outside of", "does not exist", "is a link to", "is outside of")
    for number, (name, reason) in enumerate(zip(names, reasons, strict=True), 1):
        assert f"line {number} names {name}, which {reason}" in message


def test_one_image_under_two_spellings_is_a_duplicate(folder):
    write_rows(folder, {"file_name": "a.png", "text": "a"}, {"file_name": "./a.png", "text": "b"})
    assert "line 2 names a.png again (first in line 1)" in message_of(folder, instance_prompt="x")
    (folder / "more").mkdir()
    write_rows(folder, {"file_name": "a.png", "text": "a"}, {"file_name": "more/../a.png", "text": "b"})
    assert "line 2 names a.png again (first in line 1)" in message_of(folder, instance_prompt="x")


def test_text_that_is_not_utf_8_is_named(folder):
    (folder / "a.txt").write_bytes(b"caf\xe9")
    assert "a.txt cannot be read as UTF-8" in message_of(folder, instance_prompt="x")
    (folder / "a.txt").unlink()
    (folder / "metadata.jsonl").write_bytes(b"\xff\xfe")
    assert "metadata.jsonl cannot be read as UTF-8" in message_of(folder, instance_prompt="x")


@pytest.mark.parametrize("caption", ["a TOKYO icon", "a tok icon", "TOK_1", "ATOK"])
def test_a_placeholder_in_no_caption_stops_the_run(folder, caption):
    message = message_of(folder, instance_prompt=caption, placeholder="TOK")
    assert "no caption contains the placeholder TOK" in message
    assert f"the first is {caption!r}: set data.placeholder" in message
    assert "data.instance_prompt" in message


@pytest.mark.parametrize("caption", ["TOK", "a TOK icon", "in the style of TOK.", "TOK-like"])
def test_the_placeholder_is_found_as_a_word(folder, caption):
    assert len(read_captioned_images(folder, instance_prompt=caption, placeholder="TOK")) == 3


def test_a_placeholder_may_have_punctuation(folder):
    assert len(read_captioned_images(folder, instance_prompt="a <s0> icon", placeholder="<s0>")) == 3


def test_single_captions_without_the_placeholder_are_reported(folder, caplog):
    (folder / "a.txt").write_text("an icon")
    read_captioned_images(folder, instance_prompt="a TOK", placeholder="TOK")
    assert "1 image (a.png) is without the placeholder TOK" in caplog.text


def test_duplicates_and_other_files_are_reported(folder, caplog):
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "SOURCES.md").write_text("")
    (folder / "a.txt").write_text("a")
    with caplog.at_level(logging.INFO):
        read_captioned_images(folder, instance_prompt="x")
    assert "1 image (copy.png) is identical to another image" in caplog.text
    assert "1 file (SOURCES.md) is ignored" in caplog.text


# --- subfolders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def nested(tmp_path):
    """Images in the layout of kohya's trainers: 10_cat/a.png and b.png, 3_dog/c.png, plain/deeper/d.png."""
    root = tmp_path / "images"
    for value, name in enumerate(("10_cat/a.png", "10_cat/b.png", "3_dog/c.png", "plain/deeper/d.png")):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (60 * value, 0, 0)).save(path)
        path.with_suffix(".txt").write_text(f"thing {value}")
    return root


def test_a_folder_with_images_in_subfolders_only_names_the_option(nested):
    message = message_of(nested)
    assert "has no images itself, but 4 in subfolders, such as 10_cat/a.png" in message
    assert "data.subfolders=true" in message


def test_images_in_both_places_are_counted_in_a_warning(nested, caplog):
    Image.new("RGB", (8, 6)).save(nested / "z.png")
    assert captions(nested, instance_prompt="x") == {"z.png": "x"}
    assert "4 images (a.png, b.png, c.png, d.png) are not used, because in subfolders" in caplog.text
    assert "data.subfolders=true" in caplog.text


def test_subfolders_are_read_with_their_captions_and_repeats(nested, caplog):
    (nested / ".cache").mkdir()
    Image.new("RGB", (8, 6)).save(nested / ".cache" / "hidden.png")
    with caplog.at_level(logging.INFO):
        images = read_captioned_images(nested, subfolders=True)
    assert [(image.path.name, image.caption, image.repeats) for image in images] == [
        ("a.png", "thing 0", 10),
        ("b.png", "thing 1", 10),
        ("c.png", "thing 2", 3),
        ("d.png", "thing 3", 1),
    ]
    assert "10_cat: 2 images, 10 times in an epoch" in caplog.text
    assert "1 file (.cache) is ignored" in caplog.text


def test_each_subfolder_may_have_its_metadata(nested):
    write_rows(nested / "10_cat", {"file_name": "a.png", "text": "a cat"})
    write_rows(nested, {"file_name": "3_dog/c.png", "text": "a dog"})
    (nested / "10_cat" / "a.txt").unlink()
    (nested / "3_dog" / "c.txt").unlink()
    found = captions(nested, subfolders=True)
    assert (found["a.png"], found["b.png"], found["c.png"]) == ("a cat", "thing 1", "a dog")
    write_rows(nested, {"file_name": "10_cat/a.png", "text": "again"})
    message = message_of(nested, subfolders=True)
    assert "10_cat/metadata.jsonl names a.png, which an outer metadata file names already" in message


def test_a_folder_with_0_repeats_is_refused(nested):
    (nested / "3_dog").rename(nested / "0_dog")
    assert "the folder 0_dog asks for 0 repeats: rename it" in message_of(nested, subfolders=True)


def test_repeats_identify_a_data_set(nested):
    before = digest_of(read_captioned_images(nested, subfolders=True))
    (nested / "10_cat").rename(nested / "11_cat")
    assert digest_of(read_captioned_images(nested, subfolders=True)) != before


def test_the_source_of_each_caption(folder):
    write_rows(folder, {"file_name": "a.png", "text": "a"})
    (folder / "b.txt").write_text("b")
    sources = [image.source for image in read_captioned_images(folder, instance_prompt="x")]
    assert sources == ["metadata.jsonl", ".txt", "data.instance_prompt"]


def test_a_caption_with_half_a_surrogate_pair_is_not_text(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "\\ud800"}\n')
    assert "line 1 has a caption that is not text" in message_of(folder, instance_prompt="x")


# --- captions of other tools -----------------------------------------------------------------------------------------


def test_kohyas_caption_files_are_read_and_files_in_capitals(folder):
    (folder / "a.caption").write_text("of kohya")
    (folder / "b.TXT").write_text("in capitals")
    (folder / "c.txt").write_text("")
    (folder / "c.caption").write_text("the other one")
    images = read_captioned_images(folder)
    assert [image.caption for image in images] == ["of kohya", "in capitals", "the other one"]
    assert [image.source for image in images] == [".caption", ".txt", ".caption"]


@pytest.mark.parametrize(("column", "mark"), [("text", ","), ("caption", ";"), ("prompt", "\t")])
def test_metadata_in_a_csv_file_is_read(folder, column, mark):
    rows = [["file_name", column, ""], ["a.png", '"one, two; three"', ""], ["b.jpg", "café"], ["c.webp", "x"]]
    text = "".join(mark.join(row) + "\r\n" for row in rows)
    (folder / "metadata.csv").write_text(text, encoding="utf-8-sig", newline="")
    images = read_captioned_images(folder)
    assert [image.caption for image in images] == ["one, two; three", "café", "x"]
    assert {image.source for image in images} == {"metadata.csv"}


def test_problems_of_a_csv_file_are_named_by_line(folder):
    (folder / "metadata.csv").write_text("file_name,text\nz.png,a\n,b\na.png,c,d\n")
    message = message_of(folder, instance_prompt="x")
    assert "metadata.csv line 2 names z.png, which does not exist" in message
    assert "metadata.csv line 3 must be an object with the key file_name" in message
    assert "metadata.csv line 4 has 3 cells for 2 columns" in message
    (folder / "metadata.csv").write_bytes("file_name,text\na.png,café\n".encode("cp1252"))
    message = message_of(folder, instance_prompt="x")
    assert "line 2 would be 'a.png,café' in Windows' own encoding (cp1252): save the file as UTF-8" in message
    (folder / "metadata.csv").write_text("file_name,text\na.png,c\n")
    write_rows(folder, {"file_name": "a.png", "text": "a"})
    assert "metadata.csv is one of two: keep metadata.jsonl or metadata.csv" in message_of(folder, instance_prompt="x")


def test_the_key_caption_is_read_in_json_lines(folder):
    write_rows(folder, {"file_name": "a.png", "caption": "a"})
    assert captions(folder, instance_prompt="x")["a.png"] == "a"


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.txt", "another text", "a.png has its caption from metadata.jsonl, and that is another"),
        ("renamed.txt", "a text", "no image has this name"),
        ("d.caption", "a text", "no image has this name"),
        ("a.png.txt", "a text", "the caption of a.png is read from a.txt"),
        ("captions.json", "{}", "only metadata.jsonl and metadata.csv, or a .txt or .caption file"),
        ("metadata.parquet", "PAR1", "only metadata.jsonl and metadata.csv"),
        ("b.json", "{}", "only metadata.jsonl and metadata.csv"),
        ("metadata.csv", "file_name,label\na.png,cat\n", "no row has a text, prompt or caption"),
    ],
)
def test_files_that_look_like_captions_and_are_not_used_stop_the_run(folder, caplog, name, text, reason):
    if name != "metadata.csv":
        write_rows(folder, {"file_name": "a.png", "text": "a"})
    (folder / "notes.txt").write_text("a document")
    (folder / name).write_text(text)
    message = message_of(folder, instance_prompt="x")
    assert f"1 file looks like captions without being used ({name}: {reason}" in message
    assert message.endswith("): to train without, set data.unused_captions=ignore")
    assert set(captions(folder, instance_prompt="x", unused_captions="ignore").values()) <= {"a", "x"}
    assert f"({name}: {reason}" in caplog.text
