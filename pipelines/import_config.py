"""dora-mm import: a config of another trainer as one of ours, with what differs and what has no equal."""

import shlex
from pathlib import Path

from dora_mm.config import run_name
from dora_mm.config.importing import translate
from dora_mm.utils.atomic import write_atomically
from dora_mm.utils.home import expanded


def main(file: Path, *, output: str | None = None) -> None:
    """Writes the config, and prints what a person has to know of it.

    Args:
        file: A config file of another trainer, or a text file with its command line.
        output: The new file; None: the name of `file` with .yaml, in the current directory.

    Raises:
        ValueError: The file cannot be read, is of no known trainer, or the new file exists.
    """
    source = expanded(file)
    target = expanded(output or f"{run_name(source)}.yaml")
    translation = translate(source)
    text = translation.text(source, target)
    write_atomically(target, lambda partial: partial.write_text(text, encoding="utf-8"), is_new=True)
    for title, lines in translation.report().items():
        print(f"{title}:", *(f"  {line}" for line in lines), sep="\n")
    print(f"written   {target}\nnext\n  dora-mm train {shlex.quote(str(target))} --dry-run")
