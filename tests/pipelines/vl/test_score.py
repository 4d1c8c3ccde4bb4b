"""dora-mm score: predictions of any program, by the rule of a suite."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dora_mm.cli import main
from dora_mm.data.vl.answers import ModelAnswer
from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.metrics import score
from dora_mm.eval.vl.predictions.reading import read_predictions
from dora_mm.eval.vl.predictions.scored import About, write_scored
from dora_mm.utils.run_directory import MODEL
from tests.shared.data import vl_files as files
from tests.shared.data.vlm_rows import save_noise, write_images

DOCUMENTS = [
    {
        "questionId": number,
        "question": f"{number}?",
        "image": f"{number // 2}.png",
        "docId": number // 4,
        "answers": [word],
    }
    | {"question_types": ["form"] if number % 2 else ["table", "figure"]}
    for number, word in enumerate(("1/8/93", "John Smith", "12 %", "first\nline", "2010", "москва", "a | b", "=1"))
]
ANSWERS = [row["answers"][0] for row in DOCUMENTS]
WRONG = ["1/8/93", "Jon Smith", "nothing", "first line", "2010", "Москва", "x", "=1"]


@pytest.fixture
def data(tmp_path):
    return str(files.write_json(tmp_path / "val.json", {"dataset_name": "d", "data": DOCUMENTS}))


def lines(path, answers, key="questionId", name="answer"):
    return str(files.write_lines(path, [{key: number, name: text} for number, text in enumerate(answers)]))


def records(rows):
    return [(example, ModelAnswer(text)) for example, text in rows]


def run(capsys, *arguments: str, code: int = 0) -> str:
    assert main(["score", *map(str, arguments)]) == code
    found = capsys.readouterr()
    return found.err if code else found.out


def test_what_the_answers_of_two_files_were_made_with_is_compared_by_name(tmp_path, capsys):
    rows = [(Example(str(n), (), "what?", (word,)), word) for n, word in enumerate(("a", "b", "c"))]
    found = score("docvqa", rows)
    inputs = {"base_digest": "w", MODEL: {"chat_template.jinja": "a", "config.json": "b"}}
    other = {**inputs, MODEL: {**inputs[MODEL], "chat_template.jinja": "z"}, "the adapter": "e"}
    both = [tmp_path / "one.jsonl", tmp_path / "other.jsonl"]
    for file, digests in zip(both, (inputs, other), strict=True):
        write_scored(file, records(rows), found, About("docvqa", digests=digests))
    for one, another in (both, both[::-1]):
        same = f"Not the same in {one} and {another}"
        assert f"{same}: chat_template.jinja of the model, the adapter." in run(capsys, one, another)
    assert "Not the same" not in run(capsys, both[0], both[0])


def metric(text: str, name: str = "ANLS") -> float:
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return float(row.split("|")[2])


def batch(path, answers):
    """The output of a batch of OpenAI's, as vLLM's run-batch writes it."""
    rows = [
        {
            "id": f"vllm-{number}",
            "custom_id": str(number),
            "response": {
                "status_code": 200,
                "body": {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]},
            },
            "error": None,
        }
        for number, text in enumerate(answers)
    ]
    return str(files.write_lines(path, rows))


def samples(path, answers):
    """What lmms-eval logs with --log_samples: numbers of rows, and targets as text."""
    rows = [
        {"doc_id": number, "target": str([ANSWERS[number]]), "filtered_resps": [text], "input": f"{number}?", "anls": 1}
        for number, text in enumerate(answers)
    ]
    return str(files.write_lines(path, rows))


def table(path, answers):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["index", "question", "answer", "split", "prediction"])
    for number, text in enumerate(answers):
        book.active.append([number, f"{number}?", ANSWERS[number], "val", text])
        for cell in book.active[number + 2]:
            cell.data_type = "s" if isinstance(cell.value, str) else cell.data_type
    book.save(path)
    return str(path)


def csv_file(path, answers):
    rows = "".join(f'{number},"{text}"\n' for number, text in enumerate(answers))
    return str(files.write_text(path, f"question_id,response\n{rows}"))


MAKERS = {"jsonl": lines, "csv": csv_file, "batch.jsonl": batch, "samples.jsonl": samples, "xlsx": table}


@pytest.mark.parametrize("suffix", MAKERS)
def test_predictions_of_any_program_have_the_same_score(data, tmp_path, capsys, suffix):
    path = MAKERS[suffix](tmp_path / f"said.{suffix}", WRONG)
    text = run(capsys, path, "--suite", "docvqa", "--data", data)
    rows = [
        (Example(str(number), (), "", (answer,), (1.0,)), said)
        for number, (answer, said) in enumerate(zip(ANSWERS, WRONG, strict=True))
    ]
    assert metric(text) == round(score("docvqa", rows).metrics["ANLS"], 2)
    assert "n = 8 in 2 groups" in text
    assert "script of rrc.cvc.uab.es" in text


@pytest.mark.parametrize("suffix", ["samples.jsonl", "xlsx"])
def test_files_with_references_need_no_data(data, tmp_path, capsys, suffix):
    path = MAKERS[suffix](tmp_path / f"said.{suffix}", WRONG)
    with_data = run(capsys, path, "--suite", "docvqa", "--data", data)
    assert metric(run(capsys, path, "--suite", "docvqa")) == metric(with_data)


def test_two_files_are_compared_by_rows_and_kinds(data, tmp_path, capsys):
    paths = [lines(tmp_path / "before.jsonl", WRONG), lines(tmp_path / "after.jsonl", ANSWERS)]
    text = run(capsys, *paths, "--suite", "docvqa", "--data", data)
    _, _, compared = text.partition("## compared")
    assert "n = 8; 3 rows better, 0 worse" in compared
    assert "| figure | " in compared
    assert "| 2 | nothing | 12 % | 0 to 1 |" in compared
    assert "x | a \\| b" in compared


def test_single_questions_are_compared_by_an_exact_test(tmp_path, capsys):
    rows = [{"question_id": n, "image": f"{n}.jpg", "text": "Is there?", "label": "yes"} for n in range(8)]
    data = str(files.write_lines(tmp_path / "coco_pope_random.json", rows))
    paths = [lines(tmp_path / f"{name}.jsonl", [name] * 8, key="question_id") for name in ("no", "yes")]
    text = run(capsys, *paths, "--suite", "pope", "--data", data)
    assert "100.0 points, p = 0.0078 (McNemar's exact test), n = 8; 8 rows better, 0 worse; no 95 % interval" in text
    assert "F1" in text


def test_a_wished_precision_names_a_number_of_answers(data, tmp_path, capsys):
    path = lines(tmp_path / "said.jsonl", WRONG)
    text = run(capsys, path, "--suite", "docvqa", "--data", data, "--precision", "5")
    assert "an interval of +- 5 points takes about" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-2], "lacks 2 rows of the data (6, 7): --partial scores"),
        (lambda rows: [*rows, {"questionId": 99, "answer": "x"}], "the data lacks 1 row of"),
        (lambda rows: [*rows, rows[0]], "1 rows cannot be scored: 1 x has an id that an earlier row has (line 9)"),
        (lambda rows: [{"questionId": 0}, *rows[1:]], "1 x has no answer, under none of prediction"),
        (lambda rows: [{"answer": "x"}, *rows[1:]], "1 x has no id, under none of id"),
        (lambda rows: [rows[0] | {"answer": [1, 2]}, *rows[1:]], "has an answer that is not a text (line 1)"),
        (lambda rows: [{"questionId": n + 100, "answer": "x"} for n in range(8)], "have no row in common"),
    ],
)
def test_what_would_make_a_score_wrong_is_counted_and_named(data, tmp_path, capsys, change, message):
    rows = [{"questionId": number, "answer": text} for number, text in enumerate(WRONG)]
    path = files.write_lines(tmp_path / "said.jsonl", change(rows))
    error = run(capsys, path, "--suite", "docvqa", "--data", data, code=2)
    assert message in error
    assert error.count("\n") == 1


def test_a_part_of_the_rows_is_scored_where_that_is_said(data, tmp_path, capsys, caplog):
    path = lines(tmp_path / "said.jsonl", ANSWERS[:6])
    assert metric(run(capsys, path, "--suite", "docvqa", "--data", data, "--partial")) == 100
    assert "lacks 2 rows of the data (6, 7): left out" in caplog.text


def test_questions_without_their_annotations_name_the_option(tmp_path, capsys):
    vqa = Path("samples/vl/vqa")
    questions = vqa / "v2_OpenEnded_mscoco_val2014_questions.json"
    first, *_ = json.loads(questions.read_text())["questions"]
    path = files.write_lines(tmp_path / "said.jsonl", [{"question_id": first["question_id"], "answer": "yes"}])
    arguments = (path, "--suite", "vqa", "--data", questions, "--partial")
    assert "has no answers: give the file that has them, --annotations FILE" in run(capsys, *arguments, code=2)
    annotated = run(capsys, *arguments, "--annotations", vqa / "v2_mscoco_val2014_annotations.json.gz")
    assert "vqa" in annotated


def test_the_help_lists_every_suite_and_task(capsys):
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    listed = capsys.readouterr().out.partition("suites:")[2]
    for name in ("docvqa", "vqa", "gqa", "nlvr2", "caption"):
        assert re.search(rf"^  {name} ", listed, re.MULTILINE)


def test_samples_of_another_order_are_refused(data, tmp_path, capsys):
    rows = [{"doc_id": 7 - n, "target": ANSWERS[n], "filtered_resps": ANSWERS[n]} for n in range(8)]
    path = files.write_lines(tmp_path / "samples.jsonl", rows)
    error = run(capsys, path, "--suite", "docvqa", "--data", data, code=2)
    assert "8 of 8 rows have another target than the row of this number" in error


def test_samples_without_options_are_no_answers_to_choices(tmp_path, capsys):
    path = files.write_lines(tmp_path / "s.jsonl", [{"doc_id": 0, "target": "A", "filtered_resps": "A"}])
    error = run(capsys, path, "--suite", "ai2d", code=2)
    assert "has no options and kinds, which ai2d needs: name the data with --data" in error


def test_the_text_of_a_question_is_not_taken_for_its_answer(data, tmp_path, capsys):
    rows = [{"question_id": n, "text": "Where?", "answer": answer} for n, answer in enumerate(ANSWERS)]
    path = files.write_lines(tmp_path / "said.jsonl", rows)
    assert metric(run(capsys, path, "--suite", "docvqa", "--data", data)) == 100


def test_an_error_of_a_server_is_no_answer(data, tmp_path, capsys):
    path = batch(tmp_path / "out.jsonl", WRONG)
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    rows[3]["response"] = {"status_code": 500, "body": {}}
    error = run(capsys, files.write_lines(tmp_path / "out.jsonl", rows), "--suite", "docvqa", "--data", data, code=2)
    assert "1 x has no answer of the server, but an error (line 4)" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "does not say what it answers: name the suite with --suite"),
        (["--suite", "docvqq"], "--suite: must be"),
        (["--suite", "docvqa"], "8 rows of 8 have no references (line 1, line 2, line 3, line 4, line 5, ...)"),
        (["--suite", "docvqa", "--split", "val"], "--split is of the data file"),
        (["--suite", "docvqa", "--to", "lmms-eval"], "--to and --out belong together"),
    ],
)
def test_what_is_missing_in_a_command_is_said(tmp_path, capsys, arguments, message):
    path = lines(tmp_path / "said.jsonl", WRONG)
    assert message in run(capsys, path, *arguments, code=2)


@pytest.mark.parametrize(("tool", "name"), [("vlmevalkit", "said.xlsx"), ("lmms-eval", "said.jsonl")])
def test_files_for_other_tools_are_read_back_with_the_same_score(data, tmp_path, capsys, tool, name):
    path = lines(tmp_path / "answers.jsonl", WRONG)
    whole = run(capsys, path, "--suite", "docvqa", "--data", data)
    out = tmp_path / "out" / name
    run(capsys, path, "--suite", "docvqa", "--data", data, "--to", tool, "--out", out)
    assert metric(run(capsys, out, "--suite", "docvqa")) == metric(whole)
    assert "exists: name a new file" in run(
        capsys, path, "--suite", "docvqa", "--data", data, "--to", tool, "--out", out, code=2
    )
    assert [row.answer.text for row in read_predictions(str(out)).rows] == WRONG


def test_options_have_columns_in_a_table_for_vlmevalkit(tmp_path, capsys):
    rows = ["index\timage_path\tquestion\tA\tB\tanswer\tcategory", "7\ta.jpg\tWhat?\ta cat\ta dog\tB\tanimals"]
    data = files.write_text(tmp_path / "mine.tsv", "\n".join(rows) + "\n")
    path = files.write_lines(tmp_path / "said.jsonl", [{"index": 7, "prediction": "B"}])
    out = tmp_path / "out.xlsx"
    run(capsys, path, "--suite", "ai2d", "--data", data, "--to", "vlmevalkit", "--out", out)
    (row,) = read_predictions(str(out)).rows
    assert row.example is not None
    assert (row.example.options, row.example.text) == (("a cat", "a dog"), "What?\nA. a cat\nB. a dog")
    assert metric(run(capsys, out, "--suite", "ai2d"), "accuracy") == 100


@pytest.mark.parametrize(("kind", "scale"), [("qwen2_5_vl", None), ("qwen2_vl", 1000)])
def test_boxes_are_read_as_the_class_of_a_model_writes_them(tmp_path, capsys, tiny_vlm, kind, scale):
    """Of Qwen2.5-VL in pixels of the image that its processor makes, by its own function."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    from tests.shared.data.video_rows import opened

    sizes = [(640, 428), (100, 300)]
    rows = [
        {"image": "a.jpg", "sent": "it", "bbox": [10.0, 40.0, 60.0, 250.0], "width": width, "height": height}
        for width, height in sizes
    ]
    data = files.write_lines(tmp_path / "refcoco_val.jsonl", rows)
    resizer = opened(tiny_vlm(kind)).rows.processor.image_processor
    limits = {"min_pixels": resizer.size["shortest_edge"], "max_pixels": resizer.size["longest_edge"]}
    said = []
    for width, height in sizes:
        side = resizer.patch_size * resizer.merge_size
        rows_columns = (scale, scale) if scale else smart_resize(height, width, side, **limits)
        x, y = rows_columns[1] / width, rows_columns[0] / height
        said.append(f'[{{"bbox_2d": [{10 * x:.1f}, {40 * y:.1f}, {60 * x:.1f}, {250 * y:.1f}]}}]')
    answers = lines(tmp_path / "answers.jsonl", said, key="id", name="prediction")
    given = [answers, "--suite", "refcoco", "--data", data]
    assert metric(run(capsys, *given, "--boxes", tiny_vlm(kind)), "accuracy") == 100
    text = run(capsys, *given)
    assert metric(text, "accuracy") < 100
    assert "2 of 2 answers are read as pixels of the original image" in text
    documents = [lines(tmp_path / "a.jsonl", ["x"], key="id"), "--suite", "docvqa", "--data"]
    one = files.write_json(tmp_path / "one.json", {"dataset_name": "d", "data": [DOCUMENTS[0] | {"questionId": 0}]})
    assert "no row of docvqa has boxes" in run(capsys, *documents, one, "--boxes", tiny_vlm(kind), code=2)


