"""What families of flow models compute, against the pipelines of diffusers and a few lines of plain torch."""

import logging
import re
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

import dora_mm
from dora_mm import DoRASpec
from dora_mm.config.images import DataConfig
from dora_mm.config.losses import LossConfig
from dora_mm.config.models import ModelConfig, validated
from dora_mm.core import AdaptedLayer, adapted_layers
from dora_mm.data.images.folder import read_training_images
from dora_mm.data.images.pixels import load_rgb, render
from dora_mm.models.images.families import load_image_model
from dora_mm.models.images.vae import decoded
from dora_mm.sampling.image_sampler import sample
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask
from dora_mm.tasks.image_batches import CaptionedBatches
from dora_mm.tasks.prompt_encoder import PromptEncoder
from dora_mm.testing import check_image_family
from tests.shared import reference
from tests.shared.images.tiny_flows import FLOWS, NAMES, PROMPT, SIZE

PROMPTS = [PROMPT, "", "Describe this image in detail. " * 3]


@pytest.fixture(scope="module", params=FLOWS, ids=NAMES)
def flow(request):
    return request.param


@pytest.fixture(scope="module")
def folder(flow, tmp_path_factory):
    return flow.build(tmp_path_factory.mktemp(flow.name) / "model")


@pytest.fixture(scope="module")
def plain(flow, folder):
    return flow.plain(folder)


def opened(flow, folder, **settings):
    """The model, with keys of its section."""
    section = {flow.name: {**flow.settings, **settings}} if flow.settings or settings else {}
    return load_image_model(validated(ModelConfig, {"path": str(folder), **section}))


@pytest.fixture(scope="module")
def loaded(flow, folder):
    """The model, opened once: `model` takes adapters off again."""
    return opened(flow, folder)


@pytest.fixture
def model(loaded):
    yield loaded
    if any(isinstance(module, AdaptedLayer) for module in loaded.transformer.modules()):
        dora_mm.remove(loaded.transformer)


@cache
def noise(channels, seed=0):
    """Noised latents of 64 pixels, two of them, and their times."""
    generator = torch.Generator().manual_seed(seed)
    side = 4 if channels == 16 else 8
    return torch.randn(2, channels, side, side, generator=generator), torch.tensor([0.3, 0.7])


def latents_of(model):
    return noise(16 if model.patch == 1 else 4)  # channels of patches, or of latents


def shifted(flow, scheduler, u, num_tokens, steps=50):
    """The times at shares u by diffusers' own scheduler, with the shift of the family's pipeline.

    It stretches levels so that the last one given is `shift_terminal`. A training has no last one: 0 is given.
    """
    own = scheduler.config
    mu = compute_empirical_mu(num_tokens, steps)
    if flow.name != "flux2_klein":
        lengths, shifts = (own.base_image_seq_len, own.max_image_seq_len), (own.base_shift, own.max_shift)
        mu = calculate_shift(num_tokens, *lengths, *shifts)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(own)
    scheduler.set_timesteps(sigmas=[*u.tolist(), 0.0], mu=mu if own.use_dynamic_shifting else None)
    return scheduler.sigmas[: len(u)]


def randomized(model):
    dora_mm.inject(model.transformer, model.target_maps["transformer"], DoRASpec(rank=4))
    for seed, layer in enumerate(adapted_layers(model.transformer).values()):
        reference.randomize(layer, size=0.3, seed=seed)


def test_a_text_encoder_whose_chat_template_asks_for_the_day_is_refused(model, monkeypatch):
    """Images have no day: none that is published asks, and a clock would change images silently."""
    if not model.tokenizer.chat_template or model.chat is None:
        pytest.skip("its prompts are read without a chat template")
    asking = model.tokenizer.chat_template + "{{ strftime_now('%Y') }}"
    monkeypatch.setattr(model.tokenizer, "chat_template", asking)
    with pytest.raises(ValueError, match="the chat template asks for the day"):
        model.encode_prompts([PROMPT])


def test_prompts_are_encoded_as_the_pipeline_does(flow, model, plain):
    theirs = flow.embeddings(plain, PROMPTS)
    for ours, expected in zip(model.encode_prompts(PROMPTS), theirs, strict=True):
        torch.testing.assert_close(ours["text"], expected, atol=1e-5, rtol=1e-5)
    numbers = [len(each) for each in theirs]
    if flow.name == "sd3":
        numbers = [len(plain.tokenizer_3(prompt).input_ids) for prompt in PROMPTS]
    if flow.name == "flux2_klein":  # whose prompts are filled up
        settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        texts = [plain.tokenizer.apply_chat_template(turn, **settings) for turn in turns]
        numbers = [len(plain.tokenizer(text).input_ids) for text in texts]
    assert [model.num_tokens(prompt) for prompt in PROMPTS] == numbers


def test_the_family_is_right(flow, folder):
    assert check_image_family(folder, flow.settings, trains=False) == []


@pytest.mark.slow
def test_a_training_of_the_family_is_resumed(flow, folder):
    assert check_image_family(folder, flow.settings) == []


def test_guidance_is_that_of_the_pipeline_without_a_warning(flow, model, plain, caplog, monkeypatch):
    theirs = flow.drawn(plain, 1)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    (ours,) = sample(model, [PROMPT], [1], steps=2, guidance=5.0)
    assert np.abs(np.asarray(ours, np.int64) - np.asarray(theirs, np.int64)).max() <= 2
    assert [record.getMessage() for record in caplog.records if record.name.startswith("diffusers.pipelines")] == []


