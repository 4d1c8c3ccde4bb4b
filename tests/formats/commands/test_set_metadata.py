"""Entries of headers for people and sites, the hashes by which they know a file, and no local path in new files."""

import hashlib
import io
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from safetensors.torch import load_file, save_file

import dora_mm
from dora_mm import cli
from dora_mm.core.spec import DoRASpec
from dora_mm.formats.commands.set_metadata import set_metadata
from dora_mm.formats.metadata import without_local_paths
from tests.formats.commands.test_convert import BASE
from tests.formats.commands.test_extract import save_model
from tests.shared import toy


def own_hashes(path):
    """The hashes of sd-scripts, over what the safetensors library itself writes: a second computation."""
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    tensors, header = toy.read_tensors(path)
    again = io.BytesIO(safetensors.torch.save(tensors, {k: v for k, v in header.items() if k.startswith("ss_")}))
    again.seek(0x100000)
    return hashlib.sha256(data).hexdigest(), hashlib.sha256(again.read(0x10000)).hexdigest()[:8]


def large(path, metadata):
    """An adapter of 2 MB with tensors of several dtypes, in an order that the library would not write."""
    tensors = {}
    for number in range(4):
        module = f"lora_unet_down_blocks_1_attentions_{number}_proj_in"
        tensors[f"{module}.lora_up.weight"] = toy.wave((4000, 16), number).to(
            (torch.float16, torch.bfloat16)[number % 2]
        )
        tensors[f"{module}.lora_down.weight"] = toy.wave((16, 4000), number).float()
        tensors[f"{module}.alpha"] = torch.tensor(8, dtype=torch.int64)
    save_file(tensors, path, metadata=metadata)
    return tensors


