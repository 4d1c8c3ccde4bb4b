"""The weights of a base model without the model, and merged copies, against diffusers and transformers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from dora_mm.formats.files.base_weights import BaseWeights, write_merged
from dora_mm.formats.naming.names import Name, canonical
from dora_mm.formats.naming.spellings import Names
from tests.shared.single_files import write_single_file

SAMPLE = Path("samples/tiny-sdxl")
Q = Name("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
TEXT_2 = Name("text_encoder_2", "text_model.encoder.layers.1.self_attn.k_proj")


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(SAMPLE, tmp_path / "base"))


@pytest.fixture(scope="session")
def single_file(tmp_path_factory) -> Path:
    return write_single_file(SAMPLE, tmp_path_factory.mktemp("single") / "tiny.safetensors")


def whole(path: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.relative_to(path)}:{key}": tensor
        for file in path.rglob("*.safetensors")
        for key, tensor in load_file(file).items()
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def test_the_embedded_sdxl_is_what_diffusers_loads():
    weights = BaseWeights.open(SAMPLE)
    pipeline = StableDiffusionXLPipeline.from_pretrained(SAMPLE, torch_dtype=torch.float16)
    expected = {
        canonical(component, key.removesuffix(".weight")): tensor
        for component in ("unet", "text_encoder", "text_encoder_2")
        for key, tensor in getattr(pipeline, component).state_dict().items()
        if key.endswith(".weight")
    }
    assert set(weights) == expected.keys()
    for name, tensor in expected.items():
        assert weights.shape(name) == tuple(tensor.shape)
        assert weights.dtype(name) == torch.float16
        assert weights[name].equal(tensor)


def test_a_single_file_has_the_weights_of_the_folder(single_file):
    folder, file = BaseWeights.open(SAMPLE), BaseWeights.open(single_file)
    assert set(file) == set(folder)
    for name, weight in folder.items():
        assert file.shape(name) == tuple(weight.shape)
        assert file[name].equal(weight)


def test_diffusers_loads_the_single_file(single_file):
    unet = UNet2DConditionModel.from_single_file(
        str(single_file), config=str(SAMPLE / "unet"), torch_dtype=torch.float16
    )
    weights = BaseWeights.open(single_file)
    for key, tensor in unet.state_dict().items():
        if key.endswith(".weight"):
            assert weights[Name("unet", key.removesuffix(".weight"))].equal(tensor)
    model = StableDiffusionXLPipeline.from_pretrained(SAMPLE, torch_dtype=torch.float16).text_encoder_2
    prefix = "conditioner.embedders.1.model."
    converted = single_file_utils.convert_open_clip_checkpoint(model, load_file(single_file), prefix)
    for key, tensor in converted.items():
        if key.endswith(".weight"):
            assert weights[Name("text_encoder_2", key.removesuffix(".weight"))].equal(tensor)


def test_one_network_of_a_pipeline():
    unet = BaseWeights.open(SAMPLE / "unet")
    assert {name.component for name in unet} == {"unet"}
    assert unet[Q].equal(BaseWeights.open(SAMPLE)[Q])
    assert unet.find(Name("model", Q.path)) == Q
    file = BaseWeights.open(SAMPLE / "unet/diffusion_pytorch_model.safetensors")
    assert set(file) == set(unet)


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_a_sharded_language_model(tmp_path):
    model = tiny_llama(tied=False)
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    weights = BaseWeights.open(tmp_path)
    expected = {
        Name("model", key.removesuffix(".weight")): t for key, t in model.state_dict().items() if "weight" in key
    }
    assert set(weights) == expected.keys()
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())
    q = Name("model", "model.layers.1.self_attn.q_proj")
    assert weights.find(Name("model", "layers.1.self_attn.q_proj")) == q
    assert Names(weights).read("base_model.model.layers.1.self_attn.q_proj").names == (q,)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "paligemma", "internvl", "mllama", "blip2"])
def test_a_vision_language_model_whose_files_have_other_names(tiny_vlm, kind):
    folder = tiny_vlm(kind)
    weights = BaseWeights.open(folder)
    architecture = AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linears) > 20
    for path, module in linears.items():
        assert weights[weights.find(Name("model", path))].equal(module.weight), path


def test_tied_weights_are_read_and_not_merged(tmp_path):
    model = tiny_llama(tied=True)
    model.save_pretrained(tmp_path / "base")
    weights = BaseWeights.open(tmp_path / "base")
    head = Name("model", "lm_head")
    assert weights[head].equal(model.lm_head.weight)
    with pytest.raises(ValueError, match=r"model.model.embed_tokens and model.lm_head share one weight"):
        write_merged(weights, tmp_path / "new", {head: weights[head]})
    assert not (tmp_path / "new").exists()


def test_a_text_encoder_with_and_without_its_prefix(tmp_path):
    model = CLIPTextModel.from_pretrained(SAMPLE / "text_encoder")
    model.save_pretrained(tmp_path / "a")
    state = load_file(tmp_path / "a/model.safetensors")
    path = "encoder.layers.0.self_attn.q_proj"
    for prefix in ("", "text_model."):
        save_file(
            {prefix + key.removeprefix("text_model."): t for key, t in state.items()}, tmp_path / "a/model.safetensors"
        )
        weights = BaseWeights.open(tmp_path / "a")
        for asked in (path, f"text_model.{path}"):
            assert weights[weights.find(Name("model", asked))].equal(model.state_dict()[f"{path}.weight"])


def test_full_precision_is_preferred(folder):
    plain = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(plain)
    save_file(
        {key: tensor.bfloat16() for key, tensor in state.items()},
        folder / "unet/diffusion_pytorch_model.fp16.safetensors",
    )
    assert BaseWeights.open(folder).dtype(Q) == torch.float16
    plain.unlink()
    assert BaseWeights.open(folder).dtype(Q) == torch.bfloat16


def test_a_hub_name_is_read_from_the_cache(tmp_path, monkeypatch):
    cache = tmp_path / "models--owner--tiny"
    shutil.copytree(SAMPLE, cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert set(BaseWeights.open("owner/tiny")) == set(BaseWeights.open(SAMPLE))
    for missing in ("owner/tiny-2", "owner/..."):
        with pytest.raises(ValueError, match=f"{missing} is neither a local folder or file nor complete in the cache"):
            BaseWeights.open(missing)


# --- merged copies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_merged_copies_differ_only_where_they_were_updated(single_file, folder, tmp_path, kind):
    source = folder if kind == "folder" else single_file
    target = tmp_path / ("merged" if kind == "folder" else "merged.safetensors")
    base = BaseWeights.open(source)
    names = [Q, Name("unet", "conv_in"), TEXT_2, Name("text_encoder_2", "text_projection")]
    update = {name: torch.randn(base.shape(name)) for name in names}
    write_merged(base, target, update)
    merged = BaseWeights.open(target)
    assert set(merged) == set(base)
    for name in base:
        assert merged[name].equal(update[name].half() if name in update else base[name]), name
    if kind == "file":
        before, after = load_file(source), load_file(target)
        with safe_open(target, "pt") as file:
            assert file.metadata() == {"modelspec.title": "tiny"}
    else:
        before, after = whole(source), whole(target)
        files = {
            p.relative_to(source): p.read_bytes()
            for p in source.rglob("*")
            if p.is_file() and p.suffix != ".safetensors"
        }
        assert files == {path: (target / path).read_bytes() for path in files}
        assert len(StableDiffusionXLPipeline.from_pretrained(target).components) > 5
    assert before.keys() == after.keys()
    assert sum(not tensor.equal(after[key]) for key, tensor in before.items()) == len(names)
    assert not list(tmp_path.rglob(".*partial"))


def test_no_update_gives_a_copy_bit_for_bit(single_file, tmp_path):
    write_merged(BaseWeights.open(single_file), tmp_path / "x.safetensors", {})
    assert (tmp_path / "x.safetensors").read_bytes() == single_file.read_bytes()


def test_a_merged_language_model_is_what_transformers_loads(tmp_path):
    model = tiny_llama(tied=False).bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size="6KB")
    base = BaseWeights.open(tmp_path / "base")
    names = [name for name in base if "proj" in name.path]
    write_merged(base, tmp_path / "new", {name: base[name] * 2 for name in names})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    for key, tensor in model.state_dict().items():
        assert loaded.state_dict()[key].equal(tensor * 2 if "proj" in key else tensor)


def test_weights_that_would_be_stale_are_left_out(folder, tmp_path):
    plain = folder / "unet/diffusion_pytorch_model.safetensors"
    for name in (
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "sdxl.safetensors",
    ):
        shutil.copy(plain, folder / name)
    (folder / ".cache").mkdir()
    shutil.copy(plain, folder / ".cache/x.json")
    (folder / "vae/old.bin").write_bytes(b"1")
    write_merged(BaseWeights.open(folder), tmp_path / "new", {})
    found = {str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*") if path.is_file()}
    expected = {str(path.relative_to(SAMPLE)) for path in SAMPLE.rglob("*") if path.is_file()}
    assert found == expected | {"vae/old.bin"}


def test_one_weight_is_in_memory_at_a_time(tmp_path):
    code = f"""
