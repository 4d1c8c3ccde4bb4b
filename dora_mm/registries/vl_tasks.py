"""The vision-language tasks, and those of texts alone: one record of each, which is all that the program knows of it.

A task that has the metrics and the submission file of another one is a record more, or a file in suites/. New metrics
are a line of scorers.py, a new submission file one of submissions.py, and a new format of data files one of readers.py;
docs/vl.md and docs/scores.md list all.
"""

from dataclasses import replace

from dora_mm.registries.suites import TaskRegistry, suite_titles
from dora_mm.registries.vl_task import BartText, VLTask

__all__ = ["TASKS", "BartText", "VLTask", "scored_titles", "tasks_of"]


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
        fallback=ALPACA,
        max_answer=32,
    )


CHAT = VLTask(
    title="chat",
    formats=("chat",),
    scorer="conversations",
    submission="answers",
    kind="conversations",
    images=None,
    prompt="{text}",
    max_answer=256,
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
    "chat": replace(CHAT, sentences="chat_sentences"),
    "chat_sentences": replace(CHAT, title="chat ROUGE-L", scorer="sentences"),
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
TASKS = TaskRegistry("vl_tasks", "task", RECORDS)


def scored_titles() -> dict[str, str]:
    """The title of each suite of the package, and of each task that scores single answers, with its formats."""
    tasks = {name: task for name, task in RECORDS.items() if not (task.pairs or task.clips)}
    return suite_titles() | {name: f"{task.title} ({', '.join(task.formats)})" for name, task in tasks.items()}


def tasks_of(form: str) -> list[str]:
    """The names of the tasks that files of a format are for."""
    return [name for name, task in TASKS.items() if form in task.formats]
