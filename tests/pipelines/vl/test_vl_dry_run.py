"""What a dry run prints, and what a training says of its rows, on tiny models through the command line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dora_mm.cli import main
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.tables import open_table
from dora_mm.models.vl.vl_model import likeliest_answer
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.recipes import PIPELINES
from tests.shared.data.vl_files import write_json
from tests.shared.data.vlm_rows import write_conversations, write_images, write_questions
from tests.shared.vl import tiny_vlm as tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def config(tmp_path, images, tiny_vlm):
    """Writes a config for a tiny model; keyword arguments replace sections."""

    def write(name: str, **changes) -> str:
        chat = name in tiny.CHAT
        data = write_conversations(tmp_path, images) if chat else write_questions(tmp_path, images)
        values = {
            "pipeline": "train_vl",
            "model": {"path": str(tiny_vlm(name))},
            "adapter": {"rank": 2},
            "data": {**data, "tables": str(tmp_path / "tables")},
            "optimizer": {"lr": 0.01},
            "train": {"steps": 3, "batch_size": 2, "gradient_accumulation_steps": 2, "log_every": 1},
            "evaluate": {"max_new_tokens": 3},
            "output": str(tmp_path / "run"),
        }
        data = {**values["data"], **changes.pop("data", {})}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**values, "data": data, **changes}))
        return str(path)

    return write


def printed(capsys, path: str, code: int = 0) -> str:
    assert main(["train", path, "--dry-run"]) == code
    return capsys.readouterr().out


def row_of(text: str, start: str) -> list[str]:
    """The cells of the line that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(start))
    return re.split(r"\s{2,}", line)[1:]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "paligemma", "florence2"])
def test_a_dry_run_shows_parts_data_lengths_rows_memory_and_time(name, config, tiny_vlm, tmp_path, images, capsys):
    text = printed(capsys, config(name))
    assert re.match(r"trainable [\d,]+ of [\d,]+ parameters \([\d.]+ %\)\npart +modules +method", text)
    assert row_of(text, "text.attn")[1] == "dora"
    assert row_of(text, "vision.mlp")[1] == "frozen"
    assert "\nparts derived from the model's structure; left out: " in text

    task = "chat" if name in tiny.CHAT else "vqa"
    source = yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["train"]
    table = open_table(SourceConfig(**source), tmp_path / "tables", on_bad_data="stop")
    assert row_of(text, "rows  ") == ["4", "2"]
    model = VLM(VLMModelConfig(path=str(tiny_vlm(name))))
    rows = [model.rows.row(task, row, str(images), likeliest_answer(row)) for row in table]
    lengths = sorted(row.length for row in rows)
    cells = row_of(text, "whole rows")
    assert (cells[0], cells[-1]) == (str(lengths[0]), str(lengths[-1]))
    share = 100 * sum(row.num_image_tokens for row in rows) / sum(lengths)
    assert f"image tokens ({share:.1f} % of all)" in text

    assert text.count("\nrow ") == 3
    assert f"row {table[0].id} of {task}; {table[0].images[0]} (" in text
    first = model.row_view(task, table[0], str(images)).text()
    assert f"pixels)\n{first}\n" in text
    assert "\x1b" not in text
    assert re.search(r"\nvision_tower|\nvisual|\nvision_model", text)
    assert re.search(r"activations \(an estimate: what a step keeps for its backward pass\)  cpu +[\d.]+\n", text)
    assert "\nlength    3 steps, 3 epochs of 1 step; up to 2 batches per step\n" in text
    assert re.search(r"time      [\d.]+ s a step \(measured\), \d+ s for 3 steps, validation not included", text)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("others", [{}, {"extra_trainable": ["re:.*experts.*"]}, {"parts": ["text.experts"]}])
