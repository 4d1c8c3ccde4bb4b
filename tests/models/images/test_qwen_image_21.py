"""Qwen-Image-2.1 with references: a training pass is that of the pipeline, and so are Euler steps and images."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from diffusers import QwenImage21Pipeline
from PIL import Image
from safetensors.torch import load_file

from dora_mm.cli import main
from dora_mm.config.losses import LossConfig
from dora_mm.config.models import ModelConfig, validated
from dora_mm.models.images.families import load_image_model
from dora_mm.tasks.diffusion import DiffusionTask
from dora_mm.tasks.references import num_tokens
from tests.shared.images.pairs import batches_of, recorded, write_pairs
from tests.shared.images.tiny_qwen_image_21 import build, processor_of_images

STEPS, SEED, SIDE = 3, 5, 64
TARGET, FIRST, SECOND = (32, 128), (70, 120), (130, 60)  # (h, w)
SEEN = [(64, 96), (96, 32)]  # the sizes of both references at an area of 64 x 64 pixels
SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
PROMPTS = ["make thing 0 red", "make thing 1 red again"]
INPUTS = ("hidden_states", "timestep", "encoder_hidden_states", "img_mask")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("qwen_image_21") / "model")


def opened(folder):
    return load_image_model(validated(ModelConfig, {"path": str(folder)}))


def official(folder):
    pipe = QwenImage21Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model(folder):
    return opened(folder)


@pytest.fixture(scope="module")
def plain(folder):
    return official(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two rows with two references each, of which the second is partly transparent."""
    root = write_pairs(tmp_path_factory.mktemp("pairs") / "data", [(TARGET, [FIRST, SECOND])] * 2)
    for row in range(2):
        path = root / "references" / f"{row}_2.png"
        image, alpha = Image.open(path), np.random.default_rng(row).integers(0, 256, SECOND, dtype=np.uint8)
        image.putalpha(Image.fromarray(alpha))
        image.save(path)
    return root


def references_of(root, row):
    return [Image.open(root / "references" / f"{row}_{number}.png") for number in (1, 2)]


def edited(pipe, root, row, **settings):
    """What the pipeline makes of a row."""
    given = {"prompt": PROMPTS[row], "image": references_of(root, row), "height": TARGET[0], "width": TARGET[1]}
    given |= {"num_inference_steps": STEPS, "output_resolution": SIDE, "use_kv_cache": False, **settings}
    return pipe(**given, generator=torch.Generator().manual_seed(SEED)).images


def noise(pipe, shape):
    """The noise (1, C, h, w) that the pipeline draws."""
    return torch.randn((1, 1, *shape[1:]), generator=torch.Generator().manual_seed(SEED))[:, 0]


