"""SDXL's encoding against diffusers' own pipeline, and loading."""

import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from dora_mm.config.models import ModelConfig
from dora_mm.data.syntax import weighted
from dora_mm.models.images.families import load_image_model
from dora_mm.models.images.sdxl.encoding import (
    encode_for_pipeline,
    encode_images,
    encode_prompts,
    normalize_latents,
    num_chunks,
    time_ids,
    tokenize,
)
from samples.build.pretraining.vae import shift_latents

PROMPTS = ["a flat icon of a bus", "", "a TOK icon of a flying saucer, in the style of TOK"]


def test_prompt_embeddings_equal_the_pipelines(tiny):
    embeddings, pooled = encode_prompts(tiny, PROMPTS)
    theirs, _, their_pooled, _ = tiny.pipeline().encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert torch.equal(embeddings, theirs)
    assert torch.equal(pooled, their_pooled)


def test_each_part_of_the_embedding_comes_from_its_own_text_encoder(tiny):
    """The encoders have different widths, so swapping them would fail."""
    embeddings, _ = encode_prompts(tiny, PROMPTS)
    width = tiny.text_encoder.config.hidden_size
    ids, ids_2 = tokenize(tiny, PROMPTS)
    one = tiny.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    two = tiny.text_encoder_2(ids_2, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(embeddings[..., :width], one)
    assert torch.equal(embeddings[..., width:], two)


def test_weights_multiply_the_embeddings_of_their_words_and_keep_the_mean(tiny):
    """As A1111 does it, written here once more; the pooled embedding has no weights."""
    plain, words = encode_for_pipeline(tiny, "a big bus, red"), weighted("a (big:1.5) bus, [red]")
    found = encode_for_pipeline(tiny, words)
    assert torch.equal(found["pooled_prompt_embeds"], plain["pooled_prompt_embeds"])
    width, expected = tiny.text_encoder.config.hidden_size, []
    for tokenizer, columns in ((tiny.tokenizer, slice(0, width)), (tiny.tokenizer_2, slice(width, None))):
        counts = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in ("a", "big", "bus,", "red")]
        weights = torch.ones(tokenizer.model_max_length)
        start = 1 + counts[0]
        weights[start : start + counts[1]] = 1.5
        start += counts[1] + counts[2]
        weights[start : start + counts[3]] = 1 / 1.1
        z = plain["prompt_embeds"][..., columns]
        expected.append(z * weights[None, :, None])
        expected[-1] *= z.mean() / expected[-1].mean()
    torch.testing.assert_close(found["prompt_embeds"], torch.cat(expected, dim=-1))
    unweighted = encode_for_pipeline(tiny, weighted("a big bus, red"))
    assert all(torch.equal(unweighted[name], plain[name]) for name in plain)


def test_a_break_starts_a_chunk(tiny):
    parts = [encode_prompts(tiny, [text])[0] for text in ("a bus", "a red house")]
    found = encode_for_pipeline(tiny, weighted("a bus BREAK a red house"), "blurry")
    torch.testing.assert_close(found["prompt_embeds"], torch.cat(parts, dim=1))
    assert found["negative_prompt_embeds"].shape == found["prompt_embeds"].shape


def test_tokenizers_pad_differently(tiny):
    ids, ids_2 = tokenize(tiny, ["a bus"])
    assert ids[0, -1] == tiny.tokenizer.eos_token_id
    assert ids_2[0, -1] == tiny.tokenizer_2.convert_tokens_to_ids("!")
    assert not torch.equal(ids, ids_2)


def test_pooling_takes_the_end_of_the_text(tiny):
    """With the legacy end id in the config, pooling takes the highest id: the end token, the vocabulary's last."""
    ids_2 = tokenize(tiny, ["a bus"])[1]
    assert ids_2.max() == tiny.tokenizer_2.eos_token_id == len(tiny.tokenizer_2) - 1
    pooled = encode_prompts(tiny, ["a bus"])[1]
    end = int((ids_2[0] == tiny.tokenizer_2.eos_token_id).nonzero()[0])
    states = tiny.text_encoder_2(ids_2).last_hidden_state
    assert torch.allclose(pooled[0], tiny.text_encoder_2.text_projection(states[0, end]), atol=1e-6)


@pytest.mark.parametrize(
    ("original", "crop", "target"),
    [((1024, 1024), (0, 0), (1024, 1024)), ((600, 1000), (0, 128), (832, 1216)), ((2000, 900), (64, 0), (1344, 704))],
)
def test_micro_conditioning_table(tiny, original, crop, target):
    theirs = tiny.pipeline()._get_add_time_ids(
        original, crop, target, torch.float32, tiny.text_encoder_2.config.projection_dim
    )
    assert torch.equal(time_ids(original, crop, target)[None], theirs)


