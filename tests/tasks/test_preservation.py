"""What is held at the base model: its prompts, its target, and a mean of its own beside the training's."""

import shutil

import pytest
import torch
from pydantic import ValidationError

from dora_mm import adapter_parameters, inject, set_strength
from dora_mm.config.images import DataConfig, TrainDiffusionConfig
from dora_mm.core import DoRASpec
from dora_mm.data.images.folder import read_images
from dora_mm.tasks.diffusion import DiffusionTask
from dora_mm.tasks.image_batches import CaptionedBatches
from dora_mm.tasks.preservation import preserving, without_word
from dora_mm.tasks.prompt_encoder import PromptEncoder
from dora_mm.utils.randomness import generator
from tests.tasks.test_masked_loss import DISTANCES, adapt


def config_of(folder, preserve, other=None, **changes):
    folders = [{"path": str(folder), "weight": 3.0, "repeats": 1.5}]
    if other:
        folders.append({"path": str(other), "role": "preserve", "prompt": "a thing"})
    values = {
        "pipeline": "train_diffusion",
        "name": "x",
        "model": {"path": "m"},
        "adapter": {"rank": 2},
        "data": {"folders": folders, "resolution": 64, "placeholder": "TOK", "caption_dropout": 0.3},
        "loss": {"min_snr_gamma": None},
        "preserve": preserve,
        "optimizer": {"lr": 0.1},
        "train": {"steps": 3, "batch_size": 2, "gradient_accumulation_steps": 2},
    }
    for key, value in changes.items():
        section, leaf = key.split("__")
        values[section] = {**values[section], leaf: value}
    return TrainDiffusionConfig.model_validate(values)


def sources(tiny, config, *, trained=False, process=(0, 1)):
    """The batches of a training without and with what is held."""
    prompts = PromptEncoder(tiny, trained=trained)
    settings = {"batch_size": 2, "seed": 1, "process": process}
    batches = CaptionedBatches(tiny, read_images(config.data, "train"), prompts, config.data, **settings)
    return batches, preserving(batches, config, read_images(config.data, "preserve"))


def losses_of(task, batches, numbers):
    return [task.loss(batches(number), generator(1, number, "loss")) for number in numbers]


@pytest.fixture
def plain(image_folder, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("0.png", "1.png", "3.png"):
        shutil.copy(image_folder / name, folder)
    return folder


@pytest.mark.parametrize(
    ("networks", "own_images", "kind"),
    [
        (("unet",), False, "huber"),
        (("unet",), True, "l1"),
        (("unet", "text_encoder", "text_encoder_2"), False, "mse"),
        (("unet", "text_encoder", "text_encoder_2"), True, "mse"),
    ],
)
def test_a_step_minimises_the_sum_of_two_means(tiny, image_folder, plain, networks, own_images, kind):
    """Against plain torch, over micro-batches of different sizes and weights that are not 1.

    Both are means of the distance of the loss, so that the weight keeps its sense.
    """
    adapt(tiny, *networks)
    config = config_of(image_folder, {"weight": 0.7}, plain if own_images else None, loss__type=kind)
    batches, source = sources(tiny, config, trained=len(networks) > 1)
    task, numbers = DiffusionTask(tiny, config.loss), (2, 3)  # the second step
    with torch.no_grad():
        style, both = losses_of(task, batches, numbers), losses_of(task, source, numbers)
        changes = []
        for number in numbers:
            batch, stream = source(number), generator(1, number, "loss")
            noise, times = (
                task.sample_noise(batch.latents, stream),
                torch.randint(1000, (len(batch.latents),), generator=stream),
            )
            held = batch.preserved
            if own_images:
                noise = task.sample_noise(held.latents, stream)
                times = torch.randint(1000, (len(held.latents),), generator=stream)
            texts = source.class_images.captions_of(number) if own_images else batches.captions_of(number)
            assert all(("TOK" in text) != own_images for text in texts)
            texts = [without_word(text, "TOK") for text in texts]
            noised = task.noise.noised(held.latents, noise, times)
            found = []
            for strength in (1.0, 0.0):
                for name in networks:
                    set_strength(tiny.networks[name], strength)
                found.append(tiny.predict(noised, times, tiny.encode_prompts(texts), held.framings))
            for name in networks:
                set_strength(tiny.networks[name], 1.0)
            changes += DISTANCES[kind](found[0] - found[1]).mean((1, 2, 3)).tolist()
    expected = sum(loss.total for loss in style) / sum(loss.count for loss in style) + 0.7 * sum(changes) / len(changes)
    assert sum(loss.count for loss in both) == sum(loss.count for loss in style)
    torch.testing.assert_close(sum(loss.total for loss in both) / sum(loss.count for loss in both), expected)
    assert min(changes) > 1e-7


@pytest.mark.parametrize("own_images", [False, True])
def test_without_weight_the_gradients_are_the_same_bits(tiny, image_folder, plain, own_images):
    adapt(tiny, "unet")
    config = config_of(
        image_folder, {"weight": 0.0, "prompt": None if own_images else ""}, plain if own_images else None
    )
    task, gradients = DiffusionTask(tiny, config.loss), []
    for batches in sources(tiny, config):
        for loss in losses_of(task, batches, (0, 1)):
            loss.total.backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(tiny.unet).items() if p.grad is not None})
        tiny.unet.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_fresh_adapter_changes_nothing(tiny, image_folder):
    inject(tiny.unet, "sdxl-unet", DoRASpec(rank=2))
    config = config_of(image_folder, {"prompt": "an icon"})
    batches, source = sources(tiny, config)
    task, batch = DiffusionTask(tiny, config.loss), source(0)
    with torch.no_grad():
        noise, times = torch.randn_like(batch.latents), torch.tensor([7, 900])[: len(batch.latents)]
        assert (task.changes(batch.preserved, noise, times) == 0).all()
        assert torch.equal(losses_of(task, source, [0])[0].total, losses_of(task, batches, [0])[0].total)


