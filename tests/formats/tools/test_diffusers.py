"""Adapter files against diffusers itself."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import dora_mm
from dora_mm import DoRASpec, adapter_parameters, inject, load_adapter, save_adapter, set_strength
from dora_mm.core import adapted_layers
from dora_mm.formats.tools.diffusers import FILE_NAME
from dora_mm.models.images.sdxl.random_weights import build_tiny_sdxl
from tests.shared import reference

FEW = (r"re:down_blocks\..*\.attn2\.to_k", r"re:mid_block\..*\.to_out\.0", r"re:up_blocks\..*\.conv1")
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def build(seed=0):
    """A model in eval mode, as models are that make images."""
    model = build_tiny_sdxl(
        seed=seed,
        resolution=32,
        num_merges=50,
        vae_channels=(8, 8, 16),
        unet_channels=(16, 32, 32),
        unet_heads=(1, 2, 2),
        unet_layers=1,
        text_widths=(16, 32),
        text_depths=(2, 3),
    )
    for part in components(model).values():
        part.eval()
    return model


def components(model):
    return {name: getattr(model, name) for name in COMPONENTS}


def adapt(model, spec, unet_parts=("attn", "cross", "ff", "conv")):
    inject(model.unet, "sdxl-unet", spec, parts=unet_parts)
    for name in COMPONENTS[1:]:
        inject(getattr(model, name), "clip-text", spec, parts=("attn", "ff"))
    randomize(*components(model).values())
    return model


def randomize(*models):
    for model in models:
        for seed, layer in enumerate(adapted_layers(model).values()):
            reference.randomize(layer, seed=seed)


def image(pipe, **kwargs):
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 4.0}
    return pipe("a red fox", generator=generator, output_type="np", **size, **kwargs).images


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, file, image) with text encoders and convolutions adapted, alpha different from rank."""
    model = adapt(build(), DoRASpec(rank=3, alpha=5))
    folder = tmp_path_factory.mktemp("adapter")
    file = save_adapter(components(model), folder, metadata={"prompt": "in the style of TOK"})
    return model, file, image(model.pipeline())


@pytest.fixture(scope="module")
def models():
    """An adapted model and one that is not, for files that cannot be loaded."""
    return adapt(build(), DoRASpec(rank=3)), build()


def test_diffusers_gives_our_image(saved):
    _, file, expected = saved
    pipe = build().pipeline()
    bare = image(pipe)
    pipe.load_lora_weights(str(file.parent))
    assert np.abs(image(pipe) - expected).max() <= 1e-4
    assert np.abs(bare - expected).max() > 0.05


@pytest.mark.parametrize("method", ["lora", "magnitude"])
def test_diffusers_gives_our_image_for_other_methods(method, tmp_path):
    model = build()
    inject(model.unet, FEW, DoRASpec(rank=2, alpha=4, method=method))
    inject(model.text_encoder, ["q_proj", "fc1"], DoRASpec(rank=2, alpha=4, method=method))
    chosen = {"unet": model.unet, "text_encoder": model.text_encoder}
    randomize(*chosen.values())
    expected = image(model.pipeline())
    pipe = build().pipeline()
    pipe.load_lora_weights(str(save_adapter(chosen, tmp_path).parent))
    assert np.abs(image(pipe) - expected).max() <= 1e-4
    ours = build()
    load_adapter({name: getattr(ours, name) for name in chosen}, tmp_path)
    assert np.array_equal(image(ours.pipeline()), expected)
    assert next(iter(adapted_layers(ours.unet).values())).adaptation.spec.method == method


