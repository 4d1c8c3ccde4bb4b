"""dora-mm merge: the folder that it writes, and what it refuses to write."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import dora_mm
from dora_mm import DoRASpec
from dora_mm.cli import main
from dora_mm.config.models import VLMModelConfig
from dora_mm.data.vl.example import Example
from dora_mm.models.vl.vl_bart.loading import from_bart, save_vl_bart
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.models.vl.vlm.head import target_logits
from tests.shared.data.vlm_rows import write_images
from tests.shared.vl import vocabularies
from tests.shared.vl.sizes import LAYERS
from tests.shared.vl.small_vl_bart import small_bart, small_tokenizer

IDS = torch.tensor([[5, 17, 60, 33, 9, 120]])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"))


def perturb(model: torch.nn.Module, scale: float = 0.05) -> None:
    """Moves all trained parameters, as a training would."""
    for name, parameter in dora_mm.adapter_parameters(model).items():
        parameter.data += scale * torch.randn_like(parameter) * (1.0 if "lora" in name else 0.1)


def vlm_adapter(path: Path, folder: Path, extra: tuple[str, ...] = (), dtype: str = "float32") -> Path:
    """Saves an adapter of all default parts, with its identity and extra parameters."""
    vlm = VLM(VLMModelConfig.model_validate({"path": str(path), "dtype": dtype}))
    dora_mm.inject(vlm.model, vlm.target_maps["model"], DoRASpec(rank=2))
    perturb(vlm.model)
    for name in extra:
        vlm.model.get_parameter(name).data += 0.1
    return dora_mm.save_adapter(
        {"model": vlm.model}, folder, format="peft", metadata=vlm.identity.weights, extra_parameters=extra
    ).parent


@torch.no_grad()
def vlm_logits(vlm: VLM, images: Path) -> torch.Tensor:
    row = vlm.rows.row("vqa", Example("x", ("wide.png",), "What colour is the ball?"), str(images), "dark red")
    inputs, labels = vlm.rows.collate([row])
    return target_logits(vlm.network.form, vlm.model, vlm.network.moved(inputs), labels)[0].float()


def llm(folder: Path, kind: type[PreTrainedModel], config: Any, **saving: Any) -> Path:
    """Saves a tiny language model with a tokenizer."""
    torch.manual_seed(0)
    kind(config).save_pretrained(folder, **saving)
    vocabularies.gpt2(eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    return folder


def llama(folder: Path, tied: bool = True, **saving: Any) -> Path:
    config = LlamaConfig(vocab_size=460, num_key_value_heads=1, tie_word_embeddings=tied, **LAYERS)
    return llm(folder, LlamaForCausalLM, config, **saving)


def llm_adapter(path: Path, folder: Path, targets: Any, scale: float = 0.05, **saving: Any) -> tuple[Path, Any]:
    """Saves an adapter; returns its folder and the adapted model."""
    model = class_of(path).from_pretrained(path)
    dora_mm.inject(model, targets, DoRASpec(rank=2))
    perturb(model, scale)
    return dora_mm.save_adapter(model, folder, format="native", **saving).parent, model


def class_of(path: Path) -> Any:
    (name,) = json.loads((path / "config.json").read_text())["architectures"]
    return getattr(transformers, name)


@torch.no_grad()
def llm_logits(model: Any) -> torch.Tensor:
    others = {"labels": IDS} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=IDS, **others).logits


def merge(*arguments: object) -> int:
    return main(["merge", *map(str, arguments)])


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def others(folder: Path) -> dict[str, bytes]:
    """All files but the weights."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix != ".safetensors" and "index" not in f.name}


def assert_same_layout(one: Path, other: Path) -> None:
    assert others(one) == others(other)
    layouts = [{n: (w.shape, w.dtype) for n, w in weights(f).items()} for f in (one, other)]
    assert layouts[0] == layouts[1]


def refused(capsys: pytest.CaptureFixture, out: Path, *arguments: object) -> str:
    """The one sentence with which a command is refused that would have written `out`."""
    before = set(out.parent.iterdir())
    capsys.readouterr()
    assert merge(*arguments, out) == 2
    assert set(out.parent.iterdir()) == before
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dora-mm: ")]
    return line