def test_experts_that_stay_as_they_are_are_named(others, config, capsys):
    text = printed(capsys, config("qwen3_vl_moe", adapter={"rank": 2, **others}))
    experts = "experts that stay as they are: model.language_model.layers.N.mlp.experts (2); 12,288 parameters, "
    assert (experts in text) == (not others)
    if "parts" in others:  # A (4, 2, I), B (4, O, 2) and m (4, O) of gate_up (4, 32, 32) and down (4, 32, 16), twice
        trained = 2 * 4 * (2 * (32 + 32) + 32 + 2 * (32 + 16) + 32)
        assert row_of(text, "text.experts")[0] == "gate_up, down"
        assert row_of(text, "text.experts")[-2:] == ["4", f"{trained:,}"]


def test_neither_model_nor_data_need_be_there(capsys):
    assert main(["train", "configs/vlm/llava_1_5_7b.yaml", "--dry-run"]) == 2
    text, error = capsys.readouterr()
    assert "llava-hf/llava-1.5-7b-hf is not on this machine" in text
    assert re.search(r"chat train file +data/train.json +missing: a file or folder of your own", text)
    assert "to start" not in text
    assert "problems stop this training:" in error
    assert "data.train.file: data/train.json does not exist" in error
    assert "model.path: llava-hf/llava-1.5-7b-hf is not on this machine, and the hub" in error


def test_without_data_the_parts_and_their_memory_are_shown(config, tmp_path, capsys):
    missing = {"format": "chat", "file": str(tmp_path / "none.json"), "images": str(tmp_path)}
    text = printed(capsys, config("llava", data={"train": missing, "valid": None}), code=2)
    assert re.search(r"chat train file +.+none.json +missing", text)
    assert row_of(text, "text.attn")[1] == "dora"
    assert "together, without activations" in text
    assert "time      not measured: the training data of chat are not on this machine" in text
    assert "lengths of" not in text


def test_without_weights_rows_are_shown_and_memory_is_estimated(config, tmp_path, tiny_vlm, capsys):
    folder = tmp_path / "no-weights"
    folder.mkdir()
    for file in tiny_vlm("llava").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    text = printed(capsys, config("llava", model={"path": str(folder)}))
    assert "ASSISTANT:⟦ noise</s>⟧" in text
    assert re.search(r"activations \(an estimate, for 2 rows of \d+ tokens\)", text)
    assert f"time      not measured: the weights of {folder} are not on this machine" in text


