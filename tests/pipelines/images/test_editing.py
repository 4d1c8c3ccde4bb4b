"""A model that edits, by command: trained on pairs, resumed, and sampled as plain diffusers edits."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from dora_mm.cli import main
from dora_mm.sampling.png import read_metadata
from tests.shared.images import tiny_qwen_image_edit
from tests.shared.images.pairs import write_pairs
from tests.shared.images.tiny_flows import FLOWS, PROMPT
from tests.shared.pages import data_of

KLEIN = next(flow for flow in FLOWS if flow.name == "flux2_klein")
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return KLEIN.build(tmp_path_factory.mktemp("klein") / "model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Rows with two references, one and none."""
    rows = [((64, 64), [(64, 64), (80, 96)]), ((64, 64), [(64, 64)]), ((64, 64), []), ((64, 64), [(64, 64)])]
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data", rows)


@pytest.fixture
def config(tmp_path, folder, pairs):
    def write(name="train", **sections):
        values = {
            "pipeline": "train_diffusion",
            "output": str(tmp_path / name),
            "model": {"path": str(folder)},
            "adapter": {"rank": 4, "parts": ["transformer.attn", "transformer.ff"]},
            "data": {"folder": str(pairs), "references": [str(pairs / "references")], "resolutions": [32, 64],
                     "flip": True, "reference_area": 16384, "reference_dropout": 0.2, "caption_dropout": 0.2,
                     "valid": {"share": 0.3}},
            "optimizer": {"lr": 0.1},
            "train": {"steps": STEPS, "batch_size": 2, "checkpoint_every": 2},
            "sample": {"prompts": [PROMPT], "images": [[str(pairs / "references" / "1_1.png")]], "steps": 2,
                       "guidance": 3.0},
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**values, **sections}, sort_keys=False))
        return str(path)

    return write


def apart(one, other):
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max()


def test_a_training_on_pairs_resumes_by_bits_and_plain_diffusers_edits_alike(config, tmp_path, folder, pairs, capsys):
    assert main(["train", "--dry-run", config("run")]) == 0
    assert "at most" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("references"))
    assert main(["train", config("run")]) == 0
    run = tmp_path / "run"
    half = config("half", train={"steps": 2, "batch_size": 2, "checkpoint_every": 2})
    assert main(["train", half]) == 0
    assert main(["train", "--resume", str(tmp_path / "half"), "--set", f"train.steps={STEPS}"]) == 0
    files = [load_file(each / "adapter" / "pytorch_lora_weights.safetensors") for each in (run, tmp_path / "half")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])

    page = data_of(run / "gallery" / "index.html")
    assert [len(image["references"]) for image in page["images"]] == [1, 1]  # before and after
    assert [len(image["references"]) for image in page["trainings"][0]["images"]] == [2, 1, 0, 1]

    references = [pairs / "references" / f"0_{number}.png" for number in (1, 2)]
    job = tmp_path / "job.csv"
    job.write_text(f"prompt,seed,image,image_2\n{PROMPT},3,{references[0]},{references[1]}\n{PROMPT},3,,\n")
    output = tmp_path / "job"
    settings = [f"adapter.path={run}", f"output={output}", "steps=2", "guidance=5"]
    assert main(["sample", str(job), "--set", *settings, f"images=[{references[0]}]"]) == 0
    plain = KLEIN.plain(folder)
    plain.load_lora_weights(run / "adapter")
    for name, count in (("0001-seed3.png", 2), ("0002-seed3.png", 1)):
        given = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(3)}
        theirs = plain(
            image=[Image.open(each) for each in references[:count]], prompt=PROMPT, guidance_scale=5.0, **given
        )
        ours = Image.open(output / "samples" / name)
        assert ours.size == (64, 64)
        assert apart(ours, theirs.images[0]) <= 1  # the second reference changes values by 2
    first = output / "samples" / "0001-seed3.png"
    settings = read_metadata(first).settings
    assert (len(settings["image_digests"]), settings["reference_area"]) == (2, 16384)  # the training's
    assert apart(first_image := Image.open(first), Image.open(output / "samples" / "0002-seed3.png")) > 1

    assert main(["sample", "--replay", str(first), "--set", f"output={tmp_path / 'again'}"]) == 0
    again = next((tmp_path / "again").rglob("*.png"))
    assert apart(first_image, Image.open(again)) == 0
    scored = tmp_path / "scored"
    few = ["steps=2", "seeds=[0]", "threshold=0.5", f"output={scored}"]
    few += [f"images={pairs}", f"references=[{pairs / 'references'}]"]
    assert main(["eval", "configs/flux2_klein/eval_edit.yaml", "--set", f"adapter.path={run}", *few]) == 0
    assert "The results are" in capsys.readouterr().out
    rows = json.loads((scored / "metrics.json").read_text())["rows"]
    assert [rows[name]["nearer"]["mean"] for name in ("the reference", "the target")] == pytest.approx([0, 1])
    assert rows["the reference"]["changed"]["mean"] == 0
    assert {"bare model", "adapter", "adapter, no references", "adapter minus bare"} < set(rows)
    assert len(list((scored / "samples").glob("*.png"))) == 9

    assert main(["sample", "--resume", str(output)]) == 0
    Image.new("RGB", (64, 64)).save(references[1])
    assert main(["sample", "--replay", str(first), "--set", f"output={tmp_path / 'changed'}"]) != 0
    assert "0_2.png has changed since the image was generated" in capsys.readouterr().err


