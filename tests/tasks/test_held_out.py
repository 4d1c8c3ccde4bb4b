"""Held-out losses are functions of the weights alone, and means of what a training minimises."""

from contextlib import nullcontext

import pytest
import torch

from dora_mm.config.images import DataConfig
from dora_mm.config.losses import LossConfig
from dora_mm.data.images.folder import read_training_images
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.splits import TrainingSet, ValidationSet
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask
from dora_mm.tasks.held_out import NUM_TIMES, ImageLosses, RowLosses
from dora_mm.tasks.image_batches import CaptionedBatches
from dora_mm.tasks.prompt_encoder import PromptEncoder
from dora_mm.utils.losses import LossSum
from dora_mm.utils.randomness import generator


@pytest.fixture
def part(tiny, image_folder):
    config = DataConfig(folder=str(image_folder), resolution=64)
    images = read_training_images(config)
    return CaptionedBatches(tiny, images, PromptEncoder(tiny, trained=False), config, batch_size=1, seed=0)


def measure(part, *, batch_size=3, **config) -> float:
    task = DiffusionTask(part.model, LossConfig(**config))
    losses = ImageLosses(task, {"loss": part}, batch_size=batch_size, precision=nullcontext)
    return losses([part.model.unet])["loss"]


def test_it_is_the_mean_over_images_and_stratified_times_with_their_own_noise(part):
    task, expected = DiffusionTask(part.model, LossConfig()), []
    with torch.no_grad():
        for index, image in enumerate(part.images):
            one: ConditionedLatents = part.fixed([index])
            for number in range(NUM_TIMES):
                stream = generator(0, number, f"fixed noise of {image.digest}")
                noise, time = torch.randn(one.latents.shape, generator=stream), torch.tensor([125 * number + 62])
                expected.append(float(task.losses(one, noise, time)))
    assert measure(part) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_the_losses_of_each_image_are_those_of_the_mean(part):
    task = DiffusionTask(part.model, LossConfig())
    losses = ImageLosses(task, {"loss": part}, batch_size=3, precision=nullcontext)
    each = losses.by_image([part.model.unet])
    assert [(row.digest, row.text, row.group, len(row.losses)) for row in each] == [
        (image.digest, image.caption, "64", NUM_TIMES) for image in part.images
    ]
    values = [value for row in each for value in row.losses]
    assert losses([part.model.unet])["loss"] == pytest.approx(sum(values) / len(values), rel=1e-12)
    again = ImageLosses(task, {"loss": part}, batch_size=3, precision=nullcontext).by_image([part.model.unet])
    assert again == each


def test_it_draws_nothing_and_leaves_no_trace(part):
    part.model.unet.train()
    before = torch.get_rng_state()
    first = measure(part)
    assert measure(part) == first
    assert measure(part, batch_size=1) == pytest.approx(first, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), before)
    assert part.model.unet.training
    part.model.unet.eval()


@pytest.mark.parametrize("config", [{}, {"timestep_bias": 1.0}, {"timesteps": "logit_normal"}])
def test_the_times_are_quantiles_of_those_that_are_drawn(part, config):
    task = DiffusionTask(part.model, LossConfig(**config))
    drawn = task._times(torch.empty(20_000, 4, 8, 8), torch.Generator().manual_seed(0))
    shares = (torch.arange(NUM_TIMES) + 0.5) / NUM_TIMES
    expected = torch.quantile(drawn.float(), shares)
    torch.testing.assert_close(task.times_at(shares, (8, 8)).float(), expected, rtol=0.03, atol=12)


class Counting:
    """A model whose loss of a row is the number of its id, as the task says it: over rows, or over two tokens each."""

    networks = {"model": torch.nn.Linear(1, 1)}  # noqa: RUF012

    def batch(self, task, examples, images, targets, *, on_bad_data):
        assert all(target == ("yes", 1.0) for target in targets)
        return [float(example.id) for example in examples]

    def loss(self, batch, stream):
        assert not torch.is_grad_enabled()
        return LossSum(torch.tensor(sum(batch)), torch.tensor(2.0 * len(batch)))


class Rows(list):
    def select(self, rows):
        return Rows(self[row] for row in rows)

    def answered(self):
        return Rows(row for row in self if row.answers)


@pytest.mark.parametrize("limit", [None, 4])
def test_rows_count_with_their_likeliest_answer_whatever_their_batches(limit):
    rows = Rows(Example(str(n), (), "?", ("no", "yes"), (0.3, 1.0)) for n in range(1, 8))
    rows[2] = Example("3", (), "?")  # has no answer
    training = {"vqa": TrainingSet(rows, None, 3)}  # type: ignore[arg-type]
    settings = {"limit": limit, "on_bad_data": "stop", "precision": nullcontext}
    model, sets = Counting(), {"vqa": ValidationSet(rows, None)}  # type: ignore[arg-type]
    losses = RowLosses(model, sets, training, model.loss, **settings)  # type: ignore[arg-type]
    numbers = [n for n in range(1, 8) if n != 3 and n <= (limit or 7)]
    assert losses() == {"vqa": sum(numbers) / (2 * len(numbers))}
    each = losses.by_row()
    assert [(row.group, row.text, row.answer, row.losses) for row in each] == [
        ("vqa", "?", "yes", [n / 2]) for n in numbers
    ]
    assert len({row.id for row in each}) == len(each)


def test_processes_share_the_batches_and_all_know_the_result(monkeypatch, part):
    whole = measure(part)
    shares = []
    for index in (0, 1):  # as the other process would answer
        monkeypatch.setattr("accelerate.utils.gather_object", lambda own: shares.append(own) or own)
        task = DiffusionTask(part.model, LossConfig())
        process = {"batch_size": 3, "precision": nullcontext, "process": (index, 2)}
        ImageLosses(task, {"loss": part}, **process)([part.model.unet])
    together = [*shares[0], *shares[1]]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: together)
    losses = ImageLosses(task, {"loss": part}, batch_size=3, precision=nullcontext, process=(0, 2))
    assert losses([part.model.unet]) == {"loss": whole}
    assert len(shares[0]) + len(shares[1]) == len(losses.batches["loss"])
