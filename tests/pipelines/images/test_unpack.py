"""dora-mm unpack: Parquet files as `datasets` writes them become a folder that trains."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dora_mm.cli import main
from dora_mm.config.images import DataConfig
from dora_mm.data.images.folder import read_training_images


def packed(color, kind="PNG", size=(80, 64)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return {"bytes": file.getvalue(), "path": f"../{color}"}


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_pairs_as_the_hub_has_them_train_as_references(tmp_path, capsys):
    """The columns of diffusers' scripts, in two files of a split; a list of references, and none."""
    for number in (0, 1):
        write(
            tmp_path / "data" / "data" / f"train-0000{number}-of-00002.parquet",
            target_image=[packed("red"), packed("blue", "JPEG")],
            cond_image=[[packed("green"), packed("white", "WEBP", (70, 70))], []],
            edit_prompt=[f"make it red {number}", "nothing"],
        )
    with pytest.raises(ValueError, match="has Parquet files: dora-mm unpack"):
        read_training_images(DataConfig(folder=str(tmp_path / "data" / "data"), resolution=64))
    out = tmp_path / "folder"
    assert main(["unpack", str(tmp_path / "data"), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "4 rows: images of target_image; captions of edit_prompt; references of cond_image" in printed
    images = read_training_images(DataConfig(folder=str(out), resolution=64))
    assert [(image.path.name, image.caption) for image in images] == [
        ("000001.png", "make it red 0"),
        ("000002.jpg", "nothing"),
        ("000003.png", "make it red 1"),
        ("000004.jpg", "nothing"),
    ]
    assert [[each.size for each in image.references] for image in images] == [[(64, 80), (70, 70)], []] * 2
    assert main(["new", "flux2_klein", str(tmp_path / "edit"), "--images", str(out)]) == 0
    assert main(["unpack", str(tmp_path / "data"), str(out)]) == 2
    assert f"{out} exists already" in capsys.readouterr().err


def test_columns_are_chosen_by_name(tmp_path):
    columns = {"after": [packed("red")], "one": [packed("green")], "two": [packed("blue")], "what": ["a hat"]}
    file = write(tmp_path / "a.parquet", **columns)
    chosen = ["--image", "after", "--text", "what", "--references", "two", "one"]
    assert main(["unpack", file, str(tmp_path / "out"), *chosen]) == 0
    row = json.loads((tmp_path / "out" / "metadata.jsonl").read_text())
    assert row == {
        "file_name": "000001.png",
        "text": "a hat",
        "references": ["references/000001_1.png", "references/000001_2.png"],
    }
    with Image.open(tmp_path / "out" / row["references"][0]) as image:
        assert image.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"picture": [b"x"]}, [], "--image is missing: there are the columns picture"),
        ({"image": [b"x"]}, ["--text", "title"], "--text title: there are the columns image"),
        ({"image": [b"x"]}, [], "row 1: image has no image of JPEG, PNG"),
        ({"image": ["a.png"]}, [], "row 1: image has no image in the file, but 'a.png'"),
        ({"image": pa.array([None], pa.binary())}, [], "row 1: image is empty"),
    ],
)
def test_what_cannot_be_unpacked_leaves_nothing(tmp_path, capsys, columns, arguments, message):
    file = write(tmp_path / "a.parquet", **columns)
    assert main(["unpack", file, str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
