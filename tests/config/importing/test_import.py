"""Configs of other trainers, in the shapes of these trainers' own examples and parsers, become configs of dora_mm."""

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from dora_mm import cli
from dora_mm.config import load_config
from dora_mm.config.importing import translate
from pipelines import import_config

KOHYA = """
[model_arguments]
pretrained_model_name_or_path = "samples/tiny-sdxl"
[network_arguments]
network_module = "networks.lora"
network_dim = 8
text_encoder_lr = 5e-5
unet_lr = 1e-4
[training_arguments]
max_train_steps = 100
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99"]
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 2
lr_warmup_steps = 10
mixed_precision = "bf16"
multires_noise_iterations = 6
cache_latents = true
[dataset_arguments]
dataset_config = "data.toml"
"""
KOHYA_DATA = """
[general]
shuffle_caption = true
keep_tokens = 1
[[datasets]]
resolution = [512, 512]
batch_size = 4
  [[datasets.subsets]]
  image_dir = "mine"
  num_repeats = 10
  class_tokens = "sks dog"
  [[datasets.subsets]]
  image_dir = "dogs"
  is_reg = true
"""
AI_TOOLKIT = """
job: extension
config:
  name: mine
  process:
    - type: sd_trainer
      training_folder: output
      trigger_word: p3r5on
      network: {type: lora, linear: 16, linear_alpha: 32}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4, push_to_hub: false}
      datasets:
        - folder_path: mine
          caption_ext: txt
          caption_dropout_rate: 0.05
          cache_latents_to_disk: true
          resolution: [768]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 2
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        timestep_type: sigmoid
        optimizer: adamw8bit
        lr: 1e-4
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
        do_paramiter_swapping: true
      model: {name_or_path: Tongyi-MAI/Z-Image, arch: zimage, quantize: true, quantize_te: true, qtype_te: qint8}
      sample: {sampler: flowmatch, sample_every: 250, width: 1024, height: 1024, prompts: [a dog], seed: 42,
               walk_seed: true, guidance_scale: 4, sample_steps: 25}
meta: {name: "[name]"}
"""
ONETRAINER = {
    "training_method": "LORA",
    "base_model_name": "stabilityai/stable-diffusion-xl-base-1.0",
    "model_type": "STABLE_DIFFUSION_XL_10_BASE",
    "lora_rank": 32,
    "lora_decompose": True,
    "learning_rate": 0.0003,
    "learning_rate_scheduler": "COSINE",
    "learning_rate_warmup_steps": 0.1,
    "optimizer": {"optimizer": "ADAMW_8BIT", "weight_decay": 0.02, "beta1": 0.9, "beta2": 0.98},
    "resolution": "1024",
    "batch_size": 2,
    "epochs": 7,
    "loss_weight_fn": "MIN_SNR_GAMMA",
    "masked_training": True,
    "train_dtype": "BFLOAT_16",
    "tensorboard": True,
    "concepts": [
        {"path": "mine", "balancing": 2.0, "type": "STANDARD", "image": {}, "text": {"enable_tag_shuffling": True}},
        {"path": "held", "type": "VALIDATION", "image": {}, "text": {}},
        {"path": "off", "enabled": False},
    ],
}
LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen3-VL-4B-Instruct
image_max_pixels: 262144
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
freeze_multi_modal_projector: false
dataset: mine,texts
dataset_dir: sets
template: qwen3_vl
cutoff_len: 2048
max_samples: 1000
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
eval_steps: 500
neat_packing: true
"""
DATASET_INFO = {
    "mine": {
        "file_name": "mine.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "images": "images"},
    },
    "texts": {"hf_hub_url": "someone/texts"},
}
SWIFT = r"""
CUDA_VISIBLE_DEVICES=0 \
MAX_PIXELS=1003520 \
swift sft \
    --model Qwen/Qwen2.5-VL-7B-Instruct \
    --dataset 'mine.jsonl#500' \
    --split_dataset_ratio 0.01 \
    --tuner_type lora --use_dora true \
    --torch_dtype bfloat16 \
    --target_modules all-linear --freeze_vit true --freeze_aligner true \
    --gradient_accumulation_steps 16 --warmup_ratio 0.05 --max_length 2048 --sequence_parallel_size 2
