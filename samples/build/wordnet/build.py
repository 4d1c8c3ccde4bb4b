"""python -m samples.build wordnet: questions about the nouns of WordNet, in build/wordnet; replaces existing ones.

    train.json                         rows of all three kinds, for the task `commonsense`
    {boolq,hellaswag,arc_easy}.json    rows to score, about other nouns, in the layouts of the tasks of these names
    alone/                             the same files without the noun or kind that a row is about

It has no config: the same package gives the same files again.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from samples.build.packages import ROOT, WORDNET, check_tools, write_changed
from samples.build.wordnet.nouns import Noun, read_nouns
from samples.build.wordnet.questions import KINDS, Row, make_rows

FOLDER = ROOT / "build" / "wordnet"
LEAST = 3  # times that a noun is in WordNet's tagged texts: a small model knows little of others
TRAINED, SCORED = 1200, 400  # rows of a kind
SHARE_SCORED = 0.3  # of the nouns
SEED = 0


def main(folder: Path = FOLDER) -> None:
    """Writes all rows.

    Raises:
        ValueError: WordNet is not installed.
    """
    check_tools(["WordNet"])
    write_rows(folder, read_nouns(WORDNET, LEAST), TRAINED, SCORED)


def write_rows(folder: Path, nouns: Sequence[Noun], num_trained: int, num_scored: int) -> None:
    """Writes rows to train on and rows to score, which ask about different nouns.

    Raises:
        ValueError: There are too few nouns.
    """
    shuffled = random.Random(SEED).sample(nouns, len(nouns))
    held_out = round(SHARE_SCORED * len(nouns))
    trained = [row for kind in KINDS for row in make_rows(kind, shuffled[held_out:], num_trained, SEED)]
    _write(folder, "train", random.Random(SEED).sample(trained, len(trained)))
    for kind in KINDS:
        _write(folder, kind, make_rows(kind, shuffled[:held_out], num_scored, SEED))


def _write(folder: Path, name: str, rows: Sequence[Row]) -> None:
    for where, hidden in ((folder, False), (folder / "alone", True)):
        content = json.dumps([row.as_json(hidden=hidden) for row in rows], indent=1)
        write_changed(where / f"{name}.json", f"{content}\n".encode())
