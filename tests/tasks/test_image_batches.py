"""Batches: every image with its own caption and sizes, as a function of the batch number."""

import json
import tracemalloc
from collections import Counter

import pytest
import torch
from PIL import Image

from dora_mm.config.images import DataConfig
from dora_mm.config.losses import LossConfig
from dora_mm.config.models import SDXLConfig
from dora_mm.data.images.folder import read_training_images
from dora_mm.data.images.pixels import load_rgb, render
from dora_mm.data.images.wording import rendered
from dora_mm.models.images.image_model import pad_prompts
from dora_mm.models.images.sdxl.encoding import encode_images, encode_prompts
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask
from dora_mm.tasks.image_batches import CaptionedBatches
from dora_mm.tasks.prompt_encoder import PromptEncoder
from dora_mm.utils.messages import ChangedFileError
from dora_mm.utils.randomness import generator


def batches(tiny, folder, *, trained=False, batch_size=2, process=(0, 1), **data):
    config = DataConfig(folder=str(folder), resolution=64, **data)
    prompts = PromptEncoder(tiny, trained=trained)
    images = read_training_images(config)
    return CaptionedBatches(tiny, images, prompts, config, batch_size=batch_size, seed=1, process=process)


def test_an_epoch_repeats_images_by_the_name_of_their_folder(tiny, image_folder):
    (image_folder / "metadata.jsonl").unlink()
    for index, name in enumerate(("3_cats", "3_cats", "dogs", "2_birds", "2_birds")):
        (image_folder / name).mkdir(exist_ok=True)
        (image_folder / f"{index}.png").rename(image_folder / name / f"{index}.png")
    config = {"subfolders": True, "instance_prompt": "a thing", "repeats": 2}
    groups = batches(tiny, image_folder, **config).order.groups(0)
    assert Counter(index for group in groups for index in group) == {0: 4, 1: 4, 2: 6, 3: 6, 4: 2}


@pytest.mark.parametrize("crop", ["center", "random"])
def test_latents_captions_and_sizes_belong_together(tiny, image_folder, crop):
    all_batches = batches(tiny, image_folder, crop=crop, flip=True)
    texts = {image.caption: encode_prompts(tiny, [image.caption]) for image in all_batches.images}
    sizes = {image.caption: image.size for image in all_batches.images}
    with torch.no_grad():
        for number in range(6):
            batch = all_batches(number)
            for prompt, framing in zip(batch.prompts, batch.framings, strict=True):
                (caption,) = [c for c, (e, p) in texts.items() if torch.allclose(e[0], prompt["text"], atol=1e-5)]
                assert torch.allclose(texts[caption][1][0], prompt["pooled"], atol=1e-5)
                assert framing.original_size == sizes[caption]


def test_cached_latents_equal_fresh_ones(tiny, image_folder):
    all_batches = batches(tiny, image_folder)
    all_batches.encode_all()
    image = all_batches.images[0]
    pixels = render(load_rgb(image.path), all_batches._frame(0, False, None))
    mean, logvar = encode_images(tiny, pixels[None])
    cached = all_batches._latents(0, all_batches._frame(0, False, None))
    assert torch.equal(cached.mean, mean[0])
    assert torch.equal(cached.logvar, logvar[0])
    assert not torch.equal(all_batches(0).latents, all_batches(3).latents)  # drawn again


def test_a_image_that_has_changed_since_the_start_is_not_trained_on(tiny, image_folder):
    all_batches = batches(tiny, image_folder, crop="random")
    name = all_batches.images[0].path
    Image.new("RGB", (64, 64), "red").save(name)
    with torch.no_grad(), pytest.raises(ChangedFileError, match=f"{name} is not as it was when this run read it first"):
        [all_batches(number) for number in range(3)]


def test_latents_are_normalized_after_they_are_drawn(tiny, image_folder):
    """To the last bit: with SDXL's own factor, the other order rounds a third of them differently."""
    tiny.vae.register_to_config(scaling_factor=0.13025)
    all_batches = batches(tiny, image_folder, batch_size=1)
    framing = all_batches(3).framings[0]
    rows = [row for row, layout in enumerate(all_batches.layouts) if layout[0] == framing.target_size]
    assert any(torch.equal(all_batches(3).latents, drawn(tiny, all_batches, row, framing)) for row in rows)


def drawn(model, all_batches, row, framing):
    """The latents of batch 3, if it is of this image."""
    mean, logvar = model.encode_images(render(load_rgb(all_batches.images[row].path), framing)[None])
    noise = torch.randn(mean.shape, generator=generator(1, 3, "latents"))
    return (mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise) * 0.13025


