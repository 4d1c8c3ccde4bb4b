"""The tools whose files are read and written, by name: what each is called, and how it spells the names of modules.

To add a tool, write a module in `tools/` with a `Tool`, and an `Export` if `convert` should write for it, and name them
here. Nothing is imported, so that the command line is quick.
"""

from __future__ import annotations

from typing import NamedTuple


class RegistryEntry(NamedTuple):
    """Where a tool or a target is, as the module in `tools/` and the name in it, and what people call it.

    `version` is that of the tool whose rules are written down: a release, or the month and commit of its code.
    """

    where: str
    title: str
    version: str = ""


TOOLS = {  # files are recognised by the first that matches
    "dora_mm": RegistryEntry("native.TOOL", "dora_mm"),
    "nvlabs": RegistryEntry("nvlabs.TOOL", "NVlabs/DoRA", "2026-08"),
    "onetrainer": RegistryEntry("onetrainer.TOOL", "OneTrainer", "2026-08 (23df383)"),
    "ai-toolkit": RegistryEntry("ai_toolkit.TOOL", "ai-toolkit", "2026-08"),
    "peft": RegistryEntry("peft.TOOL", "PEFT", "0.21.2"),
    "diffusers": RegistryEntry("diffusers.TOOL", "diffusers", "0.42.1"),
    "bare": RegistryEntry("bare.TOOL", "files without a prefix"),
    "comfy-2025": RegistryEntry("comfy.TOOL_2025", "ComfyUI and reForge", "2025-10 to 2026-08"),
    "comfy-15458": RegistryEntry("comfy.TOOL_15458", "ComfyUI with its norm corrected", "pull request 15458"),
    "forge": RegistryEntry("forge.TOOL", "Forge", "2025-06 (dfdcbab)"),
    "lycoris": RegistryEntry("lycoris.TOOL", "LyCORIS and sd-scripts", "4.1.3"),
    "a1111": RegistryEntry("a1111.TOOL", "AUTOMATIC1111", "1.10"),
    "sdnext": RegistryEntry("sdnext.TOOL", "SD.Next", "2026-07 (058a7f0)"),
    "sdnext-2025": RegistryEntry("sdnext.TOOL_2025", "older SD.Next", "before 2026-07 (387a349)"),
    "invokeai": RegistryEntry("invokeai.TOOL", "InvokeAI", "2026-08 (8e71a8a)"),
}
NO_DORA = {"vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp"}  # serve models, and load plain LoRA alone
OTHER_TOOLS = tuple(name for name in TOOLS if name not in ("dora_mm", "bare"))  # of `verify`
TARGETS = {  # of `convert`
    "peft": RegistryEntry("peft.EXPORT", "a folder of PEFT"),
    "diffusers": RegistryEntry("diffusers.EXPORT", "pytorch_lora_weights.safetensors of diffusers"),
    "kohya": RegistryEntry("lycoris.EXPORT", "LyCORIS, sd-scripts and SD.Next"),
    "comfy": RegistryEntry("", "two files for any version of ComfyUI"),
    "comfy-2025": RegistryEntry("comfy.EXPORT_2025", "one file for ComfyUI, reForge and Forge as they are"),
    "comfy-15458": RegistryEntry("comfy.EXPORT_15458", "one file for ComfyUI with its norm corrected (pull 15458)"),
    "diff": RegistryEntry("comfy.EXPORT_DIFF", "the change of each weight: large, and read by all web UIs"),
    "lora": RegistryEntry("", "plain LoRA, which keeps as much as --rank or --energy says"),
    "merged": RegistryEntry("", "a copy of the model with the new weights"),
    "onetrainer": RegistryEntry("onetrainer.EXPORT", "to go on with training in OneTrainer"),
    "ai-toolkit": RegistryEntry("ai_toolkit.EXPORT", "to go on with training in ai-toolkit"),
}
WRITTEN_FOR = {  # the target that a program reads, by names that people give it
    **dict.fromkeys(("a1111", "automatic1111", "webui", "sd-webui", "invokeai"), "diff"),
    **dict.fromkeys(("forge", "reforge"), "comfy-2025"),
    "comfyui": "comfy",
    **dict.fromkeys(("lycoris", "sd-scripts", "sdnext"), "kohya"),
}


def no_entry(kind: str, name: str, known: str) -> str:
    """The message for a tool or target that is not here; for a program without DoRA it has the way out."""
    if program := NO_DORA.get(name.lower()):
        return (
            f"{program} loads no DoRA: merge the adapter into its model with dora-mm merge MODEL ADAPTER OUT, or make "
            "a plain LoRA with dora-mm convert IN OUT --to lora --rank 32 --base MODEL"
        )
    if kind == "target" and (target := WRITTEN_FOR.get(name.lower())):
        return f"there is no target {name!r}: what it reads is written with --to {target}"
    return f"there is no {kind} {name!r}: use {known}"


class Style(NamedTuple):
    """How the names of a component begin, and whether the network's own path follows instead of diffusers'."""

    prefix: str
    own: bool = False


_NETWORKS = ("unet", "transformer")
_TEXT = ("text_encoder", "text_encoder_2")
_KOHYA_TEXT = {"text_encoder": Style("lora_te1_"), "text_encoder_2": Style("lora_te2_")}
SPELLINGS: dict[str, dict[str, Style]] = {
    "diffusers": {component: Style(f"{component}.") for component in (*_NETWORKS, *_TEXT)},
    "peft": dict.fromkeys(("model", *_NETWORKS, *_TEXT), Style("base_model.model.")),
    "kohya": {**dict.fromkeys(_NETWORKS, Style("lora_unet_", own=True)), **_KOHYA_TEXT},
    "onetrainer": {"unet": Style("lora_unet_"), "transformer": Style("lora_transformer_"), **_KOHYA_TEXT},
    "ai-toolkit": {"unet": Style("lora_unet_"), "transformer": Style("transformer."), **_KOHYA_TEXT},
}
