"""The models and data of PEFT's method comparison as plain files in one folder, which needs no network afterwards.

python -m tests.benchmarks.gpu.published.inputs FOLDER      # 30 GB, by `huggingface_hub` and `datasets`

FOLDER/models/<owner>--<name>/     Llama-3.2-3B, FLUX.2-klein-base-4B, dinov2-base
FOLDER/metamathqa.jsonl            the first 20,000 rows of MetaMathQA with at most 1,300 characters
FOLDER/gsm8k_valid.jsonl           the 50 rows of the training part of GSM8K that PEFT validates on
FOLDER/gsm8k_test.jsonl            its test part
FOLDER/wiki.jsonl                  100 texts of Wikipedia, on whose loss forgetting is measured
FOLDER/cats/<number>.png           the 20 images of the cat, in their order
FOLDER/revisions.json              the commit and the date of each model and data set
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELS = ("meta-llama/Llama-3.2-3B", "black-forest-labs/FLUX.2-klein-base-4B", "facebook/dinov2-base")
DATA = {"metamath": "meta-math/MetaMathQA", "gsm8k": "openai/gsm8k", "cats": "peft-internal-testing/cat-image-dataset"}
WIKI = "HuggingFaceFW/finewiki"
NUM_ROWS, NUM_VALIDATION, NUM_TEXTS, MOST_CHARACTERS = 20_000, 50, 100, 1300
COMMAND = "python -m tests.benchmarks.gpu.published.inputs FOLDER"


@dataclass(frozen=True)
class Inputs:
    """A folder of inputs."""

    folder: Path

    def missing(self, *names: str) -> list[str]:
        """Those of some files and models that are not there."""
        return [name for name in names if not (self.model(name) if "/" in name else self.folder / name).exists()]

    def model(self, name: str) -> Path:
        return self.folder / "models" / name.replace("/", "--")

    def rows(self, name: str) -> list[tuple[str, str]]:
        """Questions and answers."""
        return [(row["query"], row["response"]) for row in self._lines(name)]

    def texts(self, name: str) -> list[str]:
        return [row["text"] for row in self._lines(name)]

    def images(self) -> list[Path]:
        return sorted((self.folder / "cats").glob("*.png"))

    def revision(self, name: str) -> dict[str, str | None]:
        """The commit and date of a model or data set, None where they are not known."""
        path = self.folder / "revisions.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        return known.get(name, {"sha": None, "created_at": None})

    def _lines(self, name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]


def download(folder: Path) -> None:
    """Makes a folder of inputs from the Hugging Face Hub."""
    from datasets import load_dataset
    from huggingface_hub import HfApi, snapshot_download

    inputs, hub = Inputs(folder), HfApi()
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        snapshot_download(name, local_dir=inputs.model(name))
    gsm8k = load_dataset(DATA["gsm8k"], "main")
    write_lines(folder / "metamathqa.jsonl", short_rows(load_dataset(DATA["metamath"])["train"]))
    write_lines(folder / "gsm8k_valid.jsonl", validation_rows([row_of(each) for each in gsm8k["train"]]))
    write_lines(folder / "gsm8k_test.jsonl", (row_of(each) for each in gsm8k["test"]))
    wiki = load_dataset(WIKI, split="train", streaming=True).take(NUM_TEXTS)
    write_lines(folder / "wiki.jsonl", ({"text": each["text"]} for each in wiki))
    (folder / "cats").mkdir(exist_ok=True)
    for number, row in enumerate(load_dataset(DATA["cats"], split="train")):
        row["image"].convert("RGB").save(folder / "cats" / f"{number:02d}.png")
    abouts = {name: hub.model_info(name) for name in MODELS} | {name: hub.dataset_info(name) for name in DATA.values()}
    found = {name: {"sha": each.sha, "created_at": each.created_at.isoformat()} for name, each in abouts.items()}
    (folder / "revisions.json").write_text(json.dumps(found, indent=2) + "\n")


def short_rows(rows: Iterable[Any]) -> list[dict[str, str]]:
    """The first rows of MetaMathQA that are short enough; a training takes no more."""
    short = (each for each in rows if len(f"{each['query']} {each['response']}") <= MOST_CHARACTERS)
    return [
        {"query": each["query"], "response": each["response"]} for each, _ in zip(short, range(NUM_ROWS), strict=False)
    ]


def row_of(row: Any) -> dict[str, str]:
    return {"query": row["question"], "response": row["answer"]}


def validation_rows(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those that PEFT takes of the training part of GSM8K."""
    return [rows[index] for index in shuffled(len(rows))[:NUM_VALIDATION]]


def shuffled(count: int) -> list[int]:
    """The order in which PEFT divides rows: NumPy's own shuffle with the seed 0."""
    import numpy as np

    order = np.arange(count)
    np.random.RandomState(0).shuffle(order)
    return order.tolist()


def write_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the inputs go")
    download(parser.parse_args().folder)
