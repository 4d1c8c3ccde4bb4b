"""The circumstances of the scores and answers that a campaign keeps in its folder, a file each."""

import json
from pathlib import Path

from dora_mm.utils.atomic import write_text
from dora_mm.utils.circumstances import NOTHING, Record, circumstances
from dora_mm.utils.json_text import read_json

ANSWERS, SCORES = "answers", "scores"  # folders of a campaign
FOLDER = "circumstances"  # has those of answers/NAME.json in answers/NAME.json


def keep_circumstances(file: Path) -> None:
    """Writes down under which circumstances a file of answers or scores is computed, which is written after it."""
    write_text(_beside(file), json.dumps(circumstances(), indent=2) + "\n")


def kept_circumstances(campaign: Path) -> list[Record]:
    """Those of each file of answers and scores in the folder of a campaign; none where they were not written down."""
    files = (file for name in (ANSWERS, SCORES) for file in sorted((campaign / name).glob("*.json")))
    return [read_json(beside) if (beside := _beside(file)).is_file() else NOTHING for file in files]


def _beside(file: Path) -> Path:
    return file.parent.parent / FOLDER / file.parent.name / file.name
