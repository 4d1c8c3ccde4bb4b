"""Models that edit: a training pass with references is that of the pipeline, and so are Euler steps."""

from itertools import pairwise

import pytest
import torch
from PIL import Image

from dora_mm.config.losses import LossConfig
from dora_mm.config.models import ModelConfig, validated
from dora_mm.models.images.families import load_image_model
from dora_mm.tasks.diffusion import DiffusionTask
from tests.shared.images.pairs import batches_of, recorded, write_pairs
from tests.shared.images.tiny_flows import FLOWS

KLEIN = next(flow for flow in FLOWS if flow.name == "flux2_klein")
STEPS, SEED = 3, 5
TARGET, FIRST, SECOND = (64, 64), (70, 120), (130, 100)  # (h, w)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return KLEIN.build(tmp_path_factory.mktemp("klein") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return load_image_model(validated(ModelConfig, {"path": str(folder)}))


@pytest.fixture(scope="module")
def plain(folder):
    return KLEIN.plain(folder)


@pytest.fixture(scope="module")
def theirs(plain, tmp_path_factory):
    """The calls of the denoiser in a run of the pipeline with two references, its latents and the files."""
    root = write_pairs(tmp_path_factory.mktemp("pair") / "data", [(TARGET, [FIRST, SECOND])])
    references = [Image.open(root / "references" / f"0_{number}.png") for number in (1, 2)]
    height, width = TARGET
    with recorded(plain.transformer) as calls, torch.no_grad():
        latents = plain(
            image=references,
            prompt="make thing 0 red",
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(SEED),
            height=height,
            width=width,
            output_type="latent",
        ).images
    return root, calls, latents


def test_a_training_pass_is_the_transformers_call_in_the_pipeline(model, theirs):
    root, calls, _ = theirs
    batches = batches_of(model, root)
    batch = batches(0)
    assert [tuple(latents.shape[2:]) for latents in batch.references] == [(4, 7), (8, 6)]
    kwargs, expected = calls[1]
    tokens = batch.latents.shape[2] * batch.latents.shape[3]
    noised = kwargs["hidden_states"][:, :tokens].mT.reshape(batch.latents.shape)
    with recorded(model.transformer) as ours, torch.no_grad():
        found = model.predict_edit(noised, kwargs["timestep"], batch.prompts, batch.framings, batch.references)
    for name in ("hidden_states", "timestep", "encoder_hidden_states", "img_ids", "txt_ids"):
        torch.testing.assert_close(ours[0][0][name].float(), kwargs[name].float(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.flatten(2).mT, expected[:, :tokens], atol=1e-6, rtol=1e-6)


def test_euler_steps_end_at_the_latents_of_the_pipeline(model, plain, theirs):
    root, _, expected = theirs
    batch = batches_of(model, root)(0)
    shape = batch.latents.shape
    levels = [*model.noise.schedule(STEPS, shape[2:]), 0.0]
    x = KLEIN.start(tuple(shape), [SEED])
    with torch.no_grad():
        for level, following in pairwise(levels):
            time = torch.tensor([level])
            x = x + (following - level) * model.predict_edit(x, time, batch.prompts, batch.framings, batch.references)
    torch.testing.assert_close(x, KLEIN.as_denoised(plain, expected), atol=1e-4, rtol=1e-4)


def test_rows_with_and_without_references_equal_each_alone(model, tmp_path):
    """Equal numbers of tokens in other shapes are other layouts: positions are those of a batch's first row."""
    rows = [
        (TARGET, [FIRST, SECOND]),
        (TARGET, [SECOND, FIRST]),
        (TARGET, [FIRST, SECOND]),
        (TARGET, []),
        (TARGET, [FIRST[::-1], SECOND]),
        ((32, 128), [FIRST]),
        (TARGET, []),
    ]
    root = write_pairs(tmp_path / "data", rows)
    together, alone = batches_of(model, root, batch_size=4), batches_of(model, root)
    task = DiffusionTask(model, LossConfig())
    by_row = {tuple(alone.order(number)): alone.fixed(alone.order(number)) for number in range(len(rows))}
    sizes = []
    for number in range(5):
        indices = together.order(number)
        sizes.append(len(indices))
        noises = torch.stack([torch.randn(together(number).latents.shape[1:]) for _ in indices])
        times = torch.linspace(0.2, 0.8, len(indices))
        with torch.no_grad():
            found = task.losses(together.fixed(indices), noises, times)
            each = [task.losses(by_row[(row,)], noises[k : k + 1], times[k : k + 1]) for k, row in enumerate(indices)]
        torch.testing.assert_close(found, torch.cat(each), atol=1e-5, rtol=1e-5)
    assert sorted(sizes) == [1, 1, 1, 2, 2]


def test_references_change_the_loss_and_are_dropped_by_batch(model, tmp_path):
    root = write_pairs(tmp_path / "data", [(TARGET, [FIRST])] * 4)
    kept, dropped = batches_of(model, root), batches_of(model, root, reference_dropout=0.5)
    counts = [len(dropped(number).references) for number in range(12)]
    assert {0, 1} == set(counts)
    assert all(len(kept(number).references) == 1 for number in range(12))
    task = DiffusionTask(model, LossConfig())
    batch = kept(0)
    with torch.no_grad():
        losses = [
            task.loss(each, torch.Generator().manual_seed(0)).total
            for each in (batch, batches_of(model, root, reference_dropout=0.999)(0))
        ]
    assert losses[0] != losses[1]


def test_a_mirrored_image_has_mirrored_references(model, tmp_path):
    root = write_pairs(tmp_path / "data", [(TARGET, [(64, 96)])])
    mirrored = write_pairs(tmp_path / "mirrored", [(TARGET, [(64, 96)])])
    for path in (mirrored / "0.png", mirrored / "references" / "0_1.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    flipping, plain = batches_of(model, root, flip=True), batches_of(model, mirrored)
    number = next(number for number in range(20) if flipping(number).framings[0].flip)
    torch.testing.assert_close(flipping(number).references[0], plain(0).references[0])


@pytest.mark.parametrize(("area", "size"), [("pipeline", (6, 6)), ("target", (4, 4)), (4096, (4, 4)), (10**9, (6, 6))])
def test_larger_references_are_scaled_down_to_an_area(model, tmp_path, area, size):
    root = write_pairs(tmp_path / "data", [((64, 64), [(100, 100)])])
    batches = batches_of(model, root, reference_area=area)
    assert batches(0).references[0].shape[2:] == size
    assert batches.layouts[0][1] == tuple(16 * side for side in size)


def test_what_a_model_does_not_take_is_named_before_the_start(model, tmp_path):
    root = write_pairs(tmp_path / "data", [((64, 64), [(40, 64), (64, 600)]), ((64, 64), [(64, 64)] * 11)])
    with pytest.raises(ValueError, match="0_1.png is 64 x 40, and FLUX.2 klein takes no side below 64 pixels; 0_2.png"):
        batches_of(model, root)
    with pytest.raises(ValueError, match="1.png has 11 references, and FLUX.2 klein takes 10"):
        batches_of(model, root)
    pairs = write_pairs(tmp_path / "pairs", [((64, 64), [(64, 64)])])
    with pytest.raises(ValueError, match="random crops of images would no longer fit their references"):
        batches_of(model, pairs, crop="random")
    alone = write_pairs(tmp_path / "alone", [((64, 64), [])])
    with pytest.raises(ValueError, match="no image has a reference"):
        batches_of(model, alone)