@pytest.mark.parametrize("method", ["dora", pytest.param("lora", marks=pytest.mark.slow)])
def test_diffusers_gives_our_image_with_an_embedding(method, tmp_path):
    model = build()
    inject(model.text_encoder, ["token_embedding", "q_proj"], DoRASpec(rank=2, alpha=4, method=method))
    randomize(model.text_encoder)
    expected = image(model.pipeline())
    pipe = build().pipeline()
    pipe.load_lora_weights(str(save_adapter({"text_encoder": model.text_encoder}, tmp_path).parent))
    assert np.abs(image(pipe) - expected).max() <= 1e-4
    ours = build()
    load_adapter({"text_encoder": ours.text_encoder}, tmp_path)
    assert np.array_equal(image(ours.pipeline()), expected)


def test_diffusers_reads_ranks_and_alphas_that_differ_by_layer(tmp_path):
    model = build()
    for pattern, rank, alpha in zip(FEW, (2, 3, 2), (2, 5, 1), strict=True):
        inject(model.unet, [pattern], DoRASpec(rank=rank, alpha=alpha))
    randomize(model.unet)
    expected = image(model.pipeline())
    save_adapter(model.unet, tmp_path)
    pipe = build().pipeline()
    pipe.load_lora_weights(str(tmp_path))
    assert np.abs(image(pipe) - expected).max() <= 1e-4
    ours = build()
    load_adapter(ours.unet, tmp_path)
    assert np.array_equal(image(ours.pipeline()), expected)


def test_our_own_loader_gives_the_same_bits(saved):
    model, file, expected = saved
    ours = build()
    report = load_adapter(components(ours), file)
    assert report.num_modules == sum(len(adapted_layers(m)) for m in components(model).values())
    assert np.array_equal(image(ours.pipeline()), expected)
    for name, part in components(ours).items():
        theirs = adapter_parameters(getattr(model, name))
        assert all(torch.equal(p, theirs[key]) for key, p in adapter_parameters(part).items())


def test_strength(saved):
    _, file, _ = saved
    model = build()
    bare = image(model.pipeline())
    load_adapter(components(model), file, strength=0.0)
    assert np.array_equal(image(model.pipeline()), bare)
    for part in components(model).values():
        set_strength(part, 0.5)
    assert not np.array_equal(image(model.pipeline()), bare)


