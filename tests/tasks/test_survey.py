"""What is found of a training's rows before it starts."""

import numpy as np
import pytest

from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.lengths import RowLengths, evenly_spaced, length_line, length_table
from dora_mm.data.vl.splits import TrainingSet
from dora_mm.data.vl.tables import open_table
from dora_mm.models.vlm.family import VLM
from dora_mm.tasks.survey import survey, survey_all
from tests.data.vl.files import write_json
from tests.models.vlm.vlm_rows import write_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def rows(tmp_path, pictures):
    """Makes a training set of rows with these numbers of images each, 4 tokens of a row of 40."""

    def make(counts: list[int], on_bad_data: str = "stop") -> TrainingSet:
        said = [
            {
                "id": f"r{number}",
                "image": ["square.png"] * count,
                "conversations": [
                    {"from": "human", "value": "<image>" * count + "What?"},
                    {"from": "gpt", "value": "x"},
                ],
            }
            for number, count in enumerate(counts)
        ]
        file = str(write_json(tmp_path / "chat.json", said))
        source = SourceConfig(format="chat", file=file, images=str(pictures))
        return TrainingSet(open_table(source, tmp_path / "tables", on_bad_data=on_bad_data), str(pictures), 2)

    return make


@pytest.fixture
def model(tiny_vlm):
    return VLM(VLMModelConfig(path=str(tiny_vlm("llava")), max_length=40))


def lengths(tokens, image_tokens, lost=(), limit=100, **rest) -> RowLengths:
    lost = np.isin(np.arange(len(tokens)), lost)
    source = {"limit_from": "model.max_length", "source": "by hand", **rest}
    return RowLengths(np.arange(len(tokens)), np.array(tokens), np.array(image_tokens), lost, limit, **source)


def test_rows_are_evenly_spaced():
    assert evenly_spaced(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert evenly_spaced(101, 3).tolist() == [0, 50, 100]
    assert evenly_spaced(0, 3).tolist() == []
    assert len(evenly_spaced(600_000, 2000)) == 2000


def test_the_table_of_lengths():
    found = lengths([10, 20, 30, 120, 150, 300], [4, 4, 8, 90, 90, 200], lost=[4])
    assert length_table("chat", found, 5).splitlines() == [
        "lengths of chat in tokens, all 5 rows  min  50 %  90 %  99 %  max",
        "whole rows                              10    30   150   150  150",
        "of these for images (59.4 %)             4     8    90    90   90",
        "counted: by hand",
        "2 rows of 5 (40.0 %) are longer than 100 tokens (model.max_length) and cut at the end, and 1 row loses its "
        "whole answer: nothing is learned from it",
    ]
    assert "images" not in length_table("vqa", lengths([7, 8], [0, 0]), 2)
    assert length_table("vqa", lengths([7, 8], [0, 0]), 9).startswith("lengths of vqa in tokens, 2 of 9 rows")
    assert length_table("vqa", lengths([], []), 0) == "lengths of vqa in tokens, all 0 rows"


def test_a_line_for_the_log(rows):
    table = rows([1, 1, 1]).table
    assert length_line("chat", table, None) == "chat: 3 rows"
    assert length_line("chat", table, lengths([10, 20, 120], [4, 4, 4])) == (
        "chat: 3 rows; tokens: 50 % 20, 99 % 120, at most 120, 8 % for images; 1 row of 3 (33.3 %) is longer than 100 "
        "tokens (model.max_length) and cut at the end"
    )
    assert "tokens of 2 of them: 50 %" in length_line("chat", table, lengths([10, 20], [4, 4]))


def test_a_row_whose_images_alone_are_too_long_stops(model, rows):
    with pytest.raises(ValueError, match=r"chat\.json, id r2: has images that leave no room for text in 40 tokens"):
        survey_all(model, {"chat": rows([1, 0, 10, 2])})
    with pytest.raises(ValueError, match="every row has images that leave no room"):
        survey_all(model, {"chat": rows([10, 11], "skip")})


def test_or_is_left_out_and_counted(model, rows):
    sets, text = survey_all(model, {"chat": rows([1, 0, 10, 2], "skip")})
    assert [row.id for row in sets["chat"].table] == ["r0", "r1", "r3"]
    assert text.startswith("chat: 3 rows (1 skipped); tokens: 50 %")


def test_rows_outside_the_sample_are_only_looked_at_where_they_are_skipped(model, rows):
    counts = [1, 10, 1, 1, 12, 1]
    sets, text = survey_all(model, {"chat": rows(counts, "skip")}, sample=2)
    assert [row.id for row in sets["chat"].table] == ["r0", "r2", "r3", "r5"]
    assert "tokens of 2 of them" in text
    sets, _ = survey_all(model, {"chat": rows(counts, "stop")}, sample=2)
    assert len(sets["chat"].table) == 6
    assert survey(model, "chat", rows(counts, "stop")).bad.keys() == {1, 4}


def test_long_texts_are_counted_but_kept(tiny_vlm, rows):
    short = VLM(VLMModelConfig(path=str(tiny_vlm("llava")), max_length=18))
    sets, text = survey_all(short, {"chat": rows([1, 1, 2])})
    assert len(sets["chat"].table) == 3
    assert "1 row of 3 (33.3 %) is longer than 18 tokens (model.max_length) and cut at the end" in text