def test_one_step_is_from_noise_alone(flow, model):
    """Where the scheduler has a `shift_terminal`, too: diffusers' own stretch divides 0 by 0 then."""
    assert model.noise.schedule(1, (8, 8)) == [1.0]
    encoded, x = [model.encode_for_sampling(PROMPT, None)], flow.start((1, *latents_of(model)[0].shape[1:]), [1])
    with torch.no_grad():
        x = x - model.predict(x, torch.ones(1), encoded, [])
    assert x.isfinite().all()
    (image,) = sample(model, [PROMPT], [1], steps=1, guidance=1.0)
    assert np.asarray(image).std() > 0


def test_what_is_distilled_draws_at_the_noise_levels_of_its_pipeline(flow, tmp_path):
    if flow.distilled is None:
        pytest.skip("none is distilled of it")
    folder = flow.build(tmp_path / "model", is_distilled=True)
    pipe = flow.plain(folder)
    flow.latents(pipe, [PROMPT], [1], steps=3)
    model = opened(flow, folder)
    levels = model.noise.schedule(3, [side // model.downscale for side in SIZE.values()])
    torch.testing.assert_close(torch.tensor(levels), pipe.scheduler.sigmas[:-1])


@pytest.mark.parametrize("most", [16, 40])
def test_prompts_are_cut_at_max_tokens_as_by_the_pipeline(flow, folder, plain, most):
    if opened(flow, folder).most_tokens is None:
        pytest.skip("its pipeline cuts no prompt")
    prompt, model = "Describe this image in detail. " * 9, opened(flow, folder, max_tokens=most)
    unguided = {"do_classifier_free_guidance": False} if flow.name in ("z_image", "sd3") else {}
    others = {"prompt_2": None, "prompt_3": None} if flow.name == "sd3" else {}
    theirs = plain.encode_prompt(prompt, max_sequence_length=most, **unguided, **others)[0][0]
    (ours,) = model.encode_prompts([prompt])
    torch.testing.assert_close(ours["text"], theirs, atol=1e-5, rtol=1e-5)
    assert most < 45 < model.num_tokens(prompt)
    assert model.cut([prompt]) == [prompt]


@pytest.mark.parametrize("steps", [4, 50])
def test_the_times_of_kleins_training_are_those_of_images_in_shift_steps(steps, tmp_path):
    flow = FLOWS[NAMES.index("flux2_klein")]
    model = opened(flow, flow.build(tmp_path / "model"), shift_steps=steps)
    u, (height, width) = torch.linspace(0.9, 0.1, 5), (48, 64)
    expected = shifted(flow, model.scheduler, u, height * width, steps)
    torch.testing.assert_close(model.noise.times(u, (height, width)), expected)


def test_latents_are_the_normalized_mode_and_decode_to_what_the_pipelines_do(flow, model, plain, image_folder):
    data = DataConfig(folder=str(image_folder), resolution=64)
    image = read_training_images(data)[0]
    prompts = PromptEncoder(model, trained=False)
    batches = CaptionedBatches(model, [image], prompts, data, batch_size=1, seed=0)
    pixels = render(load_rgb(image.path), batches._frame(0, False, None))[None]
    frames = pixels.unsqueeze(2) if flow.is_over_frames else pixels
    if plain.vae.config.get("in_channels") == 4:  # with alpha: of an image that is opaque
        frames = torch.cat([frames, torch.ones_like(frames[:, :1])], dim=1)
    posterior = plain.vae.encode(frames).latent_dist
    mode = posterior.mode()
    images = plain.vae.decode(mode).sample.detach()
    mode, images = (each.flatten(1, -3) if each.ndim == 5 else each for each in (mode, images))
    encoded = model.encode_images(pixels)
    latents = batches(0).latents if model.trains_on_mode else model.normalized(encoded.mean)
    torch.testing.assert_close(latents, flow.as_denoised(plain, mode), atol=1e-5, rtol=1e-5)
    if not model.trains_on_mode:
        torch.testing.assert_close(encoded.logvar, posterior.logvar.detach(), atol=1e-5, rtol=1e-5)
    ours = decoded(model.vae, model.encode_images(pixels).mean)[0]
    (theirs,) = plain.image_processor.postprocess(images)
    assert list(ours.getdata()) == list(theirs.getdata())


def test_the_loss_and_its_gradients_are_those_of_plain_torch(flow, model, plain):
    randomized(model)
    encoded, (x, _) = model.encode_prompts([PROMPT, "a cat"]), latents_of(model)
    task = DiffusionTask(model, LossConfig())
    task.loss(ConditionedLatents(x, encoded, []), torch.Generator().manual_seed(3)).mean.backward()
    every = dora_mm.adapter_parameters(model.transformer)
    parameters = {name: parameter for name, parameter in every.items() if parameter.grad is not None}
    ours = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None

    stream = torch.Generator().manual_seed(3)
    e, u = torch.randn(x.shape, generator=stream), torch.randn(2, generator=stream).sigmoid()
    t = shifted(flow, plain.scheduler, u, x.shape[2] * x.shape[3] // model.patch**2)
    mixed = torch.stack([(1 - t[row]) * x[row] + t[row] * e[row] for row in range(2)])
    loss = (model.predict(mixed, t, encoded, []) - (e - x)).pow(2).mean()
    loss.backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(ours[name], parameter.grad, atol=5e-7, rtol=1e-4)
    unread = {name for name in every if name not in ours or not ours[name].any()}
    assert unread == {name for name in every if flow.unread and re.match(flow.unread, name)}
