"""Which images are held out depends on their content, and on nothing else."""

import shutil

import pytest

from dora_mm.config.images import DataConfig
from dora_mm.data.images.folder import read_training_images
from dora_mm.data.images.held_out import hold_out, part_of


def split(images, **valid):
    data = DataConfig.model_validate({"folder": str(images), "resolution": 64, "valid": valid or None})
    return hold_out(read_training_images(data), data)


def test_without_a_key_all_are_trained_on(image_folder):
    trained, held = split(image_folder)
    assert (len(trained), held) == (5, [])


@pytest.mark.parametrize(("valid", "number"), [({"share": 0.4}, 2), ({"share": 0.01}, 1), ({"share": 0.99}, 4)])
def test_a_share_is_held_out_and_no_image_is_in_both(image_folder, valid, number):
    trained, held = split(image_folder, **valid)
    assert (len(trained), len(held)) == (5 - number, number)
    assert not {image.digest for image in trained} & {image.digest for image in held}


def test_neither_names_nor_copies_change_the_choice(image_folder):
    first = {image.digest for image in split(image_folder, share=0.4)[1]}
    (image_folder / "0.png").rename(image_folder / "z.png")
    shutil.copy(image_folder / "z.png", image_folder / "y.png")
    metadata = image_folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"0.png"', '"z.png"'))
    (image_folder / "y.txt").write_text("a TOK icon")
    trained, held = split(image_folder, share=0.4)
    assert {image.digest for image in held} == first
    assert len(trained) + len(held) == 6


def test_a_limit_and_a_folder_of_its_own(image_folder, tmp_path, caplog):
    assert len(split(image_folder, share=0.8, limit=2)[1]) == 2
    other = shutil.copytree(image_folder, tmp_path / "other")
    trained, held = split(image_folder, folder=str(other), limit=3)
    assert (len(trained), [image.path.parent for image in held]) == (5, [other] * 3)
    assert "3 of the images" in caplog.text or "5 of the images" in caplog.text


def test_mistakes_name_their_key(image_folder, tmp_path):
    with pytest.raises(ValueError, match="data.valid.folder: .* does not exist"):
        split(image_folder, folder=str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="give either share or folder"):
        split(image_folder, share=0.5, folder=str(image_folder))
    for number in range(1, 5):
        shutil.copy(image_folder / "0.png", image_folder / f"{number}.png")
    with pytest.raises(ValueError, match="data.valid.share: .* has a single image"):
        split(image_folder, share=0.5)


def test_a_part_of_the_trained_ones_is_fixed(image_folder):
    trained, _ = split(image_folder)
    assert part_of(trained, 2) == part_of(trained[::-1], 2)
    assert len(part_of([*trained, *trained], 9)) == 5