@pytest.mark.parametrize("causal_condition", [True, False])
def test_a_training_pass_is_the_transformers_call_in_the_pipeline(pairs, tmp_path, causal_condition):
    folder = build(tmp_path / "model", causal_condition=causal_condition)
    model, plain = opened(folder), official(folder)
    batch = batches_of(model, pairs, batch_size=2).fixed([0, 1])
    assert [tuple(16 * side for side in latents.shape[2:]) for latents in batch.references] == SEEN
    assert len({len(prompt["text"]) for prompt in batch.prompts}) == 2
    calls = []
    for row in range(2):
        with recorded(plain.transformer) as found:
            edited(plain, pairs, row, output_type="latent")
        calls.append(found[1])
    tokens = batch.latents.shape[2] * batch.latents.shape[3]
    noised = torch.cat([kwargs["hidden_states"][:, -tokens:].mT.view(batch.latents[:1].shape) for kwargs, _ in calls])
    time = torch.cat([kwargs["timestep"] for kwargs, _ in calls])
    with recorded(model.transformer) as ours, torch.no_grad():
        found = model.predict_edit(noised, time, batch.prompts, batch.framings, batch.references)
    for (given, _), (kwargs, expected), velocity in zip(ours, calls, found, strict=True):
        for name in INPUTS:
            torch.testing.assert_close(given[name].float(), kwargs[name].float(), atol=1e-5, rtol=1e-5)
        assert given["img_shapes"] == kwargs["img_shapes"] == [[(1, h // 16, w // 16) for h, w in (*SEEN, TARGET)]]
        torch.testing.assert_close(velocity.flatten(1).mT, expected[0, -tokens:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("row", [0, 1])
def test_euler_steps_end_at_the_latents_of_the_pipeline(model, plain, pairs, row):
    batch = batches_of(model, pairs).fixed([row])
    expected = edited(plain, pairs, row, output_type="latent")
    x = noise(plain, batch.latents.shape)
    with torch.no_grad():
        for level, following in pairwise([*model.noise.schedule(STEPS, x.shape[2:]), 0.0]):
            velocity = model.predict_edit(x, torch.tensor([level]), batch.prompts, batch.framings, batch.references)
            x = x + (following - level) * velocity
    torch.testing.assert_close(x.flatten(2).mT, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_of_the_family_are_those_of_the_pipeline(model, plain, pairs, guidance):
    references = [model.prepare_reference(image) for image in references_of(pairs, 1)]
    with torch.no_grad():
        encoded = [model.encode_edit_for_sampling(PROMPTS[1], "blue", references)]
    sizes = {"height": TARGET[0], "width": TARGET[1]}
    inputs = model.pipeline_inputs(encoded, steps=STEPS, guidance=guidance, **sizes)
    inputs |= model.reference_inputs(references)
    ours = model.pipeline()(**inputs, generator=torch.Generator().manual_seed(SEED)).images[0]
    guided = {"negative_prompt": "blue", "true_cfg_scale": guidance} if guidance > 1 else {}
    (theirs,) = edited(plain, pairs, 1, **guided)
    assert ours.mode == theirs.mode == "RGBA"
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 2


def test_an_area_is_the_output_resolution_of_the_pipeline(model, plain, pairs):
    area = 40 * 40
    batch = batches_of(model, pairs, reference_area=area).fixed([0])
    references = [model.prepare_reference(image, area) for image in references_of(pairs, 0)]
    assert model.reference_inputs(references)["output_resolution"] == 40
    with recorded(plain.transformer) as calls:
        edited(plain, pairs, 0, output_type="latent", output_resolution=40)
    kwargs, _ = calls[0]
    assert kwargs["img_shapes"][0][:2] == [(1, *latents.shape[2:]) for latents in batch.references]
    theirs = kwargs["hidden_states"][:, : -TARGET[0] * TARGET[1] // 256]
    packed = torch.cat([latents.flatten(2).mT for latents in batch.references], dim=1)
    torch.testing.assert_close(packed, theirs, atol=1e-5, rtol=1e-5)
    larger = batches_of(model, pairs, reference_area=10**9)
    assert larger.layouts[0][1:] == tuple(SEEN)
    assert num_tokens(larger.images[0], model, larger.config) == (2 * 8, 4 * 6 + 6 * 2)


def test_the_text_encoder_is_read_before_its_final_norm(model, plain):
    """Transformers 5 returns the last hidden state after it."""
    text_model, outputs = plain.text_encoder.model.language_model, []
    hook = text_model.layers[-1].register_forward_hook(lambda _, args, out: outputs.append(out))
    try:
        with torch.no_grad():
            plain.text_encoder(**plain.processor(text=[plain.prompt_template_t2i.format("red")], return_tensors="pt"))
            (encoded,) = model.encode_prompts(["red"])
    finally:
        hook.remove()
    before = outputs[0][:, plain._drop_idx :]
    torch.testing.assert_close(encoded["text"], before[0], atol=1e-6, rtol=1e-6)
    assert (encoded["text"] - text_model.norm(before)[0]).abs().max() > 0.1


def test_the_tokens_of_the_system_are_dropped(model, plain):
    ids = model.tokenizer(SYSTEM).input_ids
    assert plain._drop_idx == len(ids)
    kept = model.tokenizer(plain.prompt_template_t2i.format("red")).input_ids[len(ids) :]
    assert model.tokenizer.decode(kept) == "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"
    assert model.num_tokens("red") == len(kept) == len(model.encode_prompts(["red"])[0]["text"])
    torch.testing.assert_close(model.encode_prompts([""]), model.encode_prompts([" "]))


def test_rows_with_and_without_references_equal_each_alone(model, tmp_path):
    """Equal numbers of tokens in other shapes are other layouts: positions are those of a batch's first row."""
    rows = [
        (TARGET, [FIRST, SECOND]),
        (TARGET, [SECOND, FIRST]),
        (TARGET, [FIRST, SECOND]),
        (TARGET, []),
        (TARGET, [FIRST, SECOND[::-1]]),
        ((96, 64), [FIRST]),
        (TARGET, []),
    ]
    root = write_pairs(tmp_path / "data", rows)
    together, alone = batches_of(model, root, batch_size=4), batches_of(model, root)
    task, sizes = DiffusionTask(model, LossConfig()), []
    for number in range(5):
        indices = together.order(number)
        sizes.append(len(indices))
        noises = torch.stack([torch.randn(together(number).latents.shape[1:]) for _ in indices])
        times = torch.linspace(0.2, 0.8, len(indices))
        with torch.no_grad():
            found = task.losses(together.fixed(indices), noises, times)
            each = [
                task.losses(alone.fixed([row]), noises[k : k + 1], times[k : k + 1]) for k, row in enumerate(indices)
            ]
        torch.testing.assert_close(found, torch.cat(each), atol=1e-5, rtol=1e-5)
    assert sorted(sizes) == [1, 1, 1, 2, 2]


def test_padding_would_move_the_latents_of_shorter_prompts(plain):
    """Why prompts of one length go together: the pipeline's own batch is not each prompt alone."""
    settings = {"num_inference_steps": 2, "height": SIDE, "width": SIDE, "output_type": "latent"}
    prompts = ["red", "red " * 12]
    generators = [torch.Generator().manual_seed(SEED) for _ in prompts]
    both = plain(prompts, generator=generators, **settings).images
    alone = [plain(each, generator=torch.Generator().manual_seed(SEED), **settings).images for each in prompts]
    assert (both[0] - alone[0][0]).abs().max() > 1e-3
    torch.testing.assert_close(both[1], alone[1][0], atol=1e-5, rtol=1e-5)


def test_the_order_of_references_and_their_alpha_count(model, pairs):
    batch = batches_of(model, pairs).fixed([0])
    first, second = references_of(pairs, 0)
    prepared = [model.prepare_reference(image) for image in (first, second)]
    opaque = [model.prepare_reference(image.convert("RGB")) for image in (first, second)]
    for ours, image in zip(batch.references, prepared, strict=True):
        torch.testing.assert_close(model.normalized(model.encode_images(model.reference_pixels(image)).mean), ours)
    latents = model.normalized(model.encode_images(model.reference_pixels(opaque[1])).mean)
    assert (latents - batch.references[1]).abs().max() > 1e-3
    swapped = model.encode_edit_prompts([PROMPTS[0]], [prepared[::-1]])[0]
    assert not torch.equal(swapped["kinds"], batch.prompts[0]["kinds"])


def test_references_that_the_processor_would_enlarge_are_refused(folder, pairs):
    model = opened(folder)
    model.components["processor"] = processor_of_images(least=128 * 128)
    batches = batches_of(model, pairs)
    with pytest.raises(ValueError, match="data.reference_area: the processor .* of 96 x 64, 32 x 96 pixels"):
        batches.fixed([0])


def test_as_many_steps_as_sample_sigmas_are_theirs(tmp_path):
    folder = build(tmp_path / "model", sample_sigmas=[1.0, 0.6, 0.1])
    model, plain = opened(folder), official(folder)
    plain("red", height=SIDE, width=SIDE, output_type="latent")
    found = model.noise.schedule(3, (4, 4))
    torch.testing.assert_close(torch.tensor(found), plain.scheduler.sigmas[:-1])
    assert model.noise.schedule(4, (4, 4)) == opened(build(tmp_path / "other")).noise.schedule(4, (4, 4))


def test_a_training_with_references_is_resumed_and_edits_alike_in_plain_diffusers(folder, model, pairs, tmp_path):
    def config(name, steps):
        values = {
            "pipeline": "train_diffusion",
            "output": str(tmp_path / name),
            "model": {"path": str(folder)},
            "adapter": {"rank": 4, "parts": ["transformer.attn", "transformer.ff"]},
            "data": {"folder": str(pairs), "references": [str(pairs / "references")], "resolution": SIDE},
            "optimizer": {"lr": 0.1},
            "train": {"steps": steps, "batch_size": 2, "checkpoint_every": 2},
        }
        values["data"] |= {"flip": True, "reference_dropout": 0.3, "caption_dropout": 0.3}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / f"{name}.yaml")

    assert main(["train", config("whole", 4)]) == 0
    assert main(["train", config("half", 2)]) == 0
    assert main(["train", "--resume", str(tmp_path / "half"), "--set", "train.steps=4"]) == 0
    files = [tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors" for name in ("whole", "half")]
    whole, resumed = map(load_file, files)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    _draws_alike(folder, pairs, files[0])


def _draws_alike(folder, pairs, file):
    import dora_mm

    model, plain = opened(folder), official(folder)
    batch = batches_of(model, pairs).fixed([1])
    before = edited(plain, pairs, 1, output_type="latent")
    dora_mm.load_adapter({"transformer": model.transformer}, file)
    plain.load_lora_weights(str(file.parent))
    theirs = edited(plain, pairs, 1, output_type="latent")
    x = noise(plain, batch.latents.shape)
    with torch.no_grad():
        for level, following in pairwise([*model.noise.schedule(STEPS, x.shape[2:]), 0.0]):
            velocity = model.predict_edit(x, torch.tensor([level]), batch.prompts, batch.framings, batch.references)
            x = x + (following - level) * velocity
    torch.testing.assert_close(x.flatten(2).mT, theirs, atol=1e-3, rtol=1e-3)
    assert (theirs - before).abs().max() > 0.05
