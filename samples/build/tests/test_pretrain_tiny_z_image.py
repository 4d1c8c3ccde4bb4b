"""The pretraining of the small Z-Image: a few steps, which diffusers loads and a resumed run repeats exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, ZImagePipeline
from PIL import Image
from safetensors.torch import load_file

from dora_mm.eval.images.classifier import Classifier
from dora_mm.eval.images.concepts import Concept
from dora_mm.formats.files.model_folder import ModelFolder
from dora_mm.models.images.sdxl.random_weights import build_vae
from dora_mm.models.images.z_image import ZImage
from samples.build.__main__ import main
from samples.build.icons.sets import read_concepts
from samples.build.packages import SAMPLES
from samples.build.pretraining.flow_training import of_things, short_caption
from samples.build.pretraining.icons import DEFAULT_STYLE, Icon, caption
from samples.build.pretraining.tiny_flow import save
from samples.build.pretraining.tiny_z_image import build_tiny_z_image, encode
from samples.build.recipes.pretrain_tiny_z_image import GROUP

CAPTIONS = ["a flat icon of a bus", "a bus", "an icon of a very long owl, in the style of zool", ""]
PARTS = ("transformer", "text_encoder")
NAMES = {"bus": "lego", "owl": "report", "key": "report", "tent": "report", "rose": "tune", "lock": None}


@pytest.fixture(scope="module")
def model():
    return build_tiny_z_image(build_vae(64, (8, 8, 8, 8), 8), CAPTIONS, num_merges=40, width=48).freeze()


@pytest.fixture
def config(tmp_path):
    """Writes configs, for six things."""
    folder = tmp_path / "icons"
    (folder / DEFAULT_STYLE).mkdir(parents=True)
    concepts = []
    for index, (name, role) in enumerate(NAMES.items()):
        split = "pretrain" if role else "judge"
        concepts.append({"code": f"1f68{index}", "name": name, "group": "Things", "split": split, "role": role})
        noise = np.random.default_rng(index).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / DEFAULT_STYLE / f"1f68{index}.webp")
    (folder / "concepts.json").write_text(json.dumps(concepts))
    build_vae(64, (8, 8, 8, 8), 8).save_pretrained(tmp_path / "vae")

    def write(name):
        values = {
            "pipeline": "pretrain_tiny_z_image",
            "output": str(tmp_path / name),
            "icons": str(folder),
            "vae": str(tmp_path / "vae"),
            "reported": 2,
            "model": {"num_merges": 40, "width": 48, "layers": 1},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 3, "batch_size": 2, "checkpoint_every": 1, "keep_checkpoints": 9},
            "ema_decay": 0.5,
            "sample": {"prompts": ["a flat icon of a bus"], "steps": 2, "every": 2},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def weights(run):
    return {part: load_file(next((run / "tiny-z-image" / part).glob("*.safetensors"))) for part in PARTS}


def test_captions_are_encoded_in_a_batch_as_one_by_one_and_with_gradients(model):
    model.text_encoder.requires_grad_(True)
    together, alone = encode(model, CAPTIONS), model.encode_prompts(CAPTIONS)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one["text"], other["text"], atol=1e-6, rtol=1e-5)
    torch.cat([each["text"] for each in together]).sum().backward()
    assert model.text_encoder.embed_tokens.weight.grad.abs().sum() > 0


def test_the_tokenizer_keeps_every_text(model):
    for text in ("a flat icon of a bus", "Ünknown <|im_end|> 数\n"):
        assert model.tokenizer.decode(model.tokenizer(text).input_ids) == text
    turn = model.tokenizer.apply_chat_template([{"role": "user", "content": "a bus"}], tokenize=False, **model.chat)
    assert turn == "<|im_start|>user\na bus<|im_end|>\n<|im_start|>assistant\n"


def test_a_saved_model_has_the_scheduler_of_the_base_model_and_no_weights_of_the_vae(model, tmp_path):
    save(model, tmp_path)
    assert ZImage.distilled(ModelFolder(tmp_path)) is None
    assert not list((tmp_path / "vae").glob("*.safetensors"))
    stored = {part: load_file(next((tmp_path / part).glob("*.safetensors"))) for part in PARTS}
    assert {tensor.dtype for part in stored.values() for tensor in part.values()} == {torch.float16}


def test_no_caption_takes_a_second_group_of_tokens(model):
    stream = torch.Generator().manual_seed(0)
    icon = Icon(Concept("1f6f8", "flying saucer", "Things", "judge"), DEFAULT_STYLE, Path())
    lengths = [model.num_tokens(caption(icon, stream, 0.75)) for _ in range(200)]
    short = [model.num_tokens(short_caption(model, icon, stream, 0.75, GROUP)) for _ in range(200)]
    assert max(short) <= GROUP < max(lengths)


def test_the_things_are_those_of_the_brick_images_and_those_that_an_evaluation_chooses():
    classifier = Classifier.load(SAMPLES / "judge")
    concepts = [c for c in read_concepts(SAMPLES / "concepts.jsonl") if c.split == "pretrain"]
    icons = of_things([Icon(concept, DEFAULT_STYLE, Path()) for concept in concepts], 48)
    assert [icon.concept for icon in icons] == [*classifier.choose("lego"), *classifier.choose("report", 48)]
    assert set(classifier.choose("report", 24)) < {icon.concept for icon in icons}


@pytest.mark.slow
def test_plain_diffusers_loads_the_model_and_resuming_is_exact(config, tmp_path):
    assert main(["train", str(config("whole"))]) == 0
    run = tmp_path / "whole"
    folder = run / "tiny-z-image"
    pipe = ZImagePipeline.from_pretrained(folder, vae=AutoencoderKL.from_pretrained(tmp_path / "vae"))
    assert pipe.text_encoder.dtype == pipe.transformer.dtype == torch.float32
    assert pipe("an owl", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)
    assert Image.open(run / "sheet.png").width > 100
    stored = weights(run)

    assert main(["train", str(config("parts"))]) == 0
    run = tmp_path / "parts"
    for step in (2, 3):  # as if it had been killed in the second step
        checkpoint = run / "checkpoints" / f"step-{step:06d}"
        checkpoint.rename(checkpoint.with_name("gone-" + checkpoint.name))
    assert main(["train", "--resume", str(run)]) == 0
    for part, tensors in weights(run).items():
        assert all(torch.equal(tensor, stored[part][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(("key", "value"), [("model.width", 50), ("icons", "nowhere"), ("vae", "nowhere")])
def test_a_persons_mistake_is_named(config, tmp_path, capsys, key, value):
    assert main(["train", str(config("run")), "--set", f"{key}={value}"]) == 2
    assert key.split(".")[-1] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
