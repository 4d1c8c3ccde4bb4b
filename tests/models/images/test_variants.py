"""Weights in half precision: folders that have these alone, and what is downloaded of the hub."""

import logging
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from dora_mm.config.models import ModelConfig, VLMModelConfig
from dora_mm.formats.files.base_weights import BaseWeights
from dora_mm.models.folders import identity_of as identity_of_folder
from dora_mm.models.folders import weight_files
from dora_mm.models.images import weights as files
from dora_mm.models.images.families import identity_of, load_image_model, load_image_model_if_local
from dora_mm.models.images.weights import by_component, chosen_variant, download_line, wanted_files
from dora_mm.models.vl.vlm.loading import load_vlm

NAMES = ("tokenizer", "tokenizer_2", "scheduler", "text_encoder", "text_encoder_2", "vae", "unet")
SDXL = {  # of stabilityai/stable-diffusion-xl-base-1.0 what matters here, with sizes in bytes
    "model_index.json": 609,
    "sd_xl_base_1.0.safetensors": 6_938_078_334,
    "scheduler/scheduler_config.json": 479,
    "text_encoder/config.json": 565,
    "text_encoder/flax_model.msgpack": 492_242_672,
    "text_encoder/model.fp16.safetensors": 246_144_152,
    "text_encoder/model.onnx": 492_587_457,
    "text_encoder/model.safetensors": 492_265_168,
    "text_encoder/openvino_model.bin": 492_242_672,
    "text_encoder_2/config.json": 575,
    "text_encoder_2/model.fp16.safetensors": 1_389_382_176,
    "text_encoder_2/model.onnx_data": 2_778_639_360,
    "text_encoder_2/model.safetensors": 2_778_702_264,
    "tokenizer/merges.txt": 524_619,
    "tokenizer/vocab.json": 1_059_962,
    "tokenizer_2/tokenizer_config.json": 725,
    "unet/config.json": 1_680,
    "unet/diffusion_pytorch_model.fp16.safetensors": 5_135_149_760,
    "unet/diffusion_pytorch_model.safetensors": 10_270_077_736,
    "unet/model.onnx_data": 10_269_854_720,
    "vae/config.json": 642,
    "vae/diffusion_pytorch_model.fp16.safetensors": 167_335_342,
    "vae/diffusion_pytorch_model.safetensors": 334_643_268,
    "vae_1_0/diffusion_pytorch_model.safetensors": 334_643_268,
}


@pytest.fixture(scope="module")
def half(tiny_folder, tmp_path_factory):
    """The tiny model as diffusers saves it in half precision: all its weights are of the variant fp16."""
    folder = tmp_path_factory.mktemp("half") / "model"
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_folder, dtype=torch.float16)
    pipe.save_pretrained(folder, variant="fp16", max_shard_size="100KB")
    assert not list(folder.glob("*/*model.safetensors"))
    return folder


def test_a_folder_of_a_variant_alone_is_loaded(half, tiny_folder):
    config = ModelConfig(path=str(half), dtype="float16")
    found = load_image_model_if_local(config)
    assert found is not None
    plain = load_image_model(ModelConfig(path=str(tiny_folder), dtype="float16"))
    for name, network in plain.networks.items():
        own = found.networks[name].state_dict()
        assert all(torch.equal(own[key], value) for key, value in network.state_dict().items())
    assert found.vae_identity.endswith("float16 None")
    weights = identity_of(config).weights
    assert weights["the weights of unet"] != weights["the weights of vae"]


def test_its_digest_is_that_of_what_is_loaded(half, tiny_folder, tmp_path):
    both = shutil.copytree(half, tmp_path / "both")
    shutil.copytree(tiny_folder, both, dirs_exist_ok=True)
    plain, chosen = ModelConfig(path=str(both)), ModelConfig(path=str(both), variant="fp16")
    assert load_image_model(plain).vae_identity == load_image_model(ModelConfig(path=str(tiny_folder))).vae_identity
    assert load_image_model(chosen).vae_identity == load_image_model(ModelConfig(path=str(half))).vae_identity
    assert load_image_model(chosen).unet.conv_in.weight.half().equal(load_image_model(plain).unet.conv_in.weight.half())
    assert identity_of(plain).weights == identity_of(ModelConfig(path=str(tiny_folder))).weights
    assert identity_of(chosen).weights["the weights of unet"] != identity_of(plain).weights["the weights of unet"]


def test_a_variant_that_is_not_there_is_named(half):
    with pytest.raises(ValueError, match=r"^model.variant: .* has no weights of the variant bf16: it has fp16$"):
        _ = load_image_model(ModelConfig(path=str(half), variant="bf16")).unet


def test_a_model_of_transformers(tiny_vlm, tmp_path):
    folder = tiny_vlm("llava")
    model = load_vlm(VLMModelConfig(path=str(folder)), torch.device("cpu"))
    copy = shutil.copytree(folder, tmp_path / "half", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(copy, variant="fp16", max_shard_size="100KB")
    assert all(".fp16-0" in file.name for file in weight_files(copy))
    found = load_vlm(VLMModelConfig(path=str(copy)), torch.device("cpu")).state_dict()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    assert identity_of_folder(str(copy), None).weights == identity_of_folder(str(folder), None).weights


@pytest.mark.parametrize(("dtype", "variant", "size"), [("bfloat16", "fp16", 6.9), ("float32", "", 13.9)])
def test_what_is_downloaded_is_what_the_dtype_needs(dtype, variant, size):
    listed = by_component(SDXL, NAMES)
    assert chosen_variant("the model", listed, None, half=dtype != "float32") == variant
    wanted = wanted_files(listed, NAMES, variant)
    assert len([file for file in wanted if file.endswith(".safetensors")]) == 4
    assert all(name not in file for file in wanted for name in ("onnx", "openvino", "msgpack", "vae_1_0"))
    assert {"tokenizer/merges.txt", "unet/config.json", "scheduler/scheduler_config.json"} <= wanted.keys()
    assert f"{size} GB are downloaded" in download_line("the model", wanted)


def test_the_size_is_said_before_a_download_and_only_that_is_fetched(half, tiny_folder, tmp_path, monkeypatch, caplog):
    both, name = shutil.copytree(half, tmp_path / "both"), "someone/sdxl"
    shutil.copytree(tiny_folder, both, dirs_exist_ok=True)
    copy = shutil.copytree(both, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors", "*.index*.json"))
    sizes = {str(file.relative_to(both)): file.stat().st_size for file in both.rglob("*") if file.is_file()}
    fetched = []

    def download(path, revision, wanted):
        assert "GB are downloaded" in caplog.text
        fetched.extend(wanted)
        for file in wanted:
            shutil.copy(both / file, copy / file)
        return copy

    monkeypatch.setattr(files, "hub_answers", lambda: True)
    monkeypatch.setattr(files, "hub_files", lambda path, revision: sizes)
    monkeypatch.setattr(files, "download", download)
    own = files.PipelineFiles(name, copy, NAMES, ModelConfig(path=name, dtype="bfloat16"))
    monkeypatch.setattr("dora_mm.models.opening.check_hub", lambda *args, **kwargs: None)
    assert own.variant == "fp16"
    with caplog.at_level(logging.INFO):
        own.fetch(["unet", "vae"])
    assert f"{name} (its fp16 weights) is not on this machine" in caplog.text
    networks = {file.partition("/")[0] for file in fetched}
    assert networks == {"unet", "vae"}
    assert not [file for file in fetched if file.endswith("model.safetensors")]
    assert own.weights("unet")


def test_adapters_are_verified_against_it(half):
    assert len(BaseWeights.open(half)) > 0