def test_no_token_of_a_long_prompt_is_lost(tiny):
    """Each chunk begins and ends as a prompt does, and is padded as the tokenizers pad."""
    size = tiny.tokenizer.model_max_length
    prompts = [" ".join(f"word{i}" for i in range(40)), "a bus", "x" * 150, ""]
    all_ids = tokenize(tiny, prompts)
    for tokenizer, ids in zip((tiny.tokenizer, tiny.tokenizer_2), all_ids, strict=True):
        assert ids.shape == (4, max(num_chunks(tiny, prompt) for prompt in prompts) * size)
        for prompt, row in zip(prompts, ids, strict=True):
            found = []
            for chunk in row.split(size):
                assert chunk[0] == tokenizer.bos_token_id
                end = int((chunk == tokenizer.eos_token_id).nonzero()[0])
                assert set(chunk[end + 1 :].tolist()) <= {tokenizer.pad_token_id}
                found += chunk[1:end].tolist()
            assert found == tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    assert [num_chunks(tiny, prompt) for prompt in prompts[1:]] == [1, 4, 1]


def test_a_chunk_ends_after_a_comma_or_between_words(tiny):
    size = tiny.tokenizer.model_max_length

    def chunks(prompt):
        return [
            tiny.tokenizer.decode(chunk, skip_special_tokens=True)
            for chunk in tokenize(tiny, [prompt])[0][0].split(size)
        ]

    near, far = ["a bus "] * 8, ["a bus "] * 4
    assert chunks("".join([*near, ", ", *near]))[0].endswith("a bus ,")
    assert len(chunks("".join([*far, ", ", *near, *near]))[0]) > len(chunks("".join([*near, ", ", *near]))[0])
    for chunk in chunks(" ".join(["flying saucer"] * 20)):
        assert set(chunk.split()) <= {"flying", "saucer"}


def test_chunks_are_encoded_alone_and_joined(tiny):
    size = tiny.tokenizer.model_max_length
    short, long = "a bus", ", ".join(f"a TOK icon of flying saucer {i}" for i in range(6))
    ids, ids_2 = tokenize(tiny, [long])
    embeddings, pooled = encode_prompts(tiny, [long])
    assert embeddings.shape[1] == ids.shape[1] == num_chunks(tiny, long) * size
    for index, (one, two) in enumerate(zip(ids.split(size, 1), ids_2.split(size, 1), strict=True)):
        first = tiny.text_encoder(one, output_hidden_states=True).hidden_states[-2]
        second = tiny.text_encoder_2(two, output_hidden_states=True)
        assert torch.equal(embeddings[:, index * size : (index + 1) * size, : first.shape[-1]], first)
        assert torch.equal(
            embeddings[:, index * size : (index + 1) * size, first.shape[-1] :], second.hidden_states[-2]
        )
        assert torch.equal(pooled, second.text_embeds) == (index == 0)
    padded, padded_pooled = encode_prompts(tiny, [short], 2)
    alone, alone_pooled = encode_prompts(tiny, [short])
    assert torch.equal(padded, torch.cat([alone, encode_prompts(tiny, [""])[0]], dim=1))
    assert torch.equal(padded_pooled, alone_pooled)
    with pytest.raises(ValueError, match="chunks"):
        encode_prompts(tiny, [short, long], 1)


@pytest.mark.parametrize("negative", [None, "", "red"])
def test_embeddings_for_the_pipeline_are_its_own(tiny, negative):
    pipe = tiny.pipeline()
    theirs = pipe.encode_prompt("a flat icon of a bus", negative_prompt=negative)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for ours in (
        encode_for_pipeline(tiny, "a flat icon of a bus", negative),
        encode_for_pipeline(pipe, "a flat icon of a bus", negative),
    ):
        assert ours.keys() == set(names)
        assert all(torch.equal(ours[name], each) for name, each in zip(names, theirs, strict=True))


def test_the_end_of_a_long_prompt_is_drawn(tiny):
    pipe = tiny.pipeline()
    start = ", ".join(["a TOK icon of a flying saucer"] * 6)

    def draw(prompt, negative):
        embeddings = encode_for_pipeline(pipe, prompt, negative)
        stream = torch.Generator().manual_seed(0)
        drawn = pipe(**embeddings, generator=stream, num_inference_steps=2, height=64, width=64, output_type="np")
        return drawn.images[0]

    for negative in (None, "red", f"{start}, red"):
        assert np.abs(draw(f"{start}, a bus", negative) - draw(f"{start}, a cat", negative)).max() > 1e-3
    assert np.abs(draw("a bus", f"{start}, red") - draw("a bus", f"{start}, blue")).max() > 1e-3


