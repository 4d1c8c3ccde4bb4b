"""What captions share: the word of the style, and prompts in their words."""

import pytest

from dora_mm.data.images.shared_words import Frame, example_prompts, shared_frame, shared_word


@pytest.mark.parametrize(
    ("captions", "word"),
    [
        (["a TOK icon of a bus", "a TOK icon of an owl"], "TOK"),
        (["lego set, sks3 style", "lego set, sks3 style, red"], "sks3"),  # an invented one before a real one
        (["watercolour of a bus", "watercolour of a cat"], "watercolour"),
        (["a photo of a bus", "a photo of a cat"], None),
        (["a bus", "two cats"], None),
    ],
)
def test_the_word_of_a_style(captions, word):
    assert shared_word(captions) == word


def test_a_few_captions_may_lack_the_word():
    captions = [f"mystl, thing {number}" for number in range(19)]
    assert shared_word([*captions, "a bus"]) == "mystl"
    assert shared_word([*captions[:5], "a bus", "a cat"]) is None


def test_the_words_around_a_thing():
    captions = ["a TOK icon of a bus, in the style of TOK", "a TOK icon of an owl, in the style of TOK"]
    assert shared_frame(captions) == Frame("a TOK icon of", ", in the style of TOK")
    assert example_prompts(captions, "TOK")[0] == "a TOK icon of a lighthouse, in the style of TOK"


def test_prompts_have_the_word_even_where_captions_share_no_words_around_it():
    assert example_prompts(["sks, bus in the rain", "sks, my cat"], "sks")[0] == "sks, a lighthouse"
    assert example_prompts(["a bus, in sks", "cats (sks)"], "sks")[0] == "a lighthouse, sks"
    assert example_prompts(["a bus"], None)[0] == "a lighthouse"


def test_prompts_show_what_no_caption_names():
    prompts = example_prompts(["sks lighthouse", "sks dragon"], "sks")
    assert not any(word in " ".join(prompts) for word in ("lighthouse", "dragon"))
