"""Everything that is done with pictures, on a tiny Z-Image: the same recipes as for SDXL, by the files of the model."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from diffusers import ZImagePipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors.torch import load_file

import dora_mm
from dora_mm import DoRASpec
from dora_mm.cli import main
from dora_mm.config.images import DataConfig
from dora_mm.config.models import ModelConfig
from dora_mm.core.wrappers.float8 import Float8Linear
from dora_mm.data.images.folder import read_training_images
from dora_mm.data.images.pixels import load_rgb, render
from dora_mm.models.images import families
from dora_mm.models.images.components import Components
from dora_mm.models.images.families import load_image_model
from dora_mm.models.images.sdxl.family import SDXL
from dora_mm.sampling.pictures import sample
from dora_mm.tasks.image_batches import CaptionedBatches, PromptEncoder
from tests.models.images.z_image.tiny import build

PROMPT = "a TOK icon of a red ball"
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("z-image") / "model")


@pytest.fixture(scope="module")
def plain(folder):
    """The model in plain diffusers."""
    pipe = ZImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def model(folder):
    return load_image_model(ModelConfig(path=str(folder)))


@pytest.fixture
def config(tmp_path, folder, image_folder):
    def write(name="train", **sections):
        values = {
            "pipeline": "train_diffusion",
            "output": str(tmp_path / "run"),
            "model": {"path": str(folder)},
            "adapter": {"rank": 4, "parts": ["transformer.attn", "transformer.ff"]},
            "data": {"folder": str(image_folder), "resolution": 64, "caption_dropout": 0.2},
            "optimizer": {"lr": 0.02},
            "train": {"steps": STEPS, "batch_size": 2, "checkpoint_every": 2},
            "sample": {"prompts": [PROMPT], "steps": 2, "guidance": 3.0},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**values, **sections}, sort_keys=False))
        return str(path)

    return write


def difference(one, other):
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max()


def test_prompts_are_encoded_as_the_pipeline_does(model, plain):
    prompts = [PROMPT, "", "Describe this image in detail. " * 10]
    theirs = plain.encode_prompt(list(prompts), do_classifier_free_guidance=False)[0]
    for ours, expected in zip(model.encode_prompts(prompts), theirs, strict=True):
        torch.testing.assert_close(ours["text"], expected, atol=1e-5, rtol=1e-5)
    assert [model.num_tokens(prompt) for prompt in prompts] == [len(each) for each in theirs]


def test_eulers_steps_of_predict_are_the_pipelines_latents(model, plain):
    encoded = [model.encode_for_drawing(prompt, None) for prompt in (PROMPT, "a cat")]
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    embeddings = [each["text"] for each in encoded]
    settings = {"num_inference_steps": 3, "guidance_scale": 0.0, "height": 64, "width": 64, "output_type": "latent"}
    expected = plain(prompt_embeds=embeddings, negative_prompt_embeds=[], generator=generators, **settings).images
    x = randn_tensor(tuple(expected.shape), generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)])
    levels = [*model.noise.schedule(3, x.shape[2:]), 0.0]
    with torch.no_grad():
        for now, after in pairwise(levels):
            x += (after - now) * model.predict(x, torch.full((2,), now), encoded, [])
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_a_fresh_adapter_changes_no_bit(model):
    encoded = model.encode_prompts([PROMPT, "a cat in a large house"])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        before = model.predict(x, t, encoded, [])
        dora_mm.inject(model.transformer, model.target_maps["transformer"], DoRASpec(rank=4))
        assert torch.equal(model.predict(x, t, encoded, []), before)


def test_captions_of_different_lengths_do_not_change_each_other(model):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.4, 0.8])
    prompts = model.encode_prompts(["a cat", "Describe this image in detail. " * 8])
    with torch.no_grad():
        both = model.predict(x, t, prompts, [])
        for row in range(2):
            alone = model.predict(x[row : row + 1], t[row : row + 1], prompts[row : row + 1], [])
            torch.testing.assert_close(both[row], alone[0], atol=1e-5, rtol=1e-4)


def test_latents_are_the_normalized_mode(model, plain, image_folder):
    data = DataConfig(folder=str(image_folder), resolution=64)
    images = read_training_images(data)
    batches = CaptionedBatches(model, images, PromptEncoder(model, trained=False), data, batch_size=1, seed=0)
    seen: dict[int, list[torch.Tensor]] = {}
    for number in range(10):  # two epochs
        batch = batches(number)
        for row, image in enumerate(images):
            pixels = render(load_rgb(image.path), batches._frame(row, False, None))[None]
            mode = plain.vae.encode(pixels).latent_dist.mode()
            expected = (mode - plain.vae.config.shift_factor) * plain.vae.config.scaling_factor
            if expected.shape == batch.latents.shape and torch.allclose(batch.latents, expected, atol=1e-5):
                seen.setdefault(row, []).append(batch.latents)
    assert sorted(seen) == list(range(len(images)))
    assert all(torch.equal(first, second) for first, second in seen.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_in_half_precision_and_with_checkpointing(config, tmp_path, folder, dtype, checkpointing):
    train = {"steps": 1, "batch_size": 2, "gradient_checkpointing": checkpointing}
    train["mixed_precision"] = "bf16" if dtype == "bfloat16" else "no"
    model = {"path": str(folder), "dtype": dtype}
    assert main(["train", config(model=model, train=train, sample={"prompts": []})]) == 0
    weights = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_an_adapter_brings_the_settings_of_its_base(config, tmp_path, folder, caplog):
    """The run's own picture is drawn again by a job that names the run alone."""
    model = {"path": str(folder), "z_image": {"max_tokens": 12}}
    assert main(["train", config(model=model)]) == 0
    assert "captions have more than 12 tokens and lose their end, the first: a TOK icon of thing" in caplog.text
    job = tmp_path / "job.csv"
    job.write_text(f"prompt,seed,steps,guidance\n{PROMPT},0,2,3\n")
    assert main(["sample", str(job), "--set", f"adapter.path={tmp_path / 'run'}", f"output={tmp_path / 'job'}"]) == 0
    assert "1 prompts have more than 12 tokens and lose their end" in caplog.text
    drawn = Image.open(tmp_path / "job" / "samples" / "0001-seed0.png")
    assert difference(drawn, Image.open(tmp_path / "run" / "adapter" / "pictures" / "1.png")) <= 2


