"""Jobs of images, end to end: every column, every image, going on, replaying, and failing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_mm import DoRASpec, inject, load_adapter, save_adapter
from dora_mm.cli import main
from dora_mm.config.models import ModelConfig
from dora_mm.core import adapter_parameters
from dora_mm.formats import adapter_digest
from dora_mm.models.images.families import load_image_model
from dora_mm.sampling.manifest import read_manifest
from dora_mm.sampling.png import read_metadata
from dora_mm.utils.lock import only_writer
from tests.shared.killed import files_in

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def style(tmp_path_factory, tiny_folder):
    """A run directory with an adapter that changes images a lot."""
    folder = tmp_path_factory.mktemp("runs") / "001"
    make_adapter(tiny_folder, folder / "adapter", seed=0)
    return folder


def make_adapter(model_folder, folder, seed, base=None):
    model = load_image_model(ModelConfig(path=str(model_folder)))
    inject(model.unet, "sdxl-unet", DoRASpec(rank=2))
    stream = torch.Generator().manual_seed(seed)
    for name, parameter in adapter_parameters(model.unet).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.3, generator=stream)
    save_adapter(model.unet, folder, metadata={"base_model": str(base or model_folder)})


def pipeline_with(model_folder, style, strength):
    """A pipeline of diffusers with an adapter at our strength; its own strengths mean something else."""
    model = load_image_model(ModelConfig(path=str(model_folder)))
    load_adapter(model.adaptable, style / "adapter", strength=strength)
    return model.pipeline()


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Writes a prompts file; runs it, with `--set` values as keyword arguments."""
    monkeypatch.chdir(tmp_path)

    def run(*rows, name="jobs.jsonl", code=0, output="out", arguments=(), **settings):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items()]
        assert main(["sample", name, "--set", f"output={output}", *values, *arguments]) == code
        return tmp_path / output

    return run


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int64)


def content(run):
    """All files of a run but those with its config, whose `output` and prompts file may differ."""
    of_config = ("config.yaml", "inputs.json")
    files = (path for path in sorted(run.rglob("*")) if path.is_file() and path.name not in of_config)
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_a_model_that_an_adapter_does_not_fit_is_refused_before_its_weights_are_read(
    job, style, tiny_folder, tmp_path, capsys
):
    model = shutil.copytree(tiny_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "unet/config.json").read_text())
    (model / "unet/config.json").write_text(json.dumps({**config, "block_out_channels": [32, 64, 128]}))
    job({"prompt": "a bus", "adapter": str(style)}, code=2, model__path=str(model))
    place = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"dora-mm: {style} was trained on {tiny_folder}, not on {model}: "
        f"{style}/adapter/pytorch_lora_weights.safetensors does not fit this model: at {place} it has 32 inputs and 32 "
        "outputs, and the model has 64 and 64"
    )


def test_every_column_is_honoured(job, style, tiny_folder):
    run = job(
        {"prompt": "a bus", "seed": "1-2", "width": 64, "height": 96, "steps": 2, "adapter": str(style)},
        {"prompt": "a cat", "negative_prompt": "red", "guidance": 3, "scheduler": "ddim", "adapter": f"{style}:0.5"},
        {"prompt": "a key", "strength": 0, "seed": 9},
        model__path=str(tiny_folder),
        steps=3,
    )
    entries = read_manifest(run)
    assert [(entry.row, entry.file, entry.status) for entry in entries] == [
        (1, "samples/0001-seed1.png", "done"),
        (1, "samples/0001-seed2.png", "done"),
        (2, "samples/0002-seed0.png", "done"),
        (3, "samples/0003-seed9.png", "done"),
    ]
    assert Image.open(run / entries[0].file).size == (64, 96)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)

    def theirs(prompt, seed, **settings):
        settings = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 64, "width": 64, **settings}
        return np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images[0], np.int64)

    assert np.abs(pixels(run / entries[3].file) - theirs("a key", 9)).max() <= 1
    pipe.load_lora_weights(str(style / "adapter"))
    for entry in entries[:2]:
        seed = entry.settings["seed"]
        drawn = theirs("a bus", seed, num_inference_steps=2, height=96)
        assert np.abs(pixels(run / entry.file) - drawn).max() <= 1
    weak = pipeline_with(tiny_folder, style, strength=0.5)
    weak.scheduler = DDIMScheduler.from_config(weak.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    generator = torch.Generator().manual_seed(0)
    sizes = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 64, "width": 64}
    drawn = weak("a cat", negative_prompt="red", generator=generator, **sizes).images[0]
    assert np.abs(pixels(run / entries[2].file) - np.asarray(drawn, np.int64)).max() <= 1
    settings = entries[2].settings
    assert (settings["negative_prompt"], settings["guidance"], settings["scheduler"]) == ("red", 3.0, "ddim")
    assert settings["adapter"] == f"{style}:0.5"
    assert (run / "sheet.png").is_file()