"""
AXOLOTL = """
base_model: HuggingFaceTB/SmolVLM2-500M-Video-Instruct
datasets:
  - path: mine.jsonl
    type: chat_template
    field_messages: turns
val_set_size: 0.05
adapter: qlora
load_in_4bit: true
sequence_len: 4096
sample_packing: false
lora_r: 32
lora_alpha: 16
lora_target_linear: true
peft_use_dora: true
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
wandb_project:
"""


def imported(folder, name, text):
    (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))
    return translate(folder / name)


def without_equal(found):
    return {key for key, _, _ in found.without_equal}


def test_kohyas_toml_with_its_data_set(tmp_path):
    (tmp_path / "data.toml").write_text(KOHYA_DATA)
    found = imported(tmp_path, "a.toml", KOHYA)
    assert found.nested == {
        "pipeline": "train_diffusion",
        "model": {"dtype": "bfloat16", "path": "samples/tiny-sdxl"},
        "adapter": {
            "method": "lora",
            "rank": 8,
            "alpha": 1.0,  # their default, not ours
            "parts": {
                **{name: {} for name in ("unet.attn", "unet.cross", "unet.ff", "proj_in", "proj_out")},
                "text_encoders.attn": {"lr": 5e-5},
                "text_encoders.ff": {"lr": 5e-5},
            },
        },
        "data": {
            "resolution": 512,
            "folders": [
                {"path": "mine", "repeats": 10.0, "prompt": "sks dog"},
                {"path": "dogs", "role": "preserve"},
            ],
            "captions": {"shuffle": True, "keep": 1},
        },
        "loss": {"min_snr_gamma": None},
        "preserve": {"weight": 1.0},
        "optimizer": {"lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.1, "name": "adamw"},
        "schedule": {"warmup_steps": 10, "cycles": 2, "name": "restarts"},
        "train": {"mixed_precision": "bf16", "steps": 100, "batch_size": 4},
    }
    assert without_equal(found) == {"multires_noise_iterations"}
    assert found.not_needed == ["cache_latents"]
    assert not found.missing


KOHYA_SMALLEST = 'pretrained_model_name_or_path = "x"\ntrain_data_dir = "y"\n'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('loss_type = "huber"', "huber_schedule is snr (the default)"),
        ('loss_type = "huber"\nhuber_schedule = "exponential"', "huber_schedule is exponential (as given)"),
        ('loss_type = "huber"\nhuber_schedule = "constant"', None),
        ("use_8bit_adam = true", "adamw_8bit needs a GPU. Without one: --set optimizer.name=adamw"),
    ],
)
def test_kohyas_huber_loss_and_8_bits_differ(tmp_path, lines, message):
    found = imported(tmp_path, "a.toml", f"{KOHYA_SMALLEST}{lines}\n")
    assert [message] == [message if message and message in each else each for each in found.differences or [None]]
    assert found.values.get("loss.delta", 0.1) == 0.1
    assert not without_equal(found)


@pytest.mark.parametrize(
    ("names", "prompt", "differs"),
    [(["3_sks"], "sks", False), (["3_sks", "2_cat"], None, True), (["plain"], None, False)],
)
def test_kohyas_folders_name_the_captions_of_images_without_one(tmp_path, names, prompt, differs):
    for name in names:
        (tmp_path / "y" / name).mkdir(parents=True)
    found = imported(tmp_path, "a.toml", KOHYA_SMALLEST)
    assert found.values.get("data.instance_prompt") == prompt
    assert any("(cat, sks)" in sentence for sentence in found.differences) == differs


def test_a_job_of_ai_toolkit_without_a_network_is_full_fine_tuning(tmp_path):
    lines = [line for line in AI_TOOLKIT.splitlines() if "network:" not in line]
    found = imported(tmp_path, "a.yaml", "\n".join(lines))
    assert found.nested["adapter"] == {"method": "full"}
    assert any("no section network" in sentence and "adapter.method=lora" in sentence for sentence in found.differences)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_kohyas_prodigy_keeps_the_text_encoders(tmp_path, rate):
    toml = 'pretrained_model_name_or_path = "x"\ntrain_data_dir = "y"\noptimizer_type = "Prodigy"\nunet_lr = 1.0\n'
    found = imported(tmp_path, "a.toml", f"{toml}text_encoder_lr = {rate}\n")
    parts = ["unet.attn", "unet.cross", "unet.ff", "proj_in", "proj_out", "text_encoders.attn", "text_encoders.ff"]
    assert found.nested["adapter"]["parts"] == parts
    assert any("prodigy finds one rate" in sentence for sentence in found.differences)


def test_kohyas_prompts_keep_their_flags(tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "a cat --n blurry --w 128 --s 4 --d 1\n# a comment\na car --n blurry --w 64 --s 4 --d 2\n"
    )
    toml = 'pretrained_model_name_or_path = "x"\ntrain_data_dir = "y"\nlearning_rate = 1e-4\n'
    toml += 'sample_prompts = "prompts.txt"\nclip_skip = 2\nsample_every_n_epochs = 1\n'
    found = imported(tmp_path, "a.toml", toml)
    assert found.nested["sample"] == {
        "prompts": ["a cat", "a car"],
        "negative_prompt": "blurry",
        "steps": 4,
        "guidance": 7.5,
    }
    assert any("ignore width, seed of each line" in sentence for sentence in found.differences)
    reasons = {key: reason for key, _, reason in found.without_equal}
    assert "second to last layer" in reasons["clip_skip"]
    assert found.every_epochs == {"sample.every": ("sample_every_n_epochs", 1)}


@pytest.mark.parametrize(("theirs", "ours"), [("cosine_with_restarts", "cycles"), ("polynomial", "power")])
def test_kohyas_schedules_have_one_cycle_and_power_one_by_default(tmp_path, theirs, ours):
    toml = f'pretrained_model_name_or_path = "x"\ntrain_data_dir = "y"\nlr_scheduler = "{theirs}"\n'
    assert imported(tmp_path, "a.toml", toml).nested["schedule"][ours] == 1


def test_kohyas_command_line_is_its_toml(tmp_path):
    flags = (
        "accelerate launch --num_cpu_threads_per_process 1 sdxl_train_network.py ^\n --network_dim=8 --network_alpha 4 "
        "--pretrained_model_name_or_path 'a b.safetensors' --resolution=1024,768 --network_train_unet_only ^\n"
        ' --train_data_dir "my images" --learning_rate 1e-4 --network_args "algo=lora" "dora_wd=True" --xformers'
    )
    found = imported(tmp_path, "train.bat", flags)
    assert found.values["adapter.method"] == "dora"
    assert found.values["adapter.parts"] == ["unet.attn", "unet.cross", "unet.ff", "proj_in", "proj_out"]
    assert (found.values["adapter.rank"], found.values["adapter.alpha"]) == (8, 4.0)
    assert found.values["model.path"] == "a b.safetensors"
    assert (found.values["data.folder"], found.values["data.subfolders"]) == ("my images", True)
    assert found.values["data.resolution"] == 896  # the side of the square of this area
    assert any("1024 x 768" in line for line in found.differences)
    assert found.values["train.steps"] == 1600  # their default
    assert not found.without_equal


def test_ai_toolkits_job(tmp_path):
    found = imported(tmp_path, "a.yaml", AI_TOOLKIT)
    nested = found.nested
    assert nested["model"] == {
        "dtype": "bfloat16",
        "path": "Tongyi-MAI/Z-Image",
        "quantization": "float8",
        "text_quantization": "int8",
    }
    assert nested["adapter"] == {"method": "lora", "rank": 16, "alpha": 32.0}
    assert nested["data"] == {
        "resolution": 768,
        "folder": "mine",
        "caption_dropout": 0.05,
        "captions": {"prefix": "p3r5on, "},
    }
    assert nested["loss"] == {"timesteps": "logit_normal"}
    assert nested["optimizer"] == {"lr": 1e-4, "name": "adamw_8bit"}
    assert nested["ema"] == {"decay": 0.99}
    assert nested["sample"] == {"prompts": ["a dog"], "every": 250, "steps": 25, "guidance": 4.0, "seeds": [42]}
    assert nested["train"]["keep_checkpoints"] == 4
    assert {"save.dtype", "sample.walk_seed", "train.noise_scheduler", "model.arch"} <= set(found.not_needed)
    assert without_equal(found) == {"train.do_paramiter_swapping"}
    assert not found.missing


def test_onetrainers_config_with_its_concepts(tmp_path):
    found = imported(tmp_path, "a.json", ONETRAINER)
    nested = found.nested
    assert nested["adapter"] == {"method": "dora", "rank": 32, "alpha": 1.0}
    assert nested["data"] == {
        "resolution": 1024,
        "mask": {"source": "file", "floor": 0.1},
        "folders": [{"path": "mine", "repeats": 2.0}, {"path": "held", "role": "validate"}],
        "captions": {"shuffle": True},
    }
    assert nested["optimizer"] == {"lr": 3e-4, "name": "adamw_8bit", "betas": [0.9, 0.98], "weight_decay": 0.02}
    assert nested["schedule"] == {"name": "cosine", "warmup_ratio": 0.1}
    assert nested["loss"] == {"timesteps": "uniform", "min_snr_gamma": 5.0}


def test_llama_factorys_yaml_with_its_data_sets(tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    found = imported(tmp_path, "a.yaml", LLAMA_FACTORY)
    nested, folder = found.nested, str(tmp_path / "sets")
    assert nested["adapter"] == {
        "method": "lora",
        "rank": 8,
        "alpha": 16.0,  # twice the rank is their default
        "parts": ["text.attn", "text.mlp", "connector"],
    }
    assert nested["data"]["train"] == {
        "format": "chat",
        "file": f"{folder}/mine.json",
        "images": folder,
        "columns": {"messages": "turns"},
        "limit": 1000,
    }
    assert nested["data"]["more"] == [{"format": "chat", "file": "data/texts", "limit": 1000}]
    assert nested["data"]["valid"] == {"share": 0.1}
    assert any("hf download --repo-type dataset someone/texts" in line for line in found.differences)
    assert (nested["train"]["epochs"], nested["evaluate"]["every"]) == (3, 500)
    assert nested["train"]["mixed_precision"] == "bf16"
    assert without_equal(found) == {"neat_packing"}
    assert not found.missing


def test_swifts_command_line(tmp_path):
    found = imported(tmp_path, "train.sh", SWIFT)
    nested = found.nested
    assert nested["adapter"] == {
        "method": "dora",
        "rank": 8,
        "alpha": 32.0,
        "dropout": 0.05,
        "parts": ["text.attn", "text.mlp"],
    }
    assert nested["data"] == {
        "train": {"format": "chat", "file": "mine.jsonl", "limit": 500},
        "valid": {"share": 0.01},
    }
    assert (nested["model"]["max_pixels"], nested["model"]["max_length"]) == (1003520, 2048)
    assert nested["train"]["gradient_accumulation_steps"] == 16
    assert without_equal(found) == {"sequence_parallel_size"}


def test_axolotls_yaml(tmp_path):
    found = imported(tmp_path, "a.yml", AXOLOTL)
    nested = found.nested
    assert nested["model"]["quantization"] == "nf4"
    assert nested["adapter"] == {"method": "dora", "rank": 32, "alpha": 16.0, "parts": "all-linear"}
    assert nested["data"]["train"] == {"format": "chat", "file": "mine.jsonl", "columns": {"messages": "turns"}}
    assert nested["optimizer"] == {"lr": 2e-4, "name": "adamw_8bit", "weight_decay": 0.0}  # their default
    assert (nested["train"]["batch_size"], nested["train"]["epochs"]) == (2, 1)
    assert not found.without_equal
    assert not found.missing


def test_a_value_that_our_schema_refuses_is_left_out_with_the_reason(tmp_path):
    found = imported(tmp_path, "a.yaml", LLAMA_FACTORY + "optim: adamw_torch\nloraplus_lr_ratio: -4\n")
    assert "optimizer.b_lr_ratio" not in found.values
    ((_, value, reason),) = [each for each in found.without_equal if each[0] == "loraplus_lr_ratio"]
    assert value == -4
    assert "greater than 0" in reason


def test_the_command_writes_a_config_that_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.toml").write_text(KOHYA_DATA)
    (tmp_path / "my lora.toml").write_text(KOHYA)
    assert cli.main(["import", "my lora.toml"]) == 0
    printed = capsys.readouterr().out
    assert "multires_noise_iterations: 6" in printed
    *_, command = printed.strip().splitlines()
    words = shlex.split(command)
    assert words == ["dora-mm", "train", "my-lora.yaml", "--dry-run"]
    text = (tmp_path / words[2]).read_text()
    assert "  rank: 8 # network_dim\n" in text
    assert load_config(tmp_path / words[2]).adapter.alpha == 1.0
    (tmp_path / "my-lora.yaml").write_text("# mine")
    assert cli.main(["import", "my lora.toml"]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "title"),
    [
        ("a.toml", 'pretrained_model_name_or_path = "x"', "kohya's scripts"),
        ("a.yaml", AI_TOOLKIT, "ai-toolkit"),
        ("a.json", json.dumps(ONETRAINER), "OneTrainer"),
        ("a.yaml", LLAMA_FACTORY, "LLaMA-Factory"),
        ("a.yaml", AXOLOTL, "axolotl"),
        ("a.sh", SWIFT, "ms-swift"),
    ],
)
def test_another_trainers_config_in_the_place_of_ours_is_recognized(name, text, title, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert cli.main(["train", str(tmp_path / name)]) == 2
    message = f"is a config of {title}: dora-mm import {tmp_path / name} writes one of ours from it\n"
    assert capsys.readouterr().err.endswith(message)


def test_a_device_is_chosen_in_front_of_the_command(tmp_path, capsys):
    assert cli.main(["train", "configs/sdxl/demo.yaml", "--set", "device=cuda:1"]) == 2
    assert "unknown key: CUDA_VISIBLE_DEVICES=1 in front of the command chooses the GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "pipeline: train_vl", "is a config of dora_mm already"),
        ("a.yaml", "a: 1\nb: 2", "has the keys a, b: of no trainer"),
        ("a.toml", "a = [", "cannot be read"),
        ("a.json", "[1]", "has no keys"),
        ("a.txt", "python my_own.py --lr 1", "is no config that dora-mm import knows"),
        ("a.sh", "swift sft --model 'x", "cannot be read as a command line: No closing quotation"),
        ("a.yaml", AI_TOOLKIT.replace("type: lora", "type: lokr"), "network.type: lokr has no equal here"),
        ("a.json", json.dumps(ONETRAINER | {"peft_type": "LOHA"}), "peft_type: LOHA has no equal here"),
        ("a.json", json.dumps(ONETRAINER | {"training_method": "EMBEDDING"}), "training_method: EMBEDDING has no"),
        (
            "a.toml",
            'network_dim = 4\nnetwork_module = "networks.oft"',
            "network_module: networks.oft lora has no equal",
        ),
        ("a.sh", "swift rlhf --rlhf_type grpo --model x", "rlhf_type: grpo has no equal here"),
        ("a.yaml", AXOLOTL + "rl: kto\n", "rl: kto has no equal here"),
        ("b.toml", 'pretrained_model_name_or_path = "x"\ndataset_config = "none.toml"', "none.toml does not exist"),
    ],
)
def test_what_cannot_be_imported_is_said_in_a_sentence(name, text, message, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert cli.main(["import", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_what_kohya_does_every_epoch_is_in_steps_of_the_images_that_are_there(tmp_path, monkeypatch):
    """3 x 10 images in batches of 4; where no image is there, the formula."""
    (tmp_path / "img" / "10_cat").mkdir(parents=True)
    for name in "abc":
        Image.new("RGB", (64, 64)).save(tmp_path / "img" / "10_cat" / f"{name}.png")
    toml = 'pretrained_model_name_or_path = "x"\ntrain_data_dir = "img"\nresolution = 64\ntrain_batch_size = 4\n'
    toml += "caption_dropout_rate = 0.1\nsave_every_n_epochs = 2\nsample_every_n_epochs = 1\n"
    (tmp_path / "prompts.txt").write_text("a cat\n")
    toml += 'sample_prompts = "prompts.txt"\n'
    (tmp_path / "a.toml").write_text(toml)
    (tmp_path / "b.toml").write_text(toml.replace("img", "gone"))
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        import_config.main(Path(f"{name}.toml"))
    found = load_config("a.yaml")
    assert (found.train.checkpoint_every, found.sample.every) == (16, 8)
    assert found.data.caption_dropout == 0.1
    text = Path("b.yaml").read_text()
    assert "checkpoint_every:" not in text
    assert "train.checkpoint_every counts steps: give 2 x images x repeats / batch size" in text


@pytest.mark.parametrize(
    ("arguments", "conv", "ratio"),
    [
        ('"conv_dim=4"', {"rank": 4, "alpha": 1.0}, None),  # the default alpha of networks.lora
        ('"conv_dim=8", "conv_alpha=2", "rank_dropout=0"', {}, None),
        ('"loraplus_lr_ratio=16"', None, 16),
        ('"loraplus_lr_ratio=16", "loraplus_unet_lr_ratio=4"', None, 4),
    ],
)
def test_kohyas_network_args_are_the_convolutions_rank_and_bs_rate(tmp_path, arguments, conv, ratio):
    lines = f"resolution = 512\nnetwork_dim = 8\nnetwork_alpha = 2\nnetwork_args = [{arguments}]\n"
    found = imported(tmp_path, "a.toml", KOHYA_SMALLEST + lines)
    parts = found.values["adapter.parts"]
    assert (dict.fromkeys(parts, {}) | (parts if isinstance(parts, dict) else {})).get("unet.conv") == conv
    assert found.values.get("optimizer.b_lr_ratio") == ratio
    assert not found.without_equal
    assert not found.missing


def test_the_convolutions_of_lycoris_are_those_of_its_preset(tmp_path):
    lines = 'network_module = "lycoris.kohya"\nnetwork_train_unet_only = true\n'
    found = imported(tmp_path, "a.toml", KOHYA_SMALLEST + lines)
    assert "unet.conv" in found.values["adapter.parts"]
    found = imported(tmp_path, "a.toml", f'{KOHYA_SMALLEST}{lines}network_args = ["preset=attn-only"]\n')
    assert found.values["adapter.parts"] == ["unet.attn", "unet.cross"]
    assert not found.without_equal


def test_kohyas_regularization_folders_are_preserved(tmp_path, monkeypatch):
    """A weight of the prior without them was written as preserve.weight, and the config was refused."""
    toml = KOHYA_SMALLEST + "resolution = 512\nprior_loss_weight = 0.5\n"
    assert not imported(tmp_path, "a.toml", toml).missing
    assert "preserve.weight" not in imported(tmp_path, "a.toml", toml).values
    for name in ("y/10_sks dog", "y/1_sks cat", "reg/1_dog"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name / "a.png")
    found = imported(tmp_path, "a.toml", toml + 'reg_data_dir = "reg"\n')
    assert found.values["data.folders"] == [
        {"path": str(tmp_path / "y/10_sks dog"), "repeats": 10.0, "prompt": "sks dog"},
        {"path": str(tmp_path / "y/1_sks cat"), "prompt": "sks cat"},
        {"path": str(tmp_path / "reg/1_dog"), "prompt": "dog", "role": "preserve"},
    ]
    assert found.values["preserve.weight"] == 0.5
    assert not found.missing
    assert not found.without_equal
    (without,) = imported(tmp_path, "a.toml", toml + 'reg_data_dir = "none"\n').without_equal
    assert "role: preserve" in without[2]


@pytest.mark.parametrize(
    ("extension", "files", "differs", "unknown"),
    [
        (".txt", ["a.txt"], False, set()),
        (".caption", ["a.caption"], False, set()),
        (".caption", ["a.caption", "a.txt"], True, set()),
        (".tags", ["a.tags"], False, {"caption_extension"}),
    ],
)
@pytest.mark.parametrize("has_subsets", [False, True])
def test_kohyas_captions_are_those_that_are_read_here(tmp_path, extension, files, differs, unknown, has_subsets):
    (tmp_path / "y").mkdir()
    for name in files:
        (tmp_path / "y" / name).write_text("a cat")
    toml = KOHYA_SMALLEST + f'caption_extension = "{extension}"\n'
    if has_subsets:
        subset = f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "y"\ncaption_extension = "{extension}"\n'
        (tmp_path / "data.toml").write_text(subset)
        toml = 'pretrained_model_name_or_path = "x"\ndataset_config = "data.toml"\n'
    found = imported(tmp_path, "a.toml", toml)
    assert any("beside" in sentence for sentence in found.differences) == differs
    assert without_equal(found) == unknown


def test_comments_name_the_keys_of_kohyas_data_set(tmp_path):
    """They were called the defaults of kohya's scripts."""
    (tmp_path / "data.toml").write_text(KOHYA_DATA)
    text = imported(tmp_path, "a.toml", KOHYA).text(Path("a.toml"), Path("b.yaml"))
    assert "  resolution: 512 # resolution\n" in text
    assert "  batch_size: 4 # batch_size\n" in text
    assert "default of" not in text.split("batch_size")[1]