def test_any_word_encodes_without_unknown_tokens(tiny):
    ids = tiny.tokenizer("Straßenbahn 日本 naïve 🚌").input_ids
    assert ids.count(tiny.tokenizer.unk_token_id) == 1  # the end token, which is also the unknown token


def test_latents_are_normalised_as_the_pipelines_decoding_inverts_it(tiny):
    tiny.vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.0, 2.0, 4.0], scaling_factor=0.5)
    latents = torch.randn(2, 4, 8, 8)
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in (tiny.vae.config.latents_mean, tiny.vae.config.latents_std))
    back = normalize_latents(tiny.vae, latents) * std / tiny.vae.config.scaling_factor + mean  # the pipeline's decoding
    assert torch.allclose(back, latents, atol=1e-6)


def test_drawn_latents_follow_the_posterior(tiny):
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    latents = tiny.encode_images(pixels)
    assert torch.equal(latents.sample(None), latents.mean)
    draws = torch.cat([latents.sample(torch.Generator().manual_seed(i)) for i in range(400)])
    assert torch.allclose(draws.std(0), (0.5 * latents.logvar[0]).exp(), rtol=0.2)


def test_saved_model_loads_in_plain_diffusers_and_here(tiny_folder, tiny):
    theirs = StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    ours = load_image_model(ModelConfig(path=str(tiny_folder)))
    for prompt in PROMPTS:
        assert torch.equal(encode_prompts(ours, [prompt])[0], encode_prompts(tiny, [prompt])[0])
    assert theirs.unet.config.sample_size == ours.unet.config.sample_size
    assert ours.resolution == 64


@pytest.mark.parametrize("part", ["unet", "text_encoder_2", "tokenizer", "scheduler", "vae"])
def test_a_missing_part_is_named(tiny_folder, tmp_path, part):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=f"{folder} is incomplete: it lacks {part}"):
        load_image_model(ModelConfig(path=str(folder)))


def test_a_folder_that_is_not_a_model(tmp_path):
    with pytest.raises(ValueError, match=f"model.path: {tmp_path} is not an image model of diffusers: it has no model"):
        load_image_model(ModelConfig(path=str(tmp_path)))


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"pickled")
    with pytest.raises(ValueError, match=r"model\.ckpt .*\.safetensors"):
        load_image_model(ModelConfig(path=str(tmp_path / "model.ckpt")))
    save_file({"lora_A": torch.zeros(2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"adapter\.safetensors cannot be loaded"):
        load_image_model(ModelConfig(path=str(tmp_path / "adapter.safetensors")))


def test_pickled_weights_are_refused(tiny_folder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match=f"{folder} cannot be loaded"):
        assert load_image_model(ModelConfig(path=str(folder))).networks


def test_a_path_that_does_not_exist():
    with pytest.raises(ValueError, match=r"model\.path: \./nowhere does not exist"):
        load_image_model(ModelConfig(path="./nowhere"))


def test_a_part_without_weights_is_an_error(tiny_folder, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{folder} cannot be loaded"):
        assert load_image_model(ModelConfig(path=str(folder))).networks


def test_shifted_latents_are_normalised_and_decode_to_the_same(tiny):
    pixels = torch.rand(3, 3, 64, 64) * 2 - 1
    mean, logvar = encode_images(tiny, pixels)
    before = tiny.vae.decode(mean).sample
    centre, std = mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3))
    shift_latents(tiny.vae, centre, std)
    shifted, shifted_logvar = encode_images(tiny, pixels)
    scale = std.view(1, -1, 1, 1)
    assert torch.allclose(shifted, (mean - centre.view(1, -1, 1, 1)) / scale, atol=1e-4)
    assert torch.allclose(shifted_logvar, logvar - 2 * scale.log(), atol=1e-4)
    assert torch.allclose(tiny.vae.decode(shifted).sample, before, atol=1e-4)


def test_sdxls_own_vae_encodes_half_precision_weights_in_float32(tiny_folder):
    model = load_image_model(ModelConfig(path=str(tiny_folder), dtype="bfloat16"))
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, _ = model.encode_images(pixels)
    assert model.vae.dtype == torch.bfloat16
    assert torch.equal(mean, deepcopy(model.vae).float().encode(pixels).latent_dist.mean)
