"""dora-mm ask: the answers of models without and with an adapter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_mm.adapting.files import save_trained
from dora_mm.adapting.networks import adapt
from dora_mm.cli import main
from dora_mm.config.models import VisionConfig, VLMModelConfig
from dora_mm.config.vl import DecodeConfig, TrainVLConfig
from dora_mm.data.vl.answers import texts_of
from dora_mm.data.vl.example import Example, Turn
from dora_mm.models.vl.families import load_vl_model
from dora_mm.models.vl.vl_bart.loading import from_bart, save_vl_bart
from dora_mm.recipes import PIPELINES
from dora_mm.utils.messages import for_terminal
from tests.pipelines.files.test_merge import llama
from tests.shared.data.chats import messages
from tests.shared.data.vl_files import write_json
from tests.shared.data.vlm_rows import write_images
from tests.shared.vl.small_towers import DIM
from tests.shared.vl.small_vl_bart import small_bart, small_tokenizer

QUESTION = "What colour is the ball?"


@pytest.fixture(scope="module")
def loaded_images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def vl_bart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "vl_bart"
    torch.manual_seed(0)
    save_vl_bart(from_bart(small_bart(), len(small_tokenizer()), DIM, "image"), small_tokenizer(), folder)
    return folder


def run_of(
    folder: Path, task: str, rows: list[Example], model: dict[str, Any], file: Any = "rows.json", **sections: Any
) -> tuple[Any, Any]:
    """Saves the adapter of a run without training it; returns the bare model's answers and the adapted one's."""
    source = {"format": "chat" if task == "chat" else "easy_vqa", "file": str(file), "images": "pictures"}
    values = {
        "pipeline": "train_vl",
        "name": "run",
        "model": model,
        "adapter": {"rank": 2, "extra_trainable": ["norms"]},
        "data": {"task": task, "train": source},
        "optimizer": {"lr": 0.1},
        "train": {"steps": 1, "batch_size": 1},
        **sections,
    }
    config = TrainVLConfig.model_validate(values)
    vl = load_vl_model(config.model, config.vision, seed=0)
    answer = vl.answerer(task, DecodeConfig(max_new_tokens=6), ())
    bare = [shown_answer(answer([row], "/")) for row in rows]
    assert vl.identity  # of the bare model
    trained = adapt(vl.networks, vl.target_maps, config.adapter, seed=0, backend="torch")
    for name, parameter in trained.parameters.items():
        parameter.data += torch.randn_like(parameter) * (0.1 if "magnitude" in name else 1.0)
    save_trained(trained, config, vl, folder / "adapter")
    return bare, [shown_answer(answer([row], "/")) for row in rows]


def shown_answer(answers) -> str:
    """The first of some answers, of a random model that also writes control characters, as a terminal shows it."""
    return for_terminal(texts_of(answers)[0])


def asked(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """What a command prints."""
    capsys.readouterr()
    assert main(["ask", *map(str, arguments), "--max-new-tokens", "6"]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["ask", *map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = [line for line in shown.err.splitlines() if line.startswith("dora-mm: ")]
    return line


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("llava", "paligemma", "florence2", "mllama")]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "blip_vqa", *SLOW])
def test_both_answers_are_shown(name, tiny_vlm, loaded_images, tmp_path, capsys):
    image = loaded_images / "wide.png"
    rows = [Example("row", (str(image),), QUESTION)]
    (bare,), (adapted,) = run_of(tmp_path / "run", "chat", rows, {"path": str(tiny_vlm(name))})
    assert adapted != bare
    assert asked(capsys, tiny_vlm(name), image, QUESTION) == f"{bare}\n"
    for adapter in (tmp_path / "run", tmp_path / "run" / "adapter"):
        shown = asked(capsys, tiny_vlm(name), image, QUESTION, "--adapter", adapter)
        assert shown == for_terminal(f"without adapter: {bare}\nwith adapter:    {adapted}\n")


def test_an_answer_cannot_command_the_terminal(tiny_vlm, loaded_images, capsys, monkeypatch):
    monkeypatch.setattr(PIPELINES.load("ask"), "conversed", lambda *_: iter(["a \x1b[2Jb\nnext\tline"]))
    assert asked(capsys, tiny_vlm("qwen2_5_vl"), loaded_images / "wide.png", QUESTION) == "a \\x1b[2Jb\nnext\tline\n"


def test_several_images(tiny_vlm, loaded_images, tmp_path, capsys):
    images = [loaded_images / "wide.png", loaded_images / "tall.png"]
    rows = [Example("row", tuple(map(str, found)), QUESTION) for found in (images, images[:1])]
    (both, one), _ = run_of(tmp_path, "chat", rows, {"path": str(tiny_vlm("llava"))})
    assert both != one
    assert asked(capsys, tiny_vlm("llava"), *images, QUESTION) == f"{both}\n"
    assert "reads one image" in refused(capsys, tiny_vlm("blip_vqa"), *images, QUESTION)


def test_the_question_is_asked_as_the_run_trained(tiny_vlm, loaded_images, tmp_path, capsys):
    """With the prompt of its task; of conversations with the system turn that most of them have."""
    image, base = loaded_images / "wide.png", tiny_vlm("qwen2_5_vl")
    row = Example("row", (str(image),), QUESTION)
    (bare,), (adapted,) = run_of(tmp_path / "vqa", "vqa", [row], {"path": str(base)})
    shown = asked(capsys, base, image, QUESTION, "--adapter", tmp_path / "vqa")
    assert shown == for_terminal(f"without adapter: {bare}\nwith adapter:    {adapted}\n")
    assert asked(capsys, base, image, QUESTION) != f"{bare}\n"

    brief = Turn("system", "Be a parrot.", False), Turn("user", f"<image>{QUESTION}", False)
    said = [{"role": "system", "content": "Be a parrot."}, *messages("Q", "A")]
    file = write_json(tmp_path / "rows.json", [{"messages": said}] * 2 + [{"messages": said[1:]}])
    (bare,), (adapted,) = run_of(tmp_path / "chat", "chat", [replace(row, turns=brief)], {"path": str(base)}, file=file)
    both = for_terminal(f"without adapter: {bare}\nwith adapter:    {adapted}\n")
    assert asked(capsys, base, image, QUESTION, "--adapter", tmp_path / "chat") == both
    given = (base, image, QUESTION, "--system", "Be a parrot.")
    assert asked(capsys, *given) == f"{bare}\n"
    without = asked(capsys, base, image, QUESTION, "--adapter", tmp_path / "chat", "--system", "")
    write_json(file, [{"messages": messages("<image>\nQ", "A"), "images": [str(image)]}] * 2)
    broken = replace(row, turns=(Turn("user", f"<image>\n{QUESTION}", False),))
    answer = load_vl_model(VLMModelConfig(path=str(base)), VisionConfig(), seed=0).answerer(
        "chat", DecodeConfig(max_new_tokens=6), ()
    )
    shown = asked(capsys, base, image, QUESTION, "--adapter", tmp_path / "chat")
    assert shown.startswith(for_terminal(f"without adapter: {texts_of(answer([broken], '/'))[0]}\nwith"))
    assert shown != without
    file.unlink()
    assert asked(capsys, base, image, QUESTION, "--adapter", tmp_path / "chat") == without != both


def test_text_alone_and_several_turns(tiny_vlm, loaded_images, capsys):
    base, image = tiny_vlm("llava"), loaded_images / "wide.png"
    vl = load_vl_model(VLMModelConfig(path=str(base)), VisionConfig(), seed=0)
    answer = vl.answerer("chat", DecodeConfig(max_new_tokens=6), ())
    (alone,) = texts_of(answer([Example("row", (), QUESTION)], "/"))
    assert asked(capsys, base, QUESTION) == f"{alone}\n"

    (first,) = texts_of(answer([Example("row", (str(image),), QUESTION)], "/"))
    turns = [Turn("user", f"<image>\n{QUESTION}", False), Turn("assistant", first, False), Turn("user", "Why?", False)]
    (second,) = texts_of(answer([Example("row", (str(image),), "", turns=tuple(turns))], "/"))
    assert asked(capsys, base, image, QUESTION, "--then", "Why?") == f"{first}\n{second}\n"

    plain = tiny_vlm("paligemma")
    assert "without an image" in refused(capsys, plain, QUESTION)
    assert "--then" in refused(capsys, plain, image, QUESTION, "--then", "Why?")
    assert "--system" in refused(capsys, plain, image, QUESTION, "--system", "Be brief.")


def test_the_settings_of_the_run_are_those_of_the_answer(tiny_vlm, loaded_images, tmp_path, capsys):
    image = loaded_images / "wide.png"
    rows = [Example("row", (str(image),), QUESTION)]
    model = {"path": str(tiny_vlm("qwen2_5_vl")), "max_pixels": 784, "prompts": {"chat": "Say {text}"}}
    (bare,), (adapted,) = run_of(tmp_path, "chat", rows, model)
    shown = asked(capsys, tiny_vlm("qwen2_5_vl"), image, QUESTION, "--adapter", tmp_path)
    assert shown == for_terminal(f"without adapter: {bare}\nwith adapter:    {adapted}\n")
    assert asked(capsys, tiny_vlm("qwen2_5_vl"), image, QUESTION) != f"{bare}\n"

    assert main(["merge", str(tiny_vlm("qwen2_5_vl")), str(tmp_path), str(tmp_path / "merged")]) == 0
    assert "max_pixels 784, as in the training" in capsys.readouterr().out
    assert asked(capsys, tmp_path / "merged", image, f"Say {QUESTION}", "--max-new-tokens", 6) == f"{adapted}\n"


def test_vl_bart_has_the_tower_of_its_run(vl_bart, vision, loaded_images, tmp_path, capsys):
    image = loaded_images / "wide.png"
    rows = [Example("row", (str(image),), QUESTION)]
    model = {"family": "vl_bart", "path": str(vl_bart)}
    (bare,), (adapted,) = run_of(tmp_path, "vqa", rows, model, vision=vision)
    assert adapted != bare
    shown = asked(capsys, vl_bart, image, QUESTION, "--adapter", tmp_path)
    assert shown == for_terminal(f"without adapter: {bare}\nwith adapter:    {adapted}\n")
    assert "--adapter" in refused(capsys, vl_bart, image, QUESTION)
    assert "--dtype" in refused(capsys, vl_bart, image, QUESTION, "--adapter", tmp_path, "--dtype", "bfloat16")
    both = (image, loaded_images / "tall.png")
    assert "reads one image" in refused(capsys, vl_bart, *both, QUESTION, "--adapter", tmp_path)


def test_a_plain_bart_is_asked_as_the_vl_bart_that_its_run_made_of_it(vision, loaded_images, tmp_path, capsys):
    torch.manual_seed(0)
    small_bart().save_pretrained(tmp_path / "bart")
    small_tokenizer().save_pretrained(tmp_path / "bart")
    image = loaded_images / "wide.png"
    rows = [Example("row", (str(image),), QUESTION)]
    model = {"family": "vl_bart", "path": str(tmp_path / "bart")}
    (bare,), (adapted,) = run_of(tmp_path, "vqa", rows, model, vision=vision)
    shown = asked(capsys, tmp_path / "bart", image, QUESTION, "--adapter", tmp_path)
    assert shown == for_terminal(f"without adapter: {bare}\nwith adapter:    {adapted}\n")


def test_mistakes_give_one_sentence(tiny_vlm, loaded_images, tmp_path, capsys):
    base, image = tiny_vlm("llava"), loaded_images / "wide.png"
    (tmp_path / "broken.png").write_bytes(image.read_bytes()[:90])
    assert "IMAGE" in refused(capsys, base, tmp_path / "missing.png", QUESTION)
    for names in ([image], [image, image], ["nowhere/cat.JPG"], ["clip.mp4"]):
        assert f"QUESTION is missing: {names[-1]} is the name of a file" in refused(capsys, base, *names)
    (tmp_path / "a cat.png").write_bytes(image.read_bytes())
    assert "QUESTION is missing" in refused(capsys, base, tmp_path / "a cat.png")
    assert "broken.png is not a complete image" in refused(capsys, base, tmp_path / "broken.png", QUESTION)
    assert "QUESTION" in refused(capsys, base, image, " ")
    assert "MODEL" in refused(capsys, tmp_path / "missing", image, QUESTION)
    assert "not a model of transformers" in refused(capsys, loaded_images, image, QUESTION)
    assert "reads no images" in refused(capsys, llama(tmp_path / "llama"), image, QUESTION)
    assert "no adapter files" in refused(capsys, base, image, QUESTION, "--adapter", loaded_images)
    assert "--adapter" in refused(capsys, base, image, QUESTION, "--adapter", tmp_path / "missing")
    assert "--revision" in refused(capsys, base, image, QUESTION, "--revision", "main")
    with pytest.raises(SystemExit):
        main(["ask", str(base), str(image), QUESTION, "--max-new-tokens", "0"])


def test_an_adapter_of_another_model_is_refused(tiny_vlm, loaded_images, tmp_path, capsys):
    run_of(tmp_path, "chat", [], {"path": str(tiny_vlm("llava"))})
    line = refused(capsys, tiny_vlm("qwen2_5_vl"), loaded_images / "wide.png", QUESTION, "--adapter", tmp_path)
    assert "another base model" in line
    assert str(tmp_path) in line