KOHYA_GUI = {  # keys and spelling of the presets in its repository
    "LoRA_type": "Standard",
    "LyCORIS_preset": "full",
    "additional_parameters": "--lr_scheduler_num_cycles 3 --vae_batch_size=2",
    "cache_latents": True,
    "clip_skip": "1",
    "conv_alpha": 1,
    "conv_dim": 1,
    "dora_wd": False,
    "epoch": 8,
    "flux1_checkbox": False,
    "gradient_accumulation_steps": 1.0,
    "keep_tokens": "1",
    "learning_rate": 0.0004,
    "lr_scheduler": "cosine_with_restarts",
    "lr_warmup": 5,
    "max_resolution": "1024,1024",
    "max_train_steps": "",
    "mixed_precision": "bf16",
    "multires_noise_discount": 0.2,
    "network_alpha": 16,
    "network_dim": 32,
    "noise_offset": 0.05,
    "noise_offset_type": "Original",
    "num_processes": 1,
    "optimizer": "AdamW",
    "optimizer_args": "",
    "output_name": "mine",
    "pretrained_model_name_or_path": "x.safetensors",
    "sample_prompts": "a dog --s 20\na cat --s 20",
    "save_precision": "fp16",
    "sdxl": True,
    "text_encoder_lr": 0.0,
    "train_batch_size": 2,
    "train_data_dir": "y",
    "unet_lr": 0.0004,
}


