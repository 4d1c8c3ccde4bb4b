"""The pretraining of the small FLUX.2 klein: its pairs, and a few steps, which diffusers loads and a run repeats."""

import json

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from PIL import Image
from safetensors.torch import load_file

from dora_mm.models.images.sdxl.random_weights import build_vae
from samples.build.__main__ import main
from samples.build.pretraining import pairs
from samples.build.pretraining.icons import DEFAULT_STYLE
from samples.build.pretraining.tiny_klein import build_tiny_klein, encode, rotary_sizes
from samples.build.recipes.pretrain_tiny_klein import draw_pairs

CAPTIONS = ["a flat icon of a bus", "make it grey", ""]
PARTS = ("transformer", "text_encoder")
NAMES = {"bus": "lego", "owl": "report", "key": "report", "tent": "report"}
WHITE, RED = (255, 255, 255), (200, 0, 0)


def klein_vae():
    """A VAE with random weights of the embedded SDXL model's form, read by klein's class as that one is."""
    vae = build_vae(64, (8, 8, 8, 8), 8)
    known = AutoencoderKLFlux2._get_init_keys(AutoencoderKLFlux2)
    config = {name: value for name, value in vae.config.items() if name in known and name[0] != "_"}
    found = AutoencoderKLFlux2(**config)
    found.load_state_dict({**found.state_dict(), **vae.state_dict()})
    return found


@pytest.fixture(scope="module")
def model():
    return build_tiny_klein(klein_vae(), CAPTIONS, num_merges=40, width=24, heads=2).freeze()


@pytest.fixture
def config(tmp_path):
    """Writes configs, for four things."""
    folder = tmp_path / "icons"
    (folder / DEFAULT_STYLE).mkdir(parents=True)
    concepts = []
    for index, (name, role) in enumerate(NAMES.items()):
        concepts.append({"code": f"1f68{index}", "name": name, "group": "Things", "split": "pretrain", "role": role})
        noise = np.random.default_rng(index).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / DEFAULT_STYLE / f"1f68{index}.webp")
    (folder / "concepts.json").write_text(json.dumps(concepts))
    klein_vae().save_pretrained(tmp_path / "vae")

    def write(name):
        values = {
            "pipeline": "pretrain_tiny_klein",
            "output": str(tmp_path / name),
            "icons": str(folder),
            "vae": str(tmp_path / "vae"),
            "reported": 2,
            "model": {"num_merges": 40, "width": 24, "heads": 2, "single_layers": 1},
            "pairs_batch_size": 2,
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 3, "batch_size": 2, "checkpoint_every": 1, "keep_checkpoints": 9},
            "ema_decay": 0.5,
            "sample": {"prompts": ["a flat icon of a bus"], "steps": 1, "every": 2},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def weights(run):
    return {part: load_file(next((run / "tiny-klein" / part).glob("*.safetensors"))) for part in PARTS}


def test_captions_are_encoded_in_a_batch_as_one_by_one_and_with_gradients(model):
    model.text_encoder.requires_grad_(True)
    together, alone = encode(model, CAPTIONS), model.encode_prompts(CAPTIONS)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one["text"], other["text"], atol=1e-5, rtol=1e-5)
    torch.cat([each["text"] for each in together]).sum().backward()
    assert model.text_encoder.model.embed_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("head", range(12, 100, 4))
def test_positions_have_even_shares_of_a_whole_head(head):
    shares = rotary_sizes(head)
    assert sum(shares) == head
    assert all(share > 0 and share % 2 == 0 for share in shares)


def test_variants_are_mirrored_grey_and_on_backgrounds_that_end_where_the_icon_begins():
    icon = Image.new("RGB", (16, 16), WHITE)
    icon.paste(RED, (2, 4, 9, 12))
    icon.paste(WHITE, (4, 6, 7, 10))  # enclosed: not the background
    pixels = torch.from_numpy(np.array(icon)).permute(2, 0, 1)
    found = pairs.variants(pixels)
    assert found.shape == (pairs.NUM_VARIANTS, 3, 16, 16)
    assert torch.equal(found[pairs.PLAIN], pixels)
    assert torch.equal(found[pairs.MIRRORED].flip(-1), pixels)
    assert found[pairs.GREY].float().std(0).max() == 0
    for variant, color in zip(found[pairs.GREY + 1 :], pairs.COLORS.values(), strict=True):
        assert tuple(variant[:, 0, 0].tolist()) == tuple(variant[:, 15, 15].tolist()) == color
        assert tuple(variant[:, 8, 5].tolist()) == WHITE


def test_pairs_are_what_their_instructions_say_and_a_batch_has_one_number_of_references():
    batches = [draw_pairs(4, 8, number, 0) for number in range(60)]
    for batch in batches:
        assert len({len(pair.references) for pair in batch}) == 1
    alone = [pair for batch in batches for pair in batch if len(pair.references) == 1]
    two = [pair for batch in batches for pair in batch if len(pair.references) == 2]
    assert len(alone) > len(two) > 0
    for pair in alone:
        (icon, start), (same, end) = pair.references[0], pair.target
        assert icon == same
        assert (end == pairs.GREY != start) == (pair.instruction in pairs.GREYED)
        assert ({start, end} == {pairs.PLAIN, pairs.MIRRORED}) == (pair.instruction in pairs.TURNED)
        for number, color in enumerate(pairs.COLORS):
            assert (f"{color} background" not in pair.instruction) or end == pairs.GREY + 1 + number
    for pair in two:
        assert pair.target == pair.references["second" in pair.instruction]


@pytest.mark.slow
def test_plain_diffusers_loads_the_model_and_resuming_is_exact(config, tmp_path):
    assert main(["train", str(config("whole"))]) == 0
    run = tmp_path / "whole"
    pipe = Flux2KleinPipeline.from_pretrained(
        run / "tiny-klein", vae=AutoencoderKLFlux2.from_pretrained(tmp_path / "vae")
    )
    assert pipe.text_encoder.dtype == pipe.transformer.dtype == torch.float32
    assert not list((run / "tiny-klein" / "vae").glob("*.safetensors"))
    edited = pipe(image=[Image.new("RGB", (64, 64))], prompt="make it grey", num_inference_steps=1)
    assert edited.images[0].size == (64, 64)
    assert Image.open(run / "sheet_edits.png").width > 100
    stored = weights(run)

    assert main(["train", str(config("parts"))]) == 0
    run = tmp_path / "parts"
    for step in (2, 3):  # as if it had been killed in the second step
        checkpoint = run / "checkpoints" / f"step-{step:06d}"
        checkpoint.rename(checkpoint.with_name("gone-" + checkpoint.name))
    assert main(["train", "--resume", str(run)]) == 0
    for part, tensors in weights(run).items():
        assert all(torch.equal(tensor, stored[part][name]) for name, tensor in tensors.items())
