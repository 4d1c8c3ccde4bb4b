import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig

from dora_mm import DoRASpec, cli, inject, save_adapter

UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 4),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 48,
    "norm_num_groups": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The configs of an SDXL model and nothing else: inspecting reads no weights."""
    folder = tmp_path_factory.mktemp("model")
    with torch.device("meta"):
        UNet2DConditionModel(**UNET).save_config(folder / "unet")
    for name, width, layers in (("text_encoder", 16, 3), ("text_encoder_2", 32, 4)):
        CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=2
        ).save_pretrained(folder / name)
    return folder


def inspect(capsys, *arguments):
    code = cli.main(["inspect", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_model_is_shown_through_its_target_maps(model, capsys):
    code, output, _ = inspect(capsys, model)
    assert code == 0
    unet, one, two = output.split("\n\n")
    assert unet.startswith(f"{model} unet: sdxl-unet at rank 8\n")
    assert "by default (attn, cross): 136 modules" in unet
    assert "by default (attn): 12 modules" in one  # 3 layers of 4 projections
    assert "by default (attn): 16 modules" in two


def test_a_single_target_map(model, capsys):
    code, output, _ = inspect(capsys, model, "--targets", "clip-text")
    assert code == 0
    assert "sdxl-unet" not in output
    assert output.count("clip-text at rank 8") == 2
    code, _, errors = inspect(capsys, model, "--targets", "clip-txt")
    assert code == 2
    assert "clip-text" in errors


@pytest.fixture
def unet(model):
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET)


@pytest.mark.parametrize(("method", "shown"), [("dora", "4      6"), ("lora", "4      6"), ("magnitude", "-      -")])
def test_an_adapter_file_is_shown_with_rank_and_alpha(unet, tmp_path, capsys, method, shown):
    report = inject(unet, "sdxl-unet", DoRASpec(rank=4, alpha=6, method=method))
    file = save_adapter(unet, tmp_path / "run" / "adapter", metadata={"unconditional": "zeros"})
    for path in (file, file.parent, file.parent.parent):
        code, output, _ = inspect(capsys, path)
        assert code == 0
        lines = output.splitlines()
        assert lines[0].startswith(f"{file}: ")
        assert any(
            line.startswith("unet") and " to_q " in line and f"{method} " in line and shown in line for line in lines
        )
        assert lines[-3].split() == ["all", str(report.num_modules), f"{report.num_parameters:,}"]
        assert lines[-2:] == ["metadata", "  unconditional: zeros"]


def test_weights_of_full_fine_tuning_are_shown(unet, tmp_path, capsys):
    report = inject(unet, "sdxl-unet", DoRASpec(rank=4, method="full"))
    save_adapter(unet, tmp_path, format="native")
    code, output, _ = inspect(capsys, tmp_path)
    assert code == 0
    assert output.splitlines()[0].startswith(f"{tmp_path / 'trained_weights.safetensors'}: ")
    assert f"{report.num_parameters:,}" in output


@pytest.mark.parametrize("damage", ["text", "cut", "foreign"])
def test_files_that_are_not_adapters_are_named(tmp_path, capsys, damage):
    path = tmp_path / "adapter.safetensors"
    header = json.dumps({"model.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    complete = len(header).to_bytes(8, "little") + header + bytes(4)
    path.write_bytes({"text": b"pipeline: train_sdxl\n", "cut": complete[:-2], "foreign": complete}[damage])
    code, output, errors = inspect(capsys, path)
    assert (code, output) == (2, "")
    assert str(path) in errors
    assert len(errors.splitlines()) == 1


def test_contradicting_arguments_are_refused(unet, model, tmp_path, capsys):
    inject(unet, "sdxl-unet", DoRASpec(rank=4, alpha=4))
    file = save_adapter(unet, tmp_path / "adapter")
    code, _, errors = inspect(capsys, file, "--targets", "sdxl-unet")
    assert (code, "--targets is for models" in errors) == (2, True)
    (tmp_path / "empty").mkdir()
    code, _, errors = inspect(capsys, tmp_path / "empty")
    assert (code, "has no config of an SDXL model's unet" in errors) == (2, True)
    code, _, errors = inspect(capsys, tmp_path / "missing")
    assert (code, "does not exist" in errors) == (2, True)