def test_what_kohyas_gui_has_saved(tmp_path):
    found = imported(tmp_path, "a.json", KOHYA_GUI)
    assert found.nested == {
        "pipeline": "train_diffusion",
        "name": "mine",
        "model": {"dtype": "bfloat16", "path": "x.safetensors"},
        "adapter": {
            "method": "lora",
            "rank": 32,
            "alpha": 16.0,
            "parts": ["unet.attn", "unet.cross", "unet.ff", "proj_in", "proj_out"],
        },
        "data": {"folder": "y", "subfolders": True, "resolution": 1024},
        "loss": {"min_snr_gamma": None, "noise_offset": 0.05},
        "optimizer": {"lr": 0.0004, "name": "adamw"},
        "schedule": {"warmup_ratio": 0.05, "cycles": 3, "name": "restarts"},
        "train": {"mixed_precision": "bf16", "epochs": 8, "batch_size": 2, "gradient_accumulation_steps": 1},
        "sample": {"prompts": ["a dog", "a cat"], "steps": 20, "guidance": 7.5},
    }
    assert without_equal(found) == {"keep_tokens"}  # has no effect without shuffle_caption
    assert not found.missing
    text = found.text(Path("a.json"), Path("b.yaml"))
    for comment in ("warmup_ratio: 0.05 # lr_warmup", "resolution: 1024 # max_resolution", "lora # LoRA_type"):
        assert comment in text


def test_lycoris_in_kohyas_gui_is_dora_with_convolutions(tmp_path):
    changed = {"LoRA_type": "LyCORIS/LoCon", "dora_wd": True, "conv_dim": 8, "conv_alpha": 4}
    found = imported(tmp_path, "a.json", KOHYA_GUI | changed)
    assert found.values["adapter.method"] == "dora"
    assert found.values["adapter.parts"]["unet.conv"] == {"rank": 8, "alpha": 4.0}
    found = imported(tmp_path, "a.json", KOHYA_GUI | {"sdxl": False})
    assert any("Stable Diffusion 1 and 2" in sentence for sentence in found.differences)
    with pytest.raises(ValueError, match="LoRA_type: .*loha has no equal here"):
        imported(tmp_path, "a.json", KOHYA_GUI | {"LoRA_type": "LyCORIS/LoHa"})
    without = {key: value for key, value in KOHYA_GUI.items() if key not in ("LoRA_type", "network_dim")}
    with pytest.raises(ValueError, match="LoRA tab"):
        imported(tmp_path, "a.json", without)
