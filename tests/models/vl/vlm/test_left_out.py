"""Rows of a training that cannot be encoded: they are missing in their batches, counted and named, or stop it."""

import logging
import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from dora_mm.adapting.networks import adapt
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.splits import TrainingSet
from dora_mm.data.vl.tables import open_table
from dora_mm.models.vl.row_counts import RowCounts
from dora_mm.models.vl.vlm.encoding import IGNORED
from dora_mm.models.vl.vlm.family import VLM, VLMBatch
from dora_mm.tasks.vl import VLBatches
from tests.shared.data.vl_files import write_json
from tests.shared.data.vlm_rows import write_images

FAULT = re.compile(r"row r2 of chat: .+broken\.png is not a complete image")


@pytest.fixture
def rows(tmp_path):
    """Makes a training set of seven rows, r2 with so many images or a broken one, and batches of this size."""
    loaded_images = write_images(tmp_path)
    (loaded_images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")

    def make(images: int | None, batch_size: int) -> TrainingSet:
        said = [
            {
                "id": f"r{number}",
                "image": ["square.png"] * count if count is not None else ["broken.png"],
                "conversations": [
                    {"from": "human", "value": "<image>" * (1 if count is None else count) + "What?"},
                    {"from": "gpt", "value": f"x{number}"},
                ],
            }
            for number, count in enumerate([1, 0, images, 1, 2, 1, 1])
        ]
        file = str(write_json(tmp_path / "chat.json", said))
        source = SourceConfig(format="chat", file=file, images=str(loaded_images))
        return TrainingSet(open_table(source, tmp_path / "tables", on_bad_data="skip"), str(loaded_images), batch_size)

    return make


@pytest.fixture
def model(tiny_vlm):
    return VLM(VLMModelConfig(path=str(tiny_vlm("llava")), max_length=40))


class Recorder:
    """Encodes the rows of batches with a model, and returns their labels by the rows that are in them."""

    def __init__(self, model: VLM):
        self.model, self.left_out = model, []

    def batch(self, task, examples, images, targets, *, on_bad_data):
        batch = self.model.batch(task, examples, images, targets, on_bad_data=on_bad_data)
        self.left_out += batch.left_out
        names = [row.id for row in examples if not any(row.id in text for text in batch.left_out)]
        return [(names, inputs["input_ids"].tolist(), labels.tolist()) for inputs, labels, _ in batch.groups]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_its_batch_is_smaller_and_no_other_row_moves(batch_size, model, rows):
    """Against the same rows without the fault, in two epochs."""
    with_fault, without = Recorder(model), Recorder(model)
    faulty_rows = {"chat": rows(None, batch_size)}
    found = VLBatches(with_fault, faulty_rows, seed=0, on_bad_data="skip")  # type: ignore[arg-type]
    expected = VLBatches(without, {"chat": rows(1, batch_size)}, seed=0, on_bad_data="skip")  # type: ignore[arg-type]
    assert found.steps_per_epoch == expected.steps_per_epoch
    for number in range(2 * found.steps_per_epoch):
        faulty, whole = found(number), expected(number)
        names = whole[0][0]
        if "r2" not in names:
            assert faulty == whole
        else:
            assert [name for group in faulty for name in group[0]] == [name for name in names if name != "r2"]
    assert len(with_fault.left_out) >= 2
    assert all(FAULT.match(text) for text in with_fault.left_out)
    assert without.left_out == []


def test_it_stops_a_training_otherwise(model, rows):
    batches = VLBatches(model, {"chat": rows(None, 7)}, seed=0)
    with pytest.raises(ValueError, match=FAULT.pattern + ".*; data.on_bad_data: skip leaves such rows out"):
        batches(0)


def test_it_is_counted_each_time_and_named_once(model, rows, caplog):
    batch = VLBatches(model, {"chat": rows(None, 7)}, seed=0, on_bad_data="skip")(0)
    assert sum(len(labels) for _, labels, _ in batch.groups) == 6
    with caplog.at_level(logging.WARNING):
        losses = [model.loss(batch, torch.Generator()).mean for _ in range(2)]
        with torch.no_grad():  # a validation does not count
            model.loss(batch, torch.Generator())
    assert torch.equal(*losses)
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert FAULT.match(message)
    resumed = RowCounts(40)
    resumed.load_state_dict(model.counts.state_dict())
    assert (resumed.num_cut, resumed.num_left_out) == (0, 2)


def test_processes_add_what_they_have_counted_since_they_last_did():
    """Also after a checkpoint, whose numbers are those of all: each goes on from them, and they count once."""
    one, two = RowCounts(40), RowCounts(40)
    one.add(1, ["a row"])
    two.add(2, [])
    for _ in range(2):
        every = [one.numbers(), two.numbers()]
        for counts in (one, two):
            counts.merge(every)
            assert (counts.num_cut, counts.num_left_out) == (3, 1)
    others = [RowCounts(40) for _ in range(3)]
    for number, counts in enumerate(others):
        counts.load_state_dict(one.state_dict())
        counts.add(number, [])
    every = [counts.numbers() for counts in others]
    for counts in others:
        counts.merge(every)
        assert (counts.num_cut, counts.num_left_out) == (3 + 0 + 1 + 2, 1)


@pytest.mark.parametrize("on_bad_data", ["stop", "skip"])
@pytest.mark.parametrize(("images", "tokens"), [(3, 26), (10, 61)])
def test_a_row_that_loses_its_whole_answer_is_left_out_and_counted(tiny_vlm, rows, on_bad_data, images, tokens):
    """In place of a loss of 0, which counted as a row of a task whose loss is a mean over rows; or images are cut."""
    short = VLM(VLMModelConfig(path=str(tiny_vlm("llava")), max_length=18, prompts={"vqa": "{text}"}))
    found = rows(images, 7)
    batch = VLBatches(short, {"chat": found}, seed=0, on_bad_data=on_bad_data)(0)
    about = f"its whole answer is beyond 18 tokens (model.max_length); {4 * images} of its {tokens} are images"
    assert batch.left_out == (f"row r2 of chat: {about}",)
    assert sum(len(labels) for _, labels, _ in batch.groups) == 6
    assert all((labels != IGNORED).any(1).all() for _, labels, _ in batch.groups)
    short.loss(batch, torch.Generator())
    assert short.counts.num_left_out == 1
    example = found.table[2]
    asked = replace(example, turns=(), answers=("x",))
    batch = short.batch("vqa", [asked, replace(asked, images=())], found.images, [("x", 1.0)] * 2)
    assert short.loss(batch, torch.Generator()).count == 1


def test_an_answer_is_lost_where_prompts_have_loss_too(tiny_vlm):
    question = "What is the colour of the ball that lies on the table near the door?"
    example = Example("q1", (), question, ("red",), (1.0,))
    path = str(tiny_vlm("llava"))
    for over, length, num_lost in (("answers", 12, 1), ("prompts and answers", 12, 1), ("prompts and answers", 999, 0)):
        vlm = VLM(VLMModelConfig.model_validate({"path": path, "max_length": length, "loss_over": over}))
        assert len(vlm.batch("chat", [example], None, [("red", 1.0)]).left_out) == num_lost


def test_an_image_that_cannot_be_read_is_left_out_by_the_name_of_its_row(model, rows, tmp_path):
    found = rows(1, 7)
    (tmp_path / "square.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    batch = VLBatches(model, {"chat": found}, seed=0, on_bad_data="skip")(0)
    assert len(batch.left_out) == 6
    assert all("square.png is not a complete image" in text for text in batch.left_out)
    assert batch.left_out[0].startswith("row r")


def test_a_batch_without_rows_is_a_loss_of_zero_with_a_gradient_of_zero(model, rows):
    adapted = adapt(model.networks, model.target_maps, VLAdapterConfig(rank=2), seed=0, backend="torch")
    found = rows(None, 1)
    batch = model.batch("chat", [found.table[2]], found.images, [("x", 1.0)], on_bad_data="skip")
    assert batch.groups == ()
    loss = model.loss(batch, torch.Generator()).mean
    assert loss.dtype == torch.float32
    assert loss.item() == 0
    loss.backward()
    reached = {name: p.grad for name, p in adapted.parameters.items() if p.grad is not None}
    assert all("language_model" in name and not gradient.any() for name, gradient in reached.items())
    assert len(reached) == 1


def test_a_sharded_model_cannot_go_without_rows(model, monkeypatch):
    """The other processes would wait for its part of the weights."""
    monkeypatch.setattr("dora_mm.models.vl.vlm.network.is_sharded", lambda parameter: True)
    with pytest.raises(ValueError, match=r"train\.shard: all rows of a process's batch are too long"):
        model.loss(VLMBatch("chat", ()), torch.Generator())


def test_a_resumed_run_may_have_another_length_where_no_row_that_was_seen_is_cut_otherwise(tiny_vlm, rows):
    """Those of a validation count, too: the best adapter so far was chosen by their losses."""
    found, path = rows(1, 7), str(tiny_vlm("llava"))

    @cache
    def seen(length, *, validation=False):
        vlm = VLM(VLMModelConfig(path=path, max_length=length))
        with torch.set_grad_enabled(not validation):
            vlm.loss(VLBatches(vlm, {"chat": found}, seed=0)(0), torch.Generator())
        return vlm.counts.state_dict()

    longest = seen(None)["longest"]
    whole = VLM(VLMModelConfig(path=path)).lengths("chat", found.table, range(7), found.images)
    assert longest == max(whole.tokens)
    for before, after in ((longest, longest + 1), (None, longest), (longest - 1, longest - 1)):
        RowCounts(after).load_state_dict(seen(before))
    for before, after in ((longest, longest - 1), (longest - 1, longest), (None, longest - 1)):
        for validation in (False, True):
            with pytest.raises(ValueError, match=rf"model\.max_length cannot change from .* rows of up to {longest}"):
                RowCounts(after).load_state_dict(seen(before, validation=validation))
