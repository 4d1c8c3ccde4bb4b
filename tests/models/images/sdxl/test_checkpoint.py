"""SDXL in one file: loaded without a network, and what it predicts."""

import json
import shutil
from dataclasses import replace

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_mm import cli
from dora_mm.config.loader import load_config
from dora_mm.config.models import ModelConfig
from dora_mm.formats.files.base_weights import BaseWeights
from dora_mm.models.architectures import networks_of
from dora_mm.models.images import families
from dora_mm.models.images.families import about_prediction, load_image_model
from dora_mm.models.images.sdxl import checkpoint
from dora_mm.models.images.sdxl.family import SDXL
from dora_mm.models.images.sdxl.random_weights import build_tiny_sdxl
from tests.conftest import SIZES
from tests.shared.single_files import write_single_file

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model with as many layers as SDXL: names in single files depend on their number."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    build_tiny_sdxl(**{**SIZES, "unet_layers": 2}).pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def single(folder, tmp_path, monkeypatch):
    """Writes the tiny model as one file with these markers; its configs and tokenizers stand in for those of SDXL."""
    configs = tmp_path / "configs"
    for file in folder.rglob("*config.json"):
        copy = configs / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    (configs / "model_index.json").write_bytes((folder / "model_index.json").read_bytes())
    (configs / "scheduler/scheduler_config.json").write_bytes(
        (checkpoint.CONFIGS / "scheduler/scheduler_config.json").read_bytes()
    )
    parts = checkpoint.tokenizers(SIZES["num_merges"], 40)
    monkeypatch.setattr(SDXL, "single_file", replace(SDXL.single_file, configs=configs, parts=lambda: parts))

    def write(*markers):
        return str(write_single_file(folder, tmp_path / "xl.safetensors", markers))

    return write


def loaded(path, **settings):
    return load_image_model(ModelConfig(path=path, **settings))


def test_the_packaged_configs_are_those_of_sdxl_base():
    """The numbers of parameters of the published model."""
    counts = {
        name: sum(parameter.numel() for parameter in network.build().parameters())
        for name, network in networks_of(str(checkpoint.CONFIGS)).items()
    }
    assert counts == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }


@pytest.mark.parametrize("text", ["a TOK icon of an astronaut, riding a horse", "3D, isn't it? 123 naïve — 日本", ""])
def test_tokens_are_those_of_open_clip(text):
    theirs = open_clip.get_tokenizer("ViT-L-14")([text])[0].tolist()
    for name, tokenizer in checkpoint.tokenizers().items():
        ours = tokenizer(text).input_ids
        assert ours == theirs[: len(ours)], name
        padded = tokenizer(text, padding="max_length", max_length=77).input_ids
        assert set(padded[len(ours) :]) == {49407 if name == "tokenizer" else 0}


def test_a_single_file_is_the_model_of_the_folder(single, folder):
    file, folder = loaded(single("v_pred", "ztsnr")), loaded(str(folder))
    for name, network in folder.networks.items():
        same = network.state_dict()
        for key, tensor in file.networks[name].state_dict().items():
            assert torch.equal(tensor, same[key]), (name, key)
    assert file.tokenizer("a bus").input_ids == folder.tokenizer("a bus").input_ids
    prompts = ["a flat icon of a bus"]
    assert torch.equal(file.encode_prompts(prompts)[0]["text"], folder.encode_prompts(prompts)[0]["text"])


def test_a_single_file_is_loaded_part_by_part(single, monkeypatch):
    """So that text encoders can be freed before the UNet is loaded."""
    loads, own = [], families.load_single_file

    def load(*args):
        found = own(*args)
        loads.append({name for name in found if name in ("unet", "vae", "text_encoder", "text_encoder_2")})
        return found

    monkeypatch.setattr(families, "load_single_file", load)
    model = loaded(single())
    model.encode_prompts(["a bus"])
    assert loads[-1] == {"text_encoder", "text_encoder_2"}
    assert not any("unet" in names for names in loads)
    assert model.unet is not None


@pytest.mark.parametrize(
    ("markers", "prediction", "expected"),
    [
        ((), "auto", ("epsilon", False, "leading")),
        (("v_pred",), "auto", ("v_prediction", False, "leading")),
        (("v_pred", "ztsnr"), "auto", ("v_prediction", True, "trailing")),
        (("v_pred", "ztsnr"), "epsilon", ("epsilon", False, "leading")),
        pytest.param((), "v_prediction", ("v_prediction", False, "leading"), marks=pytest.mark.slow),
        pytest.param(("ztsnr",), "v_prediction", ("v_prediction", True, "trailing"), marks=pytest.mark.slow),
        pytest.param(("ztsnr",), "epsilon", ("epsilon", False, "leading"), marks=pytest.mark.slow),
    ],
)
def test_marker_tensors_and_the_override(single, markers, prediction, expected):
    """Without them diffusers takes every file for one that predicts the noise, and images are empty."""
    model = loaded(single(*markers), prediction=prediction)
    for scheduler in (model.scheduler, model.pipeline().scheduler):
        found = scheduler.config
        assert (found.prediction_type, found.rescale_betas_zero_snr, found.timestep_spacing) == expected
    assert model.noise.prediction == expected[0]
    last = model.noise.signal_to_noise(torch.tensor([999]))
    assert (last == 0).all() == expected[1]


