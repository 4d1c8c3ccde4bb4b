"""YAML files of LLaMA-Factory, in the shape of its own examples, through the command line and beside their data."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.config.importing import translate

TRAINING = {  # examples/train_lora/qwen3vl_lora_sft.yaml
    "model_name_or_path": "my_vlm",
    "trust_remote_code": True,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset": "scenes",
    "template": "smolvlm",
    "max_samples": 1000,
    "preprocessing_num_workers": 16,
    "output_dir": "saves/mine",
    "plot_loss": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-4,
    "num_train_epochs": 3.0,
}
NUM_ROWS = 60


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model and data as LLaMA-Factory has them."""
    monkeypatch.chdir(tmp_path)
    for folder in ("my_vlm", "data", "elsewhere"):
        Path(folder).mkdir()
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A bus."}]
    Path("data/scenes.json").write_text(json.dumps([{"messages": turns, "images": ["a.png"]}] * NUM_ROWS))
    Path("data/dataset_info.json").write_text(json.dumps({"scenes": {"file_name": "scenes.json"}}))
    return tmp_path


def write(name: str, **changes) -> str:
    values = {key: value for key, value in (TRAINING | changes).items() if value is not None}
    Path(name).write_text(yaml.safe_dump(values))
    return name


def test_a_yaml_in_the_current_folder_gets_a_name_of_its_own(here, capsys):
    before = Path(write("train.yaml", val_size=0.1)).read_bytes()
    assert main(["import", "train.yaml"]) == 0
    assert Path("train.yaml").read_bytes() == before
    assert "written   train_dora_mm.yaml, train_dora_mm_eval.yaml" in capsys.readouterr().out
    config, evaluation = load_config("train_dora_mm.yaml"), load_config("train_dora_mm_eval.yaml")
    assert (evaluation.data, evaluation.model) == (config.data, config.model)
    assert evaluation.adapter == "runs/train_dora_mm/latest"
    assert main(["import", "train.yaml"]) == 2
    assert "train_dora_mm.yaml exists already: --output NEW.yaml" in capsys.readouterr().err


def test_without_validation_rows_there_is_no_evaluation(here, capsys):
    assert main(["import", write("train.yaml")]) == 0
    assert not Path("train_dora_mm_eval.yaml").exists()
    assert "_eval" not in capsys.readouterr().out


def test_the_head_is_one_comment_and_a_key_is_one_of_the_file(here):
    assert main(["import", write("train.yaml"), "--output", "mine.yaml"]) == 0
    first, _, third, *_ = (text := Path("mine.yaml").read_text()).splitlines()
    assert first == "# dora-mm train mine.yaml"
    assert third.startswith("# Imported from train.yaml (LLaMA-Factory)")
    assert "micro_batch_size" not in text
    assert "  batch_size: 1 # per_device_train_batch_size\n" in text


