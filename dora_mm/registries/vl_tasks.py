"""The vision-language tasks, and those of texts alone: one record of each, which is all that the program knows of it.

A task that has the metrics and the submission file of another one is a record more. New metrics are a line of
scorers.py, a new submission file one of submissions.py, and a new format of data files one of readers.py; docs/vl.md
lists all.
"""

from dataclasses import dataclass
from typing import Literal

from dora_mm.registries.registry import Registry


@dataclass(frozen=True)
class BartText:
    """What VL-BART reads and writes in a task. Lengths are in tokens, <s> and </s> included.

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
        pairs: Whether rows have a rejected answer beside the chosen one, and the loss compares both.
        names: How an answer names an option, with {option} for it, where rows have options in words: it is written, and
            the first one in it counts; or the likeliest is the answer. None: rows have no such options.
        prompt: What chat models are asked, with {text} for the question; None: they do not do the task.
        plain: What models without a chat template are asked; None: what their class reads.
        max_answer: Tokens of the longest answer that chat models write.
        bart: What VL-BART reads and writes; None: it does not do the task.
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
    prompt: str | None = None
    plain: str | None = None
    max_answer: int = 16
    bart: BartText | None = None

    @property
    def takes_candidates(self) -> bool:
        """Whether its answers may be restricted to those of the training data."""
        return self.kind == "questions" and self.chosen_from is None and self.names is None

    @property
    def takes_beams(self) -> bool:
        """Whether its answers are found by beam search."""
        return self.kind == "captions" or self.names is not None


def commonsense(title: str) -> VLTask:
    """A task of texts in the layout of LLM-Adapters, in which the paper's Table 1 was made."""
    return VLTask(
        title=title,
        formats=("commonsense",),
        scorer="options",
        submission="answers",
        images=0,
        names="the correct answer is {option}",
        prompt="{text}",
        plain=ALPACA,
        max_answer=32,
    )


SHORT_ANSWER = "{text}\nAnswer with a word or a short phrase."
MARGIN = " " * 16  # of all lines but the first, as LLM-Adapters trains them
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    f"{MARGIN}### Instruction:\n{MARGIN}{{text}}\n{MARGIN}\n{MARGIN}### Response:\n{MARGIN}"
)
RECORDS = {
    "vqa": VLTask(
        title="VQA",
        formats=("vqa_v2", "vqa_karpathy", "easy_vqa"),
        scorer="vqa",
        submission="vqa",
        row_mean=True,
        prompt=SHORT_ANSWER,
        bart=BartText("vqa: ", max_input=20, max_target=10),
    ),
    "gqa": VLTask(
        title="GQA",
        formats=("gqa", "gqa_vlt5"),
        scorer="gqa",
        submission="gqa",
        row_mean=True,
        prompt=SHORT_ANSWER,
        bart=BartText("gqa: ", max_input=20, max_target=10),
    ),
    "nlvr2": VLTask(
        title="NLVR2",
        formats=("nlvr2", "nlvr2_vlt5"),
        scorer="nlvr2",
        submission="nlvr2",
        images=2,
        chosen_from=("true", "false"),
        prompt="{text}\nIs this true of the two images? Answer true or false.",
        bart=BartText("nlvr: ", max_input=1024, max_target=10),
    ),
    "caption": VLTask(
        title="CIDEr",
        formats=("coco_captions", "coco_karpathy", "captions"),
        scorer="captions",
        submission="captions",
        kind="captions",
        prompt="Describe the image in one sentence.",
        max_answer=40,
        bart=BartText("caption: ", max_input=40, max_target=40),
    ),
    "tvqa": VLTask(
        title="TVQA",
        formats=("video_qa",),
        scorer="clip_choices",
        submission="clip_choices",
        clips=True,
        row_mean=True,
        bart=BartText("tvqa: ", max_input=600, max_target=20),
    ),
    "how2qa": VLTask(
        title="How2QA",
        formats=("video_qa",),
        scorer="clip_choices",
        submission="clip_choices",
        clips=True,
        row_mean=True,
        bart=BartText("how2qa: ", max_input=600, max_target=20),
    ),
    "tvc": VLTask(
        title="TVC CIDEr",
        formats=("video_captions",),
        scorer="clip_captions",
        submission="clip_captions_of_vid_name",
        kind="captions",
        clips=True,
        row_mean=True,
        bart=BartText("tvc: ", max_input=600, max_target=20),
    ),
    "yc2c": VLTask(
        title="YC2C CIDEr",
        formats=("video_captions",),
        scorer="clip_captions",
        submission="clip_captions_of_video_id",
        kind="captions",
        clips=True,
        row_mean=True,
        bart=BartText("yc2c: ", max_input=600, max_target=20, subtitles_only=True),
    ),
    "chat": VLTask(
        title="chat",
        formats=("chat",),
        scorer="conversations",
        submission="answers",
        kind="conversations",
        images=None,
        prompt="{text}",
        max_answer=256,
    ),
    "preference": VLTask(
        title="preference",
        formats=("preferences",),
        scorer="preferences",
        submission="answers",
        kind="conversations",
        images=None,
        pairs=True,
        prompt="{text}",
        max_answer=256,
    ),
    "choice": VLTask(
        title="choice",
        formats=("choices",),
        scorer="choices",
        submission="answers",
        images=None,
        chosen_from=(),
        prompt="{text}\nAnswer with the letter of the right option.",
    ),
    "commonsense": commonsense("commonsense"),  # rows of all that follow, to train on
    "boolq": commonsense("BoolQ"),
    "piqa": commonsense("PIQA"),
    "social_i_qa": commonsense("SIQA"),
    "hellaswag": commonsense("HellaSwag"),
    "winogrande": commonsense("WinoGrande"),
    "arc_easy": commonsense("ARC-e"),
    "arc_challenge": commonsense("ARC-c"),
    "openbookqa": commonsense("OBQA"),
}
TASKS = Registry("vl_tasks", "task", RECORDS)


def tasks_of(form: str) -> list[str]:
    """The names of the tasks that files of a format are for."""
    return [name for name, task in TASKS.items() if form in task.formats]
