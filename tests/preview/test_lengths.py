"""What is told of the lengths of rows before a training, from a sample that is encoded."""

from types import SimpleNamespace

import numpy as np
import pytest

from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.splits import TrainingSet
from dora_mm.data.vl.tables import open_table
from dora_mm.models.vl.vl_model import RowLengths, likeliest_answer
from dora_mm.models.vl.vlm.encoding import IGNORED
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.preview import lengths as module
from dora_mm.preview.lengths import (
    RowSample,
    longest_rows,
    row_lines,
    sample_lengths,
    sample_line,
    sample_table,
    spaced_rows,
)
from dora_mm.preview.vl_data import largest_batch
from tests.shared.data.vl_files import write_json
from tests.shared.data.vlm_rows import write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def rows(tmp_path, images):
    """Makes a training set of rows with these numbers of images each, 4 tokens of a row of 40, and these answers.

    None stands for an image that is broken.
    """

    def make(counts: list[int | None], on_bad_data: str = "stop", answers: dict[int, str] | None = None) -> TrainingSet:
        said = [
            {
                "id": f"r{number}",
                "image": ["broken.png"] if count is None else ["square.png"] * count,
                "conversations": [
                    {"from": "human", "value": "<image>" * (1 if count is None else count) + "What?"},
                    {"from": "gpt", "value": (answers or {}).get(number, "x")},
                ],
            }
            for number, count in enumerate(counts)
        ]
        file = str(write_json(tmp_path / "chat.json", said))
        source = SourceConfig(format="chat", file=file, images=str(images))
        return TrainingSet(open_table(source, tmp_path / "tables", on_bad_data=on_bad_data), str(images), 2)

    return make


@pytest.fixture
def model(tiny_vlm):
    return VLM(VLMModelConfig(path=str(tiny_vlm("llava")), max_length=40))


def sample(tokens, image_tokens, lost=(), limit=100, total=None, bad=(), longest=0, exchanges=()) -> RowSample:
    """Of rows with these tokens, the last ones of which are not evenly spaced ones."""
    lost, numbers = np.isin(np.arange(len(tokens)), lost), np.arange(len(tokens))
    bad = {len(tokens) + row: "cannot be read" for row in range(len(bad))}
    tokens, image_tokens, cut = np.array(tokens), np.array(image_tokens), np.array(exchanges or [0] * len(tokens))
    lengths = (tokens, image_tokens, np.minimum(tokens, limit))
    found = RowLengths(numbers, *lengths, cut, lost, limit, "model.max_length", bad)
    return RowSample(total or len(tokens) + len(bad), found, numbers < len(tokens) - longest)


