"""Messages about models whose class transformers does not have: their code is in their folders, or elsewhere.

Such code is never run here (`trust_remote_code`), since what is downloaded would then run as the person who trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from dora_mm.models.opening import OWN_CODE

CONVERTED = {  # the same models for the classes of transformers, by the class or the type that their config.json names
    "DeepseekOCR2ForCausalLM": "deepseek-community/DeepSeek-OCR-2",
    "Florence2ForConditionalGeneration": "florence-community/Florence-2-base, or another of florence-community",
    "InternVLChatModel": "the same name with -hf, such as OpenGVLab/InternVL3-1B-hf",
    "LlavaLlamaForCausalLM": "llava-hf/llava-1.5-7b-hf, or another of llava-hf",
    "LlavaMistralForCausalLM": "llava-hf/llava-v1.6-mistral-7b-hf, or another of llava-hf",
    "LlavaQwenForCausalLM": "llava-hf/llava-onevision-qwen2-7b-ov-hf, or another of llava-hf",
    "Ovis": "thisisiron/Ovis2-1B-hf, or another of thisisiron",
    "multi_modality": "deepseek-community/deepseek-vl-1.3b-chat or Janus-Pro-1B, or another of deepseek-community",
    "Phi4MMForCausalLM": "microsoft/Phi-4-multimodal-instruct with the revision refs/pr/70",
}
SUCCESSORS = {  # of models that nobody is known to have converted: later ones that have a class
    "MiniCPMV": "openbmb/MiniCPM-V-4.6",
    "MolmoForCausalLM": "allenai/Molmo2-8B",
}


def why_foreign(config: Mapping[str, Any]) -> str | None:
    """Why transformers cannot read the config of other code, and what to use instead; None: it is not of other code.

    Args:
        config: The content of a config.json that transformers could not read.
    """
    kind, name = config.get("model_type"), class_name(config)
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        code = f": it is {OWN_CODE}" if "auto_map" in config else ""
        return f"transformers {transformers.__version__} has no {name}{code}; {instead_of(config)}"
    return f"this {name} is for {OWN_CODE}; {instead_of(config)}" if "auto_map" in config else None


def class_name(config: Mapping[str, Any]) -> str:
    """The class that a config.json names, or else its type."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else f"model of type {config.get('model_type')}"


def converted(config: Mapping[str, Any]) -> str | None:
    """The version for transformers of a model whose code is elsewhere; None: none is known here."""
    return CONVERTED.get(class_name(config)) or CONVERTED.get(str(config.get("model_type")))


def instead_of(config: Mapping[str, Any]) -> str:
    """Advice on what to use instead of a model whose class transformers does not have."""
    if found := converted(config):
        return f"use its version for transformers, {found}"
    if found := SUCCESSORS.get(class_name(config)):
        return f"no version of it for transformers is known here; there is one of its successor, {found}"
    return "use a version that was converted for transformers, where there is one (often named -hf); none is known here"