def test_a_model_that_does_not_edit_says_so(config, tmp_path, pairs, tiny_folder, capsys):
    settings = [f"model.path={tiny_folder}", "adapter.parts=[unet.attn]"]
    assert main(["train", config("other"), "--set", *settings]) != 0
    assert "SDXL does not edit: train a model that does (FLUX.2 klein" in capsys.readouterr().err
    image = f"images=[{pairs / 'references' / '1_1.png'}]"
    job = ["sample", "--set", f"model.path={tiny_folder}", "prompts=[a cat]", image, f"output={tmp_path / 'x'}"]
    assert main(job) != 0
    assert "row 1: SDXL does not edit, so it takes no images" in capsys.readouterr().err


@pytest.mark.slow  # references come to a megapixel
def test_a_model_whose_encoder_sees_the_references(config, tmp_path, pairs, capsys):
    """Qwen-Image-Edit, which makes nothing of text alone."""
    path = tiny_qwen_image_edit.build(tmp_path / "model", zero_cond_t=True)
    few = ["data.reference_dropout=0", "data.reference_area=pipeline", "data.valid=null", "train.steps=1"]
    few += [f"model.path={path}", "train.checkpoint_every=1", "sample.prompts=[]", "sample.images=[]"]
    assert main(["train", config("run"), "--set", *few]) == 2
    assert "2.png" in (message := capsys.readouterr().err)
    assert "Qwen-Image-Edit needs references" in message
    both = [pairs / name for name in ("0.png", "references/0_1.png", "references/0_2.png")]
    rows = json.dumps({"file_name": "0.png", "text": PROMPT, "references": ["0_1.png", "0_2.png"]})
    folder = tmp_path / "one"
    folder.mkdir()
    for file in both:
        shutil.copy(file, folder)
    (folder / "metadata.jsonl").write_text(rows)
    few += [f"data.folder={folder}", "data.references=[]"]
    assert main(["train", config("run"), "--set", *few]) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--set", "train.steps=2"]) == 0
    job = ["sample", "--set", f"adapter.path={tmp_path / 'run'}", f"prompts=[{PROMPT}]", "steps=1", "guidance=1"]
    size = ["width=64", "height=64"]
    assert main([*job, f"images=[{both[1]}]", *size, f"output={tmp_path / 'job'}"]) == 0
    assert Image.open(next((tmp_path / "job" / "samples").glob("*.png"))).size == (64, 64)
    assert main([*job, f"output={tmp_path / 'text'}"]) == 2
    assert "Qwen-Image-Edit needs references" in capsys.readouterr().err