def test_a_job_is_drawn_on_the_model_of_its_adapter(job, style, tiny_folder, capsys):
    run = job({"prompt": "a bus", "adapter": str(style / "adapter")}, steps=1)
    assert read_metadata(run / "samples" / "0001-seed0.png").model.path == str(tiny_folder)
    assert read_manifest(run)[0].settings["width"] == 64


def test_a_converted_adapter_names_the_folder_of_its_model_alone(job, style, tiny_folder, tmp_path):
    make_adapter(tiny_folder, tmp_path / "converted", seed=1, base=tiny_folder.name)
    rows = ({"prompt": "a", "adapter": str(style)}, {"prompt": "a", "adapter": "converted"})
    run = job(*rows, steps=1)
    assert read_metadata(run / "samples" / "0002-seed0.png").model.path == str(tiny_folder)


def test_adapters_of_two_models_are_refused_by_name(job, style, tiny_folder, tmp_path, capsys, caplog):
    make_adapter(tiny_folder, tmp_path / "other", seed=1, base="some/other-model")
    rows = ({"prompt": "a", "adapter": str(style)}, {"prompt": "a", "adapter": "other"})
    job(*rows, code=2)
    expected = f"{style} was trained on {tiny_folder}, and other on some/other-model: set model.path"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    job(*rows, model__path=str(tiny_folder), steps=1)
    assert "other was trained on some/other-model, and is used with" in caplog.text


def test_a_config_gives_what_rows_leave_out(tmp_path, monkeypatch, style, tiny_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(
        f"pipeline: sample\nprompts: [unused]\nseeds: [4]\nsteps: 2\nadapter: {{path: {style}}}\nstrengths: [0, 1]\n"
    )
    (tmp_path / "p.txt").write_text("# two\na bus\na cat\n")
    assert main(["sample", "p.txt", "--config", "c.yaml", "--set", "output=one"]) == 0
    assert main(["sample", "c.yaml", "--set", "output=two", "prompts_file=p.txt"]) == 0
    names = [f"000{row}-seed4-strength{strength}.png" for row in (1, 2) for strength in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "one" / "samples").iterdir()) == names
    assert content(tmp_path / "one") == content(tmp_path / "two")
    first = read_manifest(tmp_path / "one")[0].settings
    assert (first["prompt"], first["steps"], first["strength"]) == ("a bus", 2, 0.0)


def test_going_on_draws_what_is_missing_and_says_what_is_stale(job, style, capsys, caplog):
    rows = [{"prompt": f"thing {number}", "seed": "1 2"} for number in range(4)]
    settings = {"adapter__path": str(style), "steps": 1, "batch_size": 2}
    run = job(*rows, **settings)
    before = content(run)
    (run / "samples" / "0001-seed2.png").unlink()
    damaged = run / "samples" / "0003-seed1.png"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    (run / "sheet.png").unlink()
    capsys.readouterr()
    assert job(*rows, **settings) == run
    kept = run / "earlier" / "001"
    assert [path.name for path in kept.rglob("*.png")] == ["0003-seed1.png"]
    shutil.rmtree(run / "earlier")
    assert content(run) == before
    assert "1 files in" in caplog.text
    assert "damaged" in caplog.text
    assert "6 of 8 images are there already" in caplog.text  # the other one of either batch was verified
    caplog.clear()
    rows[2]["prompt"] = "another thing"
    job(*rows[:3], **settings)
    kept = "they are kept in out/earlier, and generated again: 0003-seed1.png, 0003-seed2.png"
    assert f"were generated with other settings: {kept}" in caplog.text
    assert "do not belong to the job, and stay as they are: 0004-seed1.png, 0004-seed2.png" in caplog.text
    caplog.clear()
    assert main(["sample", "--resume", str(run)]) == 0
    assert "6 of 6 images are there already" in caplog.text


