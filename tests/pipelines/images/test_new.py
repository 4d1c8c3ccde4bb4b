"""dora-mm new: a config that fits one's own images or questions, and trains as it is; dora-mm configs."""

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.config.images import MaskConfig
from dora_mm.config.models import starts
from dora_mm.data.images.folder import read_training_images
from dora_mm.preview import machine
from dora_mm.preview.drafts import SCHEMA
from dora_mm.preview.machine import GPUInfo
from tests.documented.texts import ROOT, configs


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_images(names, captions=()):
    for number, name in enumerate(names):
        path = Path("my images", name)
        path.parent.mkdir(exist_ok=True)
        Image.new("CMYK" if name.endswith(".jpg") else "RGB", (80 + 9 * number, 64), number).save(path)
        if number < len(captions):
            path.with_suffix(".txt").write_text(captions[number])


def made(name: str, *arguments: str, family: str = "sdxl"):
    assert main(["new", family, name, *arguments]) == 0
    return load_config(f"{name}.yaml")


def test_a_style_from_captioned_images_of_several_formats(here, capsys):
    captions = [f"a sks2 generating of a {thing} at night" for thing in ("bus", "cat", "key")]
    write_images(["a.png", "b.jpg", "c.webp"], captions)
    config = made("style", "--images", "my images")
    printed = capsys.readouterr().out
    assert (config.data.placeholder, config.data.instance_prompt) == ("sks2", None)
    assert config.train.steps == 150  # 1000 are for 23 images and more
    assert Path("style_prompts.txt").read_text().split("\n")[0] == "a sks2 generating of a lighthouse at night"
    assert "trigger   sks2" in printed
    assert f"\n# yaml-language-server: $schema={SCHEMA.as_uri()}\npipeline:" in Path("style.yaml").read_text()
    assert "3 from <name>.txt" in printed
    assert "hf download stabilityai/stable-diffusion-xl-base-1.0" in printed
    commands = [line.partition("  #")[0].strip() for line in printed.splitlines() if line.startswith("  dora-mm")]
    assert [shlex.split(command)[1:3] for command in commands] == [
        ["train", "style.yaml"],
        ["sample", "style_prompts.txt"],
        ["gallery", "runs/style_prompts/001"],
    ]
    text = Path("style.yaml").read_text()
    assert text.startswith("# dora-mm train style.yaml\n#\n# A style from 3 images in my images")
    assert "# multiplies the learning rate" in text  # the recipe's comments
    assert config.sample.prompts == ()  # the recipe for 12 GB generates no contact sheets


def test_a_large_folder_has_a_limit_of_steps_and_of_what_a_stop_can_lose(here, capsys):
    Path("many").mkdir()
    for number in range(640):
        Image.new("RGB", (16, 16), number).save(f"many/{number}.bmp")
    train = made("large", "--images", "many").train
    assert (train.steps, train.checkpoint_every) == (10_000, 250)
    assert "steps     10,000, where 10,500 would show each of the 640 images as often" in capsys.readouterr().out


def test_images_without_captions_get_a_word(here, capsys):
    write_images(["a.png", "b.png"])
    config = made("plain", "--images", "my images")
    assert config.data.instance_prompt == "a picture in the style of TOK"
    assert config.data.placeholder == "TOK"
    assert "TOK" in Path("plain_prompts.txt").read_text()
    capsys.readouterr()
    write_images(["c.png", "d.png"], ["a hat", "two cats"])
    mixed = made("mixed", "--images", "my images")
    assert (mixed.data.placeholder, mixed.data.instance_prompt) == (None, "a picture")
    assert "No word is in all captions" in capsys.readouterr().out


