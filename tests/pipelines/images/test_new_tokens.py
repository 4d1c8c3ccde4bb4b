"""New tokens from the config to files that other programs read, and back."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from dora_mm.cli import main
from dora_mm.formats.adapter_file import AdapterFile
from tests.shared.data.images_made import write_images

PROMPT = "a TOK icon of a bus"


@pytest.fixture(scope="module")
def values(tmp_path_factory, tiny_folder):
    images = tmp_path_factory.mktemp("pictures")
    write_images(images)
    return {
        "pipeline": "train_diffusion",
        "output": str(tmp_path_factory.mktemp("runs") / "run"),
        "model": {"path": str(tiny_folder)},
        "adapter": {"rank": 2, "parts": ["unet.cross", "text_encoder.attn"]},
        "tokens": {"TOK": {"count": 3, "lr": 0.1}},
        "data": {"folder": str(images), "resolution": 64, "placeholder": "TOK"},
        "optimizer": {"lr": 0.01},
        "train": {
            "steps": 4,
            "batch_size": 2,
            "checkpoint_every": 1,
            "keep_checkpoints": 9,
            "stop_tokens_after": 2,
            "stop_text_encoders_after": 3,
        },
        "sample": {"prompts": [PROMPT], "steps": 2},
    }


def write(folder, values, **changes):
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return str(path)


@pytest.fixture(scope="module")
def run(values, tmp_path_factory):
    from pathlib import Path

    assert main(["train", write(tmp_path_factory.mktemp("config"), values)]) == 0
    return Path(values["output"])


def rows_of(folder):
    file = AdapterFile(folder)
    return {key: file.tensor(key) for key in file.embeddings}


def drawn(tmp_path, tiny_folder, name, adapter, strengths=(1,), prompts=(PROMPT,)):
    """The images of prompts with an adapter at strengths."""
    file = tmp_path / f"{name}.yaml"
    settings = {"prompts": list(prompts), "seeds": [7], "steps": 3, "strengths": list(strengths)}
    model = {"pipeline": "sample", "output": str(tmp_path / name), "model": {"path": str(tiny_folder)}}
    file.write_text(yaml.safe_dump({**model, "adapter": {"path": str(adapter)}, **settings}))
    assert main(["sample", str(file)]) == 0
    found = sorted((tmp_path / name / "samples").glob("*.png"))
    return [np.asarray(Image.open(path), dtype=np.float64) / 255 for path in found]


def test_each_is_trained_up_to_its_last_step(run):
    steps = [load_file(file) for file in sorted((run / "checkpoints").glob("*/trained_weights.safetensors"))]

    def change(start, one, two):
        return any(not one[key].equal(two[key]) for key in one if key.startswith(start))

    changes = {
        start: [change(start, one, two) for one, two in itertools.pairwise(steps)]
        for start in ("bundle_emb.TOK", "text_encoder", "unet")
    }
    assert changes == {
        "bundle_emb.TOK": [True, False, False],
        "text_encoder": [True, True, False],
        "unet": [True, True, True],
    }


def test_diffusers_draws_our_image(run, tmp_path, tiny_folder):
    bare, ours = drawn(tmp_path, tiny_folder, "ours", run, (0, 1))
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt=PROMPT):
        generator = torch.Generator().manual_seed(7)
        image = pipe(prompt, num_inference_steps=3, guidance_scale=5.0, generator=generator).images[0]
        return np.asarray(image, dtype=np.float64) / 255

    assert np.abs(bare - draw()).max() <= 1.5 / 255  # strength 0 reads TOK as a plain word
    pipe.load_lora_weights(str(run / "adapter"))
    lines = (run / "adapter" / "README.md").read_text().split("\n")
    code = [line for line in lines if "load_file" in line or "textual_inversion" in line or "eos_token_id" in line]
    exec(
        "\n".join(code).replace(repr("TOK.safetensors"), repr(str(run / "adapter" / "TOK.safetensors"))), {"pipe": pipe}
    )
    theirs = draw(PROMPT.replace("TOK", "<tok-0><tok-1><tok-2>"))
    assert np.abs(ours - theirs).max() <= 1.5 / 255
    assert np.abs(ours - bare).max() > 3 / 255


def test_other_forms_carry_the_rows_and_draw_the_same(run, tmp_path, tiny_folder):
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back"
    base = ["--base", str(tiny_folder)]
    assert main(["convert", str(run), str(kohya), "--to", "kohya", *base]) == 0
    assert {"bundle_emb.TOK.clip_l", "bundle_emb.TOK.clip_g"} <= load_file(kohya).keys()
    assert main(["convert", str(kohya), str(back), "--to", "diffusers", *base]) == 0
    wanted = rows_of(run)
    for other in (kohya, back, run / "checkpoints" / "step-000004"):
        found = rows_of(other)
        assert found.keys() == wanted.keys()
        assert all(found[key].equal(wanted[key]) for key in wanted)
    (ours,) = drawn(tmp_path, tiny_folder, "ours", run)
    for name, other in (("one", kohya), ("two", back), ("three", run / "checkpoints" / "step-000004")):
        (same,) = drawn(tmp_path, tiny_folder, name, other)
        assert np.abs(ours - same).max() <= 2.5 / 255


def test_what_has_no_place_for_rows_says_so(run, tmp_path, tiny_folder, capsys):
    merged, base = tmp_path / "merged", ["--base", str(tiny_folder)]
    assert main(["convert", str(run), str(merged), "--to", "merged", *base]) == 2
    assert "2 embeddings of new tokens, such as bundle_emb.TOK." in capsys.readouterr().err
    assert main(["convert", str(run), str(merged), "--to", "merged", *base, "--allow-lossy"]) == 0
    assert "left out 2 embeddings of new tokens" in capsys.readouterr().out
    assert main(["inspect", str(run)]) == 0
    assert "embedding of a token: bundle_emb.TOK.clip_g 3 x 32" in capsys.readouterr().out
    assert main(["verify", str(run), "--tool", "diffusers", *base]) == 0
    assert "2 embeddings of new tokens" in capsys.readouterr().out


def test_prompts_that_new_tokens_make_longer_share_no_batch(values, tmp_path, tiny_folder):
    """As plain words, both fill one chunk of 38 tokens."""
    changes = {"output": str(tmp_path / "long"), "train": {"steps": 1, "batch_size": 2}, "sample": {}}
    assert main(["train", write(tmp_path, values, **changes, tokens={"TOK": {"count": 30}})]) == 0
    assert len(drawn(tmp_path, tiny_folder, "ours", tmp_path / "long", (1,), ("TOK", "a TOK TOK"))) == 2


@pytest.mark.parametrize("what", ["missing", "other"])
def test_an_adapter_without_its_rows_is_refused(run, tmp_path, what, capsys):
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    file = adapter / "TOK.safetensors"
    if what == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert main(["inspect", str(adapter)]) == 2
    wanted = {"missing": "TOK.safetensors is not beside it", "other": "does not hold the rows that"}
    assert wanted[what] in capsys.readouterr().err


def test_a_training_goes_on_from_the_rows_of_a_file(run, values, tmp_path, capsys):
    adapter = {**values["adapter"], "init_from": str(run)}
    changes = {"output": str(tmp_path / "next"), "adapter": adapter, "sample": {}}
    changes |= {"optimizer": {"lr": 1e-12}, "train": {"steps": 1, "batch_size": 2}}
    without = write(tmp_path, values, **changes, tokens={})
    assert main(["train", without]) == 2
    assert "has the new token TOK: set tokens={TOK: {count: 3}}" in capsys.readouterr().err
    assert main(["train", write(tmp_path, values, **changes, tokens={"TOK": {"count": 2}})]) == 2
    assert "set tokens.TOK.count=3" in capsys.readouterr().err
    assert main(["train", write(tmp_path, values, **changes, tokens={"TOK": {"count": 3}})]) == 0
    before, after = rows_of(run), rows_of(tmp_path / "next")
    assert all(torch.allclose(before[key], after[key], atol=1e-9) for key in before)


def test_the_dry_run_shows_them(values, tmp_path, capsys):
    assert main(["train", write(tmp_path, values), "--dry-run", "--set", f"output={tmp_path / 'new'}"]) == 0
    line = (
        "TOK: 3 new tokens x (16 of clip_l and 32 of clip_g), 576 bytes, lr 0.1, start at random, trained for 2 steps"
    )
    found = capsys.readouterr().out
    assert line in found
    assert "encoded" not in found  # all captions have it
    assert "latents   5 before the first step, 0.0 MB in main memory" in found


def test_the_dry_run_counts_what_is_encoded_ahead(values, tmp_path, capsys):
    train = {"steps": 4, "batch_size": 2}
    captions = {**values["data"], "captions": {"shuffle": True, "prefix": "{a|b}, c, d", "alternatives": True}}
    adapter = {"rank": 2, "parts": ["unet.attn"]}
    for data in (values["data"], captions | {"text_cache": str(tmp_path / "text"), "flip": True}):
        file = write(tmp_path, values, tokens={}, train=train, data=data, adapter=adapter, output=str(tmp_path / "new"))
        assert main(["train", file, "--dry-run"]) == 0
    found = capsys.readouterr().out
    assert "encoded   5 different texts before the first step, 0.0 MB in main memory" in found
    line = rf"encoded   (\d+) different texts before the first step, 0\.\d MB in {re.escape(str(tmp_path / 'text'))}"
    (count,) = re.findall(line, found)
    assert 5 < int(count) <= 10  # of two epochs
    assert "latents   10 before the first step, 0.0 MB in main memory" in found


REFUSALS = {
    "no caption": ({"tokens": {"sks": {}}}, "no caption has the word sks"),
    "a known word": ({"tokens": {"a": {}}}, "a is a token of the model already"),
    "too few": ({"tokens": {"TOK": {"init": "a bus", "count": 1}}}, "has 3 tokens, and count is 1"),
    "no word": ({"tokens": {"<s0>": {}}}, "a new token is a word of letters"),
    "no rate": ({"optimizer": {"name": "prodigy", "lr": 1.0}}, "tokens.TOK.lr has no effect"),
    "no tokens": ({"tokens": {}}, "train.stop_tokens_after has no effect: there are no tokens"),
    "too late": ({"train": {"steps": 2, "batch_size": 2, "stop_tokens_after": 2}}, "must be below train.steps (2)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(values, tmp_path, name, capsys):
    changes, message = REFUSALS[name]
    file = write(tmp_path, {**values, "output": str(tmp_path / "new")}, **json.loads(json.dumps(changes)))
    assert main(["train", file]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