def test_our_own_files_say_all_that_a_table_needs(tmp_path, capsys):
    """Ten answers, boxes and groups, too."""
    rows = [
        (Example("1", ("a.jpg",), "What?", ("x",), (1.0,), ("x",) * 7 + ("y",) * 3, ("k",), group="g"), "Y"),
        (Example("2", ("b.jpg",), "What?", ("x",), (1.0,), ("x",) * 10), "x"),
    ]
    scores = score("textvqa", rows)
    about = About("textvqa", settings={"decode": {"beams": 1}}, digests={"the data": "abc"})
    write_scored(tmp_path / "scored.jsonl", records(rows), scores, about, "{text} Short.")
    text = run(capsys, tmp_path / "scored.jsonl")
    assert metric(text, "accuracy") == 95
    assert "- the data: abc" in text
    found = read_predictions(str(tmp_path / "scored.jsonl"))
    assert [row.example for row in found.rows] == [example for example, _ in rows]
    assert found.about is not None
    assert dict(found.about.rules) == dict(scores.rules)
    first = json.loads((tmp_path / "scored.jsonl").read_text().splitlines()[1])
    assert (first["prompt"], first["score"]) == ("What? Short.", 0.9)


def test_files_of_another_version_are_refused(tmp_path, capsys):
    path = files.write_lines(tmp_path / "scored.jsonl", [{"dora_mm": "predictions 9", "task": "vqa"}, {"id": "1"}])
    assert "is of another version (predictions 9): this one reads predictions 1" in run(capsys, path, code=2)