@pytest.fixture
def bad_rows(config, tmp_path, tiny_vlm):
    """A config whose training file has four good rows, one of them too long, two bad ones, and one of many images."""

    def write(on_bad_data: str) -> str:
        model = {"path": str(tiny_vlm("qwen2_5_vl")), "max_length": 50}
        path = config(
            "qwen2_5_vl", model=model, data={"absolute_paths": True, "on_bad_data": on_bad_data, "valid": None}
        )
        file = Path(yaml.safe_load(Path(path).read_text())["data"]["train"]["file"])
        (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        rows = json.loads(file.read_text())
        for number, images, places in (
            ("4", ["wide.png"] * 2, 1),
            ("5", [str(tmp_path / "broken.png")], 1),
            ("6", ["square.png"] * 13, 13),
        ):
            said = [{"from": "human", "value": "<image>" * places + "What?"}, {"from": "gpt", "value": "x"}]
            rows.append({"id": number, "image": images, "conversations": said})
        write_json(file, rows)
        return path

    return write


def test_a_dry_run_names_all_bad_rows_at_once(bad_rows, capsys):
    assert main(["train", bad_rows("stop"), "--dry-run"]) == 2
    text, error = capsys.readouterr()
    assert row_of(text, "bad rows  ") == ["2"]
    section = text[text.index("bad rows of chat train") : text.index("lengths of")]
    assert "1 x has 2 images, but 1 <image> marker\n" in section
    assert "broken.png is not a complete image" in section
    assert re.search(r"chat\.json, item 5 \(id '4'\)", section)
    assert (
        "2 of 6 rows are longer than 50 tokens (model.max_length) and are cut: 1 loses 1 whole exchange with the "
        "images, 1 loses the whole answer and is left out\n1 of 6 rows cannot be" in text
    )
    assert "a training would stop there, at the first of 2 bad rows (data.on_bad_data: skip leaves them out)" in error
    assert main(["train", bad_rows("skip"), "--dry-run"]) == 0


def test_rows_are_checked_without_a_model(bad_rows, tmp_path, monkeypatch, capsys):
    """A dry run where the model is not, and a training before it loads one."""
    recipe, path = PIPELINES.load("train_vl"), bad_rows("stop")
    assert main(["train", path, "--dry-run", "--set", "model.path=owner/nothing"]) == 2
    text, error = capsys.readouterr()
    assert row_of(text, "bad rows  ") == ["1"]
    assert re.search(r"chat\.json, item 5 \(id '4'\): has 2 images, but 1 <image> marker; a training would stop", error)
    assert "model.path: owner/nothing is not on this machine" in error
    monkeypatch.delattr(recipe, "load_vl_model")
    assert main(["train", path]) == 2
    assert "item 5 (id '4'): has 2 images" in capsys.readouterr().err
    with pytest.raises(NameError, match="load_vl_model"):  # nothing is wrong then
        main(["train", bad_rows("skip")])


def test_a_dry_run_reports_all_that_is_wrong(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    for module in ("dora_mm.models.quantization", "dora_mm.train.trackers"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    path = config("llava", train={"steps": 3, "batch_size": 2, "shard": True, "track": ["wandb"]})
    settings = ["adapter.cache=norms", "model.quantization=nf4"]
    settings += ["model.dtype=bfloat16", "train.mixed_precision=bf16"]
    assert main(["train", path, "--dry-run", "--set", *settings]) == 2
    text, error = capsys.readouterr()
    assert "4 problems stop this training:" in error
    for reason in ("output ", "train.track: wandb", "train.shard divides", "model.quantization nf4 needs"):
        assert f"\n  {reason}" in error
    assert row_of(text, "rows  ") == ["4", "2"]
    assert "sharded over" in text
    assert "to start" not in text


def test_a_training_stops_at_them_or_leaves_them_out_and_counts(bad_rows, tmp_path, capsys, caplog):
    assert main(["train", bad_rows("stop")]) == 2
    assert "item 5 (id '4'): has 2 images, but 1 <image> marker" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    path = bad_rows("skip")
    assert main(["train", path]) == 0
    assert "chat: 6 rows (1 skipped); tokens: 50 %" in caplog.text
    assert "are longer than 50 tokens (model.max_length) and are cut: 1 loses 1 whole exchange" in caplog.text
    assert "is left out; 1 of 6 rows cannot be enc" in caplog.text
    assert rows_counted(tmp_path) == (2, 4)  # 12 rows in 3 steps of 2 batches of 2: each of the 6 rows twice
    assert "2 rows of the training's batches were too long, and lost text" in caplog.text
    assert (
        "4 rows of the training's batches could not be encoded or lost their whole answers, and were left out"
        in caplog.text
    )
    for name in ("5", "6"):
        assert len([text for text in caplog.messages if text.startswith(f"row {name} of chat: ")]) == 1


def rows_counted(folder: Path) -> tuple[int, int]:
    """How many rows of a run's batches were cut, and left out."""
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return summary["rows_cut"], summary["rows_left_out"]


def test_a_resumed_run_leaves_the_same_rows_out_and_counts_on(bad_rows, tmp_path):
    """Batches of one row, some of which are empty."""
    path = bad_rows("skip")
    steps = ["train.batch_size=1", "train.gradient_accumulation_steps=1", "schedule.name=constant"]
    assert main(["train", path, "--set", "train.steps=7", *steps]) == 0
    whole, rows = load_file(tmp_path / "run/adapter/adapter_model.safetensors"), rows_counted(tmp_path)
    shutil.rmtree(tmp_path / "run")
    assert main(["train", path, "--set", "train.steps=3", *steps]) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--set", "train.steps=7"]) == 0
    resumed = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert rows_counted(tmp_path) == rows
    assert rows[1] >= 2
    assert all(torch.equal(resumed[key], weight) for key, weight in whole.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ["text.atn"]}, "there is no part 'text.atn', did you mean 'text.attn'?"),
        ({"parts": ["text.qv"]}, "adapter.parts: this model has no part text.qv; it has text.attn, text.mlp"),
        ({"parts": ["cross"]}, "this model has no part cross"),
        ({"parts": {"k_prj": {"rank": 4}}}, "pattern 'k_prj' of adapter.parts matches no module; nearest: k_proj"),
        ({"extra_trainable": ["no_such"]}, "adapter.extra_trainable: 'no_such' matches no parameter"),
    ],
)
def test_mistakes_in_parts_are_told_in_a_sentence(change, message, config, capsys):
    assert main(["train", config("llava", adapter={"rank": 2, **change}), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_all_linear_and_patterns_are_shown_and_what_peft_cannot_hold(config, capsys):
    """Runs with parts of several methods wrote the native form alone, and nothing said so."""
    parts = {"all-linear": {}, "re:.*language_model.*v_proj": {"rank": 4}, "vision.mlp": {"method": "frozen"}}
    held = (
        "will be written in the native form alone, which PEFT cannot read: a file holds one method per model, but model"
    )
    output = printed(capsys, config("qwen2_5_vl", adapter={"rank": 2, "parts": parts}))
    rows = {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line) for line in output.splitlines())}
    assert rows["text.attn"][:3] == ["q_proj, k_proj, o_proj", "dora", "2"]
    assert rows["re:.*language_model.*v_proj"][:3] == ["v_proj", "dora", "4"]
    assert rows["connector"][1] == "dora"
    assert rows["vision.mlp"][1] == "frozen"
    assert held not in output
    parts |= {"connector": {"method": "lora"}}
    assert held in printed(capsys, config("qwen2_5_vl", adapter={"rank": 2, "parts": parts}))


