"""Scores of the made-up answers by the official scripts, which official_scores.json keeps.

`python -m tests.eval.vl.official_scores FOLDER` runs the scripts, unchanged and fetched by you, and writes the file:

    anls.py          eval_mm/infographicsvqa_eval.py of QwenLM/Qwen-VL: that of rrc.cvc.uab.es
    m4c.py           mmf/utils/m4c_evaluators.py of facebookresearch/mmf
    pix2struct.py    pix2struct/metrics.py of google-research/pix2struct
    mmmu.py, pro.py  mmmu/utils/eval_utils.py, mmmu-pro/evaluate.py of MMMU-Benchmark/MMMU
    aokvqa.py        evaluation/eval_predictions.py of allenai/aokvqa
    pope.py          evaluate.py of AoiDragon/POPE
    ocrbench.py      OCRBench/example.py of Yuliang-Liu/MultimodalOCR
    scienceqa.py     llava/eval/eval_science_qa.py of haotian-liu/LLaVA
    matching.py      vlmeval/utils/matching_util.py of open-compass/VLMEvalKit
    grounding.py     eval_mm/evaluate_grounding.py of QwenLM/Qwen-VL
    rec.py           lmms_eval/tasks/refcoco/utils_rec.py of EvolvingLMMs-Lab/lmms-eval
    ocrbench_lmms.py lmms_eval/tasks/ocrbench/utils.py of the same, of August 2026
    vqa_eval.py      vlmeval/dataset/utils/vqa_eval.py of open-compass/VLMEvalKit
    circular.py      vlmeval/dataset/utils/multiple_choice.py of the same
    run_gpt3.py      models/run_gpt3.py of lupantech/ScienceQA
    nlvr2.py         nlvr2/eval/metrics.py of lil-lab/nlvr

They need editdistance, pandas and loguru beside what is installed here, and ROUGE-L the package rouge-score (0.1.2).
Each script scores two sets of rows (`USUAL`, `HARD`); the names of the scores of the second end in `_hard`.
Where a script fails (a division by 0), or draws an option at random, there is no score: null.
"""

import ast
import base64
import io
import json
import re
import runpy
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from string import ascii_uppercase
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

from tests.eval.vl import made_up, made_up_hard
from tests.eval.vl.made_up import MadeUp

FILE = Path(__file__).with_name("official_scores.json")


class Rows(NamedTuple):
    """Rows of every kind that a script may score.

    Attributes:
        several: Answers in words, with one reference or more.
        ten: Answers in words, with ten references.
        words: Others with one reference or more, for MMMU.
        choices: Answers to questions with up to five options, as many as ScienceQA's scripts know letters for.
        wide: Answers to questions with as many options as MMMU-Pro's, ten, or the same as `choices`.
        yes_or_no: Answers to questions of yes or no.
        sentences: Sentences with references.
        points: Boxes as two points of 999 steps.
        shares: Boxes as four shares.
        statements: True or false, with ids.
    """

    several: list[MadeUp]
    ten: list[MadeUp]
    words: list[MadeUp]
    choices: list[MadeUp]
    wide: list[MadeUp]
    yes_or_no: list[MadeUp]
    sentences: list[MadeUp]
    points: list[MadeUp]
    shares: list[MadeUp]
    statements: list[tuple[str, MadeUp]]


USUAL = Rows(
    several=made_up.open_answers(1),
    ten=made_up.open_answers(2, references=10),
    words=made_up.open_answers(4),
    choices=made_up.choices(3),
    wide=made_up.choices(3),
    yes_or_no=made_up.yes_or_no(5),
    sentences=made_up.sentences(8),
    points=made_up.boxed(6),
    shares=made_up.boxed(6),
    statements=made_up.true_or_false(7),
)
HARD = Rows(
    several=made_up_hard.hard_answers(10),
    ten=made_up_hard.hard_answers(11, references=10),
    words=made_up_hard.hard_answers(12),
    choices=made_up_hard.hard_choices(13, most=5),
    wide=made_up_hard.hard_choices(14, most=10),
    yes_or_no=made_up_hard.hard_yes_or_no(15),
    sentences=made_up_hard.hard_sentences(16),
    points=made_up_hard.hard_points(17),
    shares=made_up_hard.hard_boxes(9),
    statements=made_up_hard.hard_statements(18),
)


def packed(scores: Sequence[float | None]) -> str:
    """Scores as a short text, to six decimals."""
    lines = "\n".join("" if score is None else f"{float(score):.6f}".rstrip("0").rstrip(".") for score in scores)
    return base64.b85encode(zlib.compress(lines.encode(), 9)).decode()


