"""The formats of vision-language data files, each with the function that reads it. docs/vl.md lists all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dora_mm.registries.registry import Registry

ANY = "any"
Official = Literal["JSON", "a table with tabs", "a pickle", "any"]  # kinds of a format's own files
Learned = Literal["first", "sampled"]
Key = Literal["annotations", "subtitles", "split", "columns", "answers"]  # of a source, which only some formats have


@dataclass(frozen=True)
class Reader:
    """One format.

    Attributes:
        read: The import path of its function `read(source, bad)`, see dora_mm/data/vl/readers.
        published: Where its files are published; "" where they are a user's own.
        keys: Which of the keys that not all formats have it reads.
        needs: Those of them that must be given, each with the reason.
        images: Where rows have images: "named" as files of a folder; "own", inside them or by absolute paths, or named;
            "either": "named" in official files and "own" in those of the hub; "none": rows are texts.
        image_folder: Where rows name files beside the data files, that folder as seen from one; "": as above.
        several: Whether `file` may also be a folder, a pattern of files or a list.
        splits_rows: Whether `split` chooses rows, though there may be several files.
        hub: Whether it also reads Parquet of the hub, see LAYOUTS in dora_mm/data/vl/readers/hub_rows.py.
        official: What its own files are; ANY: its own reader finds that out.
        learned: Which of several answers is learned by default: the first, where all count the same, or one that is
            drawn by its score at each step.
        version: Changes when the function makes other rows of the same files: tables on disk are made anew.
    """

    read: str
    published: str = ""
    keys: tuple[Key, ...] = ()
    needs: Mapping[Key, str] = field(default_factory=dict)
    images: Literal["named", "own", "either", "none"] = "named"
    image_folder: str = ""
    several: bool = False
    version: str = ""
    splits_rows: bool = False
    hub: bool = False
    official: Official = "JSON"
    learned: Learned = "sampled"


HERE = "dora_mm.data.vl.readers"
VL_T5 = "the data of VL-T5 (github.com/j-min/VL-T5)"
VALUE = "the VALUE benchmark (github.com/VALUE-Leaderboard/DataRelease)"
KARPATHY = "Karpathy's splits (cs.stanford.edu/people/karpathy/deepimagesent)"
RRC = "Robust Reading Competition, rrc.cvc.uab.es/?ch="
OF_HUB: Any = {"images": "either", "several": True, "hub": True}
OF_LISTS: Any = OF_HUB | {"keys": ("split", "answers"), "learned": "first"}  # of answers that count the same
HUB_ROWS = f"{HERE}.hub_rows:read_hub_rows"
RECORDS = {
    "vqa_v2": Reader(f"{HERE}.vqa:read_vqa_v2", "visualqa.org", keys=("annotations", "split", "answers"), **OF_HUB),
    "vqa_karpathy": Reader(f"{HERE}.vqa:read_vqa_karpathy", VL_T5, keys=("annotations", "answers")),
    "easy_vqa": Reader(f"{HERE}.vqa:read_easy_vqa", "the package easy-vqa"),
    "gqa": Reader(
        f"{HERE}.gqa:read_gqa",
        "GQA's download page (cs.stanford.edu/people/dorarad/gqa)",
        keys=("split",),
        several=True,
        hub=True,
    ),
    "gqa_vlt5": Reader(f"{HERE}.gqa:read_gqa_vlt5", VL_T5),
    "nlvr2": Reader(f"{HERE}.nlvr2:read_nlvr2", "github.com/lil-lab/nlvr"),
    "nlvr2_vlt5": Reader(f"{HERE}.nlvr2:read_nlvr2_vlt5", VL_T5),
    "coco_captions": Reader(f"{HERE}.coco_captions:read_coco_captions", "cocodataset.org", keys=("answers",)),
    "coco_karpathy": Reader(
        f"{HERE}.coco_captions:read_coco_karpathy",
        KARPATHY,
        keys=("split", "answers"),
        needs={"split": "a coco_karpathy file contains all splits"},
    ),
    "video_qa": Reader(f"{HERE}.video:read_video_qa", VALUE, keys=("subtitles",)),
    "video_captions": Reader(f"{HERE}.video:read_video_captions", VALUE, keys=("subtitles",)),
    "chat": Reader(f"{HERE}.chat:read_chat", keys=("columns", "split"), images="own", several=True, official=ANY),
    "preferences": Reader(
        f"{HERE}.preferences:read_preferences", keys=("columns", "split"), images="own", several=True, official=ANY
    ),
    "captions": Reader(
        f"{HERE}.chat:read_captions",
        keys=("columns", "split", "answers"),
        images="own",
        several=True,
        hub=True,
        official=ANY,
    ),
    "choices": Reader(
        f"{HERE}.choices:read_choices",
        "VLMEvalKit (github.com/open-compass/VLMEvalKit)",
        keys=("split",),
        images="own",
        several=True,
        splits_rows=True,
        hub=True,
        official="a table with tabs",
        version="1",
    ),
    "answers": Reader(
        f"{HERE}.choices:read_answers",
        "VLMEvalKit (github.com/open-compass/VLMEvalKit)",
        keys=("split", "answers"),
        images="own",
        several=True,
        splits_rows=True,
        hub=True,
        official="a table with tabs",
        version="1",
        learned="first",
    ),
    "docvqa": Reader(
        f"{HERE}.text_in_images:read_docvqa", f"{RRC}17", keys=("split", "answers"), **OF_HUB, learned="first"
    ),
    "stvqa": Reader(
        f"{HERE}.text_in_images:read_stvqa", f"{RRC}11", keys=("split", "answers"), **OF_HUB, learned="first"
    ),
    "textvqa": Reader(f"{HERE}.text_in_images:read_textvqa", "textvqa.org", keys=("split", "answers"), **OF_HUB),
    "ocrbench": Reader(
        f"{HERE}.text_in_images:read_ocrbench",
        "github.com/Yuliang-Liu/MultimodalOCR",
        keys=("split", "answers"),
        **OF_HUB,
        learned="first",
    ),
    "chartqa": Reader(
        f"{HERE}.charts:read_chartqa",
        "github.com/vis-nlp/ChartQA",
        keys=("split", "answers"),
        **OF_HUB,
        learned="first",
    ),
    "plotqa": Reader(f"{HERE}.charts:read_plotqa", "github.com/NiteshMethani/PlotQA"),
    "mmmu": Reader(
        HUB_ROWS,
        "MMMU/MMMU and MMMU/MMMU_Pro (huggingface.co)",
        keys=("split", "answers"),
        images="own",
        several=True,
        hub=True,
        official=ANY,
        version="2",
        learned="first",
    ),
    "scienceqa": Reader(
        f"{HERE}.knowledge:read_scienceqa",
        "github.com/lupantech/ScienceQA",
        keys=("split",),
        splits_rows=True,
        **OF_HUB,
    ),
    "ai2d": Reader(
        HUB_ROWS,
        "lmms-lab/ai2d (huggingface.co)",
        keys=("split",),
        images="own",
        several=True,
        hub=True,
        official=ANY,
        version="1",
    ),
    "ai2d_questions": Reader(
        f"{HERE}.diagrams:read_ai2d_questions",
        "prior.allenai.org/projects/diagram-understanding",
        keys=("annotations", "split"),
        images="own",
        image_folder="../images",
        several=True,
        splits_rows=True,
    ),
    "aokvqa": Reader(f"{HERE}.knowledge:read_aokvqa", "github.com/allenai/aokvqa", keys=("split",), **OF_HUB),
    "aokvqa_direct": Reader(
        f"{HERE}.knowledge:read_aokvqa_direct", "github.com/allenai/aokvqa", keys=("split", "answers"), **OF_HUB
    ),
    "pope": Reader(f"{HERE}.pope:read_pope", "github.com/AoiDragon/POPE", keys=("split",), **OF_HUB),
    "refcoco": Reader(
        f"{HERE}.refcoco:read_refcoco", "Qwen-VL's eval_mm (github.com/QwenLM/Qwen-VL)", keys=("split",), **OF_HUB
    ),
    "refcoco_refs": Reader(
        f"{HERE}.refcoco:read_refs",
        "github.com/lichengunc/refer",
        keys=("annotations", "split"),
        needs={"annotations": "boxes are in instances.json, and not in refs(...).p"},
        official="a pickle",
    ),
    "commonsense": Reader(
        f"{HERE}.commonsense:read_commonsense",
        "the data of LLM-Adapters (github.com/AGI-Edgerunners/LLM-Adapters)",
        images="none",
    ),
}
READERS = Registry("readers", "format of data files", RECORDS)