def test_only_some_steps_hold_and_all_prompts_are_encoded_ahead(tiny, image_folder):
    config = config_of(image_folder, {"every": 2})
    batches, source = sources(tiny, config)
    for each in (batches, source):
        each.encode_all(6)
    tiny.components.release(tiny.text_encoders)
    assert [source(number).preserved is not None for number in range(6)] == [True, True, False, False, True, True]


def test_the_empty_prompt_is_that_of_dropped_captions(tiny, image_folder):
    _, source = sources(tiny, config_of(image_folder, {"prompt": ""}))
    held = source(0).preserved
    assert tiny.unconditional == "zeros"
    assert all(not prompt["text"].any() for prompt in held.prompts)


def test_several_processes_hold_what_one_does(tiny, image_folder):
    """Two processes with a micro-batch each, and one that accumulates both."""
    one = config_of(image_folder, {"weight": 0.5})
    two = config_of(image_folder, {"weight": 0.5}, train__gradient_accumulation_steps=1)
    whole = sources(tiny, one)[1]
    for number in range(4):
        batch = sources(tiny, two, process=(number % 2, 2))[1](number // 2)
        expected = whole(number)
        assert torch.equal(batch.preserved.latents, expected.preserved.latents)
        assert batch.preserved_weight == expected.preserved_weight


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a TOK icon of a bus, in the style of TOK", "a icon of a bus, in the style of"),
        ("TOK, a bus", "a bus"),
        ("a bus, TOK", "a bus"),
        ("a bus, TOK , red", "a bus, red"),
        ("TOKYO by night", "TOKYO by night"),
        ("TOK", ""),
    ],
)
def test_captions_without_a_word(text, expected):
    assert without_word(text, "TOK") == expected


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"preserve": None, "other": "b"}, "a folder of role preserve needs the section preserve"),
        ({"preserve": {"prompt": "x"}, "other": "b"}, "preserve.prompt has no effect"),
        ({"preserve": {}, "data__placeholder": None}, "but there is none: set preserve.prompt"),
        ({"preserve": {}, "adapter__method": "full"}, "preserve needs the base model, whose weights"),
        ({"preserve": {"weight": -1.0}}, "greater than or equal to 0"),
        ({"preserve": {"wieght": 1.0}}, "wieght"),
    ],
)
def test_contradictions_are_refused(changes, problem):
    with pytest.raises(ValidationError, match=problem):
        config_of("a", **changes)


def test_class_images_keep_their_own_captions(tiny, image_folder, plain):
    """Neither the prefix of the training's captions nor its instance prompt, which have the placeholder."""
    config = config_of(image_folder, {}, plain, data__captions={"prefix": "TOK"}, data__instance_prompt="a TOK")
    _, source = sources(tiny, config)
    assert set(source.class_images.captions_of(0)) == {"a thing"}
    folders = [{"path": str(image_folder)}, {"path": str(plain), "role": "preserve"}]
    data = DataConfig.model_validate({**config.data.model_dump(), "folders": folders})
    with pytest.raises(ValueError, match=r"without a caption: caption them or set data\.folders\[1\]\.prompt"):
        read_images(data, "preserve")


def test_a_dropped_placeholder_cannot_be_removed(image_folder):
    with pytest.raises(ValidationError, match=r"set preserve\.prompt, or data\.captions\.keep"):
        config_of(image_folder, {}, data__captions={"tag_dropout": 0.3})
    config_of(image_folder, {}, data__captions={"tag_dropout": 0.3, "keep": 1})
    config_of(image_folder, {"prompt": ""}, data__captions={"tag_dropout": 0.3})