# --- vision-language models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("qwen2_5_vl", "florence2", "mllama"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llava", "paligemma", "blip_vqa")),
    ],
)
def test_the_folder_is_the_base_models_with_the_answers_of_peft(name, tiny_vlm, images, tmp_path, capsys):
    base = tiny_vlm(name)
    adapter = vlm_adapter(base, tmp_path / "adapter")
    capsys.readouterr()
    assert merge(base, adapter, tmp_path / "merged") == 0
    printed = capsys.readouterr()
    assert "differ from those of the adapted model by at most" in printed.out
    assert "Writing model shards" not in printed.err  # a bar of transformers
    assert_same_layout(base, tmp_path / "merged")

    theirs = VLM(VLMModelConfig(path=str(base)))
    bare = vlm_logits(theirs, images)
    PeftModel.from_pretrained(theirs.model, adapter)
    expected = vlm_logits(theirs, images)
    merged = vlm_logits(VLM(VLMModelConfig(path=str(tmp_path / "merged"))), images)
    assert (merged - bare).abs().max() > 1e-2
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


def test_parameters_that_trained_beside_the_adapters_are_merged_too(tiny_vlm, tmp_path, capsys):
    base = tiny_vlm("qwen2_5_vl")
    names = ("model.visual.merger.mlp.0.weight", "model.language_model.layers.0.self_attn.q_proj.bias")
    adapter = vlm_adapter(base, tmp_path / "adapter", names)
    assert merge(base, adapter, tmp_path / "merged") == 0
    assert "and 2 other parameters" in capsys.readouterr().out
    before, after = weights(base), weights(tmp_path / "merged")
    for name in ("visual.merger.mlp.0.weight", "model.layers.0.self_attn.q_proj.bias"):
        torch.testing.assert_close(after[name], before[name] + 0.1)


def test_an_older_layout_of_the_weights_is_kept(tiny_vlm, tmp_path):
    """Published LLaVAs have one more `vision_model` in their names than transformers' class."""
    base = shutil.copytree(tiny_vlm("llava"), tmp_path / "base")
    renamed = {k.replace("vision_tower.", "vision_tower.vision_model."): w for k, w in weights(base).items()}
    save_file(renamed, base / "model.safetensors", {"format": "pt"})
    assert merge(base, vlm_adapter(base, tmp_path / "adapter"), tmp_path / "merged") == 0
    assert_same_layout(base, tmp_path / "merged")


