"""dora-mm convert: an adapter file in the form of another tool, checked with that tool's formula."""

from typing import Any

from dora_mm.config.paths import resolve_adapter, resolve_model
from dora_mm.formats.commands.conversion_text import conversion_text
from dora_mm.formats.commands.convert import convert
from dora_mm.models.opening import base_of
from dora_mm.utils.home import expanded


def main(source: str, out: str, to: str, *, base: str | None = None, **settings: Any) -> None:
    """Converts a file, and prints what the tools compute from the result.

    Args:
        source: An adapter file of any tool, its folder or run directory.
        out: A file that ends in .safetensors, or a folder.
        to: A name in `dora_mm.registries.tools.EXPORT_FORMATS`.
        base: The model: a folder, a single-file checkpoint or a hub name; None: the one that the file
            names, where it is on this machine.
        settings: The other arguments of `dora_mm.formats.commands.convert.convert`.

    Raises:
        ValueError: The adapter, the model or a setting cannot be used, or the format cannot hold the adapter.
    """
    file = resolve_adapter(source, "IN")
    model = base_of(file) if base is None else resolve_model(base, "--base")
    done = convert(file, expanded(out), to=to, base=model, **settings)
    if base is None and model is not None:
        print(f"base     {model}, as the header says")
    print(conversion_text(done, to))