def test_all_broken_images_are_named_if_all_are_decoded(config, tmp_path, images, capsys):
    """Also those of rows behind the sample that is encoded in any case, and those of the validation."""
    broken = []
    for name in ("wide.png", "tall.png"):
        (tmp_path / name).write_bytes((images / name).read_bytes()[:-40])
        broken.append(str(tmp_path / name))
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "x"}]
    names = [str(images / "square.png"), *broken]
    rows = [
        {"id": f"r{i}", "image": [name], "conversations": turns, "topic": "noise"}
        for i, name in enumerate([*names, broken[0]])
    ]
    train = {"format": "chat", "file": str(write_json(tmp_path / "train.json", rows[:2]))}
    valid = {"format": "chat", "file": str(write_json(tmp_path / "valid.json", rows))}
    path = config("llava", data={"absolute_paths": True, "train": train, "valid": valid, "on_bad_data": "skip"})
    text = printed(capsys, path)
    assert "images are broken" not in text
    assert f"columns of {tmp_path / 'train.json'} that are not read: topic ('noise')" in text
    assert main(["train", path, "--dry-run", "--decode"]) == 0
    output = capsys.readouterr().out
    assert "2 of 3 images are broken" in output
    assert re.search(r"(?m)wide.png .*; rows r1 of chat train, r1 of chat valid, r3 of chat valid$", output)
    assert re.search(r"(?m)tall.png .*; rows r2 of chat valid$", output)
    assert main(["train", path, "--dry-run", "--decode", "--set", "data.on_bad_data=stop"]) == 2
    assert main(["train", path, "--decode"]) == 2
    assert "--decode belongs to a dry run" in capsys.readouterr().err


def test_a_map_that_does_not_fit_is_told_in_a_sentence(config, tiny_vlm, tmp_path, capsys):
    """A tower whose blocks lack modules that the map counts."""
    path = config("fast_vlm", adapter={"rank": 2, "parts": ["vision.attn"]})
    assert main(["train", path, "--dry-run"]) == 2
    assert "adapter.parts: this model has no part vision.attn; it has text.attn" in capsys.readouterr().err
