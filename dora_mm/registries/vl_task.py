"""The definition of a vision-language task."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BartText:
    """The input and output of VL-BART in a task. Lengths are in tokens, <s> and </s> included.

    Prompts and lengths are those of the paper's runs, except `gqa: `, which they spelled `gpa: `.

    Attributes:
        prompt: In front of the question; of clips behind it.
        max_input: The longest text to read. Text beyond it is cut at the end; of clips that of the subtitles.
        max_target: The longest answer to learn.
        subtitles_only: Of clips only the subtitles are read.
    """

    prompt: str
    max_input: int
    max_target: int
    subtitles_only: bool = False


@dataclass(frozen=True)
class VLTask:
    """One task.

    Attributes:
        title: Its heading in tables of comparisons.
        formats: The formats of its data files, of READERS.
        scorer: Its metrics, one of SCORERS.
        submission: The file of its predictions, one of SUBMISSIONS.
        kind: What its rows are: questions with a short answer, images or clips with captions, or conversations.
        images: How many images a row has; None: any number; 0: rows are texts. A row of clips has the name of one.
        clips: Whether rows are about video clips, which only VL-BART reads, as features.
        row_mean: Whether the loss is a mean over rows of the means over their tokens; else over the tokens of all.
        chosen_from: Texts whose likeliest is the answer; empty: the letters of a row's options; None: it is written.
        pairs: Whether rows have a chosen and a rejected answer, and the loss compares both.
        names: How an answer names an option, with {option} for it, where rows have options in words: it is written, and
            the first one in it counts; or the likeliest is the answer. None: rows have no such options.
        lettered: Whether the letters of a row's options are answers, of which the likeliest can be taken.
        sentences: The task of the same rows whose metric suits answers that are sentences; "": there is none.
        prompt: The prompt for chat models, with {text} for the question; None: they do not do the task.
        fallback: The prompt for models without a chat template; None: the input that their class reads.
        max_answer: Tokens of the longest answer that chat models write.
        bart: The input and output of VL-BART; None: it does not do the task.
    """

    title: str
    formats: tuple[str, ...]
    scorer: str
    submission: str
    kind: Literal["questions", "captions", "conversations"] = "questions"
    images: int | None = 1
    clips: bool = False
    row_mean: bool = False
    chosen_from: tuple[str, ...] | None = None
    pairs: bool = False
    names: str | None = None
    lettered: bool = False
    sentences: str = ""
    prompt: str | None = None
    fallback: str | None = None
    max_answer: int = 16
    bart: BartText | None = None

    @property
    def takes_candidates(self) -> bool:
        """Whether its answers may be restricted to those of the training data."""
        free = self.chosen_from is None and self.names is None and not self.lettered
        return self.kind == "questions" and free

    @property
    def takes_beams(self) -> bool:
        """Whether its answers are found by beam search."""
        return self.kind == "captions" or self.names is not None
