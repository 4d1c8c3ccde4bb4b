"""Qwen-Image-Edit with references: a training pass is that of the pipeline, and so are Euler steps and images."""

from contextlib import contextmanager, nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as published
from PIL import Image
from safetensors.torch import load_file

import dora_mm
from dora_mm.cli import main
from dora_mm.config.losses import LossConfig
from dora_mm.config.models import ModelConfig, validated
from dora_mm.models.images import qwen_image_edit
from dora_mm.models.images.families import load_image_model
from dora_mm.sampling.image_sampler import ImageSampler
from dora_mm.tasks.diffusion import DiffusionTask
from dora_mm.tasks.references import num_tokens
from tests.shared.images.pairs import batches_of, recorded, write_pairs
from tests.shared.images.tiny_qwen_image_edit import SYSTEM, build

STEPS, SEED = 3, 5
TARGET, FIRST, SECOND = (32, 128), (70, 120), (130, 100)  # (h, w)
SEEN = {True: [(768, 1344), (1152, 896)], False: [(96, 160), (160, 128)]}  # both, at the area of the VAE or a small one
PROMPTS = ["make thing 0 red", "make thing 1 red again"]
INPUTS = ("hidden_states", "timestep", "encoder_hidden_states")
SMALL = 128 * 128  # pixels, to be quick


@pytest.fixture(autouse=True)
def area(request, monkeypatch):
    """The area of references for the VAE: the pipeline's own in slow tests, else a small one."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(published, "VAE_IMAGE_SIZE", SMALL)


@pytest.fixture(scope="module", params=[False, True], ids=["2509", "2511"])
def folder(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("qwen_image_edit") / "model", zero_cond_t=request.param)


@pytest.fixture(scope="module")
def newest(tmp_path_factory):
    """2511, for what does not depend on how it modulates."""
    return build(tmp_path_factory.mktemp("qwen_image_edit") / "newest", zero_cond_t=True)


def opened(folder):
    return load_image_model(validated(ModelConfig, {"path": str(folder)}))


def official(folder):
    pipe = QwenImageEditPlusPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model(newest):
    return opened(newest)


@pytest.fixture(scope="module")
def plain(newest):
    return official(newest)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two rows with two references each."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data", [(TARGET, [FIRST, SECOND])] * 2)


def references_of(root, row):
    return [Image.open(root / "references" / f"{row}_{number}.png") for number in (1, 2)]


@contextmanager
def told_of_images(pipe):
    """The pipeline with the line of https://github.com/huggingface/diffusers/pull/14189."""

    def tell(_, args, kwargs):
        return args, {**kwargs, "mm_token_type_ids": (kwargs["input_ids"] == pipe.processor.image_token_id).int()}

    hook = pipe.text_encoder.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def edited(pipe, root, row, *, told=True, **settings):
    """What the pipeline makes of a row."""
    given = {"prompt": PROMPTS[row], "image": references_of(root, row), "height": TARGET[0], "width": TARGET[1]}
    given |= {"num_inference_steps": STEPS, "true_cfg_scale": 1.0, **settings}
    with told_of_images(pipe) if told else nullcontext():
        return pipe(**given, generator=torch.Generator().manual_seed(SEED)).images


def calls_of(pipe, root, **settings):
    """The inputs and the output of the transformer in the second step of each row."""
    found = []
    for row in range(2):
        with recorded(pipe.transformer) as calls:
            edited(pipe, root, row, output_type="latent", **settings)
        found.append(calls[1])
    return found


def euler(model, batch, shape):
    """The latents (1, C, h, w) after Euler's steps from the noise that the pipeline draws."""
    x = torch.randn((1, 1, *shape[1:]), generator=torch.Generator().manual_seed(SEED))[:, 0]
    with torch.no_grad():
        for level, following in pairwise([*model.noise.schedule(STEPS, x.shape[2:]), 0.0]):
            velocity = model.predict_edit(x, torch.tensor([level]), batch.prompts, batch.framings, batch.references)
            x = x + (following - level) * velocity
    return x


