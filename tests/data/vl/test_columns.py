"""Columns of data files: none with a text or an image is left out in silence, and unknown names are refused."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from dora_mm.config.vl import DecodeConfig
from dora_mm.config.vl_data import SourceConfig, VLDataConfig
from dora_mm.data.vl.readers.unread import unread_columns
from dora_mm.data.vl.splits import AllRows, open_training, open_validation
from dora_mm.data.vl.tables import open_table
from tests.shared.data.chats import as_json, as_lines, as_parquet, image, llava, only, packed, refusal, said

M3IT = {  # MMInstruction/M3IT (huggingface.co): the columns of its JSON lines
    "instruction": "Answer it.",
    "inputs": "What is on the street?",
    "image_base64_str": [packed(image())],
    "outputs": "A bus.",
}
SUGGESTED = {"query": "instruction", "response": "outputs", "image": "image_base64_str"}
ALL = {"instruction": "instruction", "input": "inputs", "output": "outputs", "image": "image_base64_str"}


def data(folder: Path, source: SourceConfig, **splits) -> VLDataConfig:
    return VLDataConfig.model_validate({"train": source.model_dump(), "tables": str(folder / "tables"), **splits})


@pytest.mark.parametrize("write", [as_lines, as_parquet])
def test_a_question_in_a_column_that_is_not_read_is_named(tmp_path, write, caplog):
    source = write(tmp_path, [M3IT] * 3, columns=SUGGESTED)
    assert only(write(tmp_path, [M3IT], columns=SUGGESTED)).text == "Answer it."
    open_training(data(tmp_path, source), 1, AllRows())
    assert "these columns are not read: inputs ('What is on the street?')" in caplog.text
    assert "columns: {instruction: A, input: B, output: C} for a question in two columns" in caplog.text
    caplog.clear()
    open_training(data(tmp_path, source), 1, AllRows())  # from the table on disk
    assert "inputs ('What is on the street?')" in caplog.text
    row = only(write(tmp_path, [M3IT], columns=ALL))
    assert (row.text, row.answers) == ("Answer it.\nWhat is on the street?", ("A bus.",))
    assert unread_columns(write(tmp_path, [M3IT], columns=ALL)) == {}


def test_rows_whose_answer_is_in_another_column_are_no_test_split(tmp_path):
    source = as_lines(tmp_path, [M3IT])
    with pytest.raises(
        ValueError, match="no answers to learn; these columns are not read: inputs .*, outputs"
    ) as found:
        open_training(data(tmp_path, source), 1, AllRows())
    assert "test split" not in str(found.value)
    assert "columns: {input: inputs, image: image_base64_str, output: outputs}" in str(found.value)
    splits = data(tmp_path, source, valid=source.model_dump(), train=None)
    with pytest.raises(ValueError, match="to compare with; these columns are not read: inputs"):
        open_validation(splits, DecodeConfig(), AllRows(), answered=True)


def test_rows_with_questions_and_no_other_text_are_a_test_split(tmp_path):
    source = as_lines(tmp_path, [{"id": "1", "query": "What is it?", "response": None, "level": 3, "note": " "}])
    with pytest.raises(ValueError, match="no answers to learn: it is a test split"):
        open_training(data(tmp_path, source), 1, AllRows())


def test_every_column_with_a_text_or_an_image_counts(tmp_path):
    row = llava("Q", "A", source="coco", views=[{"bytes": image(), "path": None}], score=0.5, empty=[None, ""])
    row |= {"messages": [{"role": "user", "content": "Q"}], "note": "a" * 50}
    found = unread_columns(as_parquet(tmp_path, [row]))
    assert found == {"source": "coco", "views": "", "messages": "", "note": f"{'a' * 37}..."}


def test_a_column_may_be_left_out_by_its_name(tmp_path):
    rows = [{"query": "Q", "response": "A", "system": "Be short."}]
    source = as_lines(tmp_path, rows, columns={"system": "none"})
    assert len(only(source).turns) == 2
    assert unread_columns(source) == {}


def test_a_column_whose_name_another_takes_is_named(tmp_path):
    rows = [{"query": "Q", "caption_en": "Q2", "response": "A"}]
    assert unread_columns(as_lines(tmp_path, rows, columns={"query": "caption_en"})) == {"query": "Q"}


def test_an_archive_has_its_texts_once(tmp_path):
    with tarfile.open(tmp_path / "rows.tar", "w") as archive:
        row = json.dumps({"conversations": said("Q", "A"), "topic": "buses"}).encode()
        for name, content in (("1.png", image()), ("1.json", row)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert unread_columns(SourceConfig(format="chat", file=str(tmp_path / "rows.tar"))) == {"topic": "buses"}


def test_columns_of_pairs_and_of_captions(tmp_path):
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B", "reason": "it is"}
    file = as_lines(tmp_path, [pair]).file
    assert unread_columns(SourceConfig(format="preferences", file=file)) == {"reason": "it is"}
    file = as_lines(tmp_path, [{"image": "a.png", "text": "A bus.", "caption": "A tram."}]).file
    assert unread_columns(SourceConfig(format="captions", file=file)) == {"caption": "A tram."}


def test_columns_of_tables_of_questions(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("index\tquestion\tanswer\tcategory\trationale\tempty\n1\tQ\tA\tC\tIt is so.\t\n")
    assert unread_columns(SourceConfig(format="answers", file=str(path))) == {"rationale": "It is so."}


@pytest.mark.parametrize("write", [as_json, as_lines, as_parquet])
def test_an_unknown_column_is_refused_with_those_that_are_there(tmp_path, write):
    rows = [{"question": "Q", "answer": "A"}, {"question": "Q", "answer": "A", "before": [["Q", "A"]]}]
    reason = " has no column for columns: {response: answers}: it has question, answer"
    assert refusal(write(tmp_path, rows, columns={"query": "question", "response": "answers"})).startswith(reason)
    if write is as_parquet:  # written here with the columns of its first row
        return
    named = {"query": "question", "response": "answer", "history": "before"}  # in the second row alone
    table = open_table(write(tmp_path, rows, columns=named), tmp_path / "tables", on_bad_data="stop")
    assert [len(row.turns) for row in table] == [2, 4]
