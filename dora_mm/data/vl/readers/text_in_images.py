"""Questions about text in images: DocVQA and InfographicVQA, ST-VQA, TextVQA and OCRBench, in their own files."""

from collections.abc import Iterator
from typing import NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from dora_mm.config.schema import Text
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import list_items, numbered
from dora_mm.data.vl.readers.vqa_answers import NUM_ANSWERS, soft_scores
from dora_mm.data.vl.rows import BadRows, Id, RowError, good_rows


class _Document(TypedDict):
    questionId: Id
    question: Text
    answers: NotRequired[list[str]]
    image: NotRequired[Text]  # of DocVQA
    image_local_name: NotRequired[Text]  # of InfographicVQA
    docId: NotRequired[Id]
    question_types: NotRequired[list[str] | None]
    answer_type: NotRequired[list[str] | None]


class _Scene(TypedDict):
    question_id: Id
    question: Text
    answers: NotRequired[list[str]]
    file_path: Text
    dataset: NotRequired[Text]


class _Photograph(TypedDict):
    question_id: Id
    question: Text
    image_id: Text
    answers: NotRequired[list[str]]


class _Recognition(TypedDict):
    id: NotRequired[Id]
    dataset_name: Text
    type: Text
    question: Text
    answers: str | list[str]
    image_path: Text


DOCUMENT, SCENE, PHOTOGRAPH = TypeAdapter(_Document), TypeAdapter(_Scene), TypeAdapter(_Photograph)
RECOGNITION = TypeAdapter(_Recognition)


def read_docvqa(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of `{split}_v1.0.json` of DocVQA, or of `infographicsVQA_{split}_v1.0.json`.

    Pages of a document are one group.

    Raises:
        ValueError: The file is damaged, or a row is bad and `bad` is set to "stop".
    """
    path = source.path

    def example(row: _Document) -> Example:
        image = row.get("image") or row.get("image_local_name")
        if image is None:
            raise RowError("has neither image nor image_local_name")
        kinds = row.get("question_types") or row.get("answer_type") or ()
        document = f"document {row['docId']}" if "docId" in row else ""
        return _question(row["questionId"], image, row["question"], row.get("answers"), tuple(kinds), document)

    return good_rows(path, list_items(path, "data"), DOCUMENT, example, bad)


def _question(
    key: int | str, image: str, text: str, answers: list[str] | None, kinds: tuple[str, ...] = (), group: str = ""
) -> Example:
    known = tuple(answers or ())
    return Example(str(key), (image,), text, known, (1.0,) * len(known), kinds=kinds, group=group)


def read_stvqa(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of ST-VQA's `train_task_{1,2,3}.json` or `test_task_{1,2,3}.json`.

    Raises:
        ValueError: The file is damaged, or a row is bad and `bad` is set to "stop".
    """
    path = source.path

    def example(row: _Scene) -> Example:
        kinds = (row["dataset"],) if "dataset" in row else ()
        return _question(row["question_id"], row["file_path"], row["question"], row.get("answers"), kinds)

    return good_rows(path, list_items(path, "data"), SCENE, example, bad)


def read_textvqa(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of `TextVQA_0.5.1_{train,val,test}.json`. Answers are learned as those of VQA v2 are.

    Raises:
        ValueError: The file is damaged, or a row is bad and `bad` is set to "stop".
    """
    path = source.path

    def example(row: _Photograph) -> Example:
        given = tuple(row.get("answers") or ())
        if given and len(given) != NUM_ANSWERS:
            raise RowError("must have exactly ten answers")
        known = soft_scores(given)
        image = f"{row['image_id']}.jpg"
        return Example(str(row["question_id"]), (image,), row["question"], tuple(known), tuple(known.values()), given)

    return good_rows(path, list_items(path, "data"), PHOTOGRAPH, example, bad)


def read_ocrbench(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of `OCRBench.json`. Where rows have no id, it is their number, from 0.

    Raises:
        ValueError: The file is damaged, or a row is bad and `bad` is set to "stop".
    """
    path = source.path

    def example(row: _Recognition) -> Example:
        answers = [row["answers"]] if isinstance(row["answers"], str) else row["answers"]
        kinds = (row["type"], row["dataset_name"])
        return _question(row.get("id", ""), row["image_path"], row["question"], answers, kinds)

    return good_rows(path, numbered(list_items(path), "id"), RECOGNITION, example, bad)
