"""The rows of a campaign: what is read is what was written, whoever else writes; other files are refused."""

import json

import pytest

from dora_mm.studies.campaigns.training_rows import FAILED, TrainingRows, as_cells, row_of
from dora_mm.studies.campaigns.trainings import Training
from dora_mm.studies.variants import FULL, Variant

ONE = Training(Variant("dora", 4, "b4"), 1.2345678e-3, 0)
TWO, THREE = Training(FULL, 1e-3, 1), Training(Variant("lora", 16), 0.5, 0)
PROCESSOR = "AMD EPYC, family 26, model 2, AVX512"
VERSIONS = {"processor": PROCESSOR, "threads": 2, "python": "3.12", "torch": "2.13.0", "numpy": "2.4", "peft": None}
SUMMARY = {"parameters": 12, "seconds": 1.5, "loss": 3.0}


def rows(file, digest="abc"):
    return TrainingRows(file, lambda training: digest)


def test_rows_survive_their_file(tmp_path):
    file = tmp_path / "folder" / "rows.csv"
    mine, others = rows(file), rows(file)
    mine.add([row_of(ONE, value=0.5, scores='{"a": [1, 2]}', summary=SUMMARY, circumstances=[VERSIONS], digest="abc")])
    others.add([row_of(TWO, value=None, scores="", summary={}, circumstances=[], digest="abc")])
    mine.add([row_of(THREE, value=FAILED, scores="", summary={}, circumstances=[], digest="abc")])
    found = rows(file)
    one, two, three = (found.get(training) for training in (ONE, TWO, THREE))
    assert one is not None
    assert two is not None
    assert three is not None
    assert [row.training for row in (one, two, three)] == [ONE, TWO, THREE]
    assert (one.number, one.scores, one.summary) == (0.5, '{"a": [1, 2]}', {"parameters": 12, "seconds": 1.5})
    assert (one.processor, one.threads) == (PROCESSOR, "2")
    assert one.software == "python 3.12, torch 2.13.0, numpy 2.4, peft none"
    assert one.circumstances == as_cells([VERSIONS])
    assert two.processor == two.threads == two.software == ""
    assert (two.value, two.has_diverged) == ("", False)
    assert (three.number, three.has_diverged) == (0.0, True)
    assert found.rates(ONE.variant) == [ONE.rate]
    assert found.rates(ONE.variant.default) == []
    assert found.get(Training(FULL, 1e-3, 2)) is None


def test_scores_take_a_fraction_of_their_length(tmp_path):
    file, scores = tmp_path / "rows.csv", json.dumps([{"question": i, "score": i / 7} for i in range(300)])
    rows(file).add([row_of(ONE, value=0.5, scores=scores, summary=SUMMARY, circumstances=[VERSIONS], digest="abc")])
    assert len(file.read_text()) < len(scores) / 2
    found = rows(file).get(ONE)
    assert found is not None
    assert found.scores == scores


def test_other_files_and_rows_are_refused(tmp_path):
    file = tmp_path / "rows.csv"
    rows(file).add([row_of(ONE, value=0.5, scores="", summary=SUMMARY, circumstances=[VERSIONS], digest="abc")])
    with pytest.raises(ValueError, match=r"dora-r4-b4-lr0.00123457-seed0 of another config, other data"):
        rows(file, "other").get(ONE)
    whole = file.read_text()
    unpacked = whole.replace("abc,", 'abc,"{""a"": 1}"')
    wrong = (whole.replace("seed,", "sead,"), whole.replace("0.0012345678", "fast"), whole + '"open', "\0", unpacked)
    for text in (*wrong, whole.replace("abc,", "abc,00000")):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"rows.csv cannot be read as trainings of a comparison"):
            rows(file)