def test_half_precision(tiny_vlm, images, tmp_path, capsys):
    base = shutil.copytree(tiny_vlm("qwen2_5_vl"), tmp_path / "base")
    edit_config(base, lambda config: config["text_config"].update(torch_dtype="float32"))  # as older versions write it
    adapter = vlm_adapter(base, tmp_path / "adapter")
    assert merge(base, adapter, tmp_path / "half", "--dtype", "bfloat16") == 0
    assert re.search(r"rounding keeps (100\.|99\.)\d\d% of the update", capsys.readouterr().out)
    assert {weight.dtype for weight in weights(tmp_path / "half").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (config["dtype"], config["text_config"]["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert merge(base, adapter, tmp_path / "whole") == 0
    logits = [vlm_logits(VLM(VLMModelConfig(path=str(tmp_path / name))), images) for name in ("whole", "half")]
    assert (logits[0] - logits[1]).abs().max() < 0.1 * logits[0].abs().max()

    again = vlm_adapter(tmp_path / "half", tmp_path / "second", dtype="float32")  # trained in another dtype
    assert merge(tmp_path / "half", again, tmp_path / "twice") == 0
    assert_same_layout(tmp_path / "half", tmp_path / "twice")


def test_a_config_without_a_dtype(tmp_path, capsys):
    base = llama(tmp_path / "base")
    edit_config(base, lambda config: config.pop("dtype"))
    adapter, _ = llm_adapter(base, tmp_path / "adapter", "llm")
    assert "--dtype" in refused(capsys, tmp_path / "merged", base, adapter)
    assert merge(base, adapter, tmp_path / "merged", "--dtype", "float16") == 0
    assert LlamaForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float16


def test_weights_come_in_the_shards_of_the_base(tiny_vlm, tmp_path):
    vlm = VLM(VLMModelConfig(path=str(tiny_vlm("llava"))))
    base = shutil.copytree(tiny_vlm("llava"), tmp_path / "base")
    (base / "model.safetensors").unlink()
    vlm.model.save_pretrained(base, max_shard_size="90KB")
    assert merge(base, vlm_adapter(base, tmp_path / "adapter"), tmp_path / "merged") == 0
    assert_same_layout(base, tmp_path / "merged")
    index, found = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (base, tmp_path / "merged")
    )
    assert len(set(index["weight_map"].values())) > 2
    assert found == index


# --- language models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "targets"),
    [
        (LlamaForCausalLM, LlamaConfig(vocab_size=460, tie_word_embeddings=True, **LAYERS), "llm"),
        (GPT2LMHeadModel, GPT2Config(vocab_size=460, n_embd=32, n_layer=2, n_head=2), "llm"),
        (T5ForConditionalGeneration, T5Config(vocab_size=460, d_model=32, d_kv=8, d_ff=48, num_layers=2), "t5"),
    ],
)
def test_language_models_stay_tied(kind, config, targets, tmp_path):
    config.decoder_start_token_id = 0
    base = llm(tmp_path / "base", kind, config)
    adapter, model = llm_adapter(base, tmp_path / "adapter", targets)
    assert merge(base, adapter, tmp_path / "merged") == 0
    assert_same_layout(base, tmp_path / "merged")
    assert not any("lm_head" in name for name in weights(tmp_path / "merged"))
    merged = llm_logits(kind.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, llm_logits(model), rtol=1e-5, atol=1e-5)


def test_a_folder_of_pefts_own_training(tmp_path):
    base = llama(tmp_path / "base", tied=False)
    model: Any = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "down_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "merged") == 0
    merged = llm_logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, llm_logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_head_that_is_no_longer_the_embedding_is_written_beside_it(target, tmp_path):
    base = llama(tmp_path / "base")
    adapter, model = llm_adapter(base, tmp_path / "adapter", [target])
    assert merge(base, adapter, tmp_path / "merged") == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert set(weights(tmp_path / "merged")) - set(weights(base)) == {"lm_head.weight"}
    merged = llm_logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, llm_logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"]])
def test_a_copy_that_peft_trained_apart_is_written_beside_it(saved, tmp_path):
    base = llama(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
    model: Any = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0.0
    model.save_pretrained(tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "merged") == 0
    merged = llm_logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, llm_logits(model), rtol=1e-5, atol=1e-5)


def test_one_of_several_tied_weights_cannot_change_alone(tmp_path, capsys):
    config = T5Config(vocab_size=460, d_model=32, d_kv=8, d_ff=48, num_layers=2, decoder_start_token_id=0)
    base = llm(tmp_path / "base", T5ForConditionalGeneration, config)
    adapter, _ = llm_adapter(base, tmp_path / "adapter", ["lm_head"])
    assert "lm_head.weight" in refused(capsys, tmp_path / "merged", base, adapter)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_an_adapter_that_computes_something_else_when_merged_is_refused(tmp_path, capsys):
    """Mamba reads the weight of `dt_proj` itself, so its adapter has no effect before it is merged."""
    config = MambaConfig(
        vocab_size=460, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2, initializer_range=0.5
    )
    base = llm(tmp_path / "base", MambaForCausalLM, config)
    adapter, _ = llm_adapter(base, tmp_path / "adapter", ["dt_proj"], scale=20.0)
    line = refused(capsys, tmp_path / "merged", base, adapter)
    assert "merging changes the logits by" in line
    assert str(adapter) in line
    assert merge(base, adapter, tmp_path / "half", "--dtype", "bfloat16") == 0
    assert "differ from those of the adapted model by at most" in capsys.readouterr().out


def test_logits_that_are_not_finite_are_refused(tmp_path, capsys):
    base = llama(tmp_path / "base")
    adapter, _ = llm_adapter(base, tmp_path / "adapter", ["down_proj"], scale=1e30)
    assert "not finite" in refused(capsys, tmp_path / "merged", base, adapter)


def test_adapters_of_other_models_are_refused(tiny_vlm, tmp_path, capsys):
    adapter = vlm_adapter(tiny_vlm("llava"), tmp_path / "adapter")
    line = refused(capsys, tmp_path / "merged", tiny_vlm("paligemma"), adapter)
    assert "does not fit this model" in line or "another base model" in line

    other = shutil.copytree(tiny_vlm("llava"), tmp_path / "other")
    changed = weights(other)
    changed["language_model.lm_head.weight"][0, 0] += 1
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    assert "another base model" in refused(capsys, tmp_path / "merged", other, adapter)

    foreign, _ = llm_adapter(llama(tmp_path / "llama"), tmp_path / "foreign", "llm")
    assert "does not fit this model" in refused(capsys, tmp_path / "merged", tiny_vlm("llava"), foreign)


def test_models_that_cannot_hold_an_adapter_are_refused(tiny_vlm, tmp_path, capsys):
    out, adapter = tmp_path / "merged", vlm_adapter(tiny_vlm("llava"), tmp_path / "adapter")
    quantised = shutil.copytree(tiny_vlm("llava"), tmp_path / "quantised")
    told = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_config(quantised, lambda config: config.update(quantization_config=told))
    assert "not quantised" in refused(capsys, out, quantised, adapter, "--dtype", "float32")

    save_vl_bart(from_bart(small_bart(), len(small_tokenizer()), 8, "image"), small_tokenizer(), tmp_path / "vl_bart")
    assert "is a VL-BART" in refused(capsys, out, tmp_path / "vl_bart", adapter)
    assert "is an adapter" in refused(capsys, out, tmp_path, adapter)
    (tmp_path / "empty").mkdir()
    assert "not a model of transformers" in refused(capsys, out, tmp_path / "empty", adapter)
    assert "MODEL" in refused(capsys, out, tmp_path / "missing", adapter)

    silent = llama(tmp_path / "silent")
    for file in silent.glob("token*"):
        file.unlink()
    assert "no tokenizer" in refused(capsys, out, silent, llm_adapter(silent, tmp_path / "other", "llm")[0])


def test_wrong_arguments(tiny_vlm, tmp_path, capsys):
    base = tiny_vlm("llava")
    adapter = vlm_adapter(base, tmp_path / "adapter")
    assert "OUT" in refused(capsys, tmp_path / "adapter", base, adapter)
    assert "is the folder of a model, and no adapter" in refused(capsys, tmp_path / "merged", base, base)
    assert "ADAPTER" in refused(capsys, tmp_path / "merged", base, tmp_path / "missing")
    assert "--revision" in refused(capsys, tmp_path / "merged", base, adapter, "--revision", "main")


# --- models of the hub -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_of_the_hub_is_known_by_its_weights(tiny_vlm, tmp_path, monkeypatch, capsys):
    """A cache with three commits of one model: `v1`, `v2` with the same weights, and `main` with others."""
    name, first = "someone/tiny", "a" * 40
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for commit, tag in ((first, "v1"), ("b" * 40, "v2"), ("c" * 40, "main")):
        shutil.copytree(tiny_vlm("llava"), repository / "snapshots" / commit)
        (repository / "refs" / tag).write_text(commit)
    other = repository / "snapshots" / ("c" * 40)
    changed = {key: value + 1 for key, value in load_file(other / "model.safetensors").items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    vlm = VLM(VLMModelConfig(path=name, revision="v1"))
    assert vlm.identity == VLM(VLMModelConfig(path=str(tiny_vlm("llava")))).identity
    assert vlm.identity == VLM(VLMModelConfig(path=name, revision="v2")).identity
    dora_mm.inject(vlm.model, vlm.target_maps["model"], DoRASpec(rank=2))
    adapter = dora_mm.save_adapter(
        {"model": vlm.model}, tmp_path / "adapter", format="peft", metadata=vlm.identity.weights
    )
    assert "another base model" in refused(capsys, tmp_path / "merged", name, adapter.parent)
    assert "another base model" in refused(capsys, tmp_path / "merged", other, adapter.parent)
    assert merge(tiny_vlm("llava"), adapter.parent, tmp_path / "from_a_folder") == 0
    assert merge(name, adapter.parent, tmp_path / "merged", "--revision", "v1") == 0
    assert_same_layout(repository / "snapshots" / first, tmp_path / "merged")
    assert "cannot be reached" in refused(capsys, tmp_path / "other", "someone/else", adapter.parent)


def test_files_outside_of_the_model_are_not_copied(tmp_path, capsys):
    """A link to another place is refused by name; one inside of the folder is a file like others."""
    base = llama(tmp_path / "base")
    adapter, _ = llm_adapter(base, tmp_path / "adapter", ["q_proj"])
    (tmp_path / "secret.txt").write_text("secret")
    (base / "notes.md").symlink_to(base / "config.json")
    assert merge(base, adapter, tmp_path / "first") == 0
    for place in ("notes.txt", "templates/notes.txt"):
        (base / place).parent.mkdir(exist_ok=True)
        (base / place).symlink_to(tmp_path / "secret.txt")
        assert merge(base, adapter, tmp_path / "out") == 2
        assert f"{place} is a link to {tmp_path}/secret.txt, outside" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        (base / place).unlink()


@pytest.mark.parametrize("named", [[5], 5, [None], ["set_seed"], ["AutoConfig"]])
def test_architectures_that_are_no_classes_of_models(named, tmp_path, capsys):
    base = llama(tmp_path / "base")
    edit_config(base, lambda config: config.update(architectures=named))
    assert main(["inspect", str(base)]) == 2
    assert "architectures" in (message := capsys.readouterr().err) or "a class that transformers" in message