import json, resource, torch
from pathlib import Path
from dora_mm.formats.files.base_weights import BaseWeights, write_merged

size, layers, folder = 2**23, 16, Path({str(tmp_path)!r})  # 8 MB each
header = {{
    f"layers.{{i}}.weight": {{"dtype": "F16", "shape": [1024, 4096], "data_offsets": [i * size, (i + 1) * size]}}
    for i in range(layers)
}}
text = json.dumps(header).encode()
with (folder / "model.safetensors").open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + layers * size)
base = BaseWeights.open(folder / "model.safetensors")

class Added(dict):
    def __getitem__(self, name):
        return base[name] + 1

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
write_merged(base, folder / "new.safetensors", Added(dict.fromkeys(list(base)[:4])))
new = BaseWeights.open(folder / "new.safetensors")
assert [bool((new[name] == (i < 4)).all()) for i, name in enumerate(base)] == [True] * layers
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60  # MB; the file has 134


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_bad_update_leaves_nothing_behind(folder, tmp_path):
    base = BaseWeights.open(folder)
    target = tmp_path / "new"
    bad = {
        "shape": (Q, torch.zeros(3, 3)),
        "is not the name of a module; nearest: unet.down_blocks": (Name("unet", Q.path + "q"), torch.zeros(3, 3)),
    }
    for message, (name, weight) in bad.items():
        with pytest.raises(ValueError, match=message):
            write_merged(base, target, {name: weight})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_files_outside_of_the_model_are_not_copied(folder, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "unet" / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match=r"notes.txt is a link to .*secret.txt, outside"):
        write_merged(BaseWeights.open(folder), tmp_path / "new", {})
    assert not (tmp_path / "new").exists()


