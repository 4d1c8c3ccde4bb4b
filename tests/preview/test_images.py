"""What a dry run says of the images, and when the number of steps is remarked upon."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dora_mm.config.images import CaptionConfig, DataConfig, MaskConfig, PreserveConfig
from dora_mm.config.training import TrainConfig
from dora_mm.data.images.folder import CaptionedImage
from dora_mm.data.images.masks import MaskFile
from dora_mm.data.images.wording import rendered
from dora_mm.preview.images import (
    describe_captions,
    describe_images,
    describe_length,
    describe_masks,
    describe_preserved,
    describe_rendered,
    remark_on_alternatives,
    remark_on_captions,
    remark_on_length,
)

IMAGES = [
    CaptionedImage(Path("a.png"), "a TOK cat", (128, 128), "a"),
    CaptionedImage(Path("b.png"), "a dog on a mat", (64, 64), "b", ".txt"),
    CaptionedImage(Path("3_c/c.png"), "a TOK", (300, 150), "c", "data.instance_prompt", 3),
]
DATA = DataConfig(folder="pictures", resolution=128, placeholder="TOK", subfolders=True)


def test_images_by_bucket():
    assert describe_images(IMAGES, DATA).splitlines() == [
        "images  3 in pictures",
        "buckets   128 x 128: 2, 160 x 96: 1 (h x w)",
        "enlarged  1: they have less than 128 x 128 pixels",
        "repeats   2 images x 1, 1 images x 3",
    ]


def test_captions_by_source_with_the_longest_and_those_without_the_placeholder():
    assert describe_captions(IMAGES, DATA, lambda text: len(text.split())).splitlines() == [
        "captions  1 from metadata.jsonl, 1 from <name>.txt, 1 from data.instance_prompt",
        "          1 without the trigger word TOK: b.png",
        "longest   5 tokens: a dog on a mat",
    ]
    assert "14 characters: a dog on a mat" in describe_captions(IMAGES, DATA, None)


def test_three_captions_of_each_folder_are_rendered():
    """And only where they do not stay as they are."""
    images = [image._replace(folder=number // 4, digest=str(number)) for number, image in enumerate(IMAGES * 3)]
    values = {"resolution": 64, "folders": [{"path": "one"}, {"path": "other"}, {"path": "third"}]}
    shuffled = values | {"captions": {"prefix": "a photo of", "tag_dropout": 0.5}}

    def lines(data):
        return describe_rendered(images, SimpleNamespace(data=DataConfig.model_validate(data), seed=3))

    assert lines(values) == []
    found = lines(shuffled)
    assert len(found) == 3 + 3 + 1
    assert all("a photo of" in line for line in found)
    data = DataConfig.model_validate(shuffled)
    assert found[3] == f"rendered  {images[4].path.name}: {rendered(images[4], data.captions, 3, 0)}"


def test_masks_and_what_is_preserved_are_said():
    data = DATA.model_copy(update={"mask": MaskConfig(outside="base")})
    file = MaskFile(Path("a-masklabel.png"), "-masklabel.png")
    masked = [IMAGES[0]._replace(mask="a", mask_file=file), *IMAGES[1:]]
    line = "masks     1 of 3 (NAME-masklabel.png), floor 0.1, held at the base model outside"
    assert describe_masks(masked, data) == [line]
    unused = "masks     1 of 3 (NAME-masklabel.png), not used: data.mask={} uses them"
    assert describe_masks(masked, DATA) == [unused]
    in_folder = [IMAGES[0]._replace(mask="a", mask_file=MaskFile(Path("masks/a.png"))), *IMAGES[1:]]
    assert describe_masks(in_folder, data)[0].startswith("masks     1 of 3 (in masks), floor")
    assert describe_masks(IMAGES, DATA) == []
    lines = [
        describe_preserved(SimpleNamespace(data=DATA, preserve=PreserveConfig(**held)), images)[0].split(":")[0]
        for held, images in (({}, ()), ({"prompt": "", "every": 3}, ()), ({"weight": 0.5}, IMAGES))
    ]
    assert lines == [
        "preserve  captions without TOK, loss x 1, every step",
        "preserve  '', loss x 1, every 3 steps",
        "preserve  3 images, loss x 0.5, every step",
    ]


def test_alternatives_that_stay_text_are_remarked_upon():
    images = [IMAGES[0]._replace(caption="a {red|blue} bus"), IMAGES[1]]
    (remark,) = remark_on_alternatives(images, DATA)
    assert remark == "1 captions have {a|b} (a.png), as text: data.captions.alternatives=true picks one"
    assert remark_on_alternatives(images, DATA.model_copy(update={"captions": CaptionConfig(alternatives=True)})) == []


def test_the_length_is_compared_with_the_recipes():
    train = TrainConfig(steps=400, batch_size=2, gradient_accumulation_steps=3)
    assert describe_length([1] * 30, train, 2) == (
        "length    400 steps x batch 2 x 3 accumulated x 2 processes / 30 images = each is seen 160 times "
        "(usual for a style: 50 to 130 times)"
    )
    found = describe_length([2.5] * 10 + [0.5] * 10, TrainConfig(steps=30, batch_size=2))
    assert found.startswith("length    30 steps x batch 2 / 30 places of 20 images in an epoch = each is seen 1 to 5 ")
    rare = describe_length([1] * 500, TrainConfig(steps=2, batch_size=2))
    assert "/ 500 images = each is seen 0.008 times (" in rare


@pytest.mark.parametrize(
    ("steps", "images", "words"),
    [
        (1000, 23, None),
        (1000, 61, None),
        (400, 400, "Each image is seen 3 times"),
        (1000, 5, "Each image is seen 600 times"),
    ],
)
def test_a_training_far_from_the_recipes_is_remarked_upon(steps, images, words):
    remarks = remark_on_length([1] * images, TrainConfig(steps=steps, batch_size=3))
    assert len(remarks) == (words is not None)
    assert all(words in remark for remark in remarks)


def test_the_remark_says_how_many_steps_would_be_as_in_the_recipes():
    (remark,) = remark_on_length([1] * 61, TrainConfig(steps=10, batch_size=3))
    assert "little for a style. For the usual 50 to 130 times set train.steps from 1000 to 2700" in remark


@pytest.mark.parametrize(
    ("repeats", "words"),
    [
        ([1, 100], None),  # one is seen often enough
        ([1, 2], "Each image is seen at most 8 times"),
    ],
)
def test_images_that_are_repeated_count_as_often(repeats, words):
    remarks = remark_on_length(
        repeats, TrainConfig(steps=4, batch_size=3) if words else TrainConfig(steps=40, batch_size=3)
    )
    assert len(remarks) == (words is not None)
    assert all(words in remark for remark in remarks)


def test_every_caption_of_an_image_is_looked_at_for_its_length():
    """Not only the first one."""
    image = IMAGES[0]._replace(more=("short", "far too long"))
    model = SimpleNamespace(cut=lambda texts: [text for text in texts if len(text) > 10], most_tokens=10)
    (remark,) = remark_on_captions(model, [image], DATA.model_copy(update={"captions": CaptionConfig(prefix="p,")}))
    assert remark == "2 captions have more than 10 tokens and lose their end, the first: p, a TOK cat"
