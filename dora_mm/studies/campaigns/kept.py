"""The circumstances of what a campaign keeps: rows of trainings, runs, and files of scores and answers."""

import json
from pathlib import Path

from dora_mm.studies.campaigns.training_rows import TrainingRows, as_cells
from dora_mm.studies.campaigns.trainings import Trainings
from dora_mm.utils.atomic import write_text
from dora_mm.utils.circumstances import NOTHING, about_differing, circumstances, differences
from dora_mm.utils.json_text import read_json

ANSWERS, SCORES = "answers", "scores"  # folders of a campaign
FOLDER = "circumstances"  # the file answers/NAME.json in it has the circumstances of answers/NAME.json


def keep_circumstances(file: Path) -> None:
    """Writes the circumstances of a file of answers or scores, ahead of the file itself."""
    write_text(_record_of(file), json.dumps(circumstances(), indent=2) + "\n")


def about_results(trainings: Trainings, rows: TrainingRows) -> str:
    """A sentence on the rows, runs and files that were computed under other circumstances; empty: none were."""
    found = [differences(row.circumstances, as_cells([trainings.now])) for row in rows.found.values()]
    for run in sorted((trainings.folder / "runs").glob("*")):
        if run.name not in rows.found and (steps := trainings.circumstances(run.name)):
            found.append([each for record in steps for each in differences(record, trainings.now)])
    files = (file for name in (ANSWERS, SCORES) for file in sorted((trainings.folder / name).glob("*.json")))
    records = [read_json(record) if (record := _record_of(file)).is_file() else NOTHING for file in files]
    found += [differences(record, circumstances()) for record in records]
    return about_differing([(each, 1) for each in found], "kept trainings, scores and answers")


def _record_of(file: Path) -> Path:
    return file.parent.parent / FOLDER / file.parent.name / file.name