@pytest.mark.parametrize("method", ["dora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("lora", "magnitude"))])
def test_strength_one_of_the_file_is_the_strength_it_was_saved_at(tmp_path, method):
    model = adapt(build(), DoRASpec(rank=3, alpha=5, method=method))
    save_adapter(components(model), tmp_path, strength=1.5)
    at_one = image(model.pipeline())
    for part in components(model).values():
        assert {layer.adaptation.strength for layer in adapted_layers(part).values()} == {
            1.0
        }  # the model is left as it was
        set_strength(part, 1.5)
    expected = image(model.pipeline())
    assert np.abs(expected - at_one).max() > 1e-2
    pipe = build().pipeline()
    pipe.load_lora_weights(str(tmp_path))
    assert np.abs(image(pipe) - expected).max() <= 1e-4


def test_an_adapted_model_takes_the_values(saved, tmp_path):
    _, file, expected = saved
    model = adapt(build(), DoRASpec(rank=3, dropout=0.1, norm_grad="exact"))
    load_adapter(components(model), file)
    layer = next(iter(adapted_layers(model.unet).values()))
    assert (layer.adaptation.spec.alpha, layer.adaptation.spec.dropout, layer.adaptation.spec.norm_grad) == (
        5,
        0.1,
        "exact",
    )
    assert np.array_equal(image(model.pipeline()), expected)


def test_several_adapters_add_up(saved, tmp_path):
    _, file, expected = saved
    other = build()
    inject(other.unet, "sdxl-unet", DoRASpec(rank=2), parts=["attn"])
    randomize(other.unet)
    save_adapter(other.unet, tmp_path)
    model = build()
    load_adapter(model.unet, tmp_path, name="first", strength=0.0)  # on attention alone
    load_adapter(components(model), file, name="other")
    assert np.abs(image(model.pipeline()) - expected).max() <= 1e-4
    with pytest.raises(ValueError, match=r"unet\..* has several adapters"):
        save_adapter(components(model), tmp_path)
    with pytest.raises(ValueError, match="'other' already"):
        load_adapter(components(model), file, name="other")


def test_header(saved):
    _, file, _ = saved
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    peft = json.loads(header["lora_adapter_metadata"])
    assert header["prompt"] == "in the style of TOK"
    assert (peft["unet.r"], peft["unet.lora_alpha"], peft["unet.use_dora"]) == (3, 5, True)
    assert "encoder.layers.0.mlp.fc1" in peft["text_encoder.target_modules"]
    assert "down_blocks.0.resnets.0.conv1" in peft["unet.target_modules"]
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(file).items()}
    assert shapes["unet.down_blocks.0.resnets.0.conv1.lora_A.weight"] == (3, 16, 3, 3)
    assert shapes["unet.down_blocks.0.resnets.0.conv1.lora_B.weight"] == (16, 3, 1, 1)
    assert shapes["unet.down_blocks.0.resnets.0.conv1.lora_magnitude_vector"] == (1, 16, 1, 1)
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight" in shapes


def edited(file, folder, *, drop=(), add=(), rename=(), header=None):
    """A copy of an adapter file with changes."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() if header is None else header
    for old, new in rename:
        tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    tensors = {key: tensor for key, tensor in tensors.items() if not any(d in key for d in drop)}
    tensors |= {key: torch.zeros(shape) for key, shape in add}
    save_file(tensors, folder / FILE_NAME, metadata=metadata)
    return folder


def test_without_metadata_alpha_is_the_rank(saved, tmp_path):
    _, file, _ = saved
    edited(file, tmp_path, header={})
    model = build()
    load_adapter(components(model), tmp_path)
    pipe = build().pipeline()
    pipe.load_lora_weights(str(tmp_path))
    assert {layer.adaptation.spec.scaling for layer in adapted_layers(model.unet).values()} == {1.0}
    assert np.abs(image(model.pipeline()) - image(pipe)).max() <= 1e-4


def test_rank_stabilised_scaling(saved, tmp_path):
    _, file, _ = saved
    peft = {"unet.r": 3, "unet.lora_alpha": 6, "unet.use_rslora": True, "unet.alpha_pattern": {"attn1.to_q": 9}}
    edited(file, tmp_path, drop=["text_encoder"], header={"lora_adapter_metadata": json.dumps(peft)})
    model = build()
    load_adapter(model.unet, tmp_path)
    for path, layer in adapted_layers(model.unet).items():
        assert layer.adaptation.spec.scaling == pytest.approx((9 if path.endswith("attn1.to_q") else 6) / 3**0.5)


FIRST = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"drop": [f"{FIRST}.lora_B"]}, rf"{FIRST}: its low-rank tensor B is missing"),
        ({"drop": [f"{FIRST}.lora_magnitude"]}, rf"{FIRST}: its magnitude is missing"),
        ({"drop": [f"{FIRST}."]}, rf"{FIRST}, which its header lists, is missing"),
        ({"drop": ["text_encoder_2."]}, r"text_encoder_2\..*, which its header lists, is missing"),
        ({"add": [("unet.odd.weight", (2, 2))]}, "also holds unet.odd.weight, which belongs to no adapter"),
        (
            {"rename": [("mid_block", "middle")], "header": {"dora_mm": "{}"}},
            r"does not fit this model: it adapts unet\.middle",
        ),
        ({"drop": [f"{FIRST}.lora_A"], "add": [(f"{FIRST}.lora_A.weight", (3, 99))]}, r"instead of \(3, 32\)"),
        (
            {"drop": [f"{FIRST}.lora_A"], "add": [(f"{FIRST}.lora_A.weight", (3,))]},
            rf"{FIRST}: the shapes \(3,\) of A and .* do not fit",
        ),
        ({"header": {"lora_adapter_metadata": "{"}}, "lora_adapter_metadata is not valid JSON"),
        ({"header": {"lora_adapter_metadata": "[]"}}, "lora_adapter_metadata is not a JSON object"),
        ({"header": {"dora_mm": json.dumps({"unet": {"dropout": 7}})}}, "unet.*: its header is invalid: dropout"),
        ({"drop": [""]}, "its keys are none"),
    ],
)
def test_files_that_do_not_fit(saved, models, tmp_path, change, words):
    _, file, _ = saved
    edited(file, tmp_path, **change)
    for model in models:
        before = {key: p.clone() for key, p in model.unet.state_dict().items()}
        with pytest.raises(ValueError, match=words) as error:
            load_adapter(components(model), tmp_path)
        assert "\n" not in str(error.value)
        assert FILE_NAME in str(error.value)
        after = model.unet.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_models_that_do_not_fit(saved, tmp_path):
    _, file, _ = saved
    with pytest.raises(ValueError, match="also adapts text_encoder, text_encoder_2"):
        load_adapter(build().unet, file)
    narrow = adapt(build(), DoRASpec(rank=3), unet_parts=("attn",))
    with pytest.raises(ValueError, match=r" adapts unet\..*, which is not adapted in this model"):
        load_adapter(components(narrow), file)
    with pytest.raises(ValueError, match=r"dora of rank 3 .* lora of rank 4"):
        load_adapter(components(adapt(build(), DoRASpec(rank=4, method="lora"))), file)
    merged = adapt(build(), DoRASpec(rank=3))
    dora_mm.merge(merged.unet)
    with pytest.raises(ValueError, match="call unmerge first"):
        load_adapter(components(merged), file)


def test_paths_without_an_adapter(saved, tmp_path):
    _, file, _ = saved
    unet = build().unet
    with pytest.raises(ValueError, match="there is no adapter at .*nowhere"):
        load_adapter(unet, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="contains no adapter files"):
        load_adapter(unet, tmp_path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"broken\.safetensors cannot be read"):
        load_adapter(unet, broken)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.safetensors cannot be read"):
        load_adapter(unet, tmp_path / "empty.safetensors")
    shutil.copy(file, tmp_path / FILE_NAME)
    shutil.copy(file, tmp_path / "trained_weights.safetensors")
    with pytest.raises(ValueError, match="contains 2 adapter files"):
        load_adapter(unet, tmp_path)


def test_what_the_format_cannot_hold(tmp_path):
    conv = nn.ModuleDict({"c": nn.Conv2d(4, 4, 3, groups=2), "d": nn.Linear(4, 4), "e": nn.Linear(4, 4)})
    inject(conv, ["c"], DoRASpec(rank=2))
    with pytest.raises(ValueError, match="unet.c is a convolution.*merge the adapter"):
        save_adapter({"unet": conv}, tmp_path)
    dora_mm.remove(conv)
    inject(conv, ["d"], DoRASpec(rank=2))
    inject(conv, ["e"], DoRASpec(rank=2, method="lora"))
    with pytest.raises(ValueError, match="dora and lora"):
        save_adapter({"unet": conv}, tmp_path)
    with pytest.raises(ValueError, match="no component 'vae'"):
        save_adapter({"vae": conv}, tmp_path)
    with pytest.raises(ValueError, match="no adapter format 'kohya'"):
        save_adapter({"unet": conv}, tmp_path, format="kohya")
    good = nn.Sequential(nn.Linear(4, 4))
    inject(good, ["0"], DoRASpec(rank=2))
    with pytest.raises(ValueError, match="'dora_mm' is written by the format"):
        save_adapter({"unet": good}, tmp_path, metadata={"dora_mm": ""})
    with pytest.raises(ValueError, match="nothing to save"):
        save_adapter({"unet": nn.Linear(2, 2)}, tmp_path)
    assert not list(tmp_path.iterdir())