def test_places_that_are_no_target(folder, single_file, tmp_path):
    folder_base, file_base = BaseWeights.open(folder), BaseWeights.open(single_file)
    for base, target, message in (
        (folder_base, folder, "exists"),
        (folder_base, folder / "new", "inside it"),
        (folder_base, tmp_path / "x.safetensors", "is the name of a file"),
        (file_base, tmp_path / "x", "needs a name that ends in .safetensors"),
        (file_base, single_file, "is the model itself"),
    ):
        with pytest.raises(ValueError, match=message):
            write_merged(base, target, {})


def test_quantised_weights_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file(
        {"a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn), "b.weight": torch.zeros(2, 2)},
        tmp_path / "model.safetensors",
    )
    weights = BaseWeights.open(tmp_path)
    assert weights[Name("model", "b")].shape == (2, 2)
    with pytest.raises(ValueError, match=r"stores model.a as torch.float8_e4m3fn: use the model in 16 or 32 bits"):
        weights[Name("model", "a")]
    with pytest.raises(ValueError, match="float8"):
        write_merged(weights, tmp_path.parent / "new", {Name("model", "a"): torch.zeros(2, 2)})


def test_what_is_no_model(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.bin").write_bytes(b"1")
    for path, message in (
        (tmp_path / "none", "there is no model at"),
        (tmp_path / "none.safetensors", "there is no model at"),
        ("a/b/c", "there is no model at"),
        (tmp_path / "empty", "has no weights: it needs diffusion_pytorch_model.safetensors or model.safetensors"),
        (tmp_path / "x.bin", "is a pickle"),
    ):
        with pytest.raises(ValueError, match=message):
            BaseWeights.open(path)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match="unet has only pickles, which can run code"):
        BaseWeights.open(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "is not a JSON object"),
        ("{", "is not valid JSON"),
        ("{}", "does not list the files"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "does not list the files"),
        ('{"weight_map": {"a": 3}}', "cannot be read as a safetensors file"),
        ('{"weight_map": {"a": "part.safetensors"}}', "is incomplete: a, which .* lists, is missing"),
    ],
)
def test_damaged_indexes(tmp_path, index, message):
    save_file({"b": torch.zeros(1)}, tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        BaseWeights.open(tmp_path)


def test_a_truncated_shard_is_named(folder):
    file = folder / "text_encoder/model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"text_encoder/model.safetensors cannot be read as a safetensors file"):
        BaseWeights.open(folder)


def test_a_fused_weight_that_cannot_be_divided(tmp_path):
    file = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(7, 4)}, file)
    with pytest.raises(ValueError, match=r"does not fit its architecture at double_blocks.0.img_attn.qkv.weight"):
        BaseWeights.open(file)