def test_every_key_of_the_file_is_named(here, capsys):
    """Each is behind a key of the new config, or in the report."""
    quiet = {"flash_attn": "fa2", "report_to": "none", "eval_strategy": "steps", "ddp_timeout": 9, "val_size": 0.1}
    assert main(["import", write("train.yaml", **quiet), "--output", "mine.yaml"]) == 0
    text, printed = Path("mine.yaml").read_text(), capsys.readouterr().out
    by_other_names = {"stage", "finetuning_type", "max_samples"}
    for key in (TRAINING.keys() | quiet.keys()) - by_other_names:
        assert re.search(rf"\b{key}\b", text), key
    assert "trust_remote_code: True (no code from a model's folder" in printed
    assert re.search(r"Not needed here:\n  .*preprocessing_num_workers", printed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "kto"}, "stage: kto has no equal here"),
        ({"stage": "ppo"}, "pairs of answers (dpo) are trained"),
        ({"stage": "pt"}, "stage: pt has no equal here"),
        ({"stage": "dpo", "pref_loss": "orpo"}, "pref_loss: orpo has no equal here"),
        ({"finetuning_type": "oft"}, "finetuning_type: oft has no equal here"),
        ({"dataset": "scene"}, "data/dataset_info.json has no entry 'scene', did you mean 'scenes'?"),
        ({"eval_dataset": "nosuch"}, "eval_dataset: data/dataset_info.json has no entry 'nosuch'"),
        (
            {"dataset": None, "export_dir": "out", "adapter_name_or_path": "saves/a"},
            "trains nothing: dora-mm merge my_vlm saves/a out",
        ),
        (
            {"dataset": None, "do_train": None, "adapter_name_or_path": "saves/a"},
            "dora-mm ask my_vlm IMAGE QUESTION --adapter saves/a",
        ),
    ],
)
def test_what_has_no_equal_is_refused_and_writes_nothing(here, capsys, changes, message):
    assert main(["import", write("train.yaml", **changes), "--output", "mine.yaml"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("mine.yaml").exists()


def test_local_folders_are_found_from_another_folder(here, monkeypatch):
    write("train.yaml")
    monkeypatch.chdir("elsewhere")
    assert main(["import", "../train.yaml"]) == 0
    config = load_config("train.yaml")
    assert config.model.path == "../my_vlm"
    assert (config.data.train.file, config.data.train.images) == ("../data/scenes.json", "../data")


NAMES = [
    "model.language_model.layers.0.self_attn.q_proj",
    "model.text_model.layers.0.self_attn.v_proj",
    "model.layers.0.self_attn.q_proj",  # of a model of texts
    "model.vision_tower.encoder.layers.0.self_attn.q_proj",
    "model.vision_model.encoder.layers.0.self_attn.v_proj",
    "model.visual.blocks.0.attn.q_proj",
    "model.visual.merger.q_proj",
    "model.connector.q_proj",
    "model.language_model.layers.0.mlp.up_proj",
]


@pytest.mark.parametrize(
    ("frozen", "adapted"),
    [({}, [0, 1, 2]), ({"freeze_multi_modal_projector": False}, [0, 1, 2, 6, 7])],
)
def test_named_modules_of_what_is_frozen_are_left_out(here, frozen, adapted):
    found = translate(Path(write("train.yaml", lora_target="q_proj,v_proj", **frozen)))
    (pattern,) = found.values["adapter.parts"]
    matching = re.compile(pattern.removeprefix("re:"))
    assert [number for number, name in enumerate(NAMES) if matching.fullmatch(name)] == adapted


def test_names_are_kept_where_nothing_is_frozen(here):
    free = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
    found = translate(Path(write("train.yaml", lora_target="q_proj,v_proj", **free)))
    assert found.values["adapter.parts"] == ["q_proj", "v_proj"]


def test_a_part_of_an_epoch_is_a_number_of_steps(here, capsys):
    """54 of 60 rows in batches of 1 x 2: 27 steps an epoch, as transformers' Trainer counts them."""
    assert main(["import", write("train.yaml", num_train_epochs=0.2, val_size=0.1)]) == 0
    config = load_config("train_dora_mm.yaml")
    assert (config.train.steps, config.train.epochs) == (6, None)
    assert "train.steps is 6, for about 54 of 60 rows, without the held-out ones (the" in capsys.readouterr().out


def test_a_part_of_an_epoch_of_rows_that_are_elsewhere_says_how(here, capsys):
    Path("data/scenes.json").unlink()
    assert main(["import", write("train.yaml", num_train_epochs=0.2)]) == 0
    assert load_config("train_dora_mm.yaml").train.epochs == 1
    assert "1 is written. For 0.2 give train.steps instead" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "pixels"), [("Qwen/Qwen3-VL-4B-Instruct", 768 * 768), ("my_vlm", None)])
def test_the_default_limit_of_pixels_is_taken_over_or_reported(here, model, pixels):
    found = translate(Path(write("train.yaml", model_name_or_path=model)))
    assert found.values.get("model.max_pixels") == pixels
    assert any("image_max_pixels" in sentence for sentence in found.differences) == (pixels is None)


@pytest.mark.parametrize(
    ("model", "others"), [("smolvlm", "model.image_size"), ("qwen2", "no limit"), ("qwen2_vl", "")]
)
def test_a_limit_that_the_model_does_not_take_is_left_out(here, tiny_vlm, capsys, model, others):
    name = write("train.yaml", model_name_or_path=str(tiny_vlm(model)), image_max_pixels=100352)
    assert main(["import", name]) == 0
    assert (load_config("train_dora_mm.yaml").model.max_pixels is None) == bool(others)
    assert (f"takes {others})" in capsys.readouterr().out) == bool(others)


@pytest.mark.parametrize(("given", "seed"), [({}, 42), ({"seed": 7}, 7)])
def test_the_seed_is_theirs(here, given, seed):
    assert translate(Path(write("train.yaml", **given))).values["seed"] == seed


def test_a_language_model_gets_no_limit_of_pixels(here):
    found = translate(Path(write("train.yaml", model_name_or_path="Qwen/Qwen3-4B-Instruct-2507")))
    assert "model.max_pixels" not in found.values


def test_an_adapter_to_go_on_with_is_the_start(here):
    Path("saves").mkdir()
    found = translate(Path(write("train.yaml", adapter_name_or_path="saves")))
    assert found.values["adapter.init_from"] == "saves"


def test_an_evaluation_data_set_is_the_validation_split(here):
    assert main(["import", write("train.yaml", eval_dataset="scenes")]) == 0
    assert load_config("train_dora_mm.yaml").data.valid.file == "data/scenes.json"
    assert "validates on" in Path("train_dora_mm_eval.yaml").read_text()
