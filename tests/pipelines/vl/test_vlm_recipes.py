"""Each recipe of configs/vlm takes two steps on a tiny model of its class, with its own settings."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.config.paths import resolve_path
from dora_mm.train.metrics import read_metrics
from tests.shared.data.vl_files import vqa_annotation, vqa_question, write_json
from tests.shared.vl.recipe_models import MODELS

COLOURS = ("red", "green", "blue", "yellow")


def save_image(path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def chat(folder: Path) -> dict[str, Path]:
    """Conversations in LLaVA's shape, and their images."""
    rows = []
    for number, colour in enumerate(COLOURS):
        save_image(folder / f"{number}.png", number)
        turns = [("human", "<image>\nWhat colour is the ball?"), ("gpt", f"The ball is {colour}.")]
        said = [{"from": who, "value": text} for who, text in turns]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    return {"file": write_json(folder / "chat.json", rows), "images": folder}


def vqa_v2(folder: Path) -> dict[str, Path]:
    """Questions and answers in the official files of VQA v2, and their images."""
    numbers = range(len(COLOURS))
    questions = [vqa_question(number, question="What colour is the ball?") for number in numbers]
    annotations = [vqa_annotation(number, [COLOURS[number]] * 10) for number in numbers]
    for image in {question["image_id"] for question in questions}:
        save_image(folder / f"COCO_val2014_{image:012d}.jpg", image)
    about = {"data_type": "mscoco", "data_subtype": "val2014"}
    return {
        "file": write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", about | {"questions": questions}),
        "annotations": write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations}),
        "images": folder,
    }


def test_there_is_a_model_for_every_recipe() -> None:
    assert {path.stem for path in resolve_path("configs/vlm").glob("*.yaml")} >= set(MODELS)


def train(recipe: str, model: Path, folder: Path, precision: dict[str, str]) -> Path:
    """Two steps of a recipe on a model, with data made for it; returns the run directory."""
    path = f"configs/vlm/{recipe}.yaml"
    of_chat = load_config(path).data.task == "chat"
    source = chat(folder) if of_chat else vqa_v2(folder)
    splits = ("train",) if of_chat else ("train", "valid")  # of conversations a share is held out
    settings = {
        "model.path": model,
        "train.steps": 2,
        "train.epochs": "null",
        "train.log_every": 1,
        "evaluate.max_new_tokens": 4,  # random weights do not stop
        "output": folder / "run",
        "data.tables": folder / "tables",
    }
    settings |= {f"data.{split}.{key}": value for split in splits for key, value in source.items()}
    assert main(["train", path, "--set", *(f"{key}={value}" for key, value in (settings | precision).items())]) == 0
    return folder / "run"


FAST = ("florence2_base", "qwen3_5_27b")


@pytest.mark.parametrize("recipe", [r if r in FAST else pytest.param(r, marks=pytest.mark.slow) for r in MODELS])
def test_it_trains_two_steps(recipe: str, tiny_vlm: Callable[[str], Path], tmp_path: Path) -> None:
    exact = {"model.dtype": "float32", "train.mixed_precision": '"no"'}
    run = train(recipe, tiny_vlm(MODELS[recipe]), tmp_path, exact)
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in rows)
    (adapter,) = (run / "adapter").glob("*.safetensors")
    updates = {name: tensor for name, tensor in load_file(adapter).items() if "lora_B" in name}
    assert updates
    assert all(tensor.any() for tensor in updates.values())


def test_a_part_trained_itself_is_float32_beside_half_precision(
    tiny_vlm: Callable[[str], Path], tmp_path: Path
) -> None:
    run = train("llava_1_5_7b", tiny_vlm("llava"), tmp_path, {"train.gradient_accumulation_steps": "1"})
    (adapter,) = (run / "adapter").glob("*.safetensors")
    projector = {name: tensor for name, tensor in load_file(adapter).items() if "multi_modal_projector" in name}
    assert len(projector) == 4
    assert {tensor.dtype for tensor in projector.values()} == {torch.float32}
