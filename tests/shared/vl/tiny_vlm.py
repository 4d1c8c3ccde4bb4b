"""One tiny model of random weights per class of transformers that is trained here, with its real processor."""

from pathlib import Path

import torch

from tests.shared.vl import (
    chat_models,
    full_models,
    further_models,
    newer_models,
    newest_models,
    other_models,
    qwen_models,
    rare_models,
    rarest_models,
    templateless_models,
)
from tests.shared.vl.language_models import LANGUAGE_MODELS

CHAT = {  # with a chat template
    "llava": chat_models.llava,
    "llava_onevision": chat_models.llava_onevision,
    "qwen2_vl": qwen_models.qwen2_vl,
    "qwen2_5_vl": qwen_models.qwen2_5_vl,
    "qwen3_vl": qwen_models.qwen3_vl,
    "smolvlm": chat_models.smolvlm,
    "idefics3": chat_models.idefics3,
    "gemma3": chat_models.gemma3,
    "internvl": chat_models.internvl,
    "mllama": chat_models.mllama,
    "fast_vlm": chat_models.fast_vlm,
}
PLAIN = {  # without
    "paligemma": templateless_models.paligemma,
    "florence2": templateless_models.florence2,
    "blip_vqa": templateless_models.blip_vqa,
    "blip2": templateless_models.blip2,
    "git": templateless_models.git,
}
NEWER = newer_models.NEWER | other_models.OTHERS | {"blip_caption": templateless_models.blip_caption}  # in slow tests
OTHERS = further_models.FURTHER | rare_models.RARE | rarest_models.RAREST | newest_models.NEWEST  # in one slow test
BUILDERS = CHAT | PLAIN | NEWER | OTHERS | rarest_models.UNTRAINED | full_models.WHOLE | LANGUAGE_MODELS
NAMES = (*CHAT, *PLAIN)


def build(name: str, folder: Path) -> Path:
    """Write a tiny model in float32 and its processor; the same weights every time.

    Args:
        name: One of BUILDERS.
        folder: Where to write; made if missing.

    Returns:
        The folder.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = BUILDERS[name]()  # of language models the tokenizer
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
