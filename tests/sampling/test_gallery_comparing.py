"""The page of a gallery in Chromium: which side is which, any two images compared, search, links, sizes and keys."""

import pytest

from tests.sampling.test_gallery_page import PROMPTS
from tests.shared import browser

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")


def test_both_sides_of_a_pair_are_named(one, tmp_path):
    one.open(tmp_path / "gallery" / "index.html")
    sides = (
        "[...document.querySelectorAll('.pair')]"
        ".map((tile) => [...tile.querySelectorAll('.tag')].map((side) => [side.textContent, side.offsetLeft]))"
    )
    ((left, left_at), (right, right_at)), *_ = one.evaluate(sides)
    assert (left, right) == ("before", "after")
    assert left_at < one.evaluate("document.querySelector('.pair').clientWidth / 2") < right_at


def test_search_looks_at_all_that_a_gpu_shows(one):
    for words, count in {"no adapter": 4, "strength 1": 3, "one/001 cat": 1, "seed 3 no": 1, "BLACK failed": 1}.items():
        one.evaluate(f"find('search').value = {words!r}; find('search').dispatchEvent(new Event('input'))")
        assert (words, len(one.evaluate(PROMPTS))) == (words, count)


def test_any_two_images_are_compared(one):
    names = "[...document.querySelectorAll('#compare .tag')].map((node) => node.textContent)"
    one.evaluate("document.querySelector('.grid li:nth-child(2) .card').focus()")
    one.press("c")
    assert one.evaluate("find('pinned-name').textContent") == "Compared with: a bus, seed 1, one/001, strength 1"
    one.click(".grid li:nth-child(6) .card")
    assert one.evaluate(names) == ["seed 1", "seed 3"]
    assert one.evaluate("find('before').src").endswith("adapter/1.png")
    assert one.evaluate("find('after').src").endswith("adapter/3.png")
    one.press("Home", "ArrowRight")  # the pinned one itself is compared with the bare model, as ever
    assert one.evaluate(names) == ["before", "after"]
    one.press("ArrowRight", "c", "ArrowRight")
    assert one.evaluate("find('before').src").endswith("bare/2.png")
    one.press("ArrowLeft")
    assert one.evaluate("find('pin').textContent") == "Stop comparing"
    one.click("#pin")
    assert one.evaluate("find('compare').hidden && find('pinned').hidden")
    assert one.problems == []


def test_a_link_opens_one_image_whatever_is_shown(one, tmp_path):
    one.click(".grid li:nth-child(3) .card")
    link = one.evaluate("location.href")
    assert link.endswith("index.html#pictures/1/bare/2.png")
    one.press("Escape")
    one.wait_for("!location.href.includes('#')")
    one.evaluate("find('search').value = 'key'; find('search').dispatchEvent(new Event('input'))")
    one.evaluate(f"location.hash = {link.partition('#')[2]!r}")
    one.wait_for("viewer.open")
    assert one.evaluate("find('prompt').textContent") == "a cat"
    one.call("Page.navigate", url="about:blank")
    one.call("Page.navigate", url=link)  # in a pair of the view that it opens with
    one.wait_for("typeof viewer === 'object' && viewer.open")
    assert one.evaluate("find('after').src").endswith("bare/2.png")
    one.press("ArrowRight")
    assert one.evaluate("location.hash") == "#pictures/1/adapter/2.png"
    assert one.problems == []


def test_the_size_of_gpus_and_the_list_of_keys(one):
    width = "document.querySelector('.card').getBoundingClientRect().width"
    before = one.evaluate(width)
    one.evaluate("find('size').value = 24; find('size').dispatchEvent(new Event('input'))")
    assert one.evaluate(width) >= 24 * 16 > before
    one.press("?")
    assert one.evaluate("find('help').open")
    keys = one.evaluate("[...document.querySelectorAll('#help kbd')].map((node) => node.textContent)")
    assert {"f", "c", "/", "?", "Enter", "Home"} <= set(keys)
    one.press("Escape", "/")
    assert not one.evaluate("find('help').open")
    one.press("?", "c", "f")  # are letters in the search
    assert one.evaluate("[find('search').value, find('help').open, state.pinned]") == ["?cf", False, None]
