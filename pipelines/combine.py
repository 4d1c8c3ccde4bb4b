"""dora-mm combine: several adapters as one, checked with the formula of the tool that it is for."""

from collections.abc import Sequence
from typing import Any

from dora_mm.config.paths import resolve_adapter, resolve_model
from dora_mm.formats.commands.combine import combine
from dora_mm.formats.commands.conversion_text import conversion_text
from dora_mm.models.opening import base_of
from dora_mm.utils.home import expanded


def main(sources: Sequence[str], out: str, to: str, *, base: str | None = None, **settings: Any) -> None:
    """Combines files, and prints what the tools compute from the result.

    Args:
        sources: Adapter files of any tool, their folders or run directories.
        out: A file that ends in .safetensors, or a folder.
        to: A name in `dora_mm.registries.tools.EXPORT_FORMATS`.
        base: The model: a folder, a single-file checkpoint or a hub name; None: the one that all files name, where it
            is on this machine.
        settings: The other arguments of `dora_mm.formats.commands.combine.combine`.

    Raises:
        ValueError: An adapter, the model or a setting cannot be used, the adapters do not belong together, or the
            format cannot hold their sum.
    """
    files = [resolve_adapter(source, "A") for source in sources]
    named = {base_of(file) for file in files}
    model = resolve_model(base, "--base") if base is not None else named.pop() if len(named) == 1 else None
    done = combine(files, expanded(out), to=to, base=model, **settings)
    if base is None and model is not None:
        print(f"base     {model}, as the headers say")
    print(conversion_text(done, to))