def packed(latents):
    """Latents (1, C, h, w) as the pipeline has them (1, L, 4 C)."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).mT


@pytest.mark.parametrize(
    ("told", "full_size"), [(True, False), (False, False), pytest.param(False, True, marks=pytest.mark.slow)]
)
def test_a_training_pass_is_the_transformers_call_in_the_pipeline(folder, pairs, monkeypatch, told, full_size):
    """Also that of the pipeline as it is, which does not tell its text encoder where images are."""
    if not told:
        monkeypatch.setattr(qwen_image_edit, "_positions_of_images", lambda *_: nullcontext())
    model = opened(folder)
    batch = batches_of(model, pairs, batch_size=2).fixed([0, 1])
    assert [tuple(8 * side for side in latents.shape[2:]) for latents in batch.references] == SEEN[full_size]
    assert len({len(prompt["text"]) for prompt in batch.prompts}) == 2
    calls = calls_of(official(folder), pairs, told=told)
    tokens = batch.latents.shape[2] * batch.latents.shape[3] // 4
    packed_target = torch.cat([kwargs["hidden_states"][:, :tokens] for kwargs, _ in calls])
    h, w = (side // 16 for side in TARGET)
    noised = torch.nn.functional.pixel_shuffle(packed_target.mT.reshape(2, -1, h, w), 2)
    time = torch.cat([kwargs["timestep"] for kwargs, _ in calls])
    with recorded(model.transformer) as ours, torch.no_grad():
        found = model.predict_edit(noised, time, batch.prompts, batch.framings, batch.references)
    (given, _), velocities = ours[0], packed(found)
    for row, (kwargs, expected) in enumerate(calls):
        sizes = [(1, h // 16, w // 16) for h, w in (TARGET, *SEEN[full_size])]
        assert given["img_shapes"][row] == kwargs["img_shapes"][0] == sizes
        length = kwargs["encoder_hidden_states"].shape[1]
        assert kwargs["encoder_hidden_states_mask"] is None
        assert given["encoder_hidden_states_mask"][row].sum() == length
        for name in INPUTS:
            theirs = kwargs[name][0]
            torch.testing.assert_close(given[name][row][: len(theirs)] if theirs.ndim else given[name][row], theirs)
        torch.testing.assert_close(velocities[row], expected[0, :tokens], atol=1e-4, rtol=1e-4)


def test_euler_steps_end_at_the_latents_of_the_pipeline(folder, pairs):
    model, plain = opened(folder), official(folder)
    batch = batches_of(model, pairs).fixed([1])
    expected = edited(plain, pairs, 1, output_type="latent")
    torch.testing.assert_close(packed(euler(model, batch, batch.latents.shape)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_of_a_batch_are_those_of_the_pipeline(model, plain, pairs, guidance):
    """It takes one prompt at a time."""
    references, prompts, shares = references_of(pairs, 1), [PROMPTS[1], "make it blue"], []
    settings = {"steps": STEPS, "guidance": guidance, "height": TARGET[0], "width": TARGET[1]}
    prepared, negative = [model.prepare_reference(image) for image in references], "blue" if guidance > 1 else None
    given = {**settings, "references": prepared, "on_step": shares.append}
    ours = ImageSampler(model).generate([(prompt, negative) for prompt in prompts], [SEED, SEED], **given)
    assert shares == [step / (2 * STEPS) for step in range(1, 2 * STEPS + 1)]
    guided = {"negative_prompt": negative, "true_cfg_scale": guidance} if negative else {}
    for prompt, image in zip(prompts, ours, strict=True):
        (theirs,) = edited(plain, pairs, 1, prompt=prompt, **guided)
        assert np.abs(np.asarray(image, int) - np.asarray(theirs, int)).max() <= 1
    assert np.abs(np.asarray(ours[0], int) - np.asarray(ours[1], int)).max() > 0  # random weights barely read prompts


def test_an_image_without_a_size_has_the_ratio_of_the_last_reference(model, plain, pairs):
    with recorded(plain.transformer) as calls:
        edited(plain, pairs, 0, output_type="latent", height=None, width=None, num_inference_steps=2)
    height, width = model.edited_size([(image.height, image.width) for image in references_of(pairs, 0)])
    assert calls[0][0]["img_shapes"][0][0] == (1, height // 16, width // 16)


def test_the_tokens_of_the_system_are_dropped(model, plain):
    ids = model.tokenizer(f"<|im_start|>{SYSTEM}<|im_end|>\n<|im_start|>user\n").input_ids
    assert plain.prompt_template_encode_start_idx == len(ids) == 64
    assert plain.prompt_template_encode.partition("{}")[0] == model.tokenizer.decode(ids)
    kept = model.tokenizer(plain.prompt_template_encode.format("red")).input_ids[len(ids) :]
    assert model.tokenizer.decode(kept) == "red<|im_end|>\n<|im_start|>assistant\n"
    assert model.num_tokens("red") == model.prompt_length("red") == len(kept)
    assert model.most_tokens is None


def test_the_text_encoder_sees_images_at_an_area_of_384_pixels(model, pairs):
    """Each as words before the caption, and where its tokens are in the image."""
    references, seen = references_of(pairs, 0), []

    def record(_, args, kwargs):
        seen.append(kwargs)

    hook = model.text_encoder.model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        (encoded,) = model.encode_edit_prompts(["red"], [references])
    finally:
        hook.remove()
    (kwargs,) = seen
    assert kwargs["image_grid_thw"].tolist() == [[1, 20, 36], [1, 32, 26]]  # of 288 x 512 and 448 x 352 px, in patches
    words = [
        f"Picture {number}: <|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for number, n in ((1, 180), (2, 208))
    ]
    assert model.tokenizer.decode(kwargs["input_ids"][0, 64:]).startswith("".join([*words, "red<|im_end|>"]))
    assert (
        kwargs["mm_token_type_ids"].tolist() == (kwargs["input_ids"] == model.processor.image_token_id).int().tolist()
    )
    assert len(encoded["text"]) == kwargs["input_ids"].shape[1] - 64


def test_rows_of_one_layout_equal_each_alone(folder, tmp_path):
    """Equal numbers of tokens in other shapes are other layouts: positions are those of a batch's first row."""
    model = opened(folder)
    rows = [(TARGET, [FIRST]), (TARGET, [FIRST[::-1]]), (TARGET, [FIRST]), (TARGET[::-1], [FIRST])]
    root = write_pairs(tmp_path / "data", rows)
    together, task, sizes = batches_of(model, root, batch_size=4), DiffusionTask(model, LossConfig()), []
    assert num_tokens(together.images[0], model, together.config) == (2 * 8, 6 * 10)
    for number in range(3):
        indices = together.order(number)
        sizes.append(len(indices))
        noises = torch.stack([torch.randn(together(number).latents.shape[1:]) for _ in indices])
        times = torch.linspace(0.2, 0.8, len(indices))
        with torch.no_grad():
            found = task.losses(together.fixed(indices), noises, times)
            each = [
                task.losses(together.fixed([row]), noises[k : k + 1], times[k : k + 1]) for k, row in enumerate(indices)
            ]
        torch.testing.assert_close(found, torch.cat(each), atol=1e-5, rtol=1e-5)
    assert sorted(sizes) == [1, 1, 2]


