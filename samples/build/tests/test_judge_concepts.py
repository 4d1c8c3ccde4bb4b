"""The concept space that the judge is fitted with, on synthetic features."""

import numpy as np
import pytest

from samples.build.judge.concepts import fit_concepts

WIDTH = 60
STYLE_NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def fitted_space():
    """A concept space with its gallery; the style shifts every feature far more than the concept does."""
    rng = np.random.default_rng(0)
    shifts = {style: 3 * rng.normal(size=WIDTH) for style in STYLE_NAMES}
    bends = {style: 4 * rng.normal(size=(WIDTH, 3)) for style in STYLE_NAMES}

    def icons(number):
        content, shear = rng.normal(size=(number, WIDTH)), rng.normal(size=(number, 3))
        return {
            style: content + shifts[style] + shear @ bends[style].T + 0.3 * rng.normal(size=content.shape)
            for style in STYLE_NAMES
        }

    fitted, gallery = icons(300), icons(40)
    codes = [f"s{index}" for index in range(40)]
    fitted_codes = [f"f{index}" for index in range(300)]
    space = fit_concepts(
        fitted,
        dict.fromkeys(STYLE_NAMES, fitted_codes),
        gallery,
        dict.fromkeys(STYLE_NAMES, codes),
    )
    return space, gallery, codes


def plain_cosine_score(gallery, codes, style):
    others = [name for name in STYLE_NAMES if name != style]
    unit = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in gallery.items()}
    nearest = (unit[style] @ np.concatenate([unit[name] for name in others]).T).argmax(axis=1) % len(codes)
    return (nearest == np.arange(len(codes))).mean()


def test_finds_the_concept_across_styles_where_plain_cosine_does_not(fitted_space):
    space, gallery, codes = fitted_space
    for style in STYLE_NAMES:
        assert (space.ranks(gallery[style], codes, without_style=style) == 1).mean() > 0.8
        assert plain_cosine_score(gallery, codes, style) < 0.5


def test_a_gallery_icon_is_its_nearest_neighbour(fitted_space):
    space, gallery, codes = fitted_space
    assert (space.ranks(gallery["one"], codes) == 1).all()


def test_rank_counts_the_nearer_concepts(fitted_space):
    space, gallery, codes = fitted_space
    similarities = space.similarities(gallery["two"][:5])
    assert similarities.shape == (5, 40)
    order = np.argsort(-similarities, axis=1)
    for image in range(5):
        for place in (0, 3, 39):
            code = codes[order[image, place]]
            assert space.ranks(gallery["two"][image : image + 1], [code]) == [place + 1]
