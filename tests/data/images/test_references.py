"""Which references an image has: folders beside, numbers at the end of names, rows of metadata files."""

import json

import pytest
from PIL import Image

from dora_mm.config.images import DataConfig
from dora_mm.config.models import validated
from dora_mm.data.images.folder import digest_of, read_training_images
from dora_mm.data.images.listing import image_files


def touch(folder, *names, size=(64, 64)):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (len(name), 3, 7)).save(file)
    return folder


def references(folder, *others, **settings):
    given = {"folder": str(folder), "references": [str(each) for each in others], "resolution": 64, **settings}
    images = read_training_images(validated(DataConfig, {"instance_prompt": "make it red", **given}))
    return {image.path.stem: [each.path.name for each in image.references] for image in images}


def test_files_of_a_folder_beside_have_the_name_of_their_image_or_a_number_behind_it(tmp_path):
    targets = touch(tmp_path / "after", "a.png", "b.png", "c.png", "d_1.png", "d_2.png")
    before = touch(tmp_path / "before", "a.jpg", "b_2.png", "b_10.png", "b_1.png", "d_1.png", "d_2.png")
    found = {"a": ["a.jpg"], "b": ["b_1.png", "b_2.png", "b_10.png"], "c": []}
    assert references(targets, before) == found | {"d_1": ["d_1.png"], "d_2": ["d_2.png"]}


def test_several_folders_have_one_reference_each(tmp_path):
    targets = touch(tmp_path / "after", "a.png", "b.png")
    first, second = touch(tmp_path / "x", "a.png", "b.png"), touch(tmp_path / "y", "a.webp")
    assert references(targets, first, second) == {"a": ["a.png", "a.webp"], "b": ["b.png"]}
    assert references(targets, second, first) == {"a": ["a.webp", "a.png"], "b": ["b.png"]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("references", ["before/a.png", "b.png"]),
        ("reference_file_names", ["before/a.png", "b.png"]),
        ("control_path", ["before/a.png", "b.png"]),
        ("cond_image_file_names", ["before/a.png", "b.png"]),
        ("numbered", {"control_path_1": "b.png", "control_path_0": "before/a.png"}),
    ],
)
def test_rows_of_metadata_name_references_which_are_no_images_of_the_training(tmp_path, key, value):
    folder = touch(tmp_path / "data", "a.png", "b.png", "before/a.png")
    row = {"file_name": "a.png", "text": "make it red", **(value if isinstance(value, dict) else {key: value})}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    assert references(folder) == {"a": ["a.png", "b.png"]}
    assert references(folder, subfolders=True) == {"a": ["a.png", "b.png"]}


def test_a_row_of_a_csv_file_names_one(tmp_path):
    folder = touch(tmp_path / "data", "a.png", "b.png")
    (folder / "metadata.csv").write_text("file_name,text,references\na.png,make it red,b.png\n")
    assert references(folder) == {"a": ["b.png"]}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"references": "gone.png"}, "line 1 names gone.png, which does not exist"),
        ({"references": "../elsewhere.png"}, "which is outside of the folder"),
        ({"references": [3]}, "has references that are no names of files"),
        ({"references": "b.png", "control_path": "b.png"}, "has references in references and control_path: keep one"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, problem):
    folder = touch(tmp_path / "data", "a.png", "b.png")
    touch(tmp_path, "elsewhere.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x", **row}))
    with pytest.raises(ValueError, match=problem):
        references(folder)


def test_damaged_orphaned_and_doubled_references_stop_the_run(tmp_path):
    targets, before = touch(tmp_path / "after", "a.png", "b.png"), touch(tmp_path / "before", "a.png", "x.png")
    with pytest.raises(ValueError, match=r"1 files of data.references belong to no image \(x.png\)"):
        references(targets, before)
    (before / "x.png").rename(before / "b.png")
    (before / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"before/b.png is not a complete image"):
        references(targets, before)
    (before / "b.png").unlink()
    (targets / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x", "references": "b.png"}))
    with pytest.raises(ValueError, match="a.png has references in a metadata file and in data.references: keep one"):
        references(targets, before)
    with pytest.raises(ValueError, match="is the folder of the images: give one that has references alone"):
        references(targets, targets)


def test_a_folder_of_references_inside_that_of_the_images_has_no_images_of_the_training(tmp_path):
    targets = touch(tmp_path / "data", "a.png", "more/b.png", "before/a.png", "before/more/b.png")
    assert references(targets, targets / "before", subfolders=True) == {"a": ["a.png"], "b": ["b.png"]}
    data = validated(
        DataConfig,
        {"folder": str(targets), "references": [str(targets / "before")], "subfolders": True, "resolution": 64},
    )
    assert [file.name for file in image_files(data)] == ["a.png", "b.png"]


def test_the_digest_of_a_data_set_has_its_references(tmp_path):
    targets, before = touch(tmp_path / "after", "a.png"), touch(tmp_path / "before", "a.png")

    def digest(*folders):
        given = {"folder": str(targets), "references": [str(each) for each in folders], "resolution": 64}
        return digest_of(read_training_images(validated(DataConfig, {"instance_prompt": "x", **given})))

    with_one = digest(before)
    assert with_one != digest()
    touch(before, "a.png", size=(32, 32))
    assert digest(before) not in (with_one, digest())
