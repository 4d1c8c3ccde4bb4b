"""The tools whose adapter files are read, and the export formats that `convert` writes, by name."""

from __future__ import annotations

from typing import NamedTuple

from dora_mm.registries.registry import Registry

_TOOLS = "dora_mm.formats.tools"


class ToolRecord(NamedTuple):
    """A program that loads adapter files, or a form of them.

    Attributes:
        title: Its display name.
        tool: The import path of its `Tool`, `module:object`; empty where it loads plain LoRA alone.
        version: The version whose rules are written down: a release, or the month and commit of its code.
        export_format: The export format that its name stands for.
        aliases: Other names that people give it.
    """

    title: str
    tool: str = ""
    version: str = ""
    export_format: str = ""
    aliases: tuple[str, ...] = ()


class ExportFormat(NamedTuple):
    """A format of files that `convert` writes.

    Attributes:
        title: What it is, and who reads it.
        export: The import path of its `Export`; empty where `convert` makes it of others.
    """

    title: str
    export: str = ""


_BUILT_IN = {
    "native": ToolRecord("dora_mm (native)", f"{_TOOLS}.native:TOOL"),
    "onetrainer": ToolRecord("OneTrainer", f"{_TOOLS}.onetrainer:TOOL", "2026-08 (23df383)"),
    "ai-toolkit": ToolRecord("ai-toolkit", f"{_TOOLS}.ai_toolkit:TOOL", "2026-08"),
    "peft": ToolRecord("PEFT", f"{_TOOLS}.peft:TOOL", "0.21.2"),
    "diffusers": ToolRecord("diffusers", f"{_TOOLS}.diffusers:TOOL", "0.42.1"),
    "comfy": ToolRecord(
        "ComfyUI and reForge", f"{_TOOLS}.comfy:TOOL", "2026-08 (783545f)", "comfy", ("comfyui", "reforge")
    ),
    "bare": ToolRecord("files without a prefix", f"{_TOOLS}.bare:TOOL"),
    "forge": ToolRecord("Forge", f"{_TOOLS}.forge:TOOL", "2025-06 (dfdcbab)", "comfy"),
    "kohya": ToolRecord("LyCORIS and sd-scripts", f"{_TOOLS}.kohya:TOOL", "4.1.3", "kohya", ("lycoris", "sd-scripts")),
    "a1111": ToolRecord(
        "AUTOMATIC1111", f"{_TOOLS}.a1111:TOOL", "1.10.1", "diff", ("automatic1111", "webui", "sd-webui")
    ),
    "sdnext": ToolRecord("SD.Next", f"{_TOOLS}.sdnext:TOOL", "2026-07 (058a7f0)", "kohya"),
    "invokeai": ToolRecord("InvokeAI", f"{_TOOLS}.invokeai:TOOL", "2026-08 (8e71a8a)", "diff"),
    "musubi": ToolRecord("musubi-tuner", f"{_TOOLS}.musubi:TOOL", "2026-06 (30c658c)", "lora", ("musubi-tuner",)),
    "vllm": ToolRecord("vLLM"),
    "sglang": ToolRecord("SGLang"),
    "llama.cpp": ToolRecord("llama.cpp"),
}
_MOST_USED = ("comfy", "diffusers", "forge", "kohya")
TOOLS = Registry("tools", "tool", _BUILT_IN)
EXPORT_FORMATS = Registry(
    "export_formats",
    "export format",
    {
        "peft": ExportFormat("a folder of PEFT", f"{_TOOLS}.peft:EXPORT"),
        "diffusers": ExportFormat("pytorch_lora_weights.safetensors of diffusers", f"{_TOOLS}.diffusers:EXPORT"),
        "kohya": ExportFormat("LyCORIS, sd-scripts and SD.Next", f"{_TOOLS}.kohya:EXPORT"),
        "comfy": ExportFormat("one file for ComfyUI, reForge and Forge", f"{_TOOLS}.comfy:EXPORT"),
        "diff": ExportFormat(
            "the change of each weight: large, and read by all web UIs", f"{_TOOLS}.comfy:EXPORT_DIFF"
        ),
        "lora": ExportFormat("plain LoRA, which keeps as much as --rank or --energy says"),
        "merged": ExportFormat("a copy of the model with the new weights"),
        "onetrainer": ExportFormat("to go on with training in OneTrainer", f"{_TOOLS}.onetrainer:EXPORT"),
        "ai-toolkit": ExportFormat("to go on with training in ai-toolkit", f"{_TOOLS}.ai_toolkit:EXPORT"),
    },
)


def readers() -> list[str]:
    """The tools whose files are read, in the order in which a file is matched against them.

    Those of other packages come first: their own keys would be taken for parts of a common form.
    """
    return sorted((name for name, record in TOOLS.items() if record.tool), key=_BUILT_IN.__contains__)


def other_tools() -> tuple[str, ...]:
    """The tools that `verify` judges, most used ones first; not this one, nor a form that belongs to none."""
    names = (name for name, record in TOOLS.items() if record.tool and name not in ("native", "bare"))
    return tuple(sorted(names, key=lambda name: _MOST_USED.index(name) if name in _MOST_USED else len(_MOST_USED)))


def tool_called(name: str) -> str:
    """The key of a tool by any of its names; the name itself where there is none."""
    return next((key for key, record in TOOLS.items() if name.lower() in (key, *record.aliases)), name)


def no_entry(kind: str, name: str, known: str) -> str:
    """The message for a tool or export format that is not here; for a program without DoRA it has the way out."""
    record = TOOLS.get(tool_called(name))
    if record and not record.tool:
        return (
            f"{record.title} loads no DoRA: merge the adapter into its model with dora-mm merge MODEL ADAPTER OUT, or "
            "make a plain LoRA with dora-mm convert IN OUT --to lora --rank 32 --base MODEL"
        )
    if kind == "export format" and record and record.export_format:
        return f"there is no export format {name!r}: what it reads is written with --to {record.export_format}"
    return f"there is no {kind} {name!r}: use {known}"
