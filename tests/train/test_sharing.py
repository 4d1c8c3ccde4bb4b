"""Other processes than those that started a run: which can go on, and which micro-batches each of them has."""

from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from dora_mm.config import dump_config, load_config
from dora_mm.train.epochs import in_steps
from dora_mm.train.preflight import checks
from dora_mm.train.resuming import check_changes
from dora_mm.train.run import training_run
from dora_mm.train.sharing import about_processes, check_processes, recorded, shared_among
from dora_mm.utils.run_directory import RunDirectory
from tests.shared.small_training import small_training

CONFIG = """\
pipeline: train_diffusion
model: {path: some/model}
adapter: {rank: 4}
data: {folder: images, resolution: 128}
optimizer: {lr: 1e-4}
train: {steps: 12, batch_size: 4, gradient_accumulation_steps: 2}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "mine.yaml").write_text(CONFIG)
    return load_config(tmp_path / "mine.yaml", [f"output={tmp_path / 'run'}"])


def run_of(config, count: int, **inputs):
    """The folder of a run that so many processes have started."""
    return RunDirectory.create("mine", dump_config(config), config.output, recorded(config.train, count) | inputs).path


@pytest.mark.parametrize(("count", "accumulated"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_processes_share_the_micro_batches_of_a_step(config, count, accumulated):
    run = run_of(config, 3)
    check_processes(run, config.train, count)
    shared = shared_among(config, count, run)
    assert shared.train == config.train.model_copy(update={"gradient_accumulation_steps": accumulated})
    assert shared_among(config, count, None) is config
    said = about_processes(run, config.train, count)
    change = f"changes from 3 to {count}, and train.gradient_accumulation_steps with it from 2 to {accumulated}: "
    assert (change in said) == (count != 3) == bool(said)


def test_epochs_are_as_many_steps_for_other_processes(config, image_folder, tmp_path):
    """The same config starts a run of 3 processes that accumulate 2, and goes on with it in 1 that accumulates 6."""
    config = load_config(
        tmp_path / "mine.yaml",
        [
            f"data.folder={image_folder}",
            "data.repeats=24",
            "train={epochs: 2, batch_size: 4, gradient_accumulation_steps: 2}",
        ],
    )
    started = in_steps(config, 3)
    assert started.train.steps == 2 * (24 * 5) // (4 * 2 * 3)
    assert in_steps(config, 1, run_of(started.model_copy(update={"output": str(tmp_path / "run")}), 3)) == started


def test_others_are_refused_with_the_numbers_that_would_do(config):
    run = run_of(config, 3)
    accelerator = SimpleNamespace(num_processes=4, device="cpu")
    with pytest.raises(ValueError, match="by 4 processes: the micro-batches of its steps .6. can be") as error:
        checks(accelerator, config, run)["processes"]()  # type: ignore[arg-type]
    assert str(error.value).endswith("divided among 1, 2, 3 or 6")
    assert shared_among(config, 4, run) is config


def test_a_step_of_a_single_micro_batch_is_not_divided(config):
    config = config.model_copy(update={"train": config.train.model_copy(update={"gradient_accumulation_steps": 1})})
    with pytest.raises(ValueError, match="steps .1. can be divided among 1$"):
        check_processes(run_of(config, 1), config.train, 2)


@pytest.mark.parametrize("inputs", [{"the number of processes": "2"}, {"the micro-batches of a step": "4"}])
def test_a_number_that_does_not_fit_the_others_is_damage(config, inputs):
    run = run_of(config, 3, **inputs)
    with pytest.raises(ValueError, match="inputs.json is damaged .the number of processes."):
        check_processes(run, config.train, 1)


@pytest.mark.parametrize("text", ["", "0", "two", "²", None])
def test_a_number_that_is_none_is_damage(config, text):
    run = run_of(config, 3, **{"the number of processes": text})
    with pytest.raises(ValueError, match="inputs.json is damaged"):
        shared_among(config, 1, run)


def test_a_run_of_an_earlier_release_has_its_processes_alone(config):
    inputs = {"the number of processes": "3"}
    run = RunDirectory.create("mine", dump_config(config), config.output, inputs).path
    assert shared_among(config, 1, run).train.gradient_accumulation_steps == 6


def test_accumulation_is_not_changed_by_hand(config):
    after = config.model_copy(update={"train": config.train.model_copy(update={"gradient_accumulation_steps": 6})})
    with pytest.raises(ValueError, match="cannot change from 2 to 6: .* for another number of processes, --resume"):
        check_changes("--resume RUN", config, after)


def test_a_run_does_not_go_on_with_other_steps(config):
    """As of a recipe that has not asked how many micro-batches each process has."""
    run = run_of(config, 3)
    with (
        pytest.raises(ValueError, match="cannot be resumed: the micro-batches of a step changed"),
        training_run(Accelerator(cpu=True), config, {}, run, config.train),
    ):
        pass


def test_the_processes_of_the_steps_are_recorded_and_reported(config, caplog):
    """As a run that two processes have started is resumed by one, which is where this test runs."""
    caplog.set_level("INFO")
    with training_run(Accelerator(cpu=True), config, {}, None, config.train) as run:
        small_training(run, steps=3).fit()
    numbers = {'"the number of processes": "1"': '"the number of processes": "2"', 'step": "2"': 'step": "4"'}
    for name, values in {"inputs.json": numbers, "versions.json": {'"processes": 1': '"processes": 2'}}.items():
        text = (run.path / name).read_text()
        for old, new in values.items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        (run.path / name).write_text(text)
    caplog.clear()
    before = (run.path / "config.yaml").read_text()
    shared = shared_among(config, 1, run.path)
    with training_run(Accelerator(cpu=True), config, {}, run.path, shared.train):
        pass
    assert about_processes(run.path, config.train, 1) in caplog.messages
    other = (
        "3 of 3 finished steps were computed under other circumstances, which may change last bits: processes 2 is 1"
    )
    assert other in caplog.messages
    assert {step: record["processes"] for step, record in run.circumstances().items()} == {0: 2, 3: 1}
    assert (run.path / "config.yaml").read_text() == before  # it goes on with two as it began
    assert shared_among(config, 2, run.path) is config