@pytest.mark.parametrize("ending", [".mask.png", "-masklabel.png"])
def test_masks_are_told_from_images_and_used(here, capsys, caplog, ending):
    """OneTrainer's were counted as images, and trained on under the style's prompt."""
    write_images(["a.png", "b.jpg", "c.webp"])
    for name, size in (("a", (80, 64)), ("c", (98, 64))):
        Image.new("L", size, 255).save(f"my images/{name}{ending}")
    Image.new("L", (80, 64), 255).save("my images/a-condlabel.png")
    config = made("masked", "--images", "my images")
    assert config.data.mask == MaskConfig()
    assert [bool(image.mask) for image in read_training_images(config.data)] == [True, False, True]
    printed = capsys.readouterr().out
    assert "images  3 in my images" in printed
    assert f"masks     2 of 3 (NAME{ending}), floor 0.1: data.mask; null trains on all of each image" in printed
    assert "1 image (a-condlabel.png) is what OneTrainer or ai-toolkit conditions on, and not used" in caplog.text
    assert main(["train", "masked.yaml", "--dry-run", "--set", "data.mask=null"]) == 2  # SDXL is not here
    assert f"masks     2 of 3 (NAME{ending}), not used: data.mask={{}} uses them" in capsys.readouterr().out
    Image.new("L", (80, 64), 255).save(f"my images/gone{ending}")
    assert main(["new", "sdxl", "other", "--images", "my images"]) == 2
    assert f"1 image (gone{ending}) is the mask of no image" in capsys.readouterr().err
    assert not Path("other.yaml").exists()


def test_a_small_model_gets_the_recipe_of_one(here, tiny_folder, capsys):
    write_images(["a.png", "b.jpg"], ["a sks bus", "a sks cat"])
    config = made("small", "--images", "my images", "--model", str(tiny_folder))
    assert config.model.path == str(tiny_folder)
    assert (config.data.resolution, len(config.sample.prompts)) == (128, 4)
    assert [image.caption for image in read_training_images(config.data)] == ["a sks bus", "a sks cat"]
    printed = capsys.readouterr().out
    assert "is not on this machine" not in printed
    assert "for small models" in printed


def test_the_recipe_is_that_of_the_gpu(here, monkeypatch, capsys):
    write_images(["a.png"], ["a sks bus"])
    for memory, sheets in ((23.6, True), (15.8, True), (11.6, False), (6.0, False)):
        monkeypatch.setattr(machine, "gpus", lambda memory=memory: [GPUInfo("a GPU", memory, "bf16")])
        config = made(f"style{int(memory)}", "--images", "my images")
        assert (config.train.batch_size, bool(config.sample.prompts)) == (1, sheets)
        assert config.train.gradient_checkpointing == (memory < 20)
        assert f": a GPU has {memory:.0f} GB" in capsys.readouterr().out
    assert config.adapter.cache == "norms"
    assert (config.model.dtype, config.train.mixed_precision) == ("bfloat16", "bf16")
    monkeypatch.setattr(machine, "gpus", lambda: [GPUInfo("an older GPU", 15.8, "fp16")])
    config = made("older", "--images", "my images")
    assert (config.model.dtype, config.train.mixed_precision) == ("float16", "fp16")


def test_without_a_gpu_the_recipe_is_the_smallest_and_the_reason_is_printed(here, monkeypatch, capsys):
    write_images(["a.png"], ["a sks bus"])
    monkeypatch.setattr(machine, "gpus", list)
    made("smallest", "--images", "my images")
    assert "3d_icon_8gb.yaml, for 8 GB, the smallest one: no GPU was found here (--vram" in capsys.readouterr().out
    made("chosen", "--images", "my images", "--vram", "24")
    assert "3d_icon_24gb.yaml, for 24 GB: --vram has 24 GB" in capsys.readouterr().out


def test_questions(here, capsys):
    write_images(["a.png"])
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}]
    Path("my.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}] * 30))
    config = made("qa", "--data", "my.json", "--images", "my images", family="vlm")
    assert (config.data.train.file, config.data.train.images) == ("my.json", "my images")
    assert "connector" in config.adapter.parts
    assert (config.train.epochs, config.model.dtype) == (3, "float32")
    printed = capsys.readouterr().out
    assert "30 rows of my.json, LLaVA" in printed
    assert "dora-mm ask HuggingFaceTB/SmolVLM-256M-Instruct IMAGE QUESTION --adapter runs/qa/001" in printed
    other = made("other", "--data", "my.json", "--images", "my images", "--model", "google/gemma-3-4b-it", family="vlm")
    assert other.model.path == "google/gemma-3-4b-it"
    assert "# 211 linear layers" in Path("qa.yaml").read_text()
    assert "# 211 linear layers" not in Path("other.yaml").read_text()  # of another model they are others


def test_questions_without_images(here, capsys):
    turns = [{"from": "human", "value": "What is red?"}, {"from": "gpt", "value": "A bus."}]
    rows = [{"conversations": turns}] * 3
    Path("texts.json").write_text(json.dumps(rows))
    config = made("texts", "--data", "texts.json", family="vlm")
    assert (config.data.train.file, config.data.train.images) == ("texts.json", None)
    assert not config.adapter.parts  # the model's default ones
    printed = capsys.readouterr().out
    assert "no row has an image" in printed
    assert "dora-mm ask HuggingFaceTB/SmolVLM-256M-Instruct QUESTION --adapter runs/texts/001" in printed
    assert "images in" not in Path("texts.yaml").read_text().partition("pipeline:")[0]
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}]
    Path("texts.json").write_text(json.dumps([*rows, {"image": "a.png", "conversations": turns}]))
    assert main(["new", "vlm", "some", "--data", "texts.json"]) == 2
    assert "--images is missing" in capsys.readouterr().err


