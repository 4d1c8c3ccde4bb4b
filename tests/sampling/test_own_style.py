"""What a score of one's own style knows of the training."""

import pytest
from PIL import Image

from dora_mm.sampling.own_style import images_of_training, trigger_word
from tests.sampling.training_run import training_config


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"placeholder": "TOK", "instance_prompt": "a TOK icon"}, "TOK"),
        ({"placeholder": "TOK", "instance_prompt": "an icon"}, None),  # c.webp has no caption
        ({"placeholder": "TOK", "instance_prompt": "an icon", "captions": {"suffix": "by TOK"}}, "TOK"),
        ({"placeholder": None, "instance_prompt": "a TOK icon"}, "TOK"),
        ({"placeholder": None, "instance_prompt": "a thing"}, None),
        ({"placeholder": "red", "instance_prompt": "a red TOK icon"}, None),  # not of the green one
    ],
)
def test_the_trigger_word_is_one_that_every_caption_has(tmp_path, data, word):
    for name, caption in (("a", "a red TOK icon"), ("b", "a green TOK icon"), ("c", "")):
        Image.new("RGB", (8, 8), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    trained = training_config(data={"folder": str(tmp_path), "resolution": 64, **data})
    assert trigger_word(trained, images_of_training(trained.data)) == word


def test_held_out_images_are_not_those_of_the_training(tmp_path):
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    data = {"folder": str(tmp_path), "resolution": 64, "placeholder": None, "instance_prompt": "an icon"}
    every = images_of_training(training_config(data=data).data)
    held_in = images_of_training(training_config(data=data | {"valid": {"share": 0.5}}).data)
    assert len(every) == 4
    assert len(held_in) == 2