def unpacked(text: str) -> list[float | None]:
    lines = zlib.decompress(base64.b85decode(text)).decode().split("\n")
    return [float(line) if line else None for line in lines]


def expected(name: str) -> list[float | None]:
    """The scores of a script."""
    return unpacked(json.loads(FILE.read_text())[name])


# --- the scripts -----------------------------------------------------------------------------------------------------


def load(folder: Path, name: str, **stubs: Any) -> Any:
    """A script as a module; of packages that it imports and that are not here, `stubs` are instead."""
    kept = {key: sys.modules.get(key) for key in stubs}
    sys.modules.update(stubs)
    module = ModuleType(f"official_{name}")
    text = (folder / f"{name}.py").read_text(encoding="utf-8").expandtabs(8)  # one mixes tabs and spaces, of Python 2
    exec(compile(text, name, "exec"), module.__dict__)
    for key in (key for key, found in kept.items() if found is None):
        del sys.modules[key]
    return module


def block(folder: Path, name: str, mark: str, **given: Any) -> dict[str, Any]:
    """Runs the innermost statement of a script that has a text in it, of scripts that are no functions."""
    tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.If) and mark in ast.unparse(node)]
    statement = min(found, key=lambda node: len(ast.unparse(node)))
    exec(compile(ast.Module([statement], []), name, "exec"), given)
    return given


def guarded(one: Callable[..., float | None]) -> Callable[..., float | None]:
    """A function whose divisions by 0 and missing numbers are no score."""

    def score(*arguments: Any) -> float | None:
        try:
            return one(*arguments)
        except ZeroDivisionError:
            return None

    return score


def site_anls(script: Any, rows: Sequence[MadeUp]) -> list[float]:
    truth = {"data": [{"questionId": i, "question": "", "answers": row.references} for i, row in enumerate(rows)]}
    said = [{"questionId": i, "answer": row.prediction} for i, row in enumerate(rows)]
    with TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("truth", "said")]
        for file, content in zip(files, (truth, said), strict=True):
            file.write_text(json.dumps(content))
        settings = SimpleNamespace(answer_types=False, anls_threshold=0.5)
        found = script.evaluate_method(*map(str, files), settings)["per_sample_result"]
    return [found[str(i)]["score"] for i in range(len(rows))]


def documents(folder: Path, rows: Sequence[MadeUp], ten: Sequence[MadeUp]) -> dict[str, list[float | None]]:
    m4c, pix2struct = (
        load(folder, "m4c"),
        load(folder, "pix2struct", **{f"pycocoevalcap.{name}": MagicMock() for name in ("cider.cider",)}),
    )
    textvqa, anls = m4c.TextVQAAccuracyEvaluator(), m4c.STVQAANLSEvaluator()

    def entry(row: MadeUp) -> list[dict]:
        return [{"pred_answer": row.prediction, "gt_answers": list(row.references)}]

    near = pix2struct.relaxed_correctness
    return {
        "anls": site_anls(load(folder, "anls"), rows),
        "anls_mmf": [guarded(anls.eval_pred_list)(entry(row)) for row in rows],
        "anls_pix2struct": [
            guarded(lambda row: max(pix2struct.anls_metric(t.lower(), row.prediction.lower()) for t in row.references))(
                row
            )
            for row in rows
        ],
        "relaxed": [max(near(target, row.prediction) for target in row.references) for row in rows],
        "relaxed_stripped": relaxed_stripped(folder, rows),
        "textvqa": [textvqa.eval_pred_list(entry(row)) for row in ten],
        "ocrbench": ocrbench(folder, rows),
        "ocrbench_folded": ocrbench_folded(folder, rows),
    }


def relaxed_stripped(folder: Path, rows: Sequence[MadeUp]) -> list[float]:
    smp = SimpleNamespace(istype=lambda *_: True, listinstr=None, process_punctuation=None)
    script = load(folder, "vqa_eval", **{"vlmeval": MagicMock(), "vlmeval.smp": smp})
    asked = [{"answer": repr(list(row.references)), "prediction": row.prediction} for row in rows]
    return [max(script.process_line(line, "relaxed_accuracy")["match"]) for line in asked]


def ocrbench_folded(folder: Path, rows: Sequence[MadeUp]) -> list[float]:
    names = ("lmms_eval", "lmms_eval.tasks", "lmms_eval.tasks._task_utils", "lmms_eval.tasks._task_utils.file_utils")
    script = load(folder, "ocrbench_lmms", **{name: MagicMock() for name in names})
    docs = [{"answer": list(row.references), "dataset": row.kind, "question_type": ""} for row in rows]
    found = [script.ocrbench_process_results(doc, [row.prediction]) for doc, row in zip(docs, rows, strict=True)]
    return [each["ocrbench_accuracy"]["score"] for each in found]