def test_the_target_of_a_marked_file_is_v(single):
    model = loaded(single("v_pred", "ztsnr"))
    x, e, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # Lin et al. 2023, algorithm 1
    a, s = root[t].view(-1, 1, 1, 1), (1 - root[t] ** 2).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(model.noise.noised(x, e, t), a * x + s * e, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.noise.target(x, e, t), a * e - s * x, rtol=1e-5, atol=1e-5)


def test_a_folder_can_be_overridden_and_keeps_what_it_says_otherwise(folder):
    assert loaded(str(folder)).noise.prediction == "v_prediction"
    found = loaded(str(folder), prediction="epsilon").scheduler.config
    assert (found.prediction_type, found.rescale_betas_zero_snr) == ("epsilon", False)


def test_files_that_contradict_themselves_are_refused(single):
    with pytest.raises(ValueError, match=r"no signal \(ztsnr\), and it does not say what it predicts: set model"):
        loaded(single("ztsnr"))
    with pytest.raises(ValueError, match=r"it is a model of EDM \(edm_vpred\.sigma_max is in it\)"):
        loaded(single("v_pred", "edm_vpred.sigma_max"))


def test_what_is_predicted_is_said(single, folder):
    marked = ModelConfig(path=single("v_pred", "ztsnr"))
    assert about_prediction(marked) == (
        "SDXL that predicts v_prediction, whose last noise level has no signal (zero terminal SNR), as its marker "
        "tensors say"
    )
    changed = marked.model_copy(update={"prediction": "epsilon"})
    assert about_prediction(changed) == "SDXL that predicts epsilon, as model.prediction says"
    assert "zero terminal" in about_prediction(ModelConfig(path=str(folder)))


def test_inspect_says_what_a_single_file_predicts(single, capsys):
    file = single("v_pred")
    assert cli.main(["inspect", file]) == 0
    out = capsys.readouterr().out
    assert out.startswith("SDXL that predicts v_prediction, as its marker tensors say\n")
    assert f"{file} unet: UNet2DConditionModel, target map sdxl-unet" in out
    assert "text_encoder_2" in out


def test_the_choice_is_part_of_what_images_depend_on():
    assert ModelConfig(path="a").generation_settings() == {}
    assert ModelConfig(path="a", prediction="epsilon").generation_settings() == {"prediction": "epsilon"}


@pytest.mark.slow
def test_a_trained_adapter_is_drawn_with_what_it_was_trained_on(single, image_folder, tmp_path, capsys):
    config = {
        "pipeline": "train_diffusion",
        "output": str(tmp_path / "run"),
        "model": {"path": single("v_pred", "ztsnr")},
        "adapter": {"rank": 2, "alpha": 2.0},
        "data": {"folder": str(image_folder), "resolution": 64},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "train": {"steps": 1, "batch_size": 2},
        "sample": {"prompts": ["a TOK icon"], "steps": 2},
    }
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    assert cli.main(["train", str(tmp_path / "train.yaml"), "--dry-run"]) == 0
    assert "predicts v_prediction" in capsys.readouterr().out
    assert cli.main(["train", str(tmp_path / "train.yaml"), "--set", "model.prediction=epsilon"]) == 0
    assert load_config(tmp_path / "run/config.yaml").model.prediction == "epsilon"
    job = ["sample", "--set", f"adapter.path={tmp_path / 'run'}", "prompts=[a TOK icon]", "steps=2"]
    assert cli.main([*job, f"output={tmp_path / 'drawn'}"]) == 0
    assert (tmp_path / "drawn/samples").is_dir()


def small(configs, folder):
    """SDXL with every layer of the published one, and a few channels in each, as a folder of its networks."""
    narrow = {
        "unet": {
            "block_out_channels": [8, 16, 32],
            "attention_head_dim": [1, 2, 4],
            "cross_attention_dim": 24,
            "norm_num_groups": 4,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
        "vae": {"block_out_channels": [4, 8, 16, 16], "norm_num_groups": 2},
        "text_encoder": {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "projection_dim": 8},
        "text_encoder_2": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "projection_dim": 16},
    }
    shutil.copytree(configs, folder)
    for name, settings in narrow.items():
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    for name, network in networks_of(str(folder)).items():
        built = network.build().to_empty(device="cpu")
        for parameter in built.parameters():
            parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
        built.save_pretrained(folder / name)
    return folder


def test_each_tensor_of_the_published_layout_finds_its_place(tmp_path, monkeypatch):
    """All 2,515 names of sd_xl_base_1.0.safetensors, of which one is of numbers that transformers no longer keeps."""
    folder = small(checkpoint.CONFIGS, tmp_path / "model")
    monkeypatch.setattr(SDXL, "single_file", replace(SDXL.single_file, configs=folder))
    file = write_single_file(folder, tmp_path / "xl.safetensors", ["v_pred", "ztsnr"])
    tensors = load_file(file)
    positions = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    save_file({**tensors, positions: torch.arange(77)[None]}, file)
    assert len(load_file(file)) == 2515 + 2
    model = loaded(str(file))
    assert model.noise.prediction == "v_prediction"
    for name, network in model.networks.items():
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        expected, found = load_file(folder / name / f"{stem}.safetensors"), network.state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name
    weights, base = BaseWeights.open(folder), BaseWeights.open(file)
    assert all(torch.equal(weights[name], base[name]) for name in base)
    adapted = {name for name in base if name.component == "unet" and name.path.endswith(ATTENTION)}
    assert len(adapted) == 560
