"""Other tools: how each names the tensors of an adapter, and what weight it computes from them.

To add a tool, write a module in this folder with a `Tool`, and an `Export` if `convert` should write for it, and add
them to the dictionaries.
"""

from __future__ import annotations

from dora_mm.formats.tools import (
    a1111,
    ai_toolkit,
    comfy,
    diffusers,
    invokeai,
    lycoris,
    native,
    nvlabs,
    onetrainer,
    peft,
    sdnext,
)
from dora_mm.formats.tools.tool import Export, Tool

TOOLS: dict[str, Tool] = {  # files are recognised by the first that matches
    "dora_mm": native.TOOL,
    "nvlabs": nvlabs.TOOL,
    "onetrainer": onetrainer.TOOL,
    "ai-toolkit": ai_toolkit.TOOL,
    "peft": peft.TOOL,
    "diffusers": diffusers.TOOL,
    "comfy-2025": comfy.TOOL_2025,
    "comfy-15458": comfy.TOOL_15458,
    "lycoris": lycoris.TOOL,
    "a1111": a1111.TOOL,
    "sdnext": sdnext.TOOL,
    "invokeai": invokeai.TOOL,
}
EXPORTS: dict[str, Export] = {
    "peft": peft.EXPORT,
    "diffusers": diffusers.EXPORT,
    "kohya": lycoris.EXPORT,
    "comfy-2025": comfy.EXPORT_2025,
    "comfy-15458": comfy.EXPORT_15458,
    "diff": comfy.EXPORT_DIFF,
    "onetrainer": onetrainer.EXPORT,
    "ai-toolkit": ai_toolkit.EXPORT,
}
FORMATS = {"diffusers": diffusers.EXPORT, "peft": peft.EXPORT, "native": native.EXPORT}  # of `save_adapter`