def ocrbench(folder: Path, rows: Sequence[MadeUp]) -> list[float]:
    data = [
        {"type": "", "dataset_name": row.kind, "answers": list(row.references), "predict": row.prediction}
        for row in rows
    ]
    return [row["result"] for row in block(folder, "ocrbench", "data[i]['result'] = 0", data=data)["data"]]


def letters(folder: Path, rows: Rows) -> dict[str, list[float | None]]:
    mmmu = load(folder, "mmmu")
    pro, matching = load(folder, "pro"), load(folder, "matching", **{"vlmeval.smp.log": MagicMock()})
    mmmu.random = pro.random = SimpleNamespace(choice=lambda _: None)

    def parsed(parse: Callable, row: MadeUp) -> float | None:
        options = dict(zip(ascii_uppercase, row.options, strict=False))
        found = parse(row.prediction, list(options), options)
        return None if found is None else float(found == row.letter)

    def inferred(row: MadeUp) -> float:
        return float(
            matching.can_infer(row.prediction, dict(zip(ascii_uppercase, row.options, strict=False))) == row.letter
        )

    def opened(row: MadeUp) -> float:
        return mmmu.eval_open(list(row.references), mmmu.parse_open_response(row.prediction))

    return {
        "mmmu": [parsed(mmmu.parse_multi_choice_response, row) for row in rows.wide],
        "mmmu_pro": [parsed(pro.parse_multi_choice_response, row) for row in rows.wide],
        "mmmu_open": [opened(row) for row in rows.words],
        "letters": [inferred(row) for row in rows.wide],
        "circular": circular(folder, rows.wide, matching),
        "scienceqa": scienceqa(folder, rows.choices),
        "scienceqa_own": scienceqa_own(folder, rows.choices),
        "aokvqa": aokvqa(folder, rows.choices),
        "aokvqa_direct": direct(folder, rows.ten),
    }


class Frame(list):
    """Rows as the script reads them of a table of pandas."""

    @property
    def iloc(self) -> list:
        return self


def circular(folder: Path, rows: Sequence[MadeUp], matching: Any) -> list[float]:
    """Of pairs of rows, as if they were the orders of one question; what the script leaves to a judge is wrong."""
    names = ("vlmeval", "vlmeval.smp", "vlmeval.smp.vlm", "vlmeval.utils")
    script = load(folder, "circular", **{name: MagicMock() for name in names})
    script.can_infer = matching.can_infer
    asked = [
        {"GT": row.letter, "prediction": row.prediction} | dict(zip(ascii_uppercase, row.options, strict=False))
        for row in rows
    ]
    groups = [Frame(asked[start : start + 2]) for start in range(0, len(asked), 2)]
    return [float((script.prefetch_circular_group(group) or {"hit": 0})["hit"]) for group in groups]


def scienceqa_own(folder: Path, rows: Sequence[MadeUp]) -> list[float | None]:
    """The script draws a letter where it finds none."""
    openai, said = MagicMock(), []
    openai.Completion.create = lambda **_: {"choices": [{"text": said[-1]}]}
    stubs = {"models": MagicMock(), "models.base_prompt": SimpleNamespace(__all__=[]), "openai": openai}
    script = load(folder, "run_gpt3", **stubs)
    script.random = SimpleNamespace(choice=lambda _: None)
    found: list[float | None] = []
    for row in rows:
        said.append(row.prediction)
        letter, _ = script.get_gpt3_result("", MagicMock())
        place = script.get_pred_idx(letter, row.options, list(ascii_uppercase[:5]))
        found.append(None if place is None else float(ascii_uppercase[place] == row.letter))
    return found


def scienceqa(folder: Path, rows: Sequence[MadeUp]) -> list[float]:
    problems = {
        str(i): {"choices": row.options, "answer": ascii_uppercase.index(row.letter)} for i, row in enumerate(rows)
    }
    with TemporaryDirectory() as place:
        files = {name: Path(place, name) for name in ("problems.json", "pid_splits.json", "said", "out", "result")}
        files["problems.json"].write_text(json.dumps(problems))
        files["pid_splits.json"].write_text(json.dumps({"test": list(problems)}))
        said = [{"question_id": str(i), "text": row.prediction, "prompt": "<image>"} for i, row in enumerate(rows)]
        said[0]["prompt"] = ""
        files["said"].write_text("".join(json.dumps(row) + "\n" for row in said))
        named = ("--base-dir", place, "--result-file", files["said"], "--output-file", files["out"])
        sys.argv = ["", *map(str, named), "--output-result", str(files["result"])]
        runpy.run_path(str(folder / "scienceqa.py"), run_name="__main__")
        found = json.loads(files["result"].read_text())["results"]
    return [float(found[key] == problems[key]["answer"]) for key in problems]


