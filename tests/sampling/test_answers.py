"""Answering whole splits."""

import pytest
import torch

from dora_mm.config.vl import DecodeConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.rows import RowTooLongError
from dora_mm.data.vl.splits import ValidationSet
from dora_mm.models.vl.vl_bart.answering import Answerer
from dora_mm.sampling.answers import answer_all
from tests.shared.vl.small_vl_bart import small_inputs, small_tokenizer, small_vl_bart


def test_predictions_keep_the_order_and_the_batches_do_not_matter():
    features = torch.randn(7, 1, 49, 8)
    decode = Answerer(small_vl_bart(), small_tokenizer(), "vqa", DecodeConfig())

    def answer(examples, images):
        assert images == "folder"
        found = small_inputs([example.text for example in examples])
        return decode(found._replace(visual_features=torch.stack([features[int(each.id)] for each in examples])))

    table = [Example(str(i), (f"{i}.jpg",), "is there a red cat?" if i % 2 else "bus?") for i in range(7)]
    split = ValidationSet(table, "folder")  # type: ignore[arg-type]

    def predict(batch_size, limit=None):
        return answer_all({"vqa": answer}, [], {"vqa": split}, batch_size, limit)["vqa"]

    concurrency, batched = predict(7), predict(3)
    assert [example.id for example, _ in concurrency] == [str(i) for i in range(7)]
    assert concurrency == batched
    assert predict(64, 2) == concurrency[:2]


@pytest.mark.parametrize("on_bad_data", ["stop", "skip"])
def test_a_row_that_is_too_long_is_left_out_in_either_mode_and_a_broken_one_in_one(on_bad_data, caplog):
    def answer(examples, images):
        for example in examples:
            if example.text == "long":
                raise RowTooLongError(f"row {example.id} is too long")
            if example.text == "broken":
                raise ValueError(f"row {example.id} is broken")
        return [example.text for example in examples]

    class Table(list):
        def __init__(self, *texts):
            super().__init__(Example(str(number), (), text) for number, text in enumerate(texts))
            self.on_bad_data = on_bad_data

    def answers(*texts):
        split = ValidationSet(Table(*texts), None)  # type: ignore[arg-type]
        return [answer.text for _, answer in answer_all({"chat": answer}, [], {"chat": split}, 2)["chat"]]

    assert answers("a", "long", "b") == ["a", "b"]
    assert "row 1 is too long; left out of the answers" in caplog.text
    for texts in (("a", "broken"), ("long", "broken", "a")):
        if on_bad_data == "stop":
            with pytest.raises(ValueError, match="is broken"):
                answers(*texts)
        else:
            assert answers(*texts) == ["a"]