@pytest.mark.parametrize("images", ["data/shown", "elsewhere", "missing", None])
def test_the_folder_from_which_paths_of_images_start_is_suggested(here, capsys, images):
    """LLaMA-Factory's paths start in the folder of its JSON."""
    Path("elsewhere").mkdir()
    Path("data/shown").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("data/shown/a.png")
    turns = [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "He."}]
    Path("data/my.json").write_text(json.dumps([{"messages": turns, "images": ["shown/a.png"]}] * 3))
    given = ["--images", images] if images else []
    assert main(["new", "vlm", "qa", "--data", "data/my.json", *given]) == 2
    assert "did you mean --images data?" in capsys.readouterr().err
    assert not Path("qa.yaml").exists()
    assert made("qa", "--data", "data/my.json", "--images", "data", family="vlm").data.train.images == "data"


def test_single_missing_images_are_counted(here, capsys):
    write_images(["a.png"])
    turns = [{"from": "human", "value": "<image>Who?"}, {"from": "gpt", "value": "He."}]
    rows = [{"conversations": turns, "image": name} for name in ("a.png", "b.png")]
    Path("my.json").write_text(json.dumps(rows))
    made("qa", "--data", "my.json", "--images", "my images", family="vlm")
    assert "missing   1 of 2 images are not in my images; one is b.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "task", "said"),
    [
        ("A bus.", "chat", "exact match, since most answers have 4 words at most; ROUGE-L beside it"),
        (
            "A red bus on the street.",
            "chat_sentences",
            "ROUGE-L, since most answers have more than 4 words; exact match",
        ),
        (None, "chat", "no row has an answer that is read"),
    ],
)
def test_questions_get_a_config_of_their_score(here, capsys, answer, task, said):
    rows = [{"query": f"What is {n}?", "response": answer, "topic": "buses"} for n in range(100)]
    Path("my.json").write_text(json.dumps(rows))
    config = made("qa", "--data", "my.json", family="vlm")
    assert (config.data.task, config.data.valid.share) == (task, 0.2)
    evaluation = load_config("qa_eval.yaml")
    assert (evaluation.data, evaluation.model) == (config.data, config.model)  # so the same rows are held out
    assert evaluation.adapter == "runs/qa/latest"
    printed = capsys.readouterr().out
    assert f"score     {said}" in printed or said in printed
    assert "unread    topic ('buses')" in printed
    assert "dora-mm eval qa_eval.yaml" in printed
    assert main(["new", "vlm", "qa_eval", "--data", "my.json"]) == 2
    assert "qa_eval.yaml exists already" in capsys.readouterr().err


