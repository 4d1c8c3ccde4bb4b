"""Questions about nouns, in groups in which every answer is as often right as wrong: who sees no noun can only guess.

Three kinds, in the words and the layouts of LLM-Adapters' commonsense files:

    boolq       is "kestrel" a kind of "falcon"?            true or false; two nouns and their kinds in four rows
    hellaswag   the word "kestrel" means                    two endings; two nouns and what they mean in two rows
    arc_easy    which of these is a kind of "falcon"?       four answers; four nouns and their kinds in four rows
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from samples.build.wordnet.nouns import Noun

HIDDEN = "something"  # in the place of what a question is about, for those who see only the rest


@dataclass(frozen=True)
class Row:
    """A question.

    Attributes:
        text: What is asked, with {} for what it is about.
        about: A noun, or the kind of one.
        words: What stands for the options, such as answer1 and answer2.
        answer: The right one of these.
    """

    text: str
    about: str
    words: tuple[str, ...]
    answer: str

    def as_json(self, *, hidden: bool) -> dict[str, str]:
        """The row as LLM-Adapters' files have it; `hidden`: without what it is about."""
        text = self.text.replace("{}", HIDDEN if hidden else f'"{self.about}"')
        return {
            "instruction": f"{text}\n\nAnswer format: {'/'.join(self.words)}",
            "input": "",
            "output": f"the correct answer is {self.answer}",
            "answer": self.answer,
        }


def groups_of(nouns: Iterable[Noun], size: int) -> Iterator[list[Noun]]:
    """Groups of nouns none of which is of another's kind, in any sense; each noun is in one at most."""
    group: list[Noun] = []
    for noun in nouns:
        if all(noun.kind not in other.kinds and other.kind not in noun.kinds for other in group):
            group.append(noun)
        if len(group) == size:
            yield group
            group = []


def true_or_false(group: Sequence[Noun], stream: random.Random) -> Iterator[Row]:
    """Both nouns with both kinds."""
    text = "Please answer the following question with true or false, question: is {} a kind of"
    for noun in group:
        for other in group:
            yield Row(f'{text} "{other.kind}"?', noun.word, ("true", "false"), "true" if noun is other else "false")


def endings(group: Sequence[Noun], stream: random.Random) -> Iterator[Row]:
    """Each noun with what all of the group mean."""
    text = "Please choose the correct ending to complete the given sentence: The word {} means"
    for noun in group:
        yield _chosen(text, noun.word, "ending", [other.gloss for other in group], noun.gloss, stream)


def answers(group: Sequence[Noun], stream: random.Random) -> Iterator[Row]:
    """The kind of each noun with all nouns of the group."""
    text = "Please choose the correct answer to the question: Which of these is a kind of {}?"
    for noun in group:
        yield _chosen(text, noun.kind, "answer", [other.word for other in group], noun.word, stream)


def _chosen(text: str, about: str, name: str, options: Sequence[str], right: str, stream: random.Random) -> Row:
    """A question with options, which are shuffled."""
    shuffled = stream.sample(options, len(options))
    words = tuple(f"{name}{number}" for number in range(1, len(options) + 1))
    listed = " ".join(f"{word.capitalize()}: {option}" for word, option in zip(words, shuffled, strict=True))
    return Row(f"{text}\n\n{listed}", about, words, words[shuffled.index(right)])


KINDS: dict[str, tuple[int, Callable[[Sequence[Noun], random.Random], Iterator[Row]]]] = {  # nouns of a group, rows
    "boolq": (2, true_or_false),
    "hellaswag": (2, endings),
    "arc_easy": (4, answers),
}


def make_rows(kind: str, nouns: Sequence[Noun], count: int, seed: Any) -> list[Row]:
    """Makes whole groups of rows of a kind.

    Args:
        kind: A key of `KINDS`.
        nouns: What is asked about.
        count: The rows at least; groups are not cut.
        seed: Of the groups, and of the order of options.

    Raises:
        ValueError: There are too few nouns.
    """
    stream = random.Random(f"{kind}/{seed}")
    size, rows_of = KINDS[kind]
    usable = [noun for noun in nouns if noun.gloss or kind != "hellaswag"]
    found: list[Row] = []
    for group in groups_of(stream.sample(usable, len(usable)), size):
        if len(found) >= count:
            break
        found += rows_of(group, stream)
    if len(found) < count:
        raise ValueError(f"{len(usable)} nouns make {len(found)} rows of {kind}, fewer than {count}")
    return found
