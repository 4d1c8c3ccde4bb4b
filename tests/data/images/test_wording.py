"""Captions as functions of (caption, settings, seed, epoch, image)."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dora_mm.config.images import CaptionConfig
from dora_mm.data.images.folder import CaptionedImage, digest_of, read_captioned_images
from dora_mm.data.images.wording import fixed_and_flexible, rendered, unchanged
from dora_mm.data.syntax import alternatives

TAGS = "TOK, red, round, on grass, sunny"


def image(caption=TAGS, digest="a", more=()):
    return CaptionedImage(Path("a.png"), caption, (64, 64), digest, more=more)


def over_epochs(one, config, epochs=200, seed=0):
    return [rendered(one, config, seed, epoch) for epoch in range(epochs)]


def test_without_settings_a_caption_stays_as_it_is():
    odd = "a {b|c},  d ||| e "
    assert rendered(image(odd), None, 0, 3) == odd == unchanged(image(odd), None)


def test_a_caption_depends_on_seed_epoch_and_image_alone():
    config = CaptionConfig(shuffle=True, tag_dropout=0.3)
    found = [rendered(image(), config, 1, epoch) for epoch in range(20)]
    assert found == [rendered(image(), config, 1, epoch) for epoch in reversed(range(20))][::-1]
    assert len(set(found)) > 10
    assert found != [rendered(image(), config, 2, epoch) for epoch in range(20)]
    assert found != [rendered(image(digest="b"), config, 1, epoch) for epoch in range(20)]


def test_shuffled_tags_are_all_there_in_every_order():
    found = over_epochs(image("a, b, c"), CaptionConfig(shuffle=True), 300)
    assert {tuple(sorted(each.split(", "))) for each in found} == {("a", "b", "c")}
    counts = Counter(found)
    assert len(counts) == 6
    assert min(counts.values()) > 25


def test_the_first_tags_are_neither_moved_nor_dropped():
    config = CaptionConfig(shuffle=True, tag_dropout=0.5, keep=2)
    assert all(each.startswith("TOK, red") for each in over_epochs(image(), config))
    kept = Counter(tag for each in over_epochs(image(), config, 1000) for tag in each.split(", "))
    assert kept["TOK"] == 1000
    assert abs(kept["sunny"] / 1000 - 0.5) < 0.06


def test_bars_fix_the_head_and_the_tail():
    caption = "TOK, icon ||| red, round , sunny ||| best quality"
    assert fixed_and_flexible(caption, 0) == (["TOK", "icon"], ["red", "round", "sunny"], ["best quality"])
    assert fixed_and_flexible("TOK ||| red", 3) == (["TOK"], ["red"], [])
    for each in over_epochs(image(caption), CaptionConfig(shuffle=True, tag_dropout=0.4), 50):
        assert each.startswith("TOK, icon")
        assert each.endswith("best quality")
        assert "|||" not in each
    assert unchanged(image(caption), CaptionConfig()) == "TOK, icon, red, round, sunny, best quality"


def test_prefix_and_suffix_stay():
    config = CaptionConfig(prefix="{a|b} photo of", suffix="by TOK", shuffle=True, tag_dropout=0.9, alternatives=True)
    found = over_epochs(image("x, y"), config)
    assert all(each.split(" ")[0] in "ab" and each.endswith("by TOK") for each in found)
    assert "a photo of by TOK" in found  # all tags are dropped


def test_alternatives_are_those_of_prompts():
    assert alternatives("a {red|blue} bus", 7) in ("a red bus", "a blue bus")
    found = set(over_epochs(image("a {red|blue} bus"), CaptionConfig(alternatives=True), 30))
    assert found == {"a red bus", "a blue bus"}
    assert set(over_epochs(image("a {red|blue} bus"), CaptionConfig(shuffle=True), 5)) == {"a {red|blue} bus"}


@given(st.integers(0, 50))
def test_one_of_several_captions_is_drawn(epoch):
    several = image("one", more=("two", "three"))
    assert rendered(several, None, 0, epoch) in ("one", "two", "three")
    assert unchanged(several, None) == "one"
    assert len(set(over_epochs(several, None, 40))) == 3


def test_several_captions_of_files(image_folder):
    rows = ['{"file_name": "0.png", "text": ["a bus", "a red\\nbus"]}']
    (image_folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    (image_folder / "1.txt").write_text("a cat\n\n  a black  cat\n")

    def read(**settings):
        found = read_captioned_images(image_folder, instance_prompt="x", **settings)
        return [(each.caption, *each.more) for each in found[:3]], digest_of(found)

    whole, lines = read(), read(lines=True)
    assert whole[0] == [("a bus", "a red\nbus"), ("a cat a black cat",), ("x",)]
    assert lines[0] == [("a bus", "a red", "bus"), ("a cat", "a black cat"), ("x",)]
    assert whole[1] != lines[1]
    (image_folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": ["a", 3]}\n')
    with pytest.raises(ValueError, match="has a caption that is not text"):
        read()


def test_keep_without_anything_that_moves_is_refused():
    with pytest.raises(ValidationError, match="keep has no effect without shuffle or tag_dropout"):
        CaptionConfig(keep=1)
