"""The data section of vision-language configs: one task, or a list of tasks."""

from pathlib import Path

import pytest

from dora_mm.config.loader import ConfigError, dump_config, load_config
from dora_mm.config.paths import check_paths
from dora_mm.config.vl import EvalVLConfig, TrainVLConfig
from dora_mm.config.vl_data import SourceConfig, VLDataConfig, VLTaskConfig
from dora_mm.data.vl.needed import data_needed

HEAD = "pipeline: eval_vl\nmodel: {path: facebook/bart-base}\n"
CHAT = "{format: chat, file: rows.json}"
GQA = "{format: gqa, file: questions.json, images: images}"


def load(folder: Path, data: str, head: str = HEAD) -> EvalVLConfig:
    path = folder / "config.yaml"
    path.write_text(f"{head}data:\n  {data}\n")
    config = load_config(path)
    assert isinstance(config, EvalVLConfig)
    return config


def problem(folder: Path, data: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, data)
    return str(caught.value).partition(": ")[2]


def test_one_task_needs_no_list(tmp_path):
    short = load(tmp_path, f"task: gqa\n  valid: {GQA}")
    listed = load(tmp_path, f"tasks: [{{task: gqa, valid: {GQA}}}]")
    assert short.data.all_tasks == listed.data.all_tasks == listed.data.tasks
    assert short.data.tasks == ()
    assert [short.data.key_of("gqa"), listed.data.key_of("gqa")] == ["data", "data.tasks: gqa"]
    tasks = listed.data.tasks
    assert short.data.with_tasks(tasks).all_tasks == tasks
    for config in (short, listed):
        (tmp_path / "again.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "again.yaml") == config


def test_the_one_task_is_chat_unless_it_is_named(tmp_path):
    config = load(tmp_path, "valid: {format: chat, file: rows.json}")
    (task,) = config.data.all_tasks
    assert (task.task, task.valid.file) == ("chat", "rows.json")
    needed = data_needed(config.data, config.vision, config.model.path)
    assert "chat valid file" in needed
    assert "missing: a file or folder of your own" in needed


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (f"valid: {GQA}", "data: valid.format gqa is only for gqa, not for chat"),
        ("on_bad_data: skip", "data: has no data: give train or valid, or a list of tasks"),
        ("tasks: []", "data: has no data"),
        (f"tasks: [{{task: gqa, valid: {GQA}}}]\n  train: {GQA}\n  task: gqa", "data: give either train, or tasks"),
        (f"tasks: [{{task: gqa, valid: {GQA}}}]\n  task: gqa", "data: task has no effect beside tasks"),
        (f"tasks: [{{task: gqa, train: {GQA}}}]", "data.tasks: gqa has no valid split"),
        (f"task: gqa\n  train: {GQA}", "data has no valid split"),
        (f"tasks: [{', '.join(f'{{task: gqa, valid: {GQA}}}' for _ in 'ab')}]", "data: tasks names a task twice"),
        (
            "valid: {format: nlvr2, file: a, split: dev}",
            "refcoco and refcoco_refs, not for nlvr2",
        ),
        ("valid: {format: chats, file: a}", "data.valid.format: must be 'vqa_v2', "),
        ("valid: {share: 0.1}", "data: valid.share is a share of train, which is missing: name the format and file of"),
        ("tasks: [{task: gqa, valid: {share: 0.1}}]", "data.tasks[0]: valid.share is a share of train, which is"),
        (f"train: {CHAT}\n  valid: {{share: 1.0}}", "data.valid.share: must be less than 1, got 1.0"),
        (f"train: {CHAT}\n  valid: {{shar: 0.1}}", "data.valid.shar: unknown key, did you mean 'share'?"),
        (f"train: {CHAT}\n  valid: {{share: 0.1, fil: a}}", "data.valid.fil: unknown key, did you mean 'file'?"),
        (f"train: {CHAT}\n  valid: {{format: chat, fil: a}}", "data.valid.fil: unknown key, did you mean 'file'?"),
        (
            f"train: {CHAT}\n  valid: {{share: 0.1, file: a}}",
            "data.valid: has share, which is of the training",
        ),
        (f"train: {CHAT}\n  valid: 0.1", "data.valid: must be a section of keys, got 0.1"),
        (
            "task: gqa\n  valid: {format: gqa, file: a}",
            "data has a source without images",
        ),
    ],
)
def test_mistakes_are_named_as_the_config_has_the_keys(tmp_path, data, message):
    assert message in problem(tmp_path, data)


def test_the_paths_of_both_forms_are_checked(tmp_path):
    for data, key in (
        ("valid: {format: chat, file: none.json}", "data.valid.file"),
        (f"tasks: [{{task: gqa, valid: {GQA}}}]", "data.tasks[0].valid.file"),
    ):
        with pytest.raises(ValueError, match=rf"^{key.replace('[', '.').replace(']', '.')}: .* does not exist"):
            check_paths(load(tmp_path, data), new_run=False)


def test_rows_of_conversations_may_contain_their_images(tmp_path):
    assert load(tmp_path, "task: choice\n  valid: {format: choices, file: a.tsv, split: dev}").data.task == "choice"
    assert VLDataConfig.model_validate({"valid": {"format": "chat", "file": "a.json"}}).all_tasks[0].train is None


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        ("beams: 2", "decode.beams has no effect: no task has captions"),
        ("min_answer_count: 9", "decode.min_answer_count has no effect: no answers are chosen from the training data"),
    ],
)
def test_settings_of_answers_that_the_tasks_do_not_have_are_refused(tmp_path, decode, message):
    assert message in problem(tmp_path, f"valid: {GQA}\n  task: gqa\ndecode: {{{decode}}}")
    captions = "{format: coco_captions, file: captions.json, images: images}"
    tasks = f"tasks: [{{task: caption, valid: {captions}}}, {{task: gqa, valid: {GQA}, train: {GQA}}}]"
    load(tmp_path, f"{tasks}\ndecode: {{answers: rank, {decode}}}")


def test_a_file_on_the_command_line_replaces_the_share_of_a_recipe():
    recipe = "configs/vlm/smolvlm_256m.yaml"
    config = load_config(recipe, ["data.valid.file=dev.json", "data.valid.format=chat"])
    assert isinstance(config, TrainVLConfig)
    assert isinstance(config.data.valid, SourceConfig)
    assert (config.data.valid.file, config.data.valid.limit) == ("dev.json", 500)
    with pytest.raises(ConfigError, match=r"data\.valid: has share, .* and so no file"):
        load_config(recipe, ["data.valid.file=dev.json", "data.valid.share=0.1"])


def test_the_sources_of_a_task():
    source = {"format": "chat", "file": "a.json"}
    task = VLTaskConfig.model_validate({"task": "chat", "train": source, "valid": {"share": 0.1}})
    assert list(task.sources) == ["train"]
    assert task.source_of("valid") == task.source_of("train") == task.train
    task = VLTaskConfig.model_validate({"task": "chat", "train": source, "valid": {**source, "file": "b.json"}})
    assert [each.file for each in task.sources.values()] == ["a.json", "b.json"]
    assert task.source_of("valid") == task.valid
