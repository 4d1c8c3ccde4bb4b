"""The content digest of an adapter, by which images, answers and runs identify it however its file was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dora_mm.formats.adapter_file import AdapterFile, located
from dora_mm.formats.tokens import EXTRA_FILE_KEY
from dora_mm.formats.tools import tool_of
from dora_mm.utils.digest import weights_digest
from dora_mm.utils.json_text import parse_json

_SETTINGS = ("method", "rank", "alpha", "use_dora")  # in headers, beside what only a training reads


def adapter_digest(source: Path | AdapterFile) -> str:
    """SHA-256, in hex, over the tensors of an adapter file and the settings that are computed with.

    The rest of its header (which model it was trained on, and how) does not count, nor how it is written.

    Args:
        source: The file of any tool, or a folder that contains exactly one.

    Raises:
        ValueError: There is no such file, it is damaged, or its header is.
    """
    file = source if isinstance(source, AdapterFile) else AdapterFile(source)
    tool = tool_of(file.tool)
    modules = {}
    for module in sorted(file.modules):
        known = {} if file.is_parameter(module) else dict(file.settings(module))
        with located(str(file.path)):
            alpha = file.parts(module, tool, file.shape_of).get("alpha")
        settings = {key: known[key] for key in _SETTINGS if key in known}
        modules[module] = [settings, None if alpha is None else float(alpha), file.transposed(module)]
    unties = tool.in_header.unties
    parameters = {key: [*name, unties(file.header, name)] for key, name in sorted(file.parameters.items())}
    words = parse_json(
        file.header.get(EXTRA_FILE_KEY, "{}"), f"its header key {EXTRA_FILE_KEY}"
    )  # checked with the file
    about = [file.tool, weights_digest([file.path]), modules, parameters, words]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
