"""dora-mm schema: the JSON schema of config files, for editors and other programs."""

import json
from pathlib import Path

from dora_mm.config.descriptions import json_schema
from dora_mm.utils.atomic import write_text


def main(*, output: Path | None = None) -> None:
    """Prints the schema.

    Args:
        output: A file to write it to instead, which is replaced.
    """
    text = f"{json.dumps(json_schema(), indent=1, ensure_ascii=False)}\n"
    if output is None:
        print(text, end="")
    else:
        write_text(output, text)
