"""The metrics of vision-language tasks: the object of each that scores answers, as dora_mm/eval/vl/scores.py has it."""

from typing import Any

from dora_mm.registries.registry import Registry

HERE = "dora_mm.eval.vl"
SCORERS: Registry[Any] = Registry(
    "scorers",
    "scorer",
    import_paths={
        "vqa": f"{HERE}.vqa:SCORER",
        "gqa": f"{HERE}.gqa:SCORER",
        "nlvr2": f"{HERE}.nlvr2:SCORER",
        "captions": f"{HERE}.captions:SCORER",
        "clip_choices": f"{HERE}.video:SCORER",
        "clip_captions": f"{HERE}.captions:CLIP_SCORER",
        "conversations": f"{HERE}.chat:SCORER",
        "sentences": f"{HERE}.chat:SENTENCES",
        "preferences": f"{HERE}.preferences:SCORER",
        "choices": f"{HERE}.choice:SCORER",
        "options": f"{HERE}.options:SCORER",
        "anls": f"{HERE}.anls:SCORER",
        "relaxed": f"{HERE}.relaxed:SCORER",
        "textvqa": f"{HERE}.textvqa:SCORER",
        "mmmu": f"{HERE}.mmmu:SCORER",
        "mmmu_pro": f"{HERE}.mmmu:PRO",
        "pope": f"{HERE}.pope:SCORER",
        "ocrbench": f"{HERE}.ocrbench:SCORER",
        "scienceqa": f"{HERE}.scienceqa:SCORER",
        "letters": f"{HERE}.letters:SCORER",
        "circular": f"{HERE}.circular:SCORER",
        "aokvqa": f"{HERE}.aokvqa:SCORER",
        "aokvqa_direct": f"{HERE}.aokvqa:DIRECT",
        "boxes": f"{HERE}.boxes:SCORER",
        "exact": f"{HERE}.exact:SCORER",
    },
)
