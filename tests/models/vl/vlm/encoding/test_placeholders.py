"""Images of a text are found in what a processor made of it, by comparison."""

import time

from hypothesis import given
from hypothesis import strategies as st

from dora_mm.models.vl.vlm.placeholders import ImageSpan, image_spans, moved


def test_images_side_by_side_are_one_span_in_linear_time():
    text, expanded = "<image>" * 3 + " Hi  there", "x" * 1_000 + " Hi there"
    start = time.process_time()
    assert image_spans(text, expanded, ["<image>"], []) == []
    assert time.process_time() - start < 0.5
    found = image_spans("a<image><image>b", "axxxxb", ["<image>"], [])
    assert found == [ImageSpan((0, 0), (0, 0)), ImageSpan((1, 15), (1, 5))]


@given(st.lists(st.text("ab \n", max_size=4), min_size=1, max_size=5), st.text("<", max_size=2), st.data())
def test_what_is_behind_images_is_found_where_it_is(pieces, front, data):
    text, expanded, behind = pieces[0], front + pieces[0], []
    for piece in pieces[1:]:
        text, expanded = f"{text}<image>", f"{expanded}{'x' * data.draw(st.integers(1, 5))}"
        behind.append((len(text), len(expanded), bool(piece)))
        text, expanded = text + piece, expanded + piece
    spans = image_spans(text, expanded, ["<image>"], [])
    if text == expanded:
        assert spans == []
        return
    for before, after, apart in behind:
        assert not apart or moved(before, spans) == after
