import os
import re
from pathlib import Path

import easy_vqa
import pytest
import yaml

from dora_mm.cli.parser import build_parser
from dora_mm.config import ConfigError, differing_keys, dump_config, load_config, resolve_model, resolve_path
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.paths import is_adapter, packaged_configs
from dora_mm.config.pipelines import SCHEMAS
from dora_mm.train.resuming import check_changes

RESOLUTIONS = "must be a multiple of 64 from 512 to 8192, or of 32 below 512"
SMALLEST = """\
pipeline: train_diffusion
model:
  path: some/model
adapter:
  rank: 4
data:
  folder: images
  resolution: 128
optimizer:
  lr: 1e-4
train:
  steps: 10
  batch_size: 2
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [str(problem) for problem in caught.value.problems]


def test_defaults_are_filled_in(write):
    config = load_config(write(SMALLEST))
    assert isinstance(config, TrainDiffusionConfig)
    assert config.name == "run"
    assert config.optimizer.lr == 1e-4
    assert config.adapter.alpha == 4.0
    assert config.adapter.parts == {}
    assert config.loss.min_snr_gamma == "auto"


def test_alpha_may_differ_from_the_rank_and_null_means_the_rank(write):
    assert load_config(write(SMALLEST), ["adapter.alpha=16"]).adapter.alpha == 16.0
    assert load_config(write(SMALLEST), ["adapter.alpha=null", "adapter.rank=2"]).adapter.alpha == 2.0


def test_all_problems_are_in_one_report_with_their_lines(write):
    text = SMALLEST.replace("rank: 4", "rnk: 4").replace("lr: 1e-4", "lr: fast").replace("steps: 10", "steps: -1")
    text = text.replace("batch_size: 2", "batch_size: true") + "sampel:\n  every: 3\n"
    assert problems(write(text)) == [
        "line 4: adapter.rank: is missing",
        "line 5: adapter.rnk: unknown key, did you mean 'rank'?",
        "line 10: optimizer.lr: must be a number, got 'fast'",
        "line 12: train.steps: must be greater than 0, got -1",
        "line 13: train.batch_size: must be a whole number, got True",
        "line 14: sampel: unknown key, did you mean 'sample'?",
    ]


def test_the_report_names_the_file_once(write):
    path = write(SMALLEST.replace("rank: 4", "rank: 4.5"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: line 5: adapter.rank: must be a whole number, got 4.5"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.rank='8'", "adapter.rank: must be a whole number, got '8'"),
        ("adapter.rank=yes", "adapter.rank: must be a whole number, got 'yes'"),
        ("model.revision=1", "model.revision: must be text, got 1"),
        (
            "adapter.method=dorra",
            "adapter.method: must be 'dora', 'lora', 'magnitude' or 'full', got 'dorra', did you mean 'dora'?",
        ),
        ("adapter.parts=attn", "adapter.parts: must be a list of parts, or parts with settings, got 'attn'"),
        ("adapter.parts=[unet.attn, unet.attn]", "adapter.parts: names a part twice"),
        (
            "adapter.parts={text_encoders.attn: {rank: 2}, text_encoder_2.attn: {}}",
            "adapter.parts: names text_encoder_2.attn twice, since text_encoders.attn means it, too",
        ),
        ("adapter.parts={unet.attn: {rnk: 2}}", "adapter.parts.unet.attn.rnk: unknown key, did you mean 'rank'?"),
        ("adapter.dropout=1.0", "adapter.dropout: must be less than 1, got 1.0"),
        ("model=tiny", "model: must be a section of keys, got 'tiny'"),
        ("model.path=7", "model.path: must be text, got 7"),
        (
            "data.resolution=100",
            "data.resolution: must be a multiple of 64 from 512 to 8192, or of 32 below 512, got 100",
        ),
        (
            "data.resolution=1000",
            "data.resolution: must be a multiple of 64 from 512 to 8192, or of 32 below 512, got 1000",
        ),
        ("data.placeholder=two words", "data.placeholder: must be one word, got 'two words'"),
        ("data.background=whitee", "data.background: must be a colour such as white or #ffffff, got 'whitee'"),
        ("optimizer.lr=.inf", "optimizer.lr: must be a finite number, got inf"),
        ("optimizer.betas=[0.9]", "optimizer.betas[1]: is missing"),
        ("sample.seeds=[]", "sample.seeds: must have at least 1 item after validation, not 0, got []"),
        ("data.folder=''", "data.folder: must have at least 1 character, got ''"),
        ("lr=1.0", "lr: unknown key, did you mean 'optimizer.lr'?"),
        ("data.batch_size=1", "data.batch_size: unknown key, did you mean 'train.batch_size'?"),
        ("sample.seeds=[0, x]", "sample.seeds[1]: must be a whole number, got 'x'"),
        ("name=../elsewhere", "name: must match pattern '^[\\w][\\w.+-]*$', got '../elsewhere'"),
    ],
)
def test_overrides_are_checked_as_the_file_is(write, override, expected):
    assert problems(write(SMALLEST), [override]) == [f"--set {override}: {expected}"]


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", "train.steps.more=1"])
def test_malformed_overrides_are_in_the_report_too(write, override):
    (problem,) = problems(write(SMALLEST), [override])
    assert problem.startswith(f"--set {override}")


def test_file_and_override_problems_come_together(write):
    found = problems(write(SMALLEST.replace("rank: 4", "rank: four")), ["train.stps=7", "adapter.rank.x=1", "nonsense"])
    assert len(found) == 4
    assert any(problem.startswith("line 5: adapter.rank") for problem in found)


def test_overrides_take_yaml_values_reach_into_lists_and_make_sections(write):
    config = load_config(
        write(SMALLEST.replace("train:\n  steps: 10\n  batch_size: 2\n", "")),
        [
            "train.steps=3",
            "train.batch_size=1",
            "sample.prompts=[a cat, 'no']",
            "sample.prompts.0=1e-4 cats",
            "adapter.alpha=1e0",
        ],
    )
    assert config.train.steps == 3
    assert config.sample.prompts == ("1e-4 cats", "no")
    assert config.adapter.alpha == 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("1.0e-08", 1e-8), ("+3", 3), ("010", 10), ("no", "no"),
     ("on", "on"), ("true", True), ("null", None), ("~", None), ("2024-01-01", "2024-01-01"), ("1:30", "1:30"),
     ("<<", "<<")],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    from dora_mm.utils.yaml12 import read, write

    assert read(f"key: {text}").value == {"key": value}
    assert read(write({"key": value})).value == {"key": value}


def test_what_is_written_reads_the_same_in_yaml_1_1(write):
    config = load_config(write(SMALLEST), ["sample.prompts=['1e-4', 'no', '010', 'é', '3: 4']"])
    text = dump_config(config)
    assert yaml.safe_load(text)["sample"]["prompts"] == ["1e-4", "no", "010", "é", "3: 4"]
    assert yaml.safe_load(text)["train"]["mixed_precision"] == "no"


def test_a_dumped_config_loads_to_an_equal_one(write):
    config = load_config(write(SMALLEST), ["optimizer.betas=[0.9, 0.99]", "data.placeholder=TOK", "seed=7"])
    assert load_config(write(dump_config(config), "again.yaml")) == config


def test_configs_are_frozen(write):
    config = load_config(write(SMALLEST))
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3


def test_a_key_given_twice_is_an_error(write):
    found = problems(write(SMALLEST + "adapter:\n  rank: 8\n"))
    assert found == ["line 14: adapter: is given twice"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no keys"),
        ("- a\n", "has no keys"),
        ("a: [1\n", "line 2: not valid YAML"),
        ("a: &x [*x]\n", "aliases"),
        ("a: !!float abc\n", "tags"),
        ("a: !!timestamp zz\n", "tags"),
        ("a: !!omap [b: 1]\n", "tags"),
        (f"a: {'1' * 5000}\n", "too many digits"),
        ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("{[1]: 2}\n", "not valid YAML"),
        ("model: {}\n", "pipeline: is missing; it must name a recipe: train_diffusion"),
        (
            "pipeline: train_difusion\n",
            "line 1: pipeline: unknown recipe 'train_difusion', did you mean 'train_diffusion'",
        ),
        ("pipeline: 3\n", "unknown recipe 3"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused(write, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(write(text))


def test_a_binary_file_and_a_folder_are_refused(tmp_path):
    (tmp_path / "model.yaml").write_bytes(b"\x80\x02\xff")
    with pytest.raises(ValueError, match="UTF-8"):
        load_config(tmp_path / "model.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        load_config(tmp_path)


def test_a_missing_file_is_named_with_the_nearest_one(write):
    path = write(SMALLEST, "lego.yaml")
    with pytest.raises(ValueError, match=r"legos\.yaml does not exist.*did you mean 'lego\.yaml'"):
        load_config(path.with_name("legos.yaml"))


def test_a_run_is_named_after_its_file_whatever_that_is_called(write):
    assert load_config(write(SMALLEST, "my style (2).yaml")).name == "my-style-2-"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.warmup_steps=10"], "schedule.warmup_steps"),
        (["model.dtype=float16", "train.mixed_precision=bf16"], "must be fp16 for model.dtype float16, not bf16"),
        (["model.dtype=bfloat16"], "must be bf16 for model.dtype bfloat16, not no"),
        (["adapter.method=magnitude", "adapter.dropout=0.1"], "magnitude has no A and B"),
        (["adapter.method=full", "adapter.strength=0.5"], "adapter.strength must be 1"),
        (["adapter.method=full", "model.dtype=bfloat16"], "model.dtype must be float32"),
        (["adapter.method=lora", "optimizer.magnitude_lr=1e-3"], "optimizer.magnitude_lr has no effect"),
        (["adapter.method=lora", "adapter.norm_grad=exact"], "adapter.norm_grad"),
        (["data.latent_cache=x", "data.crop=random"], "data.latent_cache"),
        (["sample.every=5"], "sample.every"),
        (
            ["optimizer.name=prodigy", "optimizer.lr=1", "optimizer.magnitude_lr=1"],
            "magnitude_lr needs optimizer.name ad",
        ),
        (["optimizer.name=prodigy"], "prodigy learns nothing below 0.1: --set optimizer.lr=1"),
        (["optimizer.name=prodigy", "optimizer.lr=0.09"], "optimizer.lr 0.09 is a rate of other optimizers: prodigy"),
        (["optimizer.lr=1"], "adamw destroys the weights from 1 on: --set optimizer.lr=0.0001"),
        (["optimizer.name=schedule_free", "optimizer.lr=1"], "schedule_free destroys the weights from 1 on"),
        (["sample.guidance=1", "sample.negative_prompt=red"], "negative_prompt has no effect at guidance 1"),
        (["sample.guidance=1", "sample.guidance_rescale=0.7"], "guidance_rescale has no effect at guidance 1"),
        (["train.shard=true"], "train.shard needs adapter.cache norms"),
        (["train.shard=true", "adapter.cache=norms", "train.compile=true"], "train.shard is not for train.compile"),
    ],
)
def test_sections_that_contradict_each_other(write, overrides, message):
    (problem,) = problems(write(SMALLEST), overrides)
    assert message in problem


def test_a_rank_alone_changes_the_scaling_of_a_file_with_an_alpha(write, caplog):
    def said(text, *overrides):
        caplog.clear()
        load_config(write(text), overrides)
        return caplog.messages

    with_alpha = SMALLEST.replace("rank: 4", "rank: 4\n  alpha: 8.0")
    assert said(with_alpha, "adapter.rank=16") == [
        "adapter.rank=16 leaves adapter.alpha at 8: the update is scaled by 0.5, where the file has 2. To keep that: "
        "--set adapter.alpha=32"
    ]
    for quiet in (["adapter.rank=16", "adapter.alpha=8"], ["adapter.rank=4"], ["adapter.alpha=1"], []):
        assert said(with_alpha, *quiet) == []
    assert said(with_alpha.replace("alpha: 8.0", "alpha: 8.0\n  scaling: sqrt"), "adapter.rank=16") == []
    assert said(SMALLEST, "adapter.rank=16") == []


def test_a_warm_up_of_the_file_fits_the_steps_of_an_override(write, caplog):
    caplog.set_level("INFO")
    warm = SMALLEST.replace("steps: 10", "steps: 100") + "schedule:\n  warmup_steps: 20\n"
    assert load_config(write(warm), ["train.steps=10"]).schedule.warmup_steps == 2
    assert caplog.messages == ["schedule.warmup_steps: 2 instead of 20, for train.steps=10"]
    assert load_config(write(warm), ["train.steps=50"]).schedule.warmup_steps == 20
    assert "must be below train.steps (10)" in problems(write(warm), ["train.steps=10", "schedule.warmup_steps=20"])[0]
    assert load_config("configs/llm/llama_7b.yaml", ["train.steps=50"]).schedule.warmup_steps == 5


def test_a_warm_up_of_the_file_fits_the_epochs_of_an_override(write, caplog):
    caplog.set_level("INFO")
    warm = SMALLEST.replace("steps: 10", "epochs: 10") + "schedule:\n  warmup_steps: 20\n"
    assert load_config(write(warm), ["train.epochs=2"]).schedule.warmup_steps == 4
    assert caplog.messages == ["schedule.warmup_steps: 4 instead of 20, for train.epochs=2"]
    for kept in (["train.epochs=20"], ["train.epochs=2", "schedule.warmup_steps=20"]):
        assert load_config(write(warm), kept).schedule.warmup_steps == 20
    of_steps = warm.replace("epochs: 10", "steps: 100")
    schedule = load_config(write(of_steps), ["train.epochs=1"]).schedule
    assert (schedule.warmup_steps, schedule.warmup_ratio) == (0, 0.2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.quantization=int8", "int8: bitsandbytes' weight of 8 bits is gathered without its scales"),
        ("model.quantization=torchao_int8", "torchao_int8: torchao's weight cannot be split"),
        ("data.on_bad_data=skip", "train.shard needs data.on_bad_data stop"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_the_reason(override, message):
    divided = ["train.shard=true", "adapter.cache=norms"]
    (problem,) = problems("configs/vlm/tiny_vqa.yaml", [*divided, override])
    assert message in problem
    load_config("configs/vlm/tiny_vqa.yaml", [*divided, "model.quantization=nf4"])


SAMPLE = "pipeline: sample\nmodel: {path: some/model}\n"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("", "give prompts or prompts_file"),
        ("prompts: [a]\nstrengths: []\n", "strengths: "),
        ("prompts: [a]\nscheduler: eulr\n", "scheduler: "),
        ("prompts: [a]\nadapter: {pth: x}\n", "adapter.pth: unknown key, did you mean 'path'?"),
    ],
)
def test_sampling_needs_prompts_and_right_keys(write, keys, message):
    assert any(message in problem for problem in problems(write(SAMPLE + keys)))


EPOCHS = "configs/vl_bart/image_dora.yaml"  # a recipe with train.epochs and schedule.warmup_ratio


@pytest.mark.parametrize(
    ("recipe", "overrides", "steps", "epochs"),
    [
        (EPOCHS, ["train.steps=20"], 20, None),
        (EPOCHS, ["train.steps=20", "train.epochs=null"], 20, None),
        (EPOCHS, ["train.steps=null"], None, 20),
        ("configs/vl_bart/demo.yaml", ["train.epochs=3"], None, 3),
    ],
)
def test_an_override_replaces_the_key_of_the_file_that_excludes_it(recipe, overrides, steps, epochs):
    train = load_config(recipe, overrides).train
    assert (train.steps, train.epochs) == (steps, epochs)


def test_a_run_goes_on_with_the_length_that_replaces_its_own(tmp_path):
    saved = load_config(EPOCHS)
    (tmp_path / "config.yaml").write_text(dump_config(saved))
    longer = load_config(tmp_path / "config.yaml", ["train.steps=20", "schedule.warmup_steps=3"])
    assert (longer.train.steps, longer.train.epochs) == (20, None)
    assert (longer.schedule.warmup_steps, longer.schedule.warmup_ratio) == (3, 0.0)
    check_changes("--resume", saved, load_config(tmp_path / "config.yaml", ["train.steps=20"]))


@pytest.mark.parametrize(
    "overrides", [["train.steps=20", "train.epochs=2"], ["train={batch_size: 1, epochs: 2}", "train.steps=20"]]
)
def test_two_overrides_that_exclude_each_other_are_an_error(overrides):
    assert problems(EPOCHS, overrides) == ["give either train.steps or train.epochs"]


def test_two_keys_of_a_file_that_exclude_each_other_are_an_error(write):
    text = resolve_path(EPOCHS).read_text().replace("  epochs: 20\n", "  epochs: 20\n  steps: 9\n")
    assert problems(write(text)) == ["give either train.steps or train.epochs"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.family=vl"], "model.family: must be 'vlm' or 'vl_bart', got 'vl', did you mean 'vlm'?"),
        (["model.family=null"], "model.family: must be 'vlm' or 'vl_bart', got None"),
        (["model.random=true"], "model.random: is for family vl_bart, not vlm"),
        (["model.pth=x"], "model.pth: unknown key, did you mean 'path'?"),
        (["model.prompts={vqa: a}"], "model.prompts: that of vqa needs {text}, the place of the question"),
        (["model=tiny"], "model: must be a section of keys, got 'tiny'"),
    ],
)
def test_the_model_section_has_the_keys_of_its_family(overrides, expected):
    assert problems("configs/vlm/tiny_vqa.yaml", overrides) == [f"--set {overrides[0]}: {expected}"]


def test_differing_keys_are_dotted(write):
    one, other = load_config(write(SMALLEST)), load_config(write(SMALLEST), ["train.steps=3", "seed=2"])
    assert differing_keys(one, other) == ["seed", "train.steps"]
    assert differing_keys(one, one) == []
    assert differing_keys(one, load_config(write(SAMPLE + "prompts: [a]"))) == ["pipeline"]
    one = load_config("configs/vlm/tiny_vqa.yaml")
    other = load_config("configs/vlm/tiny_vqa.yaml", ["model={family: vl_bart, path: build/tiny-vlm, visual: image}"])
    found = differing_keys(one, other)
    assert {"model.family", "model.prompts", "model.visual"} <= set(found)
    assert "model.path" not in found


def test_paths_are_relative_to_here_then_to_the_packaged_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = resolve_path("configs/sdxl/demo.yaml")
    assert packaged.is_file()
    assert resolve_path("sdxl/demo.yaml") == packaged
    (tmp_path / "configs" / "sdxl").mkdir(parents=True)
    (tmp_path / "configs" / "sdxl" / "demo.yaml").write_text("mine")
    assert resolve_path("configs/sdxl/demo.yaml").read_text() == "mine"
    with pytest.raises(ValueError, match="does not exist"):
        resolve_path("../nowhere/else.yaml")


def test_paths_may_be_in_an_installed_package():
    found = resolve_path("package:easy_vqa/data/test/questions.json")
    assert found == Path(easy_vqa.__file__).parent / "data/test/questions.json"
    assert resolve_path("package:easy_vqa").is_dir()


@pytest.mark.parametrize("path", ["easy_vqa/no.json", "no_such_package/a", "easy_vqa.easy_vqa/a", "json/a", "", "/"])
def test_a_path_that_no_package_contains_is_an_error(path):
    with pytest.raises(ValueError, match=f"file: package:{path} does not exist: the package is not installed, or has"):
        resolve_path(f"package:{path}", "file")


def test_outside_a_checkout_the_error_says_where_samples_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data\.folder: samples/3d_icon .* checkout"):
        resolve_path("samples/3d_icon", "data.folder")
    with pytest.raises(ValueError, match=r"model\.path: samples/tiny-sdxl .* checkout"):
        resolve_model("samples/tiny-sdxl")


def test_in_a_checkout_a_missing_sample_is_an_ordinary_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples" / "3d_icon").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"samples/3d_icons does not exist.*did you mean '3d_icon'"):
        resolve_path("samples/3d_icons")


def test_models_are_local_paths_or_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert resolve_model("mine") == "mine"
    assert resolve_model("stabilityai/stable-diffusion-xl-base-1.0") == "stabilityai/stable-diffusion-xl-base-1.0"
    for missing in ("mien", "folder/model.safetensors", "./a/b", "/a/b", "a/b/c"):
        with pytest.raises(ValueError, match=r"model\.path"):
            resolve_model(missing)


@pytest.mark.parametrize("path", packaged_configs().values(), ids=lambda path: path.stem)
def test_shipped_configs_load_and_start_with_their_command(path):
    config = load_config(path)
    start = f"# dora-mm {config.command} {'jobs.csv --config ' if 'jobs.csv' in path.read_text()[:40] else ''}"
    assert path.read_text().startswith(f"{start}configs/{path.parent.name}/{path.name}")
    assert config.pipeline in SCHEMAS


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 3000 + "}" * 3000])
def test_a_config_that_is_nested_too_deeply(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match="nested too deeply"):
        load_config(tmp_path / "c.yaml")


def test_a_pipe_is_not_read_to_know_whether_it_is_an_adapter(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    assert not is_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("short", "name"), {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.items())
def test_a_dtype_may_have_its_short_name(write, short, name):
    given = [f"model.dtype={short}", f"train.mixed_precision={'no' if short == 'fp32' else short}"]
    for file in (write(SMALLEST), "configs/vlm/smolvlm_256m.yaml"):
        config = load_config(file, given)
        assert config.model.dtype == name
        assert f"dtype: {name}" in dump_config(config)
    for command in ("ask MODEL Why?", "merge MODEL ADAPTER OUT", "convert IN OUT --to peft"):
        assert build_parser().parse_args([*command.split(), "--dtype", short]).dtype == name