@pytest.mark.slow
def test_an_evaluation_of_a_suite_is_scored_again_from_its_rows(tiny_vlm, tmp_path, capsys):
    images = write_images(tmp_path)
    rows = [row | {"image": name} for row, name in zip(DOCUMENTS, ["wide.png", "tall.png"] * 4, strict=True)]
    config = {
        "pipeline": "eval_vl",
        "model": {"path": str(tiny_vlm("llava"))},
        "data": {
            "task": "docvqa",
            "valid": {
                "format": "docvqa",
                "file": str(files.write_json(tmp_path / "val.json", {"data": rows})),
                "images": str(images),
            },
            "tables": str(tmp_path / "tables"),
        },
        "decode": {"max_new_tokens": 2},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["eval", str(path)]) == 0
    printed = capsys.readouterr().out
    again = run(capsys, tmp_path / "run" / "scored_docvqa.jsonl")
    assert [line for line in again.splitlines() if line.startswith("|")] == [
        line for line in printed.splitlines() if line.startswith("|")
    ]
    assert "no 95 % interval, which takes 20 independent answers; n = 8 in 2 groups" in printed
    assert "- the data of docvqa: " in again
    assert main(["eval", str(path)]) == 0  # goes on, and says the same
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_ten_thousand_predictions_are_scored_within_seconds(tmp_path, capsys):
    import time

    rows = [DOCUMENTS[number % 8] | {"questionId": number} for number in range(10_000)]
    data = files.write_json(tmp_path / "val.json", {"data": rows})
    path = lines(tmp_path / "said.jsonl", [f"{WRONG[number % 8]} {number}" for number in range(10_000)])
    started = time.process_time()
    run(capsys, path, "--suite", "docvqa", "--data", data)
    assert time.process_time() - started < 20