def test_rows_are_spaced_rows():
    assert spaced_rows(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert spaced_rows(101, 3).tolist() == [0, 50, 100]
    assert spaced_rows(0, 3).tolist() == []
    assert len(spaced_rows(600_000, 100)) == 100


def test_the_longest_rows_have_the_most_images_and_text(rows):
    table = rows([1, 0, 2, 1], answers={1: "word " * 900, 3: "words"}).table
    assert longest_rows(table, 3).tolist() == [1, 2, 3]


def test_the_table_of_lengths():
    assert sample_table("chat", sample([10, 20, 30, 120, 150], [4, 4, 8, 90, 90], lost=[4])).splitlines() == [
        "lengths of chat in tokens, all 5 rows encoded  min  50 %  90 %  99 %  max",
        "whole rows                                      10    30   150   150  150",
        "image tokens (59.4 % of all)                     4     8    90    90   90",
        "2 of 5 rows are longer than 100 tokens (model.max_length) and are cut: 1 loses the whole answer and is left "
        "out",
    ]
    cut = sample([90, 120, 150, 160], [4] * 4, lost=[2, 3], exchanges=[0, 2, 1, 0])
    assert sample_table("chat", cut).splitlines()[-1] == (
        "3 of 4 rows are longer than 100 tokens (model.max_length) and are cut: 2 lose 3 whole exchanges with the "
        "images, 2 lose the whole answer and are left out"
    )
    assert "images" not in sample_table("vqa", sample([7, 8], [0, 0]))
    assert sample_table("vqa", sample([], [], total=2, bad=[0, 1])) == "lengths of vqa in tokens, all 2 rows encoded"


def test_quantiles_are_of_evenly_spaced_rows_and_the_highest_length_of_all():
    table = sample_table("vqa", sample([7, 8, 9, 90, 80], [0] * 5, total=9, longest=2, bad=[0])).splitlines()
    assert table == [
        "lengths of vqa in tokens, 5 of 9 rows encoded  min  50 %  90 %  99 %  max",
        "whole rows                                       7     8     9     9   90",
        "min to 99 % are of 3 evenly spaced rows, max also of those with most text and images",
        "1 of 6 rows cannot be encoded, and is left out",
    ]


def test_a_line_for_the_log(rows):
    table = rows([1, 1, 1]).table
    assert sample_line("chat", table, None) == "chat: 3 rows"
    assert sample_line("chat", table, sample([10, 20, 120], [4, 4, 4])) == (
        "chat: 3 rows; tokens: 50 % 20, 99 % 120, at most 120, 8 % for images; 1 of 3 rows is longer than 100 tokens "
        "(model.max_length) and is cut"
    )
    assert "tokens of 2 rows encoded: 50 %" in sample_line("chat", table, sample([10, 20], [4, 4], total=3))


@pytest.mark.parametrize(("name", "limit"), [("llava", 45), ("qwen2_5_vl", 45), ("git", 12), ("florence2", None)])
def test_lengths_are_those_of_rows_before_they_are_cut(name, limit, tiny_vlm, rows):
    found = rows([1, 1, 1], answers={1: "A ball. " * 20, 2: "word " * 9})
    model = VLM(VLMModelConfig(path=str(tiny_vlm(name)), max_length=limit))
    lengths = model.lengths("chat", found.table, [0, 1, 2], found.images)
    whole = VLM(VLMModelConfig(path=str(tiny_vlm(name)))).rows
    encoded = [whole.row("chat", row, found.images, likeliest_answer(row)) for row in found.table]
    assert lengths.tokens.tolist() == [row.length for row in encoded]
    assert lengths.image_tokens.tolist() == [row.num_image_tokens for row in encoded]
    cut = [model.rows.row("chat", row, found.images, likeliest_answer(row)) for row in found.table]
    assert lengths.loses_answer.tolist() == [bool((row.labels == IGNORED).all()) for row in cut]


def test_a_row_that_cannot_be_encoded_stops_or_is_counted(model, rows, images):
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"chat\.json, id r2: .+broken\.png is not a complete image"):
        row_lines(model, {"chat": rows([1, 0, None, 2])})
    with pytest.raises(ValueError, match=r"no row of 2 can be encoded; .+chat\.json, id r0: .+broken\.png"):
        row_lines(model, {"chat": rows([None, None], "skip")})
    text = row_lines(model, {"chat": rows([1, 0, None, 2], "skip")})
    assert text.startswith("chat: 4 rows; tokens: 50 %")
    assert text.endswith("; 1 of 4 rows cannot be encoded, and is left out")


def test_rows_outside_the_sample_are_not_looked_at(model, rows, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 2)
    found = sample_lengths(model, "chat", rows([1, 10, 1, 2, 1, 1]))
    assert found is not None
    assert found.lengths.rows.tolist() == [0, 1, 3, 5]  # the first, the last, and what has many images
    assert found.spaced.tolist() == [True, False, False, True]


def test_a_training_does_not_start_where_most_rows_lose_their_answers(tiny_vlm, rows):
    """Also where the images alone are too long, which stops at no row."""
    short = VLM(VLMModelConfig(path=str(tiny_vlm("llava")), max_length=18))
    with pytest.raises(ValueError, match=(
        r"chat\.json: 2 of 3 rows that were looked at lose their whole answers, which are beyond 18 tokens "
        r"\(model\.max_length\): raise it, or shorten the texts, make the images smaller \(model\.max_pixels,"
    )):  # fmt: skip
        row_lines(short, {"chat": rows([3, 1, 10])})
    assert "1 loses the whole answer and is left out" in row_lines(short, {"chat": rows([1, 1, 10])})


def test_long_texts_are_counted(tiny_vlm, rows):
    short = VLM(VLMModelConfig(path=str(tiny_vlm("llava")), max_length=18))
    text = row_lines(short, {"chat": rows([1, 1, 2])})
    assert "1 of 3 rows is longer than 18 tokens (model.max_length) and is cut" in text


def test_of_fewer_rows_than_a_batch_some_are_there_again():
    """As the training fills its batches: three rows in batches of eight took three times what was said."""
    read = np.array([5, 9, 7])
    zeros, loses = np.zeros(3, dtype=int), np.array([False, False, True])
    found = RowLengths(np.array([0, 1, 2]), read, zeros, read, zeros, loses, 10, "model.max_length")
    batch = largest_batch("chat", SimpleNamespace(batch_size=5), found)
    assert batch is not None
    assert (batch.rows, batch.num_computed, batch.length) == ([1, 0, 1, 0, 1], 5, 9)