def aokvqa(folder: Path, rows: Sequence[MadeUp]) -> list[float | None]:
    """The script refuses all that is no choice."""
    script = load(folder, "aokvqa", load_aokvqa=MagicMock())
    found: list[float | None] = []
    for row in rows:
        question = {"question_id": "1", "choices": row.options, "correct_choice_idx": ascii_uppercase.index(row.letter)}
        taken = row.prediction in row.options
        scored = script.eval_aokvqa([question | {"direct_answers": []}], {"1": row.prediction}, True) if taken else None
        found.append(None if scored is None else scored / 100)
    return found


def direct(folder: Path, rows: Sequence[MadeUp]) -> list[float]:
    script = load(folder, "aokvqa", load_aokvqa=MagicMock())
    about = {"question_id": "1", "choices": [], "difficult_direct_answer": False}
    return [
        script.eval_aokvqa([about | {"direct_answers": list(row.references)}], {"1": row.prediction}) / 100
        for row in rows
    ]


def pope(folder: Path, rows: Sequence[MadeUp]) -> dict[str, list[float | None]]:
    files = [
        [json.dumps({"answer": row.prediction}) for row in rows],
        [json.dumps({"label": row.references[0]}) for row in rows],
    ]
    names = {"open": lambda *_: files.pop(0), "print": lambda *_: None}
    exec(compile((folder / "pope.py").read_text(), "pope", "exec"), names)
    right = [said == label for said, label in zip(names["pred_list"], names["label_list"], strict=True)]
    return {"pope": right, "pope_shares": [names[key] for key in ("precision", "recall", "f1", "yes_ratio")]}


def nlvr2(folder: Path, rows: Sequence[tuple[str, MadeUp]]) -> dict[str, list[float | None]]:
    """Precision and consistency, which the script prints."""
    with TemporaryDirectory() as place:
        said, truth = Path(place, "said.csv"), Path(place, "truth.jsonl")
        said.write_text("".join(f"{name},{row.prediction}\n" for name, row in rows))
        labels = [json.dumps({"identifier": name, "label": row.references[0]}) for name, row in rows]
        truth.write_text("\n".join(labels))
        sys.argv = ["", str(said), str(truth)]
        with redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(folder / "nlvr2.py"), run_name="__main__")
    return {"nlvr2_shares": [float(line.partition("=")[2]) for line in printed.getvalue().split()]}


def boxes_of_qwen(folder: Path, rows: Sequence[MadeUp]) -> list[float | None]:
    script = load(folder, "grounding")
    qwen = []
    for row in rows:
        output = {"answer": row.prediction, "gt_bbox": list(row.box), "hw": row.size[::-1]}
        mark = "iou = iou.item()"
        given = vars(script) | {"merged_outputs": [output], "PATTERN": re.compile(r"\((.*?)\),\((.*?)\)")}
        qwen.append(block(folder, "grounding", mark, **given, correct=0, total_cnt=0)["correct"])
    return qwen


def boxes_of_lmms(folder: Path, rows: Sequence[MadeUp]) -> list[float | None]:
    rec = load(folder, "rec", datasets=MagicMock())
    shares = [[value / row.size[place % 2] for place, value in enumerate(row.box)] for row in rows]
    return [
        guarded(lambda row, share: rec.compute_accuracy(share, rec.parse_float_sequence_within(row.prediction)))(
            row, share
        )
        for row, share in zip(rows, shares, strict=True)
    ]


def rouge(rows: Sequence[MadeUp]) -> list[float | None]:
    """The highest F1 of the references, as `score_multi` takes it."""
    from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]

    scorer = RougeScorer(["rougeL"])
    return [scorer.score_multi(row.references, row.prediction)["rougeL"].fmeasure for row in rows]


def every(folder: Path, rows: Rows) -> dict[str, list[float | None]]:
    """The scores of all scripts."""
    scores = documents(folder, rows.several, rows.ten) | letters(folder, rows)
    scores |= pope(folder, rows.yes_or_no) | nlvr2(folder, rows.statements) | {"rouge_l": rouge(rows.sentences)}
    scores |= {"boxes_qwen": boxes_of_qwen(folder, rows.points), "boxes_lmms": boxes_of_lmms(folder, rows.shares)}
    return scores


if __name__ == "__main__":
    scripts = Path(sys.argv[1])
    usual, hard = every(scripts, USUAL), every(scripts, HARD)
    scores = usual | {f"{name}_hard": found for name, found in hard.items()}
    FILE.write_text(json.dumps({name: packed(found) for name, found in scores.items()}, indent=0) + "\n")
