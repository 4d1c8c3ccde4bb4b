"""A baseline that answers from the question alone, without the image, which a model that uses images must beat."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl import chat
from dora_mm.eval.vl.scores import percent
from dora_mm.eval.vl.vqa import vqa_accuracy

NUM_WORDS = 2  # first words of a question to match where its complete text does not occur in training


def question_only_answers(train: Iterable[Example], valid: Iterable[Example]) -> list[str]:
    """Returns the most frequent training answer for every question of `valid`.

    That is the answer to questions with the same text or else, where there are none, to questions with the same first
    two words, or else to all questions. Each training question counts once, divided among its answers in proportion to
    their scores.

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
    likeliest: dict[int, str] = {}  # by the id of a counter: the maximum of a large one is needed many times
    answers = []
    for example in valid:
        counts = by_text.get(example.text) or by_start.get(start(example.text)) or overall
        if id(counts) not in likeliest:
            likeliest[id(counts)] = max(sorted(counts), key=lambda answer: counts[answer])
        answers.append(likeliest[id(counts)])
    return answers


def weights(example: Example) -> Counter[str]:
    """Returns the weight of each answer; they add up to 1."""
    total = sum(example.scores)
    return Counter({a: s / total for a, s in zip(example.answers, example.scores, strict=True)}) if total else Counter()


def start(text: str) -> str:
    return " ".join(text.split()[:NUM_WORDS])


def mean_accuracy(guesses: Predictions) -> float:
    """Returns the mean accuracy x 100 of guessed answers.

    Raises:
        ValueError: There are none.
    """
    if not guesses:
        raise ValueError("there is nothing to score: the split has no rows")
    return percent([accuracy(answer, example) for example, answer in guesses])


def accuracy(answer: str, example: Example) -> float:
    """Returns the official VQA accuracy where an example has ten answers, otherwise whether the answer is right."""
    if example.turns:
        return chat.row_accuracy(example, answer)
    return vqa_accuracy(answer, example.raw_answers) if example.raw_answers else float(answer in example.answers)
