"""The files of predictions: their suffixes, and the functions that write them."""

from dataclasses import dataclass

from dora_mm.registries.registry import Registry


@dataclass(frozen=True)
class Submission:
    """One format of files.

    Attributes:
        suffix: Its suffix.
        text: The import path of the function that takes predictions and returns the text of a file.
    """

    suffix: str
    text: str


HERE = "dora_mm.eval.vl.submissions"
RECORDS = {
    "vqa": Submission(".json", f"{HERE}:vqa"),
    "gqa": Submission(".json", f"{HERE}:gqa"),
    "nlvr2": Submission(".csv", f"{HERE}:nlvr2"),
    "captions": Submission(".json", f"{HERE}:captions"),
    "clip_choices": Submission(".json", f"{HERE}:clip_choices"),
    "clip_captions_of_vid_name": Submission(".jsonl", f"{HERE}:clip_captions_of_vid_name"),
    "clip_captions_of_video_id": Submission(".jsonl", f"{HERE}:clip_captions_of_video_id"),
    "answers": Submission(".jsonl", f"{HERE}:answers"),
}
SUBMISSIONS = Registry("submissions", "submission file", RECORDS)