@pytest.mark.parametrize(
    "metadata", [{}, {"ss_output_name": 'näh "x"', "ss_tag_frequency": "{}", "seed": "1"}], ids=str
)
def test_the_hashes_are_those_of_sites(metadata, tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = large(path, metadata)
    done = set_metadata(path, {"title": "Größe", "ss_training_comment": "for TOK"})
    found, header = toy.read_tensors(path)
    assert (header["sshs_model_hash"], header["sshs_legacy_hash"]) == own_hashes(path)
    assert header["sshs_legacy_hash"] != hashlib.sha256(b"").hexdigest()[:8]
    assert {key: t.dtype for key, t in found.items()} == {key: t.dtype for key, t in tensors.items()}
    assert all(torch.equal(tensors[key], tensor) for key, tensor in found.items())
    assert header.items() >= {**metadata, "modelspec.title": "Größe", "ss_training_comment": "for TOK"}.items()
    assert done.changes["modelspec.title"] == (None, "Größe")


def test_the_hashes_of_what_other_orders_of_tensors_hold(source, tmp_path):
    """Ours are in the order of modules; the model's hash is that of the bytes as they are, as AutoV3 is."""
    (file,) = dora_mm.convert(source, tmp_path / "new.safetensors", to="kohya", base=BASE).files
    set_metadata(file, {"title": "A"})
    _, header = toy.read_tensors(file)
    assert (header["sshs_model_hash"], header["sshs_legacy_hash"]) == own_hashes(file)


def test_entries_are_set_changed_and_taken_out(source, tmp_path):
    before = source.read_bytes()
    done = set_metadata(
        source, {"title": "First", "trigger_words": "TOK, icon", "license": "MIT"}, tmp_path / "new.safetensors"
    )
    assert source.read_bytes() == before
    _, header = toy.read_tensors(done.file)
    spec = {"modelspec.title": "First", "modelspec.trigger_phrase": "TOK, icon", "modelspec.license": "MIT"}
    assert header.items() >= {**spec, "modelspec.sai_model_spec": "1.0.1"}.items()
    set_metadata(done.file, {"modelspec.title": "Second", "license": "", "ss_base_model_version": ""})
    _, after = toy.read_tensors(done.file)
    assert after["modelspec.title"] == "Second"
    assert not {"modelspec.license", "ss_base_model_version"} & after.keys()
    assert after["sshs_model_hash"] == header["sshs_model_hash"]
    assert dora_mm.verify(done.file, "kohya", BASE)[0].findings == {"right": 7}


def test_other_programs_still_read_it(source, tmp_path):
    (file,) = dora_mm.convert(source, tmp_path / "new", to="diffusers", base=BASE).files
    before = StableDiffusionXLLoraLoaderMixin.lora_state_dict(file.parent, return_lora_metadata=True)
    set_metadata(file.parent, {"author": "N. N.", "description": "Zeile\nzwei"})
    after = StableDiffusionXLLoraLoaderMixin.lora_state_dict(file.parent, return_lora_metadata=True)
    assert after[2] == before[2] is not None
    assert after[0].keys() == before[0].keys()


def test_a_file_is_complete_at_every_moment(source, monkeypatch):
    before = source.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        set_metadata(source, {"title": "New"})
    assert source.read_bytes() == before
    assert list(source.parent.iterdir()) == [source]


MISTAKES = [
    ({"lora_adapter_metadata": "{}"}, "no entry of a header 'lora_adapter_metadata' can be set"),
    ({"dora_mm_specs": "{}"}, "no entry of a header 'dora_mm_specs'"),
    ({"titel": "A"}, "did you mean 'title'?"),
    ({"sshs_model_hash": "0"}, "sshs_model_hash is computed: leave it out"),
    ({"description": "x" * 2**24}, "and at most 16777216 are read"),
]


@pytest.mark.parametrize(("entries", "message"), MISTAKES, ids=[message[-20:] for _, message in MISTAKES])
def test_mistakes(entries, message, source):
    before = source.read_bytes()
    with pytest.raises(ValueError, match=re.escape(message)):
        set_metadata(source, entries)
    assert source.read_bytes() == before


def test_the_command(source, tmp_path, capsys):
    assert cli.main(["inspect", str(source), "--set-metadata", "title=My style", "trigger_words=TOK"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"modelspec\.title +- +My style", printed)
    assert re.search(r"sshs_model_hash +1 +[0-9a-f]{64}", printed)
    assert toy.read_tensors(source)[1]["modelspec.title"] == "My style"
    for arguments, message in (
        (["--set-metadata", "title"], "'title' has no equals sign"),
        (["--set-metadata", "title=a", "--json"], "--set-metadata is for an adapter file"),
        (["--set-metadata", "title=a", "--out", str(source)], "exists already"),
        (["--out", str(tmp_path / "x.safetensors")], "--out belongs to --set-metadata"),
    ):
        assert cli.main(["inspect", str(source), *arguments]) == 2
        assert message in capsys.readouterr().err


# --- local paths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/anna/models/sdxl base.safetensors", "sdxl base.safetensors"),
        (r"C:\Users\Anna\models\sdxl.safetensors", "sdxl.safetensors"),
        (r"\\server\share\x", "x"),
        ("~/models/sdxl", "sdxl"),
        ("../models/sdxl/", "sdxl"),
        ('{"image_dir": "/data/anna/icons", "n": 3}', '{"image_dir": "icons", "n": 3}'),
        (r'{"image_dir": "D:\\anna\\icons", "n": 3}', '{"image_dir": "icons", "n": 3}'),
        ("data:\n  folder: /data/anna/my icons\n  n: 1\n", "data:\n  folder: my icons\n  n: 1\n"),
        ("[/a/b, ./c/d]", "[b, d]"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("https://github.com/Stability-AI/generative-models", "https://github.com/Stability-AI/generative-models"),
        ("a cat/dog, and/or 1/2 of it, w/ a hat / scarf", "a cat/dog, and/or 1/2 of it, w/ a hat / scarf"),
        ("2026-11-30T10:20:30 image/png", "2026-11-30T10:20:30 image/png"),
    ],
)
def test_paths_become_names(text, kept):
    assert without_local_paths({"any": text, "base_model": "a/b"}) == {"any": kept, "base_model": "a/b"}


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft", "diff"])
def test_converted_files_have_no_local_path(to, tmp_path):
    base = save_model(tmp_path / "secret" / "my-model", BASE)
    unet = toy.model("unet")
    dora_mm.inject(unet, [name.path for name in toy.UNET], DoRASpec(rank=2))
    about = {
        "base_model": str(base),
        "config": f"model: {{path: {base}}}\ndata:\n  folder: {tmp_path}/secret/pictures\n",
    }
    adapter = dora_mm.save_adapter({"unet": unet}, tmp_path / "run", metadata=about)
    assert b"secret" in adapter.read_bytes()  # what is trained here knows its base
    done = dora_mm.convert(adapter, tmp_path / "new", to=to, base=base)
    for file in [*done.files, *done.files[0].parent.glob("*.json")]:
        assert b"secret" not in file.read_bytes()
    assert toy.read_tensors(done.files[0])[1]["base_model"] == "my-model"


def test_extracted_and_relative_ones_have_none_either(tmp_path, monkeypatch):
    tuned = {name: W + 0.01 * toy.wave(W.shape, 7).float() for name, W in BASE.items()}
    monkeypatch.chdir(tmp_path)
    for folder, weights in (("secret/base", BASE), ("secret/tuned", tuned)):
        save_model(tmp_path / folder, weights)
    (file,) = dora_mm.extract("secret/tuned", "secret/base", "new", rank=2).files
    assert b"secret" not in Path(file).read_bytes()
    assert toy.read_tensors(file)[1]["base_model"] == "base"
    assert load_file(file)
