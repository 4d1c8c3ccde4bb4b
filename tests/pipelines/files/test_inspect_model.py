import json
import os
import re

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
    T5Config,
    ViTConfig,
)

from dora_mm import DoRASpec, cli, inject, save_adapter
from dora_mm.models.architectures import networks_of

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


ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The configs of an SDXL model and nothing else: inspecting reads no weights."""
    folder = tmp_path_factory.mktemp("model")
    with torch.device("meta"):
        UNet2DConditionModel(**UNET).save_config(folder / "unet")
    for name, width, layers in zip(ENCODERS, (16, 32), (3, 4), strict=True):
        config = CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=2
        )
        config.architectures = ["CLIPTextModelWithProjection" if name.endswith("2") else "CLIPTextModel"]
        config.save_pretrained(folder / name)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=8).save_config(folder / "vae")
    components = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    components |= {"text_encoder": ["transformers", "CLIPTextModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    components |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "image_encoder": [None, None]}
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True, **components}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def inspect(capsys, *arguments):
    code = cli.main(["inspect", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def rows(output):
    """The rows of the table of parts: part -> default, modules, weights, trained parameters at rank 8."""
    lines = [line.split() for line in output.splitlines()]
    start = lines.index(["part", "default", "modules", "weights", "trainable"]) + 1
    end = next(i for i, line in enumerate(lines[start:], start) if line[:2] == ["by", "default"])
    return {line[0]: tuple(line[1:]) for line in lines[start:end]}


def test_a_pipeline_is_shown_network_by_network(model, capsys):
    code, output, _ = inspect(capsys, model)
    assert code == 0
    sections = output.split(f"{model} ")
    unet, one, two = (next(s for s in sections if s.startswith(f"{n}: ")) for n in ("unet", *ENCODERS))
    assert unet.startswith("unet: UNet2DConditionModel, target map sdxl-unet at rank 8\n")
    assert {part: row[:2] for part, row in rows(unet).items()} == {
        "attn": ("yes", "68"),
        "cross": ("yes", "68"),
        "ff": ("no", "34"),
        "conv": ("no", "49"),
    }
    assert rows(one)["attn"] == ("yes", "12", f"{12 * 16 * 16:,}", f"{12 * (8 * 32 + 16):,}")  # 3 layers of 4
    assert rows(two)["attn"] == ("yes", "16", f"{16 * 32 * 32:,}", f"{16 * (8 * 64 + 32):,}")
    assert output.endswith("\nwithout a target map: vae (AutoencoderKL)\n")


def test_a_single_target_map_of_a_pipeline(model, capsys):
    code, output, _ = inspect(capsys, model, "--targets", "clip-text")
    assert code == 0
    assert "sdxl-unet" not in output
    assert output.count("target map clip-text at rank 8") == 2
    code, _, errors = inspect(capsys, model, "--targets", "clip-txt")
    assert (code, "there is no target map 'clip-txt'; there are sdxl-unet, clip-text" in errors) == (2, True)
    code, _, errors = inspect(capsys, model, "--targets", "flux")
    assert (code, "no network of" in errors, "has the target map flux" in errors) == (2, True, True)


def test_a_network_of_a_pipeline_by_itself(model, capsys):
    code, output, _ = inspect(capsys, model / "unet")
    assert code == 0
    assert output.startswith(f"{model / 'unet'}: UNet2DConditionModel, target map sdxl-unet at rank 8\n")


def test_a_vision_language_model_from_its_config_alone(tmp_path, capsys):
    """LLaVA-1.5-7B: what is trained by default of 7.06 billion parameters."""
    config = LlavaConfig(text_config=LlamaConfig(vocab_size=32_064))
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    code, output, _ = inspect(capsys, tmp_path)
    assert code == 0
    found = rows(output)
    assert list(found) == ["text.attn", "text.mlp", "vision.attn", "vision.mlp", "connector"]
    attention, mlp = 128 * (8 * 8192 + 4096), 32 * (3 * 8 * (4096 + 11_008) + 2 * 11_008 + 4096)
    assert found["text.attn"] == ("yes", "128", f"{128 * 4096**2:,}", f"{attention:,}")
    assert found["text.mlp"] == ("yes", "96", f"{96 * 4096 * 11_008:,}", f"{mlp:,}")
    assert found["connector"] == ("no", "2", f"{4096 * (1024 + 4096):,}", f"{8 * (1024 + 3 * 4096) + 2 * 4096:,}")
    trained, total = attention + mlp, attention + mlp + 7_063_427_072
    assert output.splitlines()[-1] == (
        f"by default (text.attn, text.mlp): trainable {trained:,} of {total:,} parameters "
        f"({100 * trained / total:.3f} %)"
    )


def test_a_derived_map_says_so_and_what_it_leaves_out(tmp_path, capsys):
    config = Qwen3VLMoeConfig()
    config.architectures = ["Qwen3VLMoeForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    code, output, _ = inspect(capsys, tmp_path)
    assert code == 0
    assert ", target map derived from its structure, at rank 8\n" in output
    assert "left out: model.visual.patch_embed.proj, lm_head\n" in output
    assert "require" not in output  # advice for who calls inject
    count, trained = 24 * 60 * 3 * 2048 * 1408, 24 * 60 * (8 * (2048 + 2816) + 2816 + 8 * (1408 + 2048) + 2048)
    assert rows(output)["text.experts"] == ("no", "48", f"{count:,}", f"{trained:,}")
    assert count / sum(p.numel() for p in networks_of(str(tmp_path))[""].build().parameters()) > 0.88


def test_the_experts_of_a_map_that_is_not_derived_are_a_part_too(tmp_path, capsys):
    config = Qwen3MoeConfig(num_hidden_layers=2, num_experts=8, vocab_size=100)
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(tmp_path)
    code, output, _ = inspect(capsys, tmp_path)
    assert code == 0
    assert ", target map llm-moe at rank 8\n" in output
    assert rows(output)["text.experts"][:2] == ("no", "4")


def test_the_vl_bart_of_the_samples(capsys):
    code, output, _ = inspect(capsys, "samples/tiny-vl")
    assert code == 0
    assert output.startswith("samples/tiny-vl: VLBart, target map bart at rank 8\n")
    assert {part: row[:2] for part, row in rows(output).items()} == {
        "text.qv": ("yes", "12"),
        "text.ko": ("no", "12"),
        "text.mlp": ("no", "12"),
        "cross.qv": ("yes", "6"),
        "cross.ko": ("no", "6"),
    }


def test_parts_that_a_model_lacks_have_no_modules(tmp_path, capsys):
    config = T5Config(num_layers=2, d_model=32, d_ff=48, d_kv=8, num_heads=4)
    config.architectures = ["T5EncoderModel"]
    config.save_pretrained(tmp_path)
    code, output, _ = inspect(capsys, tmp_path)
    assert code == 0
    assert rows(output)["cross"] == ("no", "0", "0", "0")
    assert rows(output)["text.attn"][:2] == ("yes", "8")


def test_a_pattern_shows_what_it_takes(tmp_path, capsys):
    config = T5Config(num_layers=2, d_model=32, d_ff=48, d_kv=8, num_heads=4)
    config.architectures = ["T5EncoderModel"]
    config.save_pretrained(tmp_path)
    code, output, _ = inspect(capsys, tmp_path, "--targets", r"re:.*\.SelfAttention\.[kv]")
    assert code == 0
    assert rows(output)[r"re:.*\.SelfAttention\.[kv]"][:2] == ("yes", "4")
    code, _, errors = inspect(capsys, tmp_path, "--targets", "re:.*SelfAttention.x")
    assert (code, "matches no module; nearest: " in errors) == (2, True)


def test_models_without_a_map(tmp_path, capsys):
    config = ViTConfig(num_hidden_layers=1)
    config.architectures = ["ViTModel"]
    config.save_pretrained(tmp_path)
    code, _, errors = inspect(capsys, tmp_path)
    assert (code, len(errors.splitlines())) == (2, 1)
    assert f"{tmp_path} is a ViTModel: no target map can be derived for ViTModel: it has no blocks that rea" in errors
    code, _, errors = inspect(capsys, tmp_path, "--targets", "t5")
    assert (code, "of target map t5 matches no module; nearest: " in errors) == (2, True)


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
        assert lines[-4].split() == ["all", str(report.num_modules), f"{report.num_parameters:,}"]
        assert lines[-3:] == ["metadata", "  unconditional: zeros", "values: all are finite"]


def test_damaged_values_are_found_and_the_header_alone_says_that_it_is_alone(unet, tmp_path, capsys):
    inject(unet, "sdxl-unet", DoRASpec(rank=4))
    path = save_adapter(unet, tmp_path / "good")
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    tensors[key][0, 1] = float("inf")
    save_file(tensors, tmp_path / "bad.safetensors")
    _, output, _ = inspect(capsys, tmp_path / "bad.safetensors")
    assert f"values: 1 tensors have some that are NaN or infinite, such as {key}\n" in output
    assert json.loads(inspect(capsys, tmp_path / "bad.safetensors", "--json")[1])["not_finite"] == [key]
    assert json.loads(inspect(capsys, path, "--json")[1])["not_finite"] == []
    assert inspect(capsys, tmp_path / "bad.safetensors", "--header")[1].endswith("values: not read (--header)\n")
    assert json.loads(inspect(capsys, path, "--json", "--header")[1])["not_finite"] is None
    assert inspect(capsys, "samples/tiny-sdxl", "--header")[0] == 2


def test_pipes_and_devices_are_no_adapters(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.safetensors")
    for path in (tmp_path / "a.safetensors", "/dev/zero"):
        code, _, error = inspect(capsys, path)
        assert (code, error) == (2, f"dora-mm: there is no adapter at {path}: give an adapter file or its folder\n")
    for argument in (tmp_path, tmp_path / "a.safetensors"):
        assert cli.main(["convert", str(argument), str(tmp_path / "new"), "--to", "peft"]) == 2


def test_what_a_terminal_would_obey_is_shown_as_text(tmp_path, capsys):
    red, name = "\x1b[31m\nroot#", "evil\x1b]0;x\x07\n.safetensors"
    tensors = {
        f"lora_unet_hyper_{n}_to_q.lora_{end}.weight": torch.ones(2, 2) for n in (1, 22) for end in ("down", "up")
    }
    save_file(tensors, tmp_path / name, metadata={red: red, "long": "x" * 2**20, "base_model": red})
    code, output, _ = inspect(capsys, tmp_path / name)
    assert code == 0
    assert "\x1b" not in output
    assert "\x07" not in output
    assert len(output) < 3000
    assert len(output.splitlines()) == 16
    assert re.search(r"^\?  +lora_unet_hyper_#_to_q +lora .* 2 +16$", output, re.MULTILINE)
    save_file({**tensors, f"{red}.lora_up.weight": torch.ones(2, 2)}, tmp_path / name)
    code, _, error = inspect(capsys, tmp_path / name)
    assert (code, len(error.splitlines())) == (2, 1)
    assert "\x1b" not in error
    assert r"no module has the name of its tensor \x1b[31m\nroot#.lora_up.weight" in error


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
    path.write_bytes({"text": b"pipeline: train_diffusion\n", "cut": complete[:-2], "foreign": complete}[damage])
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
    assert (code, "is no model, and holds no adapter" in errors) == (2, True)
    code, _, errors = inspect(capsys, tmp_path / "missing")
    assert (code, "does not exist" in errors) == (2, True)