def test_other_folders_are_not_written_to(job, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    job({"prompt": "a"}, code=2)
    assert "out exists already and is not a run directory" in capsys.readouterr().err
    (tmp_path / "out" / "config.yaml").write_text("pipeline: train_diffusion\n")
    job({"prompt": "a"}, code=2)
    assert "out is a run of train_diffusion, not of sample" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.yaml", "mine.txt"]


def test_a_replayed_image_has_the_same_pixels(job, style, tmp_path, capsys):
    rows = [{"prompt": f"thing {number}", "negative_prompt": "grey" if number else None} for number in range(3)]
    run = job(*rows, adapter__path=str(style), adapter__strength=0.7, steps=2, batch_size=3, scheduler="dpmpp_2m")
    image = run / "samples" / "0002-seed0.png"
    copy = shutil.copy(image, tmp_path / "elsewhere.png")
    assert main(["sample", "--replay", str(copy), "--set", "output=again"]) == 0
    assert "the same pixels" in capsys.readouterr().out
    assert (tmp_path / "again" / "samples" / "elsewhere.png").read_bytes() == image.read_bytes()
    assert main(["sample", "--replay", str(run / "sheet.png")]) == 2
    assert "was not generated by dora-mm sample" in capsys.readouterr().err
    assert main(["sample", "--replay", str(copy), "--set", "steps=3"]) == 2


def test_images_of_other_circumstances_stay_and_are_named(job, tiny_folder, tmp_path, monkeypatch, caplog, capsys):
    settings = {"model__path": str(tiny_folder), "steps": 1}
    first = job({"prompt": "a bus"}, **settings) / "samples" / "0001-seed0.png"
    before = first.read_bytes()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    job({"prompt": "a bus"}, {"prompt": "a cat"}, **settings)
    assert first.read_bytes() == before
    assert main(["sample", "--replay", str(first), "--set", "output=again"]) == 0
    other = "computed under other circumstances, which may change last bits: MKL_CBWR none is COMPATIBLE"
    said = [message for message in caplog.messages if "circumstances" in message]
    assert said == [f"1 of 1 images that are there were {other}", f"{first} was {other}"]
    capsys.readouterr()
    assert main(["inspect", str(first.with_name("0002-seed0.png"))]) == 0
    assert ["MKL_CBWR", "COMPATIBLE"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_replay_notices_changed_weights(job, tiny_folder, tmp_path, capsys):
    make_adapter(tiny_folder, tmp_path / "style", seed=0)
    run = job({"prompt": "a bus"}, adapter__path="style", steps=1)
    make_adapter(tiny_folder, tmp_path / "style", seed=1)
    assert main(["sample", "--replay", str(run / "samples" / "0001-seed0.png"), "--set", "output=again"]) == 2
    assert "the adapter style has changed since the image was generated" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_batches_change_a_image_by_a_rounding(job, style):
    rows = [{"prompt": f"thing {number}"} for number in range(6)]
    settings = {"adapter__path": str(style), "steps": 4}
    one, four = (job(*rows, **settings, batch_size=size, output=f"by{size}") for size in (1, 4))
    for entry in read_manifest(one):
        difference = np.abs(pixels(one / entry.file) - pixels(four / entry.file))
        assert (difference <= 1).mean() >= 0.999


def test_rows_that_fail_are_named_and_do_not_end_the_job(job, tiny_folder, monkeypatch, capsys):
    decode = AutoencoderKL.decode

    def in_a_small_memory(vae, latents, **options):
        torch.empty(1 << 50 if latents.shape[-1] > 8 else 0)  # torch's own error
        return decode(vae, latents, **options)

    monkeypatch.setattr(AutoencoderKL, "decode", in_a_small_memory)
    rows = ({"prompt": "too large", "width": 128, "height": 128}, {"prompt": "a bus"})
    run = job(*rows, code=2, model__path=str(tiny_folder), steps=1)
    error = capsys.readouterr().err
    assert "1 of 2 images could not be generated" in error
    assert "row 1 (0001-seed0.png) has no room in memory" in error
    assert [entry.status for entry in read_manifest(run)] == ["failed", "done"]
    assert (run / "sheet.png").is_file()


def test_images_that_are_not_numbers_are_named(job, tiny_folder, tmp_path, capsys):
    broken = load_image_model(ModelConfig(path=str(tiny_folder)))
    broken.vae.decoder.conv_out.bias.data[1] = float("nan")
    broken.pipeline().save_pretrained(tmp_path / "broken")
    run = job({"prompt": "a bus"}, {"prompt": "a cat"}, code=2, model__path="broken", steps=1)
    assert "2 of 2 images could not be generated" in capsys.readouterr().err
    assert {entry.reason[:33] for entry in read_manifest(run)} == {"has values that are not numbers ("}
    assert not list(run.rglob("samples/*.png"))


def test_a_image_says_how_it_was_drawn(job, style, capsys):
    run = job({"prompt": "a bus, red", "negative_prompt": "grey", "seed": 5}, adapter__path=str(style), steps=2)
    text = Image.open(run / "samples" / "0001-seed5.png").text
    prompt, negative, settings = text["parameters"].split("\n")
    assert (prompt, negative) == ("a bus, red", "Negative prompt: grey")
    assert settings.startswith("Steps: 2, Sampler: Euler, CFG scale: 5, Seed: 5, Size: 64x64, Model: tiny-sdxl, ")
    assert "Lora hashes: " in settings
    assert str(run) not in json.dumps(text)
    capsys.readouterr()
    assert main(["inspect", str(run / "samples" / "0001-seed5.png")]) == 0
    shown = capsys.readouterr().out
    assert shown.split("\n")[0].split(maxsplit=1) == ["prompt", "a bus, red"]
    assert f"{style} at strength 1, SHA-256" in shown


@pytest.fixture
def interrupted(monkeypatch):
    """Makes Ctrl-C come at a call of the pipeline, by its number."""

    def at(call):
        original, calls = StableDiffusionXLPipeline.__call__, []

        def drawing(pipe, *args, **options):
            calls.append(args)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(pipe, *args, **options)

        monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", drawing)

    return at


def test_an_interrupted_job_says_how_to_go_on(job, tiny_folder, interrupted, caplog):
    interrupted(3)
    rows = [{"prompt": f"thing {number}"} for number in range(4)]
    run = job(*rows, code=130, output="my run", model__path=str(tiny_folder), steps=1, batch_size=1)
    assert caplog.messages[-1].endswith("To go on: dora-mm sample --resume 'my run'")
    assert [entry.status for entry in read_manifest(run)] == ["done", "done", "missing", "missing"]


def test_images_with_other_settings_are_kept_and_stay_until_they_are_drawn_again(job, tiny_folder, interrupted):
    rows = [{"prompt": f"thing {number}"} for number in range(3)]
    settings = {"model__path": str(tiny_folder), "batch_size": 1}
    run = job(*rows, steps=1, **settings)
    before = content(run)
    interrupted(2)
    job(*rows, code=130, steps=2, **settings)
    now = content(run)
    assert [name for name in before if now[name] != before[name] and name.startswith("samples/")] == [
        "samples/0001-seed0.png"
    ]
    assert [entry.status for entry in read_manifest(run)] == ["done", "missing", "missing"]
    job(*rows, steps=2, **settings)  # goes on, and keeps nothing again
    assert [folder.name for folder in (run / "earlier").iterdir()] == ["001"]
    earlier = content(run / "earlier" / "001")
    assert earlier == {name: value for name, value in before.items() if name != "versions.json"}
    assert main(["gallery", str(run), str(run / "earlier" / "001"), "--output", "page"]) == 0
    job(*rows, steps=3, **settings)
    assert content(run / "earlier" / "001") == earlier
    assert len(list((run / "earlier" / "002").rglob("samples/*.png"))) == 3


def test_a_finished_image_stays_when_rows_are_appended_or_batches_change(job, tiny_folder, caplog):
    rows = [{"prompt": f"thing {number}"} for number in range(5)]
    settings = {"model__path": str(tiny_folder), "steps": 1}
    run = job(*rows[:3], batch_size=2, **settings)
    before = content(run / "samples")
    job(*rows, batch_size=2, **settings)
    job(*rows, batch_size=3, **settings)
    after = content(run / "samples")
    assert {name: after[name] for name in before} == before
    assert len(after) == 5
    assert "generated again" not in caplog.text
    assert not (run / "earlier").exists()
    assert main(["sample", "--replay", str(run / "samples" / "0003-seed0.png"), "--set", "output=again"]) == 0
    assert content(run.parent / "again" / "samples") == {"0003-seed0.png": before["0003-seed0.png"]}


def test_images_belong_to_tensors_and_settings_not_to_the_bytes_of_a_file(job, tiny_folder, tmp_path, caplog, capsys):
    """Another program has written the adapter again: in another order, with a note; then at another alpha."""
    make_adapter(tiny_folder, tmp_path / "style", seed=0)
    run = job({"prompt": "a bus"}, adapter__path="style", steps=1)
    before = files_in(run)
    file = tmp_path / "style" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    bytes_before, tensors = file.read_bytes(), load_file(file)
    save_file(tensors, file, {"note": "from elsewhere", **dict(reversed(header.items()))})
    assert file.read_bytes() != bytes_before
    caplog.set_level("INFO")
    job({"prompt": "a bus"}, adapter__path="style", steps=1)
    assert "1 of 1 images are there already." in caplog.messages
    assert files_in(run) == before
    replay = ["sample", "--replay", str(run / "samples" / "0001-seed0.png"), "--set", "output=again"]
    assert main(replay) == 0
    assert "the same pixels" in capsys.readouterr().out
    settings = json.loads(header["lora_adapter_metadata"])
    settings["unet.lora_alpha"] *= 2
    save_file(tensors, file, {**header, "lora_adapter_metadata": json.dumps(settings)})
    assert main([*replay[:-1], "output=third"]) == 2
    assert "the adapter style has changed since the image was generated" in capsys.readouterr().err


@pytest.mark.slow
def test_a_replay_notices_another_setting_of_the_scheduler_in_the_model(job, tiny_folder, tmp_path, capsys, caplog):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    run = job({"prompt": "a bus"}, model__path=str(model), steps=2)
    file = model / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    caplog.set_level("INFO")
    job({"prompt": "a bus"}, model__path=str(model), steps=2)
    assert "1 of 1 images are there already." in caplog.messages
    file.write_text(json.dumps({**settings, "beta_end": 0.02}))
    assert main(["sample", "--replay", str(run / "samples" / "0001-seed0.png"), "--set", "output=again"]) == 2
    assert f"the model {model} has changed since the image was generated" in capsys.readouterr().err
    job({"prompt": "a bus"}, model__path=str(model), steps=2)
    changed = "with another model (scheduler/scheduler_config.json changed)"
    assert f"1 files in out/samples were generated {changed}" in caplog.text


def test_a_job_has_one_writer(job, tiny_folder, capsys):
    settings = {"steps": 1, "model__path": str(tiny_folder)}
    run = job({"prompt": "a bus"}, **settings)
    before = content(run)
    with only_writer(run):
        (run / "samples" / "0001-seed0.png").unlink()
        job({"prompt": "a bus"}, **settings, code=2)
        assert f"{run.name} has a writer already, process {os.getpid()} on" in capsys.readouterr().err
        assert not (run / "samples" / "0001-seed0.png").exists()
    (run / "samples" / ".0001-seed0.png.1a2b3c4d-1.partial").touch()
    job({"prompt": "a bus"}, **settings)
    assert content(run) == before


def test_another_job_does_not_replace_the_images_of_a_run(job, tiny_folder, capsys):
    run = job({"prompt": "a bus"}, model__path=str(tiny_folder), steps=1)
    before = content(run)
    job({"prompt": "a cat"}, name="others.jsonl", code=2, model__path=str(tiny_folder), steps=1)
    assert "out has the images of jobs.jsonl, and those of others.jsonl would replace them" in capsys.readouterr().err
    assert content(run) == before


def test_a_resumed_job_keeps_the_settings_of_its_run(job, tiny_folder, tmp_path, caplog):
    run = job({"prompt": "a bus"}, model__path=str(tiny_folder), steps=1)
    (tmp_path / "jobs.jsonl").rename(tmp_path / "renamed.jsonl")
    assert main(["sample", "renamed.jsonl", "--resume", str(run)]) == 0
    assert "1 of 1 images are there already" in caplog.text
    assert read_manifest(run)[0].settings["steps"] == 1


def test_weights_may_be_named_in_another_way(job, style, tmp_path, caplog):
    run = job({"prompt": "a bus"}, adapter__path=str(style), steps=1)
    (tmp_path / "link").symlink_to(style)
    job({"prompt": "a bus"}, adapter__path="link", steps=1)
    assert "1 of 1 images are there already" in caplog.text
    assert read_metadata(run / "samples" / "0001-seed0.png").adapters[0].path == str(style)


def test_a_image_that_was_changed_is_drawn_again(job, tiny_folder, caplog):
    run = job({"prompt": "a bus"}, model__path=str(tiny_folder), steps=1)
    file = run / "samples" / "0001-seed0.png"
    before, image = file.read_bytes(), Image.open(file)
    information = PngInfo()
    for name, text in image.text.items():
        information.add_itxt(name, text)
    Image.new("RGB", image.size, "red").save(file, pnginfo=information)
    job({"prompt": "a bus"}, model__path=str(tiny_folder), steps=1)
    assert "1 files in out/samples are damaged, changed" in caplog.text
    assert file.read_bytes() == before
    assert Image.open(run / "earlier" / "001" / "samples" / file.name).getpixel((0, 0)) == (255, 0, 0)


def test_images_that_are_there_do_not_fail_with_their_batch(job, tiny_folder, monkeypatch, capsys):
    rows = [{"prompt": f"thing {number}"} for number in range(3)]
    run = job(*rows, model__path=str(tiny_folder), steps=1, batch_size=3)
    (run / "samples" / "0002-seed0.png").unlink()
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *args, **options: torch.empty(1 << 50))
    job(*rows, code=2, model__path=str(tiny_folder), steps=1, batch_size=3)
    assert "1 of 3 images could not be generated" in capsys.readouterr().err


def test_a_replay_lists_only_its_image(job, tiny_folder):
    rows = [{"prompt": f"thing {number}"} for number in range(3)]
    run = job(*rows, model__path=str(tiny_folder), steps=1, batch_size=3)
    assert main(["sample", "--replay", str(run / "samples" / "0002-seed0.png"), "--set", "output=again"]) == 0
    assert [entry.file for entry in read_manifest(run.parent / "again")] == ["samples/0002-seed0.png"]


def test_an_adapter_is_a_file_of_any_name(job, style, tiny_folder, tmp_path):
    make_adapter(tiny_folder, tmp_path / "many", seed=1)  # another adapter in the same folder
    shutil.copy(style / "adapter" / "pytorch_lora_weights.safetensors", tmp_path / "many" / "mine.safetensors")
    run = job({"prompt": "a bus"}, adapter__path="many/mine.safetensors", steps=1)
    (used,) = read_metadata(run / "samples" / "0001-seed0.png").adapters
    assert used.digest == adapter_digest(tmp_path / "many" / "mine.safetensors")


def test_an_adapter_that_replaces_biases_is_not_drawn_beside_others(job, tiny_folder, tmp_path, capsys):
    model = load_image_model(ModelConfig(path=str(tiny_folder)))
    inject(model.unet, "sdxl-unet", DoRASpec(rank=2))
    model.unet.conv_out.bias.data += 1.0
    metadata = {"base_model": str(tiny_folder)}
    save_adapter(
        model.unet, tmp_path / "biases", format="native", metadata=metadata, extra_parameters=["conv_out.bias"]
    )
    job({"prompt": "a bus"}, {"prompt": "a bus", "adapter": "biases"}, code=2, steps=1)
    assert "biases holds weights that replace those of the base" in capsys.readouterr().err
    run = job({"prompt": "a bus", "adapter": "biases"}, steps=1)
    assert read_manifest(run)[0].status == "done"


@pytest.mark.parametrize(("scheduler", "steps"), [("lcm", 51), ("ddim", 1001)])
def test_a_scheduler_that_cannot_take_the_steps_is_named(job, tiny_folder, capsys, scheduler, steps):
    rows = ({"prompt": "a"}, {"prompt": "a", "scheduler": scheduler, "steps": steps})
    run = job(*rows, code=2, model__path=str(tiny_folder), steps=1)
    assert f"row 2: the scheduler cannot take {steps} steps" in capsys.readouterr().err
    assert not run.exists()


def test_a_header_that_cannot_be_used_is_named(job, tiny_folder, tmp_path, capsys):
    model = load_image_model(ModelConfig(path=str(tiny_folder)))
    inject(model.unet, "sdxl-unet", DoRASpec(rank=2))
    metadata = {"base_model": str(tiny_folder), "base_dtype": "float8"}
    save_adapter(model.unet, tmp_path / "odd", format="diffusers", metadata=metadata)
    job({"prompt": "a", "adapter": "odd"}, code=2)
    assert "the header of odd cannot be used (base_dtype: " in capsys.readouterr().err


def test_a_job_file_may_have_any_name(job, tiny_folder):
    run = job({"prompt": "a bus"}, name="\U0001f600 é.jsonl", model__path=str(tiny_folder), steps=1)
    assert read_manifest(run)[0].status == "done"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out"], "out is a run of dora-mm sample: dora-mm sample --resume out goes on with it"),
        (["folder.csv"], "folder.csv is a folder: name a prompts file in it"),
        (
            ["--resume", "training"],
            "--resume training: the run is one of dora-mm train: dora-mm train --resume training",
        ),
        (["out", "--set", "output=~nobody-at-all/x"], "output ~nobody-at-all/x: there is no user nobody-at-all"),
        (["out", "--set", "adapter.path=~nobody-at-all/x"], "adapter.path: ~nobody-at-all/x: there is no user nobody"),
    ],
)
def test_paths_that_are_no_jobs(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("out", "folder.csv", "training"):
        (tmp_path / folder).mkdir()
    (tmp_path / "out" / "config.yaml").write_text("pipeline: sample\nprompts: [a]\n")
    shutil.copy(ROOT / "configs" / "sdxl" / "demo.yaml", tmp_path / "training" / "config.yaml")
    assert main(["sample", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_that_is_killed_ends_with_the_same_files(style, tmp_path):
    prompts, points = 10, "0,1,2,3,4,5,6,7,8,9"
    (tmp_path / "jobs.csv").write_text(
        "prompt,seed,strength\n" + "".join(f"thing {number},1-4,{number % 3 / 2}\n" for number in range(prompts))
    )
    settings = ["--set", f"adapter.path={style}", "steps=2", "batch_size=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.images.killed_generation", points, "jobs.csv", *settings],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == str([0] + [-9] * len(points.split(",")) + [0]), done.stderr
    found = content(tmp_path / "killed")
    assert len([name for name in found if name.endswith(".png")]) == 4 * prompts + 1
    assert found == content(tmp_path / "whole")


@pytest.mark.parametrize("content", ["prompt,sed\na,1\n", "prompt,adapter\na,nosuch\n", "prompt,steps\na,x\n"])
def test_mistakes_in_a_job_file_are_found_before_torch_is_imported(tmp_path, content):
    (tmp_path / "jobs.csv").write_text(content)
    code = "import sys; from dora_mm.cli import main; print(main(['sample', 'jobs.csv']), 'torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.split() == ["2", "False"], found.stderr


def test_strengths_by_part(job, style, tiny_folder, capsys):
    """In a row and in the config; the base bit for bit at 0, and the images can be generated again."""
    row = {"prompt": "a bus", "steps": 2}
    places = "unet.down=0,unet.up=0.5,unet.mid=1"
    run = job(
        {**row, "adapter": "none"},
        {**row, "adapter": f"{style}:=0"},
        {**row, "adapter": f"{style}:{places}+{style / 'adapter'}:unet=0.25"},
        {**row},
        model__path=str(tiny_folder),
        adapter={"path": str(style), "strength": {"unet.down": 0, "unet.up": 0.5}},
    )
    files = [run / entry.file for entry in read_manifest(run)]
    assert np.array_equal(pixels(files[0]), pixels(files[1]))
    assert len({pixels(file).tobytes() for file in files}) == 3
    assert read_manifest(run)[2].settings["adapter"].startswith(f"{style}:{places}+")
    (used,) = read_metadata(files[3]).adapters
    assert used.strength == (("", 1.0), ("unet.down", 0.0), ("unet.up", 0.5))
    assert "=1,unet.down=0,unet.up=0.5" in Image.open(files[3]).text["parameters"]
    assert main(["inspect", str(files[3])]) == 0
    assert main(["sample", "--replay", str(files[2]), "--set", f"output={run}-again"]) == 0
    assert f"the same pixels as {files[2]}" in capsys.readouterr().out


def test_a_strength_of_a_part_that_the_adapter_does_not_have(job, style, tiny_folder, tmp_path, capsys):
    job({"prompt": "a", "adapter": f"{style}:unet.dwn=0.5"}, model__path=str(tiny_folder), code=2)
    assert "no adapted module is in 'unet.dwn', the nearest names are unet.down_blocks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "settings", "written"),
    [
        ({"strength": 0.7}, {}, "row 2 has strength 0.7"),
        ({}, {"strengths": [0, 0.5]}, "row 1 has strengths [0, 0.5]"),
        ({"strength": 1, "adapter": "none"}, {}, "row 2 has strength 1"),
    ],
)
def test_a_strength_without_an_adapter_is_refused(job, tmp_path, capsys, row, settings, written):
    job({"prompt": "a"}, {"prompt": "b", **row}, code=2, **settings)
    assert f"{written} and no adapter: set adapter.path=RUN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prompts_with_weights_in_files_of_their_own(job, tiny_folder, capsys):
    """Images differ from those of the words without weights by the weights alone; they replay, and are settings."""
    row = {"prompt": "a (red:1.0) {bus|car}", "file": "one", "folder": "deep/er", "negative_prompt": "grey"}
    settings = {"model__path": str(tiny_folder), "steps": 2, "prompt_syntax": "a1111"}
    two = {**row, "prompt": "a (red:3) {bus|car}", "file": "two", "CFG rescale": 0.7}
    run = job(row, two, **settings)
    one, two = read_manifest(run)
    assert [entry.file for entry in (one, two)] == ["samples/deep/er/one.png", "samples/deep/er/two.png"]
    assert one.settings["prompt"] in ("a (red:1.0) bus", "a (red:1.0) car")
    assert one.settings["prompt_syntax"] == "a1111"
    assert not np.array_equal(pixels(run / one.file), pixels(run / two.file))
    words = {"prompt": one.settings["prompt"].replace("(red:1.0)", "red"), "negative_prompt": "grey"}
    plain = job(words, model__path=str(tiny_folder), steps=2, output="plain")
    assert np.abs(pixels(run / one.file) - pixels(plain / "samples" / "0001-seed0.png")).max() <= 1
    assert {"prompt_syntax", "guidance_rescale"}.isdisjoint(read_manifest(plain)[0].settings)
    assert [entry.settings.get("guidance_rescale") for entry in read_manifest(run)] == [None, 0.7]
    texts = [Image.open(run / entry.file).text["parameters"] for entry in read_manifest(run)]
    assert ["CFG Rescale: 0.7" in text for text in texts] == [False, True]
    assert main(["sample", "--replay", str(run / two.file), "--set", "output=again"]) == 0
    assert "the same pixels" in capsys.readouterr().out
    assert main(["gallery", str(run), "--output", "page"]) == 0


def test_no_adapter_is_said_first_and_last(job, style, tiny_folder, caplog):
    settings = {"model__path": str(tiny_folder), "steps": 1}
    run = job({"prompt": "a"}, {"prompt": "b", "strength": 0}, **settings)
    about = [message for message in caplog.messages if message.startswith("No adapter: ")]
    assert about == ["No adapter: 1 of 2 images have none, and are the bare model's. With one: --set "
                     "adapter.path=RUN, or a column adapter"] * 2  # fmt: skip
    assert caplog.messages[-1] == about[0]
    caplog.clear()
    assert main(["sample", "--resume", str(run)]) == 0
    job({"prompt": "a", "adapter": "none"}, {"prompt": "b", "adapter": str(style)}, output="asked", **settings)
    assert len([message for message in caplog.messages if message.startswith("No adapter: ")]) == 2
