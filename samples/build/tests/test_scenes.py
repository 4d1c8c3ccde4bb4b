"""Scenes and their images."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samples.build.scenes.colors import PAINTS, PALE
from samples.build.scenes.pictures import Artist, describe_thing, load_photos
from samples.build.scenes.scenes import GAP, LARGE, PHOTOS, SIZE, SMALL, Background, Placed, Scene, make_scene
from samples.build.scenes.things import STYLES, Thing, dump_things, read_things, with_a
from samples.build.tests.scene_things import plain_photos, shape, shape_icons, some_things

THINGS = some_things()
numbers = st.integers(0, 10**6)


@given(numbers, numbers)
def test_a_scene_is_a_function_of_seed_split_and_index(seed, index):
    scene = make_scene(THINGS, seed, "train", index)
    assert scene == make_scene(THINGS, seed, "train", index)
    assert scene.objects != make_scene(THINGS, seed, "val", index).objects
    with pytest.raises(dataclasses.FrozenInstanceError):
        scene.index = 1  # type: ignore[misc]


@given(numbers)
def test_objects_do_not_overlap_and_are_inside_the_image(index):
    objects = make_scene(THINGS, 0, "train", index).objects
    assert 1 <= len(objects) <= 6
    for number, placed in enumerate(objects):
        assert SMALL[0] <= placed.size <= LARGE[1]
        assert placed.large == (placed.size > SMALL[1])
        assert placed.size / 2 + GAP - 1 <= min(placed.x, placed.y, SIZE - placed.x, SIZE - placed.y)
        for other in objects[:number]:
            apart = max(abs(placed.x - other.x), abs(placed.y - other.y))
            assert apart >= (placed.size + other.size) / 2 + GAP


@given(numbers)
def test_appearances_have_the_stated_colour_and_differ_from_the_background(index):
    scene = make_scene(THINGS, 0, "train", index)
    background = scene.background
    assert (background.name == "plain") == (background.color is not None)
    assert background.color in PALE or background.name in PHOTOS
    for placed in scene.objects:
        assert placed.color is None or placed.color != background.color
        if placed.painted:
            assert placed.color in placed.thing.colors[placed.style]
        else:
            assert placed.color == placed.thing.natural.get(placed.style)
            assert placed.style != "contrast"
    assert scene.style in {placed.style for placed in scene.objects} | {None}


def test_every_number_of_objects_style_background_and_colour_occurs():
    scenes = [make_scene(THINGS, 0, "train", index) for index in range(400)]
    objects = [placed for scene in scenes for placed in scene.objects]
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4, 5, 6}
    assert {placed.style for placed in objects} == set(STYLES)
    assert {scene.background.name for scene in scenes} == {"plain", *PHOTOS}
    assert {placed.color for placed in objects} == {*PAINTS, None}
    assert {max(len(scene.named(placed.name)) for placed in scene.objects) for scene in scenes} >= {1, 2, 3, 4, 5}


def test_an_object_in_the_colour_of_the_background_gets_another_appearance():
    thing = Thing("lemon", "lemons", "1", None, {"contrast": ("red", "yellow")}, dict.fromkeys(STYLES, "yellow"))
    scenes = [make_scene([thing], 0, "train", index) for index in range(200)]
    on_yellow = [placed for s in scenes if s.background.color == "yellow" for placed in s.objects]
    assert on_yellow
    assert {placed.color for placed in on_yellow} == {"red"}


def at(x: int, y: int, size: int = 50) -> Placed:
    return Placed(THINGS[0], "flat", "red", True, x, y, size)


@pytest.mark.parametrize(
    ("first", "second", "side", "holds"),
    [
        (at(40, 100), at(150, 110), "left", True),
        (at(40, 100), at(150, 110), "right", False),
        (at(40, 100), at(150, 110), "above", None),  # a little higher: people would not agree
        (at(40, 100), at(150, 100), "above", False),
        (at(40, 40), at(90, 150), "left", None),  # more above than left
        (at(40, 40), at(90, 150), "above", True),
        (at(100, 40), at(140, 40), "left", None),  # one begins before the other ends
        (at(100, 180), at(100, 40), "below", True),
    ],
)
def test_is_side(first, second, side, holds):
    assert first.is_side(side, second) is holds


@given(numbers)
def test_sides_mirror_each_other(index):
    objects = make_scene(THINGS, 0, "train", index).objects
    for one in objects:
        for other in objects:
            for side, back in (("left", "right"), ("above", "below")):
                assert one.is_side(side, other) == other.is_side(back, one)
                assert not (one is not other and one.is_side(side, other) and one.is_side(back, other))


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [
        (30, 30, ("left", "top")),
        (112, 200, ("middle", "bottom")),
        (86, 200, (None, "bottom")),
        (200, 100, ("right", "middle")),
    ],
)
def test_place(x, y, place):
    assert at(x, y).place() == place


def test_images_show_objects_at_their_position_in_their_colour():
    artist = Artist(shape_icons(), plain_photos())
    for index in range(40):
        scene = make_scene([thing for thing in THINGS if thing.name != "bar"], 0, "train", index)
        image = artist.draw(scene)
        assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")
        pixels = np.asarray(image, dtype=int)
        behind = PALE[scene.background.color] if scene.background.color else (90, 90, 90)
        free = np.ones((SIZE, SIZE), dtype=bool)
        for placed in scene.objects:
            color = PAINTS[placed.color if placed.painted else "red"]
            assert np.abs(pixels[placed.y, placed.x] - color).max() <= 12, (index, placed)
            reach = placed.size // 2 + 14  # with its shadow
            free[max(placed.y - reach, 0) : placed.y + reach, max(placed.x - reach, 0) : placed.x + reach] = False
        assert (pixels[free] == behind).all()


def test_a_rim_is_white_and_shadows_do_not_wrap_around():
    artist = Artist(shape_icons(), plain_photos())
    low = Placed(THINGS[1], "flat", "red", False, 112, 190, 58)
    plain = np.asarray(artist.draw(Scene("t", 0, Background("plain", "blue"), None, (low,))))
    assert (plain[:20] == PALE["blue"]).all()
    photo = np.asarray(artist.draw(Scene("t", 0, Background("gravel"), None, (low,))))
    assert photo[190, 112 - 29 - 2].min() > 200
    assert plain[190, 112 - 29 - 2].min() < 200


def test_offsets_select_sections_of_a_photo():
    photos = load_photos()
    assert set(photos) == set(PHOTOS)
    artist = Artist({}, photos)
    first, second = (artist.background(Background("grass", None, offset)) for offset in ((0, 0), (0.99, 0.99)))
    assert first.size == second.size == (SIZE, SIZE)
    assert first.tobytes() != second.tobytes()
    green = np.asarray(first, dtype=float).mean(axis=(0, 1))
    assert green[1] > green[0] + 15
    assert green[1] > green[2] + 15


def test_describe_thing_keeps_the_visible_colours():
    icons = {(style, "disc"): shape("disc", PAINTS["red"]) for style in STYLES}
    icons["noto", "disc"] = shape("disc", (128, 128, 128))  # cannot be painted
    icons["twemoji", "disc"].paste(PAINTS["blue"], (0, 0, 60, 30))
    thing = describe_thing({"name": "disc", "code": "1", "painted": True, "natural": "red"}, icons)
    assert (thing.plural, thing.kind) == ("discs", None)
    assert thing.colors["flat"] == tuple(PAINTS)
    assert thing.colors["noto"] == ()
    assert thing.colors["twemoji"] == ("red",)  # its main hue is the blue half: the other stays red
    assert {"red", "blue"} <= set(thing.colors["contrast"])
    assert thing.natural == {"flat": "red", "3d": "red"}


def test_things_are_read_as_written(tmp_path):
    path = tmp_path / "things.jsonl"
    path.write_text(dump_things(THINGS))
    assert read_things(path) == THINGS
    assert read_things(path)[0].colors == THINGS[0].colors
    path.write_text(dump_things(THINGS) + '{"name": "disc", "plural": "discs", "code": "1"}\n')
    with pytest.raises(ValueError, match=r"things\.jsonl, line 9: disc is repeated"):
        read_things(path)
    path.write_text('{"name": "disc", "plural": "discs", "code": "1", "kind": "thing"}\n')
    with pytest.raises(ValueError, match=r"things\.jsonl, line 1: .*none of animal"):
        read_things(path)


@pytest.mark.parametrize(
    ("words", "with_article"),
    [("owl", "an owl"), ("umbrella", "an umbrella"), ("3d car", "a 3d car"), ("bus", "a bus")],
)
def test_with_a(words, with_article):
    assert with_a(words) == with_article