def test_a_batch_is_a_function_of_its_number(tiny, image_folder):
    one, two = (
        batches(tiny, image_folder, crop="random", flip=True),
        batches(tiny, image_folder, crop="random", flip=True),
    )
    two(5)  # another history
    first, second = one(2), two(2)
    assert torch.equal(first.latents, second.latents)
    assert first.framings == second.framings
    for prompts in zip(first.prompts, second.prompts, strict=True):
        assert all(torch.equal(prompts[0][name], prompts[1][name]) for name in ("text", "pooled"))


def test_images_of_two_shapes_never_share_a_batch_and_all_are_seen(tiny, image_folder):
    all_batches = batches(tiny, image_folder, repeats=2)
    shapes = [
        tuple(all_batches(number).latents.shape) for number in range(6)
    ]  # 6 + 4 images in twos: an epoch of 5 batches
    assert len({shape[2:] for shape in shapes}) == 2
    assert sum(shape[0] for shape in shapes[:5]) == 10


def test_processes_share_the_work_without_overlap(tiny, image_folder):
    single = batches(tiny, image_folder)
    halves = [batches(tiny, image_folder, process=(index, 2)) for index in range(2)]
    for number in range(4):
        assert torch.equal(single(number).latents, halves[number % 2](number // 2).latents)


def test_dropped_captions_become_zeros_or_the_empty_text(tiny, image_folder):
    empty, empty_pooled = encode_prompts(tiny, [""])
    for meaning, (prompt, pooled) in {
        "zeros": (torch.zeros_like(empty), torch.zeros_like(empty_pooled)),
        "empty": (empty, empty_pooled),
    }.items():
        tiny.settings = SDXLConfig(unconditional=meaning)
        dropped = batches(tiny, image_folder, caption_dropout=0.999999)(0).prompts[0]
        assert torch.allclose(dropped["text"], prompt[0], atol=1e-5)
        assert torch.allclose(dropped["pooled"], pooled[0], atol=1e-5)


LONG = ", ".join(["a TOK icon of a flying saucer"] * 6)


@pytest.fixture
def long_captions(image_folder):
    """Every second caption is longer than the text encoders take at once."""
    file = image_folder / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[::2]:
        row["text"] = f"{row['text']}, {LONG}"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return image_folder


def select(batch, rows):
    """Rows of a batch."""
    return ConditionedLatents(
        batch.latents[rows], [batch.prompts[row] for row in rows], [batch.framings[row] for row in rows]
    )


def lengths(batch):
    return [len(prompt["text"]) for prompt in batch.prompts]


@pytest.mark.parametrize(("unconditional", "trained"), [("zeros", True), ("empty", False)])
def test_captions_of_different_lengths_train_as_they_do_alone(tiny, long_captions, trained, unconditional):
    """Padding is masked: what the UNet predicts for an image does not depend on the captions of the others."""
    tiny.settings = SDXLConfig(unconditional=unconditional)
    all_batches = batches(tiny, long_captions, trained=trained, batch_size=3, caption_dropout=0.3)
    task = DiffusionTask(tiny, LossConfig())
    masked = 0
    with torch.no_grad():
        for number in range(8):
            batch = all_batches(number)
            if len(set(lengths(batch))) == 1:
                continue
            masked += 1
            for row in range(len(batch.latents)):
                others = [other for other in range(len(batch.latents)) if other != row]
                together, alone = select(batch, [row, *others]), select(batch, [row])
                one, two = (
                    task.denoised(each, torch.full((len(each.latents),), 500), torch.Generator().manual_seed(0))[0]
                    for each in (together, alone)  # the first image of a batch gets the first noise
                )
                torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert masked >= 2


def test_captions_of_one_length_have_no_mask(tiny, image_folder):
    all_batches = batches(tiny, image_folder)
    assert all(pad_prompts(all_batches(number).prompts, "text")[1] is None for number in range(4))


def test_dropout_has_its_rate(tiny, image_folder):
    all_batches = batches(tiny, image_folder, caption_dropout=0.3)
    dropped = [bool((prompt["text"] == 0).all()) for number in range(150) for prompt in all_batches(number).prompts]
    assert 0.2 < sum(dropped) / len(dropped) < 0.4


def test_trained_text_encoders_get_gradients(tiny, image_folder):
    tiny.text_encoder.requires_grad_(True)
    batch = batches(tiny, image_folder, trained=True)(0)
    sum(prompt["text"].sum() for prompt in batch.prompts).backward()
    assert tiny.text_encoder.get_input_embeddings().weight.grad is not None


@pytest.mark.parametrize("trained", [False, True])
def test_captions_change_with_cached_embeddings_too(tiny, image_folder, trained):
    """Other trainers ignore shuffling and dropped tags where embeddings are cached."""
    rows = [json.dumps({"file_name": f"{n}.png", "text": f"TOK, red, round, thing {n}"}) for n in range(5)]
    (image_folder / "metadata.jsonl").write_text("\n".join(rows))
    captions = {"shuffle": True, "tag_dropout": 0.3, "keep": 1}
    all_batches = batches(tiny, image_folder, trained=trained, captions=captions)
    all_batches.encode_all(num_batches=9)
    texts = {text: encode_prompts(tiny, [text])[0] for text in all_batches.captions(9)}
    assert len(texts) > 9
    if not trained:
        tiny.components.release(tiny.text_encoders)  # what is not encoded ahead would fail
    seen = set()
    with torch.no_grad():
        for number in range(9):
            epoch = all_batches.order.epoch(number)
            for row, prompt in zip(all_batches.order(number), all_batches(number).prompts, strict=True):
                text = rendered(all_batches.images[row], all_batches.config.captions, 1, epoch)
                torch.testing.assert_close(prompt["text"][None], texts[text])
                seen.add(text)
    assert len(seen) > 9


def test_encoded_captions_are_kept_by_content(tiny, image_folder, tmp_path, monkeypatch):
    """The next run encodes nothing; another caption, encoder or tokenizer is never served what is stale."""
    texts = ["a TOK icon", "a bus, " * 40, ""]
    PromptEncoder(tiny, trained=False, folder=str(tmp_path)).keep(texts)
    own, asked = type(tiny).encode_prompts, []
    monkeypatch.setattr(type(tiny), "encode_prompts", lambda self, prompts: asked.append(prompts) or own(self, prompts))
    again = PromptEncoder(tiny, trained=False, folder=str(tmp_path))
    again.keep(texts)
    found = again(texts)
    assert asked == []
    for text, prompt in zip(texts, found, strict=True):
        (expected,) = own(tiny, [text])
        assert prompt.keys() == expected.keys()
        assert all(torch.equal(prompt[name], expected[name]) for name in prompt)
    again.keep(["another"])
    tiny.text_encoder_2.text_projection.weight.data += 1
    PromptEncoder(tiny, trained=False, folder=str(tmp_path)).keep(texts[:1])
    tiny.tokenizer.model_max_length = tiny.tokenizer_2.model_max_length = 30
    PromptEncoder(tiny, trained=False, folder=str(tmp_path)).keep(texts[:1])
    assert asked == [["another"], texts[:1], texts[:1]]


def test_a_lost_caption_is_encoded_again_or_named(tiny, tmp_path, caplog):
    encoder = PromptEncoder(tiny, trained=False, folder=str(tmp_path))
    encoder.keep(["a bus"])
    expected = encoder(["a bus"])[0]["text"]
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(b"")
    assert torch.equal(encoder(["a bus"])[0]["text"], expected)
    assert f"{file} is damaged" in caplog.text
    file.unlink()
    tiny.components.release(tiny.text_encoders)
    with pytest.raises(ValueError, match=r"data\.text_cache: .* is lost: resume the run"):
        encoder(["a bus"])


def test_kept_latents_are_not_read_before_they_are_needed(tiny, image_folder, tmp_path, monkeypatch):
    """A start with many images only looks for their files."""
    settings = {"latent_cache": str(tmp_path / "latents"), "flip": True}
    batches(tiny, image_folder, **settings).encode_all(4)
    second = batches(tiny, image_folder, **settings)
    monkeypatch.setattr(type(second.cache), "get", None)
    second.encode_all(4)


@pytest.mark.slow
def test_thousands_of_images_take_a_bounded_memory(tiny, tmp_path):
    """A start keeps the name, size, digest and place in the order of an image, and neither pixels nor latents."""
    settings = {"latent_cache": str(tmp_path / "latents"), "instance_prompt": "a thing"}
    peaks = []
    for count in (200, 2000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for index in range(count):
            if index < 10:
                Image.new("RGB", (64, 64), (20 * index, 0, 0)).save(folder / f"{index}.png")
            else:
                (folder / f"{index}.png").hardlink_to(folder / f"{index % 10}.png")
        batches(tiny, folder, **settings).encode_all()  # imports, and what is computed once
        tracemalloc.start()
        all_batches = batches(tiny, folder, **settings)
        all_batches.encode_all()
        all_batches(0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(all_batches.images) == count
        assert not all_batches.cache.memory
    assert (peaks[1] - peaks[0]) / 1800 < 4000
