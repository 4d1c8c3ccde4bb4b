"""What the readers of all vision-language data sets yield: one Example per question, sentence or captioned picture."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a data set.

    id: the data set's own (question_id, identifier, image id, qid), as text.
    images: file names within the folder of pictures (`COCO_val2014_000000000042.jpg`, or `val2014/...` where it has
        subfolders), two for NLVR2, one otherwise; of a video the name of its clip. Features are found by the name
        without its extension (`stem`).
    text: the question or the sentence as the file has it, without the task's prompt; "" for captions. Of a video all
        that the model reads before the prompt, see video.py.
    answers, scores: what may be answered, and what each is worth in training, from 0 to 1: of VQA each normalised
        answer with min(1, 0.3 n), of GQA and NLVR2 ("true", "false") the one, of captions every reference with 1.
        Both are empty where the file has no answers (a test split, or an empty label of the Karpathy form).
    raw_answers: VQA's ten, as the file has them; empty in forms that do not hold them.
    kinds: what tables of scores are grouped by: VQA (answer_type, question_type), GQA (structural, semantic), captions
        of videos (type of each reference); empty where the file has none.
    """

    id: str
    images: tuple[str, ...]
    text: str
    answers: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    raw_answers: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


Predictions = Sequence[tuple[Example, str]]  # examples, each with what a model answered


def stem(image: str) -> str:
    """The name of a picture's features: its file name without folder and extension."""
    return image.rpartition("/")[2].rpartition(".")[0] or image.rpartition("/")[2]