TURNS = [{"from": "human", "value": "<image>Who?"}]
SAYS = {"from": "gpt", "value": "He."}, {"from": "gpt", "value": "She."}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": TURNS, "chosen": SAYS[0], "rejected": SAYS[1], "images": ["a.png"]},
        {"query": "<image>Who?", "response": "He.", "rejected_response": "She.", "images": ["a.png"]},
    ],
)
def test_pairs_of_answers_are_trained_as_preferences(here, capsys, row):
    write_images(["a.png"])
    Path("pairs.json").write_text(json.dumps([row] * 30))
    config = made("dpo", "--data", "pairs.json", "--images", "my images", family="vlm")
    assert (config.data.task, config.data.train.format, config.data.train.images) == (
        "preference",
        "preferences",
        "my images",
    )
    assert (config.train.batch_size, config.train.gradient_accumulation_steps, config.optimizer.lr) == (4, 4, 5e-6)
    evaluation = load_config("dpo_eval.yaml")
    assert (evaluation.data, evaluation.adapter) == (config.data, "runs/dpo/latest")
    assert "adapter=null" not in Path("dpo_eval.yaml").read_text()  # pairs are compared with the model without it
    printed = capsys.readouterr().out
    assert "pairs     30 rows of pairs.json" in printed
    assert "images in my images" in printed
    assert "unread" not in printed


@pytest.mark.slow
def test_the_training_and_the_evaluation_of_new_questions_run_to_their_end(here, tiny_vlm, monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpus", lambda: [])
    rows = [{"query": f"What is {n}?", "response": "It is a number, I think."} for n in range(10)]
    Path("my.json").write_text(json.dumps(rows))
    made("qa", "--data", "my.json", "--model", str(tiny_vlm("qwen2")), family="vlm")
    assert main(["train", "qa.yaml", "--set", "evaluate.max_new_tokens=3", "train.epochs=1"]) == 0
    assert "ROUGE-L of the base" in capsys.readouterr().out
    assert main(["eval", "qa_eval.yaml", "--set", "decode.max_new_tokens=3"]) == 0
    assert "| ROUGE-L |" in capsys.readouterr().out


@pytest.mark.parametrize("gpu", [None, GPUInfo("a large GPU", 80.0, "bf16")])
def test_questions_for_a_language_model(here, tiny_vlm, gpu, monkeypatch):
    """It has no connector, which the recipe without a GPU trains, and no images, which that of a large GPU limits."""
    monkeypatch.setattr(machine, "gpus", lambda: [gpu] if gpu else [])
    turns = [[{"from": "human", "value": f"What is {n}?"}, {"from": "gpt", "value": "A bus."}] for n in range(30)]
    Path("texts.json").write_text(json.dumps([{"conversations": each} for each in turns]))
    config = made("lm", "--data", "texts.json", "--model", str(tiny_vlm("qwen2")), family="vlm")
    assert not config.adapter.parts
    assert main(["train", "lm.yaml", "--dry-run", "--set", "model.dtype=float32", "train.mixed_precision=no"]) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sdlx", "a", "--images", "my images"], "did you mean 'sdxl'"),
        (["sdxl", "a"], "--images is missing"),
        (["sdxl", "a", "--images", "elsewhere"], "--images: elsewhere does not exist"),
        (["sdxl", "a b", "--images", "my images"], "NAME a b"),
        (["sdxl", "there", "--images", "my images"], "there_prompts.txt exists already"),
        (["vlm", "a", "--images", "my images"], "--data is missing"),
        (["sdxl", "a", "--images", "my images", "--model", "no.safetensors"], "--model: no.safetensors does not exist"),
    ],
)
def test_refusals_write_nothing(here, capsys, arguments, named):
    write_images(["a.png"])
    Path("there_prompts.txt").touch()
    before = sorted(here.rglob("*"))
    assert main(["new", *arguments]) == 2
    assert named in capsys.readouterr().err
    assert sorted(here.rglob("*")) == before