def test_training_resumes_by_bits_and_plain_diffusers_draws_the_same(config, tmp_path, plain, capsys):
    assert main(["train", config()]) == 0
    run = tmp_path / "run"
    trained = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(losses))

    half = config("half", output=str(tmp_path / "half"), train={"steps": 2, "batch_size": 2, "checkpoint_every": 2})
    assert main(["train", half]) == 0
    assert main(["train", "--resume", str(tmp_path / "half"), "--set", f"train.steps={STEPS}"]) == 0
    resumed = load_file(tmp_path / "half" / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)

    job = tmp_path / "job.csv"
    job.write_text(f"prompt,seed,strength\n{PROMPT},3,1\n{PROMPT},3,0\n")
    assert (
        main(
            ["sample", str(job), "--set", f"adapter.path={run}", f"output={tmp_path / 'job'}", "steps=2", "guidance=5"]
        )
        == 0
    )
    drawn = tmp_path / "job" / "samples"
    with_adapter, without = Image.open(drawn / "0001-seed3.png"), Image.open(drawn / "0002-seed3.png")

    def draw():
        generator = torch.Generator().manual_seed(3)
        settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}
        return plain(PROMPT, negative_prompt="", generator=generator, **settings).images[0]

    assert difference(draw(), without) <= 2
    plain.load_lora_weights(str(run / "adapter"))
    try:
        assert difference(draw(), with_adapter) <= 2
    finally:
        plain.unload_lora_weights()
    assert difference(with_adapter, without) > 3


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished training."""
    place = tmp_path_factory.mktemp("trained")
    model = load_image_model(ModelConfig(path=str(folder)))
    dora_mm.inject(model.transformer, model.target_maps["transformer"], DoRASpec(rank=4), parts=["attn"])
    for name, parameter in dora_mm.adapter_parameters(model.transformer).items():
        parameter.data.add_(0.3 * torch.randn(parameter.shape) * ("magnitude" not in name))
    dora_mm.save_adapter({"transformer": model.transformer}, place, metadata={"base_model": str(folder)})
    return place


def test_a_grid_and_a_replayed_picture(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = {"pipeline": "grid", "output": "grid", "adapter": {"path": str(run)}, "prompt": PROMPT, "steps": 2}
    grid |= {"columns": {"name": "strength", "values": [1.0, 2.0]}, "rows": {"name": "size", "values": [64, "96x64"]}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    assert main(["grid", "grid.yaml"]) == 0
    assert len(list((tmp_path / "grid" / "samples").glob("*.png"))) == 6
    picture = tmp_path / "grid" / "samples" / "0003-seed0.png"
    assert main(["sample", "--replay", str(picture), "--set", "output=again"]) == 0
    assert difference(Image.open(picture), Image.open(tmp_path / "again" / "samples" / picture.name)) == 0


def test_a_dry_run_shows_data_parts_memory_and_time(config, tmp_path, capsys):
    assert main(["train", config(), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for words in ("transformer.attn", "transformer.ff", "longest   ", "s a step (measured)", "together"):
        assert words in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["loss.min_snr_gamma=5.0"], "loss.min_snr_gamma is for models that predict noise or v, and Z-Image does not"),
        (["loss.noise_offset=0.1"], "loss.noise_offset is for models that predict noise or v"),
        (["model.sdxl.unconditional=empty"], "is Z-Image, not SDXL: leave it out"),
        (["adapter.parts=[unet.attn]"], "this model has no part unet.attn; it has transformer.attn"),
        (["adapter.parts=[text_encoder.attn]"], "this model has no part text_encoder.attn"),
        (["model.dtype=float16", "train.mixed_precision=fp16"], "model.dtype: Z-Image needs float32 or bfloat16"),
        (["model.z_image.max_tokens=800"], "model.z_image.max_tokens must be at most 576 for "),
        (
            ["model.vae=samples/tiny-sdxl/vae"],
            "does not fit the model: latent_channels: 8, not 4",
        ),
        (["model.vae=samples/tiny-sdxl/unet"], "model.vae: "),
        (["sample.guidance_rescale=0.7"], "sample.guidance_rescale is not for Z-Image"),
    ],
)
def test_what_has_no_meaning_for_the_family_is_refused(config, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.setattr(families, "load_components", None)  # found before anything is loaded, but the scheduler
    if changes[0].startswith(("loss", "sample")):
        monkeypatch.undo()
    assert main(["train", config(), "--set", *changes]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["scheduler=ddim"],
            "row 1: scheduler: ddim is not for models that predict a velocity; euler is",
        ),
        (["prompt_syntax=a1111"], "prompt_syntax a1111 is not for Z-Image, whose encoder takes no weights: use plain"),
        (["guidance_rescale=0.7"], "row 1: guidance_rescale is not for Z-Image, whose pipeline does not take it"),
        (["width=72"], "row 1: width 72 must be a multiple of 16 for Z-Image"),
    ],
)
def test_jobs_that_do_not_fit_the_family_are_refused(folder, tmp_path, capsys, settings, message):
    job = {"pipeline": "sample", "model": {"path": str(folder)}, "prompts": [PROMPT], "steps": 2}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    output = f"output={tmp_path / 'job'}"
    assert main(["sample", str(tmp_path / "job.yaml"), "--set", output, *settings]) == 2
    assert message in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "job.yaml"), "--set", output, "scheduler=euler"]) == 0


def test_the_length_of_prompts_is_a_setting_that_pictures_remember(folder, tmp_path):
    job = {"pipeline": "sample", "prompts": [PROMPT], "steps": 1, "output": str(tmp_path / "job"), "sheet": False}
    job["model"] = {"path": str(folder), "z_image": {"max_tokens": 12}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert main(["sample", str(tmp_path / "job.yaml")]) == 0
    picture = tmp_path / "job" / "samples" / "0001-seed0.png"
    assert json.loads(Image.open(picture).text["dora_mm"])["model"]["settings"] == {"z_image": {"max_tokens": 12}}
    assert main(["sample", "--replay", str(picture), "--set", f"output={tmp_path / 'again'}"]) == 0
    again = tmp_path / "again" / "samples" / picture.name
    assert difference(Image.open(picture), Image.open(again)) == 0


def test_peft_reads_what_convert_writes(run, folder, tmp_path, model):
    assert main(["convert", str(run), str(tmp_path / "peft"), "--to", "peft", "--base", str(folder)]) == 0
    from peft import PeftModel

    encoded, x, t = model.encode_prompts([PROMPT]), torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    with torch.no_grad():
        bare = model.predict(x, t, encoded, [])
        dora_mm.load_adapter({"transformer": model.transformer}, run)
        ours = model.predict(x, t, encoded, [])
        dora_mm.remove(model.transformer)
        theirs = PeftModel.from_pretrained(model.transformer, str(tmp_path / "peft"))
        assert theirs.base_model.model is model.transformer
        torch.testing.assert_close(model.predict(x, t, encoded, []), ours, atol=1e-5, rtol=1e-4)
    assert (ours - bare).abs().max() > 0.01


def test_families_with_the_same_vae_do_not_share_cached_latents(model, image_folder, tmp_path):
    """One trains on the mode, which is all that it keeps; another needs the variance."""
    data = DataConfig(folder=str(image_folder), resolution=64, latent_cache=str(tmp_path / "cache"))
    images = read_training_images(data)

    def fill(family):
        CaptionedBatches(family, images, PromptEncoder(family, trained=True), data, batch_size=1, seed=0).encode_all()
        return len(list((tmp_path / "cache").rglob("*.safetensors")))

    assert fill(model) == fill(model) == 5
    assert fill(SDXL(Components.of(vae=model.vae))) == 10


def test_sampling_without_guidance_needs_no_negative_prompt(model, plain):
    ours = sample(model, [PROMPT], [1], steps=2, guidance=1.0)[0]
    settings = {"num_inference_steps": 2, "guidance_scale": 0.0, "height": 64, "width": 64}
    theirs = plain(PROMPT, generator=torch.Generator().manual_seed(1), **settings).images[0]
    assert difference(ours, theirs) <= 2


def test_weights_in_8_bits_are_trained_over_and_drawn_with(config, folder, tmp_path):
    """All linear layers of the transformer's parts, and no other: those of embedders and of the output stay."""
    model = load_image_model(ModelConfig(path=str(folder), quantization="float8"))
    stored = {path for path, module in model.transformer.named_modules() if isinstance(module, Float8Linear)}
    assert {"layers.0.attention.to_q", "layers.0.feed_forward.w1", "noise_refiner.0.attention.to_out.0"} <= stored
    assert not any("embedder" in path or "final" in path for path in stored)
    path = config(model={"path": str(folder), "quantization": "float8"})
    assert main(["train", path]) == 0
    trained = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    assert any(key.endswith("lora_B.weight") and tensor.any() for key, tensor in trained.items())
    job = ["sample", "--set", f"adapter.path={tmp_path / 'run'}", f"prompts=[{PROMPT}]", "steps=2"]
    assert main([*job, f"output={tmp_path / 'drawn'}"]) == 0
