"""Models of the hub, from its cache on this machine: revisions, commits, and what the adapter's header says of them."""

import shutil

import huggingface_hub.constants
import pytest
import torch
import yaml
from safetensors.torch import save_file

from dora_mm.cli import main
from dora_mm.config.models import ModelConfig
from dora_mm.formats import read
from dora_mm.models import hub as hub_module
from dora_mm.models.images.families import load_image_model, load_image_model_if_local
from dora_mm.models.opening import commit_of

NAME, FIRST, SECOND = "someone/tiny-sdxl", "a" * 40, "b" * 40


@pytest.fixture
def hub(tiny_folder, tmp_path, monkeypatch):
    """A cache with two commits of one model: the second is `main`, the first has the tag `v1` and another UNet."""
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny-sdxl"
    (repository / "refs").mkdir(parents=True)
    for commit, names in ((FIRST, ["v1"]), (SECOND, ["main"])):
        shutil.copytree(tiny_folder, repository / "snapshots" / commit)
        for name in names:
            (repository / "refs" / name).write_text(commit)
    first = load_image_model(ModelConfig(path=str(repository / "snapshots" / FIRST)))
    first.unet.conv_in.weight.data.mul_(2)
    first.unet.save_pretrained(repository / "snapshots" / FIRST / "unet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return repository / "snapshots"


def test_a_revision_is_loaded_and_its_commit_is_known(hub):
    main_branch, tagged, commit = (
        load_image_model(ModelConfig(path=NAME, revision=revision)).unet.conv_in.weight
        for revision in (None, "v1", FIRST)
    )
    assert torch.equal(2 * main_branch, tagged)
    assert torch.equal(tagged, commit)
    assert commit_of(NAME) == SECOND
    assert commit_of(NAME, "v1") == commit_of(NAME, FIRST) == FIRST
    assert commit_of("someone/other") is None
    assert commit_of(str(hub / FIRST)) is None
    with pytest.raises(ValueError, match=rf"^model\.path: {NAME} \(revision v2\) is not on this machine"):
        load_image_model(ModelConfig(path=NAME, revision="v2"))


def test_with_another_vae_a_copy_needs_none_of_its_own(hub, tiny_folder):
    """Its weights are not downloaded, so that the dry run said that the model was not on this machine."""
    (vae,) = (hub / SECOND / "vae").glob("*.safetensors")
    vae.unlink()
    assert load_image_model_if_local(ModelConfig(path=NAME)) is None
    found = load_image_model_if_local(ModelConfig(path=NAME, vae=str(tiny_folder / "vae")))
    assert found is not None
    theirs = load_image_model(ModelConfig(path=str(tiny_folder)))
    assert torch.equal(found.vae.encoder.conv_in.weight, theirs.vae.encoder.conv_in.weight)
    shutil.rmtree(vae.parent)  # what says which VAE fits is needed
    assert load_image_model_if_local(ModelConfig(path=NAME, vae=str(tiny_folder / "vae"))) is None


def test_a_local_model_has_no_revisions(tiny_folder):
    with pytest.raises(ValueError, match=r"model\.revision: .*tiny-sdxl is not a model of the hub"):
        load_image_model(ModelConfig(path=str(tiny_folder), revision="v1"))


@pytest.mark.parametrize("key", ["base_model", "base_vae"])
def test_a_file_alone_starts_no_download(hub, tiny_folder, tmp_path, key, monkeypatch, capsys):
    """Anybody may have written the header of an adapter: its names were looked up on the hub."""
    monkeypatch.setattr(hub_module, "hub_answers", lambda: pytest.fail("the hub was asked"))
    header = {"base_model": str(tiny_folder), key: "someone/unknown"}
    file = tmp_path / "adapter.safetensors"
    path = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{path}.lora_A.weight": torch.zeros(2, 64), f"{path}.lora_B.weight": torch.zeros(64, 2)}
    save_file(tensors, file, header)
    arguments = ["sample", "--set", f"adapter.path={file}", "prompts=[a]", f"output={tmp_path / 'out'}"]
    assert main(arguments) == 2
    assert "names the model someone/unknown, which is not on this machine" in capsys.readouterr().err


@pytest.mark.parametrize("from_hub", [True, False])
def test_the_header_of_an_adapter_names_its_base(hub, tiny_folder, image_folder, tmp_path, from_hub):
    model = (
        {"path": NAME, "revision": "v1", "vae": str(hub / SECOND / "vae")} if from_hub else {"path": str(tiny_folder)}
    )
    config = {
        "pipeline": "train_diffusion",
        "output": str(tmp_path / "run"),
        "model": model,
        "adapter": {"rank": 1},
        "data": {"folder": str(image_folder), "resolution": 64},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 1, "batch_size": 1},
    }
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "short.yaml")]) == 0
    _, header = read(tmp_path / "run" / "adapter")
    found = {key: value for key, value in header.items() if key.startswith("base_")}
    expected = {"base_model": model["path"], "base_dtype": "float32"}
    if from_hub:
        expected |= {"base_revision": FIRST, "base_vae": model["vae"]}
    assert found == expected