def test_a_model_that_train_refuses_is_refused(here, tiny_folder, capsys):
    write_images(["a.png"])
    given = ["a", "--images", "my images", "--model"]
    assert main(["new", "z_image", *given, str(tiny_folder)]) == 2
    assert f"--model: {tiny_folder} is of the family sdxl: dora-mm new sdxl" in capsys.readouterr().err
    Path("edit").mkdir()
    Path("edit", "model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')
    assert main(["new", "qwen_image", *given, "edit"]) == 2
    assert (
        "is a FluxKontextPipeline, which is no family of models that edit here; there are FLUX.2 klein"
        in capsys.readouterr().err
    )
    assert not Path("a.yaml").exists()


def test_a_kill_between_the_two_files_is_repeated(here):
    write_images(["a.png"], ["a sks generating"])
    made("style", "--images", "my images")
    Path("style.yaml").unlink()  # the last to appear
    assert made("style", "--images", "my images").train.steps
    assert main(["new", "sdxl", "style", "--images", "my images"]) == 2
    assert not list(here.glob(".*"))


def test_every_start_is_a_packaged_config_and_all_of_them_are_listed(here, capsys):
    assert main(["configs"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("configs/")]
    assert listed == [str(path.relative_to(ROOT)) for path in configs()]
    assert {recipe for recipes in starts().values() for recipe in recipes.values()} <= set(listed)


def test_the_refusal_of_a_placeholder_names_the_keys_that_solve_it(here, tiny_folder, capsys):
    write_images(["a.png"], ["a bus"])
    style = ["configs/sdxl/tiny_3d_icon.yaml", "--set", "data.folder=my images", f"model.path={tiny_folder}"]
    assert main(["train", *style]) == 2
    message = capsys.readouterr().err
    assert "data.placeholder" in message
    assert "data.instance_prompt" in message


def test_a_job_without_a_model_asks_for_one(here, capsys):
    Path("jobs.txt").write_text("a bus\n")
    assert main(["sample", "jobs.txt"]) == 2
    assert "--set model.path=MODEL" in capsys.readouterr().err
    assert main(["train", "configs/sdxl/3d_ikon.yaml"]) == 2
    assert "dora-mm configs" in capsys.readouterr().err


def test_a_family_without_a_recipe_to_start_from_says_so(here, capsys):
    assert main(["new", "vl_bart", "mine", "--images", "my images"]) != 0
    said = capsys.readouterr().err
    assert "VL-BART (vl_bart) has no recipe to start from (`starts` of its record)" in said
    assert "choose from sdxl, z_image" in said


def write_pairs_of(names):
    for folder in ("after", "before"):
        Path(folder).mkdir()
        for number, name in enumerate(names):
            Image.new("RGB", (80, 64), (number, 0, len(folder))).save(f"{folder}/{name}.png")


def test_pairs_of_images_become_an_edit(here, capsys):
    write_pairs_of(["a", "b", "c"])
    Path("after/b.txt").write_text("make it a brick model")
    config = made("edit", "--images", "after", "--references", "before", family="flux2_klein")
    assert config.data.references == ("before",)
    assert (config.data.instance_prompt, config.data.placeholder) == ("make it a brick model", None)
    assert config.sample.images == (("before/a.png",), ("before/b.png",), ("before/c.png",))
    assert "references  3 with 1" in (printed := capsys.readouterr().out)
    assert "dora-mm sample edit_prompts.csv --set adapter.path=runs/edit/001" in printed
    rows = [f"make it a brick model,before/{name}.png" for name in "abc"]
    assert Path("edit_prompts.csv").read_text().splitlines() == ["prompt,image", *rows]
    assert [len(image.references) for image in read_training_images(config.data)] == [1, 1, 1]


def test_pairs_in_a_metadata_file_are_known_by_it(here):
    write_pairs_of(["a", "b"])
    Path("before").rename("after/before")
    rows = [
        {"file_name": "a.png", "text": "a hat", "references": ["before/a.png", "before/b.png"]},
        {"file_name": "b.png", "text": "no hat"},
    ]
    Path("after/metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = made("edit", "--images", "after", family="qwen_image_21")
    assert (config.data.references, config.sample.prompts) == ((), ("a hat",))
    assert Path("edit_prompts.csv").read_text() == "prompt,image,image_2\na hat,after/before/a.png,after/before/b.png\n"


def test_folders_named_alike_are_pointed_out_to_models_that_edit(here, capsys):
    write_pairs_of(["a", "b"])
    made("style", "--images", "after", family="flux2_klein")
    assert "before has an image for each of these: --references" in capsys.readouterr().out
    made("other", "--images", "after")
    assert "--references" not in capsys.readouterr().out
    assert main(["new", "sdxl", "edit", "--images", "after", "--references", "before"]) == 2
    assert "SDXL takes no reference images" in capsys.readouterr().err
    assert main(["new", "qwen_image_edit", "edit", "--images", "after"]) == 2
    assert "--references is missing" in capsys.readouterr().err
    assert main(["new", "vlm", "edit", "--references", "before"]) == 2
    assert "takes no reference images" in capsys.readouterr().err