def test_what_it_does_not_take_is_refused(model, newest, pairs, tmp_path):
    for area in ("target", 4096):
        with pytest.raises(ValueError, match=r"data\.reference_area: .* brings references of every size to one area"):
            batches_of(model, pairs, reference_area=area)
    with pytest.raises(ValueError, match=r"data\.reference_dropout: .* needs references: leave it out"):
        batches_of(model, pairs, reference_dropout=0.1)
    alone = write_pairs(tmp_path / "alone", [(TARGET, [])])
    with pytest.raises(ValueError, match="Qwen-Image-Edit needs references: give each image what it is made of"):
        batches_of(model, alone)
    for encode in (lambda: model.encode_prompts(["a"]), lambda: model.encode_for_sampling("a", None)):
        with pytest.raises(ValueError, match="Qwen-Image-Edit needs references: it makes no images of text alone"):
            encode()


def test_a_training_with_references_is_resumed_and_edits_alike_in_plain_diffusers(newest, pairs, tmp_path):
    def config(name, steps):
        values = {
            "pipeline": "train_diffusion",
            "output": str(tmp_path / name),
            "model": {"path": str(newest)},
            "adapter": {"rank": 4, "parts": ["transformer.attn", "transformer.ff"]},
            "data": {"folder": str(pairs), "references": [str(pairs / "references")], "resolution": 64},
            "optimizer": {"lr": 0.1},
            "train": {"steps": steps, "batch_size": 2, "checkpoint_every": 1},
        }
        values["data"] |= {"flip": True, "caption_dropout": 0.3, "text_cache": str(tmp_path / "text")}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / f"{name}.yaml")

    assert main(["train", config("whole", 2)]) == 0
    assert main(["train", config("half", 1)]) == 0
    assert main(["train", "--resume", str(tmp_path / "half"), "--set", "train.steps=2"]) == 0
    files = [tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors" for name in ("whole", "half")]
    whole, resumed = map(load_file, files)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    _draws_alike(newest, pairs, files[0])


def _draws_alike(folder, pairs, file):
    model, plain = opened(folder), official(folder)
    batch = batches_of(model, pairs).fixed([1])
    before = edited(plain, pairs, 1, output_type="latent")
    dora_mm.load_adapter({"transformer": model.transformer}, file)
    plain.load_lora_weights(str(file.parent))
    theirs = edited(plain, pairs, 1, output_type="latent")
    torch.testing.assert_close(packed(euler(model, batch, batch.latents.shape)), theirs, atol=1e-3, rtol=1e-3)
    assert (theirs - before).abs().max() > 0.05