def test_a_page_shows_all_rows_with_their_images_and_changes(data, tmp_path, capsys):
    images = tmp_path / "pictures"
    images.mkdir()
    for number in range(4):
        save_noise(images / f"{number}.png", number, 600, 400)
    paths = [lines(tmp_path / "before.jsonl", WRONG), lines(tmp_path / "after.jsonl", ANSWERS)]
    page = tmp_path / "page.html"
    arguments = [*paths, "--suite", "docvqa", "--data", data, "--page", page, "--images", images]
    assert f"page     {page}" in run(capsys, *arguments)
    text = page.read_text(encoding="utf-8")
    assert text.count('<article id="s0-') == 8
    assert len(list((tmp_path / "page_images").iterdir())) == 4
    assert 'src="page_images/00000_0.webp"' in text
    assert "better 3" in text
    assert "exists: name a new file" in run(capsys, *arguments, code=2)


@pytest.mark.parametrize("shape", ["absolute", "up", "link"])
def test_a_page_shows_no_image_that_was_not_given(tmp_path, capsys, shape):
    """Predictions that somebody else wrote name a picture beside the folder, or put a link to it there."""
    save_noise(private := tmp_path / "private.png", 0, 60, 40)
    (folder := tmp_path / "given").mkdir()
    (folder / "link.png").symlink_to(private)
    name = {"absolute": str(private), "up": "../private.png", "link": "link.png"}[shape]
    document = DOCUMENTS[0] | {"image": name}
    data = files.write_json(tmp_path / "val.json", {"data": [document]})
    path = lines(tmp_path / "said.jsonl", WRONG[:1])
    command = [path, "--suite", "docvqa", "--data", data, "--page", tmp_path / "page.html"]
    message = {"absolute": "is an absolute path", "up": "are not in", "link": "or give --follow-links"}[shape]
    assert message in run(capsys, *command, "--images", folder, code=2)
    assert not (tmp_path / "page_images").exists()
    if shape == "link":
        run(capsys, *command, "--images", folder, "--follow-links")
        assert len(list((tmp_path / "page_images").iterdir())) == 1
    else:
        run(capsys, *command)
        assert not (tmp_path / "page_images").exists()


def test_images_that_are_missing_are_counted_and_named(data, tmp_path, capsys):
    path = lines(tmp_path / "said.jsonl", WRONG)
    page = ["--page", tmp_path / "page.html", "--images", tmp_path]
    error = run(capsys, path, "--suite", "docvqa", "--data", data, *page, code=2)
    assert "4 of 4 images are not in" in error
    assert not (tmp_path / "page.html").exists()
