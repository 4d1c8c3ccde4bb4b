"""How far one gets without looking: the score that a model must beat before one may say that it sees."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.scores import percent
from dora_mm.eval.vl.vqa import vqa_accuracy

NUM_WORDS = 2  # of a question's beginning, where its whole text was never asked in training


def question_only_answers(train: Iterable[Example], valid: Iterable[Example]) -> list[str]:
    """To every question of `valid` the answer that training gave most often to the same text, or to questions that
    begin with the same two words, or to all.

    Each training question counts once, by all of its answers in proportion to their scores.

    Raises:
        ValueError: `train` has no answers.
    """
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_start: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for example in train:
        for answer, score in weights(example).items():
            for counts in (by_text[example.text], by_start[start(example.text)], overall):
                counts[answer] += score
    if not overall:
        raise ValueError("there is nothing to learn answers from: the training split has none")
    likeliest: dict[int, str] = {}  # by the identity of a table: the most common of a large one is asked often
    answers = []
    for example in valid:
        counts = by_text.get(example.text) or by_start.get(start(example.text)) or overall
        if id(counts) not in likeliest:
            likeliest[id(counts)] = max(sorted(counts), key=lambda answer: counts[answer])
        answers.append(likeliest[id(counts)])
    return answers


def weights(example: Example) -> Counter[str]:
    """How much each answer counts: 1 together."""
    total = sum(example.scores)
    return Counter({a: s / total for a, s in zip(example.answers, example.scores, strict=True)}) if total else Counter()


def start(text: str) -> str:
    return " ".join(text.split()[:NUM_WORDS])


def question_only_accuracy(train: Iterable[Example], valid: Iterable[Example]) -> float:
    """The mean accuracy x 100 of `question_only_answers`: the official VQA accuracy where an example has its ten
    answers, whether it is the answer where it has one.

    Raises:
        ValueError: `train` has no answers, `valid` has no rows.
    """
    valid = list(valid)
    if not valid:
        raise ValueError("there is nothing to score: the split has no rows")
    return percent([accuracy(said, one) for said, one in zip(question_only_answers(train, valid), valid, strict=True)])


def accuracy(answer: str, example: Example) -> float:
    return vqa_accuracy(answer, example.raw_answers) if example.raw_answers else float(answer in example.answers)
